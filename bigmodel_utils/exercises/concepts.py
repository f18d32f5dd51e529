"""Checkers of chapter 2: attention, counts, FLOPs and receptive fields, each against what PyTorch does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bigmodel_utils.models import count_parameters, gpt


def check_causal_attention(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Against torch's attention with `is_causal`, in float64."""
    generator = torch.Generator().manual_seed(0)
    for n_positions, width in ((1, 4), (6, 3), (9, 16)):
        q, k, v = torch.randn(3, n_positions, width, dtype=torch.float64, generator=generator)
        expected = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        got = answer(q.clone(), k.clone(), v.clone())
        assert got.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
        assert torch.isfinite(got).all(), "your result has NaN or infinity: does the first position see itself?"
        assert torch.allclose(got[0], v[0]), "the first position sees only itself, so that its answer is its own value"
        assert torch.allclose(got, expected), f"with {n_positions} positions of width {width} the result differs from torch's"


def check_count_modern_gpt(answer: Callable[[int, int, int, int], int]) -> None:
    """Against built models of that layout, on the meta device."""
    for vocab_size, n_layers, d_model, d_ff in ((11, 1, 8, 24), (50, 3, 16, 40), (32_000, 2, 64, 176)):
        sizes = {"vocab_size": vocab_size, "n_layers": n_layers, "d_model": d_model, "d_ff": d_ff}
        with torch.device("meta"):
            expected = count_parameters(gpt.GPT(gpt.GPTConfig.modern(**sizes, n_heads=2)))
        got = answer(vocab_size, n_layers, d_model, d_ff)
        assert got == expected, f"for {sizes} the built model has {expected} parameters, your count is {got}"


def check_convolution_flops(answer: Callable[..., int]) -> None:
    """Against PyTorch's counter."""
    for height, width, d_in, d_out, kernel_size, stride, padding in (
        (8, 8, 1, 4, 3, 1, 0),
        (9, 12, 3, 5, 3, 2, 1),
        (224, 224, 3, 64, 7, 2, 3),
        (7, 10, 6, 2, 1, 1, 0),
    ):
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            nn.Conv2d(d_in, d_out, kernel_size, stride, padding)(torch.zeros(1, d_in, height, width))
        expected, got = counter.get_total_flops(), answer(height, width, d_in, d_out, kernel_size, stride, padding)
        assert got == expected, (
            f"{d_in} to {d_out} channels, filter {kernel_size}, stride {stride}, padding {padding}, on {height} x {width} "
            f"pixels: PyTorch counts {expected}, you {got}"
        )


def check_receptive_field(answer: Callable[[Sequence[int], Sequence[int]], int]) -> None:
    """Against the gradient of one output pixel with respect to a long row of input pixels."""
    for kernel_sizes, strides in (([3], [1]), ([3, 3], [1, 1]), ([5], [2]), ([3, 3], [2, 1]), ([7, 3, 3], [2, 2, 1])):
        x = torch.zeros(1, 1, 200, dtype=torch.float64, requires_grad=True)
        h = x
        for kernel_size, stride in zip(kernel_sizes, strides):
            h = F.conv1d(h, torch.ones(1, 1, kernel_size, dtype=torch.float64), stride=stride)
        h[0, 0, 3].backward()
        expected, got = int((x.grad != 0).sum()), answer(list(kernel_sizes), list(strides))
        assert got == expected, (
            f"filters {kernel_sizes} with strides {strides}: an output depends on {expected} pixels a side, you say {got}"
        )
