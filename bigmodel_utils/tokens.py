"""Streams of token batches, the same on every run: from a file that may be larger than memory, or from a tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from bigmodel_utils import results
from bigmodel_utils.data import DataError

Turns = tuple[tuple[np.ndarray, np.ndarray], ...]  # by how much each row, then each column is rotated, several times


def write(path: str | Path, chunks: Iterable[Sequence[int] | np.ndarray | Tensor], vocab_size: int) -> int:
    """Write tokens to a .npy file, a chunk at a time: all of it, or nothing and whatever was there before.

    Args:
        path: of the file; `np.load` reads it too.
        chunks: token sequences of any length, such as `(tokenizer.encode(text) for text in texts)`; `[tokens]` for one.
            Cut a long text where documents or paragraphs end: a word cut in two has other tokens.
        vocab_size: two bytes a token up to 65,536, four above.

    Returns:
        the number of tokens.

    Raises:
        ValueError: for tokens that are not whole numbers from 0 to vocab_size - 1, with their chunk, or for none at all.
        OSError: a full or read-only disk.
    """
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    n_tokens = 0
    with results.replacing(Path(path)) as file:
        _write_header(file, dtype, 0)
        for index, chunk in enumerate(chunks):
            tokens = np.asarray(chunk)
            if tokens.size == 0:
                continue
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= vocab_size:
                raise ValueError(f"chunk {index} is not a sequence of tokens, whole numbers from 0 to {vocab_size - 1}")
            file.write(tokens.astype(dtype).data)
            n_tokens += len(tokens)
        if n_tokens == 0:
            raise ValueError(f"there are no tokens to write to {path}: the chunks are empty")
        file.seek(0)
        _write_header(file, dtype, n_tokens)  # as long as the first: numpy leaves room for the length to grow
    return n_tokens


def _write_header(file: IO[bytes], dtype: np.dtype, n_tokens: int) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (n_tokens,)}
    np.lib.format.write_array_header_1_0(file, header)


def load(path: str | Path) -> np.memmap:
    """The tokens of a file that `write` wrote, (n,) uint16 or uint32: read from the disk where they are looked at.

    Raises:
        DataError: for a file that is missing, damaged or holds something else.
    """
    try:
        tokens = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path, or write the tokens first") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is truncated, damaged or no token file ({error}): write it anew") from None
    if not isinstance(tokens, np.memmap) or tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise DataError(f"{path} holds something else than tokens (uint16 or uint32 in one row): write it anew")
    if Path(path).stat().st_size != tokens.offset + tokens.nbytes:
        raise DataError(f"{path} is longer than its header says: it is damaged, write it anew")
    return tokens


class TokenBatches:
    """Batches of token windows and of the tokens that follow: x and y, (B, T) int64, with y[:, t] the token after x[:, t].

    A pass visits every window of T tokens once; windows do not overlap. Shuffled, each pass has its own order, and its
    windows begin at its own offset, so that they end elsewhere than before: up to 2T tokens at the ends wait for another pass.

    `batches[step]` is the batch of a training step, counted through all passes. It depends on the arguments and the step alone,
    so that processes, workers and restarts cannot change it. With workers:
    `DataLoader(batches, batch_size=None, sampler=range(first_step, max_steps), num_workers=2)`.
    """

    def __init__(
        self,
        tokens: str | Path | Sequence[int] | np.ndarray | Tensor,
        context_length: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        n_ranks: int = 1,
    ):
        """
        Args:
            tokens: the path of a file from `write`, of which no more than a batch is in memory, or tokens in memory.
            context_length: T.
            batch_size: of all ranks together, so that their number does not change what a step is trained on.
            seed: of the orders and offsets.
            shuffle: False visits the windows from the first token on, in order.
            drop_last: leave out the last batch of a pass where it would be smaller: one shape for compilers.
            rank: which part of each batch, batch_size / n_ranks rows, is given out.
            n_ranks: processes that share the batches.

        Raises:
            ValueError: for sizes that do not fit together or too few tokens.
            DataError: for a file that cannot be read.
        """
        if context_length < 1 or batch_size < 1 or not 0 <= rank < n_ranks or batch_size % n_ranks:
            raise ValueError(
                "context_length and batch_size are 1 or more, rank is below n_ranks, and n_ranks divides batch_size; "
                f"got {context_length}, {batch_size}, {rank} and {n_ranks}"
            )
        if n_ranks > 1 and not drop_last:
            raise ValueError("several ranks need batches of one size: use drop_last=True, or one rank for the evaluation")
        if isinstance(tokens, str | Path):
            file = load(tokens)  # mapped anew for each batch, so that the pages looked at are given back
            self._tokens = functools.partial(np.memmap, file.filename, file.dtype, "r", file.offset, file.shape)
        else:
            self._tokens = functools.partial(np.asarray, np.asarray(tokens))
        n_tokens = _check_tokens(self._tokens())
        self._n_offsets = max(1, min(context_length, n_tokens - context_length)) if shuffle else 1
        self.n_windows = (n_tokens - self._n_offsets) // context_length
        n_needed = batch_size if drop_last else 1
        if self.n_windows < n_needed:
            raise ValueError(
                f"{n_tokens:,} tokens are {self.n_windows} windows of {context_length}, and a batch needs {n_needed}: "
                "use a smaller context_length or batch_size"
            )
        self.context_length, self.batch_size, self.seed, self.shuffle = context_length, batch_size, seed, shuffle
        self.drop_last, self.rank, self.n_ranks = drop_last, rank, n_ranks
        self._pass, self._position, self._go_on = 0, 0, False

    def __len__(self) -> int:
        """Batches in a pass."""
        return self.n_windows // self.batch_size if self.drop_last else -(-self.n_windows // self.batch_size)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """x and y of a training step, (B / n_ranks, T) each, counted from 0 and through all passes."""
        if step < 0:
            raise IndexError(f"steps are counted from 0, got {step}")
        n_pass, position = divmod(step, len(self))
        n_rows = self.batch_size // self.n_ranks
        first = position * self.batch_size + self.rank * n_rows
        windows, offset = np.arange(first, min(first + n_rows, self.n_windows)), 0
        if self.shuffle:
            offset, turns = _draw(self.n_windows, self._n_offsets, self.seed, n_pass)
            windows = shuffled(windows, self.n_windows, turns)
        every_row = np.lib.stride_tricks.sliding_window_view(self._tokens(), self.context_length + 1)
        rows = every_row[offset + windows * self.context_length]  # (B / n_ranks, T + 1)
        x, y = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
        return torch.from_numpy(x), torch.from_numpy(y)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The next pass, or after `load_state_dict` the rest of one."""
        if self._position and not self._go_on:  # the pass before was left in the middle
            self._pass, self._position = self._pass + 1, 0
        self._go_on = False
        for position in range(self._position, len(self)):
            self._position = position + 1
            yield self[self._pass * len(self) + position]
        self._pass, self._position = self._pass + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The present pass, and how many of its batches were given out."""
        return {"pass": self._pass, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass be the rest of the one in which `state` was taken.

        Raises:
            ValueError: for a state of longer passes than these.
        """
        if state["position"] > len(self):
            raise ValueError(f"the state is at batch {state['position']} of a pass, these have {len(self)}: use the same data")
        self._pass, self._position, self._go_on = state["pass"], state["position"], True


