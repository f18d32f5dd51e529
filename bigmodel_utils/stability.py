"""Stability: overfitting, seeds, divergence, number formats; and whether a classifier's confidence and answers hold.

Random features and ridge have closed forms, so that bias, variance and double descent are computed and not sampled where
that is possible. `train_many` trains many small networks side by side, as one batch of matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Overfitting.


def random_relu_features(x: Tensor, n_features: int, seed: int) -> Tensor:
    """relu(x W) / sqrt(n_features) with a normal W that is never trained: (m, d) -> (m, n_features).

    Source: Rahimi and Recht 2007; with ReLU and minimum-norm fits: Belkin et al. 2019, https://arxiv.org/abs/1812.11118.
    """
    W = torch.randn(n_features, x.shape[1], generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return (x @ W.T).relu() / math.sqrt(n_features)


def fit_ridge(features: Tensor, targets: Tensor, weight_decay: float = 0.0) -> Tensor:
    """argmin 1/(2m) |X w - y|^2 + weight_decay/2 |w|^2 by the singular values; at 0 the solution of least norm.

    `losses.ridge_solution` solves the same for a positive penalty, where there is one solution.

    Args:
        features: (m, d), float64.
        targets: (m, k).

    Returns:
        (d, k).
    """
    u, s, vh = torch.linalg.svd(features, full_matrices=False)
    if weight_decay == 0:
        inverse = torch.where(s > s[0] * max(features.shape) * torch.finfo(s.dtype).eps, 1 / s, 0.0)
    else:
        inverse = s / (s.square() + len(features) * weight_decay)
    return vh.T @ (inverse[:, None] * (u.T @ targets))


def ridge_bias_variance(
    features: Tensor, signal: Tensor, new_features: Tensor, new_signal: Tensor, noise: float, weight_decay: float
) -> tuple[float, float]:
    """Squared bias and variance of ridge predictions, mean over new rows, for a fixed design and noise of that variance.

    Predictions are A y with A = X_new (X^T X + m lambda)^-1 X^T, and y = signal + noise: the bias is A signal - new_signal,
    the variance `noise` times the sum of the squares of A's rows (Hastie, Tibshirani and Friedman 2009, section 7.3).

    Args:
        features, new_features: (m, d), (n, d), float64.
        signal, new_signal: (m,), (n,) noiseless targets.
    """
    A = new_features @ fit_ridge(features, torch.eye(len(features), dtype=features.dtype), weight_decay)  # (n, m)
    return (A @ signal - new_signal).square().mean().item(), noise * A.square().sum(dim=1).mean().item()


# Many small networks at once.


@dataclass
class Trained:
    """What `train_many` returns."""

    weights: list[Tensor]  # W1 (n, d, h), b1 (n, 1, h), W2 (n, h, k), b2 (n, 1, k)
    losses: Tensor  # (n_steps, n) of each network and step, before the step

    def predict(self, x: Tensor) -> Tensor:
        """Logits (n, m, k) of all networks for rows (m, d)."""
        return _two_layers(self.weights, x.expand(len(self.weights[0]), -1, -1)).float()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy (n,) of each network on rows (m, d) with labels (m,)."""
        return _cross_entropies(self.predict(x), y.expand(len(self.weights[0]), -1))

    def accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        """Share of rows (n,) that each network gets right, float64."""
        return (self.predict(x).argmax(dim=-1) == y).double().mean(dim=1)


