"""Checkers of chapter 4: answers are held against brute force and torch.optim."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import lr_scheduler


def check_largest_step(answer: Callable[[Tensor], float]) -> None:
    """The answer's step, a little shortened, must make gradient descent converge; a little lengthened, diverge."""
    generator = torch.Generator().manual_seed(0)
    for d in (1, 3, 6):
        factor = torch.randn(d, d, dtype=torch.float64, generator=generator)
        hessian = factor @ factor.T + 0.1 * torch.eye(d, dtype=torch.float64)
        limit = float(answer(hessian))
        assert _growth(hessian, 0.98 * limit) < 1, (
            f"steps of 0.98 times your {limit:.4g} diverge for a {d} x {d} Hessian: yours is too long"
        )
        assert _growth(hessian, 1.02 * limit) > 1, (
            f"steps of 1.02 times your {limit:.4g} still converge for a {d} x {d} Hessian: longer is possible"
        )


def _growth(hessian: Tensor, lr: float) -> float:
    """By what factor the size of the error changes in the late steps of gradient descent."""
    error, start = torch.ones(len(hessian), dtype=torch.float64), 1.0
    for step in range(2000):
        error = error - lr * hessian @ error
        if step >= 1000:  # keep the direction, drop the size: nothing overflows
            start = float(error.norm())
        error = error / error.norm().clamp_min(1e-300)
    return start


def check_momentum(answer: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Several steps, plain and Nesterov's, against torch.optim.SGD."""
    for nesterov in (False, True):
        name = "Nesterov's form" if nesterov else "plain momentum"
        make = lambda w: torch.optim.SGD([w], lr=0.1, momentum=0.8, nesterov=nesterov)  # noqa: E731, B023
        w, v = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for k, (g, expected) in enumerate(_reference(make, w), start=1):
            w, v = answer(w, v, g, 0.1, 0.8, nesterov)
            assert torch.allclose(w, expected, atol=1e-9), (
                f"{name}, step {k}: w is {w.tolist()}, torch.optim has {expected.tolist()}"
            )


def check_adam(answer: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """Ten steps against torch.optim.Adam, with settings that are not its defaults."""
    make = lambda w: torch.optim.Adam([w], lr=0.05, betas=(0.7, 0.95), eps=1e-3)  # noqa: E731
    w = torch.tensor([1.0, -2.0], dtype=torch.float64)
    m = s = torch.zeros(2, dtype=torch.float64)
    for k, (g, expected) in enumerate(_reference(make, w), start=1):
        w, m, s = answer(w, m, s, g, k, 0.05, 0.7, 0.95, 1e-3)
        assert torch.allclose(w, expected, atol=1e-9), f"step {k}: w is {w.tolist()}, torch.optim.Adam has {expected.tolist()}"


def _reference(make: Callable[[Tensor], torch.optim.Optimizer], start: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(gradient, weights after the step) for ten steps of a torch optimiser on random gradients."""
    w, generator, pairs = start.clone().requires_grad_(), torch.Generator().manual_seed(0), []
    optimizer = make(w)
    for _ in range(10):
        w.grad = torch.randn(2, dtype=torch.float64, generator=generator)
        optimizer.step()
        pairs.append((w.grad.clone(), w.detach().clone()))
    return pairs


def check_schedule(answer: Callable[[int, int, int], float]) -> None:
    """Every step against torch's LinearLR followed by CosineAnnealingLR."""
    for warmup_steps, max_steps in ((2, 10), (5, 12), (10, 40)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        rise = lr_scheduler.LinearLR(optimizer, 1 / warmup_steps, 1.0, warmup_steps - 1)
        fall = lr_scheduler.CosineAnnealingLR(optimizer, max_steps - warmup_steps)
        scheduler = lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup_steps])
        for step in range(max_steps + 1):
            expected, got = optimizer.param_groups[0]["lr"], float(answer(step, warmup_steps, max_steps))
            place = f"step {step} of {max_steps} with {warmup_steps} of warm-up"
            assert math.isclose(got, expected, abs_tol=1e-9), (
                f"{place}: your factor is {got:.4g}, torch's schedulers give {expected:.4g}"
            )
            optimizer.step()
            scheduler.step()


def check_noise_floor(answer: Callable[[float, float, float, int], float]) -> None:
    """Against the recursion of the variance, iterated until it stands still."""
    for lr, curvature, noise, batch_size in ((0.1, 1.0, 1.0, 1), (0.5, 2.0, 3.0, 8), (0.02, 10.0, 0.5, 32), (1.5, 1.0, 2.0, 4)):
        variance = 0.0
        for _ in range(5000):
            variance = (1 - lr * curvature) ** 2 * variance + lr**2 * noise**2 / batch_size
        got = float(answer(lr, curvature, noise, batch_size))
        place = f"lr {lr}, curvature {curvature}, noise {noise}, batch of {batch_size}"
        assert math.isclose(got, variance, rel_tol=1e-9), f"{place}: you say {got:.4g}, the recursion settles at {variance:.4g}"
    assert float(answer(2.5, 1.0, 1.0, 1)) == math.inf, (
        "for a step above 2 / curvature the variance grows for ever: return math.inf"
    )
