"""The device a notebook runs on, and what it is able to do."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping

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
    """Seconds of one call as a user meets it: the median of `n_repeats`, after one warm-up call."""
    device = device or torch.device("cpu")
    seconds = [_seconds(function, device) for _ in range(n_repeats + 1)]
    return sorted(seconds[1:])[n_repeats // 2]


def fastest_s(
    functions: Mapping[Hashable, Callable[[], object]], device: torch.device | None = None, budget_s: float = 0.5
) -> dict[Hashable, float]:
    """Seconds of the fastest call of each function: what the machine is able to do, with nothing in its way.

    Other work on the machine only ever adds time, so the fastest of many calls is its best estimate. The functions take
    turns, so that a busy moment hits all of them alike, until the budget is spent: the measurement's own cost is known.

    Args:
        functions: by name; each is called once to warm up, and then at least three times.
        budget_s: wall-clock seconds for all functions together, the warm-up not counted.

    Raises:
        ValueError: for no functions.
    """
    if not functions:
        raise ValueError("fastest_s needs at least one function to measure")
    device = device or torch.device("cpu")
    for function in functions.values():
        _seconds(function, device)
    fastest, n_rounds, begin = dict.fromkeys(functions, math.inf), 0, time.perf_counter()
    while n_rounds < 3 or time.perf_counter() - begin < budget_s:
        for name, function in functions.items():
            fastest[name] = min(fastest[name], _seconds(function, device))
        n_rounds += 1
    return fastest


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    result = function()  # kept until the device is done: a lazy one (XLA) never computes what nobody holds
    synchronize(device)
    seconds = time.perf_counter() - begin
    del result
    return seconds


def square_product(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 1024) -> Callable[[], torch.Tensor]:
    """A function that multiplies two random (size, size) matrices: 2 size^3 FLOPs a call."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b


def big_copy(device: torch.device, n_bytes: int = 2**28) -> Callable[[], torch.Tensor]:
    """A function that copies `n_bytes`, by default more than any processor's cache holds: 2 n_bytes of traffic a call."""
    source = torch.zeros(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def matmul_flops_per_s(
    device: torch.device, dtype: torch.dtype = torch.float32, size: int = 1024, budget_s: float = 0.5
) -> float:
    """Measured peak rate of a square matrix product, in FLOP/s: 2 size^3 operations over the fastest call's time."""
    return 2 * size**3 / fastest_s({"product": square_product(device, dtype, size)}, device, budget_s)["product"]


def copy_bytes_per_s(device: torch.device, n_bytes: int = 2**28, budget_s: float = 0.5) -> float:
    """Measured memory bandwidth of a copy, in bytes/s, by its fastest call: each byte is read once and written once."""
    return 2 * n_bytes / fastest_s({"copy": big_copy(device, n_bytes)}, device, budget_s)["copy"]


@contextlib.contextmanager
def threads(n_threads: int) -> Iterator[None]:
    """Inside it, torch computes on that many CPU threads; afterwards on as many as before.

    Raises:
        ValueError: for fewer than one.
    """
    if n_threads < 1:
        raise ValueError(f"n_threads must be 1 or more, got {n_threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
