"""The sweep: the same numbers wherever a run is trained, and no finished run lost, whatever is killed or damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bigmodel_utils
from bigmodel_utils import language, models
from bigmodel_utils.scaling import sweep

TINY = sweep.Run(d_model=16, n_layers=1, n_steps=3, lr=0.03)


@pytest.fixture(autouse=True, scope="module")
def no_process_is_left():
    yield
    get_reusable_executor().shutdown(wait=True, kill_workers=True)


# One run.


def test_a_run_has_the_same_bits_here_and_in_another_process(tmp_path):
    here = sweep.train_run(TINY)
    there = sweep.run_all([TINY, dataclasses.replace(TINY, seed=1)], tmp_path, n_jobs=2)
    assert there.loss[0] == here["loss"] != there.loss[1]
    assert list(there.seed) == [0, 1] and (there.n_tokens == 3 * 4 * 64).all()


@pytest.mark.parametrize(("d_model", "n_layers"), [(16, 1), (48, 2)])
def test_parameters_and_flops_are_those_of_the_model(d_model, n_layers):
    run = dataclasses.replace(TINY, d_model=d_model, n_layers=n_layers)
    found, vocab_size = sweep.train_run(run), sweep.load_tokens()[2]
    model = models.GPT(run.config(vocab_size))
    assert found["n_params"] == models.count_parameters(model)
    assert found["n_body"] == sum(w.numel() for part in (model.blocks, model.norm) for w in part.parameters())
    window = torch.zeros(1, run.context_length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(window).square().mean().backward()
    assert found["flops"] == counter.get_total_flops() * run.n_tokens // run.context_length


def test_tokens_are_the_bytes_of_the_text():
    train, held_out, vocab_size = sweep.load_tokens()
    parts = language.load_text()
    both = parts["train"] + parts["validation"]
    used = np.array(sorted(set(both.encode())), dtype=np.uint8)
    assert vocab_size == len(used)
    assert used[train].tobytes().decode() == parts["train"] and used[held_out].tobytes().decode() == parts["validation"]


def test_the_held_out_loss_is_the_mean_surprise_over_windows_spread_evenly():
    run, (_, held_out, vocab_size) = TINY, sweep.load_tokens()
    batches = sweep._held_out_batches(held_out, run.context_length)
    x, y = (torch.cat(parts) for parts in zip(*batches))
    assert x.shape == y.shape == (sweep.N_HELD_OUT, 64) and torch.equal(x[:, 1:], y[:, :-1])
    n_windows = len(held_out) // 65
    assert np.array_equal(x[0], held_out[:64]) and np.array_equal(y[-1], held_out[65 * n_windows - 64 : 65 * n_windows])
    untrained = sweep.train_run(dataclasses.replace(run, lr=0.0))["loss"]
    assert untrained == pytest.approx(np.log(vocab_size), abs=1e-5)  # the output layer starts at 0
    assert sweep.train_run(dataclasses.replace(run, n_steps=40))["loss"] < untrained - 0.5


def test_less_text_is_repeated():
    few = dataclasses.replace(TINY, n_unique=2000, n_steps=60)
    assert sweep.train_run(few)["loss"] > sweep.train_run(dataclasses.replace(few, n_unique=None))["loss"]


def test_a_run_that_diverges_is_a_finding():
    assert sweep.train_run(dataclasses.replace(TINY, lr=1e38, n_steps=5))["loss"] == np.inf


def change_of_the_logits(width: int, kind: str) -> float:
    """How far five steps of Adam move what a model says, root mean square."""
    torch.manual_seed(0)
    model = models.GPT(dataclasses.replace(TINY, d_model=width, n_layers=2).config(30))
    optimizer = torch.optim.Adam(sweep.parametrize(model, 0.01, kind))
    x = torch.randint(30, (8, 33), generator=torch.Generator().manual_seed(1))
    before = model(x[:, :-1]).detach()
    for _ in range(5):
        optimizer.zero_grad()
        language.cross_entropy(model(x[:, :-1]), x[:, 1:]).backward()
        optimizer.step()
    return (model(x[:, :-1]) - before).square().mean().sqrt().item()


def test_under_mup_a_step_moves_models_of_all_widths_alike():
    """The coordinate check of Yang et al. 2022, appendix D.1."""
    moved = {(kind, width): change_of_the_logits(width, kind) for kind in ("mup", "standard") for width in (16, 128)}
    assert moved["mup", 16] == moved["standard", 16]
    assert 0.5 < moved["mup", 128] / moved["mup", 16] < 2
    assert moved["standard", 128] / moved["standard", 16] > 3


def test_a_parametrization_is_one_of_two():
    model = models.GPT(TINY.config(30))
    names = {id(weight): name for name, weight in model.named_parameters()}
    wide, others = sweep.parametrize(models.GPT(dataclasses.replace(TINY, d_model=64).config(30)), 0.1, "mup")
    assert wide["lr"] == pytest.approx(0.1 / 4) and others["lr"] == 0.1
    groups = sweep.parametrize(model, 0.1)
    assert sorted(names[id(w)] for group in groups for w in group["params"]) == sorted(names.values())
    assert all(w.ndim == 2 and "embedding" not in names[id(w)] for w in groups[0]["params"])
    with pytest.raises(ValueError, match="or \"standard\"|'ntk'"):
        sweep.parametrize(model, 0.1, "ntk")
    with pytest.raises(ValueError, match="untied"):
        sweep.parametrize(models.GPT(models.GPTConfig.fast(vocab_size=9, n_layers=1, n_heads=1, d_model=16)), 0.1)


# The cache.


def slow_run(run: sweep.Run, corpus: str) -> dict[str, float]:
    """Says when it begins and ends, in a file that `run.device` names, and sleeps."""
    say(run, "begin")
    time.sleep(run.lr)
    say(run, "end")
    return {"loss": run.seed / 7}


def say(run: sweep.Run, what: str) -> None:
    with Path(run.device).open("a") as file:
        file.write(f"{what} {run.seed} {os.getpid()}\n")


def failing_run(run: sweep.Run, corpus: str) -> dict[str, float]:
    """Fails for the third seed."""
    if run.seed == 2:
        raise RuntimeError("no third seed")
    return slow_run(run, corpus)


def runs_that_log(log: Path, n: int, seconds: float = 0.0) -> list[sweep.Run]:
    return [dataclasses.replace(TINY, seed=seed, lr=seconds, device=str(log)) for seed in range(n)]


def events(log: Path) -> list[tuple[str, int, int]]:
    if not log.exists():
        return []
    return [(what, int(seed), int(pid)) for what, seed, pid in map(str.split, log.read_text().splitlines())]


def count(log: Path, what: str) -> Counter:
    return Counter(seed for kind, seed, _ in events(log) if kind == what)


def test_a_finished_run_is_never_trained_again(tmp_path):
    log, runs = tmp_path / "log", runs_that_log(tmp_path / "log", 4)
    sweep.run_all(runs[:2], tmp_path, n_jobs=1, train_one=slow_run)
    table = sweep.run_all([*runs, runs[3]], tmp_path, n_jobs=1, train_one=slow_run)
    assert list(table.loss) == [0, 1 / 7, 2 / 7, 3 / 7, 3 / 7]
    assert count(log, "end") == dict.fromkeys(range(4), 1)


def test_what_is_finished_stays_when_another_run_fails(tmp_path):
    log, runs = tmp_path / "log", runs_that_log(tmp_path / "log", 4)
    with pytest.raises(RuntimeError, match="no third seed"):
        sweep.run_all(runs, tmp_path, n_jobs=1, train_one=failing_run)
    assert count(log, "end") == {0: 1, 1: 1}
    with pytest.raises(RuntimeError, match="no third seed"):
        sweep.run_all(runs, tmp_path, n_jobs=1, train_one=failing_run)
    assert count(log, "begin") == {0: 1, 1: 1}


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b.replace(b"0.0", b"0.1"), lambda b: b"", lambda b: b"\xff" * 90]
)
def test_a_damaged_entry_is_trained_again(tmp_path, damage):
    log, runs = tmp_path / "log", runs_that_log(tmp_path / "log", 2)
    expected = sweep.run_all(runs, tmp_path, n_jobs=1, train_one=slow_run)
    path = next(p for p in tmp_path.glob("*.json") if b'"seed": 0' in p.read_bytes())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged: this run is trained again"):
        again = sweep.run_all(runs, tmp_path, n_jobs=1, train_one=slow_run)
    assert again.equals(expected) and count(log, "end") == {0: 2, 1: 1}
    assert sweep.run_all(runs, tmp_path, n_jobs=1, train_one=slow_run).equals(expected)


def test_an_entry_says_what_it_is_of(tmp_path):
    sweep.run_all([TINY], tmp_path, n_jobs=1)
    body = json.loads(next(tmp_path.glob("*.json")).read_text().partition("\n")[2])
    assert sweep.Run(**body["run"]) == TINY and body["result"]["loss"] == sweep.train_run(TINY)["loss"]


def test_every_part_of_a_run_is_in_its_name():
    other = {"parametrization": "standard", "device": "cuda", "warmup_steps": 7, "n_unique": 500}
    keys = {sweep._key(TINY, "x"), sweep._key(TINY, "y")}
    for field in dataclasses.fields(sweep.Run):
        value = other.get(field.name) or getattr(TINY, field.name) + 1
        keys.add(sweep._key(dataclasses.replace(TINY, **{field.name: value}), "x"))
    assert len(keys) == 2 + len(dataclasses.fields(sweep.Run))


def test_other_code_or_another_text_is_another_sweep(tmp_path, monkeypatch):
    before = {
        sweep.fingerprint(sweep.train_run, "kjv"),
        sweep.fingerprint(slow_run, "kjv"),
        sweep.fingerprint(failing_run, "kjv"),
    }
    assert len(before) == 3 and sweep.fingerprint(sweep.train_run, "kjv") in before
    train, held_out, vocab_size = sweep.load_tokens()
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "load_tokens", lambda corpus: (train[:-1], held_out, vocab_size))
        assert sweep.fingerprint(sweep.train_run, "kjv") not in before
    copy = tmp_path / "optim.py"
    copy.write_text(Path(sweep.optim.__file__).read_text() + "\n# changed\n")
    monkeypatch.setattr(sweep.optim, "__file__", str(copy))
    assert sweep.fingerprint(sweep.train_run, "kjv") not in before


def test_the_hashed_code_is_the_code_that_runs():
    """Every function of the package that a run calls lies in a hashed file; but for checkpoints, which are off."""
    package, called = Path(bigmodel_utils.__file__).parent, set()

    def note(frame, event, argument):
        called.add(frame.f_code.co_filename)

    sweep.load_tokens.cache_clear()
    sys.setprofile(note)
    try:
        sweep.train_run(TINY)
    finally:
        sys.setprofile(None)
    ours = {path for path in called if Path(path).is_relative_to(package)}
    hashed = {module.__file__ for module in sweep.CODE} | {sweep.__file__}
    assert len(ours) > 5 and ours <= hashed, ours - hashed


# What is killed.


def kill_in_mid_run(log: Path, n_finished: int) -> threading.Thread:
    """Kill the process whose run has just begun, once that many have ended."""

    def wait_and_kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            seen = events(log)
            if sum(what == "end" for what, _, _ in seen) >= n_finished and seen[-1][0] == "begin":
                os.kill(seen[-1][2], signal.SIGKILL)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


def test_a_killed_local_worker_costs_its_own_run_alone(tmp_path):
    log, runs = tmp_path / "log", runs_that_log(tmp_path / "log", 8, seconds=0.3)
    killer = kill_in_mid_run(log, 3)
    with pytest.raises(TerminatedWorkerError):
        sweep.run_all(runs, tmp_path, n_jobs=2, train_one=slow_run)
    killer.join()
    finished = count(log, "end")
    assert 3 <= len(finished) < 8
    table = sweep.run_all(runs, tmp_path, n_jobs=2, train_one=slow_run)
    assert list(table.loss) == [seed / 7 for seed in range(8)]
    again = sum(count(log, "begin").values()) - 8
    assert 1 <= again <= 2, "begun twice: the killed run, and that of the other worker, which joblib stops with it"


@pytest.mark.filterwarnings("default")  # distributed tells of the killed worker by warnings of its own
def test_a_killed_worker_of_a_dask_cluster_loses_no_run(tmp_path):
    from dask.distributed import Client, LocalCluster

    log, runs = tmp_path / "log", runs_that_log(tmp_path / "log", 10, seconds=0.4)
    settings = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with LocalCluster(local_directory=str(tmp_path), **settings) as cluster, Client(cluster):
        killer = kill_in_mid_run(log, 4)
        with joblib.parallel_config(backend="dask"):
            table = sweep.run_all(runs, tmp_path / "cache", train_one=slow_run)
            killer.join()
            there = sweep.run_all([TINY], tmp_path / "cache")
    assert there.loss[0] == sweep.train_run(TINY)["loss"], "a cluster trains what this process trains"
    assert list(table.loss) == [seed / 7 for seed in range(10)]
    begun, ended = count(log, "begin"), count(log, "end")
    assert ended == dict.fromkeys(range(10), 1), "a finished run was trained again"
    assert sum(begun.values()) == 11, "the killed run, and no other, was begun twice"
    pids = {pid for _, _, pid in events(log)}
    assert len(pids) >= 2 and os.getpid() not in pids, "the workers did the work"
