"""A new chapter from the template in `report/chapter`: notebook with outputs, checkers, mutants, and its smoke profile."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigmodel_utils import results
from bigmodel_utils.report import ReportError, bootstrap, chapters, execute, profiles

SMOKE = "{sizes: [1, 4], n_means: 50}"


def create(name: str) -> list[Path]:
    """Write the files of a chapter called `name` ("16_robots") into the checkout, and run its notebook once.

    Returns:
        the files written or changed.

    Raises:
        ReportError: for a name of another form, or one whose number, notebook or checkers are there already.
    """
    folder = chapters.folder()
    _check(name, folder)
    names = {"@NAME@": name, "@NN@": name[:2], "@NUMBER@": str(int(name[:2])), "@MODULE@": name[3:]}
    template = {path.stem: _filled(path, names) for path in (folder / "report" / "chapter").iterdir()}
    checkers = folder / "bigmodel_utils" / "exercises" / f"{name[3:]}.py"
    mutants = folder / "tests" / "mutants" / f"{name}.json"
    checkers.write_text(template["exercises"], encoding="utf-8")
    mutants.parent.mkdir(parents=True, exist_ok=True)
    mutants.write_text(template["mutants"], encoding="utf-8")
    path = folder / "notebooks" / f"{name}.ipynb"
    notebook = {"cells": list(_cells(template["notebook"])), "nbformat": 4, "nbformat_minor": 5}
    notebook["metadata"] = {"bigmodel": {"minutes": {"small": 0.2, "smoke": 0.2}, "needs": []}}
    path.write_bytes(chapters.dump(chapters.normalize(notebook, bootstrap.repository(folder))))
    path.write_bytes(_with_outputs(path))
    return [path, checkers, mutants, _add_to_smoke(name, folder)]


def _check(name: str, folder: Path) -> None:
    if not re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", name):
        raise ReportError(f"a chapter is called like 16_robots: two digits, then small letters, digits and _; not {name!r}")
    taken = [path.stem for path in (folder / "notebooks").glob(f"{name[:2]}_*.ipynb")]
    if taken:
        raise ReportError(f"number {name[:2]} is taken by {taken[0]}")
    if (folder / "bigmodel_utils" / "exercises" / f"{name[3:]}.py").exists():
        raise ReportError(f"bigmodel_utils/exercises/{name[3:]}.py is there already: choose another name")


def _filled(path: Path, names: dict[str, str]) -> str:
    content = path.read_text(encoding="utf-8")
    for token, value in names.items():
        content = content.replace(token, value)
    return content


def _cells(source: str) -> Iterator[dict[str, Any]]:
    """Cells of the template: each begins with "%% markdown" or "%% code", and its metadata as JSON."""
    pieces = re.split(r"^%% (markdown|code) ?(.*)\n", source, flags=re.MULTILINE)[1:]
    for position, (kind, metadata, text) in enumerate(zip(pieces[::3], pieces[1::3], pieces[2::3])):
        cell = {"cell_type": kind, "id": f"cell-{position}", "metadata": json.loads(metadata or "{}"), "source": text.strip()}
        yield cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def _with_outputs(path: Path) -> bytes:
    """The notebook as it is after a run, in the form in which it is committed."""
    chapter = chapters.read(path)
    profile = profiles.Profile("small", "", 120, {})
    with tempfile.TemporaryDirectory() as work:
        os.environ[results.OUTPUT_VARIABLE] = work
        execute.execute(chapter, profile, Path(work), memory_limit_bytes=4e9)
        ran = json.loads((Path(work) / path.name).read_text(encoding="utf-8"))
    for output in (output for cell in ran["cells"] for output in cell.get("outputs", [])):
        output.get("data", {}).pop("image/svg+xml", None)  # figures have both forms in a report, and PNG alone in git
    return chapters.dump(chapters.normalize(ran, bootstrap.repository(chapters.folder())))


def _add_to_smoke(name: str, folder: Path) -> Path:
    path = folder / "report" / "profiles" / "smoke.yaml"
    profile = path.read_text(encoding="utf-8").replace("notebooks: {}", "notebooks:").rstrip()
    results.write_atomically(path, f"{profile}\n  {name}: {SMOKE}\n".encode())
    return path
