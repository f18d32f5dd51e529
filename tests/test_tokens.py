"""Token files and streams: against numpy, a literal loop, and themselves stopped, shared out and given to workers."""

import itertools
import json
import pickle
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader

from bigmodel_utils import data, tokens

SIZES = {"n_tokens": st.integers(2, 200), "context_length": st.integers(1, 12), "batch_size": st.integers(1, 6)}
SETTINGS = hypothesis.settings(deadline=None)


def streams(n_tokens: int, context_length: int, batch_size: int, **options) -> tokens.TokenBatches:
    """Batches of 0, 1, 2, ...: each token is its own place."""
    hypothesis.assume(n_tokens >= (batch_size + 2) * context_length)
    return tokens.TokenBatches(torch.arange(n_tokens), context_length, batch_size, **options)


def same(a, b) -> bool:
    """Whether two sequences of batches are equal."""
    a, b = list(a), list(b)
    return len(a) == len(b) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b))


@SETTINGS
@hypothesis.given(
    st.lists(st.lists(st.integers(0, 70_000), max_size=9), max_size=6), st.sampled_from([256, 65_536, 65_537, 70_001])
)
def test_a_file_holds_its_chunks_in_order(tmp_path_factory, chunks, vocab_size):
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    chunks = [[token % vocab_size for token in chunk] for chunk in chunks]
    expected = [token for chunk in chunks for token in chunk]
    hypothesis.assume(expected)
    assert tokens.write(path, iter(chunks), vocab_size) == len(expected)
    assert np.load(path).tolist() == tokens.load(path).tolist() == expected
    assert np.load(path).dtype == (np.uint16 if vocab_size <= 65_536 else np.uint32)


def test_chunks_of_any_kind(tmp_path):
    kinds = [[1, 2], np.array([3], np.uint8), torch.tensor([4, 5]), (6,), range(7, 9), torch.tensor([], dtype=torch.long), []]
    assert tokens.write(tmp_path / "new" / "tokens.npy", kinds, 10) == 8
    assert tokens.load(tmp_path / "new" / "tokens.npy").tolist() == list(range(1, 9))


@pytest.mark.parametrize("bad", [[10], [-1], [0.5], [[1, 2]], 3, ["a"]])
def test_what_is_no_token_is_refused_and_the_file_is_as_before(tmp_path, bad):
    path = tmp_path / "tokens.npy"
    tokens.write(path, [[1, 2, 3]], 10)
    with pytest.raises(ValueError, match="chunk 1 .* from 0 to 9"):
        tokens.write(path, [[4], bad], 10)
    with pytest.raises(ValueError, match="no tokens to write"):
        tokens.write(path, [[]], 10)
    assert tokens.load(path).tolist() == [1, 2, 3] and list(tmp_path.iterdir()) == [path]


def test_a_writer_that_is_stopped_leaves_what_was_there(tmp_path):
    path = tmp_path / "tokens.npy"
    tokens.write(path, [[1, 2, 3]], 10)

    def stopped():
        yield [4] * 100_000
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokens.write(path, stopped(), 10)
    assert tokens.load(path).tolist() == [1, 2, 3] and list(tmp_path.iterdir()) == [path]


def damaged_files(folder) -> dict[str, bytes]:
    """Contents that are no token file, by what is wrong."""
    tokens.write(folder / "good.npy", [range(100)], 100)
    good = (folder / "good.npy").read_bytes()
    for name, array in {"float": np.ones(3, np.float32), "table": np.ones((2, 2), np.uint16), "object": np.array([{}])}.items():
        np.save(folder / f"{name}.npy", array)
    np.savez(folder / "zip.npz", a=np.ones(3, np.uint16))
    saved = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "good.npy"}
    return saved | {
        "cut": good[:-1],
        "cut header": good[:20],
        "longer": good + b"\0\0",
        "empty": b"",
        "text": b"In the beginning",
    }


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "tokens.npy"
    for name, content in damaged_files(tmp_path).items():
        path.write_bytes(content)
        with pytest.raises(data.DataError, match="tokens.npy .* write it anew"):
            tokens.load(path)
            pytest.fail(f"{name} was read")
    with pytest.raises(data.DataError, match="does not exist"):
        tokens.TokenBatches(tmp_path / "missing.npy", 4, 2)


@SETTINGS
@hypothesis.given(**SIZES, drop_last=st.booleans())
def test_in_order_a_pass_is_a_literal_loop(n_tokens, context_length, batch_size, drop_last):
    text = torch.randint(1000, (n_tokens,), generator=torch.Generator().manual_seed(n_tokens))
    windows = []
    for start in range(0, n_tokens, context_length):
        if start + context_length < n_tokens:
            windows.append(text[start : start + context_length + 1])
    hypothesis.assume(len(windows) >= batch_size)
    groups = [torch.stack(windows[i : i + batch_size]) for i in range(0, len(windows), batch_size)]
    expected = [(group[:, :-1], group[:, 1:]) for group in groups if len(group) == batch_size or not drop_last]
    batches = tokens.TokenBatches(text, context_length, batch_size, shuffle=False, drop_last=drop_last)
    assert len(batches) == len(expected)
    assert same(batches, expected) and same(batches, expected)  # and the same in the next pass


