"""Results files: the numbers of one notebook with their provenance, and the artifacts beside them.

A results file is ``results/<notebook>.json`` below the build folder. It holds the values, the claims, and where they
come from: parameters, commit, versions, hardware, seconds, memory. Its checksum is verified when it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from bigmodel_utils import claims

OUTPUT_VARIABLE = "BIGMODEL_OUTPUT"  # where a notebook writes; set by the report's runner
UPSTREAM_VARIABLE = "BIGMODEL_UPSTREAM"  # where the results of earlier notebooks are; set by the report's runner
EPOCH_VARIABLE = "SOURCE_DATE_EPOCH"
VERSIONS_OF = ("torch", "numpy", "pandas", "scipy", "scikit-learn", "matplotlib", "rdkit")


class ResultsError(Exception):
    """A results file is missing or damaged; the message says which, and the way out."""


def course_folder() -> Path | None:
    """The checkout this package is run from, or None for an installed package (Colab)."""
    folder = Path(__file__).resolve().parent.parent
    return folder if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file() else None


def output_folder() -> Path:
    """Where this process writes: the runner's folder for this notebook, else build/interactive."""
    return Path(os.environ.get(OUTPUT_VARIABLE) or (course_folder() or Path.cwd()) / "build" / "interactive")


def save(values: Mapping[str, Any]) -> Path:
    """Write the running notebook's results file: `values`, the claims checked so far, and their provenance.

    Args:
        values: JSON-able numbers, strings, lists and mappings of them; numpy and torch scalars are converted.

    Returns:
        the path of the file.

    Raises:
        RuntimeError: where `notebook.start` was not called, so that the file has no name.
        TypeError: for a value that JSON cannot hold.
    """
    from bigmodel_utils import device, notebook  # here: the report reads results without torch

    run = notebook.current()
    record = {
        "name": run.name,
        "values": json.loads(json.dumps(values, default=_plain)),
        "claims": [asdict(claim) for claim in claims.ledger],
        "provenance": {
            "parameters": run.parameters,
            "date": now().isoformat(timespec="seconds"),
            **git_state(),
            "python": platform.python_version(),
            "versions": versions(),
            "hardware": hardware(),
            "device": run.device_name,
            "seconds": None if is_reproducible() else run.seconds(),
            "peak_memory_bytes": None if is_reproducible() else device.peak_memory_bytes(),
            "predicted": run.predicted,
        },
    }
    record["sha256"] = _checksum(record)
    path = output_folder() / "results" / f"{run.name}.json"
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return path


def load(name: str) -> dict[str, Any]:
    """The values that notebook `name` saved, from this run's folder or from the build's.

    Raises:
        ResultsError: where there is no such file, or it is damaged.
    """
    for folder in _read_folders():
        path = folder / "results" / f"{name}.json"
        if path.is_file():
            return read(path)["values"]
    raise ResultsError(f"no results of {name!r} yet: run notebooks/{name}.ipynb first, or `make report`")


def read(path: Path) -> dict[str, Any]:
    """A whole results file, its checksum verified.

    Raises:
        ResultsError: where the file is missing, not JSON, or does not match its checksum.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        intact = record.get("sha256") == _checksum({key: record[key] for key in record if key != "sha256"})
    except FileNotFoundError:
        raise ResultsError(f"{path} is missing: run its notebook again (`make report` does)") from None
    except (ValueError, AttributeError):
        intact = False
    if not intact:
        raise ResultsError(f"{path} is damaged (its checksum does not match): delete it and run its notebook again")
    return record


def published_claims() -> list[claims.Claim]:
    """Every claim of the course's other notebooks, in their order.

    In a build they are those of the build; elsewhere those in the committed notebooks' stored outputs, whatever else was
    run on this machine; without a checkout (Colab) there are none.

    Raises:
        ResultsError: in a build, where a notebook has not run.
    """
    from bigmodel_utils import notebook

    course, upstream = course_folder(), os.environ.get(UPSTREAM_VARIABLE)
    found: list[dict[str, Any]] = []
    for path in sorted((course / "notebooks").glob("[0-9][0-9]_*.ipynb")) if course else []:
        if path.stem == notebook.current().name:
            continue
        if upstream:
            found += read(Path(upstream) / "results" / f"{path.stem}.json")["claims"]
        else:
            found += claims.stored(json.loads(path.read_text(encoding="utf-8"))).values()
    return [claims.Claim(**claim) for claim in found]


def artifact_path(name: str) -> Path:
    """Where this notebook writes a file that a later one may need (a model, say); its folder is made.

    Args:
        name: such as "05_train_mlp/mlp.safetensors", the notebook's name first.
    """
    path = output_folder() / "artifacts" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def find_artifact(name: str) -> Path | None:
    """The artifact that an earlier notebook left, or None where it has not run."""
    paths = (folder / "artifacts" / name for folder in _read_folders())
    return next((path for path in paths if path.is_file()), None)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when all went well: synced, then renamed.

    A full disk or a kill leaves whatever was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # the new name itself, against a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing, as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def is_reproducible() -> bool:
    """Whether this run is asked to give the same bytes as another one of the same sources: no clock is read then."""
    return EPOCH_VARIABLE in os.environ


def now() -> datetime:
    """The time, or the one that SOURCE_DATE_EPOCH declares (seconds since 1970, https://reproducible-builds.org/specs/source-date-epoch/)."""
    return datetime.fromtimestamp(int(os.environ[EPOCH_VARIABLE]), UTC) if is_reproducible() else datetime.now(UTC)


def git_state() -> dict[str, Any]:
    """{"commit": the checkout's commit or None, "dirty": whether tracked files differ from it, or None}."""
    folder = course_folder()
    if folder is None:
        return {"commit": None, "dirty": None}
    git = lambda *words: subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True)  # noqa: E731
    try:
        commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:  # no git on this machine
        return {"commit": None, "dirty": None}
    if commit.returncode:
        return {"commit": None, "dirty": None}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def versions() -> dict[str, str]:
    """The installed versions of the packages that numbers depend on."""
    found = {}
    for package in VERSIONS_OF:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes and operating system of this machine."""
    import psutil

    return {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _read_folders() -> list[Path]:
    upstream = os.environ.get(UPSTREAM_VARIABLE)
    return [output_folder()] + ([Path(upstream)] if upstream else [])


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _plain(value: Any) -> Any:
    for convert in ("tolist", "item"):  # numpy arrays and scalars, torch tensors
        if hasattr(value, convert):
            return getattr(value, convert)()
    raise TypeError(f"results hold numbers, strings, lists and mappings, not {type(value).__name__}")
