"""Checkpoints: what goes in comes out bit for bit, and what is wrong is refused in words."""

import errno
import json
import os
import pickle
import subprocess
import uuid

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigmodel_utils import checkpoint, results
from bigmodel_utils.checkpoint import CheckpointError
from bigmodel_utils.models import MLP, MLPConfig

CONFIG = MLPConfig((5, 4, 1))
OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1),
    "adamw-amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
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
        loss = model(torch.randn(8, 5, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rewrite(path, change) -> None:
    """Change the metadata of a safetensors file, and write it back well formed."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    change(metadata)
    path.write_bytes(safetensors.torch.save(safetensors.torch.load(content), metadata))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(name, tmp_path):
    model, optimizer = trained(name)
    checkpoint.save(tmp_path / "m.safetensors", model, optimizer, step=3, extra={"widths": [5, 4, 1], "naïve": True})
    other, other_optimizer = trained(name, n_steps=1, seed=9)
    loaded = checkpoint.load(tmp_path / "m.safetensors", other, other_optimizer)
    assert same(loaded.model_state, model.state_dict()) and same(other.state_dict(), model.state_dict())
    assert (loaded.step, loaded.extra) == (3, {"widths": [5, 4, 1], "naïve": True})
    train_steps(model, optimizer, 5, seed=4)
    train_steps(other, other_optimizer, 5, seed=4)
    assert same(other.state_dict(), model.state_dict())


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 100),
)
def test_every_dtype_and_shape_comes_back(dtype, shape, seed):
    module = nn.Module()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100
    module.register_buffer("values", values.abs().to(dtype))
    address = f"memory://{uuid.uuid4()}.safetensors"
    checkpoint.save(address, module)
    loaded = checkpoint.load(address).model_state["values"]
    assert loaded.dtype == dtype and torch.equal(loaded, module.values)


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


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
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


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, kept):
    path = tmp_path / "m.safetensors"
    checkpoint.save(path, *trained())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=r"m\.safetensors is truncated, damaged"):
        checkpoint.load(path)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_flipped_bit_goes_unseen(draw):
    """Of the whole file: lengths, names, header and numbers."""
    address = "memory://flipped.safetensors"
    model, optimizer = trained()
    checkpoint.save(address, model, optimizer, step=3, extra={"target_mean": -2.7})
    intact, content = checkpoint.load(address), bytearray(checkpoint._read(address))
    bit = draw.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    import fsspec

    with fsspec.open(address, "wb") as file:
        file.write(content)
    try:
        loaded = checkpoint.load(address)
    except CheckpointError as error:
        assert "flipped.safetensors" in str(error)
    else:  # a bit that carries nothing, such as one of the padding's spaces
        assert same(loaded.model_state, intact.model_state) and (loaded.step, loaded.extra) == (intact.step, intact.extra)


def test_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    checkpoint.save(path, *trained())
    rewrite(path, lambda metadata: metadata.update(version="99"))
    with pytest.raises(CheckpointError, match=r"m\.safetensors has format version 99, .*update the package"):
        checkpoint.load(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not one of this course's checkpoints"):
        checkpoint.load(path)
    checkpoint.save(path, MLP(CONFIG))
    rewrite(path, lambda metadata: metadata.pop("sha256"))
    with pytest.raises(CheckpointError, match="not one of this course's checkpoints"):
        checkpoint.load(path)


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


def test_extra_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        checkpoint.save(tmp_path / "m.safetensors", MLP(CONFIG), extra={"x": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


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
