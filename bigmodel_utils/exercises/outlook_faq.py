"""Checkers of chapter 15: decisions held against trying every choice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from bigmodel_utils import scaling
from bigmodel_utils.scaling import laws


def check_largest_trainable(answer: Callable[[list[int], float, int, bool], int]) -> None:
    """Each size on its own, by the package's bytes of states."""
    sizes = [10**9, 4 * 10**9, 5 * 10**9, 7 * 10**9, 40 * 10**9, 70 * 10**9]
    for memory, n_devices, sharded in ((80e9, 1, False), (80e9, 8, True), (80e9, 8, False), (24e9, 2, True), (8e9, 1, False)):
        options = {"precision": "mixed", "zero_stage": 3 if sharded else 0, "n_ranks": n_devices}
        expected = 0
        for size in sizes:
            if sum(scaling.state_bytes(size, **options).values()) <= memory:
                expected = max(expected, size)
        found = answer(sizes, memory, n_devices, sharded)
        how = "sharded" if sharded else "not sharded"
        assert found == expected, f"{n_devices} devices of {memory:.3g} bytes, {how}: {expected:,} parameters, not {found:,}"


def check_plan(answer: Callable[[float, scaling.LawFit, float], tuple[float, float]]) -> None:
    """The loss of many sizes, each with what tokens the budget and the text allow."""
    law = laws.PUBLISHED["Besiroglu 2024"]
    for flops, max_tokens in ((1e21, 1e15), (1e21, 1e10), (1e24, 3e11)):
        n_params = np.geomspace(1e6, 1e14, 80_001)
        n_tokens = flops / 6 / n_params
        allowed = n_tokens <= max_tokens * (1 + 1e-9)
        losses = np.where(allowed, law.loss(n_params, n_tokens), np.inf)
        best = n_params[np.argmin(losses)]
        found_params, found_tokens = answer(flops, law, max_tokens)
        about = f"{flops:.0e} FLOPs and {max_tokens:.0e} tokens"
        assert abs(6 * found_params * found_tokens / flops - 1) < 1e-6, f"{about}: the budget is not spent, or overspent"
        assert found_tokens <= max_tokens * (1 + 1e-9), f"{about}: {found_tokens:.3g} tokens are more than there are"
        assert abs(found_params / best - 1) < 0.01, (
            f"{about}: the least loss is at {best:.4g} parameters, not {found_params:.4g}"
        )


def check_worthwhile_devices(answer: Callable[[float, float, float, float, int], int]) -> None:
    """A ring, message by message: each device passes every piece on, once to sum and once to share."""

    def seconds(n: int, n_bytes: float, rate: float) -> float:
        return sum(n_bytes / n / rate for _ in range(2) for _ in range(n - 1))

    for alone, n_bytes, rate, least, n_max in (
        (3.0, 2e9, 1e10, 0.5, 64),
        (3.0, 2e9, 1e10, 0.8, 64),
        (10.0, 1e8, 1e11, 0.5, 20),
    ):
        shares = {n: alone / n / (alone / n + seconds(n, n_bytes, rate)) for n in range(1, n_max + 1)}
        expected = max(n for n, share in shares.items() if share >= least)
        found = answer(alone, n_bytes, rate, least, n_max)
        assert found == expected, (
            f"{alone} s alone, {n_bytes:.0e} bytes at {rate:.0e} a second, at least {least}: {expected} devices, not {found}"
        )


def check_beats(answer: Callable[[list[float], list[float]], bool]) -> None:
    """Scores whose paired t statistic is planted; SciPy's own paired test decides."""
    noise = np.array([0.3, -1.1, 0.4, 1.2, -0.8])
    noise = (noise - noise.mean()) / noise.std(ddof=1) * np.sqrt(5)  # the t of noise + t is t
    for t in (4.0, 2.6, -4.0, 0.0):
        second = np.array([0.1, 3.0, -2.0, 0.7, 1.9])
        first = second + 0.01 * (noise + t)
        test = stats.ttest_rel(first, second)
        expected = bool(test.pvalue < 0.05 and test.statistic > 0)
        found = answer(first.tolist(), second.tolist())
        assert bool(found) == expected, (
            f"the differences {np.round(first - second, 3).tolist()} are {t:.1f} standard errors from 0: "
            f"the answer is {expected}, not {found}"
        )
