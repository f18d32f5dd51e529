"""Pipeline parallelism: every rank has some of the layers, and micro-batches follow each other through them.

In *1F1B* each stage does one micro-batch's forward pass, then one's backward pass, in turn, once it has filled up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from bigmodel_utils.distributed.data import token_loss
from bigmodel_utils.models import GPT
from bigmodel_utils.models.gpt import rotation


class Stage(nn.Module):
    """Some of a GPT's blocks under their own names; the first stage has the embeddings too, the last norm and output.

    Raises:
        ValueError: where the stages cannot have equally many layers, or the first and the last share a weight.
    """

    def __init__(self, model: GPT, stage: int, n_stages: int):
        super().__init__()
        n_layers = len(model.blocks)
        if n_layers % n_stages:
            raise ValueError(f"{n_layers} layers cannot be shared out evenly to {n_stages} stages")
        if model.config.tied:
            raise ValueError("a tied output layer would lie on two ranks: build the model with tied=False")
        self.config, self.first, self.last = model.config, stage == 0, stage == n_stages - 1
        own = range(stage * n_layers // n_stages, (stage + 1) * n_layers // n_stages)
        self.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in own})
        if self.first:
            self.token_embedding, self.dropout = model.token_embedding, model.dropout
            if model.config.position == "learned":
                self.position_embedding = model.position_embedding
        if self.last:
            self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) in the first stage, else activations (B, T, C); to activations, in the last stage logits."""
        positions, turn = torch.arange(x.shape[1], device=x.device), None
        if self.first:
            x = self.token_embedding(x)
            if self.config.position == "learned":
                x = x + self.position_embedding(positions)
            x = self.dropout(x)
        if self.config.position == "rotary":
            turn = rotation(positions, self.config.d_head, self.config.rotary_base, x.dtype)
        for block in self.blocks.values():
            x = block(x, turn, None)
        return self.head(self.norm(x)) if self.last else x


def parallelize(
    model: nn.Module, mesh: DeviceMesh, n_microbatches: int, device: torch.device, *, schedule: str = "1F1B", loss_fn=token_loss
) -> tuple[nn.Module, Schedule1F1B | ScheduleGPipe]:
    """This rank's stage, and the schedule that runs it.

    Args:
        model: a GPT, of which the rank keeps its layers, or this rank's stage itself.
        n_microbatches: equal parts of each batch; 1F1B needs as many as stages at least.
        schedule: "1F1B" or "GPipe", which does all forward passes first.
    """
    stage, n_stages = mesh.get_local_rank(), mesh.size()
    part = Stage(model, stage, n_stages) if isinstance(model, GPT) else model
    kind = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}[schedule]
    runner = PipelineStage(part, stage, n_stages, device, group=mesh.get_group())
    return part, kind(runner, n_microbatches=n_microbatches, loss_fn=loss_fn)


def backward(schedule: Schedule1F1B | ScheduleGPipe, tokens: Tensor, targets: Tensor, mesh: DeviceMesh) -> Tensor | None:
    """One step's gradients; the mean loss, detached, on the last rank, and None on the others.

    The first rank reads `tokens`, the last `targets`; the others get what they need from their neighbours.
    """
    losses: list[Tensor] = []
    inputs = (tokens,) if mesh.get_local_rank() == 0 else ()
    if mesh.get_local_rank() < mesh.size() - 1:
        schedule.step(*inputs)
        return None
    schedule.step(*inputs, target=targets, losses=losses)
    return torch.stack(losses).mean().detach()


class Slot(NamedTuple):
    """One micro-batch's forward ("F") or backward ("B") pass on one rank."""

    rank: int
    kind: str
    microbatch: int
    begin: float
    end: float


def timetable(orders: Sequence[Sequence[str]], forward: float = 1.0, backward: float = 2.0) -> list[Slot]:
    """When each pass runs if a rank starts the next of its order as soon as its input is there, and messages take no time.

    Args:
        orders: for each rank its passes in order, such as ["F", "F", "B", "B"]; micro-batches come in their own order.
        forward, backward: how long a pass takes, alike on all ranks.

    Raises:
        ValueError: where every rank waits for another.
    """
    ends: dict[tuple[int, str, int], float] = {}
    queues = [_numbered(order) for order in orders]
    slots, free = [], [0.0] * len(orders)
    while any(queues):
        ready = [rank for rank, queue in enumerate(queues) if queue and _needs(rank, *queue[0], len(orders)) <= ends.keys()]
        if not ready:
            raise ValueError("no rank can go on: each waits for another's pass")
        for rank in ready:
            kind, number = queues[rank].pop(0)
            begin = max([free[rank], *(ends[need] for need in _needs(rank, kind, number, len(orders)))])
            free[rank] = ends[rank, kind, number] = begin + (forward if kind == "F" else backward)
            slots.append(Slot(rank, kind, number, begin, free[rank]))
    return slots


def _numbered(order: Sequence[str]) -> list[tuple[str, int]]:
    return [(kind, order[:place].count(kind)) for place, kind in enumerate(order)]


def _needs(rank: int, kind: str, number: int, n_ranks: int) -> set[tuple[int, str, int]]:
    """The passes that must be over: forward, the previous rank's; backward, the next rank's, or the last rank's own forward."""
    if kind == "F":
        return {(rank - 1, "F", number)} if rank else set()
    return {(rank + 1, "B", number)} if rank < n_ranks - 1 else {(rank, "F", number)}


def idle_share(slots: Sequence[Slot]) -> float:
    """Share of all ranks' time, from the first slot's begin to the last one's end, in which they did nothing."""
    n_ranks = 1 + max(slot.rank for slot in slots)
    span = max(slot.end for slot in slots) - min(slot.begin for slot in slots)
    return 1 - sum(slot.end - slot.begin for slot in slots) / (n_ranks * span)


def most_in_flight(order: Sequence[str]) -> int:
    """The most micro-batches whose activations a rank holds at once: forward passes done, backward passes not."""
    return max(order[:end].count("F") - order[:end].count("B") for end in range(len(order) + 1))


class Sleeper(nn.Module):
    """A stage that sleeps where another would compute, and keeps (kind, begin, end) of every pass in `passes`.

    Sleeping ranks share a core without slowing each other, so that a schedule can be timed on any machine.
    """

    def __init__(self, forward_s: float, backward_s: float):
        super().__init__()
        self.seconds = {"F": forward_s, "B": backward_s}
        self.weight = nn.Parameter(torch.ones(()))
        self.passes: list[tuple[str, float, float]] = []

    def rest(self, kind: str) -> None:
        """Sleep as long as a pass of that kind takes, and write it down."""
        begin = time.monotonic()
        time.sleep(self.seconds[kind])
        self.passes.append((kind, begin, time.monotonic()))

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers, later."""
        return _Rest.apply(x * self.weight, self)


class _Rest(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sleeper: Sleeper) -> Tensor:
        ctx.sleeper = sleeper
        sleeper.rest("F")
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.sleeper.rest("B")
        return gradient, None
