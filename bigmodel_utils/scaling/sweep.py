"""Sweeps: many small training runs, each kept in a file of its own as soon as it is done, on one machine or many.

`run_all` maps a training function over configurations through joblib. A result's file is named by a hash of the configuration
and of the code that trains, so that a sweep that was stopped goes on where it was, one that grew trains only what is new, and one
whose code changed trains anew.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from torch import nn

from bigmodel_utils import data, language, models, results
from bigmodel_utils import device as devices

Result = dict[str, Any]  # JSON values; the run's configuration is added to it


def run_all(
    train: Callable[[Any], Result], runs: Sequence[Any], folder: str | Path, *, n_jobs: int = 2, backend: str | None = None
) -> list[Result]:
    """The result of `train` for each run, from its file where there is one.

    Args:
        train: a function of a module, which workers can import; its result holds JSON values.
        runs: instances of a frozen dataclass, whose fields are all that the result depends on.
        folder: of the results; on a cluster one that all machines see.
        n_jobs: runs at a time.
        backend: None for processes on this machine; "dask" for the cluster of the `dask.distributed.Client` that was made
            before, which runs the tasks of a lost worker again; "ray" likewise, after `ray.util.joblib.register_ray()`.

    Returns:
        one mapping a run, in their order: its fields, and what `train` found.
    """
    folder, code = Path(folder), code_hash(train)
    todo = [joblib.delayed(_keep)(train, run, _path(train, run, folder, code)) for run in runs]
    with joblib.parallel_config(backend=backend) if backend else nullcontext():
        return joblib.Parallel(n_jobs=n_jobs, batch_size=1)(todo)


def code_hash(train: Callable) -> str:
    """A hash of the function and of every file of this package that its module imports, directly or through others."""
    from bigmodel_utils.report import runner

    content = hashlib.sha256(inspect.getsource(train).encode())
    for path in sorted(runner.imported_modules([f"import {train.__module__}"])):
        content.update(hashlib.sha256(path.read_bytes()).digest())
    return content.hexdigest()


def _path(train: Callable, run: Any, folder: Path, code: str) -> Path:
    content = {"function": f"{train.__module__}.{train.__qualname__}", "run": asdict(run), "code": code}
    return folder / f"{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]}.json"


def _keep(train: Callable[[Any], Result], run: Any, path: Path) -> Result:
    """The result from its file, or else from training; a file is whole or absent, whenever the process is killed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not there, or damaged on the disk
        result = asdict(run) | train(run)
        results.write_atomically(path, json.dumps(result).encode())
        return result


# Language models of many sizes.


@dataclass(frozen=True)
class Run:
    """A small GPT that reads characters, and how long it is trained."""

    d_model: int
    n_tokens: int  # trained on, repeats counted
    n_layers: int = 2
    n_unique: int | None = None  # different tokens among them, the first of the text; None: the whole text
    d_head: int = 16
    context_length: int = 64
    batch_size: int = 8  # windows a step
    lr: float = 0.02  # of Muon, for the matrices of the blocks
    adamw_lr: float = 0.01  # for the rest
    seed: int = 0
    device_name: str = "cpu"
    corpus: str = "kjv"
    n_validation: int = 16_384  # tokens of the held-out text

    @property
    def model(self) -> models.GPTConfig:
        """The network; `fast` says what its layout is."""
        return models.GPTConfig.fast(
            vocab_size=len(_characters(self.corpus)),
            context_length=self.context_length,
            n_layers=self.n_layers,
            n_heads=max(1, self.d_model // self.d_head),
            d_model=self.d_model,
        )


@functools.lru_cache(maxsize=2)
def _characters(corpus: str) -> list[str]:
    return sorted(set("".join(language.load_text(corpus).values())))


@functools.lru_cache(maxsize=2)
def load_tokens(corpus: str = "kjv") -> dict[str, np.ndarray]:
    """The parts "train", "validation" and "test" of a text, a number a character: (n,) uint16."""
    numbers = {character: number for number, character in enumerate(_characters(corpus))}
    parts = language.load_text(corpus)
    return {part: np.fromiter(map(numbers.get, text), np.uint16, len(text)) for part, text in parts.items()}


def train_run(run: Run) -> Result:
    """Train one model by `language.train_gpt`, on one thread.

    Returns:
        n_params (all, the embedding once), n_body (without the embedding), n_steps, n_trained (tokens), loss (nats a token of
        the held-out text) and seconds.
    """
    parts, started = load_tokens(run.corpus), time.perf_counter()
    n_steps = max(1, round(run.n_tokens / (run.batch_size * run.context_length)))
    with devices.threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = devices.move(models.GPT(run.model), devices.select(run.device_name))
        settings = {"max_steps": n_steps, "batch_size": run.batch_size, "seed": run.seed}
        language.train_gpt(model, parts["train"][: run.n_unique], **settings, lr=run.lr, adamw_lr=run.adamw_lr)
        loss = language.surprisal(model, parts["validation"][: run.n_validation]).mean()
    n_params = models.count_parameters(model)
    return {
        "n_params": n_params,
        "n_body": n_params - model.token_embedding.weight.numel(),
        "n_steps": n_steps,
        "n_trained": n_steps * run.batch_size * run.context_length,
        "loss": float(loss),
        "seconds": time.perf_counter() - started,
    }


# Learning rates of many widths.


@dataclass(frozen=True)
class WidthRun:
    """A multilayer perceptron on handwritten digits, trained for a few steps of Adam."""

    width: int  # of its three hidden layers
    lr: float
    mup: bool  # the maximal update parametrisation, or PyTorch's own
    seed: int = 0
    base_width: int = 32  # where both are the same
    n_steps: int = 60
    batch_size: int = 64


def mup_groups(model: models.MLP, lr: float, base_width: int) -> list[dict[str, Any]]:
    """Adam's parameter groups in the maximal update parametrisation; scales the model's output weights in place.

    With m = width / base_width: the learning rate of every weight that reads a hidden layer is divided by m, and the output
    weights by sqrt(m), so that one step moves each layer's output by as much at every width.

    Source: Yang et al. 2021, https://arxiv.org/abs/2203.03466, table 3.
    """
    first, *others = [layer for layer in model.layers if isinstance(layer, nn.Linear)]
    m = first.out_features / base_width
    with torch.no_grad():
        others[-1].weight /= m**0.5
    fixed = [first.weight, first.bias, *(layer.bias for layer in others)]
    return [{"params": fixed, "lr": lr}, {"params": [layer.weight for layer in others], "lr": lr / m}]


def train_width_run(run: WidthRun) -> Result:
    """Train one perceptron, on one thread: its loss (nats) on all training digits afterwards, infinite where it diverged."""
    split = data.load_digits()["train"]
    with devices.threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        x, y = split.x.flatten(1), split.y
        model = models.MLP(models.MLPConfig((x.shape[1], run.width, run.width, run.width, 10)))
        groups = mup_groups(model, run.lr, run.base_width) if run.mup else model.parameters()
        optimizer = torch.optim.Adam(groups, lr=run.lr, fused=True)
        for _ in range(run.n_steps):
            rows = torch.randint(len(x), (run.batch_size,))
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(x), y).item()
    return {"loss": loss if np.isfinite(loss) else 1e9}
