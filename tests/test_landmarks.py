"""The table of landmark systems: what is in it fits outside knowledge, and what is wrong in it is found."""

from __future__ import annotations

import re

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_utils import landmarks

matplotlib.use("agg")
import matplotlib.pyplot as plt


@pytest.fixture
def raw() -> pd.DataFrame:
    """The file as text, to be broken and written again."""
    return pd.read_csv(landmarks.PATH, dtype=str, keep_default_na=False)


def load_changed(raw, tmp_path, system=None, **changes):
    """The table after a change of one row."""
    for column, value in changes.items():
        raw.loc[raw["system"] == system, column] = value
    raw.to_csv(tmp_path / "changed.csv", index=False)
    return landmarks.load(tmp_path / "changed.csv")


def test_the_table_is_whole():
    table = landmarks.load()
    assert 20 <= len(table) <= 40 and set(table["field"]) == set(landmarks.FIELDS)
    assert table["year"].is_monotonic_increasing
    for name in ("LeNet-5", "BERT-large", "GPT", "ResNet-152", "Deep Speech"):
        assert (table["system"] == name).any()


def test_every_number_has_a_place():
    for _, row in landmarks.load().iterrows():
        given = [column for column in landmarks.RANGES if np.isfinite(row[column])]
        assert given and all(len(landmarks.places(row)[column]) > 3 for column in given)


def test_dates_agree_with_arxiv_numbers():
    """An arXiv number begins with the year and month in which the paper was sent in."""
    for _, row in landmarks.load().iterrows():
        if found := re.search(r"arxiv\.org/abs/(\d\d)(\d\d)\.", row["source_url"]):
            assert row["date"] == f"20{found[1]}-{found[2]}", row["system"]


def test_counts_agree_with_shapes():
    """Parameters of published shapes, counted here: 12 d^2 a layer and the embedding, or the sum over a ResNet's blocks."""
    table = landmarks.load().set_index("system")["parameters"]
    transformer = lambda n_layers, width, vocabulary: 12 * n_layers * width**2 + vocabulary * width  # noqa: E731
    assert table["GPT-3"] == pytest.approx(transformer(96, 12288, 50257), rel=0.01)
    assert table["BERT-large"] == pytest.approx(transformer(24, 1024, 30522), rel=0.03)  # published to ten millions
    assert table["GPT"] == pytest.approx(transformer(12, 768, 40478), rel=0.01)
    assert table["ViT-H/14"] == pytest.approx(transformer(32, 1280, 0), rel=0.01)
    assert table["ResNet-152"] == resnet_152_parameters()


def resnet_152_parameters() -> int:
    """Convolutions without biases, two numbers a channel for each batch normalisation, and the last layer."""
    total, n_in = 3 * 64 * 49 + 2 * 64, 64
    for width, n_blocks in ((64, 3), (128, 8), (256, 36), (512, 3)):
        for block in range(n_blocks):
            n_out = 4 * width
            total += n_in * width + 9 * width * width + width * n_out + 2 * (2 * width + n_out)
            total += n_in * n_out + 2 * n_out if block == 0 else 0
            n_in = n_out
    return total + n_in * 1000 + 1000


WRONG = {
    "out of range": ({"parameters": "175"}, "parameters 175 is outside"),
    "no place": ({"source_place": "parameters: Table 2.1"}, "train_flops has no place"),
    "a place for nothing": ({"train_flops": ""}, "a place is given for train_flops"),
    "unknown field": ({"field": "text"}, "field 'text'"),
    "a date that is none": ({"date": "2020-13"}, "date '2020-13'"),
    "no unit": ({"sample_unit": ""}, "training_samples need a unit"),
    "no address": ({"source_url": "GPT-3 paper"}, "https address"),
    "more active than all": ({"active_parameters": "1e12"}, "more parameters are active"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_row_is_refused_by_name(raw, tmp_path, changes, message):
    with pytest.raises(ValueError, match="GPT-3: .*" + re.escape(message)):
        load_changed(raw, tmp_path, "GPT-3", **changes)


def test_a_row_twice_and_a_missing_column_are_refused(raw, tmp_path):
    with pytest.raises(ValueError, match="GPT-3: stands twice"):
        load_changed(raw.replace({"system": {"GPT-2": "GPT-3"}}), tmp_path)
    with pytest.raises(ValueError, match="columns differ by \\['note'\\]"):
        load_changed(raw.drop(columns="note"), tmp_path)


@given(st.dates(min_value=pd.Timestamp("1980-01-01").date(), max_value=pd.Timestamp("2049-12-31").date()))
@settings(max_examples=50, deadline=None)
def test_decimal_year_is_within_half_a_month(day):
    exact = day.year + (day.timetuple().tm_yday - 0.5) / 365.25
    assert abs(landmarks.decimal_year(f"{day:%Y-%m}") - exact) < 0.6 / 12


@pytest.mark.parametrize("date", ["2020", "2020-00", "2020-1", "20-01", "2020-01-01"])
def test_another_form_of_date_is_refused(date):
    with pytest.raises(ValueError, match="YYYY-MM"):
        landmarks.decimal_year(date)


def test_labels_touch_nothing():
    generator = np.random.default_rng(0)
    points = pd.DataFrame(
        {"x": generator.uniform(0, 1, 25), "y": generator.uniform(0, 1, 25), "name": [f"point {i}" for i in range(25)]}
    )
    fig, ax = plt.subplots(figsize=(7, 5))
    ax.plot(points["x"], points["y"], "o")
    ax.set(xlim=(-0.1, 1.1), ylim=(-0.1, 1.1))
    line = ([0, 1], [0.2, 0.9])
    landmarks.label_points(ax, points, x="x", y="y", text="name", colors=["black"] * 25, lines=[line])
    boxes = [label.get_window_extent() for label in ax.texts if label.get_text()]
    assert len(boxes) == 25
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    centres = ax.transData.transform(points[["x", "y"]])
    on_line = ax.transData.transform(np.column_stack([np.linspace(*line[0], 5000), np.linspace(*line[1], 5000)]))
    assert not any(box.contains(*point) for box in boxes for point in [*centres, *on_line])
    plt.close(fig)


def test_no_room_for_a_label_is_said():
    fig, ax = plt.subplots(figsize=(1, 1))
    points = pd.DataFrame({"x": [0.5], "y": [0.5], "name": ["a name much longer than the figure is wide"]})
    with pytest.raises(ValueError, match="no free place"):
        landmarks.label_points(ax, points, x="x", y="y", text="name", colors=["black"])
    plt.close(fig)
