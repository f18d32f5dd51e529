"""Jobs that measure one thing each: a ring, a pipeline's bubble, the speed-up of data parallelism, the link between ranks."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bigmodel_utils import device as devices
from bigmodel_utils.distributed import data, launch, traffic
from bigmodel_utils.distributed import ring as rings
from bigmodel_utils.models import GPT, GPTConfig


def ring(device: torch.device, *, n_numbers: int = 120_000, seed: int = 0) -> dict[str, Any]:
    """Sum random numbers by the hand-written ring and by torch's all-reduce.

    Returns:
        "error", the largest difference of the two sums; for each the bytes that this rank gave to its sockets.
    """
    x = torch.randn(n_numbers, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + dist.get_rank())).to(device)
    ours, torchs = x.clone(), x.clone()
    _, count, ours_bytes = traffic.measure(lambda: rings.all_reduce(ours))
    _, _, torchs_bytes = traffic.measure(lambda: dist.all_reduce(torchs))
    return {
        "error": (ours - torchs).abs().max().item(),
        "n_bytes": x.numel() * x.element_size(),
        "sends": count.calls["send"],
        "issued": count.sent_bytes(dist.get_world_size()),
        "sockets": {"ours": ours_bytes, "torch's": torchs_bytes},
    }


def bubble(
    device: torch.device,
    *,
    n_microbatches: list[int] | None = None,
    schedules: list[str] | None = None,
    forward_s: float = 0.01,
    backward_s: float = 0.02,
) -> list[dict[str, Any]]:
    """Pipelines of sleeping stages, one on each rank, by torch's schedules.

    Returns:
        a record for each schedule and number of micro-batches: the passes as they ran, a list for each rank of
        [kind, begin, end] in seconds from the first one's begin.
    """
    from bigmodel_utils.distributed import pipeline

    mesh = launch.mesh_of(dist.get_world_size(), device)
    records = []
    for schedule in schedules or ["1F1B"]:
        for n in n_microbatches or [8]:
            sleeper = pipeline.Sleeper(forward_s, backward_s).to(device)
            loss = lambda y, target: y.sum()  # noqa: E731
            _, runner = pipeline.parallelize(sleeper, mesh, n, device, schedule=schedule, loss_fn=loss)
            x = torch.ones(n, 1, device=device)
            pipeline.backward(runner, x, x, mesh)  # tells the neighbours what shapes to expect
            sleeper.passes.clear()
            dist.barrier()
            pipeline.backward(runner, x, x, mesh)
            ranks: list = [None] * mesh.size()
            dist.all_gather_object(ranks, sleeper.passes)
            start = min(begin for passes in ranks for _, begin, _ in passes)
            passes = [[[kind, begin - start, end - start] for kind, begin, end in each] for each in ranks]
            records.append({"schedule": schedule, "n_microbatches": n, "passes": passes})
    return records


def speed(
    device: torch.device,
    *,
    group_sizes: list[int] | None = None,
    n_layers: int = 4,
    d_model: int = 128,
    batch_size: int = 16,
    length: int = 64,
    n_rounds: int = 4,
) -> dict[str, Any]:
    """A data-parallel step of a small GPT, the same batch on 1, 2, ... ranks while the others wait.

    Returns:
        processors that the ranks may use, and for each number of ranks the fastest step of `n_rounds`, in seconds, with and
        without the all-reduce, and the processor time that all of them together spend on one.
    """
    config = GPTConfig(vocab_size=256, context_length=length, n_layers=n_layers, n_heads=4, d_model=d_model)
    tokens = torch.randint(256, (batch_size, length), device=device)
    steps: dict[tuple[int, bool], Callable[[], object]] = {}
    for size in group_sizes or [1, dist.get_world_size()]:
        mesh = launch.mesh_of(size, device)
        model = data.parallelize(GPT(config).to(device), mesh)
        rows = data.part(tokens, mesh)
        steps[size, True] = lambda model=model, rows=rows: data.backward(model, rows, rows)
        steps[size, False] = lambda model=model, rows=rows: _silent(model, rows)
    fastest, least_cpu = dict.fromkeys(steps, math.inf), dict.fromkeys(steps, math.inf)
    for n_round in range(n_rounds + 1):
        for (size, told), step in steps.items():
            begin = time.process_time()
            seconds = _together_s(step if dist.get_rank() < size else lambda: None, device)
            if n_round:  # the first warms up
                fastest[size, told] = min(fastest[size, told], seconds)
                least_cpu[size, told] = min(least_cpu[size, told], time.process_time() - begin)
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, least_cpu)
    sizes = sorted({size for size, _ in steps})
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "steps": [
            {
                "ranks": size,
                "step_s": fastest[size, True],
                "silent_s": fastest[size, False],
                "cpu_s": sum(least[size, True] for least in everyone[:size]),
            }
            for size in sizes
        ],
    }


def _silent(model: torch.nn.Module, rows: Tensor) -> None:
    with model.no_sync():
        data.backward(model, rows, rows)


def _together_s(function: Callable[[], object], device: torch.device) -> float:
    """Seconds until all ranks have done it."""
    dist.barrier()
    begin = time.perf_counter()
    function()
    devices.synchronize(device)
    dist.barrier()
    return time.perf_counter() - begin


def link(device: torch.device, *, sizes_bytes: list[int] | None = None, n_rounds: int = 20) -> dict[str, Any]:
    """Messages and all-reduces between ranks 0 and 1: what the cost model is to be given, and held against.

    Returns:
        "latency_s" and "bytes_per_s" of a message, from the fastest round trips of an 8-byte and a 4 MB message; "allreduce":
        for each size its fastest time.
    """
    pair = launch.mesh_of(2, device).get_group()
    small_s, large_s = (_fastest_s(_there_and_back, size, device, n_rounds) / 2 for size in (8, 2**22))
    sizes_bytes = sizes_bytes or [2**12, 2**16, 2**20, 2**23]
    times = [_fastest_s(lambda x: dist.all_reduce(x, group=pair), size, device, n_rounds) for size in sizes_bytes]
    return {
        "latency_s": small_s,
        "bytes_per_s": 2**22 / (large_s - small_s),
        "allreduce": [{"n_bytes": size, "seconds": seconds} for size, seconds in zip(sizes_bytes, times)],
    }


def _there_and_back(x: Tensor) -> None:
    rank = dist.get_rank()
    for sender in (0, 1):
        (dist.send if rank == sender else dist.recv)(x, 1 - rank)


def _fastest_s(function: Callable[[Tensor], object], n_bytes: int, device: torch.device, n_rounds: int) -> float:
    """Seconds of the fastest call by ranks 0 and 1, on a buffer of so many bytes, as this rank sees it; the others wait."""
    x, seconds = torch.ones(n_bytes // 4, device=device), []
    for _ in range(n_rounds):
        dist.barrier()
        begin = time.perf_counter()
        if dist.get_rank() < 2:
            function(x)
            devices.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
