"""IBM model 1 against the sum over all alignments, substitution, and unknown words filled in."""

import itertools
import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_utils import text, translation

V = 8  # 4 special tokens and 4 words
SENTENCE = st.lists(st.integers(4, 7), min_size=1, max_size=3)


def packed(sentences: list[list[int]]) -> torch.Tensor:
    rows = torch.full((len(sentences), 4), 1)
    for row, sentence in enumerate(sentences):
        rows[row, : len(sentence)] = torch.tensor(sentence)
    return rows


def brute_force(pairs, n_iterations: int) -> np.ndarray:
    """Expected counts as a sum over every alignment of every pair."""
    table = np.ones((V, V))
    for _ in range(n_iterations):
        counts = np.zeros((V, V))
        for source, target in pairs:
            alignments = list(itertools.product(source, repeat=len(target)))
            chances = [math.prod(table[f, e] for f, e in zip(alignment, target)) for alignment in alignments]
            for alignment, chance in zip(alignments, chances):
                for f, e in zip(alignment, target):
                    counts[f, e] += chance / sum(chances)
        table = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-30)
    return table


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=4), st.integers(1, 3))
def test_ibm1_equals_the_sum_over_all_alignments(pairs, n_iterations):
    ours = translation.ibm1(packed([s for s, _ in pairs]), packed([t for _, t in pairs]), V, n_iterations)
    np.testing.assert_allclose(ours.numpy(), brute_force(pairs, n_iterations), atol=1e-5)


def test_ibm1_finds_a_planted_dictionary():
    """Words are swapped for others and shuffled; the pairs that go together are found again."""
    generator = np.random.default_rng(0)
    planted = dict(zip(range(4, 16), generator.permutation(range(4, 16))))
    sources = [generator.choice(range(4, 16), size=4, replace=False).tolist() for _ in range(300)]
    targets = [generator.permutation([planted[f] for f in source]).tolist() for source in sources]
    table = translation.ibm1(torch.tensor(sources), torch.tensor(targets), 16, n_iterations=10)
    assert {f: table[f].argmax().item() for f in planted} == planted


def test_substitution_keeps_what_it_does_not_know():
    vocabulary = text.Vocabulary([["hath", "has", "has", "king"]])
    table = torch.zeros(len(vocabulary), len(vocabulary))
    table[vocabulary.numbers["hath"], vocabulary.numbers["has"]] = 1.0
    table[vocabulary.numbers["has"], 0] = 1.0  # most often an unknown word: not a translation
    assert translation.substitute(["hath", "king", "Eglon", "has"], table, vocabulary) == ["has", "king", "Eglon", "has"]


def test_unknown_words_are_looked_up_in_the_source_and_never_in_the_padding():
    attention = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.3, 0.6]])
    filled = translation.fill_unknown([text.UNKNOWN, text.UNKNOWN], ["Ehud", "rose"], attention)
    assert filled == ["Ehud", "rose"]
    assert translation.fill_unknown(["he", "rose"], ["Ehud", "rose"], attention) == ["he", "rose"]
