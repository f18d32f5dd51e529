"""The runner and the commands: what reruns, what does not, and what is left after every way of failing."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import Course, chapter_cells, code, markdown

from bigmodel_utils.report import __main__ as commands


def edit(path, old, new):
    """Replace text in a notebook, and return what undoes it."""
    before = path.read_bytes()
    assert old.encode() in before, f"{old!r} is not in {path.name}"
    path.write_bytes(before.replace(old.encode(), new.encode()))
    return lambda: path.write_bytes(before)


def test_a_second_build_of_nothing_changed_does_nothing(built: Course):
    shown = [built.folder / "build/small" / name for name in ("html/index.html", "report.pdf")]
    before, times = built.files(), [path.stat().st_mtime_ns for path in shown]
    status, printed = built.run("build")
    assert (status, built.files()) == (0, before)
    assert "0 of 2 notebooks ran; nothing to render" in printed
    assert [path.stat().st_mtime_ns for path in shown] == times


def test_a_prose_edit_renders_and_retrains_nothing(built: Course):
    before = built.files()
    undo = edit(built.folder / "notebooks/03_first.ipynb", "Add **both** numbers", "Add **each** number")
    status, printed = built.run("build")
    assert status == 0 and "0 of 2 notebooks ran; rendered" in printed
    assert built.files() == before
    assert "Add <strong>each</strong> number" in (built.folder / "build/small/html/03_first.html").read_text()
    undo()


def test_an_edit_of_code_reruns_its_notebook_and_not_what_reads_the_same_results(built: Course):
    undo = edit(built.folder / "notebooks/03_first.ipynb", "asked to fail", "told to fail")
    status, printed = built.run("build")
    assert status == 0 and "1 of 2 notebooks ran" in printed and "04_second" not in printed
    undo()


def test_changed_results_rerun_what_reads_them(built: Course):
    undo = edit(built.folder / "notebooks/03_first.ipynb", "'sum': 2", "'sum': 2.0, 'more': 1")
    status, printed = built.run("build")
    assert status == 0 and "2 of 2 notebooks ran" in printed
    undo()


def test_a_changed_parameter_reaches_the_notebook(course: Course):
    status, printed = course.run("build", "--set", "03_first.seed=7")
    assert status == 0, printed
    record = json.loads((course.folder / "build/small/results/03_first.json").read_text())
    assert record["provenance"]["parameters"]["seed"] == 7
    assert (
        'seed</span> <span class="o">=</span> <span class="mi">7'
        in (course.folder / "build/small/html/03_first.html").read_text()
    )


def test_a_damaged_results_file_is_made_again(built: Course):
    built.run("build")
    path = built.folder / "build/small/results/03_first.json"
    path.write_bytes(path.read_bytes()[:-40])
    status, printed = built.run("build")
    assert status == 0 and "03_first.json is missing or damaged; running it again" in printed
    assert json.loads(path.read_text())["values"] == {"sum": 2}


def test_an_edit_of_an_imported_module_reruns(built: Course):
    path = built.folder / "bigmodel_utils/plot.py"
    before = path.read_text()
    path.write_text(before + "\n# another line\n")
    status, printed = built.run("build")
    assert status == 0 and "2 of 2 notebooks ran" in printed
    path.write_text(before)


def test_an_edit_of_a_module_that_is_not_imported_reruns_nothing(built: Course):
    built.run("build")
    path = built.folder / "bigmodel_utils/checkpoint.py"
    before = path.read_text()
    path.write_text(before + "\n# another line\n")
    status, printed = built.run("build")
    assert status == 0 and "0 of 2 notebooks ran" in printed
    path.write_text(before)


def test_a_failing_cell_is_named_and_whole_results_stay(built: Course):
    built.run("build")
    before = {name: content for name, content in built.files().items() if "03_first" in name}
    status, printed = built.run("build", "--set", "04_second.fail_at=1")
    assert status == 1
    assert "04_second: cell" in printed and "AssertionError: asked to fail" in printed and "assert fail_at != 1" in printed
    partial = built.folder / "build/small/failed/04_second.ipynb"
    assert str(partial) in printed and "asked to fail" in partial.read_text()
    assert {name: content for name, content in built.files().items() if "03_first" in name} == before
    assert "04_second.json" in str(list(built.files()))  # the last whole result of the failed one stays too


def test_what_needs_a_failed_notebook_is_not_run(course: Course):
    status, printed = course.run("build", "--set", "03_first.fail_at=1")
    assert status == 1 and "04_second: not run, since it needs 03_first" in printed
    assert course.files() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "smal"], "unknown profile 'smal'; did you mean 'small'?"),
        (["--set", "03_first.sed=1"], "notebook '03_first': unknown parameter 'sed'; did you mean 'seed'?"),
        (["--set", "03_frist.seed=1"], "unknown notebook '03_frist'; did you mean '03_first'?"),
        (["--set", "03_first.seed='1'"], "seed is '1', but its default 0 is of another type"),
        (["--set", "03_first.seed=import os"], "seed is 'import os', but its default 0 is of another type"),
        (["--set", "seed"], "write notebook.parameter=value"),
    ],
)
def test_bad_input_is_refused_by_name(built: Course, arguments, message):
    before = built.files()
    status, printed = built.run("build", *arguments)
    assert status == 2 and message in printed
    assert built.files() == before


def test_a_profile_with_unknown_names_is_refused(course: Course):
    path = course.folder / "report/profiles/small.yaml"
    path.write_text("description: d\ncell_timeout_s: 60\nnotebooks:\n  03_first: {n_seeds: 1}\n")
    assert "profile 'small', notebook '03_first': unknown parameter 'n_seeds'" in course.run("build")[1]
    path.write_text("description: d\ncell_timeout_s: 60\nnotebooks:\n  05_other: {}\n")
    assert "profile 'small': unknown notebook '05_other'" in course.run("build")[1]
    path.write_text("notebooks: [\n")
    assert "small.yaml: needs description, cell_timeout_s and notebooks" in course.run("build")[1]


def slow(course: Course) -> None:
    cells = chapter_cells("04_second", 4)
    cells.insert(5, code("import time\ntime.sleep(60)"))
    course.add("04_second", 4, needs=["03_first"], cells=cells)


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was not printed: {process.stderr.read()}")


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_leaves_whole_results_and_goes_on(course: Course, signal_):
    slow(course)
    process = course.start("build")
    wait_for(process, "04_second: running")
    time.sleep(3)  # until the kernel is up and sleeping
    os.kill(process.pid, signal_)
    _, err = process.communicate(timeout=60)
    if signal_ == signal.SIGINT:
        assert process.returncode == 130 and "whole results are kept" in err
        assert not (course.folder / "build/small/.work").exists()
    else:
        os.killpg(process.pid, signal.SIGKILL)  # the notebook's own process, which a real kill -9 would leave to die by itself
    assert sorted(name.rpartition("/")[2] for name in course.files()) == ["03_first.ipynb", "03_first.json", "03_first.json"]
    course.add("04_second", 4, needs=["03_first"])
    status, printed = course.run("build")
    assert status == 0 and "1 of 2 notebooks ran" in printed


def test_a_failing_claim_is_published_and_fails_the_build(course: Course):
    cells = chapter_cells("04_second", 4)
    cells[8] = code('claims.check("04-sum", "One and one is three", 1 + 1, 3, 0, "arithmetic")')
    course.add("04_second", 4, needs=["03_first"], cells=cells)
    status, printed = course.run("build")
    assert status == 3 and "FAILED: claim failed: ✗ 04-sum: One and one is three" in printed
    page = (course.folder / "build/small/html/ledger.html").read_text()
    assert "1 of 2 claims fail" in page and page.index("One and one is three") < page.index("One and one is two")
    assert course.run("build")[0] == 3  # also when there is nothing to render


def test_prose_that_states_another_number_fails_the_build(course: Course):
    cells = chapter_cells("03_first", 3)
    cells[0] = markdown(cells[0]["source"].replace("[2](#03-sum)", "[3](#03-sum)"))
    course.add("03_first", 3, cells=cells)
    status, printed = course.run("build")
    assert status == 3 and "the prose says '3' for claim '03-sum'" in printed


def test_independent_notebooks_run_at_the_same_time(course: Course):
    course.add("04_second", 4)
    status, printed = course.run("build", "--jobs", "2")
    assert status == 0
    assert printed.index("04_second: running") < printed.index(": done")


@pytest.mark.parametrize(
    ("flags", "n_jobs"),
    [
        ("", 1),
        ("w -j2 --jobserver-auth=3,4", 2),
        (" -j8 --jobserver-auth=fifo:/x", 8),
        ("k", 1),
        (" --jobserver-fds=3,4 -j", os.cpu_count()),
    ],
)
def test_makes_jobs_are_the_runners(monkeypatch, flags, n_jobs):
    monkeypatch.setenv("MAKEFLAGS", flags)
    assert commands.jobs_from_make() == n_jobs


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small file system"
)
def test_a_full_disk_is_a_clear_end(course: Course):
    build = course.folder / "build"
    build.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(build)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    sources = {path: path.read_bytes() for path in (course.folder / "notebooks").iterdir()}
    try:
        status, printed = course.run("build")
    finally:
        subprocess.run(["umount", str(build)], check=True)
    assert status == 1
    assert "disk is full" in printed or "No space left" in printed
    assert {path: path.read_bytes() for path in (course.folder / "notebooks").iterdir()} == sources
    assert course.run("build")[0] == 0


def test_badges_write_the_address_everywhere_and_take_it_out_again(course: Course):
    before = {path: path.read_bytes() for path in [course.folder / "README.md", *(course.folder / "notebooks").iterdir()]}
    settings = course.folder / "pyproject.toml"
    plain = settings.read_text()
    settings.write_text(plain.replace('repository = ""', 'repository = "https://github.com/someone/course"'))
    assert course.run("badges") == (0, "")
    for path in before:
        assert "colab.research.google.com/github/someone/course/blob/main/notebooks/" in path.read_text()
    assert (
        "bigmodel-utils[data] @ git+https://github.com/someone/course"
        in (course.folder / "notebooks/03_first.ipynb").read_text()
    )
    settings.write_text(plain)
    assert course.run("badges") == (0, "")
    assert {path: path.read_bytes() for path in before} == before
