"""Tables, estimates, back-test and plans, against arithmetic written out, published figures and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_utils import landmarks, scaling
from bigmodel_utils.models import GPTConfig
from bigmodel_utils.scaling import laws, runs

RUNS = runs.published_runs().set_index("run")


# The tables


def test_every_accelerator_has_a_source_and_every_price_a_date():
    table = runs.accelerators()
    assert {"v100-sxm2", "a100-40gb", "a100-80gb", "h100-sxm", "h800-sxm", "h200-sxm", "b200-sxm"} <= set(table.index)
    assert {"tpu-v3", "tpu-v4", "tpu-v5e", "tpu-v5p", "mi250x", "mi300x"} <= set(table.index)
    assert table.index.is_unique and table["spec_url"].str.startswith("https://").all()
    priced = table[table["usd_per_hour"].notna()]
    assert priced["price_url"].str.startswith("https://").all() and priced["price_date"].str.match(r"20\d\d").all()
    assert (priced["usd_per_hour_low"] <= priced["usd_per_hour"]).all()
    assert (priced["usd_per_hour"] <= priced["usd_per_hour_high"]).all()
    in_range = {"peak_16bit_flops_per_s": (1e14, 5e15), "memory_bytes": (1e10, 1e12), "bytes_per_s": (5e11, 1e13)}
    for column, (low, high) in in_range.items():
        assert table[column].dropna().between(low, high).all(), column
    ridge = table["peak_16bit_flops_per_s"] / table["bytes_per_s"]  # FLOPs a byte: 100 to 600 on all of these
    assert ridge.dropna().between(100, 600).all()


def test_every_published_run_has_a_source_and_a_known_accelerator():
    assert RUNS.index.is_unique and RUNS["source_url"].str.startswith("https://").all()
    assert RUNS["accelerator"].isin(runs.accelerators().index).all()
    timed = RUNS[RUNS["accelerator_hours"].notna()]
    assert len(timed) >= 15 and timed["kind"].isin(["reported", "devices x time", "throughput"]).all()
    for named in ("GPT-3", "BLOOM", "OPT", "LLaMA 65B", "Llama 2 70B", "Llama 3.1 405B", "PaLM", "Chinchilla", "DeepSeek-V3"):
        assert any(name.startswith(named) for name in RUNS.index), named


def test_the_runs_agree_with_the_table_of_landmarks():
    """Entered from the papers twice, by different people, for different purposes."""
    other = landmarks.load().set_index("system")
    pairs = {"BLOOM": "BLOOM-176B", "LLaMA-65B": "LLaMA 65B", "Llama 2 70B": "Llama 2 70B", "Llama 3.1 405B": "Llama 3.1 405B"}
    for theirs, ours in pairs.items():
        assert RUNS.loc[ours, "accelerator_hours"] == pytest.approx(other.loc[theirs, "accelerator_hours"])
        assert RUNS.loc[ours, "tokens"] == pytest.approx(other.loc[theirs, "training_samples"])
        assert RUNS.loc[ours, "parameters"] == pytest.approx(other.loc[theirs, "parameters"], rel=0.02)


def test_hours_of_devices_times_time_are_what_their_places_say():
    hours = RUNS["accelerator_hours"]
    assert hours["GPT-3 175B"] == 10_000 * 14.8 * 24
    assert hours["Gopher 280B"] == 4096 * 920
    assert hours["PaLM 540B"] == 6144 * 1200 + 3072 * 336
    assert hours["OPT-175B"] == 992 * 34 * 24
    assert hours["SmolLM3 3B"] == 384 * 24 * 24
    assert hours["BloombergGPT 50B"] == 512 * 53 * 24
    assert hours["MT-NLG 530B"] == pytest.approx(2240 * 60.1 / 3600 * 270e9 / (1920 * 2048), rel=1e-4)
    assert hours["Nemotron-4 15B"] == pytest.approx(24 * (768 * 0.8 + 1536 * 0.4 + 2304 * 11.9), rel=1e-5)


def test_published_flops_are_six_n_d_or_eight_where_they_count_recomputation():
    published = RUNS["published_flops"].dropna()
    ratio = (published / RUNS["flops"][published.index]).to_dict()
    recomputed = {name: ratio.pop(name) for name in ("OPT-175B", "BloombergGPT 50B")}
    assert set(ratio) == {"GPT-3 175B", "Chinchilla 70B", "PaLM 540B", "Llama 3.1 405B"}
    assert list(ratio.values()) == pytest.approx([1] * 4, abs=0.03)
    assert list(recomputed.values()) == pytest.approx([8 / 6] * 2, abs=0.04)


def test_efficiency_by_hand_and_below_what_the_authors_report_for_steps():
    assert RUNS.loc["BLOOM-176B", "efficiency"] == pytest.approx(6 * 176.247e9 * 366e9 / (1082990 * 3600 * 312e12), rel=1e-4)
    deepseek = 6 * 37e9 * 14.8e12 / (2664000 * 3600 * 989e12)
    assert RUNS.loc["DeepSeek-V3", "efficiency"] == pytest.approx(deepseek) and RUNS.loc["DeepSeek-V3", "is_mixture"]
    reported = RUNS["published_mfu"].dropna()
    assert len(reported) >= 6 and (RUNS["efficiency"][reported.index] <= reported).all()


# Intervals


@given(st.lists(st.floats(0.1, 10), min_size=9, max_size=60, unique=True))
@settings(max_examples=50, deadline=None)
def test_an_order_interval_leaves_out_what_it_may(values):
    """Each value in turn is the new one: at most the promised share lies outside the interval of the others."""
    outside = 0
    for i, value in enumerate(values):
        interval = runs.order_interval(values[:i] + values[i + 1 :], coverage=0.75)
        outside += not interval.low <= value <= interval.high
    assert outside <= 0.25 * len(values) + 1e-9


def test_too_few_values_promise_nothing():
    with pytest.raises(ValueError, match="needs at least 9 values"):
        runs.order_interval([1.0] * 8)
    assert runs.order_interval(range(1, 10)) == (1, 5, 9)


def test_a_product_of_intervals_is_that_of_log_normal_factors():
    random, z = np.random.default_rng(0), 1.2816  # of 80 %
    factors = [(2.0, 5.0), (0.3, 0.4), (1.0, 1.8)]
    draws = np.ones(400_000)
    for low, high in factors:
        spread = math.log(high / low) / 2 / z
        draws *= np.exp(random.normal(math.log(low * high) / 2, spread, draws.size))
    expected = np.quantile(draws, [0.1, 0.5, 0.9])
    assert runs.product(*factors) == pytest.approx(expected, rel=0.01)
    assert runs.product(3.0, runs.reciprocal(runs.Interval(1, 2, 4))) == pytest.approx((0.75, 1.5, 3))
    with pytest.raises(ValueError, match="two positive bounds in order"):
        runs.Interval.of((2, 1))


# The back-test


def test_the_back_test_predicts_each_run_from_the_other_families():
    table = scaling.back_test().set_index("run")
    others = RUNS[(RUNS["family"] != "LLaMA") & RUNS["efficiency"].notna()]["efficiency"]
    at_peak = 6 * 65285660672 * 1.4e12 / 312e12 / 3600
    assert table.loc["LLaMA 65B", "predicted_hours"] == pytest.approx(at_peak / others.median())
    outside = math.floor(0.1 * (len(others) + 1))
    assert table.loc["LLaMA 65B", "high_hours"] == pytest.approx(at_peak / np.sort(others)[outside - 1])
    assert table.loc["LLaMA 65B", "ratio"] == pytest.approx(table.loc["LLaMA 65B", "predicted_hours"] / 1022362)


def test_the_back_test_is_no_better_and_no_worse_than_it_says():
    """Four of five intervals should hold. Families are correlated, so a binomial margin is the least to allow."""
    for by in ("family", "run"):
        table = scaling.back_test(by=by)
        n = len(table)
        assert abs(table["is_covered"].mean() - 0.8) < 2 * math.sqrt(0.8 * 0.2 / n)
    factor = np.exp(np.abs(np.log(table["ratio"])))
    assert factor.median() < 1.5 and factor.max() < 4


# Estimates


def test_an_estimate_is_the_arithmetic_written_out():
    known = {"efficiency": (0.5, 0.5), "usd_per_hour": 2.0, "host_power": (1.2, 1.2), "pue": (1.1, 1.1)}
    run = scaling.estimate_run(10**9, 10**10, "a100-80gb", 16, kg_co2_per_kwh=(0.4, 0.4), **known)
    hours = 6e19 / 312e12 / 0.5 / 3600
    assert run.flops == 6e19 and run.accelerator_hours == pytest.approx([hours] * 3)
    assert run.days == pytest.approx([hours / 16 / 24] * 3) and run.usd == pytest.approx([2 * hours] * 3)
    kwh = hours * 0.4 * 1.2 * 1.1
    assert run.energy_kwh == pytest.approx([kwh] * 3) and run.co2_kg == pytest.approx([0.4 * kwh] * 3)
    assert list(run.table().columns) == ["low", "middle", "high"]


def test_models_in_every_form_and_precision():
    config = GPTConfig(context_length=256)
    exact = scaling.estimate_run(config, 2560, "h100-sxm").flops
    assert exact == scaling.train_flops(config, 2560)
    eight = scaling.estimate_run(10**9, 10**9, "h100-sxm", precision="float8", efficiency=(0.2, 0.2))
    sixteen = scaling.estimate_run(10**9, 10**9, "h100-sxm", efficiency=(0.2, 0.2))
    assert eight.accelerator_hours.middle == pytest.approx(sixteen.accelerator_hours.middle * 989 / 1979)
    with pytest.raises(ValueError, match="give your own"):
        scaling.estimate_run(10**9, 10**9, "h100-sxm", precision="float8")
    with pytest.raises(ValueError, match="no 8-bit peak of a100-80gb"):
        scaling.estimate_run(10**9, 10**9, "a100-80gb", precision="float8", efficiency=(0.2, 0.2))
    with pytest.raises(ValueError, match="choose from v100-sxm2"):
        scaling.estimate_run(10**9, 10**9, "gtx-970")
    bare = scaling.estimate_run(10**9, 10**9, "mi250x")
    assert bare.energy_kwh is None and bare.co2_kg is None and bare.usd is None


def test_published_energy_and_emissions_lie_in_the_interval():
    """Patterson et al. 2021, table 4: 1287 MWh and 552 t for GPT-3; its carbon intensity given, as they knew it."""
    run = scaling.estimate_run(174_600_000_000, 300e9, "v100-sxm2", 10_000, kg_co2_per_kwh=(0.429, 0.429))
    assert run.energy_kwh.low < 1287e3 < run.energy_kwh.high
    assert run.co2_kg.low < 552e3 < run.co2_kg.high


def test_a_layout_that_does_not_fit_is_refused_with_what_takes_the_memory():
    with pytest.raises(scaling.Infeasible, match=r"^memory: .* most goes to optimiser"):
        scaling.estimate_run("llama-2-7b", 1e9, "h100-sxm", layout=scaling.Layout())
    run = scaling.estimate_run("llama-2-7b", 1e9, "h100-sxm", layout=scaling.Layout(data=8))
    assert run.days.middle == pytest.approx(run.accelerator_hours.middle / 8 / 24)
    assert run.memory["total"] < 72e9


# Plans


def test_a_plan_is_the_optimum_of_the_law_and_keeps_to_its_budget():
    plan = scaling.plan(usd=1e6)
    n = np.geomspace(1e9, 1e12, 20_001)
    best = n[np.argmin(runs.REPLICATED.loss(n, plan.flops.middle / 6 / n))]
    assert plan.n_parameters.middle == pytest.approx(best, rel=2e-3)
    assert plan.shape.n_parameters == pytest.approx(best, rel=0.02)
    assert plan.estimate.usd.middle == pytest.approx(1e6, rel=1e-3)
    assert plan.estimate.usd.low < 1e6 < plan.estimate.usd.high
    assert plan.loss.low < plan.loss.middle < plan.loss.high
    assert scaling.train_flops(plan.shape, int(plan.n_tokens.middle)) == pytest.approx(plan.flops.middle, rel=1e-6)


@pytest.mark.parametrize("accelerator", ["a100-40gb", "h100-sxm", "tpu-v5e"])
@pytest.mark.parametrize("flops", [1e21, 1e23, 1e25])
def test_a_planned_layout_fits(flops, accelerator):
    plan = scaling.plan(flops=flops, accelerator_name=accelerator)
    device = runs.accelerator(accelerator)
    assert plan.memory == plan.layout.memory_bytes(plan.shape, plan.shape.context_length)
    assert plan.memory["total"] <= runs.FILL * device.memory_bytes
    assert plan.estimate.days.middle <= 90.01
    assert plan.layout.tensor <= 8 and plan.shape.n_heads % plan.layout.tensor == 0
    assert plan.layout.bubble <= 1 / 3


def test_the_more_money_the_larger_the_model():
    small, large = scaling.plan(usd=1e4), scaling.plan(usd=1e6)
    law = runs.REPLICATED
    assert large.n_parameters.middle / small.n_parameters.middle == pytest.approx(100**law.a)
    assert laws.compute_optimal(large.flops.middle, law)[0] == large.n_parameters.middle


@pytest.mark.parametrize(
    ("request_", "limit"),
    [
        ({"flops": 1e24, "n_accelerators": 8}, "time: .* 428 accelerators would do"),
        ({"flops": 1e24, "n_accelerators": 8, "max_days": 1e5}, "memory: "),
        ({"flops": 1e24, "max_tokens": 1e11}, "data: the optimum is 1.74e"),
        ({"flops": 1e24, "batch_tokens": 100_000}, "batch: 24 sequences of 4096"),
        ({"flops": 1e31}, "time: "),
    ],
)
def test_an_infeasible_request_says_which_limit_binds(request_, limit):
    with pytest.raises(scaling.Infeasible, match=f"^{limit}"):
        scaling.plan(**request_)


def test_a_plan_needs_one_budget_and_a_price():
    for budgets in ({}, {"usd": 1.0, "flops": 1e20}):
        with pytest.raises(ValueError, match="one budget"):
            scaling.plan(**budgets)
    with pytest.raises(ValueError, match="no price of mi250x"):
        scaling.plan(usd=1e6, accelerator_name="mi250x")


# The form


def test_the_form_shows_only_where_somebody_looks(monkeypatch, capsys):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert scaling.cost_form() is None
    ipywidgets = pytest.importorskip("ipywidgets")
    monkeypatch.setenv("JPY_SESSION_NAME", "12_costs.ipynb")
    form = scaling.cost_form()
    assert isinstance(form, ipywidgets.VBox) and len(form.children) == 5


def test_the_form_s_table_is_the_estimate():
    table = scaling.cost_table(7, 2000, "h100-sxm", 256)
    run = scaling.estimate_run(7e9, 2e12, "h100-sxm", 256)
    assert table.equals(run.table()) and table.index[0] == "accelerator-hours"
