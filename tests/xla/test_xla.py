"""Training under torch_xla: the device module on a real XLA runtime, and losses that are the CPU's, step by step.

PJRT_DEVICE=CPU runs XLA's compiler without a TPU; `make test-xla` sets it.
"""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bigmodel_utils import checkpoint, data, device, models, optim, predict, train

pytest.importorskip("torch_xla", reason="torch_xla is not installed here: `make test-xla` has its own environment")

from torch_xla import runtime
from torch_xla.core import xla_model
from torch_xla.debug import metrics

CPU = torch.device("cpu")
XLA = device.select("xla")  # before any test has made a backward pass
# float32 sums of a thousand numbers in another order differ by about sqrt(1000) x 2^-24 = 2e-6, which training carries on.
TOLERANCE = 1e-5
SMALL_GPT = models.GPTConfig(vocab_size=65, context_length=64, n_layers=2, n_heads=2, d_model=64)


def n_compiled() -> int:
    """Graphs compiled by this process so far."""
    seen = metrics.metric_data("CompileTime")
    return seen[0] if seen else 0


def n_launched() -> int:
    """Graphs launched by this process so far, compiled for it or earlier."""
    return sum(metrics.counter_value(name) or 0 for name in ("CachedCompile", "UncachedCompile"))


class Watched:
    """Batches that note, each time that one is taken, how many graphs were compiled and launched before."""

    def __init__(self, batches):
        self.batches, self.compiled, self.launched = batches, [], []

    def __iter__(self):
        for batch in self.batches:
            self.compiled.append(n_compiled())
            self.launched.append(n_launched())
            yield batch


def draw_molecules(n_batches: int) -> list:
    """Batches of 32 rows of 1000 features with a target that can be learnt."""
    torch.manual_seed(1)
    weights = torch.randn(1000, 1) / 1000**0.5
    return [(x, x @ weights) for x in torch.randn(n_batches, 32, 1000)]


def draw_texts(n_batches: int) -> list:
    """Batches of 8 rows of 64 tokens, half of which repeat the one before."""
    torch.manual_seed(1)
    tokens = torch.randint(65, (n_batches, 8, 65))
    tokens[..., 1::2] = tokens[..., 0:-1:2]
    return [(rows[:, :-1], rows[:, 1:]) for rows in tokens]


def token_loss(logits, targets):
    """Mean cross-entropy a token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build_tied_by_name() -> models.GPT:
    """A GPT with one weight under two names; our own has a tied weight once, so that it cannot come untied."""
    model = models.GPT(dataclasses.replace(SMALL_GPT, n_layers=1, tied=False))
    model.head.weight = model.token_embedding.weight
    return model


TIED_BY_NAME = "GPT, one weight under two names"
CASES = {  # model, batches, loss
    "MLP 1000-500-100-1": (models.MLP, draw_molecules, F.mse_loss),
    "GPT, tied": (lambda: models.GPT(SMALL_GPT), draw_texts, token_loss),
    TIED_BY_NAME: (build_tied_by_name, draw_texts, token_loss),
}


def train_on(where, case, n_steps=30, move=device.move, **config):
    """Losses of each step, from the same first weights and batches everywhere."""
    build, draw, loss_fn = CASES[case]
    batches = draw(n_steps)
    device.seed_everything(0)
    model = move(build(), where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.supports_fused(where))
    config = train.TrainConfig(n_epochs=1, eval_every=1, progress=False, **config)
    return train.fit(model, batches, loss_fn, config, optimizer=optimizer).train_loss


def largest_difference(losses, reference) -> float:
    """Of one step, relative to the reference."""
    assert len(losses) == len(reference) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference))


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_the_cpus_step_by_step(case, say):
    reference = train_on(CPU, case)
    begin = time.perf_counter()
    losses = train_on(XLA, case)
    difference = largest_difference(losses, reference)
    say(f"{case}: largest relative difference of {len(losses)} steps {difference:.1e}, {time.perf_counter() - begin:.0f} s")
    assert reference[-1] < 0.98 * reference[0], "nothing was learnt, so that little is compared"
    assert difference < TOLERANCE


def test_the_comparison_sees_weights_that_are_untied(say):
    losses = train_on(XLA, TIED_BY_NAME, move=lambda model, where: model.to(where))
    difference = largest_difference(losses, train_on(CPU, TIED_BY_NAME))
    say(f"the same moved by .to, which unties: {difference:.1e}")
    assert difference > 100 * TOLERANCE


def test_a_steady_step_compiles_nothing_and_launches_one_graph():
    batches = Watched(draw_molecules(50))
    model = device.move(models.MLP(models.MLPConfig((1000, 30, 1))), XLA)  # a shape of its own: nothing is compiled yet
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train.fit(model, batches, F.mse_loss, train.TrainConfig(n_epochs=1, progress=False), optimizer=optimizer)
    assert batches.compiled[2] > batches.compiled[0]
    quiet = batches.compiled[2 : train.CHECK_EVERY]  # from the third step to the first look at the losses
    assert quiet == quiet[:1] * len(quiet)
    later = batches.compiled[train.CHECK_EVERY :]  # the looks behind it are like the first
    assert later == later[:1] * len(later)
    launched = batches.launched[2 : train.CHECK_EVERY]
    assert [after - before for before, after in itertools.pairwise(launched)] == [1] * (len(launched) - 1)


def test_a_step_of_muon_is_one_graph_that_stays_on_the_device():
    batches, model = Watched(draw_texts(12)), device.move(models.GPT(dataclasses.replace(SMALL_GPT, n_layers=1)), XLA)
    optimizer = optim.Muon(*optim.split_matrices(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, optim.trapezoid(12, 3, 6))
    config = train.TrainConfig(n_epochs=1, progress=False, max_grad_norm=1.0)
    train.fit(model, batches, token_loss, config, optimizer=optimizer, scheduler=schedule)
    assert [after - before for before, after in itertools.pairwise(batches.launched)] == [1] * 11
    assert batches.compiled[2:] == batches.compiled[2:3] * 10
    assert metrics.counter_value("aten::addmm") is None, "computed on the host"


def test_texts_of_all_lengths_are_one_program_and_the_cpus():
    model = models.GPT(SMALL_GPT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    beginnings = [torch.randint(65, (2, length)) for length in (3, 9, 70)]
    expected = [predict.generate(model, tokens, 80, temperature=0) for tokens in beginnings]
    drawn = predict.generate(model, beginnings[0], 80, generator=torch.Generator().manual_seed(1))
    device.move(model, XLA)
    assert torch.equal(predict.generate(model, beginnings[0], 80, temperature=0), expected[0])
    before = n_compiled()
    assert torch.equal(predict.generate(model, beginnings[1], 80, temperature=0), expected[1])
    assert torch.equal(predict.generate(model, beginnings[2], 80, temperature=0), expected[2])
    assert n_compiled() == before
    assert torch.equal(predict.generate(model, beginnings[0], 80, generator=torch.Generator().manual_seed(1)), drawn)


def test_a_look_at_the_loss_costs_a_graph_a_step():
    model, launched = device.move(nn.Linear(3, 1), XLA), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(2, 3, device=XLA)
    for step in range(6):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if step >= 3:
            loss.item()
        optimizer.step()
        device.end_step(XLA)
        launched.append(n_launched())
    assert [launched[2] - launched[1], launched[5] - launched[4]] == [1, 2]


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    torch.manual_seed(2)
    rows = data.Split(torch.randn(24, 6), torch.randn(24, 1))

    def run(max_steps, folder=None):
        device.seed_everything(3)
        model = device.move(models.MLP(models.MLPConfig((6, 16, 1), dropout=0.5)), XLA)
        optimizer = torch.optim.Adam(model.parameters())
        config = train.TrainConfig(n_epochs=10, max_steps=max_steps, eval_every=1, progress=False)
        checkpoints = None if folder is None else checkpoint.Folder(folder)
        batches = data.Batches(rows, batch_size=8, seed=0)
        return train.fit(model, batches, F.mse_loss, config, optimizer=optimizer, checkpoints=checkpoints).train_loss

    whole = run(10)
    run(4, tmp_path)
    assert run(10, tmp_path) == whole


def test_select_knows_xla_and_prefers_a_tpu():
    assert XLA.type == "xla"
    assert device.select("auto").type == ("xla" if runtime.device_type() == "TPU" else "cpu")


def test_xla_chosen_too_late_says_what_to_do():
    program = """
