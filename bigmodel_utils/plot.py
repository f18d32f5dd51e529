"""Figures: one theme, and the drawings that several chapters share. Each returns the Axes it drew on."""

from __future__ import annotations

import os
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bigmodel_utils import results

# Okabe and Ito's palette, distinguishable under the common colour-vision deficiencies
# (Okabe and Ito 2008, "Color Universal Design"); yellow is left out, since it is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH_IN = 7.0  # the report's text width, inches


def set_theme() -> None:
    """Set the course's figure style, and sharp figures where a notebook shows them."""
    plt.rcdefaults()
    plt.rcParams.update(
        {
            "axes.prop_cycle": plt.cycler(color=COLORS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e5e5e5",
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "figure.figsize": (WIDTH_IN, 3.6),
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "svg.hashsalt": "bigmodel",
        }
    )
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        as_svg = ["svg"] if results.OUTPUT_VARIABLE in os.environ else []  # the report shows the smaller file of the two
        set_matplotlib_formats("retina", *as_svg, metadata={"Date": None})


def label_line(ax: Axes, x: float, y: float, text: str, color: str, **style) -> None:
    """Write a line's name at its end, in its colour, instead of a legend."""
    ax.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", color=color, **style)


def band(ax: Axes, x: Sequence[float], runs: np.ndarray, label: str, color: str, *, q: float = 0.1) -> Axes:
    """Draw the median of several runs and the band between their q and 1 - q quantiles.

    Args:
        x: (n_points,) horizontal positions.
        runs: (n_runs, n_points) one row a seed.
        label: written at the end of the line.
        q: lower quantile; with five runs, 0.1 to 0.9 is nearly their whole range.
    """
    low, middle, high = np.quantile(np.asarray(runs), [q, 0.5, 1 - q], axis=0)
    ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    ax.plot(x, middle, color=color)
    label_line(ax, x[-1], middle[-1], label, color)
    return ax
