"""Verification: build the report once more from what it recorded, and hold the new numbers to the old.

The commit is checked out into a folder of its own (`git worktree`), built there with the recorded parameters, and compared
claim by claim, each within its own tolerance.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bigmodel_utils import results
from bigmodel_utils.report import ReportError, chapters, profiles, summary
from bigmodel_utils.report.runner import Build


def verify(build: Build) -> tuple[list[str], list[str]]:
    """Rebuild the report that is published in `build`, and compare.

    Returns:
        what is not as it was and may explain differences (packages of other versions), and the differences:
        claims with another outcome, or values further apart than their tolerance.

    Raises:
        ReportError: where there is no report, it cannot be traced to one commit, or its notebooks fail now.
    """
    recorded = summary.read(build)
    if recorded is None:
        raise ReportError(f"no report in {build.folder}: run `make report PROFILE={build.folder.name}` first")
    commit = traceable_commit(recorded)
    notes = [f"package {name}: {was} then, {is_now} now" for name, was, is_now in other_versions(recorded)]
    with worktree(commit) as folder:
        rebuilt = _rebuild(folder, recorded)
    return notes, claim_differences(recorded["claims"], rebuilt["claims"])


def traceable_commit(recorded: dict[str, Any]) -> str:
    """The one commit that all notebooks of a report were run from.

    Raises:
        ReportError: where there are several or none, or files had uncommitted changes.
    """
    if recorded["dirty"]:
        raise ReportError(
            "the report was built with uncommitted changes, so that no commit holds its sources: commit, then build"
        )
    if len(recorded["commits"]) != 1:
        known = ", ".join(commit[:12] for commit in recorded["commits"]) or "none"
        raise ReportError(f"the notebooks were not run from one commit ({known}): `rm -r build`, then build again")
    return recorded["commits"][0]


def other_versions(recorded: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(package, version then, version now) where they differ."""
    now = results.versions()
    for name, version in recorded["versions"].items():
        if now.get(name) != version:
            yield name, version, now.get(name, "not installed")


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The checkout of a commit in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="verify-report-") as temporary:
        folder = Path(temporary) / "course"
        _git("worktree", "add", "--detach", str(folder), commit)
        try:
            yield folder
        finally:
            _git("worktree", "remove", "--force", str(folder))


def _git(*words: str) -> None:
    done = subprocess.run(["git", "-C", chapters.folder(), *words], capture_output=True, text=True)
    if done.returncode:
        raise ReportError(f"git {' '.join(words[:2])}: {done.stderr.strip()}")


def _rebuild(folder: Path, recorded: dict[str, Any]) -> dict[str, Any]:
    """Build in another checkout, with the parameters that were recorded."""
    command = [sys.executable, "-m", "bigmodel_utils.report", "build", "--profile", recorded["profile"], "--jobs", "1"]
    command += _overrides(folder, recorded)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    rebuilt = summary.read(Build(folder / "build" / recorded["profile"]))
    if done.returncode not in (0, 3) or rebuilt is None:
        raise ReportError(f"the recorded commit does not build here:\n{done.stderr.strip()}")
    return rebuilt


def _overrides(folder: Path, recorded: dict[str, Any]) -> list[str]:
    """--set for the recorded parameters that are neither the notebook's own there nor the profile's."""
    course = [chapters.read(folder / "notebooks" / f"{name}.ipynb") for name in recorded["notebooks"]]
    profile = profiles.load(recorded["profile"], course, folder / "report" / "profiles")
    words = []
    for chapter in course:
        used = recorded["notebooks"][chapter.name]["parameters"]
        for key, value in profile.resolved(chapter).items():
            if key in used and used[key] != value:
                written = yaml.safe_dump(used[key], default_flow_style=True, width=10**6).removesuffix("...\n").strip()
                words += ["--set", f"{chapter.name}.{key}={written}"]
    return words


def claim_differences(recorded: dict[str, dict], rebuilt: dict[str, dict]) -> list[str]:
    """The claims that came out differently: another status or verdict, or a value further off than the claim's tolerance.

    A value that is held to a bound has no tolerance to compare with: its status decides.
    """
    found = []
    for change in summary.claim_changes(recorded, rebuilt):
        if change["change"] in ("new", "gone"):
            found.append(f"claim {change['id']}: {change['change']}")
            continue
        old, new = change["before"], change["after"]
        for key in ("status", "verdict"):
            if old[key] != new[key]:
                found.append(f"claim {change['id']}: {key} {old[key]!r}, rebuilt {new[key]!r}")
        moved = change["difference"]
        if old["status"] == new["status"] == "pass" and old["relation"] == "==" and moved and abs(moved) > old["tolerance"]:
            found.append(
                f"claim {change['id']}: {old['value']:.6g}, rebuilt {new['value']:.6g}: "
                f"{abs(moved):.3g} apart, tolerance {old['tolerance']:.3g}"
            )
    return found
