"""How long a report takes: cold, with nothing changed, and after an edit of prose; and how large it is.

Works on a copy of the checkout in a temporary folder, with this environment: `make bench`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, profile: str) -> float:
    """Seconds of one build."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "bigmodel_utils.report", "build", "--profile", profile]
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main(profile: str) -> None:
    """Print the table for one profile."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "course"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".venv", "build", ".git", "__pycache__"))
        times = {"cold": build(folder, profile), "nothing changed": build(folder, profile)}
        edited = sorted((folder / "notebooks").glob("03_*.ipynb"))[0]
        edited.write_text(
            edited.read_text(encoding="utf-8").replace("## Sources", "## Sources\\n\\nOne more sentence.", 1), encoding="utf-8"
        )
        times["after an edit of prose"] = build(folder, profile)
        site = folder / "build" / profile
        sizes = {
            "HTML site": sum(path.stat().st_size for path in (site / "html").rglob("*") if path.is_file()),
            "its pages": sum(path.stat().st_size for path in (site / "html").glob("*.html")),
            "its figures": sum(path.stat().st_size for path in (site / "html" / "_images").glob("*")),
            "PDF": (site / "report.pdf").stat().st_size,
        }
    print(f"profile {profile}")
    for name, seconds in times.items():
        print(f"  {name:24} {seconds:8.1f} s")
    for name, n_bytes in sizes.items():
        print(f"  {name:24} {n_bytes / 1e6:8.1f} MB")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["small"]))
