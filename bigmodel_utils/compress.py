"""Compression: fewer weights, fewer bits, smaller models, small changes; what each costs in bytes, and how far it may be off.

`predict` has int8 weights as a caller uses them; here are the methods that chapter 14 compares.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALE_BYTES = 2  # a group's scale is stored as float16


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def float_bytes(model: nn.Module) -> int:
    """Bytes of the parameters as they are."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def replace_linear(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy of the model with `make(layer)` in the place of each linear layer."""
    model = copy.deepcopy(model)
    for name, layer in linear_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(layer))
    return model


# Fewer bits.


def quantize_groups(weight: Tensor, n_bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Round to 2^n_bits - 1 levels, evenly spaced and symmetric about 0, with a scale for each group of a row's neighbours.

    Args:
        weight: (d_out, d_in); the last group of a row may be shorter.
        n_bits: 2 to 8.
        group_size: weights that share a scale.

    Returns:
        codes (d_out, d_in) int8, and scale (d_out, d_in) float32, equal within a group: |weight - scale * codes| <= scale / 2.

    Raises:
        ValueError: for another number of bits, or groups of none.
    """
    if not 2 <= n_bits <= 8 or group_size < 1:
        raise ValueError(f"needs 2 to 8 bits and groups of 1 or more, got {n_bits} and {group_size}")
    largest = 2 ** (n_bits - 1) - 1
    padded = F.pad(weight, (0, -weight.shape[1] % group_size)).unflatten(1, (-1, group_size))
    scale = padded.abs().amax(dim=2, keepdim=True) / largest
    scale = torch.where(scale > 0, scale, 1.0).expand_as(padded).flatten(1)[:, : weight.shape[1]]
    return (weight / scale).round().to(torch.int8), scale


def quantized_bytes(weight: Tensor, n_bits: int, group_size: int) -> int:
    """Bytes of a matrix's packed codes and its groups' scales."""
    n_groups = weight.shape[0] * math.ceil(weight.shape[1] / group_size)
    return math.ceil(weight.numel() * n_bits / 8) + n_groups * SCALE_BYTES


def quantized(model: nn.Module, n_bits: int, group_size: int = 32) -> tuple[nn.Module, int]:
    """A copy that computes with the rounded weights (biases stay), and the bytes that it would be stored in."""
    model, n_bytes = copy.deepcopy(model), float_bytes(model)
    for layer in linear_layers(model).values():
        codes, scale = quantize_groups(layer.weight.detach(), n_bits, group_size)
        n_bytes += quantized_bytes(layer.weight, n_bits, group_size) - 4 * layer.weight.numel()
        layer.weight.data = codes * scale
    return model, n_bytes


@torch.no_grad()
def output_bound(model: nn.Module, changed: nn.Module, x: Tensor) -> Tensor:
    """How far each output of a ReLU network may be from that of another with the same layers: an upper bound, in float64.

    With weights W and W', inputs h and h' of a layer: |W h - W' h'| <= |W - W'| |h| + |W'| |h - h'|, and ReLU adds nothing.

    Args:
        model, changed: `nn.Sequential`s of linear layers (the same biases), ReLU, Dropout and Flatten.
        x: (m, ...) inputs.

    Returns:
        (m, k).

    Raises:
        ValueError: for another kind of layer.
    """
    h, error = x.flatten(1).double(), torch.zeros_like(x.flatten(1), dtype=torch.float64)
    for layer, other in zip(model, changed, strict=True):
        if isinstance(layer, nn.Linear):
            weight, new = layer.weight.double(), other.weight.double()
            error = error @ new.abs().T + h.abs() @ (weight - new).abs().T
            h = F.linear(h, weight, layer.bias.double())
        elif isinstance(layer, nn.ReLU):
            h = h.relu()
        elif not isinstance(layer, (nn.Dropout, nn.Flatten)):
            raise ValueError(f"the bound holds for linear layers and ReLU, not for {type(layer).__name__}")
    return error


# Fewer weights.


def magnitude_masks(model: nn.Module, share: float) -> dict[str, Tensor]:
    """Where to keep weights when the `share` of smallest size is dropped, of all linear layers' weights together.

    Of all masks that keep as many, these leave the smallest sum of squares out.

    Raises:
        ValueError: for a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1), got {share}")
    layers = linear_layers(model)
    size = torch.cat([layer.weight.detach().abs().flatten() for layer in layers.values()])
    keep = torch.ones(len(size), dtype=torch.bool).index_fill(0, size.argsort()[: round(share * len(size))], False)
    parts = keep.split([layer.weight.numel() for layer in layers.values()])
    return {name: part.view_as(layer.weight) for (name, layer), part in zip(layers.items(), parts)}


