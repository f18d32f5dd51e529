"""The device a notebook runs on, and what it is able to do."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch

NAMES = ("auto", "cpu", "cuda", "mps", "xla")


def select(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is the accelerator that torch reports, and the CPU without one.

    Raises:
        ValueError: for an unknown name, or a device that is not here.
    """
    kind = name.partition(":")[0]
    if kind not in NAMES:
        raise ValueError(f"unknown device {name!r}; use one of {', '.join(NAMES)}")
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    if kind == "xla":
        try:
            import torch_xla
        except ImportError:
            raise ValueError("device 'xla' needs torch_xla, which is not installed; use 'auto' or 'cpu'") from None
        return torch_xla.device()
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present[kind]:
        raise ValueError(f"device {name!r} is not available on this machine; use 'auto' or 'cpu'")
    return torch.device(name)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global random generators (all devices)."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was queued, so that a clock can be read."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync(wait=True)
    elif device.type != "cpu":
        torch.accelerator.synchronize()


def available_memory_bytes() -> int:
    """Memory that a process could still take without swapping, in bytes."""
    import psutil

    return psutil.virtual_memory().available


def time_call(function: Callable[[], object], device: torch.device | None = None, n_repeats: int = 5) -> float:
    """Seconds of one call: the median of `n_repeats`, after one warm-up call."""
    device = device or torch.device("cpu")
    seconds = []
    for _ in range(n_repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds[1:])[n_repeats // 2]


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Measured rate of a square matrix product, in FLOP/s: 2 size^3 operations over its median time."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / time_call(lambda: a @ b, device)


def copy_bytes_per_s(device: torch.device, n_bytes: int = 2**28) -> float:
    """Measured memory bandwidth of a copy, in bytes/s: each byte is read once and written once."""
    source = torch.zeros(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / time_call(lambda: target.copy_(source), device)
