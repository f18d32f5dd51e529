"""Results files: provenance, checksums, and nothing lost when a write fails."""

import errno
import json
import os

import numpy as np
import pytest
import torch

from bigmodel_utils import claims, notebook, results


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv(results.OUTPUT_VARIABLE, str(tmp_path))
    notebook.start("07_try", {"seed": 3, "device_name": "cpu", "widths": [4, 2], "_hidden": 1, "module": json})
    yield tmp_path
    claims.ledger.clear()
    notebook._run = None


def test_values_claims_and_provenance_come_back(run):
    claims.check("07-one", "One is one", 1, 1, 0, "arithmetic")
    path = results.save({"a": np.float64(0.5), "b": torch.tensor([1.0, 2.0]), "c": {"d": [np.int64(3)]}})
    record = results.read(path)
    assert record["values"] == results.load("07_try") == {"a": 0.5, "b": [1.0, 2.0], "c": {"d": [3]}}
    assert [claim["id"] for claim in record["claims"]] == ["07-one"]
    provenance = record["provenance"]
    assert provenance["parameters"] == {"seed": 3, "device_name": "cpu", "widths": [4, 2]}
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["hardware"]["cores"] == os.cpu_count()
    assert provenance["seconds"] > 0 and provenance["peak_memory_bytes"] > 2**20


def test_a_changed_digit_is_noticed(run):
    path = results.save({"a": 0.5})
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(results.ResultsError, match=r"07_try\.json is damaged.*run its notebook again"):
        results.load("07_try")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_damage_of_any_kind_is_named(run, content):
    path = results.save({})
    path.write_bytes(content)
    with pytest.raises(results.ResultsError, match="is damaged"):
        results.read(path)


def test_missing_results_say_what_to_run(run):
    with pytest.raises(results.ResultsError, match=r"notebooks/09_none\.ipynb"):
        results.load("09_none")


def test_what_json_cannot_hold_is_refused(run):
    with pytest.raises(TypeError, match="not object"):
        results.save({"a": object()})


def test_a_full_disk_leaves_the_old_file(run, monkeypatch):
    path = results.save({"a": 1})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        results.save({"a": 2})
    assert results.load("07_try") == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["07_try.json"]


def test_upstream_results_are_found_where_the_runner_says(run, tmp_path_factory, monkeypatch):
    results.save({"a": 1})
    (run / "artifacts" / "07_try").mkdir(parents=True)
    (run / "artifacts" / "07_try" / "weights").write_bytes(b"w")
    monkeypatch.setenv(results.UPSTREAM_VARIABLE, str(run))
    monkeypatch.setenv(results.OUTPUT_VARIABLE, str(tmp_path_factory.mktemp("other")))
    assert results.load("07_try") == {"a": 1}
    assert results.find_artifact("07_try/weights").read_bytes() == b"w"
    assert results.find_artifact("07_try/none") is None


def test_saving_needs_a_started_notebook():
    with pytest.raises(RuntimeError, match=r"notebook\.start"):
        results.save({})


def test_a_notebook_that_cannot_fit_is_refused_before_it_runs(run, capsys):
    with pytest.raises(MemoryError, match=r"needs about 1000000\.0 GB"):
        notebook.predict_cost(1, 1e15)
    notebook.predict_cost(40, 5e8)
    assert "about 40 s and 0.5 GB" in capsys.readouterr().out


def test_an_unknown_device_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown device 'gpu0'; use auto, cpu"):
        notebook.start("07_try", {"device_name": "gpu0"})


def test_published_claims_are_those_of_the_build_or_else_of_the_committed_outputs(run, tmp_path, monkeypatch):
    course = tmp_path / "course"
    (course / "notebooks").mkdir(parents=True)
    stored = claims.Claim("03-one", "s", 1.0, 1.0, 0.0, "==", "src", "pass")
    output = {"output_type": "display_data", "data": {}, "metadata": {"claim": vars(stored)}}
    for name in ("03_other", "07_try"):  # the second is the notebook that runs
        cells = [{"cell_type": "code", "outputs": [output]}]
        (course / "notebooks" / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(results, "course_folder", lambda: course)
    assert results.published_claims() == [stored]

    claims.check("03-one", "s", 2, 1, 0, "src")
    path = results.save({})
    monkeypatch.setenv(results.UPSTREAM_VARIABLE, str(tmp_path))
    with pytest.raises(results.ResultsError, match=r"03_other\.json is missing"):
        results.published_claims()
    path.rename(path.with_name("03_other.json"))
    assert [(claim.value, claim.status) for claim in results.published_claims()] == [(2.0, "fail")]

    monkeypatch.setattr(results, "course_folder", lambda: None)
    assert results.published_claims() == []
