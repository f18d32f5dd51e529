"""Prediction, held against slow literal loops, exact laws and other runtimes."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from bigmodel_utils import data, models, predict

CONFIG = models.MLPConfig(widths=(30, 20, 10, 2), dropout=0.5)


@pytest.fixture(scope="module")
def model() -> models.MLP:
    torch.manual_seed(0)
    return models.MLP(CONFIG)


def features(n_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 6, (n_rows, 30), generator=torch.Generator().manual_seed(seed)).float()


@given(n_rows=st.integers(1, 40), batch_size=st.integers(1, 50))
@settings(deadline=None, max_examples=30)
def test_batched_equals_single(model, n_rows, batch_size):
    x, exact = features(n_rows), models.MLP(CONFIG).double()
    exact.load_state_dict(model.state_dict())
    exact.eval()
    single = torch.cat([exact(row.unsqueeze(0).double()) for row in x]).detach()
    torch.testing.assert_close(predict.predict(exact, x.double(), batch_size), single, rtol=0, atol=1e-12)
    torch.testing.assert_close(predict.predict(model, x, batch_size).double(), single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_predict_uses_evaluation_mode_and_puts_the_mode_back(model, training):
    model.train(training)
    first, second = (predict.predict(model, features(5)) for _ in range(2))
    assert torch.equal(first, second) and model.training is training
    with pytest.raises(ValueError):
        predict.predict(model, torch.zeros(3, 29))
    assert model.training is training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predict_names_the_bad_row(model, value):
    x = features(8)
    x[5, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite features in 1 of 8 rows, first in row 5"):
        predict.predict(model, x)


def test_predict_refuses_wrong_width_no_rows_and_no_batches(model):
    with pytest.raises(ValueError, match=r"\(B, 30\), got \(4, 31\)"):
        predict.predict(model, torch.zeros(4, 31))
    with pytest.raises(ValueError, match="got 0 rows"):
        predict.predict(model, torch.zeros(0, 30))
    with pytest.raises(ValueError, match="batch_size"):
        predict.predict(model, features(3), batch_size=0)


@given(n=st.integers(1, 60), percent=st.integers(1, 99))
def test_conformal_rank_is_exact_for_rational_alpha(n, percent):
    exact = math.ceil((n + 1) * (1 - Fraction(percent, 100)))
    assert predict.conformal_rank(n, percent / 100) == exact


@given(scores=st.lists(st.integers(0, 10**6), min_size=2, max_size=30, unique=True), percent=st.integers(1, 99))
def test_coverage_over_all_choices_of_the_new_row(scores, percent):
    """Each of the n + 1 scores plays the new one in turn: exactly min(k, n + 1) of them are covered, never under 1 - alpha."""
    alpha = percent / 100
    covered = 0
    for new in scores:
        others = torch.tensor([float(score) for score in scores if score != new])
        covered += new <= predict.conformal_half_width(others, alpha)
    assert covered == predict.conformal_rank(len(scores) - 1, alpha)
    assert covered / len(scores) >= 1 - alpha - 1e-12


@given(n=st.integers(9, 60), m=st.integers(1, 30), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_coverage_follows_the_beta_binomial_law(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    n_splits, law = 400, predict.coverage_law(n, m, 0.1)
    covered = np.empty(n_splits)
    for i in range(n_splits):
        residuals = torch.randn(n + m, generator=generator) ** 3  # heavy tails: the law does not care
        covered[i] = (residuals[n:].abs() <= predict.conformal_half_width(residuals[:n], 0.1)).sum()
    counts = np.arange(m + 1)
    distance = np.abs((covered[:, None] <= counts).mean(axis=0) - law.cdf(counts)).max()
    assert distance <= math.sqrt(math.log(2 / 1e-9) / (2 * n_splits))  # Dvoretzky-Kiefer-Wolfowitz, failing once in 1e9


def test_coverage_law_has_the_promised_mean():
    assert predict.coverage_law(203, 257, 0.1).mean() == pytest.approx(257 * 184 / 204)


def test_too_few_residuals_promise_nothing():
    assert predict.conformal_half_width(torch.ones(8), 0.1) == math.inf
    assert predict.conformal_half_width(torch.ones(9), 0.1) == 1
    with pytest.raises(ValueError, match="8 calibration rows"):
        predict.coverage_law(8, 10, 0.1)


def test_conformal_refuses_bad_input():
    with pytest.raises(ValueError, match="NaN"):
        predict.conformal_half_width(torch.tensor([1.0, math.nan]), 0.1)
    for rows, alpha in [(0, 0.1), (10, 0.0), (10, 1.0)]:
        with pytest.raises(ValueError, match="alpha"):
            predict.conformal_half_width(torch.ones(rows), alpha)


counts = st.lists(st.integers(0, 5), min_size=4, max_size=4)


@given(a=counts, b=counts)
def test_similarity_is_the_overlap_of_multisets(a, b):
    bag_a, bag_b = ([(i, j) for i, n in enumerate(bag) for j in range(n)] for bag in (a, b))
    union = set(bag_a) | set(bag_b)
    expected = len(set(bag_a) & set(bag_b)) / len(union) if union else 1.0
    found = predict.count_similarity(torch.tensor([a]).float(), torch.tensor([b]).float()).item()
    assert found == pytest.approx(expected, abs=1e-6)


def test_nearest_similarity_is_the_largest():
    x, reference = features(7), features(9, seed=1)
    torch.testing.assert_close(predict.nearest_similarity(x, reference), predict.count_similarity(x, reference).amax(dim=1))


@pytest.fixture(scope="module")
def domain() -> predict.Domain:
    table = data.clean_solubility(data.load_solubility())
    parts = data.prepare_solubility()
    return predict.Domain.fit(table.smiles[table.split == "train"].tolist(), parts["train"].x, parts["validation"].x)


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [
        ("[Na+].O=C([O-])c1ccccc1", "new element Na; salt or mixture"),
        ("CC(=O)[O-]", "ion"),
        ("C[Si](C)(C)C", "new element Si"),
        ("CC(c1ccccc1)" * 20, "too large; far from known"),
        ("Cc1ccccc1", ""),
    ],
)
def test_domain_gives_its_reasons(domain, smiles, reason):
    found = "; ".join(domain.reasons(smiles, torch.from_numpy(data.morgan_counts([smiles]))[0]))
    assert reason in found and bool(reason) == bool(found)


def test_domain_raises_no_more_false_alarms_than_allowed_on_its_calibration(domain):
    x = data.prepare_solubility()["validation"].x
    assert (predict.nearest_similarity(x, domain.reference) < domain.min_similarity).float().mean() <= 0.05


def test_domain_needs_enough_calibration_rows():
    with pytest.raises(ValueError, match="needs at least 19 calibration rows, got 5"):
        predict.Domain.fit(["C"], features(9), features(5), false_alarm=0.05)
    with pytest.raises(ValueError, match="not a valid SMILES"):
        predict.canonical_smiles("C1CC")


def test_cache_asks_for_each_molecule_once_and_answers_the_same():
    asked: list[str] = []

    def lengths(smiles: list[str]) -> torch.Tensor:
        asked.extend(smiles)
        return torch.tensor([float(len(text)) for text in smiles])

    cache = predict.Cache(lengths)
    assert cache(["OCC", "CCO", "C", "C(O)C"]).tolist() == [3, 3, 1, 3]
    assert cache(["CCO", "CC"]).tolist() == [3, 2]
    assert asked == ["CCO", "C", "CC"] and cache.n_predicted == 3


def test_cache_forgets_the_longest_unused():
    asked: list[str] = []
    cache = predict.Cache(lambda smiles: asked.extend(smiles) or torch.ones(len(smiles)), max_size=2)
    for text in ["C", "CC", "C", "CCC", "C", "CC"]:  # CCC drives out CC, not C
        cache([text])
    assert asked == ["C", "CC", "CCC", "CC"]
    assert cache(["C", "CC", "CCC", "CCCC"]).tolist() == [1, 1, 1, 1] and len(cache.answers) == 2
    with pytest.raises(ValueError, match="max_size"):
        predict.Cache(lambda smiles: torch.ones(len(smiles)), max_size=0)


def test_onnx_equals_torch_for_any_batch_and_says_nothing(model, tmp_path, capfd):
    path = tmp_path / "model.onnx"
    predict.export_onnx(model, path, 30)
    small = tmp_path / "int8.onnx"
    predict.quantize_onnx(path, small)
    assert capfd.readouterr() == ("", "")
    run, run_int8 = predict.load_onnx(path), predict.load_onnx(small)
    for n_rows in (1, 2, 7, 100):
        x = features(n_rows, seed=n_rows)
        expected = predict.predict(model, x)
        torch.testing.assert_close(run(x), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(run_int8(x), expected, rtol=0, atol=0.1)
    for runtime in (run, run_int8):
        with pytest.raises(ValueError, match="1 of 2 rows, first in row 1"):
            runtime(torch.tensor([[0.0] * 30, [math.nan] * 30]))
    assert set(tmp_path.iterdir()) == {path, small}  # the weights are inside, and nothing is left lying about


@given(rows=st.lists(st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5), min_size=1, max_size=4))
def test_no_weight_moves_by_more_than_half_a_step(rows):
    weight = torch.tensor(rows)
    codes, scale = predict.quantize_rows(weight)
    assert codes.dtype == torch.int8 and codes.abs().max() <= 127
    moved = (codes.double() * scale.double() - weight.double()).abs()
    assert bool((moved <= scale.double() / 2 * (1 + 1e-5)).all())


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_int8_stays_within_its_bound(seed):
    torch.manual_seed(seed)
    model = models.MLP(CONFIG).double().eval()
    x = features(20, seed).double()
    moved = (predict.predict(predict.quantize(model), x) - predict.predict(model, x)).abs()
    assert bool((moved <= predict.quantization_bound(model.layers, x) * (1 + 1e-6)).all())


def test_quantize_leaves_the_model_alone_and_shrinks_the_copy(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = predict.quantize(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    codes = [value for value in small.state_dict().values() if value.dtype == torch.int8]
    assert sum(value.numel() for value in codes) == 30 * 20 + 20 * 10 + 10 * 2
    with pytest.raises(ValueError, match="Tanh"):
        predict.quantization_bound(torch.nn.Sequential(torch.nn.Tanh()), features(2))


@given(seconds=st.lists(st.floats(0, 1e3), min_size=1, max_size=50), q=st.integers(1, 100))
def test_percentile_is_the_nearest_rank(seconds, q):
    found = predict.percentile(seconds, q)
    assert found in seconds
    assert 100 * sum(value <= found for value in seconds) >= q * len(seconds)
    assert 100 * sum(value < found for value in seconds) < q * len(seconds)


def test_latency_counts_the_calls():
    calls: list[int] = []
    seconds = predict.measure_latency(lambda: calls.append(1), n_calls=7, n_warmup=3)
    assert len(seconds) == 7 and len(calls) == 10 and (seconds >= 0).all()
    with pytest.raises(ValueError, match="measurements"):
        predict.percentile([], 50)
