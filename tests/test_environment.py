"""pyproject.toml, constraints.txt and environment.yml describe one environment, which Colab can hold without losing its own."""

import csv
import re
import tomllib
from importlib import metadata

import pytest
import yaml
from conftest import NOTEBOOKS, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from bigmodel_utils.report import bootstrap

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}


def requirements(*extras: str) -> list[Requirement]:
    """The package's own requirements, and those of some extras."""
    optional = PROJECT["optional-dependencies"]
    return [Requirement(line) for line in PROJECT["dependencies"] + [line for extra in extras for line in optional[extra]]]


def closure(
    roots: list[Requirement], environment: dict[str, str], preinstalled: dict[str, str] | None = None
) -> dict[str, list[Requirement]]:
    """Every requirement, by the package required, that installing the roots brings about; what is preinstalled and
    satisfies what was asked of it so far stays, and asks for nothing more."""
    found: dict[str, list[Requirement]] = {}
    waiting = list(roots)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        is_new = name not in found
        found.setdefault(name, []).append(requirement)
        if not is_new or admits(requirement, (preinstalled or {}).get(name)):
            continue
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in map(Requirement, lines):
            extras = requirement.extras or {""}
            if line.marker is None or any(line.marker.evaluate(environment | {"extra": extra}) for extra in extras):
                waiting.append(line)
    return found


def admits(requirement: Requirement, version: str | None) -> bool:
    """Whether that version is there and satisfies the requirement."""
    return version is not None and requirement.specifier.contains(Version(version).public, prereleases=True)


EXTRAS = set(PROJECT["optional-dependencies"]) - {"all"}


def colab() -> dict[str, dict[str, str]]:
    """What each Colab runtime preinstalls."""
    runtimes: dict[str, dict[str, str]] = {}
    with (ROOT / "tests" / "data" / "colab_runtimes.csv").open() as file:
        for row in csv.DictReader(file):
            runtimes.setdefault(row["runtime"], {})[canonicalize_name(row["package"])] = row["version"]
    return runtimes


def test_every_requirement_is_pinned_within_its_range():
    for requirement in requirements(*EXTRAS):
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement} does not admit the tested {pin}"


def test_what_is_installed_is_the_tested_set():
    other = {}
    for name in closure(requirements(*EXTRAS), {}):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:  # for another platform or Python
            continue
        if Version(version).public != PINS.get(name):
            other[name] = (version, PINS.get(name))
    assert not other, f"installed and pinned versions differ: {other}; run `make env` again"


def test_the_all_extra_names_all_extras():
    assert set(Requirement(PROJECT["optional-dependencies"]["all"][0]).extras) == EXTRAS


def test_environment_yml_is_the_same_environment():
    python, pip, by_pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert by_pip == {"pip": ["--constraint constraints.txt", "--editable .[all]"]} and pip == "pip"
    from packaging.specifiers import SpecifierSet

    assert SpecifierSet(PROJECT["requires-python"]).contains(python.partition("=")[2])


@pytest.mark.parametrize("runtime", ["cpu", "gpu", "tpu"])
def test_colab_keeps_what_it_has_preinstalled(runtime):
    preinstalled = colab()[runtime]
    environment = {"python_version": preinstalled["python"].rpartition(".")[0], "python_full_version": preinstalled["python"]}
    reinstalled = {
        name: (preinstalled[name], str(requirement))
        for name, needed in closure(requirements("data"), environment, preinstalled).items()
        for requirement in needed
        if name in preinstalled and name not in bootstrap.HELD and not admits(requirement, preinstalled[name])
    }
    assert not reinstalled, f"Colab's {runtime} runtime would have these reinstalled: {reinstalled}"
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(preinstalled["python"])


def test_the_colab_check_would_notice():
    found = closure([*requirements(), Requirement("torch>=99")], {})
    assert not all(admits(requirement, colab()["cpu"]["torch"]) for requirement in found["torch"])


def test_cited_sources_are_in_the_bibliography():
    bibliography = (ROOT / "report" / "references.bib").read_text(encoding="utf-8").lower()
    missing = []
    for path in NOTEBOOKS:
        sources = path.read_text(encoding="utf-8").partition("## Sources")[2]
        for link in re.findall(r"\]\((https?://[^)\s]+)\)", sources):
            key = re.sub(r"^https?://(dx\.)?(doi\.org/|arxiv\.org/abs/)?", "", link).rstrip("/").lower()
            if key not in bibliography:
                missing.append(f"{path.stem}: {link}")
    assert missing == []
