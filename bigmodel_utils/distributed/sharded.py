"""Sharded data parallelism (ZeRO stage 3, FSDP2): of every weight, gradient and optimiser slot a rank keeps its part.

A block's weights are gathered when it is used and dropped after; gradients are scattered as soon as they are there.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from bigmodel_utils.models import GPT


def parallelize(model: GPT, mesh: DeviceMesh) -> GPT:
    """Shard the model in place, block by block, and what stands around the blocks as one more; use it as before.

    Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5.
    """
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
