"""Checkers of chapter 6: the unit, a merge, the nucleus, a leak and a copy, each against something independent."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bigmodel_utils.models import gpt


def check_bits_a_byte(answer: Callable[[np.ndarray, str], float]) -> None:
    """Against the logarithm of the product of the probabilities, on texts whose characters are not all one byte."""
    got = answer(np.full(6, math.log(256)), "Bethel")
    assert abs(got - 8) < 1e-9, f"a uniform guess over bytes costs 8 bits per byte, not {got:.4f}"
    generator = np.random.default_rng(0)
    for text in ("In the beginning", "Noël, naïve café", "初めに"):
        p = generator.uniform(0.1, 0.9, size=5)
        expected, got = -math.log2(np.prod(p)) / len(text.encode()), answer(-np.log(p), text)
        assert abs(got - expected) < 1e-9, f"five tokens for {text!r} should cost {expected:.4f} bits per byte, not {got:.4f}"


def check_join(answer: Callable[[list[int], tuple[int, int], int], list[int]]) -> None:
    """Against replacement in a string, one character a token."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        tokens = generator.integers(3, size=generator.integers(0, 12)).tolist()
        pair = tuple(generator.integers(3, size=2).tolist())
        written = "".join(map(chr, tokens)).replace("".join(map(chr, pair)), chr(9))
        expected, got = [ord(character) for character in written], list(answer(list(tokens), pair, 9))
        assert got == expected, f"joining {pair} in {tokens} to 9 gives {expected}, not {got}"


def check_nucleus(answer: Callable[[np.ndarray, float], np.ndarray]) -> None:
    """Against a search through all sets of tokens: the smallest that reach p, and of these the most probable."""
    generator = np.random.default_rng(0)
    for top_p in (0.01, 0.3, 0.5, 0.9, 0.99):
        q = generator.dirichlet(np.ones(6))
        sets = [list(kept) for n in range(1, 7) for kept in itertools.combinations(range(6), n)]
        enough = [kept for kept in sets if q[kept].sum() >= top_p]
        best = min(enough, key=lambda kept: (len(kept), -q[kept].sum()))
        expected = np.zeros(6)
        expected[best] = q[best] / q[best].sum()
        got = np.asarray(answer(q.copy(), top_p))
        assert got.shape == (6,), "return one probability for each token, zero for those that are cut off"
        assert np.allclose(got, expected), f"for p = {top_p} and {q.round(3)} expected {expected.round(3)}, got {got.round(3)}"


def check_sees_future(answer: Callable[[Callable[[Tensor], Tensor], Tensor], bool]) -> None:
    """On a GPT, and on models that look ahead: everywhere, in one place, or through a mean over the whole text."""
    torch.manual_seed(0)
    config = gpt.GPTConfig(vocab_size=5, context_length=6, n_layers=1, n_heads=1, d_model=8)
    honest, tokens = gpt.GPT(config).double(), torch.tensor([[0, 1, 2, 3, 4, 2]])
    with torch.no_grad():
        assert not answer(honest, tokens), "a GPT's logits depend on no later token: this one is honest"
        for leak in _leaks(honest):
            assert answer(leak, tokens), f"this model looks ahead: {leak.__doc__}"


def _leaks(honest: gpt.GPT) -> list[Callable[[Tensor], Tensor]]:
    def everywhere(tokens: Tensor) -> Tensor:
        """each position sees the token after it"""
        return honest(tokens.roll(-1, dims=1))

    def in_one_place(tokens: Tensor) -> Tensor:
        """the third position sees the fourth token"""
        logits = honest(tokens).clone()
        logits[:, 2] += tokens[:, 3, None]
        return logits

    def through_the_mean(tokens: Tensor) -> Tensor:
        """the logits are normalised over the whole text"""
        logits = honest(tokens)
        return logits - logits.mean(dim=1, keepdim=True)

    return [everywhere, in_one_place, through_the_mean]


def check_longest_copy(answer: Callable[[Sequence[str], Sequence[str]], int]) -> None:
    """Against Python's difflib."""
    generator = np.random.default_rng(0)
    for n in (1, 5, 20, 60):
        words, known = (generator.choice(list("abc"), size=n).tolist() for _ in range(2))
        expected = difflib.SequenceMatcher(None, words, known, autojunk=False).find_longest_match().size
        got = answer(list(words), list(known))
        assert got == expected, f"{' '.join(words)!r} and {' '.join(known)!r} share {expected} words in a row, not {got}"
    assert answer(["a"], ["b"]) == 0, "texts that share no word have a longest copy of 0"
