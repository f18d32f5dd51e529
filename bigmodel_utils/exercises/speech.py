"""Checkers of chapter 9: aliases, paths, error counts and noise, each against measuring or listing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from bigmodel_utils import ctc


def check_alias(answer: Callable[[float, float], float]) -> None:
    """Against the loudest frequency of a tone that was really sampled."""
    for rate, frequency in itertools.product((8000, 11_025), (0, 300, 3999, 4700, 6000, 8000, 8100, 12_500, 17_300, 24_000)):
        samples = np.cos(2 * np.pi * frequency * np.arange(rate) / rate)
        expected = int(np.abs(np.fft.rfft(samples)).argmax())  # one second: the bins are whole frequencies
        got = answer(frequency, rate)
        assert abs(got - expected) < 1e-6, (
            f"a tone of {frequency} Hz sampled {rate} times a second is loudest at {expected} Hz, not {got}"
        )


def check_count_paths(answer: Callable[[int, Sequence[int]], int]) -> None:
    """Against a list of all paths of three labels."""
    for n_frames in range(1, 8):
        texts = [tuple(ctc.collapse(path)) for path in itertools.product(range(3), repeat=n_frames)]
        for text in [(), (1,), (1, 2), (1, 1), (2, 1, 2), (1, 1, 2), (1, 2, 2, 1)]:
            expected, got = texts.count(text), answer(n_frames, list(text))
            assert got == expected, f"{expected} paths of {n_frames} frames say {list(text)}, your count is {got}"


def check_edit_distance(answer: Callable[[Sequence[str], Sequence[str]], int]) -> None:
    """Against the recursion that follows every way to edit."""

    @cache
    def fewest(said: tuple, heard: tuple) -> int:
        if not said or not heard:
            return len(said) + len(heard)
        replaced = fewest(said[1:], heard[1:]) + (said[0] != heard[0])
        return min(replaced, fewest(said[1:], heard) + 1, fewest(said, heard[1:]) + 1)

    words = ("two", "three", "ten")
    sentences = [sentence for n in range(4) for sentence in itertools.product(words, repeat=n)]
    for said, heard in itertools.product(sentences, sentences[::3]):
        expected, got = fewest(said, heard), answer(list(said), list(heard))
        assert got == expected, f"from {' '.join(said)!r} to {' '.join(heard)!r} it takes {expected} edits, not {got}"


def check_add_noise(answer: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> None:
    """Against the ratio of energies, measured on what was added."""
    generator = np.random.default_rng(0)
    for snr_db, loudness in itertools.product((-10.0, 0.0, 3.0, 20.0), (0.1, 5.0)):
        speech, noise = generator.normal(size=400), loudness * generator.normal(size=400)
        result = np.asarray(answer(speech.copy(), noise.copy(), snr_db))
        added = result - speech
        assert np.abs(added).max() > 0, "nothing was added"
        assert np.corrcoef(added, noise)[0, 1] > 0.999, "what is added should be the noise, scaled by a positive number"
        measured = 10 * np.log10(np.square(speech).mean() / np.square(added).mean())
        assert abs(measured - snr_db) < 1e-6, f"asked for {snr_db:.0f} dB, the result has {measured:.1f} dB"
