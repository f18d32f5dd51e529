"""The summary of a report for programs, and what changed since the report before it."""

from __future__ import annotations

import json
from typing import Any

from bigmodel_utils import claims
from bigmodel_utils.report.compose import Report
from bigmodel_utils.report.runner import Build

SLOWER = 1.25  # a notebook is slower when it took this many times as long as before, and SLOWER_S more
SLOWER_S = 2.0


def read(build: Build) -> dict[str, Any] | None:
    """The summary of the report that is there, or None."""
    try:
        return json.loads((build.folder / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def summarize(report: Report) -> dict[str, Any]:
    """Profile, commits, date, the notebooks with their seconds and memory, the claims with their figures, and the failures."""
    provenances = {page.chapter.name: page.record["provenance"] for page in report.pages}
    return {
        "profile": report.profile,
        "date": report.date.isoformat(timespec="seconds"),
        "commits": sorted({found["commit"] for found in provenances.values() if found["commit"]}),
        "dirty": any(found["dirty"] for found in provenances.values()),
        "versions": max(provenances.values(), key=lambda found: found["date"])["versions"],
        "notebooks": {
            name: {key: found[key] for key in ("seconds", "peak_memory_bytes", "date", "parameters")}
            for name, found in provenances.items()
        },
        "claims": {claim.id: _figures(claim) for claim in report.claims},
        "failures": report.failures(),
    }


def _figures(claim: claims.Claim) -> dict[str, Any]:
    kept = ("status", "verdict", "value", "reference", "tolerance", "relation", "unit")
    return {key: getattr(claim, key) for key in kept} | {"statement": claim.statement}


def changes(before: dict[str, Any] | None, after: dict[str, Any]) -> dict[str, Any]:
    """Which claims came, went or changed and by how much, and which notebooks got slower.

    Returns:
        {"since": date of the earlier report or None, "claims": [{"id", "change", "before", "after", "difference"}],
        "slower": [{"notebook", "before_s", "after_s"}]}
    """
    if before is None:
        return {"since": None, "claims": [], "slower": []}
    return {
        "since": before["date"],
        "claims": claim_changes(before["claims"], after["claims"]),
        "slower": _slower(before["notebooks"], after["notebooks"]),
    }


def claim_changes(before: dict[str, dict], after: dict[str, dict]) -> list[dict[str, Any]]:
    """The claims that differ, in the order of the ledger, those that are gone last."""
    found = []
    for id in [*after, *(id for id in before if id not in after)]:
        old, new = before.get(id), after.get(id)
        if old is None or new is None:
            found.append(
                {"id": id, "change": "new" if old is None else "gone", "before": old, "after": new, "difference": None}
            )
        elif kind := _change(old, new):
            values = (old["value"], new["value"])
            difference = None if None in values else values[1] - values[0]
            found.append({"id": id, "change": kind, "before": old, "after": new, "difference": difference})
    return found


def _change(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The most that changed: a status outweighs a verdict, and that a value."""
    keys = ("status", "verdict", "value", "reference")
    return next((key for key in keys if old[key] != new[key]), None)


def _slower(before: dict[str, dict], after: dict[str, dict]) -> list[dict[str, Any]]:
    found = []
    for name in before.keys() & after.keys():
        old, new = before[name]["seconds"], after[name]["seconds"]
        if old is not None and new is not None and new > SLOWER * old and new > old + SLOWER_S:
            found.append({"notebook": name, "before_s": old, "after_s": new})
    return sorted(found, key=lambda change: change["notebook"])


def lines(changed: dict[str, Any], n_shown: int = 20) -> list[str]:
    """The changes in words, at most `n_shown` lines."""
    said = [_claim_line(change) for change in changed["claims"]]
    said += [
        f"slower: {slow['notebook']}, {slow['after_s']:.0f} s after {slow['before_s']:.0f} s" for slow in changed["slower"]
    ]
    return said[:n_shown] + ([f"... and {len(said) - n_shown} more in summary.json"] if len(said) > n_shown else [])


def _claim_line(change: dict[str, Any]) -> str:
    id, old, new = change["id"], change["before"], change["after"]
    if change["change"] in ("new", "gone"):
        return f"claim {id}: {change['change']}"
    if change["change"] in ("status", "verdict"):
        return f"claim {id}: {old[change['change']]} → {new[change['change']]}"
    key = change["change"]
    moved = "" if not new["tolerance"] else f", {abs(new[key] - old[key]) / new['tolerance']:.2g} of its tolerance"
    return f"claim {id}: {key} {old[key]:.6g} → {new[key]:.6g}{moved}"
