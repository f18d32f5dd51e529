"""Translation without a network, and what surrounds one: a dictionary learnt from pairs, names carried over, alignment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigmodel_utils.text import PADDING, SPECIAL, UNKNOWN, Vocabulary


def ibm1(source: Tensor, target: Tensor, vocab_size: int, n_iterations: int = 5) -> Tensor:
    """Word translation probabilities of IBM model 1, by expectation-maximisation (Brown et al. 1993, section 4.1).

    The model: each target word is made by one of the source's words, all equally likely, whatever its place. There is no
    empty word; padding makes nothing.

    Args:
        source: (m, S) tokens, filled up with the padding token.
        target: (m, T) tokens likewise.
        vocab_size: V, of both.
        n_iterations: of expectation (share each target word among the source words that may have made it) and maximisation
            (count the shares).

    Returns:
        (V, V): row f holds the probabilities of the target words that f may become; all 0 for an f that was not seen.
    """
    padding = SPECIAL.index(PADDING)
    real = (source != padding)[:, None, :] & (target != padding)[:, :, None]  # (m, T, S)
    cells = source[:, None, :] * vocab_size + target[:, :, None]  # (m, T, S), the place of (f, e) in the table
    table = torch.ones(vocab_size * vocab_size)
    for _ in range(n_iterations):
        chance = table[cells] * real
        share = chance / chance.sum(dim=2, keepdim=True).clamp(min=1e-30)  # of target word t made by source word s
        counts = torch.zeros_like(table).index_add_(0, cells.flatten(), share.flatten())
        rows = counts.view(vocab_size, vocab_size)
        table = (rows / rows.sum(dim=1, keepdim=True).clamp(min=1e-30)).flatten()
    return table.view(vocab_size, vocab_size)


def substitute(sentence: Sequence[str], table: Tensor, vocabulary: Vocabulary) -> list[str]:
    """Each word replaced by its most probable translation; a word that the table does not know stays as it is.

    Args:
        sentence: source words.
        table: as from `ibm1`.
        vocabulary: that the table's rows and columns are numbered by.
    """
    best, numbers = table.argmax(dim=1), vocabulary.encode(sentence)
    known = [number >= len(SPECIAL) and best[number] >= len(SPECIAL) for number in numbers]  # an empty row's best is 0
    return [vocabulary.tokens[best[number]] if ok else word for number, ok, word in zip(numbers, known, sentence)]


def fill_unknown(translation: Sequence[str], sentence: Sequence[str], attention: Tensor) -> list[str]:
    """The translation with each unknown word replaced by the source word that the decoder looked at (Jean et al. 2015).

    Args:
        translation: T target words.
        sentence: source words.
        attention: (T, S) weights, row t of the choice of word t; S may be longer than the sentence (padding).
    """
    places = attention[:, : len(sentence)].argmax(dim=1).tolist()
    return [sentence[place] if word == UNKNOWN else word for word, place in zip(translation, places)]
