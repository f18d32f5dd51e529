"""Checkers of chapter 5: preprocessing, scores, early stopping and counts, each against something independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn import metrics, preprocessing
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bigmodel_utils import data, train
from bigmodel_utils.models import MLP, MLPConfig

WIDTHS = ([1000, 500, 100, 1], [3, 2], [7, 1, 5, 2])


def check_standardize(answer: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    """Against scikit-learn's scaler, fitted on the training rows."""
    generator = np.random.default_rng(0)
    train_rows, test_rows = generator.normal(3, 2, size=(20, 4)), generator.normal(5, 1, size=(6, 4))
    train_rows[:, 2] = 7.0
    scaler = preprocessing.StandardScaler().fit(train_rows)
    ours, theirs = answer(train_rows.copy(), test_rows.copy()), [scaler.transform(rows) for rows in (train_rows, test_rows)]
    assert np.isfinite(ours[0]).all(), "a column that is constant in training must become 0; yours has NaN or infinity"
    assert np.allclose(ours[0], theirs[0]), "the training rows should have mean 0 and standard deviation 1 in every column"
    assert np.allclose(ours[1], theirs[1]), (
        "the test rows must be scaled with the training rows' mean and deviation, nothing else"
    )


def check_r_squared(answer: Callable[[np.ndarray, np.ndarray], float]) -> None:
    """Against scikit-learn's score."""
    generator = np.random.default_rng(0)
    target = generator.normal(2, 3, size=40)
    assert abs(answer(target, target) - 1) < 1e-12, "a perfect prediction has R2 = 1"
    assert abs(answer(np.full(40, target.mean()), target)) < 1e-12, "predicting the target's mean has R2 = 0"
    for prediction in (target + generator.normal(size=40), target + 5, -target):
        expected = metrics.r2_score(target, prediction)
        got = answer(prediction, target)
        assert abs(got - expected) < 1e-9, f"expected {expected:.4f} for a prediction that is off, got {got:.4f}"


def check_early_stopping(answer: Callable[[Sequence[float], int], tuple[int, int]]) -> None:
    """Against `train.fit`, on a model whose validation losses are given."""
    cases = [
        ([3, 2, 1, 1.5, 1, 0.5], 2),
        ([3, 4, 2, 4, 1], 2),
        ([1, 2, 3, 4], 3),
        ([5, 4, 3], 1),
        ([2, 2, 1], 1),
        ([1, 2, 0.5], 2),
    ]
    for losses, patience in cases:
        expected, got = _scripted_fit(losses, patience), tuple(answer(list(losses), patience))
        assert got == expected, f"for the losses {losses} and patience {patience} expected {expected}, got {got}"


def check_count_mlp_parameters(answer: Callable[[Sequence[int]], int]) -> None:
    """Against the tensors of a built network."""
    for widths in WIDTHS:
        expected = sum(parameter.numel() for parameter in MLP(MLPConfig(tuple(widths))).parameters())
        got = answer(list(widths))
        assert got == expected, f"the network {widths} has {expected} parameters, not {got}"


def check_count_train_flops(answer: Callable[[Sequence[int], int], int]) -> None:
    """Against PyTorch's own counter."""
    for widths in WIDTHS:
        with FlopCounterMode(display=False) as counter:
            MLP(MLPConfig(tuple(widths)))(torch.randn(5, widths[0])).square().mean().backward()
        got, expected = answer(list(widths), 5), counter.get_total_flops()
        assert got == expected, f"PyTorch counts {expected} operations for widths {widths} and 5 samples, not {got}"


class _Scripted(nn.Module):
    """Its only weight counts the optimiser's steps; the validation loss is looked up there."""

    def __init__(self, losses: Sequence[float]):
        super().__init__()
        self.weight, self.losses = nn.Parameter(torch.zeros(())), losses

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return -self.weight.expand(len(x), 1)  # its mean has the gradient -1: SGD with lr 1 adds 1
        return torch.full((len(x), 1), float(self.losses[round(self.weight.item()) - 1]))


def _scripted_fit(losses: Sequence[float], patience: int) -> tuple[int, int]:
    model = _Scripted(losses)
    batches = data.Batches(data.Split(torch.zeros(1, 1), torch.zeros(1, 1)), 1)
    history = train.fit(
        model,
        batches,
        lambda prediction, target: prediction.mean(),
        train.TrainConfig(len(losses), patience),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        validation=batches,
    )
    return history.best_epoch, len(history.validation_loss)
