"""Landmark systems, 1998 to today: what was published about their size, data, compute and cost, each number with its source.

The table is ``landmarks.csv`` beside this file, a row a system. A field is empty where nothing was published.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

PATH = Path(__file__).with_name("landmarks.csv")
FIELDS = ("language", "vision", "speech")
UNITS = ("token", "sentence pair", "document", "image", "hour")
RANGES = {  # smallest and largest value that is not a slip of the pen
    "parameters": (1e4, 1e14),
    "active_parameters": (1e4, 1e14),  # that one token passes through, where fewer than all
    "training_samples": (1e3, 1e15),  # tokens: seen in training, repeats counted; other units: in the data set
    "samples_seen": (1e3, 1e15),  # repeats counted, where training_samples does not count them
    "forward_macs": (1e4, 1e15),  # multiply-adds of one forward pass of one sample
    "train_flops": (1e9, 1e29),  # as published; a multiply-add is two
    "accelerator_hours": (1, 1e10),
    "cost_usd": (1, 1e11),
}
TEXTS = ("system", "field", "date", "sample_unit", "hardware", "source_title", "source_url", "source_place", "note")


def load(path: Path = PATH) -> pd.DataFrame:
    """The table, checked: known columns, fields and units, plausible ranges, and a source for every number.

    Returns:
        one row a system, ordered by date; numbers are NaN and texts "" where nothing was published. `date` is text
        (YYYY-MM), and `year` is the same as a decimal number, the middle of the month. `source_place` reads
        "column: place; column: place", and a place in another publication than the row's ends in its address.

    Raises:
        ValueError: which row is wrong, and what is wrong with it.
    """
    table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, "string") | dict.fromkeys(RANGES, "float64"))
    if set(table.columns) != {*TEXTS, *RANGES}:
        raise ValueError(f"{path.name}: columns differ by {sorted(set(table.columns) ^ {*TEXTS, *RANGES})}")
    table = table.fillna(dict.fromkeys(TEXTS, "")).astype(dict.fromkeys(TEXTS, object))
    errors = [f"{row['system']}: {error}" for _, row in table.iterrows() for error in _errors(row)]
    errors += [f"{name}: stands twice" for name in table["system"][table["system"].duplicated()]]
    if errors:
        raise ValueError(f"{path.name}: " + "; ".join(errors))
    table["year"] = [decimal_year(date) for date in table["date"]]
    return table.sort_values("year", kind="stable").reset_index(drop=True)


def places(row: pd.Series) -> dict[str, str]:
    """For each column of a row that has a value from a publication, the place where it stands."""
    pairs = (part.partition(": ") for part in row["source_place"].split("; "))
    return {column: place for column, _, place in pairs if place}


def decimal_year(date: str) -> float:
    """The middle of a month as a decimal year.

    >>> decimal_year("2020-01"), decimal_year("2020-12")
    (2020.0416666666667, 2020.9583333333333)

    Raises:
        ValueError: for another form than YYYY-MM.
    """
    if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", date):
        raise ValueError(f"a date reads YYYY-MM, got {date!r}")
    return int(date[:4]) + (int(date[5:]) - 0.5) / 12


def _errors(row: pd.Series) -> list[str]:
    found, errors = places(row), []
    if row["field"] not in FIELDS:
        errors.append(f"field {row['field']!r} is none of {', '.join(FIELDS)}")
    if not re.fullmatch(r"(19[89]|20[0-4])\d-(0[1-9]|1[0-2])", row["date"]):
        errors.append(f"date {row['date']!r} is not a month between 1980 and 2049")
    if not (row["source_title"] and row["source_url"].startswith("https://")):
        errors.append("needs a source's title and https address")
    if np.isfinite(row["training_samples"]) != (row["sample_unit"] in UNITS):
        errors.append(f"training_samples need a unit of {', '.join(UNITS)}, got {row['sample_unit']!r}")
    if row["active_parameters"] > row["parameters"]:
        errors.append("more parameters are active than there are")
    for column, (low, high) in RANGES.items():
        if np.isfinite(row[column]) and not low <= row[column] <= high:
            errors.append(f"{column} {row[column]:g} is outside {low:g} to {high:g}")
    given = {column for column in RANGES if np.isfinite(row[column])} | ({"hardware"} if row["hardware"] else set())
    errors += [f"{column} has no place in a source" for column in sorted(given - set(found))]
    return errors + [f"a place is given for {column}, which has no value" for column in sorted(set(found) - given)]


def label_points(
    ax: Axes,
    points: pd.DataFrame,
    *,
    x: str,
    y: str,
    text: str,
    colors: Sequence[str],
    lines: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
    fontsize: float = 7.5,
) -> None:
    """Write a name beside each point, clear of other names, points and lines: the nearest free place of those tried.

    Call it last: it measures the texts on the finished figure. A name that stands apart gets a thin line to its point.

    Args:
        points: a row a point.
        x, y, text: its columns.
        colors: one a row.
        lines: (xs, ys) of each curve that no name may touch.

    Raises:
        ValueError: where there is no free place.
    """
    ax.figure.canvas.draw()
    renderer, scale = ax.figure.canvas.get_renderer(), ax.figure.dpi / 72
    frame = ax.get_window_extent(renderer)
    frame = Bbox.from_extents(frame.x0, frame.y0, frame.x1 + 25 * scale, frame.y1)  # names may run into the right margin
    centres = ax.transData.transform(points[[x, y]].to_numpy(float))
    markers = [Bbox.from_extents(*(centre - 4.5 * scale), *(centre + 4.5 * scale)) for centre in centres]
    drawn = np.concatenate([np.empty((0, 2)), *(_along(ax.transData.transform(np.column_stack(line))) for line in lines)])
    names: list[Bbox] = []
    for index, (position, name, color) in enumerate(zip(points[[x, y]].to_numpy(float), points[text], colors)):
        others = names + markers[:index] + markers[index + 1 :]
        for offset in _PLACES:
            side = "center" if abs(offset[0]) < 2 else "left" if offset[0] > 0 else "right"
            style = {"ha": side, "va": "center", "fontsize": fontsize, "color": color}
            label = ax.annotate(name, position, offset, textcoords="offset points", **style)
            label.set_in_layout(False)
            box = label.get_window_extent(renderer).expanded(1.08, 1.0)  # texts are a little wider at other resolutions
            leader = _along(centres[index] + np.outer([0.35, 0.9], offset) * scale) if np.hypot(*offset) > 12 else drawn[:0]
            free = _is_free(box, frame, [*names, *markers], drawn)
            if free and not any(_touches(other, leader) for other in others) and not _cross(leader, drawn):
                break
            label.remove()
        else:
            raise ValueError(f"no free place for {name!r}: enlarge the figure or shorten the names")
        names, drawn = [*names, box], np.concatenate([drawn, leader])
        if len(leader):
            ax.annotate("", position, 0.9 * offset, textcoords="offset points", arrowprops=_LEADER)


_LEADER = {"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
_PLACES = [  # in points from the marker: right, left, above, below, the diagonals, then further out
    distance * np.array([np.cos(angle), np.sin(angle)])
    for distance in (6, 9, 14, 20, 27, 35, 45, 60)
    for angle in np.deg2rad([0, 180, 90, 270, 45, 135, 315, 225, 22.5, 157.5, 202.5, 337.5])
]


def _along(corners: np.ndarray) -> np.ndarray:
    """Points about two pixels apart on the line through the corners (n, 2), in pixels."""
    length = np.concatenate([[0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
    steps = np.arange(0, length[-1], 2.0)
    return np.column_stack([np.interp(steps, length, corner) for corner in corners.T])


def _touches(box: Bbox, points: np.ndarray) -> bool:
    return bool(((points >= box.min) & (points <= box.max)).all(axis=1).any())


def _cross(leader: np.ndarray, drawn: np.ndarray) -> bool:
    return bool(len(leader) and len(drawn) and (np.abs(leader[:, None] - drawn).max(axis=2) < 1.5).any())


def _is_free(box: Bbox, frame: Bbox, taken: Sequence[Bbox], drawn: np.ndarray) -> bool:
    inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    return bool(inside and not _touches(box, drawn) and not any(box.overlaps(other) for other in taken))
