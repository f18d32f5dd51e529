"""The regularised squared loss, its derivatives for a linear model, and its minimiser.

One convention everywhere, the course's formula: with m rows,

    L(w) = 1/(2m) * sum_i (y_i - f(x_i; w))^2 + weight_decay/2 * sum_k w_k^2

`torch.nn.MSELoss` has 1/m and no penalty, and scikit-learn's Ridge has neither 1/(2m) nor 1/2: its alpha is
m * weight_decay. Chapter 3 derives and checks all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)


def regularized_mse(prediction: Tensor, target: Tensor, parameters: Tensor | Iterable[Tensor], weight_decay: float) -> Tensor:
    """1/(2m) times the sum of squared errors, plus weight_decay/2 times the sum of squared parameters.

    Differentiable in `prediction` and `parameters`, and analytic: complex tensors go through unconjugated, so that a
    complex step gives its derivative. The check for NaN reads a value back from an accelerator once a call.

    Args:
        prediction: (m,) or (m, ...) outputs, one row a sample.
        target: of exactly the same shape. An (m,) prediction against an (m, 1) target would silently broadcast to
            (m, m), so it is refused.
        parameters: the tensors to penalise: `model.parameters()`, or the weights alone to leave the biases free.
        weight_decay: lambda, at least 0.

    Returns:
        a scalar tensor.

    Raises:
        ValueError: for shapes that differ, no rows, values that are not finite, or a negative weight_decay.
    """
    _check_weight_decay(weight_decay)
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}: they must be equal, or "
            "every prediction would be compared with every target; reshape one, for instance prediction.squeeze(1)"
        )
    if prediction.ndim == 0 or len(prediction) == 0:
        raise ValueError(f"needs at least one row, got a prediction of shape {tuple(prediction.shape)}")
    for name, values in (("prediction", prediction), ("target", target)):
        if not torch.isfinite(values).all():
            raise ValueError(f"the {name} has NaN or infinite values: clean the data, or lower the learning rate")
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    data_term = (prediction - target).square().sum() / (2 * len(prediction))
    return data_term + 0.5 * weight_decay * sum(parameter.square().sum() for parameter in parameters)


def gradient(features: Array, targets: Array, weights: Array, weight_decay: float) -> Array:
    """Gradient of the loss for the linear model f(x; w) = x.w: X^T (X w - y) / m + weight_decay w.

    Args:
        features: X, (m, d), numpy or torch.
        targets: y, (m,).
        weights: w, (d,); complex weights are allowed.
        weight_decay: lambda, at least 0.

    Returns:
        (d,), of the arguments' kind.

    Raises:
        ValueError: for shapes that do not fit, or a negative weight_decay.
    """
    _check_shapes(features, targets, weight_decay)
    if weights.shape != features.shape[1:] or targets.ndim != 1:
        raise ValueError(
            f"expected weights ({features.shape[1]},) and targets (m,), got {tuple(weights.shape)} and {tuple(targets.shape)}"
        )
    return features.T @ (features @ weights - targets) / len(features) + weight_decay * weights


def hessian(features: Array, weight_decay: float) -> Array:
    """Hessian of the loss for the linear model: X^T X / m + weight_decay I; it depends neither on w nor on y.

    Args:
        features: X, (m, d), numpy or torch.
        weight_decay: lambda, at least 0.

    Returns:
        (d, d) symmetric, of the features' kind.

    Raises:
        ValueError: for features that are no (m, d) array, or a negative weight_decay.
    """
    _check_shapes(features, features, weight_decay)
    d = features.shape[1]
    identity = torch.eye(d, dtype=features.dtype, device=features.device) if isinstance(features, Tensor) else np.eye(d)
    return features.T @ features / len(features) + weight_decay * identity


def ridge_solution(features: Array, targets: Array, weight_decay: float) -> Array:
    """The weights that minimise the loss for the linear model f(x; w) = x.w, which has no bias.

    For a bias that is not penalised, subtract the training means from features and targets first.
    See `ridge_path`, of which this is one point, for arguments, method and errors.

    Returns:
        (d,), or (d, k) for targets (m, k), of the features' kind, dtype and device.
    """
    return ridge_path(features, targets, [weight_decay])[0]


def ridge_path(features: Array, targets: Array, weight_decays: Sequence[float]) -> Array:
    """The minimisers for several weight decays from one singular value decomposition X = U S V^T.

    w = V diag(s / (s^2 + m weight_decay)) U^T y. Never forming X^T X keeps all the digits that the data allow, and it
    works for m < d. Singular values below max(m, d) eps s_max, eps of the features' dtype, count as zero, so that
    weight_decay = 0 gives the least-squares solution of minimum norm.
    Source: Golub and Van Loan 2013, Matrix Computations, sections 5.5 and 6.1. Computed in float64 on the CPU, without autograd.

    Args:
        features: X, (m, d), numpy or torch, without a column of ones.
        targets: y, (m,) or (m, k), of the same kind.
        weight_decays: n values of lambda, each at least 0.

    Returns:
        (n, d), or (n, d, k), of the features' kind, dtype and device (integers give float64).

    Raises:
        ValueError: for shapes that do not fit, no rows, values that are not finite, or a negative weight_decay.
    """
    x, y = (torch.as_tensor(values).detach().cpu().double() for values in (features, targets))
    for weight_decay in weight_decays:
        _check_shapes(x, y, weight_decay)
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("features or targets have NaN or infinite values: drop or fill these rows first")
    dtype = torch.as_tensor(features).dtype
    dtype = dtype if dtype.is_floating_point else torch.float64
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    kept = s > max(x.shape) * torch.finfo(dtype).eps * s.max()
    u, s, vt = u[:, kept], s[kept], vt[kept]
    along = u.T @ y.reshape(len(y), -1)  # (r, k) the targets along each left singular vector
    path = [vt.T @ ((s / (s.square() + len(x) * weight_decay)).unsqueeze(1) * along) for weight_decay in weight_decays]
    solution = torch.stack(path).reshape(len(path), x.shape[1], *y.shape[1:]).to(dtype)
    return solution.to(features.device) if isinstance(features, Tensor) else solution.numpy()


def _check_shapes(features: np.ndarray | Tensor, targets: np.ndarray | Tensor, weight_decay: float) -> None:
    _check_weight_decay(weight_decay)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features must be an (m, d) array with rows and columns, got shape {tuple(features.shape)}")
    if targets.ndim not in (1, 2) or len(targets) != len(features):
        raise ValueError(f"needs a target for each of the {len(features)} rows, got targets of shape {tuple(targets.shape)}")


def _check_weight_decay(weight_decay: float) -> None:
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay is lambda, a finite number of at least 0, got {weight_decay}")