def _check_tokens(tokens: np.ndarray) -> int:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens are whole numbers in one row, got shape {tokens.shape} of {tokens.dtype}")
    return len(tokens)


def shuffled(places: np.ndarray, n: int, turns: Turns) -> np.ndarray:
    """Where a random permutation of 0 ... n - 1 sends `places`, in memory for the square root of n numbers.

    The numbers stand in a square, or nearly. Each row is rotated by its own random amount, then each column, several times over
    (a Feistel network: Luby and Rackoff 1988, https://doi.org/10.1137/0217022). What lands behind the n-th place, as the last row
    may not be full, goes through it again (Black and Rogaway 2002, https://eprint.iacr.org/2001/012, "cycle walking").

    Args:
        places: (k,) integers below n.
        n: how many are permuted.
        turns: as `draw_turns` draws them for n.
    """
    n_rows, n_columns = _rectangle(n)
    places, again = places.copy(), np.full(len(places), True)
    while again.any():
        row, column = np.divmod(places[again], n_columns)
        for of_row, of_column in turns:
            column = (column + of_row[row]) % n_columns
            row = (row + of_column[column]) % n_rows
        places[again] = row * n_columns + column
        again = places >= n
    return places


def draw_turns(n: int, generator: np.random.Generator, n_rounds: int = 6) -> Turns:
    """Random amounts to rotate rows and columns by, for `shuffled`.

    With fewer rounds neighbours of a small n would stay neighbours more often than by chance.
    """
    n_rows, n_columns = _rectangle(n)
    return tuple(
        (generator.integers(n_columns, size=n_rows), generator.integers(n_rows, size=n_columns)) for _ in range(n_rounds)
    )


def _rectangle(n: int) -> tuple[int, int]:
    """Rows and columns for n places: the last row may not be full, and no row is empty."""
    n_columns = math.isqrt(n - 1) + 1
    return -(-n // n_columns), n_columns


@functools.lru_cache(maxsize=8)
def _draw(n_windows: int, n_offsets: int, seed: int, n_pass: int) -> tuple[int, Turns]:
    """The offset and the order of a pass."""
    generator = np.random.default_rng((seed, n_pass))
    return int(generator.integers(n_offsets)), draw_turns(n_windows, generator)
