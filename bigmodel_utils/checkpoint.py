"""Checkpoints without pickles: one safetensors file with the tensors, and all else as JSON in its header.

A pickle can run any program when it is loaded; a safetensors file is numbers and their names, nothing else.
`save_tree` and `load_tree` are the format; `save` and `load` put a model into it, `Folder` a run that may be killed.
"""

from __future__ import annotations

import hashlib
import json
import pickletools
import re
import warnings
from collections import deque
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bigmodel_utils import results

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

VERSION = 1  # of the tree's JSON; the checksum is the same in every version, so that damage is never taken for a new version
PREFIX = b'{"__metadata__":{"sha256":"'  # every file's header begins so, after its length in 8 bytes
DIGITS = slice(8 + len(PREFIX), 8 + len(PREFIX) + 64)  # the checksum of all bytes but these
MAX_HEADER_BYTES = 100_000_000  # a longer one the safetensors library refuses to read
PICKLE_STARTS = (  # torch.save's zip, pickles of protocols 2 to 5, and the old torch.save's magic number in protocols 0 and 1
    *(b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    b"L119547037146038801333356L",
)
OBJECT_STORES = {"memory", "s3", "gs", "abfs", "oci", "oss", "hf"}  # fsspec's names; a put there is all or nothing
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(Exception):
    """A checkpoint cannot be read; the message names the file, the cause and the way out."""


class _DamagedError(CheckpointError):
    """Not all of the file is there as it was written."""


@dataclass
class Checkpoint:
    """What a file held: the model's tensors by name, the step, and the caller's own values."""

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
    """Write a checkpoint of a model: all of it, or nothing and whatever was there before.

    Args:
        path: a local path, or an fsspec URL such as "s3://bucket/model.safetensors" or "memory://model.safetensors".
        model: its `state_dict` is saved, as tensors named "model.<name>".
        optimizer: its state is saved too, so that training can go on.
        step: training steps done.
        extra: anything that `save_tree` takes: the configuration, the data's mean and scale.

    Raises:
        TypeError, ValueError, OSError: as `save_tree`.
    """
    tree = {"model": model.state_dict(), "step": step, "extra": extra or {}}
    if optimizer is not None:
        tree["optimizer"] = optimizer.state_dict()
    save_tree(path, tree)


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
    tree = load_tree(path, device)
    if not isinstance(tree, dict) or not tree.keys() >= {"model", "step", "extra"}:
        raise CheckpointError(f"{path} was not written by checkpoint.save: read it with checkpoint.load_tree")
    if optimizer is not None and "optimizer" not in tree:
        raise CheckpointError(f"{path} holds no optimiser state: load it without an optimizer, or save it with one")
    if model is not None:
        _load_model(path, model, tree["model"])
    if optimizer is not None:
        try:
            optimizer.load_state_dict(tree["optimizer"])
        except ValueError as error:
            raise CheckpointError(f"{path} holds another optimiser's state ({error}): build the one that was saved") from None
    return Checkpoint(tree["model"], tree["step"], tree["extra"])


def save_tree(path: str | Path, tree: Any) -> None:
    """Write nested values: all of them, or nothing and whatever was there before.

    Args:
        path: a local path or an fsspec URL.
        tree: any nesting of dicts (keys: strings, integers), lists, tuples, tensors, strings, numbers, booleans and None;
            numbers may be infinite or NaN. Tensors that share memory are written, and come back, one by one.

    Raises:
        TypeError: for a value or key of another kind, with its place in the tree.
        ValueError: where all that is not a tensor takes more than 100 MB.
        OSError: a full or read-only disk.
    """
    _write(path, _snapshot(tree))


def load_tree(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Read what `save_tree` wrote, bit for bit; the tensors go to `device`.

    Raises:
        CheckpointError: missing, truncated, damaged, a pickle, or of a newer version.
    """
    content = _read(path)
    if _is_pickle(content):
        raise CheckpointError(
            f"{path} is a pickle (torch.save), and loading a pickle can run any program that its author put in: it is refused. "
            "Ask for safetensors; for a file you made yourself, torch.load(path, weights_only=True) reads the tensors."
        )
    try:
        tensors = safetensors.torch.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        version, text, sha256 = int(metadata["version"]), metadata["tree"], metadata["sha256"].encode()
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(
            f"{path} is truncated, damaged or not one of this course's checkpoints ({error}): use another copy"
        ) from None
    if sha256 != _checksum(content):
        raise _DamagedError(f"{path} is damaged: its content does not match the checksum saved with it; use another copy")
    if version > VERSION:
        raise CheckpointError(f"{path} has format version {version}, this package reads up to {VERSION}: update the package")
    return _unpack(json.loads(text), {name: value.to(device) for name, value in tensors.items()})


class Folder:
    """The checkpoints of one run, <path>/step-0000000100.safetensors and so on, which a kill at any moment leaves usable.

    One process writes, any may read. One write goes on at a time: a `save` that comes before the last one is done waits
    for it. So no step that was asked for is left out, at most one copy of the state is in memory, and when `save`
    returns, the checkpoint before is safe. As a context manager it waits at the end.

    Args:
        path: a local folder or an fsspec URL; made by the first `save`.
        keep: so many are kept. The oldest go once a new one is safely there; those of steps after it are let alone.
        asynchronous: copy the tensors and write them in the background; False writes before `save` returns.

    Raises:
        ValueError: for a keep below 1.
    """

    def __init__(self, path: str | Path, keep: int = 3, asynchronous: bool = True):
        if keep < 1:
            raise ValueError(f"keep must be 1 or more, got {keep}")
        self.path, self.keep, self.asynchronous = str(path).rstrip("/"), keep, asynchronous
        self._writer, self._writing = futures.ThreadPoolExecutor(1, "checkpoint"), None

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def save(self, tree: Any, step: int) -> None:
        """Take a copy of the tree, which may change from here on, and write it.

        Raises:
            ValueError: for a negative step, or as `save_tree`.
            TypeError: as `save_tree`.
            OSError: where this write (if synchronous) or the one before failed.
        """
        if step < 0:
            raise ValueError(f"step counts from 0, got {step}")
        self.wait()
        self._writing = self._writer.submit(self._write_and_prune, _snapshot(tree), step)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when what was saved is safely there.

        Raises:
            OSError: where the write failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def latest(self, device: str | torch.device = "cpu") -> tuple[int, Any] | None:
        """(step, tree) of the newest checkpoint that is whole, or None; a newer one that is damaged is named in a warning.

        Raises:
            CheckpointError: where the newest cannot be read for another reason: no permission, a newer version.
        """
        self.wait()
        for step, name in sorted(self._list(r"step-(\d+)\.safetensors"), reverse=True):
            try:
                return step, load_tree(f"{self.path}/{name}", device)
            except _DamagedError as error:
                warnings.warn(f"skipped: {error}", stacklevel=2)
        return None

    def _write_and_prune(self, content: memoryview, step: int) -> None:
        self._remove(self._list(r"\.step-(\d+)\.safetensors.*\.part"))  # of a process that was killed
        _write(f"{self.path}/step-{step:010}.safetensors", content)
        self._remove(sorted(found for found in self._list(r"step-(\d+)\.safetensors") if found[0] <= step)[: -self.keep])

    def _list(self, pattern: str) -> list[tuple[int, str]]:
        """(step, name) of each file whose name is of the pattern."""
        filesystem, folder = _filesystem(self.path)
        filesystem.invalidate_cache()
        try:
            names = [PurePosixPath(path).name for path in filesystem.ls(folder, detail=False)]
        except FileNotFoundError:
            return []
        return [(int(match[1]), name) for name in names if (match := re.fullmatch(pattern, name))]

    def _remove(self, found: list[tuple[int, str]]) -> None:
        filesystem, folder = _filesystem(self.path)
        for _, name in found:
            filesystem.rm_file(f"{folder}/{name}")


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


def _snapshot(tree: Any) -> memoryview:
    """The file of a tree, its checksum not filled in: from here on the tree may change."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(tree, "", tensors))
    header: dict[str, Any] = {"__metadata__": {"sha256": "0" * 64, "version": str(VERSION), "tree": text}}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # so that each begins aligned
    end = 0
    for name, value in tensors.items():
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > MAX_HEADER_BYTES:
        raise ValueError(
            f"all that is not a tensor takes {len(head)} bytes, over {MAX_HEADER_BYTES}: put long lists into tensors"
        )
    first = 8 + len(head)
    content = memoryview(torch.empty(first + end, dtype=torch.uint8).numpy())  # bytearray would fill it with 0 first
    content[:first] = len(head).to_bytes(8, "little") + head
    for name, value in tensors.items():
        if value.numel():
            begin = first + header[name]["data_offsets"][0]
            target = torch.frombuffer(content, dtype=value.dtype, count=value.numel(), offset=begin)
            target.view(value.shape).copy_(value.detach())
    return content


def _pack(node: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a tree; its tensors are put into `tensors`, named by their place in the tree."""
    if isinstance(node, Tensor):
        if node.dtype not in DTYPES or node.layout != torch.strided or node.is_meta:
            raise TypeError(f"{place} is a {node.layout} tensor of {node.dtype} on {node.device}: safetensors holds none such")
        while place in tensors or place == "__metadata__":  # {"a.b": x, "a": {"b": y}}; and a word that the format keeps
            place += "_"
        tensors[place] = node
        return {"tensor": place}
    if isinstance(node, dict):
        for key in node:
            if not isinstance(key, str | int):
                raise TypeError(f"{place or 'the tree'} has the key {key!r}: keys are strings or integers")
        return {"dict": [[key, _pack(value, _below(place, key), tensors)] for key, value in node.items()]}
    if isinstance(node, tuple):
        return {"tuple": _pack(list(node), place, tensors)}
    if isinstance(node, list):
        return [_pack(value, _below(place, index), tensors) for index, value in enumerate(node)]
    if node is None or isinstance(node, str | int | float):
        return node
    raise TypeError(f"{place or 'the tree'} is of type {type(node).__name__}: a checkpoint holds tensors and JSON values")


def _below(place: str, key: str | int) -> str:
    return f"{place}.{key}" if place else str(key)


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "tuple":
        return tuple(_unpack(value, tensors))
    return {key: _unpack(item, tensors) for key, item in value}


def _checksum(content: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(content[: DIGITS.start])
    digest.update(memoryview(content)[DIGITS.stop :])
    return digest.hexdigest().encode()


def _is_pickle(content: bytes) -> bool:
    """By its first bytes; protocols 0 and 1 have none of their own: by whether it reads as one to its end. Nothing is run."""
    if content[4:9] == b"\0\0\0\0{":  # a safetensors file, whatever its length begins with: 640 is 80 02 in bytes
        return False
    if content.startswith(PICKLE_STARTS):
        return True
    try:
        ((_, _, position),) = deque(pickletools.genops(content), maxlen=1)
    except ValueError:
        return False
    return position == len(content) - 1


def _filesystem(path: str | Path) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and what the path is called there."""
    import fsspec

    return fsspec.core.url_to_fs(str(path))


def _read(path: str | Path) -> bytes:
    filesystem, name = _filesystem(path)
    try:
        return filesystem.cat_file(name)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: check the path, or train the model that it should hold") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}): check the path and its permissions"
        ) from None


def _write(path: str | Path, content: memoryview) -> None:
    """Fill in the checksum and write the whole file or nothing."""
    content[DIGITS] = _checksum(content)
    filesystem, name = _filesystem(path)
    protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
    if "file" in protocols:
        results.write_atomically(Path(name), content)
    elif protocols & OBJECT_STORES:
        filesystem.pipe_file(name, bytes(content))
    else:
        folder, _, last = name.rpartition("/")
        filesystem.makedirs(folder, exist_ok=True)
        filesystem.pipe_file(f"{folder}/.{last}.part", bytes(content))
        filesystem.mv(f"{folder}/.{last}.part", name)
