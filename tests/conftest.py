"""What several test files need: the checkout's notebooks, and a small course of two chapters to build and to break."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bigmodel_utils import claims, results
from bigmodel_utils.report import chapters, compose, html, runner

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def code(source: str, *tags: str, **mystnb) -> dict:
    """An unexecuted code cell."""
    metadata = ({"tags": list(tags)} if tags else {}) | ({"mystnb": mystnb} if mystnb else {})
    return {"cell_type": "code", "metadata": metadata, "source": source, "execution_count": None, "outputs": []}


def markdown(source: str) -> dict:
    """A Markdown cell."""
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def write_notebook(path: Path, cells: list[dict], needs: list[str] = ()) -> None:
    """Write cells as a committed notebook in its normal form."""
    cells = [cell | {"id": f"cell-{index}"} for index, cell in enumerate(cells)]
    notebook = {"cells": cells, "metadata": {"bigmodel": {"needs": list(needs)}}, "nbformat": 4, "nbformat_minor": 5}
    path.write_bytes(chapters.dump(chapters.normalize(notebook)))


def chapter_cells(name: str, number: int) -> list[dict]:
    """A chapter with one of everything that the report renders."""
    prose = f"""# {number} A small chapter

The sum is [2](#{name[:2]}-sum), Figure {number}.1 shows it, and equation ({number}.1) defines it.

$$
s = \\sum_{{i=1}}^{{n}} x_i \\tag{{{number}.1}}
$$

<details><summary>Hint</summary>

Add **both** numbers: `1 + 1`.

</details>
"""
    figure = {"figure": {"name": f"fig-{number}-sum", "caption": "The sum."}, "image": {"alt": "a rising line"}}
    return [
        markdown(prose),
        code("pass", "bootstrap"),
        code("seed = 0\nn = 2\nfail_at = 0", "parameters"),
        code(
            f"from bigmodel_utils import claims, notebook, plot, results\nimport matplotlib.pyplot as plt\nimport pandas as pd\ndevice = notebook.start({name!r}, globals())"
        ),
        code("notebook.predict_cost(2, 3e8)"),
        code("assert fail_at != 1, 'asked to fail'"),
        code("_ = plt.plot([0, n])", **figure),
        code("pd.DataFrame({'term': ['first', 'second'], 'value': [1, n - 1]})"),
        code(f'claims.check("{name[:2]}-sum", "One and one is two", 1 + 1, n, 0, "arithmetic")'),
        code("path = results.save({'sum': 2})"),
    ]


SAVE = """import json
from bigmodel_utils import claims, results
hardware = {"processor": "none", "cores": 1, "memory_bytes": 1, "system": "none"}
origin = {"parameters": {"seed": seed}, "date": "2026-01-02T03:04:05+00:00", **results.git_state()}
origin |= {"python": "3", "versions": {}, "hardware": hardware, "device": "cpu"}
origin |= {"seconds": 1.0, "peak_memory_bytes": 1e9, "predicted": None}
claim = {"id": NAME[:2] + "-sum", "statement": "One and one is two", "value": 2 + seed / 10, "reference": 2.0, "tolerance": 0.2}
claim |= {"relation": "==", "source": "arithmetic", "status": "pass"}
record = {"name": NAME, "values": {"sum": 2}, "claims": [claim], "provenance": origin}
record["sha256"] = results._checksum(record)
results.write_atomically(results.output_folder() / "results" / f"{NAME}.json", json.dumps(record).encode())"""


def light_cells(name: str, number: int, fault: str = "pass") -> list[dict]:
    """A chapter that saves fixed results without importing torch: a build of two takes seconds, and every byte is comparable."""
    prose = chapter_cells(name, number)[0]
    prose = prose | {"source": prose["source"].replace(f"Figure {number}.1 shows it, and ", "")}
    parameters = code("seed = 0", "parameters")
    return [prose, code("pass", "bootstrap"), parameters, code(fault), code(SAVE.replace("NAME", repr(name)))]


class Course:
    """A copy of the package and of the report's files with notebooks of its own, driven by its commands."""

    def __init__(self, folder: Path, make_cells: Callable[[str, int], list[dict]] = chapter_cells):
        self.folder = folder
        for name in ("bigmodel_utils", "report"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "constraints.txt", "README.md"):
            shutil.copy(ROOT / name, folder / name)
        (folder / "notebooks").mkdir()
        for path in (folder / "report" / "profiles").glob("*.yaml"):
            path.write_text("description: for tests\ncell_timeout_s: 60\nnotebooks: {}\n")
        self.environment = os.environ | {"PYTHONPATH": str(folder), "MAKEFLAGS": ""}
        self.add("03_first", 3, cells=make_cells("03_first", 3))
        self.add("04_second", 4, needs=["03_first"], cells=make_cells("04_second", 4))

    def add(self, name: str, number: int, needs: list[str] = (), cells: list[dict] | None = None) -> Path:
        """Write a notebook into the course."""
        path = self.folder / "notebooks" / f"{name}.ipynb"
        write_notebook(path, cells or chapter_cells(name, number), needs)
        return path

    def start(self, *arguments: str) -> subprocess.Popen:
        """Begin a command of the report."""
        command = [sys.executable, "-m", "bigmodel_utils.report", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run a command of the report: its exit code and all that it printed."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        return process.returncode, out + err

    def files(self) -> dict[str, bytes]:
        """Every results file, executed notebook and record of the small build."""
        build = self.folder / "build" / "small"
        return {
            str(path): path.read_bytes()
            for part in ("results", "notebooks", "runs")
            for path in (build / part).glob("*")
            if path.is_file()
        }


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small models run fastest on one thread, and several threads on a busy machine wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def transformers():
    """The reference library, the models that are compared imported, without two libraries that it would look into and that
    may not fit this torch."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torchvision", "torchaudio"):
            if name not in sys.modules:
                patch.setitem(sys.modules, name, None)
        library = pytest.importorskip("transformers")
        for name in ("BertModel", "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"):
            getattr(library, name)  # imported only when asked for
    library.logging.set_verbosity_error()
    return library


@torch.no_grad()
def randomize(model: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    """Move every parameter at random: biases of 0 and gains of 1 would hide mistakes."""
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Course:
    """A course that was built once; tests that change it put it back."""
    course = Course(tmp_path_factory.mktemp("built"))
    status, printed = course.run("build")
    assert status == 0, printed
    return course


@pytest.fixture
def course(tmp_path) -> Course:
    """A course that was never built."""
    return Course(tmp_path)


def stored_report(folder: Path, course: list[chapters.Chapter] | None = None) -> tuple[compose.Report, runner.Build]:
    """Chapters (the committed ones), their stored outputs taken for those of a build in `folder`: real pages within seconds."""
    course, build = course or chapters.read_all(), runner.Build(folder)
    for chapter in course:
        build.notebook(chapter.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(chapter.path, build.notebook(chapter.name))
        provenance = {"parameters": chapter.parameters(), "date": "2026-01-01T00:00:00+00:00", "commit": None, "dirty": None}
        provenance |= {"python": "3", "versions": {}, "hardware": results.hardware(), "device": "cpu", "seconds": 1.0}
        provenance |= {"peak_memory_bytes": 1, "predicted": None}
        record = {"values": {}, "claims": list(claims.stored(chapter.notebook).values()), "provenance": provenance}
        record["sha256"] = results._checksum(record)
        results.write_atomically(build.results(chapter.name), json.dumps(record).encode())
    return compose.read("small", course, build), build


@pytest.fixture(scope="session")
def stored_site(tmp_path_factory) -> Path:
    """The HTML site of the committed course with its stored outputs."""
    report, build = stored_report(tmp_path_factory.mktemp("stored"))
    return html.build(report, build).parent


@pytest.fixture(scope="session")
def browser():
    """A real browser: the system's chromium."""
    api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()
