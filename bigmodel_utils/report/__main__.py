"""Commands of the report: build, slides, normalize, check, badges."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from bigmodel_utils import results
from bigmodel_utils.report import ReportError, bootstrap, chapters, profiles, runner

EXIT_CODES = (
    "exit codes: 0 built; 1 a notebook or the rendering failed; 2 bad input; 3 built, but a claim fails; 130 interrupted"
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bigmodel_utils.report", description=__doc__, epilog=EXIT_CODES)
    commands = parser.add_subparsers(required=True, metavar="command")
    build = commands.add_parser("build", help="execute what changed, then render HTML and PDF", epilog=EXIT_CODES)
    build.add_argument("--profile", default="small", help="a file of report/profiles, without .yaml (small)")
    build.add_argument("--jobs", type=int, default=jobs_from_make(), help="notebooks at a time (make's -j, or 1)")
    build.add_argument("--set", action="append", default=[], metavar="NOTEBOOK.PARAMETER=VALUE", help="change one parameter")
    build.set_defaults(run=build_report)
    execute = commands.add_parser("execute")  # the runner calls it, in a process of its own
    execute.add_argument("notebook", type=Path)
    execute.add_argument("work", type=Path)
    execute.set_defaults(run=execute_one)
    for name, function, help in (
        ("slides", slides, "write slide shows of the notebooks into build/slides"),
        ("normalize", normalize, "bring notebooks into the form in which they are committed"),
        ("check", check, "refuse notebooks that must not be committed"),
        ("badges", badges, "write the course's address into notebooks and README"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("notebooks", nargs="*", type=Path, help="all of them, if none is named")
        command.set_defaults(run=function)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ReportError, results.ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, results.ResultsError) else 1
    except OSError as error:
        print(f"error: {error}: what was built before is untouched; make room or permission, then build again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: whole results are kept; the same command goes on from here", file=sys.stderr)
        return 130


def build_report(options: argparse.Namespace) -> int:
    """Execute and render one profile."""
    course = chapters.read_all()
    try:
        profile = profiles.with_overrides(profiles.load(options.profile, course), options.set, course)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    build = runner.Build(chapters.folder() / "build" / profile.name)
    with runner.locked(build):
        ran = runner.run_all(course, profile, build, max(1, options.jobs))
        outcome = render(profile.name, course, build)
    print(
        f"{len(ran)} of {len(course)} notebooks ran; {outcome['rendered']}: {build.folder}/html/index.html, {build.folder}/report.pdf"
    )
    for failure in outcome["failures"]:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 3 if outcome["failures"] else 0


def render(profile: str, course: list[chapters.Chapter], build: runner.Build) -> dict:
    """Render HTML and PDF where anything that they show changed."""
    stamp, key = build.folder / "rendered.json", _render_key(course, build)
    site, document = build.folder / "html" / "index.html", build.folder / "report.pdf"
    try:
        outcome = json.loads(stamp.read_text(encoding="utf-8"))
        if outcome["key"] == key and site.is_file() and document.is_file():
            return outcome | {"rendered": "nothing to render"}
    except (FileNotFoundError, ValueError, KeyError):
        pass
    from bigmodel_utils.report import compose, html, pdf

    report = compose.read(profile, course, build)
    stamp.unlink(missing_ok=True)
    html.build(report, build)
    pdf.build(report, build)
    outcome = {"key": key, "failures": report.failures()}
    results.write_atomically(stamp, json.dumps(outcome, indent=1, ensure_ascii=False).encode())
    return outcome | {"rendered": "rendered"}


def _render_key(course: list[chapters.Chapter], build: runner.Build) -> str:
    folder = chapters.folder()
    files = (
        [chapter.path for chapter in course] + [build.record(chapter.name) for chapter in course] + [folder / "constraints.txt"]
    )
    files += sorted(path for path in (folder / "report").rglob("*") if path.is_file())
    files += sorted((folder / "bigmodel_utils" / "report").glob("*.py")) + [folder / "bigmodel_utils" / "claims.py"]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


def execute_one(options: argparse.Namespace) -> int:
    """Execute one notebook into its work folder."""
    profile = profiles.Profile(**json.loads((options.work / "profile.json").read_text()))
    runner.execute(chapters.read(options.notebook), profile, options.work)
    return 0


def normalize(options: argparse.Namespace) -> int:
    """Rewrite notebooks in their normal form."""
    repository = bootstrap.repository(chapters.folder())
    for path in _paths(options):
        chapter = chapters.read(path)
        results.write_atomically(path, chapters.dump(chapters.normalize(chapter.notebook, repository)))
    return 0


def check(options: argparse.Namespace) -> int:
    """Print every error of the notebooks."""
    from bigmodel_utils.report import lint

    errors = [error for path in _paths(options) for error in lint.check(chapters.read(path))]
    print("\n".join(errors) if errors else "all notebooks are in order")
    return 1 if errors else 0


def slides(options: argparse.Namespace) -> int:
    """Write a slide show for each notebook, from its stored outputs."""
    from bigmodel_utils.report import slides

    print(slides.build([chapters.read(path) for path in _paths(options)], chapters.folder() / "build" / "slides"))
    return 0


def badges(options: argparse.Namespace) -> int:
    """Write "Open in Colab" badges for the address set in pyproject.toml, or take them out where there is none."""
    folder = chapters.folder()
    repository = bootstrap.repository(folder)
    for path in _paths(options):
        notebook = chapters.read(path).notebook
        badge = bootstrap.badge(repository, path.stem)
        cells = [cell for cell in notebook["cells"] if "badge" not in chapters.tags(cell)]
        if badge:
            cells.insert(1, {"cell_type": "markdown", "id": "badge", "metadata": {"tags": ["badge"]}, "source": badge})
        results.write_atomically(path, chapters.dump(chapters.normalize(notebook | {"cells": cells}, repository)))
    readme = folder / "README.md"
    shown = bootstrap.badge(repository, chapters.read_all()[0].name)
    marked = re.sub(
        r"(<!-- badge -->).*?(<!-- /badge -->)",
        lambda match: match[1] + shown + match[2],
        readme.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    results.write_atomically(readme, marked.encode())
    return 0


def jobs_from_make() -> int:
    """How many jobs make was asked for (`make -j2 report`), or 1."""
    flags = os.environ.get("MAKEFLAGS", "")
    number = re.search(r"(?:^|\s)-?\w*j(\d+)", flags)
    if number:
        return int(number[1])
    return (os.cpu_count() or 1) if re.search(r"(?:^|\s)-j(\s|$)|--jobserver", flags) else 1


def _paths(options: argparse.Namespace) -> list[Path]:
    return options.notebooks or [chapter.path for chapter in chapters.read_all()]


if __name__ == "__main__":
    sys.exit(main())
