"""Chapters: the committed notebooks, read as plain JSON, and their normal form for git."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmodel_utils import results
from bigmodel_utils.report import ReportError, bootstrap

Cell = dict[str, Any]

KEPT_METADATA = ("bigmodel", "kernelspec", "language_info")
KEPT_CELL_METADATA = ("tags", "mystnb")


@dataclass(frozen=True)
class Chapter:
    """One committed notebook."""

    path: Path
    notebook: dict[str, Any]

    @property
    def name(self) -> str:
        """File name without its ending, such as "03_regularized_loss"."""
        return self.path.stem

    @property
    def number(self) -> int:
        """The chapter's number, from its file name."""
        return int(self.name[:2])

    @property
    def title(self) -> str:
        """The first heading, without its "#"."""
        first = next((text(cell) for cell in self.cells("markdown")), "")
        return first.splitlines()[0].lstrip("# ") if first else self.name

    @property
    def needs(self) -> list[str]:
        """Names of the notebooks whose results this one reads."""
        return self.notebook["metadata"].get("bigmodel", {}).get("needs", [])

    def cells(self, kind: str) -> list[Cell]:
        """The cells of that kind ("code", "markdown"), in order."""
        return [cell for cell in self.notebook["cells"] if cell["cell_type"] == kind]

    def parameters(self) -> dict[str, Any]:
        """Names and default values of the cell tagged "parameters": the small profile.

        Raises:
            ReportError: where there is not exactly one such cell, or it holds more than assignments of plain values.
        """
        tagged = [cell for cell in self.cells("code") if "parameters" in tags(cell)]
        if len(tagged) != 1:
            raise ReportError(f"{self.path.name}: needs exactly one cell tagged 'parameters', has {len(tagged)}")
        try:
            statements = ast.parse(text(tagged[0])).body
            return {statement.targets[0].id: ast.literal_eval(statement.value) for statement in statements}
        except (SyntaxError, ValueError, AttributeError):
            raise ReportError(
                f"{self.path.name}: the parameters cell may only assign plain values (numbers, strings, lists)"
            ) from None


def text(cell: Cell) -> str:
    """A cell's source as one string."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def tags(cell: Cell) -> list[str]:
    """A cell's tags."""
    return cell["metadata"].get("tags", [])


def folder() -> Path:
    """The checkout that the report is built from.

    Raises:
        ReportError: for an installed package without notebooks.
    """
    course = results.course_folder()
    if course is None:
        raise ReportError(
            "the report is built from a checkout of the course; this package is installed without one (pip install -e .)"
        )
    return course


def read(path: Path) -> Chapter:
    """One notebook.

    Raises:
        ReportError: where it is missing or not a notebook.
    """
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        return Chapter(path, notebook | {"cells": notebook["cells"]})
    except FileNotFoundError:
        raise ReportError(
            f"no notebook {path.name}; there are {', '.join(p.name for p in sorted(path.parent.glob('*.ipynb')))}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ReportError(f"{path} is not a valid notebook: restore it with git checkout") from None


def read_all() -> list[Chapter]:
    """Every notebook of the course, in order."""
    return [read(path) for path in sorted((folder() / "notebooks").glob("[0-9][0-9]_*.ipynb"))]


def normalize(notebook: dict[str, Any], repository: str = "") -> dict[str, Any]:
    """The form in which a notebook is committed: outputs and counts kept, everything that changes from run to run left out.

    The bootstrap cell is filled in from its one source, claims keep their figures at the digits shown, and
    execution counts run from 1 in order.

    Args:
        notebook: nbformat 4.5 JSON.
        repository: public address of the course, for the bootstrap cell.
    """
    counts = iter(range(1, len(notebook["cells"]) + 1))
    cells = []
    for cell in notebook["cells"]:
        metadata = {key: cell["metadata"][key] for key in KEPT_CELL_METADATA if key in cell["metadata"]}
        kept = {"cell_type": cell["cell_type"], "id": cell["id"], "metadata": metadata, "source": text(cell).rstrip()}
        if cell["cell_type"] == "code":
            if "bootstrap" in tags(cell):
                kept["source"] = bootstrap.source(repository)
            executed = cell.get("execution_count") is not None
            count = next(counts) if executed else None
            kept |= {
                "execution_count": count,
                "outputs": [_normal_output(output, count) for output in _joined(cell["outputs"])],
            }
        cells.append({key: _lines(value) if key == "source" else value for key, value in sorted(kept.items())})
    metadata = {key: notebook["metadata"][key] for key in KEPT_METADATA if key in notebook["metadata"]}
    metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata["language_info"] = {"name": "python"}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def dump(notebook: dict[str, Any]) -> bytes:
    """A notebook as the bytes that are committed."""
    return (json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def outside_code_and_math(markdown: str, change: Callable[[str], str]) -> str:
    """Apply `change` to the prose of some Markdown, leaving fenced code, code spans, mathematics and HTML tags alone."""
    pieces = _OPAQUE.split(markdown)
    return "".join(piece if index % 2 else change(piece) for index, piece in enumerate(pieces))


_OPAQUE = re.compile(r"(^```.*?^```[ \t]*$|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$|<[^>\n]+>)", re.MULTILINE | re.DOTALL)


_PROGRESS_BAR = re.compile(r"\s*\d+%\|| *\d+step \[")  # tqdm's widget as text


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Consecutive pieces of one stream as one output: how a stream is cut depends on timing. Progress bars are left out."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        if _PROGRESS_BAR.match("".join(output.get("data", {}).get("text/plain", ""))):
            continue
        if joined and output["output_type"] == "stream" and joined[-1].get("name") == output["name"]:
            joined[-1] = joined[-1] | {"text": "".join(joined[-1]["text"]) + "".join(output["text"])}
        else:
            joined.append(output)
    return joined


def _normal_output(output: dict[str, Any], count: int | None) -> dict[str, Any]:
    output = dict(output)
    if output["output_type"] == "execute_result":
        output["execution_count"] = count
    if "text" in output:
        output["text"] = _lines("".join(output["text"]))
    if "data" in output:
        output["data"] = {kind: _normal_data(kind, value) for kind, value in sorted(output["data"].items())}
    claim = output.get("metadata", {}).get("claim")
    if claim:
        output["metadata"] = {"claim": claim | {key: _rounded(claim[key]) for key in ("value", "reference")}}
    return output


def _normal_data(kind: str, value: Any) -> Any:
    if kind.startswith("image/") and not kind.endswith("svg+xml"):
        return "".join(value).strip() + "\n"
    return _lines("".join(value)) if isinstance(value, (str, list)) else value


def _rounded(value: float | None) -> float | None:
    """Six significant digits, but of what would then be a whole number all: those are shown in another way."""
    rounded = None if value is None else float(f"{value:.6g}")
    return value if rounded is None or rounded.is_integer() else rounded


def _lines(source: str | list[str]) -> list[str]:
    return "".join(source).splitlines(keepends=True)
