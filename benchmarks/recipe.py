"""What a GPT's recipe is worth: time to the loss that the plain one reaches, and the full one minus each part in turn.

The text is the King James Version, byte by byte; windows spread over books that are held out are validated on.
The plain recipe is GPT-2's layout, AdamW and a cosine, in float32, at the best of the learning rates 1e-3, 3e-3, 6e-3 and 1e-2.
The full one is `GPTConfig.fast`, `optim.Muon` and `optim.trapezoid`, in bfloat16.
`python benchmarks/recipe.py [seeds]` prints the ablation, about three minutes a seed.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler

from bigmodel_utils import language, optim, tokens, train
from bigmodel_utils.models import GPT, GPTConfig

SIZE = {"vocab_size": 256, "context_length": 128, "n_layers": 4, "n_heads": 4, "d_model": 128}
BATCH_SIZE = 16
N_VALIDATION = 256  # windows
PLAIN_STEPS, FULL_STEPS = 900, 200


@dataclass(frozen=True)
class Recipe:
    """How a model is built and trained, whatever for how long."""

    config: GPTConfig
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    schedule: Callable[[int], optim.Schedule]  # of all steps
    precision: str
    max_grad_norm: float | None = None


def adamw(model: nn.Module, lr: float = 6e-3, weight_decay: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    """GPT-3's settings (Brown et al. 2020, appendix B), but for the learning rate."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, **options)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    """A momentum of 0.9 instead of 0.95: so short a run has few steps to average over."""
    return optim.Muon(*optim.split_matrices(model), lr=0.01, adamw_lr=5e-3, momentum=0.9)


def cosine(n_steps: int) -> optim.Schedule:
    """Warm-up over 50 steps, then to a tenth."""
    return optim.warmup(50, optim.cosine(n_steps - 50, floor=0.1))


def trapezoid(n_steps: int) -> optim.Schedule:
    """A short rise, and the second half falling to 0."""
    return optim.trapezoid(n_steps, warmup_steps=10, decay_steps=n_steps // 2)


PLAIN = Recipe(GPTConfig(**SIZE), adamw, cosine, "float32", max_grad_norm=1.0)
FULL = Recipe(GPTConfig.fast(**SIZE), muon, trapezoid, "bfloat16")


def without() -> dict[str, Recipe]:
    """The full recipe minus each part, which the plain recipe's replaces; AdamW at the best of three learning rates."""
    change = functools.partial(dataclasses.replace, FULL)
    layouts = {
        "rotary positions": {"position": "learned"},
        "RMSNorm": {"norm": "layer"},
        "squared ReLU": {"feed_forward": "gelu"},
        "QK norm": {"qk_norm": False},
        "no biases": {"bias": True},
    }
    recipes = {name: change(config=GPTConfig.fast(**SIZE | layout)) for name, layout in layouts.items()}
    fused = functools.partial(adamw, weight_decay=0.0, fused=True)
    return recipes | {
        "Muon": change(make_optimizer=fused),
        "trapezoid": change(schedule=cosine),
        "bfloat16": change(precision="float32"),
    }


@functools.cache
def load_bytes(part: str) -> np.ndarray:
    """The bytes, (n,) uint8, of the text's "train" or "validation" part, which are whole books."""
    return np.frombuffer(language.load_text()[part].encode(), dtype=np.uint8)


class Run:
    """A recipe under way, which can be trained a few steps at a time."""

    def __init__(self, recipe: Recipe, n_steps: int, seed: int = 0):
        torch.manual_seed(seed)
        self.recipe, self.model = recipe, GPT(recipe.config)
        self.optimizer = recipe.make_optimizer(self.model)
        self.scheduler = lr_scheduler.LambdaLR(self.optimizer, recipe.schedule(n_steps))
        self.batches = tokens.TokenBatches(load_bytes("train"), recipe.config.context_length, BATCH_SIZE, seed=seed)
        self.seconds = 0.0  # of training

    def train(self, n_steps: int) -> None:
        """Go on for that many steps."""
        config = train.TrainConfig(
            max_steps=n_steps, precision=self.recipe.precision, max_grad_norm=self.recipe.max_grad_norm, progress=False
        )
        options = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        self.seconds += train.fit(self.model, self.batches, language.cross_entropy, config, **options).seconds

    def validation_loss(self) -> float:
        """Nats a byte, in float32, of windows spread over the validation text."""
        content, T = load_bytes("validation"), self.recipe.config.context_length
        first = np.arange(N_VALIDATION) * ((len(content) - T - 1) // N_VALIDATION)
        windows = torch.from_numpy(content[first[:, None] + np.arange(T + 1)].astype(np.int64))  # (N, T + 1)
        batches = [(rows[:, :-1], rows[:, 1:]) for rows in windows.split(32)]
        return train.evaluate(self.model, batches, language.cross_entropy)


def main(n_seeds: int = 1) -> None:
    """Print the ablation."""
    print(f"{FULL_STEPS} steps of {BATCH_SIZE} x {SIZE['context_length']} bytes, {n_seeds} seed(s)")
    print(f"{'recipe':26} {'nats a byte':>12} {'s':>7}")
    for name, recipe in {"full": FULL, **{f"  without {part}": other for part, other in without().items()}}.items():
        runs = [Run(recipe, FULL_STEPS, seed) for seed in range(n_seeds)]
        for run in runs:
            run.train(FULL_STEPS)
        loss, seconds = (statistics.mean(values) for values in zip(*((run.validation_loss(), run.seconds) for run in runs)))
        print(f"{name:26} {loss:12.4f} {seconds:7.1f}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
