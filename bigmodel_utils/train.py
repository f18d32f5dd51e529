"""Training: one visible loop, and the evaluation that goes with it."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bigmodel_utils import checkpoint, data
from bigmodel_utils.models import MLP, MLPConfig

LossFunction = Callable[[Tensor, Tensor], Tensor]  # (prediction, target) -> mean loss over the batch, a scalar


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and when to stop."""

    n_epochs: int = 20
    patience: int | None = None  # stop after that many epochs without a better validation loss; None never stops
    max_grad_norm: float | None = None  # clip the gradient's norm to this; None does not clip
    progress: bool | None = None  # show a bar; None shows one in a terminal, which leaves no trace in notebooks

    def __post_init__(self):
        if self.n_epochs < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(f"n_epochs and patience must be 1 or more, got {self.n_epochs} and {self.patience}")


@dataclass
class History:
    """What happened, one entry an epoch."""

    train_loss: list[float] = field(default_factory=list)  # mean over the epoch's samples, in training mode
    validation_loss: list[float] = field(default_factory=list)  # empty without validation batches
    seconds: float = 0.0  # wall-clock time of the training steps, without evaluation
    n_samples: int = 0  # samples trained on, repeats counted
    best_epoch: int | None = None  # counted from 1; the weights that the model was left with
    stopped_early: bool = False


class TrainingError(Exception):
    """Training cannot go on; the message says at which step and why."""


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: LossFunction,
    config: TrainConfig,
    *,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None = None,
    validation: Iterable[tuple[Tensor, Tensor]] | None = None,
) -> History:
    """Train `model` in place; with `validation`, leave it with the weights of its best epoch.

    Args:
        model: trained where it is, on the device of its parameters.
        batches: passes over the training data; iterated once an epoch.
        loss_fn: mean loss of a batch.
        config: when to stop.
        optimizer: over the model's parameters.
        scheduler: stepped after every batch.
        validation: evaluated after every epoch.

    Returns:
        the history, one entry an epoch.

    Raises:
        TrainingError: where a loss is not finite, with the epoch and the step; the model is left as the last finite step made it.
    """
    from tqdm import tqdm

    device = next(model.parameters()).device
    history, best_loss, best_weights = History(), math.inf, None
    show = sys.stderr.isatty() if config.progress is None else config.progress
    for epoch in tqdm(range(1, config.n_epochs + 1), disable=not show, leave=False, unit="epoch"):
        begin = time.perf_counter()
        model.train()
        loss_sum, n_samples = torch.zeros((), device=device), 0
        for step, (x, y) in enumerate(batches, start=1):
            x, y = x.to(device), y.to(device)
            loss = loss_fn(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the loss is {loss.item()} in epoch {epoch}, step {step}: check the data for NaN, or lower the learning rate"
                )
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            loss_sum += loss.detach() * len(y)
            n_samples += len(y)
        history.seconds += time.perf_counter() - begin
        history.n_samples += n_samples
        history.train_loss.append(loss_sum.item() / n_samples)
        if validation is None:
            continue
        history.validation_loss.append(evaluate(model, validation, loss_fn))
        if history.validation_loss[-1] < best_loss:
            best_loss, history.best_epoch = history.validation_loss[-1], epoch
            best_weights = copy.deepcopy(model.state_dict())
        elif config.patience is not None and epoch - (history.best_epoch or 0) >= config.patience:
            history.stopped_early = True
            break
    if best_weights is not None:
        model.load_state_dict(best_weights)
    return history


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss_fn: LossFunction) -> float:
    """Mean loss over all samples, in evaluation mode (no dropout); the model's mode is put back.

    Raises:
        ValueError: where there are no batches.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    loss_sum, n_samples = 0.0, 0
    for x, y in batches:
        loss_sum += loss_fn(model(x.to(device)), y.to(device)).item() * len(y)
        n_samples += len(y)
    model.train(was_training)
    if n_samples == 0:
        raise ValueError("nothing to evaluate: the batches are empty")
    return loss_sum / n_samples


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
    torch.manual_seed(seed)
    model = MLP(config).to(device)
    fused = device.type != "xla"  # one kernel for all weights; torch_xla has none
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
