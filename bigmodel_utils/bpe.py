"""Byte-level byte-pair encoding: text to tokens and back, written out for the lesson and through the `tokenizers` library.

A text is cut into words, and a word into its UTF-8 bytes. Training joins the commonest pair of neighbouring tokens into a
new token, again and again; encoding a word joins in the same order. Every text has tokens, and they give it back exactly.

Sources: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909 (pairs joined by frequency), and Radford et al. 2019,
"Language models are unsupervised multitask learners", section 2.2 (on bytes, within words, and the pattern for words).
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import regex
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bigmodel_utils import results
from bigmodel_utils.data import DataError

Merge = tuple[bytes, bytes]
Pair = tuple[int, int]

# GPT-2's words: an English ending such as 's; letters, digits or signs, each with the space before them; other white space.
WORDS = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# GPT-2's order of the 256 bytes, which are the first tokens: those with a visible Latin-1 character, then the others.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = VISIBLE + sorted(set(range(256)) - set(VISIBLE))
# How files write a byte: by its own character, and the others by those from 256 on, so that a space is "Ġ".
CHARACTERS = {byte: chr(byte if token < len(VISIBLE) else 256 + token - len(VISIBLE)) for token, byte in enumerate(BYTES)}


class BPE:
    """A tokenizer that is its merges: 256 bytes, then one token a merge. Without merges a token is a byte."""

    def __init__(self, merges: Sequence[Merge] = ()):
        """merges: pairs of tokens to join, the first learnt first.

        Raises:
            ValueError: for a merge of something that is no token yet.
        """
        self.tokens = [bytes([byte]) for byte in BYTES]
        self.numbers = {token: number for number, token in enumerate(self.tokens)}
        self.merges: list[Merge] = []
        self.joins: dict[Pair, tuple[int, int]] = {}  # a pair's place among the merges, and the token that it becomes
        for left, right in merges:
            if left not in self.numbers or right not in self.numbers:
                raise ValueError(f"merge {len(self.merges)} joins {left!r} and {right!r}, of which one is no token yet")
            self._append((self.numbers[left], self.numbers[right]))

    def _append(self, pair: Pair) -> int:
        """Add a merge; the number of its token, which is a known one where another pair became the same bytes."""
        left, right = self.tokens[pair[0]], self.tokens[pair[1]]
        number = self.numbers.setdefault(left + right, len(self.tokens))
        if number == len(self.tokens):
            self.tokens.append(left + right)
        self.joins[pair] = (len(self.merges), number)
        self.merges.append((left, right))
        return number

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text; each different word is worked out once.

        Raises:
            UnicodeEncodeError: for half a surrogate pair, which is no character.
        """
        words = WORDS.findall(text)
        encoded = {word: self._encode_word(word.encode()) for word in set(words)}
        return [number for word in words for number in encoded[word]]

    def _bytes(self, word: bytes) -> list[int]:
        return [self.numbers[bytes([byte])] for byte in word]

    def _encode_word(self, word: bytes) -> list[int]:
        """Join the pair that was learnt first, the leftmost of equals, until no pair is left: n log n for n bytes.

        Tokens are a linked list, with a None behind the last; pairs wait in a heap, and those that are gone are skipped.
        """
        end = len(word)
        tokens = [*self._bytes(word), None]
        before, after = list(range(-1, end)), [*range(1, end + 1), end]
        heap: list[tuple[int, int, Pair]] = []

        def push(place: int) -> None:
            pair = tokens[place], tokens[after[place]]
            if pair in self.joins:
                heapq.heappush(heap, (self.joins[pair][0], place, pair))

        for place in range(end):
            push(place)
        while heap:
            _, place, pair = heapq.heappop(heap)
            right = after[place]
            if (tokens[place], tokens[right]) == pair:
                tokens[place], tokens[right] = self.joins[pair][1], None
                after[place] = after[right]
                before[after[place]] = place
                push(before[place])
                push(place)
        return [token for token in tokens if token is not None]

    def decode_bytes(self, numbers: Iterable[int]) -> bytes:
        """The bytes of some tokens.

        Raises:
            IndexError: for a number that is not in the vocabulary.
        """
        numbers = [int(number) for number in numbers]
        wrong = [number for number in numbers if not 0 <= number < len(self)]
        if wrong:
            raise IndexError(f"{wrong[0]} is no token: this tokenizer has 0 to {len(self) - 1}")
        return b"".join([self.tokens[number] for number in numbers])

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of some tokens; where they begin or end within a character, it shows as U+FFFD.

        Raises:
            IndexError: for a number that is not in the vocabulary.
        """
        return self.decode_bytes(numbers).decode(errors="replace")

    def save(self, path: str | Path) -> None:
        """Write the tokenizer in the library's own format, a `tokenizer.json`: all of it, or nothing."""
        results.write_atomically(Path(path), _library(self).to_str(pretty=True).encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a tokenizer that `save` wrote.

        Raises:
            DataError: for a file that is missing, damaged, or another kind of tokenizer.
        """
        try:
            found = json.loads(Path(path).read_bytes())
            tokenizer = cls(_merges(found))
            expected = json.loads(_library(tokenizer).to_str())
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): check the path, or train a tokenizer") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged or no byte-level BPE ({error}): use another copy, or train anew") from None
        for part in ("normalizer", "pre_tokenizer", "added_tokens", "model"):
            if found.get(part) != expected[part]:
                raise DataError(f"{path} is damaged or another kind of tokenizer: its {part} is not that of {cls.__name__}")
        return tokenizer


class FastBPE(BPE):
    """The same tokenizer, encoding with the `tokenizers` library.

    It is three to four times as fast on the Bible verse by verse, and a third as fast on the Bible as one text: `BPE` works out
    each different word of a text once.
    """

    def __init__(self, merges: Sequence[Merge] = ()):
        super().__init__(merges)
        self.library = _library(self)

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text."""
        return self.library.encode_batch_fast([text])[0].ids


def train(texts: str | Iterable[str], vocab_size: int) -> BPE:
    """Learn merges from scratch: the commonest pair first, and of equally common ones that of the lower token numbers.

    Counts are kept from merge to merge, and only words with the merged pair are looked at again.

    Args:
        texts: one text or several; no pair reaches from one into the next.
        vocab_size: tokens in all, the 256 bytes included; fewer where every word has become one token.

    Raises:
        ValueError: for a vocabulary without room for the bytes.
    """
    _check_vocab_size(vocab_size)
    tokenizer = BPE()
    word_counts = Counter(word for text in _listed(texts) for word in WORDS.findall(text))
    words = [tokenizer._bytes(word.encode()) for word in word_counts]
    n_times = list(word_counts.values())
    pair_counts: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # the words that have a pair, or had it

    def count_pairs(index: int, sign: int) -> None:
        for pair in pairwise(words[index]):
            pair_counts[pair] += sign * n_times[index]
            places[pair].add(index)

    for index in range(len(words)):
        count_pairs(index, 1)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while len(tokenizer) < vocab_size and (pair := _pop_commonest(heap, pair_counts)) is not None:
        new, touched = tokenizer._append(pair), places.pop(pair)
        for index in touched:
            count_pairs(index, -1)
            words[index] = _join(words[index], pair, new)
            count_pairs(index, 1)
        for changed in {two for index in touched for two in pairwise(words[index]) if new in two}:
            heapq.heappush(heap, (-pair_counts[changed], changed))
    return tokenizer


def _pop_commonest(heap: list[tuple[int, Pair]], pair_counts: Counter[Pair]) -> Pair | None:
    while heap:
        count, pair = heapq.heappop(heap)
        if -count == pair_counts[pair]:
            return pair
        if pair_counts[pair] > 0:  # it became rarer since it was pushed
            heapq.heappush(heap, (-pair_counts[pair], pair))
    return None


def _join(word: list[int], pair: Pair, new: int) -> list[int]:
    """A word with `new` wherever `pair` stood, from the left."""
    joined, place = [], 0
    while place < len(word):
        found = tuple(word[place : place + 2]) == pair
        joined.append(new if found else word[place])
        place += 2 if found else 1
    return joined


def train_fast(texts: str | Iterable[str], vocab_size: int) -> FastBPE:
    """The same merges as those of `train`, learnt by the `tokenizers` library.

    Args, errors: as for `train`.
    """
    _check_vocab_size(vocab_size)
    library = _library(BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(_listed(texts), trainer)
    return FastBPE(_merges(json.loads(library.to_str())))


def bits_per_byte(nats_per_token: float, n_tokens: int, n_bytes: int) -> float:
    """The loss in bits for each byte of the text, by which tokenizers of any vocabulary can be compared.

    Args:
        nats_per_token: mean cross-entropy.
        n_tokens: tokens that it is the mean over.
        n_bytes: of the UTF-8 text that these tokens are.
    """
    return nats_per_token * n_tokens / (n_bytes * math.log(2))


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size < len(BYTES):
        raise ValueError(f"vocab_size is {len(BYTES)} or more, as every byte is a token, got {vocab_size}")


def _listed(texts: str | Iterable[str]) -> Iterable[str]:
    return [texts] if isinstance(texts, str) else texts


def _library(tokenizer: BPE) -> tokenizers.Tokenizer:
    """The library's own tokenizer of the same merges and numbers."""
    write = lambda token: token.decode("latin-1").translate(CHARACTERS)  # noqa: E731
    vocabulary = {write(token): number for token, number in tokenizer.numbers.items()}
    merges = [(write(left), write(right)) for left, right in tokenizer.merges]
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def _merges(file: dict[str, Any]) -> list[Merge]:
    """The merges in the content of the library's file."""
    read = {ord(character): byte for byte, character in CHARACTERS.items()}
    return [tuple(part.translate(read).encode("latin-1") for part in merge) for merge in file["model"]["merges"]]
