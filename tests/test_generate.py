"""Generation against literal loops, brute-force distributions and exhaustive search."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from bigmodel_utils import predict
from bigmodel_utils.models.gpt import GPT, GPTConfig

LAYOUTS = [{}, {"position": "rotary", "norm": "rms", "feed_forward": "swiglu", "n_kv_heads": 1, "qk_norm": True, "bias": False}]


def build(layout: dict, vocab_size: int = 5, context_length: int = 7, seed: int = 0) -> GPT:
    """A small model in float64 with opinions, in training mode and with dropout, which generation must switch off."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, context_length, 2, 2, 8, dropout=0.2, **layout)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6)
    return model


def draw_tokens(n_rows: int, length: int, vocab_size: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (n_rows, length), generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def log_probabilities(model: GPT, text: list[int]) -> list[float]:
    """Of each token that may follow one text, in evaluation mode."""
    training = model.training
    window = text[-model.config.context_length :]
    logits = model.eval()(torch.tensor([window]))[0, -1].tolist()
    model.train(training)
    total = math.log(math.fsum(math.exp(value) for value in logits))
    return [value - total for value in logits]


# The distribution of one token.


def is_borderline(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> bool:
    """Whether rounding decides what is kept: ties, or a cumulative probability that is top_p."""
    weights = sorted((math.exp(value / temperature) for value in logits), reverse=True)
    sums = list(itertools.accumulate(weights[:top_k]))
    return len(set(weights)) < len(weights) or any(abs(mass / sums[-1] - (top_p or -1.0)) < 1e-9 for mass in sums)


def probabilities_by_hand(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """Sort, cut, cut again, normalise."""
    weights = {token: math.exp(value / temperature) for token, value in enumerate(logits)}
    ranked = sorted(weights, key=weights.get, reverse=True)[:top_k]
    if top_p is not None:
        total, kept = math.fsum(weights[token] for token in ranked), []
        while ranked and math.fsum(weights[token] for token in kept) / total < top_p:
            kept.append(ranked.pop(0))
        ranked = kept
    total = math.fsum(weights[token] for token in ranked)
    return [weights[token] / total if token in ranked else 0.0 for token in range(len(logits))]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.floats(-5, 5), min_size=6, max_size=6, unique=True), min_size=1, max_size=3),
    st.floats(0.1, 5),
    st.none() | st.integers(1, 9),
    st.none() | st.floats(0.01, 1),
)
def test_distribution_equals_brute_force(rows, temperature, top_k, top_p):
    assume(not any(is_borderline(row, temperature, top_k, top_p) for row in rows))
    found = predict.token_probabilities(torch.tensor(rows, dtype=torch.float64), temperature, top_k, top_p)
    expected = [probabilities_by_hand(row, temperature, top_k, top_p) for row in rows]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@given(st.integers(1, 8), st.integers(1, 8))
@settings(deadline=None)
def test_ties_do_not_keep_more_than_top_k(n_tokens, top_k):
    kept = predict.token_probabilities(torch.zeros(2, n_tokens), top_k=top_k)
    assert (kept > 0).sum(dim=1).tolist() == [min(top_k, n_tokens)] * 2
    torch.testing.assert_close(kept.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("arguments", [(0.0,), (1e-300,), (1.0, 1), (1.0, None, 1e-12), (1e-300, 3, 0.5)])
def test_extremes_are_greedy(arguments, dtype):
    logits = torch.tensor([[3e4, -3e4, 2.0], [-7.0, -5.0, -6.0]], dtype=dtype)
    assert predict.token_probabilities(logits, *arguments).tolist() == [[1, 0, 0], [0, 1, 0]]


def test_forbidden_tokens_stay_forbidden_and_loose_limits_change_nothing():
    logits = torch.tensor([[1.0, -math.inf, 0.5, 0.2]])
    plain = predict.token_probabilities(logits)
    assert plain[0, 1] == 0
    torch.testing.assert_close(predict.token_probabilities(logits, 1.0, 99, 1.0), plain)


# Generation.


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(LAYOUTS), st.integers(1, 2), st.integers(1, 9), st.integers(0, 12), st.booleans(), st.integers(0, 9))
def test_greedy_is_a_loop_of_argmax(layout, n_rows, length, n_tokens, use_cache, seed):
    model, tokens = build(layout, seed=seed), draw_tokens(n_rows, length, seed=seed)
    found = predict.generate(model, tokens, n_tokens, temperature=0, use_cache=use_cache)
    for row, text in enumerate(tokens.tolist()):
        for _ in range(n_tokens):
            scores = log_probabilities(model, text)
            text = [*text, scores.index(max(scores))]
        assert found[row].tolist() == text


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(LAYOUTS), st.integers(1, 3), st.integers(1, 9), st.integers(0, 12), st.sampled_from([0.3, 1.0, 2.0]),
    st.none() | st.integers(1, 5), st.none() | st.floats(0.1, 1), st.integers(0, 9),
)  # fmt: skip
def test_cache_changes_no_draw_within_and_beyond_the_context(layout, n_rows, length, n_tokens, temperature, top_k, top_p, seed):
    model, tokens = build(layout, seed=seed), draw_tokens(n_rows, length, seed=seed)
    cached, plain = (
        predict.generate(model, tokens, n_tokens, temperature, top_k, seeded(seed), use_cache, top_p)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain) and cached.shape == (n_rows, length + n_tokens)
    assert torch.equal(cached[:, :length], tokens) and cached.dtype == tokens.dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arguments", [(1.0, None, None), (0.7, 3, None), (1.5, None, 0.8)])
