"""Checkpoints: what goes in comes out bit for bit, and what is wrong is refused in words."""

import errno
import hashlib
import json
import os
import pickle
import re
import subprocess
import threading
import uuid
import warnings
from typing import ClassVar

import fsspec
import pytest
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from bigmodel_utils import checkpoint, optim, results
from bigmodel_utils.checkpoint import CheckpointError
from bigmodel_utils.models import MLP, MLPConfig

CONFIG = MLPConfig((5, 4, 1))
OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1),
    "adam-fused": lambda parameters: torch.optim.Adam(parameters, fused=True),
    "adam-tensor-lr": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01)),
    "adamw-amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "groups": lambda parameters: torch.optim.SGD([{"params": [p], "lr": 0.1 / (1 + p.dim())} for p in parameters]),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, max_iter=2, history_size=3),
    **{
        name.lower(): getattr(torch.optim, name)
        for name in ("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop")
    },
    **{f"ours-{name.lower()}": getattr(optim, name) for name in ("SGD", "Momentum", "AdaGrad", "RMSProp", "Adam", "AdamW")},
}
SCHEDULERS = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, optim.warmup(3, optim.cosine(10))),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),  # its worst value is infinite
    "steps": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 7]),  # its milestones are a dict of integers
    "one-cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20),
    "chain": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], [2]
    ),
}


