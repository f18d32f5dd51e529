"""Every kind of parallelism beside one process: losses, gradients, and the bytes that ranks send each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bigmodel_utils.distributed import data, launch, pipeline, sharded, tensor, traffic
from bigmodel_utils.models import GPT, GPTConfig
from bigmodel_utils.scaling import communication

Gradients = dict[str, Tensor]


def compare(
    device: torch.device,
    *,
    n_layers: int = 4,
    n_heads: int = 4,
    d_model: int = 64,
    vocab_size: int = 64,
    batch_size: int = 8,
    length: int = 16,
    n_microbatches: int = 4,
    layout: str = "plain",
    group_sizes: list[int] | None = None,
    kinds: list[str] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One step of a GPT in float64 by every kind of parallelism, beside the same step in one process.

    Args:
        layout: "plain" for GPT-2's, "modern" for LLaMA's with half as many key heads.
        group_sizes: numbers of ranks; each must divide the number of all. None: all together.
        kinds: keys of `KINDS`; None: all.

    Returns:
        one record for each kind and size: "loss_error" and "gradient_error", the largest differences relative to the loss
        and to a weight's largest gradient; "missing", weights without one; "held", bytes of the weights on the fullest rank;
        bytes that a rank sends, the most of any, by "formula", as "issued" (rings), and
        on the "sockets" (None where they do not tell), with what gloo's own algorithms should give in "gloo".
    """
    sizes = {"vocab_size": vocab_size, "context_length": length, "n_layers": n_layers, "n_heads": n_heads, "d_model": d_model}
    modern = {"n_kv_heads": n_heads // 2} if layout == "modern" else {}
    config = GPTConfig.modern(**sizes, **modern) if layout == "modern" else GPTConfig(**sizes, tied=False)
    torch.manual_seed(seed)
    model = GPT(config).to(device, torch.float64)
    text = torch.randint(vocab_size, (batch_size, length + 1)).to(device)
    tokens, targets = text[:, :-1], text[:, 1:]
    reference = copy.deepcopy(model)
    loss = data.backward(reference, tokens, targets)
    expected = {name: weight.grad for name, weight in reference.named_parameters()}
    records = []
    for size in group_sizes or [dist.get_world_size()]:
        mesh = launch.mesh_of(size, device)
        for kind in kinds or KINDS:
            ready = KINDS[kind](copy.deepcopy(model), tokens, targets, mesh, n_microbatches)
            held = _n_bytes(_local(weight) for weight in ready.held.parameters())
            found, count, sockets = traffic.measure(ready.step)
            found, gradients = ready.finish(found)
            records.append(
                {
                    "kind": kind,
                    "ranks": size,
                    **_errors(found, gradients, loss, expected, mesh),
                    **_largest({"held": held, "formula": ready.formula, "issued": count.sent_bytes(size), "sockets": sockets}),
                    "gloo": _largest({"": _gloo_bytes(count, size)})[""],
                    "calls": dict(count.calls),
                }
            )
    return records


def _errors(loss: Tensor | None, gradients: Gradients, expected_loss: Tensor, expected: Gradients, mesh: DeviceMesh) -> dict:
    """Relative differences, the largest of any rank; and the weights of which a group has no gradient, which must be none."""
    worst = max(((value - expected[name]).abs().max() / expected[name].abs().max()).item() for name, value in gradients.items())
    loss_error = 0.0 if loss is None else abs(loss.item() / expected_loss.item() - 1)
    names: list = [None] * mesh.size()
    dist.all_gather_object(names, list(gradients), group=mesh.get_group())
    missing = len(expected.keys() - set().union(*names))
    return _largest({"loss_error": loss_error, "gradient_error": worst, "missing": missing})


def _largest(values: dict[str, float | None]) -> dict[str, float | None]:
    """The largest of all ranks, of each value."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return {name: max((each[name] for each in everyone if each[name] is not None), default=None) for name in values}


def _gloo_bytes(count: traffic.Count, n_ranks: int) -> float:
    """What gloo sends: it does a reduce-scatter by an all-reduce of which each rank keeps its part (torch 2.13)."""
    extra = communication.ring_allgather_bytes(count.buffers["reduce-scatter"], n_ranks)
    return count.sent_bytes(n_ranks) + extra


def _mean(loss: Tensor, mesh: DeviceMesh) -> Tensor:
    dist.all_reduce(loss, group=mesh.get_group())
    return loss / mesh.size()


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _n_bytes(parameters: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in parameters)


class Prepared(NamedTuple):
    """A step that is ready to be taken."""

    step: Callable[[], Tensor | None]  # gives this rank's loss, or None on a rank that has none
    finish: Callable[[Tensor | None], tuple[Tensor | None, Gradients]]  # to the batch's loss, and whole gradients by name
    formula: float  # bytes that the busiest rank sends
    held: nn.Module  # with this rank's weights


def _data(model: GPT, tokens: Tensor, targets: Tensor, mesh: DeviceMesh, n_microbatches: int) -> Prepared:
    n_bytes = communication.data_parallel_bytes(_n_bytes(model.parameters()), mesh.size())
    wrapped = data.parallelize(model, mesh)
    x, y = data.part(tokens, mesh), data.part(targets, mesh)
    step = lambda: data.backward(wrapped, x, y, n_microbatches)  # noqa: E731
    return Prepared(step, lambda loss: (_mean(loss, mesh), _whole_gradients(model)), n_bytes, model)


def _data_at_once(model: GPT, tokens: Tensor, targets: Tensor, mesh: DeviceMesh, n_microbatches: int) -> Prepared:
    return _data(model, tokens, targets, mesh, 1)


def _sharded(model: GPT, tokens: Tensor, targets: Tensor, mesh: DeviceMesh, n_microbatches: int) -> Prepared:
    in_blocks, in_all = _n_bytes(model.blocks.parameters()), _n_bytes(model.parameters())
    n_bytes = communication.sharded_bytes(in_blocks, in_all - in_blocks, mesh.size())
    sharded.parallelize(model, mesh)
    x, y = data.part(tokens, mesh), data.part(targets, mesh)
    finish = lambda loss: (_mean(loss, mesh), _whole_gradients(model))  # noqa: E731
    return Prepared(lambda: data.backward(model, x, y), finish, n_bytes, model)


def _tensor(model: GPT, tokens: Tensor, targets: Tensor, mesh: DeviceMesh, n_microbatches: int) -> Prepared:
    n_bytes = communication.tensor_parallel_bytes(len(model.blocks), _activation_bytes(model, tokens), mesh.size())
    tensor.parallelize(model, mesh)
    step = lambda: data.backward(model, tokens, targets)  # noqa: E731
    return Prepared(step, lambda loss: (loss, tensor.gradients(model)), n_bytes, model)


def _sequence(model: GPT, tokens: Tensor, targets: Tensor, mesh: DeviceMesh, n_microbatches: int) -> Prepared:
    norms = _n_bytes(weight for name, weight in model.named_parameters() if "norm" in name)
    activations = _activation_bytes(model, tokens)
    n_bytes = communication.sequence_parallel_bytes(len(model.blocks), activations, norms, mesh.size())
    tensor.parallelize(model, mesh, sequence=True)

    def step() -> Tensor:
        loss = data.backward(model, tokens, targets)
        tensor.finish_gradients(model)
        return loss

    return Prepared(step, lambda loss: (loss, tensor.gradients(model)), n_bytes, model)


def _pipeline(model: GPT, tokens: Tensor, targets: Tensor, mesh: DeviceMesh, n_microbatches: int) -> Prepared:
    n_bytes = max(
        communication.pipeline_bytes(stage, mesh.size(), _activation_bytes(model, tokens)) for stage in range(mesh.size())
    )
    stage, schedule = pipeline.parallelize(model, mesh, n_microbatches, tokens.device)
    pipeline.backward(schedule, tokens, targets, mesh)  # the first step also tells the neighbours what shapes to expect
    stage.zero_grad()
    step = lambda: pipeline.backward(schedule, tokens, targets, mesh)  # noqa: E731
    return Prepared(step, lambda loss: (loss, _whole_gradients(stage)), n_bytes, stage)


def _activation_bytes(model: GPT, tokens: Tensor) -> int:
    return tokens.numel() * model.config.d_model * next(model.parameters()).element_size()


def _whole_gradients(model: nn.Module) -> Gradients:
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in gradients.items()}


KINDS = {
    "data": _data_at_once,
    "data, accumulated": _data,
    "sharded": _sharded,
    "tensor": _tensor,
    "tensor and sequence": _sequence,
    "pipeline": _pipeline,
}