def initial_weights(widths: tuple[int, int, int], scales: Sequence[float], seeds: Sequence[int]) -> list[Tensor]:
    """Weights of n two-layer networks: normal, of standard deviation scale / sqrt(fan-in), from each one's seed; biases 0.

    Args:
        widths: inputs, hidden units, outputs.
        scales: n of them; sqrt(2) is He's.
        seeds: n of them; equal seeds give equal weights, up to the scale.
    """
    d, h, k = widths
    first, second = [], []
    for scale, seed in zip(scales, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        first.append(scale / math.sqrt(d) * torch.randn(d, h, generator=generator))
        second.append(scale / math.sqrt(h) * torch.randn(h, k, generator=generator))
    n = len(first)
    return [torch.stack(first), torch.zeros(n, 1, h), torch.stack(second), torch.zeros(n, 1, k)]


def batch_orders(n_rows: int, batch_size: int, n_steps: int, seeds: Sequence[int]) -> Tensor:
    """Which rows each network sees in each step: shuffled passes, a seed a network: (n_steps, n, batch_size)."""
    n_passes = math.ceil(n_steps * batch_size / n_rows)
    orders = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        passes = [torch.randperm(n_rows, generator=generator) for _ in range(n_passes)]
        orders.append(torch.cat(passes)[: n_steps * batch_size].view(n_steps, batch_size))
    return torch.stack(orders, dim=1)


def train_many(
    weights: list[Tensor],
    x: Tensor,
    y: Tensor,
    orders: Tensor,
    lrs: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    max_norm: float = math.inf,
    momentum: float = 0.0,
) -> Trained:
    """SGD on the cross-entropy of n independent two-layer ReLU networks, each with its weights, order and rate.

    Args:
        weights: as from `initial_weights`; not changed.
        x, y: (m, d) and (m,) int64.
        orders: (n_steps, n, batch_size) rows, as from `batch_orders`.
        lrs: (n,).
        dtype: of weights and products; the loss is computed in float32.
        max_norm: each network's gradient is shortened to this norm.
        momentum: of SGD.
    """
    weights = [weight.to(dtype).clone().requires_grad_() for weight in weights]
    velocity, losses, x = [torch.zeros_like(weight) for weight in weights], [], x.to(dtype)
    rate = lrs.to(dtype)[:, None, None]
    for rows in orders:  # (n, batch_size)
        logits = _two_layers(weights, x[rows]).float()
        loss = _cross_entropies(logits, y[rows])
        gradients = torch.autograd.grad(loss.sum(), weights)
        losses.append(loss.detach())
        if math.isfinite(max_norm):
            norm = torch.stack([g.float().square().sum(dim=(1, 2)) for g in gradients]).sum(dim=0).sqrt()
            shorter = (max_norm / norm.clamp(min=1e-12)).clamp(max=1.0)[:, None, None].to(dtype)
            gradients = [g * shorter for g in gradients]
        with torch.no_grad():
            for weight, v, g in zip(weights, velocity, gradients):
                v.mul_(momentum).add_(g)
                weight -= rate * v
    return Trained([weight.detach() for weight in weights], torch.stack(losses))


def _two_layers(weights: list[Tensor], x: Tensor) -> Tensor:
    w1, b1, w2, b2 = weights
    return torch.baddbmm(b2, torch.baddbmm(b1, x.to(w1.dtype), w1).relu(), w2)


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows, for each network: logits (n, m, k), labels (n, m) -> (n,)."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(dim=1)


def variance_components(table: Tensor) -> dict[str, float]:
    """Unbiased variances of rows, of columns, and of what is left, of a two-way table (a, b) without repeats.

    With scores by initialisation (rows) and data order (columns) they say which seed matters. An estimate may be negative.

    Source: the expected mean squares of a random-effects analysis of variance (Searle, Casella and McCulloch 1992, section 4.3).
    """
    (a, b), mean = table.shape, table.mean()
    rows, columns = table.mean(dim=1), table.mean(dim=0)
    rest = (table - rows[:, None] - columns + mean).square().sum() / ((a - 1) * (b - 1))
    return {
        "rows": (rows.var() - rest / b).item(),
        "columns": (columns.var() - rest / a).item(),
        "rest": rest.item(),
    }


# Number formats.


def lost_share(values: Tensor, scale: float, dtype: torch.dtype = torch.float16) -> tuple[float, float, float]:
    """What happens to values, those that are not 0, when `scale * values` is stored in dtype and divided again.

    Returns:
        the shares that become 0, that are off by more than 1 % (those that become 0 among them), and that become infinite.
    """
    values = values[values != 0].double()
    stored = (scale * values).to(dtype).double()
    wrong = (stored / (scale * values) - 1).abs() > 0.01
    shares = stored == 0, wrong & stored.isfinite(), stored.isinf()
    return tuple(share.double().mean().item() for share in shares)


def largest_safe_scale(values: Tensor, dtype: torch.dtype = torch.float16) -> float:
    """The largest power of 2 by which all values can be multiplied without one becoming infinite in dtype."""
    return 2.0 ** math.floor(math.log2(torch.finfo(dtype).max / values.abs().max().item()))


# Confidence.


def expected_calibration_error(probabilities: Tensor, labels: Tensor, n_bins: int = 10) -> float:
    """|accuracy - confidence| in bins of equal width of the largest probability, weighted by their share of the rows.

    Args:
        probabilities: (m, K).
        labels: (m,).

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3.
    """
    confidence, answer = probabilities.double().max(dim=1)
    gap = (answer == labels).double() - confidence
    bins = (confidence * n_bins).ceil().long().clamp(1, n_bins) - 1  # the upper edge belongs to a bin
    return torch.zeros(n_bins, dtype=torch.float64).index_add(0, bins, gap).abs().sum().item() / len(labels)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T for which softmax(logits / T) has the least cross-entropy with the labels, from 1/50 to 50.

    The cross-entropy is convex in 1 / T, so that a search by the sign of its slope finds the least (Guo et al. 2017, section 4.2).
    """
    logits = logits.double()
    right = logits.gather(1, labels[:, None])[:, 0].mean()

    def slope(inverse: float) -> float:
        return ((inverse * logits).softmax(dim=1) * logits).sum(dim=1).mean().item() - right.item()

    low, high = 1 / 50, 50.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


# Worst cases.


def fgsm(model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """x + epsilon sign(d loss / d x): the worst change of at most epsilon in each input, were the model linear.

    Source: Goodfellow, Shlens and Szegedy 2014, https://arxiv.org/abs/1412.6572, section 4.
    """
    x = x.detach().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)[0]
    return (x + epsilon * gradient.sign()).detach()


def accuracy(model: nn.Module | Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    with torch.no_grad():
        return (model(x).argmax(dim=-1) == labels).double().mean().item()
