"""Checkers of chapter 12: against models that are built, PyTorch's counter, and counting one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bigmodel_utils.models import GPT, GPTConfig


def check_layer_parameters(answer: Callable[[int, int, int, int], int]) -> None:
    """One block of our GPT in LLaMA's layout, built without memory, and its weights counted."""
    for d_model, d_ff, n_heads, n_kv_heads in ((64, 96, 4, 4), (64, 176, 8, 2), (96, 256, 6, 1)):
        layout = {"d_model": d_model, "d_ff": d_ff, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "n_layers": 1}
        with torch.device("meta"):
            block = GPT(GPTConfig.modern(vocab_size=10, context_length=4, **layout)).blocks[0]
        expected = sum(weight.numel() for weight in block.parameters())
        found = answer(d_model, d_ff, n_heads, n_kv_heads)
        assert found == expected, f"width {d_model}, {d_ff}, {n_kv_heads} of {n_heads} heads: {expected} weights, not {found}"


def check_flops_per_token(answer: Callable[[int, int, int, int], int]) -> None:
    """PyTorch's counter over a training step of a small GPT, divided by its tokens."""
    for n_layers, d_model, length in ((1, 32, 8), (3, 32, 24), (2, 64, 16)):
        config = GPTConfig(vocab_size=50, context_length=length, n_layers=n_layers, n_heads=4, d_model=d_model, bias=False)
        model, tokens = GPT(config), torch.zeros(2, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens).sum().backward()
        n_multiplied = sum(weight.numel() for weight in model.blocks.parameters() if weight.ndim == 2) + 50 * d_model
        expected, rest = divmod(counter.get_total_flops(), 2 * length)
        assert rest == 0
        found = answer(n_multiplied, n_layers, d_model, length)
        assert found == expected, (
            f"{n_layers} layers, width {d_model}, length {length}: the counter sees {expected} a token, not {found}"
        )


def check_days(answer: Callable[[float, float, int, float, float], float]) -> None:
    """The machines' FLOPs in the answered days must be the run's, and BLOOM must take the days that it took."""
    for n_accelerators, efficiency in ((1, 1.0), (10, 0.25), (640, 0.4)):
        found = answer(1e9, 2e10, n_accelerators, 1e14, efficiency)
        done = n_accelerators * efficiency * 1e14 * found * 24 * 60 * 60
        assert abs(done / (6 * 1e9 * 2e10) - 1) < 1e-9, (
            f"in {found:.4g} days {n_accelerators} accelerators at {efficiency:.0%} do {done:.3g} FLOPs, not 1.2e+20"
        )
    bloom = answer(176.247e9, 366e9, 384, 312e12, 0.318)
    assert 117 < bloom < 119, f"BLOOM took 118 days, not {bloom:.0f}"


def check_sequences_that_fit(answer: Callable[[int, int, int, int], int]) -> None:
    """One sequence after another is added until the memory is full."""
    for memory, weights, token, context in ((1000, 100, 3, 10), (1000, 100, 3, 300), (1000, 1200, 3, 10), (1025, 100, 3, 10)):
        fitting = 0
        while weights + (fitting + 1) * token * context <= memory:
            fitting += 1
        found = answer(memory, weights, token, context)
        assert found == fitting, (
            f"memory {memory}, weights {weights}, {token} bytes a token, context {context}: {fitting} sequences fit, not {found}"
        )
