"""Speed beside others': training, generation and optimisers, as ratios taken in one run, with the goals that were set.

`python benchmarks/speed.py [row ...]` prints a table; without names, all of it, in about five minutes on two quiet cores. What is
compared takes turns, and each is represented by its fastest turn: other work on the machine only ever adds time. Where
losses are compared, both begin with the same weights, see the same samples and are checked to lose the same before a
clock runs. FLOP/s are those of the matrix products in the work (counted by torch, so the same for both), over the peak that
this machine reaches in a product of two 1024 x 1024 matrices in the precision used.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import growth
import peers
import recipe
import torch
from torch import Tensor, nn

from bigmodel_utils import data, device, language, models, optim, predict, tokens, train
from bigmodel_utils.models import GPT, GPTConfig

CPU = torch.device("cpu")
SMALL = GPTConfig(vocab_size=256, context_length=64, n_layers=4, n_heads=4, d_model=128)
MEDIUM = GPTConfig(vocab_size=256, context_length=256, n_layers=6, n_heads=6, d_model=384)
N_STEPS = 8  # of a GPT, compared in loss before the clock runs
LR = 3e-4  # of both; at AdamW's own 1e-3 the larger GPT jumps up within those steps, in either precision by another amount
LOSS_TOLERANCE = 0.02  # nats, of a mean over those steps in bfloat16: batches differ by more


@dataclass(frozen=True)
class Row:
    """One comparison: rates in `unit`, of which more is better."""

    work: str
    peer: str
    ours: str
    unit: str
    peer_rate: float
    our_rate: float
    goal: float | None = None  # the least ratio; None: shown, not won
    peak_share: float | None = None  # our FLOP/s over the machine's peak in that precision

    def __str__(self) -> str:
        ratio = self.our_rate / self.peer_rate
        verdict = "" if self.goal is None else "reached" if ratio >= self.goal else "MISSED"
        goal = "" if self.goal is None else f"{self.goal:.2f}"
        share = "" if self.peak_share is None else f"{self.peak_share:.0%}"
        rates = f"{self.peer_rate:10.4g} {self.our_rate:10.4g} {self.unit:10} {ratio:6.2f} {goal:>5} {verdict:8} {share:>5}"
        return f"{self.work:34} {self.peer:29} {self.ours:31} {rates}"


HEADER = f"{'work':34} {'peer':29} {'ours':31} {'peer':>10} {'ours':>10} {'':10} {'ratio':>6} {'goal':>5} {'':8} {'/peak':>5}"


@functools.cache
def peak(precision: str) -> float:
    """Measured FLOP/s of a product of square matrices."""
    return device.matmul_flops_per_s(CPU, getattr(torch, precision))


# The article's network.


@functools.cache
def solubility() -> tuple[data.Split, data.Split]:
    """Training and validation molecules, targets standardised."""
    parts = data.prepare_solubility()
    targets = data.Standardizer.fit(parts["train"].y)
    return tuple(data.Split(parts[name].x, targets(parts[name].y)) for name in ("train", "validation"))


def new_mlp(fused: bool, lr: float = 1e-3, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The 1000-500-100-1 network with a seed's weights, and Adam."""
    torch.manual_seed(seed)
    model = models.MLP()
    return model, torch.optim.Adam(model.parameters(), lr=lr, fused=fused)


def fit_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: data.Batches, precision: str = "float32", loss_fn=None
):
    """One epoch of `train.fit`: its history."""
    config = train.TrainConfig(n_epochs=1, precision=precision, progress=False)
    return train.fit(model, batches, loss_fn or nn.functional.mse_loss, config, optimizer=optimizer)


