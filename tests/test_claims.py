"""Claims: checks that can fail, verdicts computed from findings, and prose held to both."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigmodel_utils import claims


@pytest.fixture(autouse=True)
def empty_ledger():
    claims.ledger.clear()
    yield
    claims.ledger.clear()


numbers = st.floats(-1e6, 1e6)


@given(numbers, numbers, st.floats(0, 1e3))
def test_equality_is_the_distance_within_the_tolerance(value, reference, tolerance):
    claims.ledger.clear()
    assert claims.check("00-a", "s", value, reference, tolerance, "src").passed == (abs(value - reference) <= tolerance)


@pytest.mark.parametrize(
    ("relation", "below", "equal", "above"), [("<=", 1, 1, 0), (">=", 0, 1, 1), ("<", 1, 0, 0), (">", 0, 0, 1)]
)
def test_relations(relation, below, equal, above):
    outcomes = [claims.check(f"00-{value}", "s", value, 5, 0, "src", relation=relation).passed for value in (4, 5, 6)]
    assert outcomes == [bool(below), bool(equal), bool(above)]


@pytest.mark.parametrize("relation", list(claims.RELATIONS))
def test_not_a_number_passes_nothing(relation):
    assert claims.check("00-nan", "s", math.nan, 1, 10, "src", relation=relation).status == "fail"


def test_a_claim_that_these_sizes_cannot_show_is_neither_passed_nor_failed():
    assert claims.check("00-small", "s", 3, 1, 0, "src", tested=False).status == "not tested"


def test_bad_claims_are_refused():
    claims.check("00-a", "s", 1, 1, 0, "src")
    with pytest.raises(ValueError, match="used twice"):
        claims.check("00-a", "s", 1, 1, 0, "src")
    with pytest.raises(ValueError, match="unknown relation '~'"):
        claims.check("00-b", "s", 1, 1, 0, "src", relation="~")
    with pytest.raises(ValueError, match="finite reference"):
        claims.check("00-c", "s", 1, math.nan, 0, "src")
    with pytest.raises(ValueError, match="tolerance >= 0"):
        claims.check("00-d", "s", 1, 1, -1, "src")
    with pytest.raises(ValueError, match="at least one finding"):
        claims.judge("00-e", "s", {}, "src")


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ({"here": True, "there": True}, "supported"),
        ({"here": True, "there": False}, "supported with conditions"),
        ({"here": False, "there": False}, "not supported"),
    ],
)
def test_a_verdict_follows_from_the_findings(findings, verdict):
    assert claims.judge("00-v", "s", findings, "src").verdict == verdict


@pytest.mark.parametrize(
    ("value", "tolerance", "shown"),
    [
        (0.87534, 0, "0.875"),
        (0.87534, 0.02, "0.88"),
        (2.2e-16, 1e-12, "0"),
        (124439808, 0, "124,439,808"),
        (1234.56, 0, "1.23e+03"),
    ],
)
def test_numbers_are_shown_at_the_digits_that_mean_something(value, tolerance, shown):
    assert claims.format_number(value, tolerance) == shown


CLAIM = {"05-r2": {"value": 0.8753, "reference": 0.85, "status": "pass"}}


@pytest.mark.parametrize("text", ["0.875", "0.88", "0.85", "88 %", "87.5 %", "the fit"])
def test_prose_may_state_a_claims_value_or_reference(text):
    assert claims.prose_errors(f"R2 is [{text}](#05-r2).", CLAIM) == []


@pytest.mark.parametrize("text", ["0.87", "0.876", "0.7", "90 %", "8.75e-2"])
def test_prose_that_states_another_number_is_refused(text):
    assert len(claims.prose_errors(f"R2 is [{text}](#05-r2).", CLAIM)) == 1


def test_prose_that_cites_no_claim_is_refused():
    assert "no cell checks" in claims.prose_errors("R2 is [0.875](#05-r3).", CLAIM)[0]


@given(st.floats(1e-6, 1e6), st.integers(0, 6))
def test_a_number_rounded_for_prose_agrees_and_the_next_one_does_not(value, n_decimals):
    claim = {"00-x": {"value": value, "reference": math.inf, "status": "pass"}}
    shown = f"{value:.{n_decimals}f}"
    assert claims.prose_errors(f"[{shown}](#00-x)", claim) == []
    other = f"{float(shown) + 2 * 10**-n_decimals:.{n_decimals}f}"
    assert claims.prose_errors(f"[{other}](#00-x)", claim)


def test_the_outcome_is_the_verdict_or_what_became_of_a_number():
    found = [
        claims.check("00-a", "s", 1, 1, 0, "src"),
        claims.check("00-b", "s", 2, 1, 0, "src"),
        claims.check("00-c", "s", 2, 1, 0, "src", tested=False),
        claims.judge("00-d", "s", {"x": True, "y": False}, "src"),
        claims.judge("00-e", "s", {"x": False}, "src"),
        claims.judge("00-f", "s", {"x": True}, "src"),
        claims.judge("00-g", "s", {"x": True}, "src", tested=False),
    ]
    outcomes = [claim.outcome for claim in found]
    assert outcomes == ["holds", "fails", "not tested", "supported with conditions", "not supported", "supported", "not tested"]
    assert set(outcomes) == set(claims.OUTCOMES)
