"""The HTML site: Sphinx and MyST-NB over the composed pages; it works from the file system, without a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from bigmodel_utils.report import ReportError, chapters, compose, course
from bigmodel_utils.report.compose import Page, Report
from bigmodel_utils.report.runner import Build


def build(report: Report, build: Build) -> Path:
    """Render the site; Sphinx rewrites only the pages that changed.

    Returns:
        the path of index.html.

    Raises:
        ReportError: with Sphinx's own words, where it warns or fails.
    """
    source, site = build.folder / "site", build.folder / "html"
    pages = {f"{page.chapter.name}.ipynb": chapters.dump(_notebook(page)).decode() for page in report.pages}
    pages |= {
        "index.md": _index(report),
        "ledger.md": f"(claims-ledger)=\n# Ledger of claims\n\n{_targets(compose.ledger(report))}",
    }
    pages |= {"references.md": f"# References\n\n{compose.references(report)}"}
    pages |= course.pages(report)
    for name in ("glossary", "licence"):
        pages[f"{name}.md"] = (report.folder / "report" / f"{name}.md").read_text(encoding="utf-8")
    source.mkdir(parents=True, exist_ok=True)
    for stale in {path.name for path in source.iterdir()} - pages.keys():
        (source / stale).unlink()
    for name, content in pages.items():
        _write_if_changed(source / name, content)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", str(report.folder / "report")]
    command += ["-d", str(build.folder / ".doctrees"), str(source), str(site)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ReportError(f"Sphinx does not accept the pages:\n{done.stderr.strip()}")
    return site / "index.html"


def _notebook(page: Page) -> dict:
    first, *others = [_html_cell(cell) for cell in page.cells]
    first = first | {"source": f"({page.label})=\n{first['source']}"}
    return {"cells": [first, *others], "metadata": page.chapter.notebook["metadata"], "nbformat": 4, "nbformat_minor": 5}


def _html_cell(cell: chapters.Cell) -> chapters.Cell:
    if cell["cell_type"] == "code":
        return _folded(cell) if compose.mostly_checks(chapters.text(cell)) else cell
    return cell | {"source": _targets(compose.label_equations(chapters.text(cell)))}


def _folded(cell: chapters.Cell) -> chapters.Cell:
    """A cell whose code shows when it is asked for; its outputs show always."""
    words = {"code_prompt_show": "Show how it is checked", "code_prompt_hide": "Hide how it is checked"}
    return cell | {"metadata": cell["metadata"] | {"tags": [*chapters.tags(cell), "hide-input"], "mystnb": words}}


def _targets(markdown: str) -> str:
    """Link targets in MyST's own syntax, which Sphinx checks."""
    return re.sub(r'^<span id="([^"]+)"></span>\n', r"(\1)=", markdown, flags=re.MULTILINE)


def _index(report: Report) -> str:
    names = "\n".join(page.chapter.name for page in report.pages)
    toctrees = f"```{{toctree}}\n:caption: Chapters\n\n{names}\n```\n\n```{{toctree}}\n:caption: The course\n\ncourse\narticle\ninstructors\n```\n\n```{{toctree}}\n:caption: Evidence\n\nledger\nreferences\nglossary\nlicence\n```\n"
    return f"# {compose.TITLE}\n\n{compose.cover(report)}\n{toctrees}"


def _write_if_changed(path: Path, content: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        path.write_text(content, encoding="utf-8")
