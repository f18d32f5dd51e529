"""A sweep: many small language models, trained side by side, each finished one kept under the hash of what made it.

The runs go through joblib: to processes of this machine, or to the cluster that `joblib.parallel_config(backend="dask")` or
`"ray"` names. The worker itself writes what it found, so that whatever is killed, the worker or who waits for it, no finished run
is lost; called again, the sweep goes on where it stopped. On a cluster the folder lies where all its machines see it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import joblib
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from bigmodel_utils import data, language, models, optim, results, text, tokens, train
from bigmodel_utils import device as devices
from bigmodel_utils.models import gpt
from bigmodel_utils.scaling import counts, shapes

BASE_WIDTH = 16  # where both parametrisations are one
N_HELD_OUT = 512  # windows of held-out text, evenly spaced, that every run's loss is measured on
CODE = (data, devices, language, models, gpt, optim, text, tokens, train, counts, shapes)  # what `train_run` runs, beside this


@dataclass(frozen=True)
class Run:
    """One language model and its training: everything that its loss depends on, but the text."""

    d_model: int  # a multiple of 8: heads are 8 wide
    n_layers: int
    n_steps: int
    lr: float  # of Adam, highest in the run; under "mup" that of a model of BASE_WIDTH
    batch_size: int = 4  # windows a step
    context_length: int = 64  # tokens a window
    warmup_steps: int | None = None  # None: a twentieth of the steps
    n_unique: int | None = None  # training tokens that there are, the first of the text; None: all
    parametrization: Literal["mup", "standard"] = "mup"
    seed: int = 0  # of weights and order
    device: str = "cpu"

    @property
    def n_tokens(self) -> int:
        """Tokens trained on, repeats counted."""
        return self.n_steps * self.batch_size * self.context_length

    def config(self, vocab_size: int) -> models.GPTConfig:
        """The model's sizes and layout."""
        sizes = {"n_layers": self.n_layers, "d_model": self.d_model, "n_heads": self.d_model // 8}
        return models.GPTConfig.fast(vocab_size=vocab_size, context_length=self.context_length, tied=False, **sizes)


def n_body(config: models.GPTConfig) -> int:
    """Parameters without the embedding and the output layer, as Kaplan et al. 2020 count N."""
    return config.n_parameters - 2 * config.vocab_size * config.d_model


@functools.lru_cache(maxsize=2)
def load_tokens(corpus: str = "kjv") -> tuple[np.ndarray, np.ndarray, int]:
    """Training and held-out tokens, one for each byte, and how many different bytes the text has.

    Raises:
        ValueError, DataError: as `language.load_text`.
    """
    parts = language.load_text(corpus)
    pieces = [np.frombuffer(parts[part].encode(), np.uint8) for part in ("train", "validation")]
    used, numbers = np.unique(np.concatenate(pieces), return_inverse=True)
    return numbers[: len(pieces[0])], numbers[len(pieces[0]) :], len(used)


def parametrize(model: models.GPT, lr: float, kind: str = "mup") -> list[dict]:
    """Draw a model's weights, and return Adam's parameter groups.

    A matrix starts with variance 1 / fan_in, so that what it gives out is as large as what it takes in; the output layer starts
    at 0. Adam moves every weight by about lr a step, all `width` of a row in step with one another, so that what the matrix
    gives out would change in proportion to the width: "mup" divides the rate of matrices and output layer by the width.

    Args:
        model: untied; its attention heads are of one width whatever d_model is.
        lr: of a model of BASE_WIDTH.
        kind: "mup", or "standard" for one rate everywhere.

    Raises:
        ValueError: for another kind, or a tied model.

    Source: Yang et al. 2022, https://arxiv.org/abs/2203.03466, table 3.
    """
    if kind not in ("mup", "standard") or model.config.tied:
        raise ValueError(f'parametrization is "mup" or "standard" and the model untied, got {kind!r} and {model.config}')
    matrices, _ = optim.split_matrices(model)
    for weight in matrices:
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    for block in model.blocks:
        for last in (block.attention.out, block.feed_forward.down):
            nn.init.normal_(last.weight, std=(2 * len(model.blocks) * last.in_features) ** -0.5)
    nn.init.normal_(model.token_embedding.weight)
    nn.init.zeros_(model.head.weight)
    wide = [*matrices, model.head.weight]
    others = [weight for weight in model.parameters() if all(weight is not other for other in wide)]
    factor = BASE_WIDTH / model.config.d_model if kind == "mup" else 1.0
    return [{"params": wide, "lr": lr * factor}, {"params": others, "lr": lr}]


def train_run(run: Run, corpus: str = "kjv") -> dict[str, float]:
    """Train one model on one thread; its held-out loss, and what it cost.

    Returns:
        loss (nats a token; infinite for a run that diverged), n_params (all), n_body (`n_body`), n_tokens, flops (exact), and
        the seconds of training.

    Raises:
        ValueError: for sizes that do not fit; as `tokens.TokenBatches`.
    """
    sequence, held_out, vocab_size = load_tokens(corpus)
    config, device = run.config(vocab_size), devices.select(run.device)
    with devices.threads(1), torch.random.fork_rng():
        torch.manual_seed(run.seed)
        model = devices.move(models.GPT(config), device)
        groups = parametrize(model, run.lr, run.parametrization)
        fused = devices.supports_fused(device)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        warmup_steps = max(1, run.n_steps // 20) if run.warmup_steps is None else run.warmup_steps
        course = optim.warmup(warmup_steps, optim.cosine(run.n_steps))
        batches = tokens.TokenBatches(sequence[: run.n_unique], run.context_length, run.batch_size, seed=run.seed)
        loss, seconds = math.inf, math.nan
        settings = train.TrainConfig(
            n_epochs=-(-run.n_steps // len(batches)), max_steps=run.n_steps, eval_every=run.n_steps, max_grad_norm=1.0
        )
        try:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, course)
            history = train.fit(model, batches, language.cross_entropy, settings, optimizer=optimizer, scheduler=scheduler)
            loss = train.evaluate(model, _held_out_batches(held_out, run.context_length), language.cross_entropy)
            seconds = history.seconds
        except train.TrainingError:  # it diverged, which is a finding
            pass
    counted = {"n_params": config.n_parameters, "n_body": n_body(config), "n_tokens": run.n_tokens}
    return {"loss": loss} | counted | {"flops": counts.train_flops(config, run.n_tokens), "seconds": seconds}


def _held_out_batches(sequence: np.ndarray, context_length: int) -> list[tuple[Tensor, Tensor]]:
    """Windows spread evenly over a text, 64 at a time."""
    n_windows = len(sequence) // (context_length + 1)
    windows = torch.from_numpy(sequence[: n_windows * (context_length + 1)].reshape(n_windows, -1))
    windows = windows[np.linspace(0, n_windows - 1, min(N_HELD_OUT, n_windows)).astype(int)]
    return [(some[:, :-1], some[:, 1:]) for some in windows.split(64)]


# The sweep.


def run_all(
    runs: Sequence[Run],
    folder: str | Path,
    corpus: str = "kjv",
    *,
    n_jobs: int = -1,
    train_one: Callable[[Run, str], dict[str, float]] = train_run,
) -> pd.DataFrame:
    """Train every run that is not in the folder yet, the dearest first; a row each, in the order given.

    Args:
        runs: repeats are trained once.
        folder: of the cache: a file a run, named by the hash of the run, the text, the code and the versions that it
            depends on. Files that are damaged are trained anew, with a warning.
        corpus: as `language.load_text`.
        n_jobs: processes; -1 for as many as there are processors, or cores in the cluster.
        train_one: a function of a module, given a run and the corpus.

    Returns:
        the columns of `Run`, and behind them what `train_one` returned.

    Raises:
        what `train_one` raises, and joblib's TerminatedWorkerError for a killed local process: finished runs are kept.
    """
    depends_on = fingerprint(train_one, corpus)
    paths = {run: Path(folder) / f"{_key(run, depends_on)}.json" for run in runs}
    waiting = [run for run, path in paths.items() if read_entry(path) is None]
    waiting.sort(key=lambda run: -run.n_tokens * run.n_layers * run.d_model**2)
    jobs = (joblib.delayed(_train_and_keep)(train_one, run, corpus, paths[run]) for run in waiting)
    joblib.Parallel(n_jobs=n_jobs, batch_size=1)(jobs)
    return pd.DataFrame([asdict(run) | read_entry(paths[run]) for run in runs])


def _train_and_keep(train_one: Callable[[Run, str], dict[str, float]], run: Run, corpus: str, path: Path) -> None:
    """What a worker does. A cluster may ask for a run a second time, because who had done it is gone."""
    if read_entry(path) is None:
        body = json.dumps({"run": asdict(run), "result": train_one(run, corpus)}, indent=1).encode()
        results.write_atomically(path, _sha256(body).encode() + b"\n" + body)


def read_entry(path: Path) -> dict[str, float] | None:
    """The result in a cache file; None where there is none, or one whose first line is not the hash of the rest (a warning)."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if digest.decode(errors="replace") != _sha256(body):
        warnings.warn(f"{path} is damaged: this run is trained again", stacklevel=2)
        return None
    return json.loads(body)["result"]


def fingerprint(train_one: Callable, corpus: str) -> str:
    """The hash of the text, of the code that trains and of the versions beneath it."""
    sequence, held_out, _ = load_tokens(corpus)
    files = {inspect.getsourcefile(part) for part in (train_one, train_run, *CODE)}
    parts = [Path(file).read_bytes() for file in sorted(files)] + [sequence.tobytes(), held_out.tobytes()]
    parts += [train_one.__qualname__.encode(), torch.__version__.encode(), np.__version__.encode(), platform.machine().encode()]
    return _sha256("".join(map(_sha256, parts)).encode())


def _key(run: Run, depends_on: str) -> str:
    return _sha256(json.dumps([depends_on, asdict(run)], sort_keys=True).encode())[:32]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
