"""Stability against closed forms, drawn data, torch's own training loop, known number formats, and brute force."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bigmodel_utils import losses, stability


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_random_features_are_those_of_their_seed_and_have_the_known_mean_square():
    x = draw(7, 5)
    features = stability.random_relu_features(x, 40, 3)
    assert features.shape == (7, 40) and (features >= 0).all()
    assert torch.equal(features, stability.random_relu_features(x, 40, 3))
    assert not torch.equal(features, stability.random_relu_features(x, 40, 4))
    many = stability.random_relu_features(x, 20_000, 0)
    assert torch.allclose(many.square().sum(1), x.square().sum(1) / 2, rtol=0.1)  # E relu(w.x)^2 = |x|^2 / 2


def test_ridge_is_the_package_s_and_the_limit_is_the_solution_of_least_norm():
    x, y = draw(12, 5), draw(12, 1, seed=1)
    expected = losses.ridge_solution(x.numpy(), y[:, 0].numpy(), 0.3)
    assert np.allclose(stability.fit_ridge(x, y, 0.3)[:, 0], expected)
    for shape in ((12, 5), (5, 12)):
        x, y = draw(*shape), draw(shape[0], 2, seed=1)
        assert np.allclose(stability.fit_ridge(x, y), np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0])
    x[4] = x[3]  # a repeated row: singular
    assert np.allclose(stability.fit_ridge(x, y), np.linalg.pinv(x.numpy()) @ y.numpy())


def test_bias_and_variance_are_those_of_many_drawn_data_sets():
    x, new, w = draw(20, 6), draw(9, 6, seed=1), draw(6, seed=2)
    noise = 0.5 * draw(20, 20_000, seed=3)
    for decay in (0.0, 0.1):
        fits = new @ stability.fit_ridge(x, (x @ w)[:, None] + noise, decay)  # (9, 20000)
        bias, variance = stability.ridge_bias_variance(x, x @ w, new, new @ w, 0.25, decay)
        assert variance == pytest.approx(fits.var(dim=1).mean().item(), rel=0.03)
        assert bias == pytest.approx((fits.mean(1) - new @ w).square().mean().item(), rel=0.1, abs=1e-3)


def by_torch(weights, x, y, rows, lr, momentum, max_norm):
    """The same network, trained alone by torch's own parts."""
    d, h, k = weights[0].shape[0], weights[0].shape[1], weights[2].shape[1]
    model = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, k))
    model[0].weight.data, model[0].bias.data = weights[0].T.clone(), weights[1][0].clone()
    model[2].weight.data, model[2].bias.data = weights[2].T.clone(), weights[3][0].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for batch in rows:
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return model


@pytest.mark.parametrize("max_norm", [math.inf, 0.2])
def test_networks_side_by_side_are_those_trained_alone(max_norm):
    x, y = draw(40, 6, dtype=torch.float32), torch.arange(40) % 3
    weights = stability.initial_weights((6, 5, 3), [1.0, 2.0, 2.0], [0, 0, 7])
    assert torch.allclose(weights[0][1], 2 * weights[0][0]) and not torch.equal(weights[0][1], weights[0][2])
    orders, lrs = stability.batch_orders(40, 8, 12, [1, 1, 2]), torch.tensor([0.1, 0.3, 0.2])
    many = stability.train_many(weights, x, y, orders, lrs, max_norm=max_norm, momentum=0.9)
    for i in range(3):
        alone = by_torch([w[i] for w in weights], x, y, orders[:, i], lrs[i].item(), 0.9, max_norm)
        assert torch.allclose(many.predict(x)[i], alone(x), atol=1e-4)
        assert many.loss(x, y)[i].item() == pytest.approx(F.cross_entropy(alone(x), y).item(), abs=1e-4)
        assert many.accuracy(x, y)[i].item() == stability.accuracy(alone, x, y)
    assert many.losses.shape == (12, 3) and torch.equal(weights[1], torch.zeros(3, 1, 5))


def test_orders_are_shuffled_passes():
    orders = stability.batch_orders(12, 4, 7, [0, 1])
    assert orders.shape == (7, 2, 4) and not torch.equal(orders[:, 0], orders[:, 1])
    assert sorted(orders[:3, 0].flatten().tolist()) == list(range(12)) == sorted(orders[3:6, 1].flatten().tolist())


