"""Language models held to account: text in parts that share nothing, an n-gram model and a compressor that must be beaten,
the surprise at each token, a GPT trained by one recipe or another, and how much of a text is copied.
"""

from __future__ import annotations

import functools
import lzma
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from bigmodel_utils import device as devices
from bigmodel_utils import downloads, models, optim, text, tokens, train

HELD_OUT = {"validation": range(7, 67, 10), "test": range(8, 67, 10)}  # books of the Bible, by a rule that looks at no text
XZ_WINDOW = 64 * 2**20  # bytes that xz -9 looks back


def load_text(corpus: str = "kjv", max_bytes: int = 10**9) -> dict[str, str]:
    """A text in parts "train", "validation" and "test", each beginning with a line break.

    Args:
        corpus: "kjv", the King James Bible, a verse a line, split by whole books; or "tiny-stories", a story a line, fetched
            over the network, whose published validation stories are halved.
        max_bytes: of the stories, about; the Bible is taken whole.

    Raises:
        ValueError: for another corpus.
        DataError: where the text is not installed or cannot be fetched.
    """
    if corpus == "kjv":
        verses = text.load_verses("kjv")
        parts = text.split_by_book(verses, HELD_OUT)
        lines = {part: [verses[number] for number in numbers] for part, numbers in parts.items()}
    elif corpus == "tiny-stories":
        held_out = _stories("validation", max_bytes // 10)
        lines = {"train": _stories("train", max_bytes), "validation": held_out[::2], "test": held_out[1::2]}
    else:
        raise ValueError(f"corpus is kjv or tiny-stories, got {corpus!r}")
    return {part: "\n".join(["", *those]) for part, those in lines.items()}


def _stories(split: str, max_bytes: int) -> list[str]:
    stories, n_bytes = [], 0
    for story in downloads.read_tiny_stories(split):
        stories.append(" ".join(story.split()))
        n_bytes += len(stories[-1].encode())
        if n_bytes > max_bytes:
            break
    return stories


# Baselines.


class NGram:
    """How often has this token followed the last few? Modified Kneser-Ney, which falls back on fewer where they are new.

    p_n(w | c) = (count(c w) - D(count(c w))) / count(c) + freed(c) / count(c) p_{n-1}(w | c without its first token), where
    freed(c) is the sum of what was taken off the counts behind c. Below the highest order `count` is the number of different
    tokens seen before the n-gram; p_0 = 1 / vocab_size.

    Sources: Kneser and Ney 1995, https://doi.org/10.1109/ICASSP.1995.479394; Chen and Goodman 1999,
    https://doi.org/10.1006/csla.1999.0128, section 3.
    """

    def __init__(self, sequence: Sequence[int] | np.ndarray, order: int, vocab_size: int):
        """Count.

        Args:
            sequence: (n,) training tokens.
            order: the longest n-gram; order - 1 tokens are looked back.
            vocab_size: V.

        Raises:
            ValueError: for an order that does not fit 64-bit codes, a sequence that is too short, or tokens outside 0 ... V - 1.
        """
        sequence = np.asarray(sequence, dtype=np.int64)
        if order < 1 or vocab_size**order >= 2**63 or len(sequence) < order:
            raise ValueError(
                f"order is 1 or more, vocab_size^order below 2^63 and the sequence at least as long as order; "
                f"got order {order}, vocab_size {vocab_size} and {len(sequence)} tokens"
            )
        if sequence.min() < 0 or sequence.max() >= vocab_size:
            raise ValueError(f"tokens must lie in 0 ... {vocab_size - 1}, got {sequence.min()} ... {sequence.max()}")
        self.order, self.vocab_size = order, vocab_size
        codes = self._codes(np.lib.stride_tricks.sliding_window_view(sequence, order))[-1]
        grams, counts = np.unique(codes, return_counts=True)
        self.tables = [_Table(grams, counts, vocab_size)]
        for n in range(order - 1, 0, -1):
            grams, counts = np.unique(grams % vocab_size**n, return_counts=True)  # each longer n-gram counts once
            self.tables.insert(0, _Table(grams, counts, vocab_size))

    def _codes(self, windows: np.ndarray) -> np.ndarray:
        """(order, m) numbers that stand for the last 1, 2 ... order tokens of windows (m, order)."""
        codes = np.empty(windows.shape[::-1], dtype=np.int64)
        codes[0] = windows[:, -1]
        for n in range(1, self.order):
            codes[n] = codes[n - 1] + windows[:, -1 - n] * self.vocab_size**n
        return codes

    def _windows(self, sequence: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n - 1, order) each token but the first, behind those before it; what comes before the first is more of it."""
        sequence = np.asarray(sequence, dtype=np.int64)
        padded = np.concatenate([np.full(self.order - 2, sequence[0]), sequence]) if self.order > 1 else sequence[1:]
        return np.lib.stride_tricks.sliding_window_view(padded, self.order)

    def _probabilities(self, windows: np.ndarray) -> np.ndarray:
        p = np.full(len(windows), 1 / self.vocab_size)
        for table, codes in zip(self.tables, self._codes(windows)):
            p = table.refine(codes, p)
        return p

    def surprisal(self, sequence: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n - 1,) nats, -ln p of each token but the first of a sequence (n,), given those before it."""
        return -np.log(self._probabilities(self._windows(sequence)))

    def distribution(self, context: Sequence[int]) -> np.ndarray:
        """(V,) probabilities of the token after a context of order - 1 tokens or more."""
        last = np.asarray(context, dtype=np.int64)[len(context) - self.order + 1 :]
        return self._probabilities(np.column_stack([np.tile(last, (self.vocab_size, 1)), np.arange(self.vocab_size)]))

    def n_known(self, sequence: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n - 1,) how many of the tokens before each one, at most order - 1, stood together in training too."""
        codes = self._codes(self._windows(sequence))
        known = [table.find_contexts(grams)[1] for table, grams in zip(self.tables, codes)]  # the shortest context is empty
        return np.sum(known, axis=0) - 1


class _Table:
    """The n-grams of one length, sorted, with what is left of their counts; and their contexts."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray, vocab_size: int):
        taken = discounts(counts)[np.minimum(counts, 3)]
        self.vocab_size, self.grams, self.kept = vocab_size, grams, counts - taken
        self.contexts, first = np.unique(grams // vocab_size, return_index=True)
        self.totals, self.freed = np.add.reduceat(counts, first), np.add.reduceat(taken, first)

    def find_contexts(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the contexts of n-grams, and whether they are there."""
        return _find(codes // self.vocab_size, self.contexts)

    def refine(self, codes: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probabilities (m,) of n-grams, given those by one token less; unchanged where the context is new."""
        place, is_known = self.find_contexts(codes)
        gram, is_seen = _find(codes, self.grams)
        p = (np.where(is_seen, self.kept[gram], 0.0) + self.freed[place] * lower) / self.totals[place]
        return np.where(is_known, p, lower)


def discounts(counts: np.ndarray) -> np.ndarray:
    """(4,) what to take off counts of 0, 1, 2 and 3 or more: D(k) = k - (k + 1) Y n_{k+1} / n_k, with Y = n_1 / (n_1 + 2 n_2).

    n_k is how many of the counts are k; where the estimate does not exist or is no discount, half a count is taken.

    Source: Chen and Goodman 1999, equations 26, after Ney et al. 1994.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=5).astype(float)  # n_0 ... n_4
    k = np.arange(1, 4)
    with np.errstate(divide="ignore", invalid="ignore"):
        d = k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[k + 1] / n[k]
    return np.append(0.0, np.where((d > 0) & (d < k), d, 0.5))


def _find(wanted: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where numbers stand in a sorted array, and whether they do."""
    place = np.minimum(np.searchsorted(among, wanted), len(among) - 1)
    return place, among[place] == wanted


def xz_bits_per_byte(known: str, new: str) -> float:
    """Bits that `xz -9e` needs for each byte of `new` when it has just read `known`."""
    before, new_bytes = known.encode()[-XZ_WINDOW:], new.encode()
    return 8 * (_xz_size(before + new_bytes) - _xz_size(before)) / len(new_bytes)


@functools.lru_cache(maxsize=4)
def _xz_size(content: bytes) -> int:
    return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


# A GPT: its training by the recipe, and its surprise at each token.


def train_gpt(
    model: models.GPT,
    sequence: Sequence[int] | np.ndarray,
    *,
    max_steps: int,
    batch_size: int,
    seed: int = 0,
    method: str = "muon",
    lr: float = 0.02,
    adamw_lr: float = 3e-3,
    schedule: str = "trapezoid",
    precision: str = "float32",
    validation: Sequence[int] | np.ndarray | None = None,
    eval_every: int | None = None,
) -> train.History:
    """Train a GPT in place on windows of its context length.

    Args:
        model: on the device to train on.
        sequence: (n,) training tokens.
        max_steps: optimiser steps.
        batch_size: windows a step.
        seed: of the windows' order; the weights are drawn by the caller.
        method: "muon" for the blocks' matrices and AdamW for the rest, or "adamw" for all.
        lr: of Muon.
        adamw_lr: of AdamW.
        schedule: "trapezoid" (a twentieth of the steps up, two fifths down to 0) or "constant" (only up).
        precision: of products, as in `train.TrainConfig`.
        validation: tokens whose loss is measured every `eval_every` steps; the best weights are kept. None: neither.

    Raises:
        ValueError: for another method or schedule; as `tokens.TokenBatches`.
    """
    if method not in ("muon", "adamw") or schedule not in ("trapezoid", "constant"):
        raise ValueError(f"method is muon or adamw and schedule trapezoid or constant, got {method!r} and {schedule!r}")
    context_length, device = model.config.context_length, next(model.parameters()).device
    if method == "muon":
        optimizer = optim.Muon(*optim.split_matrices(model), lr=lr, adamw_lr=adamw_lr)
    else:
        settings = {"betas": (0.9, 0.95), "weight_decay": 0.1, "fused": devices.supports_fused(device)}
        optimizer = torch.optim.AdamW(model.parameters(), lr=adamw_lr, **settings)
    warmup_steps, decay_steps = max(1, max_steps // 20), max(1, 2 * max_steps // 5)
    trapezoid = optim.trapezoid(max_steps, warmup_steps, decay_steps)
    course = trapezoid if schedule == "trapezoid" else optim.warmup(warmup_steps)
    batches = tokens.TokenBatches(sequence, context_length, batch_size, seed=seed)
    held_out = None
    if validation is not None:
        held_out = tokens.TokenBatches(validation, context_length, batch_size, shuffle=False, drop_last=False)
    config = train.TrainConfig(
        n_epochs=-(-max_steps // len(batches)),
        max_steps=max_steps,
        eval_every=eval_every or max_steps,
        max_grad_norm=1.0,
        precision=precision,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, course)
    return train.fit(model, batches, cross_entropy, config, optimizer=optimizer, scheduler=scheduler, validation=held_out)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats a token: logits (B, T, V) in any precision, targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def surprisal(
    model: models.GPT,
    sequence: Sequence[int] | np.ndarray,
    stride: int | None = None,
    precision: str = "float32",
    batch_size: int = 32,
) -> np.ndarray:
    """(n - 1,) nats, -ln p of each token but the first of a sequence (n,), given those before it in a window.

    Args:
        model: in evaluation mode during the call; its mode is put back.
        sequence: (n,) tokens.
        stride: how far a window lies behind the one before: its last `stride` tokens count, the others are read again, so
            that context_length - stride tokens or more are known at each. None: half the context.
        precision: of products, as in `train.TrainConfig`.
        batch_size: windows at a time.

    Raises:
        ValueError: for fewer than two tokens, or a stride that is not in 1 ... context_length.
    """
    x = torch.as_tensor(np.asarray(sequence, dtype=np.int64))
    T, n_scored = min(model.config.context_length, len(x) - 1), len(x) - 1
    stride = max(1, T // 2) if stride is None else stride
    if n_scored < 1 or not 1 <= stride <= model.config.context_length:
        raise ValueError(f"needs two tokens and a stride in 1 ... {model.config.context_length}, got {len(x)} and {stride}")
    ends = [*range(T, n_scored, min(stride, T)), n_scored]
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    nats = torch.empty(n_scored)
    done = 0
    for first in range(0, len(ends), batch_size):
        some = ends[first : first + batch_size]
        windows = torch.stack([x[end - T : end + 1] for end in some])  # (B, T + 1)
        if device.type == "xla":  # one program for texts of all lengths: no token sees what is put behind it
            windows = F.pad(windows, (0, model.config.context_length - T))
        windows = windows.to(device)
        with devices.autocast(device, precision):
            logits = model(windows[:, :-1])
        losses = F.cross_entropy(logits.float().mT, windows[:, 1:], reduction="none").cpu()  # (B, T)
        for end, row in zip(some, losses):
            nats[done:end], done = row[T - (end - done) : T], end
    model.train(was_training)
    return nats.numpy()


# Copying.


def longest_copies(words: Sequence[str], known: str) -> np.ndarray:
    """(n,) for each word of a text, the length in words of the longest passage that begins there and stands in `known`.

    Args:
        words: (n,) the text, for instance `text.split()`.
        known: the text that may have been copied from; any white space counts as one space.
    """
    known = f" {' '.join(known.split())} "
    lengths, end = np.zeros(len(words), dtype=int), 0
    for start in range(len(words)):
        end = max(end, start)  # the passage of the word before, less that word, is known already
        while end < len(words) and f" {' '.join(words[start : end + 1])} " in known:
            end += 1
        lengths[start] = end - start
    return lengths


# Drawing.


def draw_surprise(ax: Axes, pieces: Sequence[str], bits: np.ndarray, max_bits: float = 12.0, n_columns: int = 76) -> Axes:
    """Write a text whose background says how surprising each piece was: white not at all, the darkest `max_bits` or more.

    Args:
        pieces: (n,) the tokens' texts; a line break shows as ¶ and ends the line.
        bits: (n,) surprise of each.
        n_columns: characters a line.
    """
    points_a_column = 72 * ax.figure.get_figwidth() / n_columns
    style = {"family": "monospace", "size": points_a_column / 0.62, "va": "center"}  # a character is 0.602 of its size wide
    row, column = 0, 0
    for piece, value in zip(pieces, bits):
        shown = piece.replace("\n", "¶")
        if column + len(shown) > n_columns:
            row, column = row + 1, 0
        shade = colormaps["Oranges"](0.8 * min(value / max_bits, 1.0))
        ax.add_patch(Rectangle((column, row), len(shown), 0.95, facecolor=shade, linewidth=0))
        ax.text(column, row + 0.5, shown, **style)
        row, column = (row + 1, 0) if piece.endswith("\n") else (row, column + len(shown))
    ax.set(xlim=(0, n_columns), ylim=(row + 1, 0))
    ax.axis("off")
    return ax
