"""Runs that are killed: what they saved is whole, and what they would have become they become, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_checkpoint import file_of, names, same
from torch import nn

from bigmodel_utils import checkpoint, data, device, optim, train
from bigmodel_utils.models import GPT, MLP, GPTConfig, MLPConfig

N_VALUES = 100_000  # 0.8 MB
MAX_DELAY_S = 0.04  # one to four saves


def in_process(call: str) -> subprocess.CompletedProcess:
    """Call a function of this file in a process of its own.

    On one thread, as here: two add up in another order, and do not outlive a fork.
    """
    command = [sys.executable, "-c", f"import test_resume, torch\ntorch.set_num_threads(1)\ntest_resume.{call}"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)


def weights_of(step: int) -> torch.Tensor:
    return torch.arange(N_VALUES) + step


def save_forever(path: str, asynchronous: bool, told: int) -> None:
    """Go on from the newest checkpoint, and save without a pause; every step that is safe is written to `told`."""
    fsync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.005), fsync(descriptor))  # a folder in memory would be too fast to be hit
    folder = checkpoint.Folder(path, asynchronous=asynchronous)
    step, _ = folder.latest() or (0, None)
    weights = weights_of(step)
    os.write(told, b"%d\n" % step)
    while True:
        step += 1
        weights += 1
        folder.save({"weights": weights, "note": [step, "a step"]}, step)
        os.write(told, b"%d\n" % (step - asynchronous))


def kill_often(path: str, asynchronous: bool, n_kills: int) -> None:
    """Kill one saving process after the other; print a line about each: what was promised, and what is there."""
    draw = random.Random(0)
    for _ in range(n_kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_forever(path, asynchronous, writer)
            finally:
                os._exit(1)
        os.close(writer)
        with open(reader, "rb") as pipe:
            promised = pipe.readline()
            time.sleep(draw.uniform(0, MAX_DELAY_S))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            promised = int((promised + pipe.read()).split()[-1])
        step, tree = checkpoint.Folder(path).latest() or (0, {"weights": weights_of(0), "note": [0, "a step"]})
        whole = torch.equal(tree["weights"], weights_of(step)) and tree["note"] == [step, "a step"]
        torn = any(f".{child}.part" in name for name in os.listdir(path)) if os.path.exists(path) else False
        record = {"killed": os.WTERMSIG(status) == signal.SIGKILL, "promised": promised, "step": step, "whole": whole}
        print(json.dumps(record | {"torn": torn}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork, which makes a hundred processes in seconds")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_hundred_kills_leave_a_checkpoint_that_is_whole_and_the_last_promised(tmp_path, asynchronous):
    path = str(tmp_path / "run")
    process = in_process(f"kill_often({path!r}, {asynchronous}, n_kills=100)")
    records = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(records) == 100, process.stderr
    assert all(record["killed"] and record["whole"] and record["step"] >= record["promised"] for record in records)
    assert "damaged" not in process.stderr  # `latest` had nothing to skip
    assert sum(record["torn"] for record in records) >= 20  # kills that fell into a write
    last = records[-1]["step"]
    assert last >= 10
    checkpoint.Folder(path, asynchronous=False).save({}, last + 1)
    assert names(path) == [file_of(step) for step in range(last - 1, last + 2)]


N_STEPS, EVERY, KILLED_AT = 12, 3, 8  # the step 6, half of all, is the last that is saved


def mlp():
    """A regression with dropout, Adam and a norm limit: 3 epochs of 4 batches."""
    model = MLP(MLPConfig((5, 8, 8, 1), dropout=0.3))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 5, generator=generator)
    batches = data.Batches(data.Split(x, x[:, :1] * x[:, 1:2]), batch_size=8, seed=2)
    return model, batches, nn.functional.mse_loss


def gpt():
    """A language model of two layers with dropout: 2 epochs of 8 batches, of which 12 batches are seen."""
    model = GPT(GPTConfig(vocab_size=11, context_length=6, n_layers=2, n_heads=2, d_model=8, dropout=0.2))
    tokens = torch.randint(11, (32, 7), generator=torch.Generator().manual_seed(1))
    batches = data.Batches(data.Split(tokens[:, :-1], tokens[:, 1:]), batch_size=4, seed=2)
    return model, batches, lambda logits, y: nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def run(make, path: str | None = None, seed: int = 0, kill_at: int | None = None) -> tuple[dict, int]:
    """Train with everything that has a state: (all of these states, training steps that this process made)."""
    device.seed_everything(seed)
    model, batches, mean_loss = make()
    n_steps = 0

    def loss_fn(prediction, y):
        nonlocal n_steps
        n_steps += model.training
        if n_steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return mean_loss(prediction, y)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, optim.warmup(3, optim.cosine(N_STEPS)))
    history = train.fit(
        model,
        batches,
        loss_fn,
        train.TrainConfig(n_epochs=3, max_steps=N_STEPS, max_grad_norm=1.0, eval_every=5, checkpoint_every=EVERY),
        optimizer=optimizer,
        scheduler=scheduler,
        validation=data.Batches(batches.split, 16, shuffle=False),
        checkpoints=path and checkpoint.Folder(path, asynchronous=False),
    )
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "batches": batches}
    states = {name: part.state_dict() for name, part in parts.items()}
    losses = history.train_loss, history.validation_loss, history.best_epoch
    return states | {"random": device.random_state(torch.device("cpu")), "losses": losses}, n_steps


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill without warning")
@pytest.mark.parametrize("make", [mlp, gpt], ids=["mlp", "gpt"])
def test_a_run_that_was_killed_becomes_what_it_would_have_become(tmp_path, make):
    straight, n_steps = run(make)
    assert n_steps == N_STEPS
    path = str(tmp_path / "run")
    process = in_process(f"run(test_resume.{make.__name__}, {path!r}, kill_at={KILLED_AT})")
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert names(path) == [file_of(3), file_of(6)]
    resumed, n_steps = run(make, path, seed=99)
    assert n_steps == N_STEPS // 2
    assert same(resumed, straight)
    other, _ = run(make, seed=99)
    assert not same(other["model"], straight["model"])  # it was not the seed that made them equal
