"""A chapter made by `make chapter` passes every check that the committed chapters pass."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from bigmodel_utils.report import profiles
from bigmodel_utils.report.chapters import read


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the checkout with one more chapter."""
    folder = tmp_path_factory.mktemp("copy") / "course"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "dist", "__pycache__", ".*_cache"))
    status, printed = report(folder, "new", "77_robots")
    assert status == 0 and "notebooks/77_robots.ipynb" in printed, printed
    return folder


def command(folder: Path, *words: str) -> tuple[int, str]:
    """Run Python in the copy: its exit code and what it printed."""
    environment = os.environ | {"PYTHONPATH": str(folder), "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def report(folder: Path, *words: str) -> tuple[int, str]:
    return command(folder, "-m", "bigmodel_utils.report", *words)


def test_it_passes_every_check(copy: Path):
    assert report(copy, "check") == (0, "all notebooks are in order\n")
    files = ["notebooks/77_robots.ipynb", "bigmodel_utils/exercises/robots.py"]
    for words in (["check"], ["format", "--check"]):
        status, printed = command(copy, "-m", "ruff", *words, *files)
        assert status == 0, printed
    tests = ["tests/test_exercises.py", "tests/test_notebooks.py", "tests/test_environment.py"]
    status, printed = command(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "77 or profiles or cited", *tests)
    assert status == 0 and "no tests ran" not in printed, printed
    options = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval.cfg", "-p", "no:cacheprovider"]
    status, printed = command(copy, "-m", "pytest", "-q", *options, files[0])
    assert status == 0, printed


def test_it_is_in_the_smoke_profile(copy: Path):
    chapter = read(copy / "notebooks/77_robots.ipynb")
    smoke = profiles.load(
        "smoke", [read(path) for path in sorted((copy / "notebooks").glob("*.ipynb"))], copy / "report/profiles"
    )
    assert smoke.resolved(chapter)["n_means"] < chapter.parameters()["n_means"]


def test_the_hooks_are_commands_that_exist_and_notice(copy: Path):
    """Each local hook passes on the new chapter, and the notebook's own hooks refuse one that is not in normal form."""
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    path = copy / "notebooks/77_robots.ipynb"
    content = path.read_bytes()
    spoilt = content.replace(b'"nbformat_minor": 5', b'"nbformat_minor":5')
    for hook in hooks["hooks"]:
        program, *words = hook["entry"].split()
        assert program == ".venv/bin/python" and hook["language"] == "system"
        status, printed = command(copy, *words, "notebooks/77_robots.ipynb")
        assert status == 0, printed
        if "report" in hook["entry"]:
            path.write_bytes(spoilt)
            status, printed = command(copy, *words, "notebooks/77_robots.ipynb")
            path.write_bytes(content)
            assert status == 1 and "normal form" in printed
            assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("robots", "a chapter is called like 16_robots"),
        ("16-robots", "a chapter is called like 16_robots"),
        ("05_robots", "number 05 is taken by 05_train_mlp"),
        ("78_vision", "bigmodel_utils/exercises/vision.py is there already"),
    ],
)
def test_a_name_that_cannot_be_is_refused(copy: Path, name, message):
    status, printed = report(copy, "new", name)
    assert status == 1 and message in printed
