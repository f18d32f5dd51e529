"""Checkpoints without pickles: one safetensors file with the weights, the optimiser's state and a JSON header.

A pickle can run any program when it is loaded; a safetensors file is numbers and their names, nothing else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bigmodel_utils import results

VERSION = 1
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save's zip, and raw pickles


class CheckpointError(Exception):
    """A checkpoint cannot be read; the message names the file, the cause and the way out."""


@dataclass
class Checkpoint:
    """What a file held: the tensors by name, the step, and the caller's own JSON."""

    model_state: dict[str, Tensor]
    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


def save(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    step: int = 0,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint: all of it, or nothing and whatever was there before.

    Args:
        path: a local path, or an fsspec URL such as "s3://bucket/model.safetensors" or "memory://model.safetensors".
        model: its `state_dict` is saved.
        optimizer: its state is saved too, so that training can go on.
        step: training steps done.
        extra: anything that JSON holds: the configuration, the data's mean and scale.

    Raises:
        TypeError: where `extra` is not JSON.
        OSError: a full or read-only disk.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    header: dict[str, Any] = {"step": step, "extra": extra or {}}
    if optimizer is not None:
        state = optimizer.state_dict()
        header["param_groups"] = state["param_groups"]
        header["optimizer_numbers"] = {}
        for index, slots in state["state"].items():
            for slot, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{slot}"] = value
                else:
                    header["optimizer_numbers"][f"{index}.{slot}"] = value
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}  # tied ones apart
    text = json.dumps(header)
    metadata = {"version": str(VERSION), "header": text, "sha256": _checksum(tensors, text)}
    content = safetensors.torch.save(tensors, metadata)
    if "://" in str(path):
        import fsspec

        with fsspec.open(str(path), "wb") as file:  # object stores put a whole object or none
            file.write(content)
    else:
        results.write_atomically(Path(path), content)


def load(
    path: str | Path,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Read a checkpoint, and put its state into `model` and `optimizer` where they are given.

    Args:
        path: a local path or an fsspec URL.
        model: of the same configuration as the saved one.
        optimizer: over the parameters of `model`.
        device: where the returned tensors go; those of a given model stay on the model's device.

    Raises:
        CheckpointError: missing, truncated, damaged, a pickle, of a newer version, or of another architecture.
    """
    content = _read(path)
    if content.startswith(PICKLE_STARTS):
        raise CheckpointError(
            f"{path} is a pickle (torch.save), and loading a pickle can run any program that its author put in: it is refused. "
            "Ask for safetensors; for a file you made yourself, torch.load(path, weights_only=True) reads the tensors."
        )
    try:
        tensors = safetensors.torch.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        header, version, sha256 = json.loads(metadata["header"]), int(metadata["version"]), metadata["sha256"]
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or not one of this course's checkpoints ({error}): use another copy"
        ) from None
    if version > VERSION:
        raise CheckpointError(f"{path} has format version {version}, this package reads up to {VERSION}: update the package")
    if sha256 != _checksum(tensors, metadata["header"]):
        raise CheckpointError(f"{path} is damaged: its content does not match the checksum saved with it; use another copy")
    tensors = {name: value.to(device) for name, value in tensors.items()}
    model_state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if model is not None:
        _load_model(path, model, model_state)
    if optimizer is not None:
        if "param_groups" not in header:
            raise CheckpointError(f"{path} holds no optimiser state: load it without an optimizer, or save it with one")
        state = {"param_groups": header["param_groups"], "state": _optimizer_state(tensors, header)}
        try:
            optimizer.load_state_dict(state)
        except ValueError as error:
            raise CheckpointError(f"{path} holds another optimiser's state ({error}): build the one that was saved") from None
    return Checkpoint(model_state, header["step"], header["extra"])


def _read(path: str | Path) -> bytes:
    try:
        if "://" in str(path):
            import fsspec

            with fsspec.open(str(path), "rb") as file:
                return file.read()
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: check the path, or train the model that it should hold") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}): check the path and its permissions"
        ) from None


def mismatches(model: nn.Module, state: dict[str, Tensor]) -> str:
    """What of a state dict does not fit the model, in words: entries missing, unexpected or of another shape; "" if it fits."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{name} is unexpected" for name in found.keys() - expected.keys()]
    shared = expected.keys() & found.keys()
    wrong += [f"{name} is {found[name]}, not {expected[name]}" for name in shared if found[name] != expected[name]]
    more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    return "; ".join(sorted(wrong)[:8]) + more


def _load_model(path: str | Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    wrong = mismatches(model, state)
    if wrong:
        raise CheckpointError(f"{path} is of another architecture: {wrong}. Build the model from the saved configuration")
    model.load_state_dict(state)


def _optimizer_state(tensors: dict[str, Tensor], header: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    slots = {name.removeprefix("optimizer."): value for name, value in tensors.items() if name.startswith("optimizer.")}
    for name, value in (slots | header["optimizer_numbers"]).items():
        index, _, slot = name.partition(".")
        state.setdefault(int(index), {})[slot] = value
    return state


def _checksum(tensors: dict[str, Tensor], header: str) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
