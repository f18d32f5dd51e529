"""The committed notebooks are in order, and each check of them finds what it is for."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
from conftest import NOTEBOOKS, ROOT, markdown

from bigmodel_utils import claims
from bigmodel_utils.report import bootstrap, chapters, lint, profiles


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_in_order(path):
    assert lint.check(chapters.read(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_declared_minutes_and_needs_are_known(path):
    declared = chapters.read(path).notebook["metadata"]["bigmodel"]
    assert set(declared) <= {"needs", "minutes", "before", "objectives"} and {"smoke", "small"} <= set(declared["minutes"])


@pytest.mark.parametrize("name", ["smoke", "small", "gpu", "tpu"])
def test_profiles_fit_the_notebooks(name):
    assert profiles.load(name, chapters.read_all()).name == name


def broken(tmp_path, change) -> list[str]:
    """The errors of a copy of a good notebook after a change."""
    notebook = copy.deepcopy(chapters.read(NOTEBOOKS[0]).notebook)
    change(notebook)
    path = tmp_path / NOTEBOOKS[0].name
    path.write_bytes(chapters.dump(notebook))
    return lint.check(chapters.read(path))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def first_output(notebook, kind):
    return next(output for cell in code_cells(notebook) for output in cell["outputs"] if kind(output))


def change_claim(notebook):
    """Let a claim that the prose cites by its value have another value."""
    cited = {
        id
        for cell in notebook["cells"]
        for text, id in lint.claims.LINK.findall(chapters.text(cell))
        if any(map(str.isdigit, text))
    }
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            claim = output.get("metadata", {}).get("claim")
            if claim and claim["id"] in cited and claim["status"] == "pass":
                claim["value"] = claim["reference"] = 987.654


MUTANTS = {
    "count out of order": (lambda n: code_cells(n)[1].update(execution_count=9), "execution count 9"),
    "not executed": (lambda n: code_cells(n)[-1].update(execution_count=None), "execution count None"),
    "an error": (lambda n: code_cells(n)[1]["outputs"].append({"output_type": "error", "ename": "KeyError", "evalue": "x", "traceback": []}), "ends in KeyError"),
    "stderr": (lambda n: code_cells(n)[1]["outputs"].append({"output_type": "stream", "name": "stderr", "text": ["w"]}), "writes to stderr"),
    "a machine's path": (lambda n: code_cells(n)[1]["outputs"].append({"output_type": "stream", "name": "stdout", "text": ["/home/me/x"]}), "path of one machine"),
    "an unclaimed decimal": (lambda n: n["cells"].append(markdown("It reaches 0.93 there.") | {"id": "z"}), "states '0.93' without a claim"),
    "an unclaimed percentage": (lambda n: n["cells"].append(markdown("It is 12 % better.") | {"id": "z"}), "states '12 %' without a claim"),
    "an unclaimed ratio": (lambda n: n["cells"].append(markdown("It is 3 times faster.") | {"id": "z"}), "states '3 times' without a claim"),
    "an unknown claim": (lambda n: n["cells"].append(markdown("It is [2](#00-nothing).") | {"id": "z"}), "claim '00-nothing', which no cell checks"),
    "an unknown claim of another notebook": (lambda n: n["cells"].append(markdown("It is [2](05_x.ipynb#05-nothing).") | {"id": "z"}), "claim '05-nothing', which no cell checks"),
    "a number that the claim does not bear": (change_claim, "whose value is 987.654"),
    "an equation number twice": (lambda n: n["cells"].append(markdown("$$\nx \\tag{0.1}\n$$\n$$\nx \\tag{0.1}\n$$") | {"id": "z"}), "equations are numbered"),
    "a missing equation": (lambda n: n["cells"].append(markdown("See (0.99).") | {"id": "z"}), "refers to equation (0.99)"),
    "a missing figure": (lambda n: n["cells"].append(markdown("See Figure 0.99.") | {"id": "z"}), "refers to Figure 0.99"),
    "a link without words": (lambda n: n["cells"].append(markdown("See [$x$](https://example.org).") | {"id": "z"}), "the link '$x$' has no words"),
    "no caption": (lambda n: [cell["metadata"].pop("mystnb", None) for cell in code_cells(n)], "without name, caption and alternative text"),
    "no sources": (lambda n: [cell.update(source=chapters.text(cell).replace("## Sources", "## Links")) for cell in n["cells"]], "has no section '## Sources'"),
    "another bootstrap cell": (lambda n: code_cells(n)[0].update(source=["pass"]), "normal form"),
    "metadata that changes from run to run": (lambda n: n["metadata"].update(papermill={"duration": 1.5}), "normal form"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_checks_find(name, tmp_path):
    change, message = MUTANTS[name]
    assert message in "\n".join(broken(tmp_path, change))


def test_a_claim_of_another_notebook_is_held_to_that_notebook(tmp_path):
    shutil.copy(NOTEBOOKS[1], tmp_path)
    other = chapters.read(NOTEBOOKS[1])
    id, claim = next((id, claim) for id, claim in lint.claims.stored(other.notebook).items() if claim["value"])
    right, wrong = f"{claim['value']:.3g}", "987.65"

    def errors(number: str) -> list[str]:
        cell = markdown(f"It is [{number}]({NOTEBOOKS[1].name}#{id}).") | {"id": "z"}
        return [error for error in broken(tmp_path, lambda n: n["cells"].append(cell)) if "the prose" in error]

    assert errors(right) == []
    assert f"the prose says '987.65' for claim '{id}'" in "\n".join(errors(wrong))


def test_numbers_that_are_no_measurements_are_let_pass(tmp_path):
    prose = "Section 3.1, `0.5`, $x = 0.5$, Python 3.11, [it took 34 days](https://example.org), 1000 features, GPT-2."
    found = broken(tmp_path, lambda n: n["cells"].append(markdown(prose) | {"id": "z"}))
    assert not [error for error in found if "without a claim" in error]


@pytest.mark.parametrize("value", [246453.27, 0.123456789, 1234567.0, 999999.9, 1e-9, 2.5, 1e300])
def test_a_rounded_claim_is_shown_as_the_claim_itself(value):
    claim = claims.Claim("03-a", "is", value, value, 0.0, ">=", "here", "pass")
    output = {"output_type": "display_data", "data": {}, "metadata": {"claim": vars(claim)}}
    cell = {"cell_type": "code", "id": "x", "metadata": {}, "source": "", "execution_count": 1, "outputs": [output]}
    notebook = chapters.normalize({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    assert claims.Claim(**claims.stored(notebook)["03-a"]).figures() == claim.figures()


def test_normalizing_twice_changes_nothing_and_streams_are_joined():
    notebook = chapters.read(NOTEBOOKS[0]).notebook
    once = chapters.normalize(notebook)
    assert chapters.normalize(once) == once
    pieces = [{"output_type": "stream", "name": "stdout", "text": text} for text in ("a\n", "b\n")]
    cell = {
        "cell_type": "code",
        "id": "x",
        "metadata": {"execution": {"t": 1}},
        "source": "1",
        "execution_count": 7,
        "outputs": pieces,
    }
    (normal,) = chapters.normalize({"cells": [cell], "metadata": {}})["cells"]
    assert normal["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]}]
    assert normal["execution_count"] == 1 and normal["metadata"] == {}


def test_parameters_are_plain_values(tmp_path):
    notebook = copy.deepcopy(chapters.read(NOTEBOOKS[0]).notebook)
    cell = next(cell for cell in code_cells(notebook) if "parameters" in chapters.tags(cell))
    cell["source"] = "import os\nseed = os.getpid()"
    path = tmp_path / NOTEBOOKS[0].name
    path.write_bytes(chapters.dump(notebook))
    with pytest.raises(chapters.ReportError, match="may only assign plain values"):
        chapters.read(path).parameters()


def test_a_file_that_is_no_notebook_is_named(tmp_path):
    path = tmp_path / "00_x.ipynb"
    path.write_text("{")
    with pytest.raises(chapters.ReportError, match=r"00_x\.ipynb is not a valid notebook"):
        chapters.read(path)
    with pytest.raises(chapters.ReportError, match=r"no notebook 01_y\.ipynb; there are 00_x\.ipynb"):
        chapters.read(tmp_path / "01_y.ipynb")


def nbval(path) -> subprocess.CompletedProcess:
    options = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", str(ROOT / "tests" / "nbval.cfg")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(path.parent),
        *options,
        str(path),
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=path.parent)


def test_nbval_passes_times_and_fails_a_changed_number(tmp_path):
    def store(shown: str, source: str):
        output = {"output_type": "stream", "name": "stdout", "text": [shown]}
        cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": source, "execution_count": 1, "outputs": [output]}
        path = tmp_path / "stored.ipynb"
        path.write_text(json.dumps(chapters.normalize({"cells": [cell], "metadata": {}})))
        return nbval(path)

    source = "print('R2 0.875 after 2.31 s at 190 GFLOP/s, 3.2× faster')"
    assert store("R2 0.875 after 9.99 s at 10 GFLOP/s, 1.1× faster\n", source).returncode == 0
    changed = store("R2 0.876 after 2.31 s at 190 GFLOP/s, 3.2× faster\n", source)
    assert changed.returncode == 1 and "0.876" in changed.stdout


def test_the_bootstrap_cell_installs_in_colab_only_and_keeps_what_is_preinstalled(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(bootstrap.source("https://github.com/someone/course"), {})
    assert commands == []  # not in Colab
    source = bootstrap.source("https://github.com/someone/course").replace("/content", str(tmp_path))
    source = source.replace('"bigmodel_utils")', '"not_there_yet")')
    monkeypatch.setitem(sys.modules, "google.colab", object())
    exec(source, {})
    assert any("bigmodel-utils[data] @ git+https://github.com/someone/course" in command for command in commands)
    held = (tmp_path / "constraints.txt").read_text()
    assert all(f"{name}==" in held for name in ("torch", "numpy", "pandas", "matplotlib")) and "+" not in held
    with pytest.raises(SystemExit, match="make wheel"):
        exec(bootstrap.source("").replace("/content", str(tmp_path)).replace('"bigmodel_utils")', '"not_there_yet")'), {})


def test_badges_need_an_address_on_github():
    assert bootstrap.badge("", "00_x") == ""
    assert "/github/someone/course/blob/main/notebooks/00_x.ipynb" in bootstrap.badge(
        "https://github.com/someone/course", "00_x"
    )
