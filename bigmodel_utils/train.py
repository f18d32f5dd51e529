"""Training: one visible loop that does not fail quietly, and the evaluation that goes with it."""

from __future__ import annotations

import copy
import math
import os
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bigmodel_utils import checkpoint, data
from bigmodel_utils import device as devices
from bigmodel_utils.data import Tensors
from bigmodel_utils.models import MLP, MLPConfig

if TYPE_CHECKING:
    import pandas as pd

Batch = tuple[Tensors, Tensors]  # inputs and targets: each a tensor, or a tuple of tensors, with the batch first
LossFunction = Callable[[Any, Any], Tensor]  # (prediction, target) -> mean loss over the batch, a scalar

SPIKE_WINDOW = 100  # steps whose losses say what is usual
SNAPSHOT_EVERY = 50  # steps between the copies in memory that a roll-back goes back to
CHECK_EVERY = 20  # steps between looks at the loss on an accelerator, where each look waits for the device


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, in which precision, and what to do when something goes wrong.

    Raises:
        ValueError: for a count below 1, or an unknown precision.
    """

    n_epochs: int = 20  # passes over the batches
    patience: int | None = None  # evaluations without a better validation loss before it stops; None never stops
    max_steps: int | None = None  # optimiser steps after which training ends, if the epochs have not ended before
    eval_every: int | None = None  # steps between evaluations; None evaluates at the end of each epoch
    max_grad_norm: float | None = None  # clip the gradient's norm to this; None does not clip
    micro_batch_size: int | None = None  # rows computed at a time, gradients added up; None: the whole batch
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of products (autocast); weights stay as they are
    spike_sigmas: float | None = None  # a loss that many robust deviations above the usual is a spike; None looks for none
    n_rollbacks: int = 0  # how often a bad loss may be answered by going back; beyond that training stops
    checkpoint_every: int | None = None  # steps between checkpoints, where there is a folder for them; None: evaluations
    flops_per_row: float | None = None  # forward and backward; with it the history has FLOP/s
    progress: bool | None = None  # show a bar; None: in terminals and notebooks, not in CI, builds and tests
    log_folder: str | Path | None = None  # TensorBoard's event files go there

    def __post_init__(self):
        for name in ("n_epochs", "max_steps", "patience", "eval_every", "micro_batch_size", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.precision not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"precision must be float32, bfloat16 or float16, got {self.precision!r}")


@dataclass(frozen=True)
class Record:
    """What was known at one evaluation."""

    epoch: int  # counted from 1
    step: int  # optimiser steps done
    train_loss: float  # mean over the rows since the record before, in training mode
    validation_loss: float | None  # None without validation batches
    learning_rate: float
    grad_norm: float | None  # of the last step, before clipping; None where nothing is clipped
    n_samples: int  # rows trained on since the beginning, repeats counted
    seconds: float  # wall-clock time of the training steps since the beginning, without evaluation
    samples_per_s: float  # since the record before
    flops_per_s: float | None  # likewise; None without `flops_per_row`


@dataclass
class History:
    """What happened: one record an evaluation, and a sentence for each thing that went wrong."""

    records: list[Record] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    best: int | None = None  # the record whose weights the model was left with
    stopped_early: bool = False

    @property
    def train_loss(self) -> list[float]:
        return [record.train_loss for record in self.records]

    @property
    def validation_loss(self) -> list[float]:
        return [record.validation_loss for record in self.records if record.validation_loss is not None]

    @property
    def seconds(self) -> float:
        return self.records[-1].seconds if self.records else 0.0

    @property
    def n_samples(self) -> int:
        return self.records[-1].n_samples if self.records else 0

    @property
    def best_epoch(self) -> int | None:
        return None if self.best is None else self.records[self.best].epoch

    def table(self) -> pd.DataFrame:
        """One row a record, one column a field."""
        import pandas as pd

        return pd.DataFrame([asdict(record) for record in self.records], columns=list(Record.__dataclass_fields__))


class TrainingError(Exception):
    """Training cannot go on; the message says at which step and why."""


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFunction,
    config: TrainConfig,
    *,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None = None,
    validation: Iterable[Batch] | None = None,
    checkpoints: checkpoint.Folder | None = None,
) -> History:
    """Train `model` in place; with `validation`, leave it with the weights of its best evaluation.

    Args:
        model: trained where it is, on the device of its parameters; called as `model(*x)` where x is a tuple.
        batches: passes over the training data; iterated once an epoch.
        loss_fn: mean loss of a batch.
        config: how long, and what to do when something goes wrong.
        optimizer: over the model's parameters.
        scheduler: stepped after every batch.
        validation: evaluated at the end of every epoch, or every `config.eval_every` steps.
        checkpoints: where the run is saved, and from where it goes on if it was stopped: with the same arguments the
            result is the same, bit for bit, as that of a run that was never stopped (on as many threads: their number
            changes the order of sums). `batches` then needs `state_dict` and `load_state_dict`, as `data.Batches` has them.

    Returns:
        the history, one record an evaluation.

    Raises:
        TrainingError: where a loss is not finite or a spike, and no roll-back is left, with the step and the batch.
            Where the loss is looked at in every step (on the CPU) the model is left as the last good step made it.
        CheckpointError: where the newest checkpoint is of another architecture.
    """
    run = _Run(model, optimizer, scheduler, batches, config)
    if checkpoints is not None:
        run.resume(checkpoints)
    with _progress_bar(config, batches, run.step) as bar, _event_log(config) as run.log, checkpoints or nullcontext():
        while not run.is_over:
            for x, y in batches:
                optimizer.zero_grad(set_to_none=True)
                loss = run.backward(x, y, loss_fn)
                run.scaler.unscale_(optimizer)
                if config.max_grad_norm is not None:
                    run.grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                if run.is_bad(loss, data.n_rows(y)):
                    continue
                run.scaler.step(optimizer)
                run.scaler.update()
                if scheduler is not None:
                    scheduler.step()
                devices.end_step(run.device)
                run.step += 1
                bar.update()
                if config.eval_every and run.step % config.eval_every == 0:
                    run.evaluate(loss_fn, validation)
                run.save_if_due(checkpoints)
                if run.is_over:
                    break
            else:
                run.end_epoch(loss_fn, validation)
                run.save_if_due(checkpoints)
        run.finish(loss_fn, validation, checkpoints)
    return run.history


class _Run:
    """What changes while `fit` runs: where it is, what it has seen, and the weights that it would go back to."""

    def __init__(self, model, optimizer, scheduler, batches, config: TrainConfig):
        self.model, self.optimizer, self.scheduler, self.batches, self.config = model, optimizer, scheduler, batches, config
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.check_every = 1 if self.device.type == "cpu" else CHECK_EVERY
        self.epoch, self.batch, self.step = 1, 0, 0  # the epoch under way, batches seen of it, and optimiser steps done
        self.micro_batch_size, self.n_rolled_back = config.micro_batch_size, 0
        self.loss_sum, self.n_rows, self.seconds = 0.0, 0, 0.0  # since the last record, and since the beginning
        self.pending: list[tuple[str, int, Tensor]] = []  # place, rows and loss of the steps that are not looked at yet
        self.recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.history, self.grad_norm, self.saved_step = History(), None, -1
        self.best_weights, self.snapshot, self.log = None, None, None
        self.clock = time.perf_counter()
        model.train()

    @property
    def is_over(self) -> bool:
        enough_steps = self.config.max_steps is not None and self.step >= self.config.max_steps
        return self.epoch > self.config.n_epochs or enough_steps or self.history.stopped_early

    def backward(self, x: Tensors, y: Tensors, loss_fn: LossFunction) -> Tensor:
        """Add up the gradient of the batch's mean loss and return that loss; with less at a time where memory is short."""
        while True:
            try:
                return self._accumulate(x, y, loss_fn)
            except RuntimeError as error:
                if not devices.is_out_of_memory(error):
                    raise
            self._halve(data.n_rows(y))  # out here: the error holds the memory of the step that failed

    def _accumulate(self, x: Tensors, y: Tensors, loss_fn: LossFunction) -> Tensor:
        n_rows = data.n_rows(y)
        size, total = self.micro_batch_size or n_rows, 0
        for first in range(0, n_rows, size):
            x_part, y_part = (
                _part(x, slice(first, first + size), self.device),
                _part(y, slice(first, first + size), self.device),
            )
            with devices.autocast(self.device, self.config.precision):
                loss = loss_fn(_call(self.model, x_part), y_part) * (data.n_rows(y_part) / n_rows)
            self.scaler.scale(loss).backward()
            total = total + loss.detach()
        return total

    def _halve(self, n_rows: int) -> None:
        size = min(self.micro_batch_size or n_rows, n_rows)
        if size == 1:
            raise TrainingError(
                f"step {self.step + 1}: out of memory with one row at a time: make the model or its input smaller"
            )
        self.micro_batch_size = -(-size // 2)
        self.optimizer.zero_grad(set_to_none=True)
        self._tell(
            f"step {self.step + 1}: out of memory with {size} rows at a time; "
            f"now {self.micro_batch_size}, their gradients added up to the same batch of {n_rows}"
        )

    def is_bad(self, loss: Tensor, n_rows: int) -> bool:
        """Look at the losses when it is time; True where one was bad and the run went back: this step is then void."""
        self.batch += 1
        self.pending.append((f"step {self.step + 1} (epoch {self.epoch}, batch {self.batch})", n_rows, loss))
        copy_now = self.config.n_rollbacks > 0 and (
            self.snapshot is None or self.step >= self.snapshot["step"] + SNAPSHOT_EVERY
        )
        if (copy_now or len(self.pending) >= self.check_every) and self._look():
            return True
        if copy_now:  # weights that have just given a good loss
            self.snapshot = copy.deepcopy(self._training_state())
        return False

    def _look(self) -> bool:
        pending, self.pending = self.pending, []
        losses = torch.stack([loss for _, _, loss in pending]).tolist() if pending else []  # one wait for all
        for (place, n_rows, _), loss in zip(pending, losses):
            reason = self._complaint(loss)
            if reason is not None:
                self._roll_back(f"{place}: {reason}")
                return True
            self.recent.append(loss)
            self.loss_sum += loss * n_rows
            self.n_rows += n_rows
        return False

    def _complaint(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.config.spike_sigmas is None or len(self.recent) < SPIKE_WINDOW // 5:
            return None
        usual = statistics.median(self.recent)
        deviation = 1.4826 * statistics.median(abs(value - usual) for value in self.recent)  # sigma, were they normal
        if loss <= usual + self.config.spike_sigmas * deviation:
            return None
        return f"the loss is {loss:.4g}, usual were {usual:.4g} with a deviation of {deviation:.2g}"

    def _roll_back(self, what: str) -> None:
        self.n_rolled_back += 1
        if self.snapshot is None or self.n_rolled_back > self.config.n_rollbacks:
            raise TrainingError(f"{what}. Check the data for NaN, lower the learning rate or clip the gradient")
        self._restore(copy.deepcopy(self.snapshot))
        self._tell(f"{what}; went back to step {self.step}, and the batches since then are not repeated")

    def _tell(self, event: str) -> None:
        self.history.events.append(event)
        warnings.warn(event, stacklevel=4)

    def end_epoch(self, loss_fn: LossFunction, validation: Iterable[Batch] | None) -> None:
        if self.batch == 0 and self.step == 0:
            raise ValueError("nothing to train on: the batches are empty")
        if not self.config.eval_every:
            self.evaluate(loss_fn, validation)
        self.epoch, self.batch = self.epoch + 1, 0

    def evaluate(self, loss_fn: LossFunction, validation: Iterable[Batch] | None) -> None:
        """Write a record, keep the weights if they are the best so far, and see whether it is time to stop."""
        self._look()
        if self.n_rows == 0:
            return
        devices.synchronize(self.device)
        self.seconds += time.perf_counter() - self.clock
        loss = None if validation is None else evaluate(self.model, validation, loss_fn, self.config.precision)
        self.history.records.append(self._record(loss))
        if self.log is not None:
            _write_scalars(self.log, self.history.records[-1])
        best, n_records = self.history.best, len(self.history.records)
        if loss is not None and loss < (math.inf if best is None else self.history.records[best].validation_loss):
            self.history.best, self.best_weights = n_records - 1, copy.deepcopy(self.model.state_dict())
        elif loss is not None and self.config.patience is not None:
            self.history.stopped_early = n_records - (0 if best is None else best + 1) >= self.config.patience
        self.loss_sum, self.n_rows, self.clock = 0.0, 0, time.perf_counter()

    def _record(self, validation_loss: float | None) -> Record:
        samples_per_s = self.n_rows / (self.seconds - self.history.seconds)
        flops_per_row = self.config.flops_per_row
        return Record(
            self.epoch,
            self.step,
            self.loss_sum / self.n_rows,
            validation_loss,
            float(self.optimizer.param_groups[0]["lr"]),
            None if self.grad_norm is None else float(self.grad_norm),
            self.history.n_samples + self.n_rows,
            self.seconds,
            samples_per_s,
            None if flops_per_row is None else flops_per_row * samples_per_s,
        )

    def finish(self, loss_fn: LossFunction, validation: Iterable[Batch] | None, checkpoints: checkpoint.Folder | None) -> None:
        """The record of what came after the last one, the last checkpoint, and the best weights into the model."""
        self.evaluate(loss_fn, validation)
        if checkpoints is not None and self.step != self.saved_step:
            self._save(checkpoints)
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)

    def save_if_due(self, checkpoints: checkpoint.Folder | None) -> None:
        if checkpoints is None or self.step == self.saved_step:
            return
        every, has_just_evaluated = self.config.checkpoint_every, self.n_rows == 0 and not self.pending
        if self.step % every == 0 if every else has_just_evaluated:
            self._save(checkpoints)

    def _save(self, checkpoints: checkpoint.Folder) -> None:
        self._look()
        progress = {name: getattr(self, name) for name in _PROGRESS}
        state = {"training": self._training_state(), "progress": progress, "recent": list(self.recent)}
        state |= {"batches": self.batches.state_dict(), "random": devices.random_state(self.device)}
        state |= {"history": asdict(self.history), "best_weights": self.best_weights}
        checkpoints.save(state, self.step)
        self.saved_step = self.step

    def resume(self, checkpoints: checkpoint.Folder) -> None:
        """Go on where the newest checkpoint was written, if there is one."""
        if not hasattr(self.batches, "state_dict"):
            raise ValueError("a run with checkpoints needs batches that have state_dict and load_state_dict, as data.Batches")
        found = checkpoints.latest()
        if found is None:
            return
        self.saved_step, state = found
        wrong = checkpoint.mismatches(self.model, state["training"]["model"])
        if wrong:
            raise checkpoint.CheckpointError(
                f"{checkpoints.path} holds a run of another architecture: {wrong}. Use a new folder"
            )
        self._restore(state["training"])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        self.recent.extend(state["recent"])
        self.batches.load_state_dict(state["batches"])
        records = [Record(**record) for record in state["history"].pop("records")]
        self.history, self.best_weights = History(records, **state["history"]), state["best_weights"]
        devices.set_random_state(state["random"], self.device)

    def _training_state(self) -> dict[str, Any]:
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scheduler": scheduler}
        return states | {"scaler": self.scaler.state_dict(), "step": self.step}

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


_PROGRESS = ("epoch", "batch", "micro_batch_size", "n_rolled_back", "loss_sum", "n_rows", "seconds")


def _part(values: Tensors, rows: slice, device: torch.device) -> Tensors:
    return data.each(lambda tensor: tensor[rows].to(device), values)


def _call(model: nn.Module, x: Tensors) -> Any:
    return model(*x) if isinstance(x, tuple) else model(x)


@contextmanager
def _progress_bar(config: TrainConfig, batches: Iterable[Batch], step: int) -> Iterator[Any]:
    """A bar over the steps; it removes itself at the end."""
    from tqdm.auto import tqdm

    n_steps = len(batches) * config.n_epochs if isinstance(batches, Sized) else math.inf
    total = min(n_steps, config.max_steps or math.inf)
    show = _is_watched() if config.progress is None else config.progress
    with tqdm(total=total, initial=step, disable=not show, leave=False, unit="step") as bar:
        yield bar


def _is_watched() -> bool:
    """Whether somebody sees a progress bar: in a terminal or a notebook, but not in CI or where TQDM_DISABLE is set."""
    if os.environ.get("CI") or os.environ.get("TQDM_DISABLE"):
        return False
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stderr.isatty() or hasattr(shell, "kernel")


@contextmanager
def _event_log(config: TrainConfig) -> Iterator[Any]:
    """A writer of TensorBoard's event files, or None."""
    if config.log_folder is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "log_folder needs TensorBoard: install it with `pip install tensorboard`, or leave log_folder out"
        ) from None
    with SummaryWriter(config.log_folder) as writer:
        yield writer


