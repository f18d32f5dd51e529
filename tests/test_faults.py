"""Builds that are killed, starved or crowded: a clear end, the earlier report untouched, and the next build as if nothing had been.

The notebooks here save fixed results without importing torch, so that a build takes seconds and every byte of it is comparable.
BIGMODEL_KILLS=50 kills that many builds; the default is one.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Course, light_cells

from bigmodel_utils.report.publish import PARTS

FAULTS = {
    "die": "import os\nos._exit(1)",
    "hang": "import time\ntime.sleep(600)",
    "memory": "held = [bytearray(b'x' * 2**25) for _ in range(10_000)]",
    "output": "for _ in range(1000):\n    print('x' * 1_000_000)",
}


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> Course:
    """A course of two chapters of fixed results, built."""
    course = Course(tmp_path_factory.mktemp("light"), light_cells)
    (course.folder / "report/profiles/small.yaml").write_text("description: d\ncell_timeout_s: 10\nnotebooks: {}\n")
    status, printed = course.run("build")
    assert status == 0, printed
    return course


def contents(course: Course, *parts: str) -> dict[str, bytes]:
    """Every file of some parts of the small build."""
    build = course.folder / "build" / "small"
    roots = [build / part for part in parts or (*PARTS, "results", "notebooks")]
    files = [path for root in roots for path in ([root] if root.is_file() else sorted(root.rglob("*"))) if path.is_file()]
    return {str(path.relative_to(build)): without_changes(path) for path in files}


def without_changes(path: Path) -> bytes:
    """A file's content; of the summary without what changed since an earlier report, which may or may not have been."""
    if path.name != "summary.json":
        return path.read_bytes()
    return json.dumps(json.loads(path.read_bytes()) | {"changes": None}).encode()


@pytest.mark.parametrize(
    ("fault", "options", "message"),
    [
        ("die", [], "the kernel died"),
        ("hang", [], "ran longer than 10 s (cell_timeout_s of profile 'small')"),
        ("memory", ["--memory-gb", "0.6"], "more than the limit of 0.60 GB"),
        ("output", [], "printed more than 30 MB"),
    ],
)
def test_a_fault_is_named_with_its_cell_and_the_report_stays(light: Course, fault, options, message):
    before = contents(light)
    light.add("04_second", 4, needs=["03_first"], cells=light_cells("04_second", 4, FAULTS[fault]))
    status, printed = light.run("build", *options)
    light.add("04_second", 4, needs=["03_first"], cells=light_cells("04_second", 4))
    first_line = FAULTS[fault].splitlines()[0]
    assert status == 1 and message in printed and f"04_second: cell 3 ({first_line!r})" in printed
    assert printed.count("\n") <= 4, "more than the progress and one error"
    assert contents(light) == before
    assert not (light.folder / "build/small/.work").exists()


def test_a_killed_build_changes_nothing_in_the_end(light: Course):
    started = time.monotonic()
    shutil.rmtree(light.folder / "build")
    assert light.run("build")[0] == 0
    seconds, expected = time.monotonic() - started, contents(light)
    assert light.run("build", "--set", "03_first.seed=1")[0] == 0 and contents(light) != expected
    assert light.run("build")[0] == 0 and contents(light) == expected, "pages that were rendered one by one differ"
    generator = random.Random(0)
    for round in range(int(os.environ.get("BIGMODEL_KILLS", "1"))):
        if round % 2:  # over an earlier report, as a build that changed something
            light.run("build", "--set", "03_first.seed=1")
        else:
            shutil.rmtree(light.folder / "build")
        moment = generator.uniform(0, seconds)
        process = light.start("build")
        time.sleep(moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close(), process.stderr.close()
        status, printed = light.run("build")
        assert status == 0, f"killed after {moment:.2f} s: {printed}"
        assert contents(light) == expected, f"killed after {moment:.2f} s"


def test_a_second_build_waits_and_says_for_whom(light: Course):
    expected = contents(light, "results", "notebooks")
    shutil.rmtree(light.folder / "build")
    processes = [light.start("build"), light.start("build")]
    printed = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    waited, held = sorted(printed, key=lambda out: "waiting" not in out)
    owner = processes[printed.index(held)].pid
    assert f"another build (process {owner}, started 20" in waited and "0 of 2 notebooks ran; nothing to render" in waited
    assert "2 of 2 notebooks ran" in held and contents(light, "results", "notebooks") == expected


@pytest.fixture
def small_disk(light: Course, request):
    """The course's build folder on a file system of 200 MB."""
    build = light.folder / "build"
    shutil.rmtree(build)
    build.mkdir()
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root to mount a small file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(build)], capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    yield build
    subprocess.run(["umount", str(build)], check=True)


def test_a_disk_that_is_full_or_read_only_leaves_the_report(light: Course, small_disk: Path):
    assert light.run("build")[0] == 0
    before, notebook = contents(light), light.folder / "notebooks/03_first.ipynb"
    source = notebook.read_bytes()
    notebook.write_bytes(source.replace(b"**both**", b"**each**"))
    filler = small_disk / "filler"
    with pytest.raises(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(2**16))
    status, printed = light.run("build")
    assert status == 1 and "No space left on device" in printed and contents(light) == before
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    status, printed = light.run("build")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert status == 1 and "Read-only file system" in printed and printed.count("\n") == 1 and contents(light) == before
    status, printed = light.run("build")
    notebook.write_bytes(source)
    assert status == 0 and "0 of 2 notebooks ran; rendered" in printed
    assert b"<strong>each</strong>" in contents(light)["html/03_first.html"]
