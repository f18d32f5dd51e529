"""Profiles: the sizes of a run, as the parameters that differ from the notebooks' own (small) ones."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bigmodel_utils.report import ReportError, chapters


@dataclass(frozen=True)
class Profile:
    """Parameters of each notebook under one name."""

    name: str
    description: str
    cell_timeout_s: int  # a cell that runs longer is stopped, and named
    parameters: dict[str, dict[str, Any]]  # for each notebook, what differs from its defaults

    def resolved(self, chapter: chapters.Chapter) -> dict[str, Any]:
        """All parameters of that notebook under this profile."""
        return chapter.parameters() | self.parameters.get(chapter.name, {})


def load(name: str, course: list[chapters.Chapter], folder: Path | None = None) -> Profile:
    """Read and validate a profile against the notebooks' parameters.

    Raises:
        ReportError: for an unknown profile, notebook or parameter, or a value of another type than the default's.
    """
    folder = folder or chapters.folder() / "report" / "profiles"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise ReportError(f"unknown profile {name!r}{_meant(name, [p.stem for p in sorted(folder.glob('*.yaml'))])}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        profile = Profile(name, content["description"], content["cell_timeout_s"], content.get("notebooks") or {})
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path.name}: needs description, cell_timeout_s and notebooks ({error})") from None
    by_name = {chapter.name: chapter for chapter in course}
    for notebook, values in profile.parameters.items():
        if notebook not in by_name:
            raise ReportError(f"profile {name!r}: unknown notebook {notebook!r}{_meant(notebook, list(by_name))}")
        _check_parameters(f"profile {name!r}, notebook {notebook!r}", values or {}, by_name[notebook].parameters())
    return profile


def with_overrides(profile: Profile, overrides: list[str], course: list[chapters.Chapter]) -> Profile:
    """The profile with parameters given by hand as "notebook.parameter=value" (the value is YAML, never code).

    Raises:
        ReportError: for one that does not parse, or names an unknown notebook or parameter.
    """
    parameters = {notebook: dict(values) for notebook, values in profile.parameters.items()}
    by_name = {chapter.name: chapter for chapter in course}
    for override in overrides:
        key, equals, value = override.partition("=")
        notebook, dot, parameter = key.partition(".")
        if not (equals and dot):
            raise ReportError(f"cannot read the parameter {override!r}: write notebook.parameter=value")
        if notebook not in by_name:
            raise ReportError(f"unknown notebook {notebook!r}{_meant(notebook, list(by_name))}")
        try:
            given = {parameter: yaml.safe_load(value)}
        except yaml.YAMLError:
            raise ReportError(f"cannot read the value of {override!r}: it is not a plain YAML value") from None
        _check_parameters(f"notebook {notebook!r}", given, by_name[notebook].parameters())
        parameters.setdefault(notebook, {}).update(given)
    return Profile(profile.name, profile.description, profile.cell_timeout_s, parameters)


def _check_parameters(where: str, given: dict[str, Any], defaults: dict[str, Any]) -> None:
    for parameter, value in given.items():
        if parameter not in defaults:
            raise ReportError(f"{where}: unknown parameter {parameter!r}{_meant(parameter, list(defaults))}")
        default = defaults[parameter]
        allowed = (int, float) if type(default) is float else type(default)
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, allowed):
            raise ReportError(f"{where}: {parameter} is {value!r}, but its default {default!r} is of another type")


def _meant(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
