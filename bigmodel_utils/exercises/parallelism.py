"""Checkers of chapter 13: against autograd over the whole batch, uncut products, a simulated pipeline, and counting up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bigmodel_utils import scaling


def check_combine(answer: Callable[[list[Tensor], list[int]], Tensor]) -> None:
    """The gradient of the mean loss over the whole batch, by autograd, whatever rows each rank had."""
    generator = torch.Generator().manual_seed(0)
    for counts in ([4, 4], [5, 2, 1], [1, 6, 3, 2]):
        x, y = (torch.randn(sum(counts), width, generator=generator, dtype=torch.float64) for width in (3, 1))
        weight = torch.randn(3, 1, generator=generator, dtype=torch.float64, requires_grad=True)
        gradient = lambda x, y, weight=weight: torch.autograd.grad((x @ weight - y).square().mean(), weight)[0]  # noqa: E731
        parts = [gradient(*rows) for rows in zip(x.split(counts), y.split(counts))]
        error = (answer(parts, counts) - gradient(x, y)).abs().max()
        assert error < 1e-12, f"ranks with {counts} rows: the whole batch's gradient differs by up to {error:.2g}"


def check_partial_result(answer: Callable[[Tensor, Tensor, Tensor, int, int], Tensor]) -> None:
    """The ranks' results must add up to the uncut network's, and each must need only 1/p of both matrices."""
    generator = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (4, 12), (12, 4)))
    expected = torch.relu(x @ up) @ down
    for n_ranks in (1, 2, 3, 4):
        error = (sum(answer(x, up, down, rank, n_ranks) for rank in range(n_ranks)) - expected).abs().max()
        assert error < 1e-12, f"{n_ranks} ranks: their sum differs from relu(x @ up) @ down by up to {error:.2g}"
        for rank in range(n_ranks):
            ours = torch.arange(12) // (12 // n_ranks) == rank
            cut = answer(x, torch.where(ours, up, torch.nan), torch.where(ours[:, None], down, torch.nan), rank, n_ranks)
            assert cut.isfinite().all(), f"rank {rank} of {n_ranks} uses more than its 1/{n_ranks} of the hidden numbers"


def check_order(answer: Callable[[int, int, int], list[str]]) -> None:
    """All stages' orders run without a deadlock, wait no more than the formula says, and hold as little as 1F1B does."""
    from bigmodel_utils.distributed import pipeline

    for n_stages, n_microbatches in ((1, 3), (2, 4), (4, 8), (3, 3)):
        orders = [answer(stage, n_stages, n_microbatches) for stage in range(n_stages)]
        for stage, order in enumerate(orders):
            found = (order.count("F"), order.count("B"), len(order))
            expected = (n_microbatches, n_microbatches, 2 * n_microbatches)
            assert found == expected, f"stage {stage} of {n_stages}: {n_microbatches} of each are to be done, not {order}"
        idle = pipeline.idle_share(pipeline.timetable(orders))
        bubble = scaling.pipeline_bubble(n_stages, n_microbatches)
        assert abs(idle - bubble) < 1e-12, (
            f"{n_stages} stages, {n_microbatches} micro-batches: idle {idle:.3f} of the time, not {bubble:.3f}"
        )
        held, least = [pipeline.most_in_flight(order) for order in orders], list(range(n_stages, 0, -1))
        assert held == least, f"{n_stages} stages hold {held} micro-batches at most; {least} are enough"


def check_most_ranks(answer: Callable[[float, float, float], int]) -> None:
    """Ranks are added one at a time until the all-reduce takes longer than the computation."""
    for compute_s, n_bytes, bytes_per_s in ((10.5, 1e9, 1e9), (3.7, 2e9, 1.25e9), (0.9, 1e9, 1e9), (41.0, 1.3e10, 5e10)):
        n = 1
        while scaling.ring_allreduce_bytes(n_bytes, n + 1) / bytes_per_s <= compute_s / (n + 1):
            n += 1
        found = answer(compute_s, n_bytes, bytes_per_s)
        assert found == n, f"{compute_s} s of work, {n_bytes:.3g} bytes, {bytes_per_s:.3g} bytes/s: {n} ranks, not {found}"
