"""The smoke profile of the notebooks that train, unchanged on XLA: every loss of every training is the CPU's."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest

from bigmodel_utils import results
from bigmodel_utils.report import chapters, execute, profiles

pytest.importorskip("torch_xla", reason="torch_xla is not installed here: `make test-xla` has its own environment")

HERE = Path(__file__).resolve().parent
FLOAT32 = 1e-5  # relative, as in test_xla.py
BFLOAT16 = 2.0**-8  # half the distance of two neighbours: what an update rounded otherwise may change in a loss
SMALL = 0.1  # a loss far below 1 is the square of errors that round like larger ones: differences count as of this one


def run(name: str, device_name: str, folder: Path, patch: pytest.MonkeyPatch, before: str) -> list[list[float]]:
    """Execute a notebook at its smoke sizes on that device, a line of Python before it; the losses of each training."""
    course = chapters.read_all()
    profile = profiles.with_overrides(profiles.load("smoke", course), [f"{name}.device_name={device_name}"], course)
    profile = dataclasses.replace(profile, cell_timeout_s=1800)  # XLA compiles a program for each shape of model
    chapter = next(chapter for chapter in course if chapter.name == name)
    cells = chapter.notebook["cells"]
    start = next(index for index, cell in enumerate(cells) if "notebook.start(" in chapters.text(cell))
    source = f"import sys\n\nsys.path.append({str(HERE)!r})\nimport record_losses\n\n"
    source += f"record_losses.into('losses.json')\n{before}"
    record = {"cell_type": "code", "id": "record", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
    notebook = chapter.notebook | {"cells": [*cells[: start + 1], record, *cells[start + 1 :]]}
    path, work = folder / "source" / f"{name}.ipynb", folder / "work"
    results.write_atomically(path, chapters.dump(notebook))
    work.mkdir()
    patch.setenv(results.OUTPUT_VARIABLE, str(work))
    patch.setenv("TQDM_DISABLE", "1")
    try:
        execute.execute(chapters.read(path), profile, work, memory_limit_bytes=float("inf"))
    except SystemExit:
        pytest.fail(f"{name} failed on {device_name}: {json.loads((work / 'status.json').read_text())['error']}")
    assert results.read(work / "results" / f"{name}.json")["provenance"]["device"].partition(":")[0] == device_name
    return json.loads((work / "losses.json").read_text())


@pytest.mark.parametrize(
    ("name", "before", "tolerance"),
    [
        ("05_train_mlp", "", FLOAT32),
        ("06_language_model", "", BFLOAT16),  # Muon's iteration
        ("06_language_model", "record_losses.float32_muon()", FLOAT32),
    ],
)
def test_losses_of_the_notebook_equal_the_cpus_step_by_step(name, before, tolerance, tmp_path, monkeypatch, say):
    trainings, seconds = {}, {}
    for device_name in ("cpu", "xla"):
        begin = time.perf_counter()
        (tmp_path / device_name).mkdir()
        trainings[device_name] = run(name, device_name, tmp_path / device_name, monkeypatch, before)
        seconds[device_name] = time.perf_counter() - begin
    reference = [loss for losses in trainings["cpu"] for loss in losses]
    assert [len(losses) for losses in trainings["xla"]] == [len(losses) for losses in trainings["cpu"]]
    assert len(reference) > 50 and max(reference) > 1.1 * min(reference)
    differences = [abs(a - b) for a, b in zip((loss for losses in trainings["xla"] for loss in losses), reference)]
    assert all(map(math.isfinite, differences))
    relative = max(difference / max(loss, SMALL) for difference, loss in zip(differences, reference))
    say(
        f"{name} {before}: {len(reference)} losses of {len(trainings['cpu'])} trainings, largest difference "
        f"{max(differences):.1e}, relative {relative:.1e}; {seconds['cpu']:.0f} s on the CPU, {seconds['xla']:.0f} s on XLA"
    )
    assert relative < tolerance
