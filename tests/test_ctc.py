"""CTC against sums over every path, against torch's loss, and the searches against exhaustive ones."""

import itertools
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bigmodel_utils import ctc

FEW = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 10_000)


def draw(n_frames: int, n_labels: int, seed: int) -> torch.Tensor:
    """Log-probabilities (T, K) in float64, some of them very unequal."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n_frames, n_labels, generator=generator, dtype=torch.float64)).log_softmax(dim=-1)


def collapse_by_loop(path, blank: int) -> tuple[int, ...]:
    text, before = [], blank
    for label in path:
        if label not in (before, blank):
            text.append(label)
        before = label
    return tuple(text)


def texts_by_brute_force(log_probs: torch.Tensor, blank: int) -> dict[tuple[int, ...], float]:
    """Every text that T frames can say and its probability: all K^T paths."""
    rows, texts = log_probs.exp().tolist(), defaultdict(float)
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(rows)):
        texts[collapse_by_loop(path, blank)] += math.prod(row[label] for row, label in zip(rows, path))
    return texts


@pytest.mark.parametrize("path, text", [([0, 0], []), ([1, 1, 2], [1, 2]), ([0, 1, 0, 1, 1, 2, 0], [1, 1, 2]), ([], [])])
def test_collapse_merges_repeats_and_then_drops_blanks(path, text):
    assert ctc.collapse(path) == text


@given(st.lists(st.integers(0, 3), max_size=9), st.integers(0, 3))
def test_collapse_equals_the_loop(path, blank):
    assert tuple(ctc.collapse(path, blank)) == collapse_by_loop(path, blank)


@FEW
@given(st.integers(1, 6), st.integers(2, 4), SEEDS, st.data())
def test_likelihood_is_the_sum_over_all_paths(n_frames, n_labels, seed, data):
    blank = data.draw(st.integers(0, n_labels - 1))
    log_probs = draw(n_frames, n_labels, seed)
    texts = texts_by_brute_force(log_probs, blank)
    assert sum(texts.values()) == pytest.approx(1, abs=1e-12)
    for text in list(texts)[:: max(1, len(texts) // 40)]:
        assert ctc.log_likelihood(log_probs, text, blank).exp().item() == pytest.approx(texts[text], rel=1e-10)


@FEW
@given(st.integers(1, 30), st.integers(2, 6), SEEDS, st.data())
def test_likelihood_and_its_gradient_equal_torchs_loss(n_frames, n_labels, seed, data):
    blank = data.draw(st.integers(0, n_labels - 1))
    labels = data.draw(st.lists(st.integers(0, n_labels - 1).filter(lambda label: label != blank), max_size=n_frames))
    logits = draw(n_frames, n_labels, seed).requires_grad_()
    ours = -ctc.log_likelihood(logits.log_softmax(dim=-1), labels, blank)
    target = torch.tensor([labels], dtype=torch.long)
    log_probs = logits.log_softmax(dim=-1).unsqueeze(1)  # (T, 1, K)
    theirs = F.ctc_loss(log_probs, target, (n_frames,), (len(labels),), blank, reduction="sum")
    n_needed = len(labels) + sum(a == b for a, b in itertools.pairwise(labels))
    assert math.isinf(ours.item()) == math.isinf(theirs.item()) == (n_needed > n_frames)
    if n_needed <= n_frames:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_likelihood_of_what_has_probability_zero():
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64).log()
    assert ctc.log_likelihood(log_probs, [2]).item() == -math.inf
    assert ctc.log_likelihood(log_probs, [1]).exp().item() == pytest.approx(0.75)


@pytest.mark.parametrize("shape, labels, blank", [((2, 3), [0], 0), ((2, 3), [3], 0), ((2, 3), [-1], 0), ((3,), [1], 0)])
def test_likelihood_refuses_foreign_labels_and_shapes(shape, labels, blank):
    with pytest.raises(ValueError, match=r"labels are 0 to 2 and not the blank 0|expected log-probabilities \(T, K\)"):
        ctc.log_likelihood(torch.zeros(shape), labels, blank)


def test_loss_is_the_mean_for_each_label():
    log_probs, texts, n_frames = torch.stack([draw(9, 4, 1), draw(9, 4, 2)]), [[1, 2, 2], [3]], [9, 5]
    target = torch.tensor([[1, 2, 2], [3, 0, 0]]), torch.tensor([3, 1]), torch.tensor(n_frames)
    each = [-ctc.log_likelihood(row[:n], text) / len(text) for row, n, text in zip(log_probs, n_frames, texts)]
    torch.testing.assert_close(ctc.loss(log_probs, target), torch.stack(each).mean())


@FEW
@given(st.integers(1, 6), st.integers(2, 4), SEEDS, st.data())
def test_alignment_is_the_best_of_all_paths_that_say_the_text(n_frames, n_labels, seed, data):
    blank = data.draw(st.integers(0, n_labels - 1))
    log_probs = draw(n_frames, n_labels, seed)
    said = defaultdict(list)
    for path in itertools.product(range(n_labels), repeat=n_frames):
        said[collapse_by_loop(path, blank)].append(sum(row[label] for row, label in zip(log_probs.tolist(), path)))
    text = data.draw(st.sampled_from(sorted(said)))
    positions = ctc.align(log_probs, text, blank)
    path = [blank if position is None else text[position] for position in positions]
    assert collapse_by_loop(path, blank) == text and len(path) == n_frames
    assert sum(row[label] for row, label in zip(log_probs.tolist(), path)) == pytest.approx(max(said[text]), abs=1e-12)
    order = [position for position in positions if position is not None]
    assert order == sorted(order) and set(order) == set(range(len(text)))


def test_alignment_of_what_cannot_be_said():
    with pytest.raises(ValueError, match="no path of 2 frames says these 2 labels"):
        ctc.align(draw(2, 3, 0), [1, 1])
    with pytest.raises(ValueError, match="not the blank 0"):
        ctc.align(draw(2, 3, 0), [0])


@FEW
@given(st.integers(1, 7), st.integers(2, 4), SEEDS)
def test_greedy_takes_the_best_path_of_all(n_frames, n_labels, seed):
    log_probs = draw(n_frames, n_labels, seed)
    paths = itertools.product(range(n_labels), repeat=n_frames)
    best = max(paths, key=lambda path: sum(row[label] for row, label in zip(log_probs.tolist(), path)))
    assert ctc.greedy(log_probs.unsqueeze(0)) == [list(collapse_by_loop(best, 0))]


def test_greedy_reads_each_recording_to_its_own_end():
    log_probs = F.one_hot(torch.tensor([[1, 1, 0, 1], [2, 3, 3, 1]]), 4).double()
    assert ctc.greedy(log_probs) == [[1, 1], [2, 3, 1]]
    assert ctc.greedy(log_probs, torch.tensor([3, 1])) == [[1], [2]]


def test_best_path_need_not_be_the_best_text():
    log_probs = torch.tensor([[0.6, 0.4], [0.6, 0.4]], dtype=torch.float64).log()
    assert ctc.greedy(log_probs.unsqueeze(0)) == [[]]  # 0.36, against 0.4 * 0.4 + 2 * 0.24 = 0.64
    best = ctc.beam_search(log_probs)[0]
    assert best.labels == (1,) and math.exp(best.log_p) == pytest.approx(0.64)


@FEW
@given(st.integers(1, 5), st.integers(2, 4), SEEDS, st.data())
def test_full_beam_finds_every_text_with_its_exact_probability(n_frames, n_labels, seed, data):
    blank = data.draw(st.integers(0, n_labels - 1))
    log_probs = draw(n_frames, n_labels, seed)
    texts = texts_by_brute_force(log_probs, blank)
    found = ctc.beam_search(log_probs, beam_width=10_000, blank=blank)
    assert {hypothesis.labels for hypothesis in found} == set(texts) and len(found) == len(texts)
    for labels, score, log_p in found:
        assert math.exp(log_p) == pytest.approx(texts[labels], rel=1e-10) and score == log_p
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    assert texts[found[0].labels] == pytest.approx(max(texts.values()), rel=1e-10)


@FEW
@given(st.integers(1, 5), st.integers(2, 4), SEEDS, st.floats(0.1, 3), st.floats(-2, 2))
def test_full_beam_with_a_language_model_is_the_exhaustive_argmax(n_frames, n_labels, seed, weight, bonus):
    log_probs, bigrams = draw(n_frames, n_labels, seed), draw(n_labels + 1, n_labels + 1, seed + 1).tolist()

    def language_model(prefix, label):  # the last row stands for the text's beginning, the last column for its end
        return bigrams[prefix[-1] if prefix else -1][-1 if label is None else label]

    def score(text: tuple[int, ...], p: float) -> float:
        chain = [-1, *text, -1]
        return math.log(p) + weight * sum(bigrams[a][b] for a, b in itertools.pairwise(chain)) + bonus * len(text)

    scores = {text: score(text, p) for text, p in texts_by_brute_force(log_probs, 0).items()}
    best = ctc.beam_search(log_probs, 10_000, language_model=language_model, lm_weight=weight, label_bonus=bonus)[0]
    assert best.score == pytest.approx(max(scores.values()), rel=1e-9, abs=1e-9)
    assert scores[best.labels] == pytest.approx(best.score, rel=1e-9, abs=1e-9)


@FEW
@given(st.integers(1, 12), st.integers(2, 5), SEEDS, st.integers(1, 6))
def test_narrow_beam_never_claims_more_than_the_exact_probability(n_frames, n_labels, seed, beam_width):
    log_probs = draw(n_frames, n_labels, seed)
    found = ctc.beam_search(log_probs, beam_width)
    assert 1 <= len(found) <= beam_width
    for labels, _, log_p in found:
        assert log_p <= ctc.log_likelihood(log_probs, labels).item() + 1e-10


def test_language_model_decides_between_sounds_alike():
    log_probs = torch.tensor([[0.02, 0.5, 0.48], [0.98, 0.01, 0.01]], dtype=torch.float64).log()
    assert ctc.beam_search(log_probs)[0].labels == (1,)
    prefers_2 = {1: math.log(0.2), 2: math.log(0.8), None: 0.0}
    found = ctc.beam_search(log_probs, language_model=lambda prefix, label: prefers_2[label])
    assert found[0].labels == (2,)


def test_forbidden_texts_and_a_language_model_without_weight():
    log_probs = draw(4, 3, seed=3)

    def never(prefix, label):
        return 0.0 if label is None else -math.inf

    assert ctc.beam_search(log_probs, language_model=never)[0].labels == ()
    unweighted = ctc.beam_search(log_probs, language_model=never, lm_weight=0.0)
    assert unweighted == ctc.beam_search(log_probs)


def test_labels_of_probability_zero_are_not_followed():
    log_probs = torch.tensor([[0.5, 0.5, 0.0]] * 3, dtype=torch.float64).log()
    assert all(2 not in hypothesis.labels for hypothesis in ctc.beam_search(log_probs, 100))


@FEW
@given(st.integers(1, 5), st.integers(2, 4), SEEDS, st.floats(-4, 0))
def test_labels_below_the_limit_are_not_followed(n_frames, n_labels, seed, min_log_p):
    log_probs = draw(n_frames, n_labels, seed)
    cut = log_probs.clone()
    cut[:, 1:][cut[:, 1:] < min_log_p] = -math.inf  # the blank is always followed
    assert ctc.beam_search(log_probs, 500, min_log_p=min_log_p) == ctc.beam_search(cut, 500)


LABELS = st.lists(st.integers(1, 3), max_size=5)


@FEW
@given(st.lists(LABELS, max_size=5), st.integers(1, 4), LABELS)
def test_ngram_probabilities_are_those_of_the_formula_and_sum_to_one(texts, order, prefix):
    model = ctc.NGramModel(texts, order, n_labels=3)

    def expected(context: tuple, label: int | None) -> float:
        padded = [[None] * (order - 1) + text + [None] for text in texts]
        n = len(context)
        followers = [
            text[i] for text in padded for i in range(order - 1, len(text)) if tuple(text[i - n : i]) == context
        ]  # all that stood behind this context
        shorter = expected(context[1:], label) if n else 1 / 4
        d = len(set(followers))
        return (followers.count(label) + d * shorter) / (len(followers) + d) if followers else shorter

    context = ((None,) * (order - 1) + tuple(prefix))[len(prefix) :]
    total = 0.0
    for label in (1, 2, 3, None):
        p = math.exp(model(tuple(prefix), label))
        assert p == pytest.approx(expected(context, label), rel=1e-12)
        total += p
    assert total == pytest.approx(1, abs=1e-12)


def test_ngram_model_without_an_order():
    with pytest.raises(ValueError, match="order is 1 or more"):
        ctc.NGramModel([], 0, 3)


@pytest.mark.parametrize("shape, beam_width, blank", [((0, 3), 4, 0), ((2, 3), 0, 0), ((2, 3), 4, 3), ((1, 2, 3), 4, 0)])
def test_search_refuses_what_it_cannot_do(shape, beam_width, blank):
    with pytest.raises(ValueError, match="expected log-probabilities|beam_width is 1 or more"):
        ctc.beam_search(torch.zeros(shape), beam_width, blank)
