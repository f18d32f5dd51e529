"""The device a notebook runs on, and what it is able to do: all that differs between CPU, GPU and TPU stands here.

XLA (torch_xla) is lazy: operations are collected, and compiled and run by `end_step` or when a value is looked at.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping

import numpy
import torch
from torch import Tensor, nn

from bigmodel_utils import host

PRECISIONS = ("float32", "bfloat16", "float16")
FUSED = ("cpu", "cuda", "mps", "xpu")  # devices for which torch.optim documents fused=True
OUT_OF_MEMORY = (
    "can't allocate memory",  # torch's CPU allocator, c10/core/impl/alloc_cpu.cpp
    "not enough memory",  # the same on Windows
    "MPS backend out of memory",  # aten/src/ATen/mps/MPSAllocator.mm
    "RESOURCE_EXHAUSTED",  # XLA's status code
)


def select(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is the accelerator that torch reports, else a TPU of torch_xla, else the CPU.

    Args:
        name: auto, cpu, cuda, mps, xla, or what another torch backend calls itself ("xpu"; "tpu" of torch_tpu); with an
            index ("cuda:1") where there are several.

    Raises:
        ValueError: for an unknown name, a device that is not here, or XLA after a backward pass, which it would not join.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or (_select_xla(None) if _has_xla_tpu() else torch.device("cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        known = "auto, cpu, cuda, mps, xla, or the name of an installed backend, such as tpu of torch_tpu"
        raise ValueError(f"unknown device {name!r}; use {known}") from None
    if device.type == "xla":
        return _select_xla(device.index)
    n_devices = {"cpu": 1} | ({accelerator.type: torch.accelerator.device_count()} if accelerator else {})
    if (device.index or 0) >= n_devices.get(device.type, 0):
        raise ValueError(f"device {name!r} is not available on this machine; use 'auto' or 'cpu'")
    return device


def _select_xla(index: int | None) -> torch.device:
    try:
        import torch_xla
    except ImportError:
        raise ValueError("device 'xla' needs torch_xla, which is not installed; use 'auto' or 'cpu'") from None
    device = torch_xla.device(index)
    try:
        torch.zeros((), device=device, requires_grad=True).backward()
    except RuntimeError:  # autograd counts the devices once
        raise ValueError("'xla' must be chosen before the first backward pass: restart the kernel or program") from None
    return device


def _has_xla_tpu() -> bool:
    try:
        from torch_xla import runtime
    except ImportError:
        return False
    return runtime.device_type() == "TPU"


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """The same model with its weights on that device, those that are one (tied) still one.

    `model.to` makes new parameters where the device has tensors of another kind, as XLA's are: one for each name. Here the
    parameters stay the same objects, so that an optimizer keeps them too; move before its first step, for what it has
    then remembered stays where it was.

    Raises:
        RuntimeError: where a weak reference to a parameter forbids it.
    """
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.to(device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Inside it, products are computed in that precision: "float32" (nothing changes), "bfloat16" or "float16".

    Gradients in float16 underflow without a `torch.amp.GradScaler`.

    Raises:
        ValueError: for another precision, or float16 on a TPU.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; use {', '.join(PRECISIONS)}")
    if precision == "float16" and device.type in ("xla", "tpu"):
        raise ValueError("a TPU has no float16; use 'bfloat16'")
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def supports_fused(device: torch.device) -> bool:
    """Whether torch.optim's `fused=True`, one kernel for all weights, works there."""
    return device.type in FUSED


def end_step(device: torch.device) -> None:
    """Say that a training step is complete: XLA compiles and starts what it has collected; elsewhere nothing happens.

    Once a step, and no look at a value (`item`) before it, or the step is compiled in pieces.
    """
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was queued, so that a clock can be read."""
    if device.type == "xla":
        from torch_xla.core import xla_model

        end_step(device)
        xla_model.wait_device_ops()  # torch_xla.sync(wait=True) would not wait for what an earlier sync has started
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global random generators, of all devices."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if "torch_xla" in sys.modules:
        import torch_xla

        torch_xla.manual_seed(seed % 2**64)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of Python's, numpy's, torch's and the device's global random generators, for `set_random_state`.

    Returns:
        tensors on the CPU, which a checkpoint can hold: "python" and "numpy" float64 (exact: their numbers have 32 bits),
        "torch" and that of the device's type bytes.
    """
    version, numbers, gauss = random.getstate()
    _, keys, *rest = numpy.random.get_state()
    state = {
        "python": torch.tensor([version, *numbers, math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), *rest], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "xla":
        from torch_xla.core import xla_model

        number = xla_model.get_rng_state(str(device))  # below 2^64, which no int64 holds
        state["xla"] = torch.tensor(list(number.to_bytes(8, "little")), dtype=torch.uint8)
    elif device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(*_generator_index(device))
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators back to `state`: the same numbers follow, bit for bit.

    The device's own generator is left alone where `state` comes from a device of another type.
    """
    version, *numbers, gauss = state["python"].tolist()
    random.setstate((int(version), tuple(map(int, numbers)), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss, gauss = state["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), int(position), int(has_gauss), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if device.type not in state:
        return
    if device.type == "xla":
        from torch_xla.core import xla_model

        xla_model.set_rng_state(int.from_bytes(state["xla"].tolist(), "little"), str(device))
    else:
        torch.get_device_module(device).set_rng_state(state[device.type].cpu(), *_generator_index(device))


def _generator_index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # torch.mps has one device and takes no argument


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory was refused, the device's or the host's: less at a time may then work."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """The most memory that this process has held: tensors on the device where it has memory of its own, else all (resident)."""
    own = _own_memory_bytes(device)
    if own is not None:
        return own[0]
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def available_memory_bytes(device: torch.device | None = None) -> int:
    """Memory that this process could still take: the device's own where it has some, else the host's without swapping."""
    own = _own_memory_bytes(device)
    return host.available_memory_bytes() if own is None else own[1]


def _own_memory_bytes(device: torch.device | None) -> tuple[int, int] | None:
    """(most used by this process, free) of a device's own memory; None where it is the host's, or the backend does not tell."""
    if device is None or device.type in ("cpu", "mps"):
        return None
    try:
        if device.type == "xla":
            from torch_xla.core import xla_model

            memory = xla_model.get_memory_info(device)
            return memory["peak_bytes_used"], memory["bytes_limit"] - memory["bytes_used"]
        free = torch.get_device_module(device).mem_get_info(device)[0]
        return torch.accelerator.max_memory_allocated(device), free
    except (AttributeError, RuntimeError):
        return None


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