@SETTINGS
@hypothesis.given(**SIZES, seed=st.integers(0, 1000))
def test_a_shuffled_pass_visits_every_window_once(n_tokens, context_length, batch_size, seed):
    batches = streams(n_tokens, context_length, batch_size, seed=seed, drop_last=False)
    for _ in range(2):
        parts = list(batches)
        x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
        assert torch.equal(x + 1, y) and x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
        visited = x.flatten().sort().values
        assert torch.equal(visited, visited[0] + torch.arange(len(visited)))  # each once, and no gap between windows
        assert len(visited) + 2 * context_length > n_tokens - 1 and len(x) == batches.n_windows
    assert [len(x) for x, _ in parts[:-1]] == [batch_size] * (len(batches) - 1)


def test_passes_and_seeds_differ_in_order_and_offset():
    batches = tokens.TokenBatches(torch.arange(10_000), 10, 5, seed=1)
    starts = [torch.cat([x[:, 0] for x, _ in batches]) for _ in range(30)]
    offsets = {int(start[0]) % 10 for start in starts}
    assert len(offsets) > 7  # of 10, in 30 passes
    assert all(len(set((start % 10).tolist())) == 1 for start in starts)  # one offset a pass
    orders = [tuple((start // 10).tolist()) for start in starts]
    other = torch.cat([x[:, 0] for x, _ in tokens.TokenBatches(torch.arange(10_000), 10, 5, seed=2)])
    assert len(set(orders)) == 30 and tuple((other // 10).tolist()) not in orders
    assert same(tokens.TokenBatches(torch.arange(10_000), 10, 5, seed=1), [batches[step] for step in range(len(batches))])


@SETTINGS
@hypothesis.given(**SIZES, n_ranks=st.integers(1, 4), shuffle=st.booleans())
def test_ranks_share_the_batches_of_one(n_tokens, context_length, batch_size, n_ranks, shuffle):
    options = {"batch_size": batch_size * n_ranks, "shuffle": shuffle, "seed": 3}
    one = streams(n_tokens, context_length, **options)
    ranks = [streams(n_tokens, context_length, **options, rank=rank, n_ranks=n_ranks) for rank in range(n_ranks)]
    together = [tuple(map(torch.cat, zip(*parts))) for parts in zip(*ranks, strict=True)]
    assert same(one, together)


@SETTINGS
@hypothesis.given(**SIZES, n_before=st.integers(0, 80), shuffle=st.booleans())
def test_a_stopped_stream_goes_on_where_it_was(n_tokens, context_length, batch_size, n_before, shuffle):
    """As training does it: so many batches, through several passes; the state as JSON; then a new object."""

    def passes(batches):
        return itertools.chain.from_iterable(batches for _ in itertools.repeat(None))

    make = lambda: streams(n_tokens, context_length, batch_size, shuffle=shuffle, seed=5)  # noqa: E731
    uninterrupted, first, second = make(), make(), make()
    n_after = 2 * len(first) + 1
    seen = list(itertools.islice(passes(first), n_before))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    seen += itertools.islice(passes(second), n_after)
    assert same(seen, itertools.islice(passes(uninterrupted), n_before + n_after))


def test_the_rest_of_a_pass_is_a_pass():
    """The training loop counts passes: one that was stopped at its last batch has an empty rest, and none is lost."""
    batches = tokens.TokenBatches(torch.arange(101), 10, 2)  # 9 windows: 4 batches
    state = [batches.state_dict() for _ in batches][-1]
    assert batches.state_dict() == {"pass": 1, "position": 0} and len(list(batches)) == 4
    batches.load_state_dict(state)
    assert list(batches) == [] and same(batches, [batches[step] for step in range(4, 8)])


def test_a_pass_that_was_left_is_not_taken_up_again():
    batches = tokens.TokenBatches(torch.arange(101), 10, 2)
    next(iter(batches))
    assert same(batches, [batches[step] for step in range(4, 8)])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "tokens.npy"
    tokens.write(path, [np.random.default_rng(0).integers(0, 1000, 5_000)], 1000)
    return path


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(("n_workers", "start"), [(0, None), (1, "fork"), (2, "fork"), (2, "spawn")])
def test_workers_do_not_change_the_stream(file, n_workers, start):
    """Over several passes and from the middle of one; workers that are started afresh get the path, not the text."""
    batches = tokens.TokenBatches(file, 64, 8, seed=7)
    steps = range(5, 3 * len(batches))
    loader = DataLoader(batches, batch_size=None, sampler=steps, num_workers=n_workers, multiprocessing_context=start)
    stream = itertools.chain(batches, batches, batches)
    assert len(pickle.dumps(batches)) < 2_000 < file.stat().st_size
    assert same(loader, itertools.islice(stream, 5, None))


def test_a_file_and_its_tokens_in_memory_are_one_stream(file):
    inside = [np.load(file), torch.from_numpy(np.load(file).astype(np.int64)), np.load(file).tolist(), tokens.load(file)]
    expected = list(tokens.TokenBatches(str(file), 16, 4, seed=1))
    assert all(same(expected, tokens.TokenBatches(kind, 16, 4, seed=1)) for kind in inside)


STREAM = """
import resource, sys
import numpy as np, torch
from bigmodel_utils import tokens
torch.set_num_threads(1)
path, n_bytes, limit = sys.argv[1], 2**27, 2**25

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def chunks():
    for begin in range(0, n_bytes // 2, 2**18):
        yield np.arange(begin, begin + 2**18) % 50_000

tokens.TokenBatches(torch.arange(100), 4, 2)[0]
resident = status("VmRSS:")
most = status("VmData:") + limit
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
assert tokens.write(path, chunks(), 50_000) == n_bytes // 2
n_tokens = 0
for x, y in tokens.TokenBatches(path, 1024, 64):
    assert torch.equal((x + 1) % 50_000, y)
    n_tokens += x.numel()
assert n_tokens > 0.99 * n_bytes // 2
grown = status("VmHWM:") - resident
assert grown < limit, f"{grown:,} bytes"
try:
    np.load(path)
except MemoryError:
    print("does not fit")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits and tells memory like this")
def test_a_file_larger_than_memory_streams(tmp_path):
    """128 MiB of tokens are written and read in a process that may take 32 MiB; loading them whole fails there."""
    command = [sys.executable, "-c", STREAM, str(tmp_path / "tokens.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    (tmp_path / "tokens.npy").unlink(missing_ok=True)
    assert done.returncode == 0 and done.stdout == "does not fit\n", done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 0}, "1 or more"),
        ({"batch_size": 0}, "1 or more"),
        ({"batch_size": 3, "n_ranks": 2}, "n_ranks divides batch_size"),
        ({"rank": 2, "n_ranks": 2}, "rank is below n_ranks"),
        ({"n_ranks": 2, "drop_last": False}, "one size"),
        ({"tokens": torch.arange(10)}, "10 tokens are 1 windows of 8, and a batch needs 2"),
        ({"tokens": torch.arange(8), "drop_last": False}, "8 tokens are 0 windows"),
        ({"tokens": []}, "whole numbers in one row"),
        ({"tokens": torch.ones(100)}, "whole numbers in one row"),
        ({"tokens": torch.ones(100, 2, dtype=torch.long)}, "whole numbers in one row"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        tokens.TokenBatches(**{"tokens": torch.arange(100), "context_length": 8, "batch_size": 2} | options)


def test_steps_and_states_that_are_not_there():
    batches = tokens.TokenBatches(torch.arange(100), 8, 2)
    with pytest.raises(IndexError, match="from 0"):
        batches[-1]
    with pytest.raises(ValueError, match="use the same data"):
        batches.load_state_dict({"pass": 0, "position": len(batches) + 1})


@SETTINGS
@hypothesis.given(st.integers(1, 2000), st.integers(0, 2**32))
def test_shuffling_is_a_permutation(n, seed):
    turns = tokens.draw_turns(n, np.random.default_rng(seed))
    assert sorted(tokens.shuffled(np.arange(n), n, turns)) == list(range(n))


def test_shuffling_very_many_takes_little():
    n = 10**10
    turns = tokens.draw_turns(n, np.random.default_rng(0))
    assert sum(array.nbytes for pair in turns for array in pair) < 100 * n**0.5
    sent = tokens.shuffled(np.arange(100_000), n, turns)
    assert len(set(sent.tolist())) == 100_000 and sent.min() >= 0 and sent.max() < n
    assert stats.kstest(sent / n, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(sent[:-1], sent[1:])[0, 1]) < 0.02  # neighbours part: 6 standard errors


@pytest.mark.parametrize("n", [2, 5, 9])
def test_every_pair_of_places_is_equally_likely(n):
    """Where two places are sent, over many seeds: each of the n (n - 1) pairs as often as any other."""
    n_draws = 200 * n * (n - 1)
    generator = np.random.default_rng(n)
    places = np.array([0, n - 1])
    sent = [tokens.shuffled(places, n, tokens.draw_turns(n, generator)) for _ in range(n_draws)]
    first, second = np.array(sent).T
    counts = np.bincount(first * n + second, minlength=n * n).reshape(n, n)
    assert np.diag(counts).sum() == 0
    assert stats.chisquare(counts[~np.eye(n, dtype=bool)]).pvalue > 1e-4
