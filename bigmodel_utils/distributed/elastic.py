"""Training that survives the death of a rank: torchrun starts all ranks again, and they go on from the last checkpoint."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from bigmodel_utils import checkpoint
from bigmodel_utils.distributed import data, launch
from bigmodel_utils.models import GPT, GPTConfig


def train(
    device: torch.device,
    *,
    folder: str | Path,
    n_steps: int = 20,
    save_every: int = 5,
    batch_size: int = 8,
    length: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    killed_rank: int | None = None,
    killed_at: int = 0,
) -> dict[str, Any]:
    """Train a small GPT by data parallelism and AdamW, with a checkpoint every few steps.

    A step's batch follows from the seed and its number alone, so that it is the same after a restart. And one backward pass
    is done and thrown away before the first step: DDP puts gradients into other buckets after its first, so that their
    sums are rounded in another order, and the first step after a restart would differ from the same step without one.

    Args:
        folder: for checkpoints; a path or fsspec URL that all hosts see. Training goes on from the newest in it.
        killed_rank: a rank that kills itself before step `killed_at`, where training did not begin from a checkpoint.

    Returns:
        "losses" of all steps, "sha256" of weights and optimiser at the end, and the step that this attempt began at, "resumed_at".
    """
    config = GPTConfig(vocab_size=64, context_length=length, n_layers=2, n_heads=2, d_model=32)
    torch.manual_seed(seed)
    mesh = launch.mesh_of(dist.get_world_size(), device)
    model = GPT(config).to(device)
    wrapped = data.parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    saved = checkpoint.Folder(folder, asynchronous=False)  # written before anyone takes the next step, and so before a kill
    begin, losses = _resume(saved, model, optimizer)
    batch = lambda step: _batch(seed, step, batch_size, length).to(device)  # noqa: E731
    _backward(wrapped, batch(begin), mesh)
    optimizer.zero_grad()
    for step in range(begin, n_steps):
        if dist.get_rank() == killed_rank and step == killed_at and begin == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = _backward(wrapped, batch(step), mesh)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss)
        losses.append(loss.item() / mesh.size())
        if (step + 1) % save_every == 0 and dist.get_rank() == 0:
            tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            saved.save(tree, step + 1)
    return {"losses": losses, "sha256": _digest(model, optimizer), "resumed_at": begin}


def _backward(wrapped: nn.Module, tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    return data.backward(wrapped, data.part(tokens[:, :-1], mesh), data.part(tokens[:, 1:], mesh))


def _resume(saved: checkpoint.Folder, model: GPT, optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
    """Load the newest checkpoint. All ranks find the same, since none is written before all have taken a step."""
    found = saved.latest()
    if found is None:
        return 0, []
    step, tree = found
    model.load_state_dict(tree["model"])
    optimizer.load_state_dict(tree["optimizer"])
    return step, tree["losses"]


def _batch(seed: int, step: int, batch_size: int, length: int) -> Tensor:
    """Tokens (batch_size, length + 1), each the one before plus 1 or 2, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    start = torch.randint(64, (batch_size, 1), generator=generator)
    return (start + torch.randint(1, 3, (batch_size, length + 1), generator=generator).cumsum(1)) % 64


def _digest(model: GPT, optimizer: torch.optim.Optimizer) -> str:
    """One number for every bit of the weights and of the optimiser's memory."""
    digest = hashlib.sha256()
    slots = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    for value in [*model.state_dict().values(), *slots]:
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
