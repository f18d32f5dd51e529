"""Commands of the report: build, verify, new, slides, normalize, check, badges."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from bigmodel_utils import results
from bigmodel_utils.report import ReportError, bootstrap, chapters, execute, profiles, runner

EXIT_CODES = (
    "exit codes: 0 built; 1 a notebook or the rendering failed; 2 bad input; "
    "3 built, but a claim fails (verify: differs); 130 interrupted"
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bigmodel_utils.report", description=__doc__, epilog=EXIT_CODES)
    commands = parser.add_subparsers(required=True, metavar="command")
    build = commands.add_parser("build", help="execute what changed, then render HTML and PDF", epilog=EXIT_CODES)
    build.add_argument("--profile", default="small", help="a file of report/profiles, without .yaml (small)")
    build.add_argument("--jobs", type=int, default=jobs_from_make(), help="notebooks at a time (make's -j, or 1)")
    build.add_argument("--set", action="append", default=[], metavar="NOTEBOOK.PARAMETER=VALUE", help="change one parameter")
    build.add_argument("--memory-gb", type=float, help="stop a notebook that holds more (nine tenths of what is free)")
    build.add_argument("--keep", type=int, default=4, help="how many earlier reports stay in history/ (4)")
    build.set_defaults(run=build_report)
    rebuild = commands.add_parser(
        "verify", help="build again from the recorded commit and compare the numbers", epilog=EXIT_CODES
    )
    rebuild.add_argument("--profile", default="small", help="whose report (small)")
    rebuild.set_defaults(run=verify_report)
    chapter = commands.add_parser("new", help="add a chapter from the template, such as 16_robots")
    chapter.add_argument("name")
    chapter.set_defaults(run=new_chapter)
    one = commands.add_parser("execute")  # the runner calls it, in a process of its own
    one.add_argument("notebook", type=Path)
    one.add_argument("work", type=Path)
    one.add_argument("--memory-bytes", type=float, default=float("inf"))
    one.set_defaults(run=execute_one)
    for name, function, help in (
        ("slides", slides, "write slide shows of the notebooks into build/slides"),
        ("normalize", normalize, "bring notebooks into the form in which they are committed"),
        ("check", check, "refuse notebooks that must not be committed"),
        ("badges", badges, "write the course's address into notebooks and README"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("notebooks", nargs="*", type=Path, help="all of them, if none is named")
        command.set_defaults(run=function)
        if function is normalize:
            command.add_argument(
                "--check", action="store_true", help="change nothing; name those in another form, and exit with 1"
            )
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
    epoch = os.environ.get(results.EPOCH_VARIABLE, "0")
    if not epoch.isdigit():
        print(f"error: {results.EPOCH_VARIABLE} is {epoch!r}, not a number of seconds since 1970", file=sys.stderr)
        return 2
    build = runner.Build(chapters.folder() / "build" / profile.name)
    memory_limit_bytes = options.memory_gb and options.memory_gb * 1e9
    with runner.locked(build):
        ran = runner.run_all(course, profile, build, max(1, options.jobs), memory_limit_bytes)
        outcome = render(profile.name, course, build, options.keep)
    print(
        f"{len(ran)} of {len(course)} notebooks ran; {outcome['rendered']}: {build.folder}/html/index.html, {build.folder}/report.pdf"
    )
    for change in outcome["changed"]:
        print(change)
    for failure in outcome["failures"]:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 3 if outcome["failures"] else 0


def render(profile: str, course: list[chapters.Chapter], build: runner.Build, n_kept: int) -> dict:
    """Render and publish where anything that the report shows changed."""
    stamp, key = build.folder / "rendered.json", _render_key(course, build)
    published = [build.folder / name for name in ("html/index.html", "report.pdf", "summary.json")]
    try:
        outcome = json.loads(stamp.read_text(encoding="utf-8"))
        if outcome["key"] == key and all(path.is_file() for path in published):
            return outcome | {"rendered": "nothing to render", "changed": []}
    except (FileNotFoundError, ValueError, KeyError):
        pass
    from bigmodel_utils.report import compose, publish, summary

    report = compose.read(profile, course, build)
    content = publish.publish(report, build, n_kept)
    outcome = {"key": key, "failures": content["failures"]}
    results.write_atomically(stamp, json.dumps(outcome, indent=1, ensure_ascii=False).encode())
    return outcome | {"rendered": "rendered", "changed": summary.lines(content["changes"])}


def _render_key(course: list[chapters.Chapter], build: runner.Build) -> str:
    folder = chapters.folder()
    files = (
        [chapter.path for chapter in course] + [build.record(chapter.name) for chapter in course] + [folder / "constraints.txt"]
    )
    files += sorted(path for path in (folder / "report").rglob("*") if path.is_file())
    files += sorted((folder / "bigmodel_utils" / "report").glob("*.py")) + [folder / "bigmodel_utils" / "claims.py"]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


def verify_report(options: argparse.Namespace) -> int:
    """Rebuild a report elsewhere, and say what comes out differently."""
    from bigmodel_utils.report import verify

    notes, differences = verify.verify(runner.Build(chapters.folder() / "build" / options.profile))
    for line in [*(f"note: {note}" for note in notes), *(f"DIFFERENT: {difference}" for difference in differences)]:
        print(line)
    print(f"{len(differences)} claims differ" if differences else "the rebuilt report agrees, every claim within its tolerance")
    return 3 if differences else 0


def new_chapter(options: argparse.Namespace) -> int:
    """Add a chapter that passes every check."""
    from bigmodel_utils.report import new

    print("\n".join(str(path.relative_to(chapters.folder())) for path in new.create(options.name)))
    print("Replace the template's text and code by yours; CONTRIBUTING.md says what every part is for.")
    return 0


def execute_one(options: argparse.Namespace) -> int:
    """Execute one notebook into its work folder."""
    profile = profiles.Profile(**json.loads((options.work / "profile.json").read_text()))
    execute.execute(chapters.read(options.notebook), profile, options.work, options.memory_bytes)
    return 0


def normalize(options: argparse.Namespace) -> int:
    """Rewrite notebooks in their normal form."""
    repository = bootstrap.repository(chapters.folder())
    changed = []
    for path in _paths(options):
        normal = chapters.dump(chapters.normalize(chapters.read(path).notebook, repository))
        if path.read_bytes() != normal:
            changed.append(path.name)
            if not options.check:
                results.write_atomically(path, normal)
    if options.check and changed:
        print(f"not in normal form: {', '.join(changed)}; run `make normalize`")
    return 1 if options.check and changed else 0


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