def pruned(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy with the weights outside the masks at 0; training the copy leaves them there (their gradient is 0, too)."""
    model = copy.deepcopy(model)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        weight.data *= mask
        weight.register_hook(lambda g, mask=mask: g * mask)
    return model


def pruned_bytes(model: nn.Module, masks: dict[str, Tensor]) -> int:
    """Bytes of the kept weights in float32, with one bit a weight that says where they are, and the biases."""
    dense = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    return float_bytes(model) - 4 * dense + 4 * kept + math.ceil(dense / 8)


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best product of (d_out, rank) and (rank, d_in) for a matrix, by its singular values.

    The error is the root of the sum of the squares of the dropped singular values (Eckart and Young 1936).

    Raises:
        ValueError: for a rank below 1 or above the matrix's.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank must lie in 1 ... {min(weight.shape)}, got {rank}")
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def factored(model: nn.Module, rank: int) -> nn.Module:
    """A copy whose linear layers are two thin ones wherever that has fewer weights."""

    def split(layer: nn.Linear) -> nn.Module:
        d_out, d_in = layer.weight.shape
        if rank * (d_out + d_in) >= d_out * d_in:
            return layer
        up, down = low_rank(layer.weight.detach(), rank)
        first, second = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out)
        first.weight.data, second.weight.data, second.bias.data = down, up, layer.bias.detach().clone()
        return nn.Sequential(first, second)

    return replace_linear(model, split)


# A smaller model that learns from the larger one.


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0, share: float = 0.9) -> Tensor:
    """`share` times T^2 KL(teacher || student), both softened by T, and the rest cross-entropy with the labels.

    Args:
        student, teacher: logits (B, K).
        labels: (B,).

    Source: Hinton, Vinyals and Dean 2015, https://arxiv.org/abs/1503.02531, section 2.
    """
    soft = F.kl_div(
        (student / temperature).log_softmax(dim=1),
        (teacher / temperature).log_softmax(dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return share * temperature**2 * soft + (1 - share) * F.cross_entropy(student, labels)


# A small change of a large model.


class LoRALinear(nn.Module):
    """W x + b + B A x: the layer is frozen, and only A (rank, d_in) and B (d_out, rank), which begins at 0, are trained.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1 (their factor alpha / r is 1 here).
    """

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        d_out, d_in = linear.weight.shape
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, d_in) / math.sqrt(d_in))
        self.up = nn.Parameter(torch.zeros(d_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(B, d_in) -> (B, d_out)."""
        return self.linear(x) + x @ self.down.T @ self.up.T

    def merged(self) -> nn.Linear:
        """One linear layer that does the same, at no cost over the first."""
        linear = copy.deepcopy(self.linear)
        linear.weight.data += (self.up @ self.down).detach()
        return linear


def with_lora(model: nn.Module, rank: int, seed: int = 0) -> nn.Module:
    """A copy with each linear layer frozen beside a trainable product of that rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return replace_linear(model, lambda layer: LoRALinear(layer, rank))


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy with plain linear layers again."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.merged())
    return model


def n_trainable(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers that training may change."""
    return sum(weight.numel() for weight in parameters if weight.requires_grad)


def pareto_front(cost: Tensor, quality: Tensor) -> Tensor:
    """Which of n candidates no other beats: none costs no more and is better, or costs less and is as good: (n,) bool."""
    cheaper = cost[None, :] <= cost[:, None]
    better = quality[None, :] >= quality[:, None]
    strictly = (cost[None, :] < cost[:, None]) | (quality[None, :] > quality[:, None])
    return ~(cheaper & better & strictly).any(dim=1)
