"""The runner: executes the notebooks that changed, each in a process of its own, and keeps whole results only.

What a notebook depends on is hashed by content: its code cells, its parameters, the results of the notebooks it needs,
the package modules it imports, and the locked versions. Prose is not among them: editing it retrains nothing.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bigmodel_utils import host, results
from bigmodel_utils.report import ReportError, chapters
from bigmodel_utils.report.chapters import Chapter
from bigmodel_utils.report.environment import visible
from bigmodel_utils.report.profiles import Profile


@dataclass(frozen=True)
class Build:
    """One profile's build folder and what lies where in it."""

    folder: Path

    def notebook(self, name: str) -> Path:
        """The executed notebook."""
        return self.folder / "notebooks" / f"{name}.ipynb"

    def results(self, name: str) -> Path:
        """Its results file."""
        return self.folder / "results" / f"{name}.json"

    def artifacts(self, name: str) -> Path:
        """The folder of the files that it leaves for later notebooks."""
        return self.folder / "artifacts" / name

    def record(self, name: str) -> Path:
        """What the runner knows of its last whole run: key, checksums, seconds."""
        return self.folder / "runs" / f"{name}.json"

    def partial(self, name: str) -> Path:
        """The notebook as far as it came, where its last run failed."""
        return self.folder / "failed" / f"{name}.ipynb"

    def work(self, name: str) -> Path:
        """Where a run writes until it is whole."""
        return self.folder / ".work" / name


BUILD_VARIABLE = "BIGMODEL_BUILD"  # marks a build and every process that it started


