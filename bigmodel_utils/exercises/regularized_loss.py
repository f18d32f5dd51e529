"""Checkers of chapter 3's exercises; each compares the answer with something computed another way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bigmodel_utils import losses


def _data(m: int = 12, d: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    return generator.normal(size=(m, d)), generator.normal(size=m) + 2, generator.normal(size=d)


def check_gradient(answer: Callable) -> None:
    """Exercise 3.1: gradient(w, b, x, y, weight_decay) -> (d,) and scalar, against autograd."""
    x, y, w = _data()
    inputs = torch.tensor(w, requires_grad=True), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    prediction = torch.from_numpy(x) @ inputs[0] + inputs[1]
    losses.regularized_mse(prediction, torch.from_numpy(y), inputs[0], 0.3).backward()
    got = answer(w, 0.7, x, y, 0.3)
    assert isinstance(got, tuple) and len(got) == 2, "return two things: the gradient for w and the derivative for b"
    for name, value, expected in zip(("w", "b"), got, inputs):
        value, expected = np.asarray(value), expected.grad.numpy()
        assert value.shape == expected.shape, f"the part for {name} has shape {value.shape}, expected {expected.shape}"
        assert np.allclose(value, expected, rtol=1e-9), (
            f"the part for {name} is {value.round(4)}, autograd says {expected.round(4)}"
        )


def check_hessian(answer: Callable) -> None:
    """Exercise 3.2: hessian_by_complex_step(gradient, w) -> (d, d), against autograd to the last digits."""
    x, _, w = _data()

    def gradient(v: np.ndarray) -> np.ndarray:  # of mean(log cosh(x v)), whose third derivative is not zero
        return x.T @ np.tanh(x @ v) / len(x)

    def function(v: torch.Tensor) -> torch.Tensor:
        return (torch.from_numpy(x) @ v).cosh().log().mean()

    expected = torch.autograd.functional.hessian(function, torch.from_numpy(w)).numpy()
    got = np.asarray(answer(gradient, w))
    assert got.shape == expected.shape, f"expected a matrix of shape {expected.shape}, got {got.shape}"
    assert np.isrealobj(got), "a Hessian is real: keep the imaginary part only, divided by the step"
    error = np.abs(got - expected).max()
    assert error < 1e-4, f"it is off by {error:.1g}: one column a direction, the imaginary part of the gradient over the step"
    assert error < 1e-13, "close, but not to all digits: a complex step subtracts nothing, so it may be as small as 1e-30"


def check_map_weight_decay(answer: Callable) -> None:
    """Exercise 3.3: map_weight_decay(noise_std, prior_std, n_rows), by the gradient of the log posterior at the minimiser."""
    x, y, _ = _data()
    for noise_std, prior_std in ((0.5, 2.0), (3.0, 0.4)):
        weight_decay = float(answer(noise_std, prior_std, len(y)))
        assert np.isfinite(weight_decay) and weight_decay > 0, f"lambda must be a positive number, got {weight_decay}"
        w = torch.tensor(losses.ridge_solution(x, y, weight_decay), requires_grad=True)
        noise, prior = (
            torch.distributions.Normal(0.0, torch.tensor(std, dtype=torch.float64)) for std in (noise_std, prior_std)
        )
        log_posterior = noise.log_prob(torch.from_numpy(y) - torch.from_numpy(x) @ w).sum() + prior.log_prob(w).sum()
        log_posterior.backward()
        assert w.grad.abs().max() < 1e-9, (
            f"with noise {noise_std}, prior {prior_std} and {len(y)} rows, lambda = {weight_decay:.4g} does not put the minimum "
            "at the peak of the posterior: divide the negative log posterior by whatever makes its first term 1/(2m) SSE"
        )


def check_degrees_of_freedom(answer: Callable) -> None:
    """Exercise 3.4: degrees_of_freedom(singular_values, n_rows, weight_decay), against the trace of the hat matrix."""
    for m, d in ((12, 3), (4, 9)):
        x, _, _ = _data(m, d)
        singular_values = np.linalg.svd(x, compute_uv=False)
        for weight_decay in (0.0, 0.2, 5.0):
            inverse = np.linalg.pinv(x.T @ x + m * weight_decay * np.eye(d), rcond=1e-12)
            expected = np.trace(x @ inverse @ x.T)
            got = float(answer(singular_values, m, weight_decay))
            assert abs(got - expected) < 1e-8, (
                f"for {m} rows, {d} features and lambda {weight_decay} the hat matrix has trace {expected:.4f}, not {got:.4f}"
            )


def check_translate(answer: Callable) -> None:
    """Exercise 3.5: translate(weight_decay, n_rows) -> (alpha of Ridge, weight_decay of SGD under nn.MSELoss), by fitting."""
    from sklearn.linear_model import Ridge

    x, y, _ = _data()
    expected = losses.ridge_solution(x, y, 0.4)
    alpha, sgd_weight_decay = answer(0.4, len(y))
    by_ridge = Ridge(alpha=alpha, fit_intercept=False).fit(x, y).coef_
    assert np.allclose(by_ridge, expected, atol=1e-8), (
        f"Ridge(alpha={alpha:.4g}) has another minimiser: its loss is SSE + alpha |w|^2"
    )
    w, targets = torch.zeros(3, dtype=torch.float64, requires_grad=True), torch.from_numpy(y)
    optimizer = torch.optim.SGD([w], lr=0.1, weight_decay=sgd_weight_decay)
    for _ in range(1000):
        optimizer.zero_grad()
        torch.nn.MSELoss()(torch.from_numpy(x) @ w, targets).backward()
        optimizer.step()
    assert np.allclose(w.detach(), expected, atol=1e-8), (
        f"SGD under nn.MSELoss with weight_decay={sgd_weight_decay:.4g} has another minimiser: compare the two gradients"
    )