def trained(name: str = "adam", n_steps: int = 3, seed: int = 0) -> tuple[MLP, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = MLP(CONFIG)
    optimizer = OPTIMIZERS[name](model.parameters())
    train_steps(model, optimizer, n_steps, seed)
    return model, optimizer


def train_steps(model, optimizer, n_steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        x = torch.randn(8, 5, generator=generator)

        def gradient(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(gradient)
        else:
            gradient()
            optimizer.step()


def same(one, other) -> bool:
    """Equal in every type, and tensors to the last bit; a NaN is itself, and 0.0 is not -0.0."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and (one.dtype, one.shape, bits(one)) == (other.dtype, other.shape, bits(other))
    if isinstance(one, dict):
        return isinstance(other, dict) and same([*one], [*other]) and same([*one.values()], [*other.values()])
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return isinstance(other, float) and repr(one) == repr(other)
    return type(one) is type(other) and one == other


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(name, tmp_path):
    model, optimizer = trained(name)
    checkpoint.save(tmp_path / "m.safetensors", model, optimizer, step=3, extra={"widths": [5, 4, 1], "naïve": True})
    other, other_optimizer = trained(name, n_steps=1, seed=9)
    loaded = checkpoint.load(tmp_path / "m.safetensors", other, other_optimizer)
    assert same(loaded.model_state, model.state_dict()) and same(other.state_dict(), model.state_dict())
    assert same(other_optimizer.state_dict(), optimizer.state_dict())
    assert (loaded.step, loaded.extra) == (3, {"widths": [5, 4, 1], "naïve": True})
    train_steps(model, optimizer, 5, seed=4)
    train_steps(other, other_optimizer, 5, seed=4)
    assert same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_learning_rates_go_on_bit_for_bit(make, tmp_path):
    def rates(scheduler, n_steps):
        for step in range(n_steps):
            scheduler.optimizer.step()
            scheduler.step(*[0.1 * step] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])
            yield scheduler.optimizer.param_groups[0]["lr"]

    one, other = (make(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)) for _ in range(2))
    assert len(set(rates(one, 4))) > 1 or isinstance(one, lr_scheduler.ReduceLROnPlateau)
    checkpoint.save_tree(tmp_path / "s.safetensors", [one.state_dict(), one.optimizer.state_dict()])
    state, optimizer_state = checkpoint.load_tree(tmp_path / "s.safetensors")
    assert same(state, one.state_dict())
    other.load_state_dict(state)
    other.optimizer.load_state_dict(optimizer_state)
    expected = list(rates(one, 8))
    assert list(rates(other, 8)) == expected and len(set(expected)) > 1


def test_generators_and_the_gradient_scaler_go_on_bit_for_bit(tmp_path):
    generator, scaler = torch.Generator().manual_seed(1), torch.amp.GradScaler("cpu", init_scale=3.0)
    torch.randn(5, generator=generator)
    tree = {"generator": generator.get_state(), "global": torch.get_rng_state(), "scaler": scaler.state_dict()}
    checkpoint.save_tree(tmp_path / "s.safetensors", tree)
    expected = torch.randn(5, generator=generator), torch.randn(5)
    loaded = checkpoint.load_tree(tmp_path / "s.safetensors")
    assert same(loaded, tree)
    generator.set_state(loaded["generator"])
    torch.set_rng_state(loaded["global"])
    assert same((torch.randn(5, generator=generator), torch.randn(5)), expected)


def tensors():
    return st.builds(
        lambda dtype, shape, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100).abs().to(dtype),
        st.sampled_from(list(checkpoint.DTYPES)),
        st.lists(st.integers(0, 4), max_size=3),
        st.integers(0, 100),
    )


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | tensors()
trees = st.recursive(
    values,
    lambda below: (
        st.lists(below, max_size=4)
        | st.lists(below, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["a", "b", "a.b", "1", "__metadata__", "tensor", ""]) | st.integers(0, 3), below)
    ),
)


@settings(deadline=None, max_examples=300)
@given(trees)
def test_every_tree_comes_back(tree):
    """All types, shapes (0-d and empty ones too) and values, names that collide, 1 beside "1", NaN, infinity and -0.0."""
    address = f"memory://{uuid.uuid4()}.safetensors"
    checkpoint.save_tree(address, tree)
    assert same(checkpoint.load_tree(address), tree)


@pytest.mark.parametrize("length", range(400, 700, 8))
def test_the_header_may_have_any_length(length, tmp_path):
    """640 is 80 02 in bytes, as a pickle begins."""
    path = tmp_path / "m.safetensors"
    checkpoint.save_tree(path, "")
    fill = length - int.from_bytes(path.read_bytes()[:8], "little")
    checkpoint.save_tree(path, "x" * fill)
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert checkpoint.load_tree(path) == "x" * fill


def test_other_tools_read_the_tensors_by_their_names(tmp_path):
    model, optimizer = trained()
    checkpoint.save(tmp_path / "m.safetensors", model, optimizer)
    found = safetensors.torch.load_file(tmp_path / "m.safetensors")
    expected = {f"model.{name}": value for name, value in model.state_dict().items()}
    states = optimizer.state_dict()["state"].items()
    expected |= {f"optimizer.state.{i}.{name}": value for i, state in states for name, value in state.items()}
    assert same(dict(sorted(found.items())), dict(sorted(expected.items())))


@pytest.mark.parametrize(
    "value, message",
    [
        (object(), r"run\.1 is of type object: a checkpoint holds tensors and JSON values"),
        ({1.5: 0}, r"run\.1 has the key 1\.5: keys are strings or integers"),
        ({"w": torch.zeros(2).to_sparse()}, r"run\.1\.w is a torch\.sparse_coo tensor"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, r"run\.1\.w is a .* tensor of torch\.complex128"),
        ({"w": torch.zeros(2, device="meta")}, r"run\.1\.w is a .* on meta"),
    ],
)
def test_what_a_tree_cannot_hold_is_refused_with_its_place(tmp_path, value, message):
    with pytest.raises(TypeError, match=message):
        checkpoint.save_tree(tmp_path / "m.safetensors", {"run": [0, value]})
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_begins_at_a_multiple_of_its_element_size(tmp_path):
    """As programs need that map the file into memory."""
    checkpoint.save_tree(tmp_path / "m.safetensors", {str(dtype): torch.ones(3).to(dtype) for dtype in checkpoint.DTYPES})
    content = (tmp_path / "m.safetensors").read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:first])
    del header["__metadata__"]
    for begin, end in (entry["data_offsets"] for entry in header.values()):
        assert (first + begin) % ((end - begin) // 3) == 0


def test_a_header_that_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        checkpoint.save_tree(tmp_path / "m.safetensors", {"\ud800": torch.zeros(1)})
    monkeypatch.setattr(checkpoint, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(ValueError, match="over 1000: put long lists into tensors"):
        checkpoint.save_tree(tmp_path / "m.safetensors", list(range(1000)))
    assert list(tmp_path.iterdir()) == []


def test_special_numbers_and_strided_tensors_come_back(tmp_path):
    module = nn.Module()
    module.register_buffer("special", torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]))
    module.register_buffer("strided", torch.arange(6.0).reshape(2, 3).T)
    checkpoint.save(tmp_path / "m.safetensors", module)
    state = checkpoint.load(tmp_path / "m.safetensors").model_state
    assert state["special"].view(torch.int32).tolist() == module.special.view(torch.int32).tolist()
    assert torch.equal(state["strided"], module.strided)


def test_tied_weights_are_saved_and_stay_tied(tmp_path):
    def tied():
        model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
        model["b"].weight = model["a"].weight
        return model

    model, other = tied(), tied()
    checkpoint.save(tmp_path / "m.safetensors", model)
    checkpoint.load(tmp_path / "m.safetensors", other)
    assert torch.equal(other["a"].weight, model["a"].weight) and other["b"].weight is other["a"].weight


def test_an_object_store_address_works_like_a_path(tmp_path):
    model, optimizer = trained()
    checkpoint.save("memory://bucket/m.safetensors", model, optimizer, step=7)
    checkpoint.save(tmp_path / "m.safetensors", model, optimizer, step=7)
    stored, local = checkpoint.load("memory://bucket/m.safetensors"), checkpoint.load(tmp_path / "m.safetensors")
    assert same(stored.model_state, local.model_state) and stored.step == local.step == 7
    with pytest.raises(CheckpointError, match=r"memory://bucket/nothing\.safetensors does not exist"):
        checkpoint.load("memory://bucket/nothing.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors does not exist: check the path"):
        checkpoint.load(tmp_path / "nothing.safetensors")


def test_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path)


class Bomb:
    """Runs a program when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("write", ["pickle", "torch", "torch-legacy"])
def test_pickles_are_refused_unopened(tmp_path, write, protocol):
    path, crater = tmp_path / "m.pth", tmp_path / "crater"
    if write == "pickle":
        path.write_bytes(pickle.dumps(Bomb(crater), protocol))
    else:
        torch.save(Bomb(crater), path, pickle_protocol=protocol, _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(CheckpointError, match=r"m\.pth is a pickle .*safetensors"):
        checkpoint.load(path)
    assert not crater.exists()


def test_truncated_files_are_refused(tmp_path):
    """At every byte."""
    path = tmp_path / "m.safetensors"
    checkpoint.save_tree(path, {"w": torch.arange(3.0), "step": 3})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"m\.safetensors is truncated, damaged"):
            checkpoint.load_tree(path)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_flipped_bit_goes_unseen(draw):
    """Of the whole file: lengths, names, header and numbers."""
    address = "memory://flipped.safetensors"
    checkpoint.save(address, *trained(), step=3, extra={"target_mean": -2.7})
    content = bytearray(fsspec.filesystem("memory").cat_file(address))
    bit = draw.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    fsspec.filesystem("memory").pipe_file(address, bytes(content))
    with pytest.raises(CheckpointError, match=r"flipped\.safetensors is (truncated, )?damaged"):
        checkpoint.load(address)


def test_the_checksum_is_that_of_all_other_bytes(tmp_path):
    checkpoint.save(tmp_path / "m.safetensors", *trained())
    content = (tmp_path / "m.safetensors").read_bytes()
    match = re.search(rb'(?<="sha256":")[0-9a-f]{64}', content)
    rest = content[: match.start()] + content[match.end() :]
    assert hashlib.sha256(rest).hexdigest() == match[0].decode()


def test_a_newer_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", 99)
        checkpoint.save(path, *trained())
    with pytest.raises(CheckpointError, match=r"m\.safetensors has format version 99, .*update the package"):
        checkpoint.load(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not one of this course's checkpoints"):
        checkpoint.load(path)
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="not one of this course's checkpoints"):
        checkpoint.load(path)


def test_a_tree_without_a_model_is_refused_by_load(tmp_path):
    checkpoint.save_tree(tmp_path / "m.safetensors", {"step": 3})
    with pytest.raises(CheckpointError, match=r"m\.safetensors was not written by checkpoint\.save.*load_tree"):
        checkpoint.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "widths, difference",
    [((5, 3, 1), r"layers\.0\.weight is \(4, 5\), not \(3, 5\)"), ((5, 4, 4, 1), r"layers\.6\.bias is missing")],
)
def test_another_architecture_is_refused_with_the_difference(tmp_path, widths, difference):
    checkpoint.save(tmp_path / "m.safetensors", MLP(CONFIG))
    other = MLP(MLPConfig(widths))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"m\.safetensors is of another architecture: .*{difference}"):
        checkpoint.load(tmp_path / "m.safetensors", other)
    assert same(other.state_dict(), before)


def test_optimisers_that_do_not_fit_are_refused(tmp_path):
    model, optimizer = trained()
    checkpoint.save(tmp_path / "without.safetensors", model)
    with pytest.raises(CheckpointError, match=r"without\.safetensors holds no optimiser state"):
        checkpoint.load(tmp_path / "without.safetensors", optimizer=optimizer)
    checkpoint.save(tmp_path / "m.safetensors", model, optimizer)
    other = torch.optim.Adam(nn.Linear(2, 1, bias=False).parameters())
    with pytest.raises(CheckpointError, match=r"m\.safetensors holds another optimiser's state"):
        checkpoint.load(tmp_path / "m.safetensors", optimizer=other)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    checkpoint.save(path, *trained(seed=0))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, *trained(seed=1))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_leaves_the_old_file(small_disk):
    path = small_disk / "m.safetensors"
    checkpoint.save(path, MLP(MLPConfig((100, 100, 1))))  # about 40 kB
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, MLP(MLPConfig((300, 300, 1))))  # about 360 kB
    assert path.read_bytes() == before
    assert [file.name for file in small_disk.iterdir()] == ["m.safetensors"]


