"""Tensor parallelism: every matrix of a block is cut, so that a rank has some of the heads and of the hidden numbers.

The first matrix is cut by outputs, the second by inputs, and only the second's results must be summed over the ranks.
With *sequence parallelism* what lies between (norms, residuals) is cut too, by positions: the sum arrives in parts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from bigmodel_utils.models import GPT, GPTConfig


def parallelize(model: GPT, mesh: DeviceMesh, sequence: bool = False) -> GPT:
    """Cut the blocks of a model in place; all ranks give it the same batch, and get the same logits.

    Args:
        sequence: cut norms and residuals by positions too; the batch's length must then be a multiple of the ranks.

    Raises:
        ValueError: where the ranks do not divide heads, key heads and hidden numbers; for dropout, whose masks would have to
            differ where a rank has its part and agree where it has the whole; for `sequence` with a tied output layer.

    Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3; for sequences Korthikanti et al. 2022,
    https://arxiv.org/abs/2205.05198, section 4.2.2.
    """
    config, p = model.config, mesh.size()
    if config.n_heads % p or config.n_kv_heads % p or config.d_ff % p:
        raise ValueError(
            f"{p} ranks do not divide {config.n_heads} heads, {config.n_kv_heads} key heads and {config.d_ff} hidden numbers"
        )
    if config.dropout:
        raise ValueError(f"tensor parallelism is not written for dropout, got {config.dropout}")
    if sequence and config.tied:
        raise ValueError("sequence parallelism gathers positions before an output layer of its own: build with tied=False")
    local = dataclasses.replace(
        config, n_heads=config.n_heads // p, n_kv_heads=config.n_kv_heads // p, d_model=config.d_model // p
    )
    for block in model.blocks:
        block.attention.config = local
        for weight in block.attention.qkv.parameters():
            weight.data = weight.data[head_order(config, p).to(weight.device)]
        parallelize_module(block, mesh, block_plan(block, sequence))
    if sequence:
        parallelize_module(model, mesh, _ends_plan())
    return model


def head_order(config: GPTConfig, n_ranks: int) -> Tensor:
    """The rows of the one matrix to queries, keys and values, in the order in which ranks own them: q k v, q k v, ..."""
    d = config.d_head
    parts = torch.arange((config.n_heads + 2 * config.n_kv_heads) * d).split(
        [config.n_heads * d, config.n_kv_heads * d, config.n_kv_heads * d]
    )
    return torch.cat([rows for rank in zip(*(part.chunk(n_ranks) for part in parts)) for rows in rank])


def block_plan(block: nn.Module, sequence: bool) -> dict[str, ParallelStyle]:
    """How each part of a block is cut: first matrices by outputs ("colwise"), second ones by inputs ("rowwise")."""
    results = {"output_layouts": Shard(1)} if sequence else {}
    plan = {
        "attention.qkv": ColwiseParallel(),
        "attention.out": RowwiseParallel(**results),
        "feed_forward.up": ColwiseParallel(),
        "feed_forward.down": RowwiseParallel(**results),
    }
    if hasattr(block.feed_forward, "gate"):
        plan["feed_forward.gate"] = ColwiseParallel()
    if sequence:
        whole = {"desired_input_layouts": (Replicate(), None, None)}
        plan |= {
            "norm1": SequenceParallel(),
            "norm2": SequenceParallel(),
            "attention": PrepareModuleInput(input_layouts=(Shard(1), None, None), **whole),
            "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        }
    return plan


def _ends_plan() -> dict[str, ParallelStyle]:
    """Positions are cut after the embedding, and gathered before the output layer."""
    return {
        "dropout": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True),
        "norm": SequenceParallel(),
        "head": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True),
    }


def finish_gradients(model: nn.Module) -> None:
    """After the backward pass with `sequence`: sum the gradients of norms, of which each rank has its positions' part."""
    for weight in model.parameters():
        if isinstance(weight.grad, DTensor) and any(placement.is_partial() for placement in weight.grad.placements):
            weight.grad = weight.grad.redistribute(placements=[Replicate()] * weight.grad.device_mesh.ndim)


def gradients(model: GPT) -> dict[str, Tensor]:
    """All gradients whole and in the model's own order, on every rank."""
    found = {}
    for name, weight in model.named_parameters():
        gradient = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
        if ".qkv." in name and isinstance(weight, DTensor):
            order = head_order(model.config, weight.device_mesh.size()).to(gradient.device)
            gradient = torch.empty_like(gradient).index_copy_(0, order, gradient)
        found[name] = gradient
    return found