import torch
from bigmodel_utils import device
torch.ones((), requires_grad=True).backward()
device.select("xla")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ValueError: 'xla' must be chosen before the first backward pass: restart the kernel" in done.stderr


def test_move_keeps_ties_and_parameters_where_to_does_not():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    weight = model["a"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    device.move(model, XLA)
    assert model["b"].weight is model["a"].weight is weight and weight.device == XLA
    model["b"](torch.ones(1, 3, device=XLA)).sum().backward()
    before = model["a"].weight.detach().cpu()
    optimizer.step()
    assert torch.equal(model["a"].weight.detach().cpu(), before - 1)
    model.to("cpu")
    assert model["b"].weight is not model["a"].weight


def test_autocast_multiplies_in_bfloat16():
    x = torch.full((2, 2), 1 / 3, device=XLA)
    with device.autocast(XLA, "bfloat16"):
        product = x @ x
    assert product.dtype == torch.bfloat16
    assert (x @ x).dtype == torch.float32
    third = torch.tensor(1 / 3).bfloat16().double()
    assert product.double().cpu().flatten().tolist() == pytest.approx([2 * third.item() ** 2] * 4, rel=2**-8)


def test_xla_has_no_fused_optimizers():
    assert not device.supports_fused(XLA)
    model = device.move(nn.Linear(2, 1), XLA)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 2, device=XLA)).sum().backward()
    with pytest.raises(RuntimeError, match="fused"):
        optimizer.step()


def test_seed_and_stored_state_decide_the_devices_numbers():
    def draw():
        return torch.rand(4, device=XLA).tolist() + F.dropout(torch.ones(9, device=XLA)).tolist()

    device.seed_everything(5)
    first = draw()
    for _ in range(5):  # the state is then a number beyond int64 more often than not
        state = device.random_state(XLA)
        expected = draw()
        device.seed_everything(6)
        device.set_random_state(state, XLA)
        assert draw() == expected
    device.seed_everything(5)
    assert draw() == first != expected
    device.seed_everything(-1)


def test_synchronize_waits_for_what_an_ended_step_has_started():
    a = torch.randn(2000, 2000, device=XLA)
    device.synchronize(XLA)
    product = a @ a @ a @ a
    device.end_step(XLA)
    begin = time.perf_counter()
    device.synchronize(XLA)
    waited_s, begin = time.perf_counter() - begin, time.perf_counter()
    xla_model.wait_device_ops()
    assert time.perf_counter() - begin < 0.2 * waited_s
    assert product.shape == a.shape


def test_memory_is_the_devices_or_the_hosts():
    assert device.available_memory_bytes(XLA) > 2**20
    assert device.peak_memory_bytes(XLA) > 2**20


def test_a_clock_includes_the_devices_work():
    a = torch.randn(1500, 1500, device=XLA)
    small = torch.randn(15, 15, device=XLA)
    seconds = device.fastest_s({"large": lambda: a @ a, "small": lambda: small @ small}, XLA, budget_s=0.1)
    assert seconds["large"] > seconds["small"]
