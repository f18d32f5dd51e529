"""Several processes, one program: started by torchrun, each a *rank* with a device of its own.

`run` starts the ranks from a notebook or a test and brings their answer back; `start` is what each rank begins with.
The same program runs on CPUs, where ranks talk through gloo, and on GPUs, where they talk through NCCL.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class LaunchError(RuntimeError):
    """The ranks failed, or did not end in time; the message has the end of what they printed."""


def run(
    *jobs: str | dict[str, dict[str, Any]],
    n_ranks: int = 2,
    n_nodes: int = 1,
    max_restarts: int = 0,
    timeout_s: float = 120.0,
) -> dict[str, Any]:
    """Start ranks by torchrun, let them do jobs one after the other, and return the answers.

    It is `torchrun --standalone --nproc-per-node n_ranks -m bigmodel_utils.distributed JOB NAME=VALUE ...`.

    Args:
        jobs: names in `distributed.__main__.JOBS`, or {name: options}.
        n_ranks: processes in all.
        n_nodes: torchrun's agents that they are shared out to, as if each were a host; they meet at a free port.
        max_restarts: how often torchrun may start all ranks again after one has died.
        timeout_s: after so many seconds all are ended, so that a rank that waits for ever is an error and no riddle.

    Returns:
        {name: answer of rank 0}.

    Raises:
        ValueError: where the nodes cannot have equally many ranks.
        LaunchError: where a rank fails, or the time is over.
    """
    if n_ranks < 1 or n_nodes < 1 or n_ranks % n_nodes:
        raise ValueError(f"{n_ranks} ranks cannot be shared out evenly to {n_nodes} nodes")
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "answer.json"), Path(folder, "log.txt")
        program = ["-m", "bigmodel_utils.distributed", "--out", str(answer), "--timeout", str(timeout_s), *as_words(jobs)]
        common = ["--nproc-per-node", str(n_ranks // n_nodes), "--max-restarts", str(max_restarts), "--monitor-interval", "0.1"]
        common += ["--log-dir", folder]  # or torchrun leaves folders behind
        with log.open("w") as file:
            agents = [
                _agent([*meeting, *common, *program], file, _own_gpus(node, n_nodes, n_ranks))
                for node, meeting in enumerate(_meetings(n_nodes))
            ]
            try:
                _wait(agents, timeout_s, log)
            finally:
                _end(agents)
        return json.loads(answer.read_text())


def as_words(jobs: tuple[str | dict[str, dict[str, Any]], ...]) -> list[str]:
    """Jobs and their options as words of a command line: [name, "option=value", ..., name, ...], values in JSON."""
    words = []
    for job in jobs:
        for name, options in ({job: {}} if isinstance(job, str) else job).items():
            words += [name, *(f"{key}={json.dumps(value)}" for key, value in options.items())]
    return words


def _meetings(n_nodes: int) -> list[list[str]]:
    """How each agent finds the others: alone, or at a port of this machine, which the first of them opens."""
    if n_nodes == 1:
        return [["--standalone"]]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = ["--nnodes", str(n_nodes), "--rdzv-backend", "c10d", "--rdzv-id", str(port), "--rdzv-endpoint", f"localhost:{port}"]
    return [[*place, "--rdzv-conf", f"is_host={int(node == 0)}"] for node in range(n_nodes)]


def _own_gpus(node: int, n_nodes: int, n_ranks: int) -> dict[str, str]:
    """Each agent's share of this machine's GPUs: every one numbers those that it sees from 0. None where they do not suffice."""
    if n_nodes == 1:
        return {}
    n_local, enough = n_ranks // n_nodes, torch.cuda.device_count() >= n_ranks
    own = range(node * n_local, (node + 1) * n_local) if enough else ()
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own))}


def _agent(words: list[str], log: Any, gpus: dict[str, str]) -> subprocess.Popen:
    # Without the last one the agents keep one store of addresses for all attempts (torch 2.13), and a rank that looks another
    # one up before that has written its new address finds the address of a dead process.
    settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    course = str(Path(__file__).resolve().parents[2])  # so that the ranks import this package, installed or not
    path = os.pathsep.join(filter(None, [course, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    environment = os.environ | settings | gpus | {"PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _wait(agents: list[subprocess.Popen], timeout_s: float, log: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while (codes := [agent.poll() for agent in agents]).count(0) < len(agents):
        if any(codes):
            raise LaunchError(f"a rank failed. The end of what the ranks printed:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise LaunchError(f"the ranks did not end within {timeout_s:g} s. The end of what they printed:\n{_tail(log)}")
        time.sleep(0.05)


def _tail(log: Path, n_lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-n_lines:])


def _end(agents: list[subprocess.Popen]) -> None:
    """End agents that still run, and their ranks, which are no longer theirs to end where they hang."""
    import psutil

    family = []
    for agent in agents:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for agent in agents:
        agent.wait()


@contextlib.contextmanager
def start(timeout_s: float = 60.0) -> Iterator[torch.device]:
    """Join the group of ranks that torchrun started, and leave it at the end; yields this rank's device.

    A GPU for each rank of this host and NCCL where there are as many, else CPUs and gloo. One thread a rank on a CPU.

    Args:
        timeout_s: a message that has not come by then is an error.
    """
    local_rank, n_local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= n_local
    device = torch.device("cuda", local_rank) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("nccl" if has_gpus else "gloo", timeout=limit, device_id=device if has_gpus else None)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def mesh_of(n_ranks: int, device: torch.device) -> DeviceMesh:
    """The group of `n_ranks` ranks that this one belongs to: ranks 0 ... n - 1 are one, the next n another, and so on.

    Every rank must call it, as a group is made by all.

    Raises:
        ValueError: where n_ranks does not divide the number of all ranks.
    """
    n_all = dist.get_world_size()
    if n_ranks < 1 or n_all % n_ranks:
        raise ValueError(f"{n_all} ranks do not divide into groups of {n_ranks}")
    return init_device_mesh(device.type, (n_all // n_ranks, n_ranks), mesh_dim_names=("group", "rank"))["rank"]
