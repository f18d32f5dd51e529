"""Checkers of chapter 10: each compares the answer with something independent of the solution's formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from bigmodel_utils import models


def check_batches(answer: Callable[[nn.Module, Tensor, int], Tensor]) -> None:
    """All rows, in order, in evaluation mode, and the mode put back: held against one row at a time in float64."""
    torch.manual_seed(0)
    model = models.MLP(models.MLPConfig(widths=(6, 8, 1), dropout=0.5)).double()
    x = torch.randn(11, 6, dtype=torch.float64)
    single = torch.cat([model.eval()(row.unsqueeze(0)) for row in x]).detach()
    for batch_size in (1, 4, 11, 20):
        model.train()
        found = answer(model, x, batch_size)
        assert found.shape == (11, 1), f"11 rows in batches of {batch_size} give shape {tuple(found.shape)}, not (11, 1)"
        assert not found.requires_grad, "the answer keeps the graph for a backward pass: use torch.no_grad()"
        wrong = (found - single).abs().max().item() > 1e-12
        assert not wrong, "the predictions are not those of single rows: is dropout off, and are the rows in order?"
        assert model.training, "the model was in training mode before the call and is not after it"


def check_similarity(answer: Callable[[Tensor, Tensor], float]) -> None:
    """Count Tanimoto similarity, held against intersection over union of multisets written out item by item."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = (torch.randint(0, 4, (6,), generator=generator).float() for _ in range(2))
        bags = [{(i, j) for i, n in enumerate(counts.int().tolist()) for j in range(n)} for counts in (a, b)]
        expected = len(bags[0] & bags[1]) / len(bags[0] | bags[1])
        found = float(answer(a, b))
        assert abs(found - expected) < 1e-6, (
            f"counts {a.int().tolist()} and {b.int().tolist()} have {expected:.3f}, not {found:.3f}"
        )


def check_half_width(answer: Callable[[Tensor, float], float]) -> None:
    """Smallest order statistic with the promised coverage: each of n + 1 scores plays the new one in turn, and is counted."""
    for n in (9, 10, 19, 30):
        for alpha in (Fraction(1, 2), Fraction(1, 5), Fraction(1, 10)):
            scores = torch.randn(n + 1, generator=torch.Generator().manual_seed(n))
            widths = [float(answer(torch.cat([scores[:i], scores[i + 1 :]]), float(alpha))) for i in range(n + 1)]
            covered = sum(score <= width for score, width in zip(scores.abs().tolist(), widths))
            share = f"{covered} of {n + 1} left-out scores are covered at n = {n}, alpha = {float(alpha)}"
            assert covered >= (n + 1) * (1 - alpha), f"{share}: too few"
            assert covered - 1 < (n + 1) * (1 - alpha), f"{share}: more than needed, the interval is too wide"
    found = answer(torch.ones(8), 0.1)
    assert found == math.inf, f"8 residuals cannot promise a coverage of 90 %: the half-width is infinite, not {found}"


def check_int8(answer: Callable[[Tensor], tuple[Tensor, float]]) -> None:
    """Codes in range, every weight within half a step, and no step finer than the range allows."""
    for seed in range(5):
        weight = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 2)
        codes, scale = answer(weight)
        assert codes.dtype == torch.int8, f"the codes are {codes.dtype}, not torch.int8"
        moved = (codes.double() * float(scale) - weight.double()).abs().max().item()
        assert moved <= float(scale) / 2 * (1 + 1e-5), (
            f"a weight moved by {moved / float(scale):.3g} steps, more than half a step"
        )
        largest = int(codes.int().abs().max())
        assert largest == 127, f"the largest code is {largest}; with all of the range in use it is 127"


def check_percentile(answer: Callable[[Sequence[float], float], float]) -> None:
    """Nearest rank, held against its definition: the smallest value that at least q per cent do not exceed."""
    generator = np.random.default_rng(0)
    for n in (1, 7, 10, 100, 250):
        seconds = generator.permutation(n) + 1.0
        for q in (7, 50, 55, 90, 99, 100):
            expected = min(value for value in seconds if 100 * sum(seconds <= value) >= q * n)
            found = float(answer(seconds.tolist(), q))
            assert found == expected, f"p{q} of the numbers 1 to {n}, shuffled, is {expected:.0f}, not {found:g}"
