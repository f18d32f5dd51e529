"""Checkers of chapter 1: doubling times, the compute of a mixture, intervals and means over powers of ten."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode


def check_doubling_time(answer: Callable[[float], float]) -> None:
    """Against a quantity that is grown in small steps until it has doubled."""
    n_steps_per_month = 1000
    for powers_per_year in (0.05, 0.3, 0.6, 1.0, 2.5):
        factor, value, n_steps = 10 ** (powers_per_year / 12 / n_steps_per_month), 1.0, 0
        while value < 2:
            value, n_steps = value * factor, n_steps + 1
        grown, answered = n_steps / n_steps_per_month, answer(powers_per_year)
        assert abs(answered - grown) < 0.01, (
            f"{powers_per_year} powers of ten a year: you say {answered:.4g} months, step by step it takes {grown:.4g}"
        )
    for powers_per_year in (0.0, -0.5):
        answered = answer(powers_per_year)
        assert answered == math.inf, f"{powers_per_year} powers of ten a year never double: return math.inf, not {answered}"


def check_train_flops(answer: Callable[[int, int, int, int, int], int]) -> None:
    """Against PyTorch's counter on a mixture of square matrices, trained for one step."""
    for width, n_experts, n_chosen, n_tokens in [(4, 2, 1, 3), (8, 5, 2, 10), (6, 7, 3, 1)]:
        shared = torch.randn(width, width, requires_grad=True)
        experts = [torch.randn(width, width, requires_grad=True) for _ in range(n_experts)]
        x = torch.randn(n_tokens, width, requires_grad=True)  # as if there were a layer below
        with FlopCounterMode(display=False) as counter:
            hidden = x @ shared
            sum(hidden @ expert for expert in experts[:n_chosen]).sum().backward()
        counted, answered = counter.get_total_flops(), answer(width**2, width**2, n_experts, n_chosen, n_tokens)
        assert answered == counted, (
            f"{width**2} shared parameters, {n_experts} experts of {width**2}, {n_chosen} chosen, {n_tokens} tokens: "
            f"you say {answered}, PyTorch counts {counted}"
        )


def check_interval(answer: Callable[[np.ndarray, float], tuple[float, float]]) -> None:
    """Against the standard library's quantiles, and against the share that lies inside."""
    samples = np.random.default_rng(0).gamma(2.0, size=4001)
    for level in (0.5, 0.9, 0.95):
        low, high = answer(samples, level)
        cuts = statistics.quantiles(samples.tolist(), n=40, method="inclusive")  # every 2.5 percent
        n_tail = round(40 * (1 - level) / 2)
        expected = cuts[n_tail - 1], cuts[40 - n_tail - 1]
        share = np.mean((samples >= low) & (samples <= high))
        assert np.allclose((low, high), expected, rtol=1e-6), (
            f"level {level}: you say {low:.4g} to {high:.4g}, which holds {share:.3f} of the samples; "
            f"the middle {level} lies between {expected[0]:.4g} and {expected[1]:.4g}"
        )


def check_geometric_mean(answer: Callable[[Sequence[float]], float]) -> None:
    """Against the standard library."""
    for values in ([2.0, 8.0], [1e23, 4e23, 2e24], [1e25] * 40 + [1e-3], [7.0]):
        expected, answered = statistics.geometric_mean(values), answer(list(values))
        assert math.isclose(answered, expected, rel_tol=1e-9), (
            f"{len(values)} values from {min(values):g} to {max(values):g}: you say {answered:.6g}, it is {expected:.6g}"
        )
