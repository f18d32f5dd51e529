"""`torchrun --standalone --nproc-per-node 4 -m bigmodel_utils.distributed compare n_layers=8 bubble`: jobs, one after the other."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from bigmodel_utils.distributed import launch

# What ranks can do, and the module it is in, imported only where it is asked for: to import takes longer than most jobs.
JOBS = {
    "compare": "compare",
    "ring": "lessons",
    "bubble": "lessons",
    "speed": "lessons",
    "link": "lessons",
    "train": "elastic",
}


def parse(words: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """[(job, options), ...] of words such as ["compare", "n_layers=8", "bubble"]; values are JSON, or else plain strings."""
    found: list[tuple[str, dict[str, Any]]] = []
    for word in words:
        name, given, value = word.partition("=")
        if not given:
            if name not in JOBS:
                raise SystemExit(f"unknown job {name!r}: choose from {', '.join(JOBS)}")
            found.append((name, {}))
        elif not found:
            raise SystemExit(f"{word} belongs to no job: name the job first")
        else:
            found[-1][1][name] = _value(value)
    return found


def job(name: str) -> Callable[..., Any]:
    """The function of that name; every rank calls it with its device and the options."""
    return getattr(importlib.import_module(f"bigmodel_utils.distributed.{JOBS[name]}"), name)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@record
def main() -> None:
    """Do the jobs; the first rank writes their answers, or prints them."""
    parser = argparse.ArgumentParser(prog="torchrun ... -m bigmodel_utils.distributed")
    parser.add_argument("words", nargs="+", metavar="JOB [NAME=VALUE ...]", help=", ".join(JOBS))
    parser.add_argument("--out", type=Path, help="a file for the answers, JSON; else they are printed")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that a rank waits for a message")
    options = parser.parse_args()
    with launch.start(options.timeout) as device:
        answers = {name: job(name)(device, **given) for name, given in parse(options.words)}
        if dist.get_rank() == 0:
            text = json.dumps(answers, indent=1)
            print(text) if options.out is None else options.out.write_text(text)


if __name__ == "__main__":
    main()
