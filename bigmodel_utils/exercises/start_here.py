"""Checkers of chapter 0: FLOPs, the roofline, and sums that do not depend on luck."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bigmodel_utils.models import MLP, MLPConfig


def check_step_flops(answer: Callable[[Sequence[int], int], int]) -> None:
    """Against PyTorch's counter, on models whose numbers are never stored (the "meta" device)."""
    for widths, batch_size in [((3, 2), 1), ((7, 5, 2), 4), ((1000, 500, 100, 1), 32)]:
        with torch.device("meta"):
            model, x = MLP(MLPConfig(widths)), torch.empty(batch_size, widths[0])
        with FlopCounterMode(display=False) as counter:
            model(x).square().mean().backward()
        counted, answered = counter.get_total_flops(), answer(widths, batch_size)
        assert answered == counted, f"widths {widths}, batch {batch_size}: you say {answered}, PyTorch counts {counted}"


def check_attainable(answer: Callable[[float, float, float], float]) -> None:
    """Against a machine that works through a long job tick by tick, and is done when its slower half is."""
    for intensity, flops_per_s, bytes_per_s in [(0.5, 64, 16), (2, 64, 16), (4, 64, 16), (32, 64, 16), (8, 16, 64)]:
        n_ticks, flops_left, bytes_left = 0, 1024.0 * intensity, 1024.0  # a kibibyte of traffic
        while flops_left > 0 or bytes_left > 0:
            n_ticks, flops_left, bytes_left = n_ticks + 1, flops_left - flops_per_s, bytes_left - bytes_per_s
        simulated, answered = 1024.0 * intensity / n_ticks, answer(intensity, flops_per_s, bytes_per_s)
        assert math.isclose(answered, simulated, rel_tol=1e-9), (
            f"intensity {intensity} FLOP/byte, {flops_per_s} FLOP/s, {bytes_per_s} bytes/s: "
            f"you say {answered} FLOP/s, the simulated machine reaches {simulated}"
        )


def check_ridge_batch(answer: Callable[[int, float], int | None]) -> None:
    """Against trying every batch size in turn, with exact fractions."""
    for width, ridge in [(64, 1), (64, 8), (96, 24), (128, 31), (64, 16), (64, 20), (4096, 2.5)]:
        intensities = (Fraction(2 * n * width * width, 4 * (width * width + 2 * n * width)) for n in range(1, 100_000))
        limit = Fraction(width, 4)  # the intensity of an endless batch
        tried = next(n for n, found in enumerate(intensities, 1) if found >= ridge) if ridge < limit else None
        answered = answer(width, ridge)
        assert answered == tried, (
            f"width {width}, ridge {ridge} FLOP/byte: you say {answered}, trying every batch gives {tried}"
        )


def check_careful_sum(answer: Callable[[np.ndarray], np.float32]) -> None:
    """Against the exact sum (`math.fsum`): no more than two roundings of float32 away, in any order."""
    generator = np.random.default_rng(0)
    numbers = generator.uniform(0, 1, 20_000).astype(np.float32)
    for order, given in {"shuffled": numbers, "sorted": np.sort(numbers), "reversed": np.sort(numbers)[::-1]}.items():
        exact, answered = math.fsum(given.tolist()), answer(given.copy())
        assert isinstance(answered, np.float32), (
            f"return an np.float32: the sum is to be made in float32, not in {type(answered).__name__}"
        )
        error = abs(float(answered) - exact)
        allowed = 2 * float(np.finfo(np.float32).eps) * exact
        assert error <= allowed, f"{order} numbers: your sum is {error:.3g} off, where {allowed:.3g} is allowed"