def test_pairs_of_tokens_come_as_often_as_their_probability_says(layout, arguments):
    model, (temperature, top_k, top_p), n_rows = build(layout), arguments, 5_000
    tokens = draw_tokens(1, 3).expand(n_rows, -1)
    drawn = predict.generate(model, tokens, 2, temperature, top_k, seeded(), top_p=top_p)[:, 3:]
    counts = torch.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25)
    expected, text = [], tokens[0].tolist()
    for first, p in enumerate(probabilities_by_hand(log_probabilities(model, text), temperature, top_k, top_p)):
        then = probabilities_by_hand(log_probabilities(model, [*text, first]), temperature, top_k, top_p)
        expected += [p * q for q in then]
    possible = [pair for pair in range(25) if expected[pair] * n_rows >= 5]
    rare = n_rows - sum(int(counts[pair]) for pair in possible)
    assert all(counts[pair] == 0 for pair in range(25) if expected[pair] == 0)
    observed = [int(counts[pair]) for pair in possible] + [rare]
    wanted = [expected[pair] * n_rows for pair in possible]
    wanted.append(n_rows - sum(wanted))
    if wanted[-1] < 5:  # too few for the test's approximation: into the last possible pair
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    assert stats.chisquare(observed, wanted).pvalue > 1e-4


def test_same_seed_same_text_and_the_global_generator_is_left_alone():
    model, tokens = build({}), draw_tokens(4, 3)
    state = torch.get_rng_state()
    first, second, third = (predict.generate(model, tokens, 20, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    first = predict.generate(model, tokens, 20)
    torch.manual_seed(5)
    assert torch.equal(predict.generate(model, tokens, 20), first)


def test_cache_reads_each_token_once_and_no_cache_all_of_them():
    model, read = build({}), []
    model.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].shape[1]))
    predict.generate(model, draw_tokens(1, 3), 7)
    assert read == [3, 1, 1, 1, 1, 7, 7]  # the context is 7
    read.clear()
    predict.generate(model, draw_tokens(1, 3), 7, use_cache=False)
    assert read == [3, 4, 5, 6, 7, 7, 7]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_stands_behind_a_text_changes_nothing(layout):
    model = build(layout).eval()
    for length in range(1, 8):
        tokens = draw_tokens(3, length)
        with torch.no_grad():
            torch.testing.assert_close(predict.logits_of_padded(model, tokens), model(tokens)[:, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", [lambda *a: predict.generate(*a), lambda *a: predict.beam_search(*a, n_beams=2)[0]])
def test_evaluation_mode_without_gradients_and_the_mode_is_put_back(training, call):
    model = build({}).train(training)
    text = call(model, draw_tokens(1, 2), 3)
    assert model.training is training and not text.requires_grad
    with pytest.raises(ValueError, match=r"0 \.\.\. 4, got 9"):
        call(model, torch.tensor([[9]]), 3)
    assert model.training is training
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        call(model, draw_tokens(1, 2), 3)
    assert model.training is training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_tokens": -1}, "n_tokens must be 0 or more, got -1"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"tokens": torch.tensor([1, 2])}, r"shape \(B, T\), got \(2,\)"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, "T >= 1"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long), "use_cache": False}, "T >= 1"),
    ],
)
def test_senseless_requests_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        predict.generate(**({"model": build({}), "tokens": draw_tokens(1, 2), "n_tokens": 2} | changes))


