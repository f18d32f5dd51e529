"""How the time of a GPT's training step grows with width, depth, context and batch: the slope on logarithmic axes.

A slope of 1 doubles the time with the size, 2 quadruples it. Beside the measured slope stands that of the step's
floating-point operations, counted by torch: where time grows more slowly, small sizes do not use the machine.
`python benchmarks/growth.py`, about a minute.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bigmodel_utils import device
from bigmodel_utils.models import GPT, GPTConfig

BASE = GPTConfig(vocab_size=256, context_length=128, n_layers=4, n_heads=4, d_model=128)
BASE_BATCH = 8
SIZES = {
    "width": {"d_model": (64, 128, 256, 512)},
    "depth": {"n_layers": (1, 2, 4, 8)},
    "context": {"context_length": (64, 128, 256, 512)},
    "batch": {"batch": (2, 4, 8, 16, 32)},
}


def training_step(config: GPTConfig, batch: int) -> Callable[[], None]:
    """Forward, backward and update on random tokens."""
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(config.vocab_size, (batch, config.context_length))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()

    return step


def count_flops(step: Callable[[], None]) -> int:
    """Operations of one step; with attention written out, for torch's counter knows no fused attention on a CPU."""
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        step()
    return counter.get_total_flops()


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Of the straight line through the logarithms."""
    return np.polyfit(np.log(sizes), np.log(values), 1)[0]


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print(f"GPT training step, float32, {torch.get_num_threads()} threads, around {BASE.n_layers}x{BASE.d_model}, ", end="")
    print(f"context {BASE.context_length}, batch {BASE_BATCH}")
    print(f"{'grows':>8} {'sizes':>16} {'ms':>28} {'slope':>6} {'of FLOPs':>9}")
    for name, ((field, sizes),) in ((name, change.items()) for name, change in SIZES.items()):
        steps = {}
        for size in sizes:
            batch = size if field == "batch" else BASE_BATCH
            config = BASE if field == "batch" else dataclasses.replace(BASE, d_ff=None, n_kv_heads=None, **{field: size})
            steps[size] = training_step(config, batch)
        seconds = list(device.fastest_s(steps, budget_s=4).values())
        flops = [count_flops(step) for step in steps.values()]
        milliseconds = " ".join(f"{1e3 * s:.1f}" for s in seconds)
        print(f"{name:>8} {' '.join(map(str, sizes)):>16} {milliseconds:>28} ", end="")
        print(f"{slope(sizes, seconds):6.2f} {slope(sizes, flops):9.2f}")


if __name__ == "__main__":
    main()