def assert_same_losses(split: data.Split, n_epochs: int = 2, tolerance: float = 1e-5) -> None:
    """Every step's loss, of the article's loop and of ours."""
    theirs, ours = [], []

    def loss_fn(prediction: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(prediction, target)
        ours.append(loss.item())
        return loss

    peer, mine = new_mlp(fused=False), new_mlp(fused=True)
    for seed in range(n_epochs):
        theirs += peers.article_epoch(*peer, split.x, split.y, seed)
        fit_epoch(*mine, data.Batches(split, 32, seed=seed), loss_fn=loss_fn)
    worst = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    assert worst < tolerance, f"the losses of the {len(ours)} steps differ by up to {worst}"


def mlp() -> Iterator[Row]:
    """Samples a second, step for step the same training."""
    split, _ = solubility()
    assert_same_losses(split)
    peer, mine = new_mlp(fused=False), new_mlp(fused=True)
    batches = data.Batches(split, 32)
    seconds = device.fastest_s(
        {
            "peer": lambda: peers.article_epoch(*peer, split.x, split.y, 0),
            "ours": lambda: fit_epoch(*mine, batches),
        },
        budget_s=6,
    )
    flops = growth.count_flops(lambda: peers.article_epoch(*peer, split.x, split.y, 0))
    yield Row(
        "MLP 1000-500-100-1, batch 32",
        "the article's loop",
        "train.fit, fused Adam",
        "samples/s",
        *(len(split) / s for s in seconds.values()),
        goal=2.5,
        peak_share=flops / seconds["ours"] / peak("float32"),
    )


def learning_curves(sides: dict[str, tuple], n_epochs: int, n_seeds: int = 10) -> dict[str, tuple[list[float], float]]:
    """By side: the validation loss after each epoch, a mean over seeds, and the seconds of the fastest epoch.

    Args:
        sides: by name, arguments of `new_mlp` and a function of model, optimiser and seed that trains an epoch.
    """
    validation = [(solubility()[1].x, solubility()[1].y)]
    losses = {name: torch.zeros(n_epochs) for name in sides}
    fastest = dict.fromkeys(sides, math.inf)
    for seed in range(n_seeds):
        for name, (options, epoch) in sides.items():
            model, optimizer = new_mlp(**options, seed=seed)
            for index in range(n_epochs):
                begin = time.perf_counter()
                epoch(model, optimizer, 1000 * seed + index)
                fastest[name] = min(fastest[name], time.perf_counter() - begin)
                losses[name][index] += train.evaluate(model, validation, nn.functional.mse_loss) / n_seeds
    return {name: (losses[name].tolist(), fastest[name]) for name in sides}


def mlp_to_loss() -> Iterator[Row]:
    """Time until the validation loss, on average, is what the article's loop ends with after 20 epochs: it overfits."""
    split, _ = solubility()
    sides = {
        "peer": ({"fused": False}, lambda *state: peers.article_epoch(*state[:2], split.x, split.y, state[2])),
        "ours": (
            {"fused": True, "lr": 2e-3},
            lambda *state: fit_epoch(*state[:2], data.Batches(split, 64, seed=state[2]), "bfloat16"),
        ),
    }
    curves = learning_curves(sides, n_epochs=20)
    goal, seconds = curves["peer"][0][-1], {}
    for name, (losses, epoch_s) in curves.items():
        n_epochs = next((index for index, loss in enumerate(losses, start=1) if loss <= goal), math.inf)
        print(f"  {name}: {n_epochs} epochs of {1e3 * epoch_s:.1f} ms to a validation loss of {goal:.4f}")
        seconds[name] = n_epochs * epoch_s
    rates = (1 / s for s in seconds.values())
    yield Row("the same to equal validation loss", "the article's loop", "train.fit, batch 64, bfloat16", "runs/s", *rates, 5.0)


# GPTs.


def token_batches(config: GPTConfig, batch_size: int, n_batches: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of the text's bytes."""
    stream = tokens.TokenBatches(recipe.load_bytes("train"), config.context_length, batch_size)
    return [stream[step] for step in range(n_batches)]


def fit_steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list, precision: str) -> float:
    """One pass of `train.fit`: the mean loss."""
    config = train.TrainConfig(n_epochs=1, precision=precision, progress=False)
    return train.fit(model, batches, language.cross_entropy, config, optimizer=optimizer).train_loss[-1]


def gpt_row(config: GPTConfig, batch_size: int, goals: tuple[float, float], budget_s: float) -> Iterator[Row]:
    """Tokens a second of training against transformers and against our own model in the same plain loop."""
    torch.manual_seed(0)
    library, own = peers.transformers(), GPT(config)
    contenders: dict[str, Callable[[list], float]] = {}
    if library is not None:
        other = peers.gpt2(library, config)
        models.load_reference(own, other.state_dict())
        contenders["transformers, plain loop"] = plain(other, lambda x: other(input_ids=x).logits)
    else:
        print("transformers is not installed: its rows are left out (pip install 'bigmodel-utils[reference]')")
    fast = copy.deepcopy(own)
    optimizer = torch.optim.AdamW(fast.parameters(), lr=LR, fused=True)
    contenders["our model, plain loop"] = plain(own, own)
    contenders["ours"] = lambda batches: fit_steps(fast, optimizer, batches, "bfloat16")

    batches = token_batches(config, batch_size, N_STEPS)
    losses = {name: run(batches) for name, run in contenders.items()}
    for name, loss in losses.items():
        tolerance = LOSS_TOLERANCE if name == "ours" else 1e-4
        assert abs(loss - losses["our model, plain loop"]) < tolerance, f"the mean losses of {N_STEPS} steps differ: {losses}"
    print(f"  mean loss of {N_STEPS} steps: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    few = batches[:2]
    seconds = device.fastest_s({name: functools.partial(run, few) for name, run in contenders.items()}, budget_s=budget_s)
    n_tokens = sum(x.numel() for x, _ in few)
    share = growth.count_flops(lambda: contenders["our model, plain loop"](few)) / seconds["ours"] / peak("bfloat16")
    work = f"GPT {config.n_layers}x{config.d_model}, context {config.context_length}, batch {batch_size}"
    for name, goal in zip(("transformers, plain loop", "our model, plain loop"), goals):
        if name in seconds:
            rates = n_tokens / seconds[name], n_tokens / seconds["ours"]
            yield Row(work, name, "train.fit, bfloat16, fused AdamW", "tokens/s", *rates, goal, share)


def plain(model: nn.Module, logits_of: Callable[[Tensor], Tensor]) -> Callable[[list], float]:
    """The plain loop over batches with torch's AdamW, not fused: returns the mean loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    return lambda batches: statistics.mean(peers.plain_steps(logits_of, optimizer, batches))


def gpt_small() -> Iterator[Row]:
    """The size of a laptop's first GPT."""
    yield from gpt_row(SMALL, 12, (1.6, 1.15), budget_s=6)


def gpt() -> Iterator[Row]:
    """The size at which products of matrices are most of the work."""
    yield from gpt_row(MEDIUM, 8, (2.0, 1.6), budget_s=30)


def compiled() -> Iterator[Row]:
    """What `model.compile()` adds to `train.fit`, once the compiler is done."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("there is no C++ compiler (g++, or the one that CXX names): torch.compile is left out")
        return
    batches, calls = token_batches(SMALL, 12, 4), {}
    for name in ("peer", "ours"):
        torch.manual_seed(0)
        model = GPT(SMALL)
        if name == "ours":
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        calls[name] = functools.partial(fit_steps, model, optimizer, batches, "bfloat16")
    begin = time.perf_counter()
    calls["ours"]()
    print(f"  compiled in {time.perf_counter() - begin:.0f} s")
    rates = (sum(x.numel() for x, _ in batches) / s for s in device.fastest_s(calls, budget_s=4).values())
    yield Row("GPT 4x128, context 64, batch 12", "train.fit, bfloat16, fused AdamW", "the same, compiled", "tokens/s", *rates)


def generation() -> Iterator[Row]:
    """Tokens a second of greedy generation with a cache, float32 on both sides, each on the number of threads it likes best."""
    library = peers.transformers()
    if library is None:
        print("transformers is not installed: generation is left out (pip install 'bigmodel-utils[reference]')")
        return
    torch.manual_seed(0)
    other, own, n_tokens = peers.gpt2(library, MEDIUM).eval(), GPT(MEDIUM), 100
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(4)  # opinions, so that no two tokens are equally probable
    models.load_reference(own, other.state_dict())
    prompt = token_batches(MEDIUM, 1, 1)[0][0][:, :32]
    calls = {
        "peer": lambda: peers.generate(library, other, prompt, n_tokens),
        "ours": lambda: predict.generate(own, prompt, n_tokens, temperature=0),
    }
    assert torch.equal(calls["peer"](), calls["ours"]()), "the two do not generate the same tokens"
    n_threads = range(1, torch.get_num_threads() + 1)
    seconds = device.fastest_s({(name, n): on_threads(n, call) for name, call in calls.items() for n in n_threads}, budget_s=12)
    theirs, ours = (min((seconds[name, n], n) for n in n_threads) for name in ("peer", "ours"))
    flops = 2 * (MEDIUM.n_parameters - MEDIUM.context_length * MEDIUM.d_model) * n_tokens
    yield Row(
        f"generation, GPT {MEDIUM.n_layers}x{MEDIUM.d_model}, cached",
        f"transformers, {theirs[1]} thread(s)",
        f"predict.generate, {ours[1]} thread(s)",
        "tokens/s",
        n_tokens / theirs[0],
        n_tokens / ours[0],
        goal=2.0,
        peak_share=flops / ours[0] / peak("float32"),
    )


def on_threads(n: int, call: Callable[[], object]) -> Callable[[], None]:
    """The call on that many of torch's threads."""

    def run() -> None:
        with device.threads(n):
            call()

    return run


def recipes() -> Iterator[Row]:
    """Seconds to the plain recipe's last validation loss, in turns of a tenth each."""
    plain_run, full_run = recipe.Run(recipe.PLAIN, recipe.PLAIN_STEPS), recipe.Run(recipe.FULL, recipe.FULL_STEPS)
    for turn in range(10):
        plain_run.train(recipe.PLAIN_STEPS // 10)
        full_run.train((turn + 1) * recipe.FULL_STEPS // 10 - turn * recipe.FULL_STEPS // 10)
    theirs, ours = plain_run.validation_loss(), full_run.validation_loss()
    print(
        f"validation loss: plain {theirs:.4f} after {plain_run.seconds:.1f} s, full {ours:.4f} after {full_run.seconds:.1f} s"
    )
    if ours > theirs:
        print("the full recipe did not reach the plain one's loss: its time does not count")
    rates = 1 / plain_run.seconds, (1 / full_run.seconds if ours <= theirs else 0.0)
    yield Row(
        "time to the plain recipe's loss",
        "AdamW, learned positions, GELU",
        "recipe.FULL (Muon, rotary, ...)",
        "1/s",
        *rates,
        3.0,
    )


def optimizers() -> Iterator[Row]:
    """Steps a second on the article's network."""
    pairs = {
        "SGD": (optim.SGD, functools.partial(torch.optim.SGD, fused=True)),
        "Adagrad": (optim.AdaGrad, functools.partial(torch.optim.Adagrad, fused=True)),
        "RMSprop": (optim.RMSProp, functools.partial(torch.optim.RMSprop, foreach=True)),
        "Adam": (optim.Adam, functools.partial(torch.optim.Adam, fused=True)),
        "AdamW": (optim.AdamW, functools.partial(torch.optim.AdamW, fused=True)),
    }
    for name, (ours, theirs) in pairs.items():
        steps = {}
        for side, make in (("peer", theirs), ("ours", ours)):
            weights = [nn.Parameter(w.detach().clone()) for w in models.MLP().parameters()]
            for w in weights:
                w.grad = torch.randn_like(w)
            steps[side] = make(weights, lr=1e-3).step
        seconds = device.fastest_s(steps, budget_s=1)
        kind = "torch, foreach" if name == "RMSprop" else "torch, fused"
        yield Row(f"a step of {name}", kind, "optim, written to be read", "steps/s", *(1 / s for s in seconds.values()))


ROWS = {
    "mlp": mlp,
    "mlp-to-loss": mlp_to_loss,
    "gpt-small": gpt_small,
    "gpt": gpt,
    "compiled": compiled,
    "generation": generation,
    "recipe": recipes,
    "optimizers": optimizers,
}


def main(*names: str) -> None:
    """Print the table."""
    unknown = set(names) - ROWS.keys()
    if unknown:
        raise SystemExit(f"unknown rows {', '.join(sorted(unknown))}: choose from {', '.join(ROWS)}")
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"peak: {peak('float32') / 1e9:.0f} GFLOP/s in float32, {peak('bfloat16') / 1e9:.0f} in bfloat16")
    print(HEADER)
    for name in names or ROWS:
        for row in ROWS[name]():
            print(row, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
