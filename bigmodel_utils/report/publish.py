"""Publishing: a report is rendered aside, and takes the place of the earlier one when it is whole.

The earlier report goes to `history/`, one folder for each computation, of which the newest are kept.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bigmodel_utils.report import html, manifest, pdf, sbom, summary
from bigmodel_utils.report.compose import Report
from bigmodel_utils.report.runner import Build

# In this order they leave and arrive: while summary.json is there, the report beside it is whole.
PARTS = ("html", "figures", "report.typ", "report.pdf", "sbom.json", "ro-crate-metadata.json", "summary.json")


def publish(report: Report, build: Build, n_kept: int = 4) -> dict:
    """Render HTML, PDF, bill of materials, manifest and summary, and swap them in.

    Args:
        n_kept: how many earlier reports stay in history/.

    Returns:
        the summary, with what changed since the report that was there.

    Raises:
        ReportError, OSError: where something cannot be rendered; the earlier report is untouched then.
    """
    aside = _render(report, build)
    before = summary.read(build)
    after = summary.summarize(report)
    after["changes"] = summary.changes(before, after)
    _write_json(aside.folder / "sbom.json", sbom.bill_of_materials(report))
    _write_json(aside.folder / "ro-crate-metadata.json", manifest.crate(report, build, aside))
    _write_json(aside.folder / "summary.json", after)
    ready = build.folder / ".ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    for part in PARTS:
        _copy(aside.folder / part, ready / part)
    _swap(ready, build, before, n_kept)
    return after


def _render(report: Report, build: Build) -> Build:
    """Render into `.render`, where Sphinx finds the pages that did not change; after a killed or failed rendering, afresh."""
    aside = Build(build.folder / ".render")
    whole = aside.folder / "whole"
    if not whole.is_file():
        shutil.rmtree(aside.folder, ignore_errors=True)
    aside.folder.mkdir(exist_ok=True)
    whole.unlink(missing_ok=True)
    shutil.rmtree(aside.folder / "figures", ignore_errors=True)  # those of deleted cells too
    _build_html(report, aside)
    pdf.build(report, aside)
    whole.touch()
    return aside


def _build_html(report: Report, aside: Build) -> None:
    """Render the site as if nothing were there of an earlier one but the pages.

    Sphinx links to style sheets and scripts by their checksum where it finds them while it writes a page, that is in
    every rendering but the first. They are out of its sight meanwhile; it copies them again if a page changed.
    """
    static, hidden = aside.folder / "html" / "_static", aside.folder / "static"
    if static.is_dir():
        static.rename(hidden)
    html.build(report, aside)
    if not static.is_dir():
        hidden.rename(static)
    shutil.rmtree(hidden, ignore_errors=True)


def _swap(ready: Path, build: Build, before: dict | None, n_kept: int) -> None:
    history = build.folder / "history"
    if before:
        earlier = history / f"{before['date'].replace(':', '')[:17]}-{(before['commits'] or ['none'])[0][:12]}"
        earlier.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            if (build.folder / part).exists():
                _remove(earlier / part)
                (build.folder / part).rename(earlier / part)
    for part in PARTS:
        _remove(build.folder / part)  # where a killed build had come that far
        (ready / part).rename(build.folder / part)
    ready.rmdir()
    kept = sorted(history.iterdir(), reverse=True) if history.is_dir() else []
    for old in kept[n_kept:]:
        shutil.rmtree(old)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
