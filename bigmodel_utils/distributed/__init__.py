"""Models on several ranks: data, sharded, tensor, sequence and pipeline parallelism, started by torchrun."""

from __future__ import annotations

from bigmodel_utils.distributed.launch import LaunchError, mesh_of, run, start

__all__ = ["LaunchError", "mesh_of", "run", "start"]