# Beam search.


def continuations(model: GPT, text: list[int], n_tokens: int, end_token: int | None) -> dict[tuple[int, ...], float]:
    """Every continuation with its log probability; an ended one is filled up."""
    found, following = {}, functools.cache(lambda *beginning: log_probabilities(model, [*text, *beginning]))
    for candidate in itertools.product(range(model.config.vocab_size), repeat=n_tokens):
        ends = [index + 1 for index, token in enumerate(candidate) if token == end_token]
        length = ends[0] if ends else n_tokens
        if any(token != end_token for token in candidate[length:]):
            continue
        steps = [following(*candidate[:index])[candidate[index]] for index in range(length)]
        found[candidate] = math.fsum(steps)
    return found


def beam_by_hand(
    model: GPT, text: list[int], n_tokens: int, n_beams: int, end_token: int | None
) -> dict[tuple[int, ...], float]:
    """One text at a time, lists and sorting."""
    beams: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(n_tokens):
        longer = {}
        for beam, score in beams.items():
            if end_token in beam:
                longer[(*beam, end_token)] = score
                continue
            for token, step in enumerate(log_probabilities(model, [*text, *beam])):
                longer[(*beam, token)] = score + step
        beams = dict(sorted(longer.items(), key=lambda item: -item[1])[:n_beams])
    return beams


def assert_beams(texts: torch.Tensor, scores: torch.Tensor, text: list[int], expected: dict[tuple[int, ...], float]) -> None:
    """Same continuations of one text, in order, with the same log probabilities."""
    ranked = sorted(expected.items(), key=lambda item: -item[1])
    assert [tuple(row) for row in texts.tolist()] == [(*text, *beam) for beam, _ in ranked]
    assert scores.tolist() == pytest.approx([score for _, score in ranked], abs=1e-10)


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(LAYOUTS), st.integers(2, 4), st.integers(1, 4), st.integers(1, 4), st.none() | st.integers(0, 1),
    st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_full_width_is_exhaustive_search(layout, vocab_size, length, n_tokens, end_token, use_cache, seed):
    model, tokens = build(layout, vocab_size, 5, seed), draw_tokens(2, length, vocab_size, seed)
    texts, scores = predict.beam_search(model, tokens, n_tokens, vocab_size**n_tokens, end_token, use_cache)
    for row, text in enumerate(tokens.tolist()):
        expected = continuations(model, text, n_tokens, end_token)
        assert math.fsum(math.exp(score) for score in expected.values()) == pytest.approx(1)  # they are all there are
        assert_beams(texts[row], scores[row], text, expected)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(LAYOUTS), st.integers(1, 3), st.integers(1, 8), st.integers(0, 6), st.integers(1, 7),
    st.none() | st.integers(0, 4), st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_narrow_beams_equal_the_slow_loop(layout, n_rows, length, n_tokens, n_beams, end_token, use_cache, seed):
    model, tokens = build(layout, seed=seed), draw_tokens(n_rows, length, seed=seed)
    texts, scores = predict.beam_search(model, tokens, n_tokens, n_beams, end_token, use_cache)
    for row, text in enumerate(tokens.tolist()):
        assert_beams(texts[row], scores[row], text, beam_by_hand(model, text, n_tokens, n_beams, end_token))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_beam_is_greedy(layout):
    model, tokens = build(layout), draw_tokens(3, 2)
    texts, scores = predict.beam_search(model, tokens, 9, 1)
    assert torch.equal(texts[:, 0], predict.generate(model, tokens, 9, temperature=0)) and scores.shape == (3, 1)


def test_wider_beams_find_what_greedy_misses():
    model, tokens, n_better = build({}, vocab_size=4), draw_tokens(1, 1, 4), 0
    for seed in range(20):
        model = build({}, vocab_size=4, seed=seed)
        greedy, wide = (predict.beam_search(model, tokens, 4, n)[1].max().item() for n in (1, 64))
        assert wide >= greedy - 1e-12
        n_better += wide > greedy + 1e-9
    assert n_better > 0


@pytest.mark.parametrize("arguments", [(-1, 2), (3, 0), (3, 2, 5), (3, 2, -1)])
def test_senseless_beams_are_refused(arguments):
    with pytest.raises(ValueError, match="needs n_tokens >= 0, n_beams >= 1 and an end_token below 5"):
        predict.beam_search(build({}), draw_tokens(1, 2), *arguments)