def test_low_precision_trains_and_float16_overflows():
    x, y = draw(40, 6, dtype=torch.float32), torch.arange(40) % 3
    weights, orders = stability.initial_weights((6, 5, 3), [1.0], [0]), stability.batch_orders(40, 8, 5, [0])
    for dtype in (torch.bfloat16, torch.float16):
        assert stability.train_many(weights, x, y, orders, torch.ones(1), dtype=dtype).losses.isfinite().all()

    def run(dtype):
        return stability.train_many(weights, 3e5 * x, y, orders, torch.zeros(1), dtype=dtype).losses

    assert run(torch.bfloat16).isfinite().all() and not run(torch.float16).isfinite().all()


def test_variance_components_are_those_planted():
    estimates = []
    for seed in range(300):
        rows, columns, rest = 2 * draw(6, 1, seed=seed), 1 * draw(1, 5, seed=1000 + seed), 0.5 * draw(6, 5, seed=2000 + seed)
        estimates.append(list(stability.variance_components(3 + rows + columns + rest).values()))
    mean, error = np.mean(estimates, axis=0), np.std(estimates, axis=0) / math.sqrt(300)
    assert (np.abs(mean - [4, 1, 0.25]) < 4 * error).all()


def test_shares_lost_in_float16_are_those_of_its_definition():
    values = torch.tensor([2.0**-26, 2.0**-24, 1.5 * 2.0**-24, 2.0**-13, 1.0, 65504.0, 70000.0, 0.0])
    zero, wrong, infinite = stability.lost_share(values, 1.0)  # of seven: 2^-26 is 0; 1.5 * 2^-24 rounds to 2^-23
    assert (zero, wrong, infinite) == pytest.approx((1 / 7, 2 / 7, 1 / 7))
    zero, wrong, infinite = stability.lost_share(values, 2.0**10)
    assert (zero, wrong) == (0, 0) and infinite == pytest.approx(2 / 7)
    assert stability.lost_share(values, 1.0, torch.bfloat16) == (0, 0, 0)


def test_the_largest_safe_scale_is_safe_and_its_double_is_not():
    for top in (1e-4, 0.7, 3.0, 60000.0):
        values = torch.tensor([top, -top / 3])
        scale = stability.largest_safe_scale(values)
        assert stability.lost_share(values, scale)[2] == 0 < stability.lost_share(values, 2 * scale)[2]


def test_calibration_error_by_a_loop_over_bins():
    p = (2 * draw(500, 4)).softmax(1)
    labels = torch.randint(4, (500,), generator=torch.Generator().manual_seed(1))
    confidence, answer = p.max(1)
    expected = 0.0
    for k in range(10):
        inside = (confidence > k / 10) & (confidence <= (k + 1) / 10)
        if inside.any():
            gap = (answer == labels)[inside].double().mean() - confidence[inside].mean()
            expected += inside.double().mean().item() * abs(gap.item())
    assert stability.expected_calibration_error(p, labels) == pytest.approx(expected)
    sure = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert stability.expected_calibration_error(sure, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.25)


def test_temperature_is_the_best_of_a_grid_and_recovers_the_planted_one():
    logits = draw(4000, 5)
    labels = torch.multinomial((2 * logits).softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    for factor in (1.0, 6.0):
        found = stability.fit_temperature(factor * logits, labels)
        assert found == pytest.approx(factor / 2, rel=0.06)

        def cost(t, factor=factor):
            return F.cross_entropy(factor * logits / t, labels).item()

        assert cost(found) <= min(cost(t) for t in np.geomspace(0.1, 10, 200)) + 1e-9


def test_the_worst_linear_change_is_exact_and_no_other_is_worse():
    w, x = draw(9), draw(5, 9, seed=1)

    def model(x):
        return torch.stack([x @ w, torch.zeros(len(x), dtype=x.dtype)], dim=1)

    labels = torch.zeros(5, dtype=torch.long)  # class 0: the attack must lower w.x
    attacked = stability.fgsm(model, x, labels, 0.1)
    assert torch.allclose(attacked @ w, x @ w - 0.1 * w.abs().sum(), atol=1e-12)
    for seed in range(50):
        other = x + 0.1 * draw(5, 9, seed=seed).clamp(-1, 1)
        assert (other @ w >= attacked @ w - 1e-12).all()


def test_accuracy_counts():
    assert stability.accuracy(lambda x: x, torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75
