"""The first code cell of every notebook: in Colab it installs the package; elsewhere it does nothing.

The course's public address is one setting, `repository` in pyproject.toml's [tool.bigmodel]; `make badges` writes it
into the notebooks and the README.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

CELL = """\
# In Colab this installs the course's package and keeps what Colab has preinstalled; elsewhere it does nothing.
import importlib.util
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("bigmodel_utils") is None:
    import glob
    import importlib.metadata
    import subprocess

    wheels = glob.glob("/content/bigmodel_utils-*.whl")  # uploaded by hand: the README says how
    package = "{package}" or (wheels[-1] if wheels else None)
    if package is None:
        raise SystemExit("Upload bigmodel_utils-*.whl (made by `make wheel`) to Colab's files, then run this cell again.")
    with open("/content/constraints.txt", "w") as file:
        for name in ("torch", "numpy", "pandas", "matplotlib", "jax"):
            if importlib.util.find_spec(name):
                file.write(f"{{name}}=={{importlib.metadata.version(name).partition('+')[0]}}\\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", "/content/constraints.txt", package]
    subprocess.run(command, check=True)"""

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def repository(course: Path) -> str:
    """The public address of the course such as "https://github.com/owner/name", or "" while it has none."""
    settings = tomllib.loads((course / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"]["bigmodel"]["repository"].rstrip("/")


def source(repository: str) -> str:
    """The bootstrap cell's source for that address."""
    return CELL.format(package=f"bigmodel-utils @ git+{repository}" if repository else "")


def badge(repository: str, notebook: str) -> str:
    """Markdown that opens a notebook in Colab, or "" without an address on GitHub."""
    prefix = "https://github.com/"
    if not repository.startswith(prefix):
        return ""
    address = f"https://colab.research.google.com/github/{repository.removeprefix(prefix)}/blob/main/notebooks/{notebook}.ipynb"
    return f"[![Open in Colab]({BADGE})]({address})"