@pytest.fixture(params=["path", "file", "memory", "remote"])
def address(request, tmp_path):
    """An empty folder on each kind of file system."""
    if request.param == "path":
        return str(tmp_path / "run")
    return f"{request.param}://{tmp_path}/run"


class Remote(LocalFileSystem):
    """As fsspec's file systems may be: a put that breaks off leaves half a file, and what is there is asked only once."""

    protocol = "remote"
    breaks = False
    listings: ClassVar[dict] = {}

    def ls(self, path, detail=False, **options):
        if path not in self.listings:
            self.listings[path] = super().ls(path, detail, **options)
        return self.listings[path]

    def invalidate_cache(self, path=None):
        self.listings.clear()

    def pipe_file(self, path, value, **options):
        super().pipe_file(path, value[: len(value) // 2] if self.breaks else value, **options)
        if self.breaks:
            raise OSError(errno.EPIPE, "Broken pipe")


fsspec.register_implementation("remote", Remote, clobber=True)


def names(address: str) -> list[str]:
    filesystem, folder = fsspec.core.url_to_fs(address)
    filesystem.invalidate_cache()
    return sorted(path.rpartition("/")[2] for path in filesystem.ls(folder, detail=False))


def overwrite(address: str, content: bytes) -> None:
    filesystem, path = fsspec.core.url_to_fs(address)
    filesystem.pipe_file(path, content)


def file_of(step: int) -> str:
    return f"step-{step:010}.safetensors"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_folder_keeps_the_newest(address, asynchronous):
    folder = checkpoint.Folder(address, keep=2, asynchronous=asynchronous)
    assert folder.latest() is None
    for step in (0, 5, 10, 9_999):
        folder.save({"w": torch.full((3,), float(step))}, step)
    assert same(folder.latest(), (9_999, {"w": torch.full((3,), 9_999.0)}))
    assert names(address) == [file_of(10), file_of(9_999)]
    assert same(checkpoint.Folder(address).latest(), folder.latest())


def test_a_damaged_checkpoint_is_skipped_by_name(address):
    with checkpoint.Folder(address) as folder:
        for step in (1, 2, 3):
            folder.save(step, step)
    overwrite(f"{address}/{file_of(3)}", b"torn")
    overwrite(f"{address}/{file_of(2)}", b"")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert folder.latest() == (1, 1)
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2 and f"run/{file_of(3)} is truncated, damaged" in told[0] and file_of(2) in told[1]


@pytest.mark.parametrize("keep", [1, 2])
def test_going_on_before_a_damaged_checkpoint_keeps_what_is_whole(tmp_path, keep):
    folder = checkpoint.Folder(tmp_path, keep)
    folder.save(100, 100)
    folder.wait()
    (tmp_path / file_of(100)).write_bytes(b"torn")
    folder.save(90, 90)
    with pytest.warns(UserWarning, match=r"step-0000000100\.safetensors is truncated, damaged"):
        assert folder.latest() == (90, 90)
    folder.save(100, 100)
    assert folder.latest() == (100, 100)


def test_a_checkpoint_that_is_whole_but_cannot_be_read_is_not_skipped(tmp_path, monkeypatch):
    folder = checkpoint.Folder(tmp_path, asynchronous=False)
    folder.save("old", 1)
    monkeypatch.setattr(checkpoint, "VERSION", 99)
    folder.save("new", 2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"step-0000000002\.safetensors has format version 99"):
        folder.latest()
    (tmp_path / file_of(2)).unlink()
    (tmp_path / file_of(2)).mkdir()
    with pytest.raises(CheckpointError, match=r"step-0000000002\.safetensors cannot be read"):
        folder.latest()


class Gate:
    """A disk that does not write before it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.began, write = threading.Event(), threading.Semaphore(0), checkpoint._write

        def slow(path, content):
            self.began.release()
            assert self.opened.wait(timeout=10)
            write(path, content)

        monkeypatch.setattr(checkpoint, "_write", slow)


def test_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    gate, folder, tree = Gate(monkeypatch), checkpoint.Folder(tmp_path), {"w": torch.zeros(3), "losses": [1.0]}
    folder.save(tree, 1)
    assert gate.began.acquire(timeout=10) and not gate.opened.is_set()
    tree["w"] += 1
    tree["losses"].append(2.0)
    gate.opened.set()
    assert same(folder.latest(), (1, {"w": torch.zeros(3), "losses": [1.0]}))


def test_one_write_at_a_time_and_none_left_out(tmp_path, monkeypatch):
    gate, folder = Gate(monkeypatch), checkpoint.Folder(tmp_path)
    folder.save("first", 1)
    second = threading.Thread(target=folder.save, args=("second", 2))
    second.start()
    assert gate.began.acquire(timeout=10)
    second.join(timeout=0.2)
    assert second.is_alive() and not gate.began.acquire(blocking=False)
    gate.opened.set()
    second.join(timeout=10)
    assert (tmp_path / file_of(1)).exists()
    assert folder.latest() == (2, "second") and names(str(tmp_path)) == [file_of(1), file_of(2)]


@pytest.mark.parametrize("meet", ["wait", "save", "latest", "with"])
def test_an_error_in_the_background_is_raised_once_at_the_next_call(tmp_path, monkeypatch, meet):
    folder = checkpoint.Folder(tmp_path)
    folder.save("old", 1)
    folder.wait()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(results.os, "fsync", full)
        if meet == "with":
            with folder:
                folder.save("new", 2)
        else:
            folder.save("new", 2)
            folder.save("newer", 3) if meet == "save" else getattr(folder, meet)()
    folder.wait()
    assert folder.latest() == (1, "old") and names(str(tmp_path)) == [file_of(1)]


def test_a_put_that_breaks_off_leaves_the_old_file_and_is_cleaned_up(tmp_path, monkeypatch):
    address = f"remote://{tmp_path}/run"
    folder = checkpoint.Folder(address, asynchronous=False)
    folder.save("old", 1)
    monkeypatch.setattr(Remote, "breaks", True)
    with pytest.raises(OSError, match="Broken pipe"):
        folder.save("new", 1)
    assert folder.latest() == (1, "old") and names(address) == [f".{file_of(1)}.part", file_of(1)]
    monkeypatch.undo()
    folder.save("newer", 2)
    assert names(address) == [file_of(1), file_of(2)]


def test_only_leftovers_of_checkpoints_are_cleaned_up(tmp_path):
    for name in (f".{file_of(3)}.4711.part", ".notes.4711.part", "step-3.txt", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    folder = checkpoint.Folder(tmp_path, keep=1, asynchronous=False)
    assert folder.latest() is None and len(names(str(tmp_path))) == 4  # one that only reads deletes nothing
    folder.save("whole", 3)
    assert names(str(tmp_path)) == sorted([".notes.4711.part", "step-3.txt", "model.safetensors", file_of(3)])


def test_folders_refuse_senseless_numbers(tmp_path):
    with pytest.raises(ValueError, match="keep must be 1 or more, got 0"):
        checkpoint.Folder(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step counts from 0, got -1"):
        checkpoint.Folder(tmp_path).save({}, -1)