def _write_scalars(log: Any, record: Record) -> None:
    for name, value in asdict(record).items():
        if value is not None and name != "step":
            log.add_scalar(name, value, record.step)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], loss_fn: LossFunction, precision: str = "float32") -> float:
    """Mean loss over all rows, in evaluation mode (no dropout); the model's mode is put back.

    Args:
        precision: of products, as in `TrainConfig`.

    Raises:
        ValueError: where there are no batches.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    losses, n_rows = [], []
    for x, y in batches:
        with devices.autocast(device, precision):
            losses.append(loss_fn(_call(model, _part(x, slice(None), device)), _part(y, slice(None), device)))
        n_rows.append(data.n_rows(y))
        devices.end_step(device)
    model.train(was_training)
    if not losses:
        raise ValueError("nothing to evaluate: the batches are empty")
    return sum(n * loss for n, loss in zip(n_rows, torch.stack(losses).tolist())) / sum(n_rows)


def r_squared(prediction: Tensor, target: Tensor) -> float:
    """Coefficient of determination: 1 - sum of squared errors over the sum of squares around the target's mean."""
    residual = (target - prediction).double()
    return 1 - float(residual.square().sum() / (target.double() - target.double().mean()).square().sum())


def fit_solubility(
    parts: dict[str, data.Split],
    *,
    config: MLPConfig = MLPConfig(),
    n_epochs: int = 60,
    weight_decay: float = 1e-2,
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[MLP, History, data.Standardizer]:
    """Train the solubility model of chapters 5 and 10: Adam with an L2 penalty, chosen on validation data in chapter 5.

    Features go in as they are (raw Morgan counts); the targets are standardised by the training rows alone.

    Args:
        parts: "train" and "validation" as from `data.prepare_solubility`; "test" is not looked at. Without
            "validation" all epochs are trained and the last weights kept.
        config: widths and dropout; the first width is the number of features.
        n_epochs: the most epochs; training stops after 15 without a better validation loss.
        weight_decay: times the weights, added to the gradient of the mean squared error (the article's lambda, twice:
            its loss is half the mean squared error).
        seed: of the initial weights, the dropout and the batches' order.
        device: where to train; the CPU where it is None.

    Returns:
        the model with the weights of its best epoch, the history (losses in units of the training targets' variance),
        and the targets' standardizer: `targets.inverse(model(x))` is log10 of mol/L.
    """
    targets = data.Standardizer.fit(parts["train"].y)
    scaled = {name: data.Split(part.x, targets(part.y)) for name, part in parts.items() if name != "test"}
    device = device or torch.device("cpu")
    devices.seed_everything(seed)
    model = devices.move(MLP(config), device)
    fused = devices.supports_fused(device)
    history = fit(
        model,
        data.Batches(scaled["train"], batch_size=32, seed=seed),
        nn.functional.mse_loss,
        TrainConfig(n_epochs=n_epochs, patience=15),
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=weight_decay, fused=fused),
        validation=data.Batches(scaled["validation"], 512, shuffle=False) if "validation" in scaled else None,
    )
    return model, history, targets