@contextmanager
def locked(build: Build) -> Iterator[None]:
    """Hold the build folder against a second build of the same profile; waits for it to end.

    The lock is the operating system's, which frees it when its holder dies; what a killed holder had started is ended.
    """
    from filelock import FileLock, Timeout

    build.folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(build.folder / ".lock"), build.folder / ".holder.json"
    try:
        lock.acquire(timeout=1)  # by when another holder has said who it is
    except Timeout:
        who = _read_json(holder) or {"process": "unknown", "started": "just now"}
        print(
            f"another build (process {who['process']}, started {who['started']}) is using {build.folder}; "
            "waiting for it to end (Ctrl-C gives up)",
            flush=True,
        )
        lock.acquire()
    try:
        if killed := _read_json(holder):
            _end_processes_of(killed["build"])
        os.environ[BUILD_VARIABLE] = uuid.uuid4().hex
        who = {"process": os.getpid(), "started": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "build": os.environ[BUILD_VARIABLE]}
        results.write_atomically(holder, json.dumps(who).encode())
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _end_processes_of(killed_build: str) -> None:
    """Kill what a killed build left running (notebooks, Sphinx), before it writes into the next build's folders."""
    import psutil

    left = [process for process in psutil.process_iter(["environ"]) if process.pid != os.getpid()]
    left = [process for process in left if (process.info["environ"] or {}).get(BUILD_VARIABLE) == killed_build]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def run_all(
    course: list[Chapter], profile: Profile, build: Build, n_jobs: int = 1, memory_limit_bytes: float | None = None
) -> list[str]:
    """Execute every notebook of the course that is out of date, up to `n_jobs` at a time, in the order of their needs.

    Args:
        memory_limit_bytes: for each notebook; by default nine tenths of what the machine, or its container, has free when it begins.

    Returns:
        the names of the notebooks that ran.

    Raises:
        ReportError: naming the first notebook that failed, its cell, the error and the partial output. Notebooks that
            do not need it run to their end first, and every whole result stays.
    """
    _check_needs(course)
    shutil.rmtree(build.folder / ".work", ignore_errors=True)  # what a killed build left
    waiting, done, failures, ran = list(course), set(), {}, []
    running: dict[str, tuple[subprocess.Popen, str, float]] = {}
    try:
        while waiting or running:
            for chapter in [chapter for chapter in waiting if failures.keys() & set(chapter.needs)]:
                waiting.remove(chapter)
                failures[chapter.name] = f"not run, since it needs {', '.join(sorted(failures.keys() & set(chapter.needs)))}"
            ready = [chapter for chapter in waiting if done.issuperset(chapter.needs)]
            for chapter in ready[: n_jobs - len(running)]:
                waiting.remove(chapter)
                key = content_key(chapter, profile, build)
                if is_current(chapter.name, key, build):
                    done.add(chapter.name)
                    continue
                print(f"{chapter.name}: running", flush=True)
                running[chapter.name] = (_begin(chapter, profile, build, memory_limit_bytes), key, time.monotonic())
            for name, (process, key, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                failure = _finish(name, process, key, time.monotonic() - started, build)
                if failure:
                    failures[name] = failure
                    print(f"{name}: FAILED", flush=True)
                else:
                    done.add(name)
                    ran.append(name)
                    print(f"{name}: done in {time.monotonic() - started:.0f} s", flush=True)
            if running:
                time.sleep(0.05)
    finally:
        _stop([process for process, _, _ in running.values()])
        shutil.rmtree(build.folder / ".work", ignore_errors=True)
    if failures:
        raise ReportError("\n".join(f"{name}: {failure}" for name, failure in failures.items()))
    return ran


def content_key(chapter: Chapter, profile: Profile, build: Build) -> str:
    """The hash of everything that the notebook's outputs depend on."""
    course = chapters.folder()
    code = [chapters.text(cell) for cell in chapter.cells("code")]
    upstream = {}
    for name in chapter.needs:
        files = sorted(path for path in build.artifacts(name).rglob("*") if path.is_file())
        record = results.read(build.results(name))
        upstream[name] = [record["values"], record["claims"], *map(file_hash, files)]
    depends_on = {
        "code": code,
        "parameters": profile.resolved(chapter),
        "upstream": upstream,
        "modules": {str(path.relative_to(course)): file_hash(path) for path in imported_modules(code)},
        "constraints": file_hash(course / "constraints.txt"),
        "versions": results.versions() | {"python": platform.python_version()},
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def imported_modules(code: list[str]) -> set[Path]:
    """The files of this package that some code cells import, directly or through one another."""
    root = Path(results.__file__).resolve().parent
    found: set[Path] = set()
    waiting = [name for source in code for name in _imported_names(source)]
    while waiting:
        path = _module_path(root, waiting.pop())
        if path is not None and path not in found:
            found.add(path)
            waiting += _imported_names(path.read_text(encoding="utf-8"))
    return found


def is_current(name: str, key: str, build: Build) -> bool:
    """Whether a whole run under that key is there and its files are as it left them; says so where they are damaged."""
    record = _read_json(build.record(name))
    if record is None or record["key"] != key:
        return False
    for path, expected in ((build.results(name), record["results_sha256"]), (build.notebook(name), record["notebook_sha256"])):
        if not path.is_file() or file_hash(path) != expected:
            print(f"{name}: {path} is missing or damaged; running it again", flush=True)
            return False
    return True


def _begin(chapter: Chapter, profile: Profile, build: Build, memory_limit_bytes: float | None) -> subprocess.Popen:
    work = build.work(chapter.name)
    work.mkdir(parents=True)
    (work / "profile.json").write_text(json.dumps(vars(profile)))
    environment = visible(os.environ) | {results.OUTPUT_VARIABLE: str(work), results.UPSTREAM_VARIABLE: str(build.folder)}
    environment |= {"TQDM_DISABLE": "1"}  # nobody watches, and a bar would stay in the outputs
    command = [sys.executable, "-m", "bigmodel_utils.report", "execute", str(chapter.path), str(work)]
    command += ["--memory-bytes", str(memory_limit_bytes or 0.9 * host.available_memory_bytes())]
    with (work / "log.txt").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _finish(name: str, process: subprocess.Popen, key: str, seconds: float, build: Build) -> str:
    """Move a whole run into place, its record last; returns what went wrong, or ""."""
    work = build.work(name)
    notebook, values = work / f"{name}.ipynb", work / "results" / f"{name}.json"
    if process.returncode == 0 and values.is_file():
        build.record(name).unlink(missing_ok=True)
        for folder in (build.notebook(name).parent, build.results(name).parent, build.artifacts(name).parent):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(build.artifacts(name), ignore_errors=True)
        if (work / "artifacts" / name).is_dir():
            (work / "artifacts" / name).rename(build.artifacts(name))
        notebook.replace(build.notebook(name))
        values.replace(build.results(name))
        record = {
            "key": key,
            "results_sha256": file_hash(build.results(name)),
            "notebook_sha256": file_hash(build.notebook(name)),
            "seconds": round(seconds, 1),
        }
        results.write_atomically(build.record(name), json.dumps(record, indent=1).encode())
        build.partial(name).unlink(missing_ok=True)
        return ""
    if process.returncode == 0:
        return f"saved no results: its last cell must call results.save, under the name {name!r}"
    if notebook.is_file():
        build.partial(name).parent.mkdir(exist_ok=True)
        notebook.replace(build.partial(name))
    return _failure_message(work, build.partial(name))


def _failure_message(work: Path, partial: Path) -> str:
    if shutil.disk_usage(work).free < 2**20:
        return f"the disk is full (less than 1 MiB is free at {partial.parent.parent}): make room and build again"
    status = _read_json(work / "status.json")
    if status is None:
        lines = (work / "log.txt").read_text(errors="replace").strip().splitlines()
        return "ended without a word" if not lines else f"{lines[-1]}"
    where = ""
    if "cell" in status:
        first_line = next((line for line in status["source"].splitlines() if line.strip()), "")
        where = f"cell {status['cell']} ({first_line.strip()!r}): "
    shown = f"\n  partial output: {partial}" if partial.is_file() else ""
    return f"{where}{status['error']}{shown}"


def _stop(processes: list[subprocess.Popen]) -> None:
    """Interrupt running notebooks, as Ctrl-C does, and end those that do not heed it."""
    for process in processes:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _check_needs(course: list[Chapter]) -> None:
    names = [chapter.name for chapter in course]
    for position, chapter in enumerate(course):
        unknown = [need for need in chapter.needs if need not in names[:position]]
        if unknown:
            raise ReportError(f"{chapter.name} needs {', '.join(unknown)}, which is no earlier notebook")


def _imported_names(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.split(".")[0] == "bigmodel_utils"]


def _module_path(root: Path, name: str) -> Path | None:
    stem = root.joinpath(*name.split(".")[1:])
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def _read_json(path: Path) -> dict | None:
    """What a file holds, or None where it is missing or was cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
