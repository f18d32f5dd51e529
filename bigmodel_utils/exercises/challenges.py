"""Checkers of chapter 14: against brute force over levels, known integrals, planted attention, and all corners of a box."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
from torch import Tensor


def check_round_to_bits(answer: Callable[[Tensor, int], Tensor]) -> None:
    """Each rounded weight is the nearest of the levels that are listed one by one."""
    generator = torch.Generator().manual_seed(0)
    for n_bits in (2, 3, 4, 8):
        weights = torch.randn(50, generator=generator, dtype=torch.float64)
        largest, n = weights.abs().max().item(), 2 ** (n_bits - 1) - 1
        levels = torch.tensor([k * largest / n for k in range(-n, n + 1)], dtype=torch.float64)
        expected = levels[(weights[:, None] - levels).abs().argmin(dim=1)]
        found = answer(weights, n_bits)
        off = (found - expected).abs().max().item()
        assert off < 1e-9, f"{n_bits} bits: a weight is {off:.3g} away from the nearest of the {len(levels)} levels"
    zeros = answer(torch.zeros(3), 4)
    assert torch.equal(zeros, torch.zeros(3)), f"a row of zeros must stay zeros, not become {zeros.tolist()}"


def check_integrate(answer: Callable[..., Tensor]) -> None:
    """For x1^2 x2 + x3 the path integral is known: from a to b, a polynomial in t."""
    gradient = lambda x: torch.stack([2 * x[0] * x[1], x[0] ** 2, torch.ones_like(x[0])])  # noqa: E731
    x, baseline = torch.tensor([1.5, -2.0, 3.0]).double(), torch.tensor([0.5, 1.0, -1.0]).double()
    d = x - baseline
    a, b, p, q = baseline[0], baseline[1], d[0], d[1]
    first = p * (2 * a * b + a * q + p * b + 2 * p * q / 3)  # p times the integral of 2 (a + p t)(b + q t)
    second = q * (a * a + a * p + p * p / 3)  # q times the integral of (a + p t)^2
    expected = torch.stack([first, second, d[2]])
    found = answer(gradient, x, baseline, 200)
    assert (found - expected).abs().max() < 1e-3, f"expected {expected.tolist()}, got {found.tolist()}"
    middle = answer(gradient, x, baseline, 1)
    one = d * gradient(baseline + d / 2)
    assert (middle - one).abs().max() < 1e-9, "with one step the gradient is taken once, in the middle of the way"


def check_induction_of(answer: Callable[[Tensor, list[int]], float]) -> None:
    """A head made by hand: a known share of its attention is where the copies' successors are."""
    tokens = [4, 7, 1, 4, 7, 1, 4, 9]  # 4 7 1 repeated; 9 is new
    for share in (1.0, 0.25):
        attention = torch.zeros(8, 8)
        followers = {3: [1], 4: [2], 5: [3], 6: [1, 4]}
        for t in range(8):
            attention[t, 0] += 1 - share if t in followers else 1
            for j in followers.get(t, []):
                attention[t, j] += share / len(followers[t])
        found = answer(attention, tokens)
        assert abs(found - share) < 1e-6, f"a head with a share of {share} on the followers scores {found:.3f}"
    ahead = torch.full((4, 4), 0.25)
    found = answer(ahead, [5, 5, 5, 6])  # place 0 has nothing before it, place 1 counts j = 1, place 2 counts j = 1 and 2
    assert abs(found - (0.25 + 0.5) / 2) < 1e-6, f"for tokens 5 5 5 6 and even attention the score is 0.375, not {found:.3f}"


def check_worst_change(answer: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """No corner of the allowed box has a lower score, by trying all of them; the answer lies in the box."""
    draw = random.Random(0)
    for epsilon in (0.1, 0.4):
        w = torch.tensor([draw.uniform(-2, 2) for _ in range(6)], dtype=torch.float64)
        x = torch.tensor([draw.uniform(0, 1) for _ in range(6)], dtype=torch.float64)
        found = answer(w, x, epsilon)
        low, high = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
        inside = bool(((found >= low - 1e-12) & (found <= high + 1e-12)).all())
        assert inside, f"epsilon {epsilon}: the answer {found.tolist()} leaves the box"
        corners = (torch.where(torch.tensor(pick), high, low) for pick in itertools.product([False, True], repeat=6))
        best = min(float(w @ corner) for corner in corners)
        assert float(w @ found) <= best + 1e-9, (
            f"epsilon {epsilon}: a corner of the box has {best:.4f}, yours {float(w @ found):.4f}"
        )
