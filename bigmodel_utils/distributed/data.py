"""Data parallelism: every rank has the whole model and a part of the batch; gradients are averaged by an all-reduce."""

from __future__ import annotations

import contextlib

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


def parallelize(model: nn.Module, mesh: DeviceMesh) -> DistributedDataParallel:
    """The model with its weights sent from the mesh's first rank to all, and gradients averaged in every backward pass."""
    return DistributedDataParallel(model, device_mesh=mesh)


def part(batch: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of a batch.

    Raises:
        ValueError: where the ranks cannot have equally many: the mean of their means would then weigh rows differently.
    """
    if len(batch) % mesh.size():
        raise ValueError(f"a batch of {len(batch)} rows cannot be shared out evenly to {mesh.size()} ranks")
    return batch.chunk(mesh.size())[mesh.get_local_rank()]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats a token, in the precision of the logits (B, T, V); targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def backward(model: nn.Module, tokens: Tensor, targets: Tensor, n_microbatches: int = 1) -> Tensor:
    """Add the gradients of this rank's rows (B, T), computed in parts; messages only with the last of them.

    Returns:
        the mean loss of this rank's rows, detached.
    """
    total = tokens.new_zeros((), dtype=next(model.parameters()).dtype)
    pairs = list(zip(tokens.chunk(n_microbatches), targets.chunk(n_microbatches)))
    for number, (x, y) in enumerate(pairs):
        quiet = number < len(pairs) - 1 and isinstance(model, DistributedDataParallel)
        with model.no_sync() if quiet else contextlib.nullcontext():
            loss = token_loss(model(x), y) * (len(x) / len(tokens))
            loss.backward()
        total += loss.detach()
    return total
