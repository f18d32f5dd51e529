"""What a notebook says to its reader: start, predicted cost, the source of package code, exercises."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, field
from typing import Any

from bigmodel_utils import claims


@dataclass
class Run:
    """The notebook being run: its name, parameters, device, clock and predicted cost."""

    name: str
    parameters: dict[str, Any]
    device_name: str
    started: float = field(default_factory=time.perf_counter)
    predicted: dict[str, float] | None = None

    def seconds(self) -> float:
        """Wall-clock seconds since `start`."""
        return time.perf_counter() - self.started


_run: Run | None = None


def start(name: str, namespace: dict[str, Any]) -> Any:
    """Begin a notebook: record its parameters, choose the device, seed everything, set the figures' theme.

    Call it once, behind the parameters cell and the imports.

    Args:
        name: the notebook's file name without its ending, such as "03_regularized_loss".
        namespace: `globals()`; its plain numbers, strings, booleans and lists are the parameters. Of these
            `device_name` ("auto" if absent) and `seed` (0 if absent) are used here.

    Returns:
        the torch.device to train on.

    Raises:
        ValueError: for a device that this machine does not have.
    """
    global _run
    from bigmodel_utils import device, plot

    parameters = {
        key: value
        for key, value in namespace.items()
        if not key.startswith("_") and key != "In" and isinstance(value, (int, float, str, bool, list, type(None)))
    }
    chosen = device.select(parameters.get("device_name", "auto"))
    device.seed_everything(parameters.get("seed", 0))
    plot.set_theme()
    claims.ledger.clear()
    _run = Run(name, parameters, str(chosen))
    return chosen


def current() -> Run:
    """The running notebook.

    Raises:
        RuntimeError: where `start` was not called.
    """
    if _run is None:
        raise RuntimeError('no notebook is running: call notebook.start("NN_name", globals()) in its first cells')
    return _run


def predict_cost(seconds: float, memory_bytes: float) -> None:
    """Say what the notebook is about to cost, and refuse what cannot fit. The report shows it beside the measured cost.

    Args:
        seconds: predicted wall-clock time of the whole notebook.
        memory_bytes: predicted peak memory of the process.

    Raises:
        MemoryError: where that is more than this machine has available.
    """
    from bigmodel_utils import device

    run = current()
    available_bytes = device.available_memory_bytes() + device.peak_memory_bytes()
    if memory_bytes > available_bytes:
        raise MemoryError(
            f"{run.name} needs about {memory_bytes / 1e9:.1f} GB and {available_bytes / 1e9:.1f} GB are available: "
            "close other programs, or lower the sizes in the parameters cell (the smoke profile shows small ones)"
        )
    run.predicted = {"seconds": float(seconds), "memory_bytes": float(memory_bytes)}
    print(f"Predicted: about {seconds:.0f} s and {memory_bytes / 1e9:.1f} GB of memory. It fits this machine.")


def show_source(item: Any) -> Any:
    """The highlighted source of a function, class or method of the package: code that is the lesson exists once.

    Returns:
        a displayable object; end the cell with the call.
    """
    from IPython.display import Markdown

    return Markdown(f"```python\n{inspect.getsource(inspect.unwrap(item)).rstrip()}\n```")
