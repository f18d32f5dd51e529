"""Connectionist temporal classification (Graves et al. 2006, https://doi.org/10.1145/1143844.1143891).

A network says at each of T frames how probable each of K labels is, one of them the *blank*.
A path takes one label a frame; merging repeats and then dropping blanks makes it a text: `- c c - a - t t` says `c a t`.
The probability of a text is the sum over all its paths.
Here: that sum, the most probable path of a text, and a search for the most probable text, with a language model's help if wanted.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER = -math.inf  # the logarithm of probability 0
LanguageModel = Callable[[tuple[int, ...], int | None], float]


def collapse(path: Sequence[int], blank: int = 0) -> list[int]:
    """The text of a path: repeats merged, then blanks dropped."""
    return [label for label, _ in groupby(path) if label != blank]


def log_likelihood(log_probs: Tensor, labels: Sequence[int], blank: int = 0) -> Tensor:
    """log p(labels | sound), the sum over all paths, by the forward recursion (section 4.1); -inf for a text that is too long.

    The label sequence with blanks around each label, `- c - a - t -`, has S = 2 n + 1 places.
    alpha[s] is the log-probability of all ways to be at place s; a path stays, moves on by one,
    or skips a blank between two different labels.
    Training uses `loss`, the same sum for a batch, and faster.

    Args:
        log_probs: (T, K) log-probabilities of one recording.
        labels: the text, without blanks.
        blank: the blank's label.

    Returns:
        A scalar, differentiable.

    Raises:
        ValueError: for log-probabilities of another shape, or labels outside 0 to K - 1 or equal to the blank.
    """
    _check(log_probs, blank, labels)
    places = torch.full((2 * len(labels) + 1,), blank, device=log_probs.device)  # (S,)
    places[1::2] = torch.tensor(labels, dtype=torch.long, device=log_probs.device)
    skips = torch.zeros_like(places, dtype=torch.bool)
    skips[2:] = (places[2:] != blank) & (places[2:] != places[:-2])
    never = log_probs.new_full((2,), -1e30)  # finite, because the gradient of log(0 + 0) has no value
    alpha = torch.cat([log_probs[0, places[:2]], never[:1].expand(len(places) - len(places[:2]))])  # (S,)
    for frame in log_probs[1:, places]:  # (S,)
        before = torch.cat([never, alpha])  # place s is at s + 2
        skipped = torch.where(skips, before[:-2], never[0])
        alpha = frame + torch.stack([alpha, before[1:-1], skipped]).logsumexp(dim=0)
    total = alpha[-2:].logsumexp(dim=0)  # at the last label, or at the blank behind it
    return total.masked_fill(total < -1e29, NEVER)


def loss(log_probs: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """-log p(labels | sound) for each label, mean over a batch: torch's own, for `train.fit`.

    Args:
        log_probs: (B, T, K); the blank is 0.
        target: labels (B, S), their numbers (B,), and the numbers of frames (B,); what is behind is padding.
    """
    labels, n_labels, n_frames = target
    return F.ctc_loss(log_probs.transpose(0, 1), labels, n_frames, n_labels)


def align(log_probs: Tensor, labels: Sequence[int], blank: int = 0) -> list[int | None]:
    """The most probable path that says `labels` (Viterbi): the recursion of `log_likelihood` with the maximum for the sum.

    Returns:
        for each frame the position in `labels` of what is said there, None for a blank.

    Raises:
        ValueError: as `log_likelihood`, and for a text that the frames cannot say.
    """
    _check(log_probs, blank, labels)
    places = [blank] * (2 * len(labels) + 1)
    places[1::2] = labels
    rows, steps = log_probs.tolist(), []  # steps[t - 1][s]: the place before place s at frame t
    best = [rows[0][place] if s < 2 else NEVER for s, place in enumerate(places)]
    for row in rows[1:]:
        before = [max(_reachable(places, s, blank), key=best.__getitem__) for s in range(len(places))]
        best = [best[source] + row[place] for source, place in zip(before, places)]
        steps.append(before)
    s = max(range(len(places))[-2:], key=best.__getitem__)
    if best[s] == NEVER:
        raise ValueError(f"no path of {len(rows)} frames says these {len(labels)} labels")
    path = [s]
    for before in reversed(steps):
        path.append(before[path[-1]])
    return [s // 2 if s % 2 else None for s in reversed(path)]


def _reachable(places: list[int], s: int, blank: int) -> list[int]:
    """Places from which place s is reached in one step: itself, the one before, and across a blank."""
    skips = s >= 2 and places[s] not in (blank, places[s - 2])
    return [s, *([s - 1] if s else []), *([s - 2] if skips else [])]


def greedy(log_probs: Tensor, lengths: Tensor | None = None, blank: int = 0) -> list[list[int]]:
    """The texts of the most probable paths, which need not be the most probable texts.

    Args:
        log_probs: (B, T, K).
        lengths: (B,) frames of each recording; None: all T.
        blank: the blank's label.
    """
    ends = [log_probs.shape[1]] * len(log_probs) if lengths is None else lengths.tolist()
    return [collapse(path[:end], blank) for path, end in zip(log_probs.argmax(dim=-1).tolist(), ends)]


class Hypothesis(NamedTuple):
    """A text that the beam search found."""

    labels: tuple[int, ...]
    score: float  # log_p + lm_weight * (the language model's sum) + label_bonus * (number of labels)
    log_p: float  # log-probability of those of its paths that the search followed: all of them if nothing was cut


def beam_search(
    log_probs: Tensor,
    beam_width: int = 16,
    blank: int = 0,
    language_model: LanguageModel | None = None,
    lm_weight: float = 1.0,
    label_bonus: float = 0.0,
    min_log_p: float = NEVER,
) -> list[Hypothesis]:
    """The best texts, best first: prefix beam search (Hannun et al. 2014, https://arxiv.org/abs/1408.2873, algorithm 1).

    After each frame every prefix has two log-probabilities, of its paths that end in a blank and of those that end in its
    last label; the `beam_width` best prefixes are kept.
    A beam that keeps all prefixes finds the exact best text.

    Args:
        log_probs: (T, K) log-probabilities of one recording.
        beam_width: prefixes kept.
        blank: the blank's label.
        language_model: (prefix, label) -> log-probability of that label behind that prefix; asked for label None, of the
            text's end. It may answer 0.0 where it has no opinion (a model of words: everywhere but behind a word).
        lm_weight: of the language model's logarithm, alpha in the paper.
        label_bonus: added for each label, against the language model's love of short texts; beta in the paper.
        min_log_p: labels less probable than this at a frame are not followed there, which saves most of the time.

    Raises:
        ValueError: for log-probabilities of another shape or a beam without width.
    """
    _check(log_probs, blank)
    if beam_width < 1:
        raise ValueError(f"beam_width is 1 or more, got {beam_width}")
    extras = {(): 0.0}  # what language model and bonus add to a prefix's score

    def opinion(prefix: tuple[int, ...], label: int | None) -> float:
        return lm_weight * language_model(prefix, label) if language_model and lm_weight else 0.0

    def extra(prefix: tuple[int, ...]) -> float:
        if prefix not in extras:
            extras[prefix] = extra(prefix[:-1]) + opinion(prefix[:-1], prefix[-1]) + label_bonus
        return extras[prefix]

    def score(prefix: tuple[int, ...], in_blank: float, in_label: float) -> float:
        return _log_add(in_blank, in_label) + extra(prefix)

    beam = {(): (0.0, NEVER)}  # prefix: log p of its paths that end in a blank, and in its last label
    for frame in log_probs.tolist():
        grown = _grow(beam, {label: p for label, p in enumerate(frame) if p >= min_log_p or label == blank}, blank)
        best = heapq.nlargest(beam_width, grown, key=lambda prefix: score(prefix, *grown[prefix]))
        beam = {prefix: grown[prefix] for prefix in best}
    found = [Hypothesis(prefix, score(prefix, *p) + opinion(prefix, None), _log_add(*p)) for prefix, p in beam.items()]
    return sorted(found, key=lambda hypothesis: hypothesis.score, reverse=True)


def _grow(
    beam: dict[tuple[int, ...], tuple[float, float]], frame: dict[int, float], blank: int
) -> dict[tuple[int, ...], tuple[float, float]]:
    """All prefixes one frame later."""
    grown: dict[tuple[int, ...], tuple[float, float]] = {}

    def add(prefix: tuple[int, ...], in_blank: float, in_label: float) -> None:
        if max(in_blank, in_label) > NEVER:
            old_blank, old_label = grown.get(prefix, (NEVER, NEVER))
            grown[prefix] = (_log_add(old_blank, in_blank), _log_add(old_label, in_label))

    for prefix, (in_blank, in_label) in beam.items():
        either = _log_add(in_blank, in_label)
        add(prefix, either + frame[blank], NEVER)
        for label, log_p in frame.items():
            if label == blank:
                continue
            repeats = prefix[-1:] == (label,)
            if repeats:
                add(prefix, NEVER, in_label + log_p)  # the same label, held on
            add((*prefix, label), NEVER, (in_blank if repeats else either) + log_p)
    return grown


def _log_add(a: float, b: float) -> float:
    low, high = (a, b) if a < b else (b, a)
    return high if low == NEVER else high + math.log1p(math.exp(low - high))


class NGramModel:
    """A language model of labels for `beam_search`: how often each follows the `order - 1` before it, in some texts.

    What was seen seldom leans on shorter contexts (Witten and Bell 1991, https://doi.org/10.1109/18.87000): with n counts of d
    different labels behind a context, p(label | context) = (count + d p(label | shorter context)) / (n + d).
    """

    def __init__(self, texts: Iterable[Sequence[int]], order: int, n_labels: int):
        """texts: to count; order: 1 or more, labels looked at, the predicted one among them; n_labels: without the end.

        Raises:
            ValueError: for an order below 1.
        """
        if order < 1:
            raise ValueError(f"order is 1 or more, got {order}")
        self.order, self.n_outcomes = order, n_labels + 1
        self.counts: dict[tuple, Counter] = defaultdict(Counter)
        for text in texts:
            padded = (*self._start, *text, None)  # None is the text's end, and before its beginning
            for i in range(order - 1, len(padded)):
                for length in range(order):
                    self.counts[padded[i - length : i]][padded[i]] += 1

    @property
    def _start(self) -> tuple[None, ...]:
        return (None,) * (self.order - 1)

    def __call__(self, prefix: tuple[int, ...], label: int | None) -> float:
        """Logarithm of the probability of `label`, or of the end (None), behind `prefix`."""
        context = (*self._start, *prefix)
        return math.log(self._probability(context[len(context) - self.order + 1 :], label))

    def _probability(self, context: tuple, label: int | None) -> float:
        shorter = self._probability(context[1:], label) if context else 1 / self.n_outcomes
        counts = self.counts.get(context)
        return (counts[label] + len(counts) * shorter) / (counts.total() + len(counts)) if counts else shorter


def _check(log_probs: Tensor, blank: int, labels: Sequence[int] = ()) -> None:
    if log_probs.ndim != 2 or not len(log_probs) or not 0 <= blank < log_probs.shape[1]:
        raise ValueError(f"expected log-probabilities (T, K) with the blank {blank} below K, got {tuple(log_probs.shape)}")
    if any(label == blank or not 0 <= label < log_probs.shape[1] for label in labels):
        raise ValueError(f"labels are 0 to {log_probs.shape[1] - 1} and not the blank {blank}, got {list(labels)}")
