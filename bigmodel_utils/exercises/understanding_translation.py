"""Checkers of chapter 7: a mask, spans of labels, BLEU and a step of IBM model 1, each against something independent."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import sacrebleu

from bigmodel_utils import understanding

Pair = tuple[list[int], list[int]]

SENTENCES = [
    ("the lord said , go up to him .", "the lord said , go up to the hill ."),
    ("the the the the the", "the king went out"),
    ("and he went", "and he went down to the town by the sea"),
    ("he gave them the land of their fathers for ever", "he gave the land to their fathers"),
]


def check_prefix_mask(answer: Callable[[int, int], np.ndarray]) -> None:
    """Against the definition, pair by pair."""
    for n_prefix, n_total in ((3, 7), (0, 4), (5, 5), (1, 6)):
        mask = np.asarray(answer(n_prefix, n_total)).astype(bool)
        assert mask.shape == (n_total, n_total), f"expected shape {(n_total, n_total)}, got {mask.shape}"
        for t, s in itertools.product(range(n_total), repeat=2):
            expected = s < n_prefix or s <= t
            assert mask[t, s] == expected, (
                f"with {n_prefix} of {n_total} tokens in the prefix, position {t} {'sees' if expected else 'does not see'} {s}"
            )


def check_spans(answer: Callable[[Sequence[str]], set]) -> None:
    """Against the package's function, which the tests hold to seqeval."""
    generator = np.random.default_rng(0)
    kinds = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    rows = [["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "B-PER"], ["I-LOC", "I-PER"], ["O", "I-PER", "I-PER"], ["B-LOC"], ["O"]]
    for row in [*rows, *(generator.choice(kinds, size=8).tolist() for _ in range(200))]:
        expected, got = understanding.label_spans(row), answer(list(row))
        assert got == expected, f"for {row} expected {sorted(expected)}, got {sorted(got)}"


def check_bleu(answer: Callable[[list[list[str]], list[list[str]]], float]) -> None:
    """Against sacrebleu."""
    metric = sacrebleu.metrics.BLEU(tokenize="none", force=True)
    for chosen in ([0], [0, 3], [0, 1, 3], [0, 2], [0, 1, 2, 3]):
        hypotheses, references = ([SENTENCES[i][side] for i in chosen] for side in (0, 1))
        expected = metric.corpus_score(hypotheses, [references]).score
        got = answer([line.split() for line in hypotheses], [line.split() for line in references])
        assert abs(got - expected) < 1e-6, f"sacrebleu says {expected:.3f} for {len(chosen)} sentences, got {got:.3f}"


def check_em_step(answer: Callable[[np.ndarray, list[Pair]], np.ndarray]) -> None:
    """Against the sum over all alignments, each with its probability."""
    generator = np.random.default_rng(0)
    pairs = [([0, 1], [0, 1, 0]), ([2, 1, 1], [2, 0]), ([2], [1, 1])]
    for table in (np.full((3, 3), 1 / 3), generator.dirichlet(np.ones(3), size=3)):
        counts = np.zeros((3, 3))
        for source, target in pairs:
            alignments = list(itertools.product(range(len(source)), repeat=len(target)))
            chances = [math.prod(table[source[a], e] for a, e in zip(alignment, target)) for alignment in alignments]
            for alignment, chance in zip(alignments, chances):
                for a, e in zip(alignment, target):
                    counts[source[a], e] += chance / sum(chances)
        expected = counts / counts.sum(axis=1, keepdims=True)
        got = np.asarray(answer(table.copy(), pairs))
        assert got.shape == (3, 3), f"the table has a row for each source word: expected shape (3, 3), got {got.shape}"
        assert np.allclose(got.sum(axis=1), 1), "each row is a distribution over target words: it must sum to one"
        assert np.allclose(got, expected), f"summing over all alignments gives\n{expected.round(3)}\nnot\n{got.round(3)}"
