"""The chapter's n-gram model against counting by hand, surprise and copies against literal loops, and the recipe's runs."""

import lzma
import math
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_utils import downloads, language, text, tokens, train
from bigmodel_utils.models.gpt import GPT, GPTConfig

V = 5
sequences = st.lists(st.integers(0, V - 1), min_size=8, max_size=60)


def tiny_gpt(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "context_length": 6, "n_layers": 1, "n_heads": 2, "d_model": 16} | changes
    return GPT(GPTConfig(**sizes))


class CountedByHand:
    """Modified Kneser-Ney with dictionaries, straight from the formulas."""

    def __init__(self, sequence, order):
        grams = [tuple(sequence[i : i + order]) for i in range(len(sequence) - order + 1)]
        self.counts = {order: Counter(grams)}
        for n in range(order - 1, 0, -1):
            self.counts[n] = Counter(gram[1:] for gram in self.counts[n + 1])  # different tokens before it
        self.order = order

    def discount(self, n, count):
        n_with = Counter(self.counts[n].values())
        k = min(count, 3)
        if not (n_with[1] + 2 * n_with[2]) or not n_with[k]:
            return 0.5
        d = k - (k + 1) * n_with[1] / (n_with[1] + 2 * n_with[2]) * n_with[k + 1] / n_with[k]
        return d if 0 < d < k else 0.5

    def probability(self, context, token, n=None):
        n = self.order if n is None else n
        if n == 0:
            return 1 / V
        context = tuple(context)[len(context) - n + 1 :]
        lower = self.probability(context[1:], token, n - 1)
        behind = {gram: count for gram, count in self.counts[n].items() if gram[:-1] == context}
        if not behind:
            return lower
        count = behind.get((*context, token), 0)
        kept = count - self.discount(n, count) if count else 0
        freed = sum(self.discount(n, other) for other in behind.values())
        return (kept + freed * lower) / sum(behind.values())


