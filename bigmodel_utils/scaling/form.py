"""A form for the cost of a model of one's own, where a person looks at the notebook; elsewhere nothing."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from bigmodel_utils.scaling import runs

if TYPE_CHECKING:
    import pandas as pd


def is_watched() -> bool:
    """Whether the notebook is open in JupyterLab or Colab, rather than run by a program (nbclient, papermill, nbval)."""
    return "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules


def cost_table(n_billion: float, n_billion_tokens: float, accelerator: str, n_accelerators: int) -> pd.DataFrame:
    """Low, middle and high of what it costs to train so many parameters on so many tokens (`runs.estimate_run`)."""
    return runs.estimate_run(n_billion * 1e9, n_billion_tokens * 1e9, accelerator, n_accelerators).table()


def cost_form(show: bool | None = None) -> Any:
    """Sliders for parameters, tokens, accelerator and their number, and the table that follows from them.

    Args:
        show: None: where `is_watched`.

    Returns:
        a widget to display, or None where nobody looks.
    """
    if not (is_watched() if show is None else show):
        return None
    import ipywidgets

    def show_table(**choice: Any) -> None:
        from IPython.display import display

        display(cost_table(**choice))

    inputs = {
        "n_billion": ipywidgets.FloatLogSlider(value=7, min=-2, max=3, description="parameters (billion)"),
        "n_billion_tokens": ipywidgets.FloatLogSlider(value=2000, min=-1, max=5, description="tokens (billion)"),
        "accelerator": ipywidgets.Dropdown(options=list(runs.accelerators().index), value="h100-sxm"),
        "n_accelerators": ipywidgets.IntSlider(value=256, min=1, max=16384, description="accelerators"),
    }
    return ipywidgets.VBox([*inputs.values(), ipywidgets.interactive_output(show_table, inputs)])
