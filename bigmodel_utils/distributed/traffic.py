"""Bytes that a rank sends, counted twice: from the operations that are issued, and by the operating system's sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch import distributed as dist
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bigmodel_utils.scaling import communication

# What one operation makes a rank send if it is a ring, from the larger of its buffers; torch has two names for most.
RING_BYTES = {
    "all-reduce": communication.ring_allreduce_bytes,
    "all-gather": communication.ring_allgather_bytes,
    "reduce-scatter": communication.ring_reducescatter_bytes,
    "send": lambda n_bytes, n_ranks: n_bytes,
}
KINDS = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "send": "send",
}
SILENT = {"recv_", "wait_tensor", "_wrap_tensor_autograd", "barrier"}  # they send nothing, or nothing of the model's


class Count(TorchDispatchMode):
    """While it is active, counts every message of this rank: `buffers` holds bytes of the buffers, by kind of operation.

    Raises:
        NotImplementedError: for an operation that it has no rule for, so that none is missed.
    """

    def __init__(self):
        super().__init__()
        self.buffers: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname if "c10d" in func.namespace else None
        if name is not None and name not in SILENT:
            if name not in KINDS:
                raise NotImplementedError(f"no rule for the bytes of {func.namespace}::{name}: add it to traffic.KINDS")
            tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        if name in KINDS:
            tensors += [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            self.buffers[KINDS[name]] += max(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.calls[KINDS[name]] += 1
        return result

    def sent_bytes(self, n_ranks: int) -> float:
        """Bytes that this rank sends for what was counted, every collective as a ring of n_ranks."""
        return sum(RING_BYTES[kind](n_bytes, n_ranks) for kind, n_bytes in self.buffers.items())


def socket_bytes() -> int | None:
    """Bytes that this process has given to its TCP connections so far, as the kernel counts; None where it does not tell.

    From Linux's `struct tcp_info` (include/uapi/linux/tcp.h): bytes sent, less those sent again, and those that wait.
    """
    if sys.platform != "linux":
        return None
    total = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, no socket, or one of another kind
            if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(number))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                if len(info) < 216:  # before Linux 4.19
                    return None
                (waiting,), (sent, again) = struct.unpack_from("I", info, 144), struct.unpack_from("QQ", info, 200)
                total += sent - again + waiting
    return total


def measure(function: Callable[[], Any]) -> tuple[Any, Count, int | None]:
    """Call a function on all ranks; its result, what it issued, and what it gave to the sockets (None without any)."""
    on_sockets = dist.get_backend() == "gloo"
    overhead = _socket_difference(lambda: None)[1] if on_sockets else None
    with Count() as count:
        result, n_bytes = _socket_difference(function)
    return result, count, n_bytes - overhead if on_sockets and n_bytes is not None else None


def _socket_difference(function: Callable[[], Any]) -> tuple[Any, int | None]:
    dist.barrier()
    before = socket_bytes()
    result = function()
    dist.barrier()
    after = socket_bytes()
    return result, None if before is None or after is None else after - before
