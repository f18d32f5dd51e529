"""The regularised loss against autograd, finite and complex steps, scikit-learn and slow loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from bigmodel_utils import losses

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))  # rows, features: m < d included
WEIGHT_DECAYS = st.floats(1e-6, 1e3)
SETTINGS = settings(deadline=None)  # the first example pays for imports


def make(m: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random features, targets and weights."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(m, d)), generator.normal(size=m), generator.normal(size=d)


def loss_by_loop(x, y, w, weight_decay):
    """The formula, written as slowly as it can be."""
    total = 0.0
    for row, target in zip(x, y):
        total += (target - sum(a * b for a, b in zip(row, w))) ** 2
    return total / (2 * len(y)) + weight_decay / 2 * sum(b * b for b in w)


@SETTINGS
@given(SIZES, WEIGHT_DECAYS, st.integers(0, 1000))
def test_loss_equals_the_slow_loop(size, weight_decay, seed):
    x, y, w = make(*size, seed)
    tensors = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(w)
    loss = losses.regularized_mse(tensors[0] @ tensors[2], tensors[1], [tensors[2]], weight_decay)
    assert loss.ndim == 0
    assert loss.item() == pytest.approx(loss_by_loop(x, y, w, weight_decay), rel=1e-12)


def as_function_of_weights(x, y, weight_decay):
    """The loss of the linear model as a function of its weights alone, real or complex."""
    return lambda w: losses.regularized_mse(x.to(w.dtype) @ w, y.to(w.dtype), w, weight_decay)


@SETTINGS
@given(SIZES, WEIGHT_DECAYS, st.integers(0, 1000))
def test_gradient_equals_autograd_and_complex_step(size, weight_decay, seed):
    x, y, w = (torch.from_numpy(values) for values in make(*size, seed))
    function, by_hand = as_function_of_weights(x, y, weight_decay), losses.gradient(x, y, w, weight_decay)
    (by_autograd,) = torch.autograd.grad(function(w.requires_grad_()), w)
    torch.testing.assert_close(by_hand.detach(), by_autograd, rtol=1e-10, atol=1e-12)
    steps = 1e-30j * torch.eye(len(w), dtype=torch.complex128)
    by_complex_step = torch.stack([function(w.detach() + step).imag for step in steps]) / 1e-30
    torch.testing.assert_close(by_hand.detach(), by_complex_step, rtol=1e-10, atol=1e-12)


@SETTINGS
@given(SIZES, WEIGHT_DECAYS, st.integers(0, 1000))
def test_hessian_equals_autograd_and_is_bounded_below_by_weight_decay(size, weight_decay, seed):
    x, y, w = (torch.from_numpy(values) for values in make(*size, seed))
    by_hand = losses.hessian(x, weight_decay)
    expected = torch.autograd.functional.hessian(as_function_of_weights(x, y, weight_decay), w)
    torch.testing.assert_close(by_hand, expected, rtol=1e-9, atol=1e-11)
    assert torch.linalg.eigvalsh(by_hand).min() >= weight_decay * (1 - 1e-9) - 1e-12


def test_derivatives_take_numpy_arrays_too():
    x, y, w = make(7, 4, 5)
    tensors = [torch.from_numpy(values) for values in (x, y, w)]
    np.testing.assert_allclose(losses.gradient(x, y, w, 0.2), losses.gradient(*tensors, 0.2), rtol=1e-12)
    np.testing.assert_allclose(losses.hessian(x, 0.2), losses.hessian(tensors[0], 0.2), rtol=1e-12)


@SETTINGS
@given(SIZES, WEIGHT_DECAYS, st.integers(0, 1000))
def test_solution_equals_scikit_learn_and_zeroes_the_gradient(size, weight_decay, seed):
    x, y, _ = make(*size, seed)
    w = losses.ridge_solution(x, y, weight_decay)
    expected = Ridge(alpha=len(y) * weight_decay, fit_intercept=False, solver="svd").fit(x, y).coef_
    np.testing.assert_allclose(w, expected, rtol=1e-7, atol=1e-9)
    assert np.abs(losses.gradient(x, y, w, weight_decay)).max() < 1e-10 * (1 + np.abs(x.T @ y).max())


@SETTINGS
@given(SIZES, st.integers(0, 1000))
def test_without_penalty_the_solution_has_minimum_norm(size, seed):
    x, y, _ = make(*size, seed)
    x = np.concatenate([x, x[:, :1]], axis=1)  # a doubled column: never of full column rank
    np.testing.assert_allclose(losses.ridge_solution(x, y, 0.0), np.linalg.pinv(x) @ y, rtol=1e-6, atol=1e-8)


def test_tiny_penalty_on_deficient_data_stays_near_minimum_norm():
    x, y, _ = make(30, 4, 0)
    x = np.concatenate([x, x], axis=1)
    np.testing.assert_allclose(losses.ridge_solution(x, y, 1e-20), np.linalg.pinv(x) @ y, rtol=1e-8)
    x32 = x.astype(np.float32)
    x32[:, 4:] *= np.float32(1 / 3)
    x32[:, 4:] *= np.float32(3)  # equal up to float32 roundoff only
    assert np.abs(losses.ridge_solution(x32, y.astype(np.float32), 0.0)).max() < 10


def test_ill_conditioned_data_keep_their_digits():
    x = np.vander(np.linspace(0, 1, 50), 10, increasing=True)
    y = np.sin(3 * x[:, 1])
    augmented = np.concatenate([x, np.sqrt(50 * 1e-12) * np.eye(10)])
    expected = np.linalg.lstsq(augmented, np.concatenate([y, np.zeros(10)]), rcond=None)[0]
    np.testing.assert_allclose(losses.ridge_solution(x, y, 1e-12), expected, rtol=1e-7)


def test_path_is_the_solutions_one_by_one():
    x, y, _ = make(20, 6, 1)
    path = losses.ridge_path(x, y, [0.0, 0.1, 10.0])
    assert path.shape == (3, 6)
    for row, weight_decay in zip(path, [0.0, 0.1, 10.0]):
        np.testing.assert_allclose(row, losses.ridge_solution(x, y, weight_decay), rtol=1e-12)


def test_several_targets_are_solved_one_by_one():
    x, y, _ = make(20, 6, 2)
    both = losses.ridge_solution(x, np.stack([y, -2 * y], axis=1), 0.3)
    single = losses.ridge_solution(x, y, 0.3)
    np.testing.assert_allclose(both, np.stack([single, -2 * single], axis=1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kind_and_dtype_are_kept(dtype):
    x, y, _ = make(9, 3, 3)
    solution = losses.ridge_solution(torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype), 0.1)
    assert isinstance(solution, torch.Tensor) and solution.dtype == dtype
    array = losses.ridge_solution(x.astype(str(dtype).removeprefix("torch.")), y, 0.1)
    assert isinstance(array, np.ndarray) and str(array.dtype) == str(dtype).removeprefix("torch.")
    assert losses.ridge_solution(np.eye(2, dtype=int), np.array([1, 2]), 0.0).tolist() == [1.0, 2.0]


def test_parameters_may_be_a_module_s_or_one_tensor():
    model = torch.nn.Linear(3, 1).double()
    x, y = torch.ones(4, 3, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    expected = model(x).square().sum() / 8 + 0.25 * sum(p.square().sum() for p in model.parameters())
    loss = losses.regularized_mse(model(x), y, model.parameters(), 0.5)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.weight.grad is not None and model.bias.grad is not None
    weight_only = losses.regularized_mse(model(x), y, model.weight, 0.5)
    torch.testing.assert_close(weight_only, losses.regularized_mse(model(x), y, [model.weight], 0.5))


def test_no_parameters_leave_the_data_term():
    assert losses.regularized_mse(torch.ones(4), torch.zeros(4), [], 7.0).item() == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3, 1), [], 0.0), "must be equal"),
        ((torch.zeros(3, 1), torch.zeros(3), [], 0.0), "must be equal"),
        ((torch.zeros(0), torch.zeros(0), [], 0.0), "at least one row"),
        ((torch.tensor(1.0), torch.tensor(1.0), [], 0.0), "at least one row"),
        ((torch.zeros(3), torch.zeros(3), [], -0.1), "at least 0"),
        ((torch.zeros(3), torch.zeros(3), [], float("nan")), "at least 0"),
        ((torch.zeros(3), torch.tensor([0.0, float("nan"), 0.0]), [], 0.0), "target has NaN"),
        ((torch.tensor([float("inf"), 0.0]), torch.zeros(2), [], 0.0), "prediction has NaN"),
    ],
)
def test_loss_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        losses.regularized_mse(*arguments)


@pytest.mark.parametrize(
    ("features", "targets", "weight_decay", "message"),
    [
        (np.zeros(3), np.zeros(3), 0.1, r"\(m, d\) array"),
        (np.zeros((0, 3)), np.zeros(0), 0.1, r"\(m, d\) array"),
        (np.ones((3, 2)), np.zeros(4), 0.1, "a target for each"),
        (np.ones((3, 2)), np.zeros((3, 1, 1)), 0.1, "a target for each"),
        (np.ones((3, 2)), np.zeros(3), -1.0, "at least 0"),
        (np.full((3, 2), np.nan), np.zeros(3), 0.1, "NaN or infinite"),
        (np.ones((3, 2)), np.array([0, np.inf, 0]), 0.1, "NaN or infinite"),
    ],
)
def test_solution_refuses(features, targets, weight_decay, message):
    for kind in (np.asarray, torch.from_numpy):
        with pytest.raises(ValueError, match=message):
            losses.ridge_solution(kind(features), kind(targets), weight_decay)


def test_gradient_and_hessian_refuse_shapes_that_would_broadcast():
    x, y, w = make(5, 3, 4)
    with pytest.raises(ValueError, match="expected weights"):
        losses.gradient(x, y[:, None], w, 0.1)
    with pytest.raises(ValueError, match="expected weights"):
        losses.gradient(x, y, w[:, None], 0.1)
    with pytest.raises(ValueError, match=r"\(m, d\) array"):
        losses.hessian(y, 0.1)
