"""Checkers of chapter 11: against a grid of sizes, torch's Huber loss, the law itself, and repeats summed one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bigmodel_utils.scaling import laws

LAWS = (laws.PUBLISHED["Besiroglu 2024"], laws.LawFit(A=20.0, B=9e3, E=1.2, alpha=0.2, beta=0.5))


def check_best_size(answer: Callable[[float, float, float, float, float], float]) -> None:
    """Of sizes around the answer, none may have a lower loss for the same FLOPs."""
    for law in LAWS:
        for flops in (1e17, 3e20, 1e24):
            found = answer(flops, law.A, law.B, law.alpha, law.beta)
            assert np.isfinite(found) and found > 0, f"a number of parameters is positive, not {found}"
            grid = found * np.geomspace(0.01, 100, 4001)
            lowest = grid[np.argmin(law.loss(grid, flops / 6 / grid))]
            assert abs(lowest / found - 1) < 3e-3, f"for {flops:.0e} FLOPs {lowest:.3g} parameters do better than {found:.3g}"


def check_huber_of_logs(answer: Callable[[np.ndarray, np.ndarray, float], float]) -> None:
    """torch's Huber loss, for residuals on both sides of delta."""
    generator = np.random.default_rng(0)
    loss = np.exp(generator.normal(1, 0.1, 30))
    for delta, spread in ((1e-3, 0.01), (0.05, 0.05), (1.0, 0.01)):
        predicted = loss * np.exp(generator.normal(0, spread, 30))
        logs = (torch.from_numpy(np.log(values)) for values in (predicted, loss))
        expected = torch.nn.functional.huber_loss(*logs, reduction="sum", delta=delta).item()
        found = answer(loss, predicted, delta)
        assert abs(found - expected) <= 1e-9 * max(1e-3, expected), f"delta {delta:g}: {expected:.6g}, not {found:.6g}"


def check_tokens_to_reach(answer: Callable[[float, float, laws.LawFit], float]) -> None:
    """The law at the answered number of tokens must give the loss that was asked for."""
    for law in LAWS:
        for n_params in (1e8, 7e9):
            floor = law.E + law.A / n_params**law.alpha
            for above in (0.02, 0.3):
                found = answer(floor + above, n_params, law)
                reached = float(law.loss(n_params, found))
                assert abs(reached - floor - above) < 1e-6, (
                    f"{n_params:.0e} parameters: {found:.3g} tokens reach {reached:.4f}, not {floor + above:.4f}"
                )
            assert answer(floor - 0.01, n_params, law) == float("inf"), "below E + A / N^alpha no number of tokens is enough"


def check_worth_in_fresh_tokens(answer: Callable[[float, float, float], float]) -> None:
    """The worth of each repeat is exp(-r / R*), summed in thousandths of a pass."""
    for n_unique, n_tokens, r_star in ((100.0, 50.0, 5.0), (100.0, 100.0, 5.0), (100.0, 300.0, 15.4), (70.0, 2800.0, 4.0)):
        passes = max(0.0, n_tokens / n_unique - 1)
        middles = (np.arange(round(1000 * passes)) + 0.5) / 1000
        expected = min(n_tokens, n_unique) + n_unique * np.exp(-middles / r_star).sum() / 1000
        found = answer(n_unique, n_tokens, r_star)
        assert abs(found / expected - 1) < 1e-4, (
            f"{n_tokens:g} tokens of {n_unique:g} are worth {expected:.2f}, not {found:.2f}"
        )
