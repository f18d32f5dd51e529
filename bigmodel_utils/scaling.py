"""What training costs: floating-point operations and memory, by formula.

Conventions: a multiply-add is two FLOPs; only matrix products count, since they are nearly all of the work.
"""

from __future__ import annotations

from itertools import pairwise

from bigmodel_utils.models import MLPConfig, count_parameters


def forward_flops(config: MLPConfig, n_samples: int) -> int:
    """FLOPs of one forward pass over `n_samples` rows: two a weight and row; biases and ReLUs are not counted."""
    return 2 * n_samples * sum(d_in * d_out for d_in, d_out in pairwise(config.widths))


def train_flops(config_or_n_params: MLPConfig | int, n_tokens: int) -> int:
    """FLOPs of training on `n_tokens` samples or tokens, repeats counted.

    For a configuration, exact: forward, the gradient of every weight, and the gradient of every layer's input but
    the first. For a number of parameters N, the rule 6 N D (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, 2.1).

    Raises:
        ValueError: for a negative count.
    """
    if n_tokens < 0:
        raise ValueError(f"n_tokens counts samples or tokens, got {n_tokens}")
    if isinstance(config_or_n_params, MLPConfig):
        first_layer = 2 * n_tokens * config_or_n_params.widths[0] * config_or_n_params.widths[1]
        return 3 * forward_flops(config_or_n_params, n_tokens) - first_layer
    return 6 * config_or_n_params * n_tokens


def training_memory_bytes(config: MLPConfig, batch_size: int, *, n_optimizer_slots: int = 2, bytes_per_number: int = 4) -> int:
    """Memory of a training step: weights, gradients, the optimiser's slots, and the activations kept for the backward pass.

    Args:
        batch_size: rows a step.
        n_optimizer_slots: numbers that the optimiser keeps a weight: 0 for SGD, 1 with momentum, 2 for Adam.
        bytes_per_number: 4 for float32.
    """
    n_activations = batch_size * (config.widths[0] + 2 * sum(config.widths[1:-1]) + config.widths[-1])  # linear and ReLU outputs
    return bytes_per_number * ((2 + n_optimizer_slots) * count_parameters(config) + n_activations)