def save_solubility(path: str | Path, model: MLP, targets: data.Standardizer, radius: int = data.MORGAN_RADIUS) -> None:
    """Write the model of `fit_solubility` with all that prediction needs: configuration, target scale, fingerprint.

    Args:
        path: a local path or an fsspec URL, as for `checkpoint.save`.
        radius: of the Morgan counts that the model was trained on.
    """
    extra = {
        "config": asdict(model.config),
        "target_mean": targets.mean.item(),
        "target_scale": targets.scale.item(),
        "n_features": model.config.widths[0],
        "radius": radius,
    }
    checkpoint.save(path, model, extra=extra)


def load_solubility(path: str | Path, device: str | torch.device = "cpu") -> tuple[MLP, data.Standardizer]:
    """The model and the targets' standardizer that `save_solubility` wrote.

    Raises:
        CheckpointError: for a file that is missing, damaged or another model's.
    """
    extra = checkpoint.load(path).extra
    try:
        config = MLPConfig(tuple(extra["config"]["widths"]), extra["config"]["dropout"])
        targets = data.Standardizer(torch.tensor([extra["target_mean"]]), torch.tensor([extra["target_scale"]]))
    except KeyError as error:
        raise checkpoint.CheckpointError(f"{path} does not hold a solubility model: its header has no {error}") from None
    model = MLP(config).to(device)
    checkpoint.load(path, model)
    return model.eval(), targets
