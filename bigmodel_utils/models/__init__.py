"""The models that the article names, one readable file each, and the functions that serve all of them."""

from __future__ import annotations

from torch import nn

from bigmodel_utils.models.mlp import MLP, MLPConfig

__all__ = ["MLP", "MLPConfig", "count_parameters"]


def count_parameters(model_or_config: nn.Module | MLPConfig) -> int:
    """Number of trainable parameters, tied weights once; of a configuration, by its formula, without building it.

    Raises:
        TypeError: for anything that is neither a module nor a configuration with `n_parameters`.
    """
    if isinstance(model_or_config, nn.Module):
        return sum(parameter.numel() for parameter in model_or_config.parameters() if parameter.requires_grad)
    if hasattr(model_or_config, "n_parameters"):
        return model_or_config.n_parameters
    raise TypeError(f"expected a torch module or a model configuration, got {type(model_or_config).__name__}")
