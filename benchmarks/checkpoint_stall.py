"""How much a checkpoint holds training up, written in the background and at once.

The network has 12.5 million weights (50 MB), its checkpoint with Adam's two means 150 MB. It computes on one thread, as
if the work were a GPU's; steps with and without a save take turns. `python benchmarks/checkpoint_stall.py`
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from bigmodel_utils import checkpoint
from bigmodel_utils.models import MLP, MLPConfig

N_ROUNDS, N_STEPS = 9, 20  # steps a round, of which one saves


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(folder: checkpoint.Folder, step: Callable[[], None], tree: Callable[[], dict]) -> list[float]:
    """Medians of the rounds: seconds of a step alone, of a call of `save`, of a step where one in N_STEPS saves; the ratio."""
    rounds = []
    for number in range(N_ROUNDS):
        alone = sum(seconds(step) for _ in range(N_STEPS)) / N_STEPS
        call = seconds(partial(folder.save, tree(), number))
        saving = (call + sum(seconds(step) for _ in range(N_STEPS))) / N_STEPS
        folder.wait()
        rounds.append((alone, call, saving, saving / alone))
    return [statistics.median(column) for column in zip(*rounds)]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MLP(MLPConfig((2000, 2500, 2500, 500)))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    x, y = torch.randn(64, 2000), torch.randn(64, 500)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    def tree() -> dict:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    step()
    print(f"{'saving':<16}{'step alone':>12}{'save() takes':>14}{f'step, one save in {N_STEPS}':>24}{'ratio':>8}")
    for name, asynchronous in (("in background", True), ("at once", False)):
        with tempfile.TemporaryDirectory() as path:
            alone, call, saving, ratio = measure(checkpoint.Folder(path, asynchronous=asynchronous), step, tree)
        print(f"{name:<16}{alone * 1e3:>9.0f} ms{call * 1e3:>11.0f} ms{saving * 1e3:>21.0f} ms{ratio:>8.2f}")


if __name__ == "__main__":
    main()