@settings(deadline=None, max_examples=40)
@given(sequences, sequences, st.integers(1, 4))
def test_the_n_gram_model_counts_as_by_hand(known, new, order):
    ours, theirs = language.NGram(known, order, V), CountedByHand(known, order)
    padded = [new[0]] * order + new[1:]
    expected = [theirs.probability(padded[i : i + order - 1], padded[i + order - 1]) for i in range(1, len(new))]
    assert np.allclose(np.exp(-ours.surprisal(new)), expected, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(sequences, st.lists(st.integers(0, V - 1), min_size=3, max_size=8), st.integers(1, 4))
def test_its_probabilities_sum_to_one_and_none_is_zero(known, context, order):
    p = language.NGram(known, order, V).distribution(context)
    assert p.shape == (V,) and math.isclose(p.sum(), 1, rel_tol=1e-12) and (p > 0).all()


@settings(deadline=None, max_examples=40)
@given(sequences, sequences, st.integers(1, 4))
def test_known_contexts_are_those_that_stood_together(known, new, order):
    padded = [new[0]] * order + new
    windows = {n: {tuple(known[i : i + n]) for i in range(order - 1 - n, len(known) - n)} for n in range(1, order)}
    expected = []
    for i in range(1, len(new)):
        before = padded[: order + i]
        expected.append(max([n for n in range(1, order) if tuple(before[-n:]) in windows[n]], default=0))
    assert language.NGram(known, order, V).n_known(new).tolist() == expected


def test_discounts_are_chen_and_goodmans():
    counts = np.repeat([1, 2, 3, 4, 7], [8, 4, 2, 1, 3])  # Y = 8 / 16
    assert np.allclose(language.discounts(counts), [0, 1 - 2 * 0.5 * 4 / 8, 2 - 3 * 0.5 * 2 / 4, 3 - 4 * 0.5 * 1 / 2])
    assert np.allclose(language.discounts(np.array([7, 7])), [0, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("sequence", "order", "vocab_size", "message"),
    [([0, 1, 2], 0, 5, "order is 1 or more"), ([0, 1], 3, 5, "2 tokens"), ([0, 1] * 9, 8, 256, "2\\^63"), ([0, 9], 1, 5, "0 ... 9")],
)  # fmt: skip
def test_what_cannot_be_counted_is_refused(sequence, order, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        language.NGram(sequence, order, vocab_size)


def test_xz_knows_what_it_has_read():
    noise = "".join(chr(97 + i) for i in np.random.default_rng(0).integers(16, size=4000))
    assert 4 < language.xz_bits_per_byte("", noise) < 4.6  # sixteen letters are 4 bits
    assert language.xz_bits_per_byte(noise, noise) < 0.2
    assert (
        language.xz_bits_per_byte("", "ab") == 8 * (len(lzma.compress(b"ab", preset=9)) - len(lzma.compress(b"", preset=9))) / 2
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30), st.integers(1, 6), st.integers(1, 5))
def test_surprise_is_that_of_one_window_after_another(n, stride, batch_size):
    model = tiny_gpt().double()
    sequence = torch.randint(V, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    expected, end = [], min(6, n - 1)
    while len(expected) < n - 1:
        window = sequence[max(0, end - 6) : end + 1]
        logp = model(torch.tensor([window[:-1]]))[0].log_softmax(-1)
        losses = [-logp[t, window[t + 1]].item() for t in range(len(window) - 1)]
        expected += losses[len(losses) - (end - len(expected)) :]
        end = min(end + stride, n - 1)
    got = language.surprisal(model, sequence, stride, batch_size=batch_size)
    assert np.allclose(got, expected, atol=1e-6) and model.training


def test_surprise_of_windows_side_by_side_is_the_loss():
    model, sequence = tiny_gpt(), np.random.default_rng(0).integers(V, size=61)
    batches = tokens.TokenBatches(sequence, 6, 4, shuffle=False, drop_last=False)
    loss = train.evaluate(model, batches, language.cross_entropy)
    assert math.isclose(language.surprisal(model, sequence, 6).mean(), loss, rel_tol=1e-5)
    assert math.isclose(loss, math.log(V), abs_tol=0.1)


@pytest.mark.parametrize(("n", "stride"), [(1, 2), (9, 0), (9, 7)])
def test_surprise_needs_a_text_and_a_stride(n, stride):
    with pytest.raises(ValueError, match="needs two tokens and a stride in 1 ... 6"):
        language.surprisal(tiny_gpt(), [0] * n, stride)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from("ab"), max_size=12), st.lists(st.sampled_from("abc"), max_size=30))
def test_copies_are_found_as_by_trying_all(words, known):
    def longest(start):
        ends = range(start, len(words) + 1)
        return max(e - start for e in ends if any(words[start:e] == known[i : i + e - start] for i in range(len(known) + 1)))

    assert language.longest_copies(words, "\n".join(known)).tolist() == [longest(i) for i in range(len(words))]


def test_copies_begin_and_end_with_words():
    assert language.longest_copies(["art", "thou"], "part thou  art thoughts").tolist() == [1, 1]


@pytest.mark.parametrize(("method", "schedule"), [("muon", "trapezoid"), ("adamw", "trapezoid"), ("muon", "constant")])
def test_each_recipe_learns_what_repeats(method, schedule):
    sequence = np.tile([0, 1, 2, 3, 2], 50)  # what follows a 2 depends on what came before it
    model = tiny_gpt()
    history = language.train_gpt(
        model, sequence, max_steps=100, batch_size=8, method=method, schedule=schedule, validation=sequence, eval_every=50
    )
    assert len(history.validation_loss) == 2 and history.n_samples == 100 * 8
    assert language.surprisal(model, sequence, 1)[6:].mean() < 0.2 < history.train_loss[0]  # one token back: 0.28


def test_a_run_depends_on_its_seeds_alone():
    def final(weights_seed, order_seed):
        model = tiny_gpt(weights_seed)
        return language.train_gpt(model, np.arange(200) % V, max_steps=3, batch_size=4, seed=order_seed).train_loss[-1]

    assert final(0, 0) == final(0, 0) != final(0, 1) and final(0, 0) != final(1, 0)


def test_other_recipes_are_refused():
    with pytest.raises(ValueError, match="muon or adamw"):
        language.train_gpt(tiny_gpt(), [0] * 99, max_steps=1, batch_size=1, method="sgd")
    with pytest.raises(ValueError, match="trapezoid or constant"):
        language.train_gpt(tiny_gpt(), [0] * 99, max_steps=1, batch_size=1, schedule="cosine")


def test_the_bible_is_split_by_books():
    parts = language.load_text()
    verses = text.load_verses()
    assert all(part.startswith("\n") and not part.endswith("\n") for part in parts.values())
    assert sum(part.count("\n") for part in parts.values()) == len(verses)
    assert verses[8001001] in parts["test"] and verses[7001001] in parts["validation"] and verses[1001001] in parts["train"]
    known = set(parts["train"].split("\n"))
    assert not [verses[n] for n in verses if n // 1_000_000 == 18 and verses[n] in known]  # none of Job's


def test_stories_are_halved_between_validation_and_test(monkeypatch):
    stories = {"train": [f"train\nstory {i}." for i in range(9)], "validation": ["one", "two", "three", "four"]}
    monkeypatch.setattr(downloads, "read_tiny_stories", lambda split: iter(stories[split]))
    parts = language.load_text("tiny-stories", max_bytes=50)
    assert parts["train"] == "\ntrain story 0.\ntrain story 1.\ntrain story 2.\ntrain story 3."  # 14 bytes each
    assert parts["validation"] == "\none" and parts["test"] == "\ntwo"  # a tenth, and the story that crosses it
    with pytest.raises(ValueError, match="kjv or tiny-stories, got 'esperanto'"):
        language.load_text("esperanto")


def test_the_more_surprising_the_darker():
    figure, ax = plt.subplots()
    language.draw_surprise(ax, ["In", " the", "\n", " beginning"], np.array([0.0, 6.0, 12.0, 99.0]), n_columns=12)
    shades = [sum(patch.get_facecolor()[:3]) for patch in ax.patches]
    assert [t.get_text() for t in ax.texts] == ["In", " the", "¶", " beginning"]
    assert shades[0] > shades[1] > shades[2] == shades[3] and [patch.get_y() for patch in ax.patches] == [0, 0, 0, 1]
    plt.close(figure)
