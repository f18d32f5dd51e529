"""Speech: made by a synthesiser or recorded, turned into the features that speech models read, and how errors are counted.

The parts follow a sound's way: voices, recordings, features, tensors for training, error rates; and players to listen to it.
"""

from __future__ import annotations

import base64
import ctypes
import functools
import gzip
import hashlib
import html
import importlib.util
import io
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import signal
from scipy.io import wavfile
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from bigmodel_utils.data import Card, DataError, Split, check_sha256

ESPEAK = Card(
    title="Synthetic speech of eSpeak NG 1.52, many voices, text known exactly",
    source="the package espeakng-loader 0.2.4 (https://pypi.org/project/espeakng-loader/), which holds the library",
    licence="GPL-3.0-or-later (eSpeak NG); MIT (the package)",
    n_rows={},
    sha256={},  # a compiled library for each system: no one checksum; the sound is made here
    flaws=(
        "a formant synthesiser, not human: no room, no noise, and a voice says a word nearly the same way every time",
        "the voice flutters by a counter that the library never resets: a repeated word differs by some samples, and only the "
        "whole sequence of calls of a fresh process is the same every time",
        "voices differ in pitch and formants only, so that a score on unheard voices flatters a recogniser",
    ),
)
SAMPLE_RATE = 22_050  # samples a second that the synthesiser makes
MAX_TEXT_BYTES = 100_000
TELEPHONE_RATE = 8_000  # samples a second of a telephone, and of the recordings below
# Of the synthesiser's variants one of each family: no two are defined by mostly the same lines.
VARIANTS = (
    "Alex Andrea Andy Annie Denis Gene Jacky Lee Mario Mike Reed adam anika antonio belinda benjamin caleb david ed edward f1 f2 "
    "f4 grandma grandpa gustave ian kaukovalta m1 m2 m4 m5 m6 m8 max miguel pablo paul pedro quincy robert sandro shelby "
    "steph Alicia boris f3 f5 linda m3 m7 marcelo rob steph2 travis victor whisper"
)
VOICES = tuple(f"en-us+{variant}" for variant in VARIANTS.split())


@functools.cache
def _espeak() -> ctypes.CDLL:
    """The library, started once in this process: it holds global state."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise DataError("the synthesiser comes with a package: install it with `pip install espeakng-loader`")
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    synchronous = 2  # AUDIO_OUTPUT_SYNCHRONOUS of speak_lib.h: samples go to the callback before Synth returns
    rate = library.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate != SAMPLE_RATE:
        raise DataError(f"the synthesiser did not start as expected: sample rate {rate}, not {SAMPLE_RATE}")
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else it draws its flutter from the clock
    return library


def synthesize(text: str, voice: str = "en", words_per_minute: int = 175) -> np.ndarray:
    """Speak a text.

    Args:
        text: what to say.
        voice: a language, and behind a plus sign a variant: "en", "en-us+f2", "en+m4", "de".
        words_per_minute: speed, 80 to 450; 175 is the synthesiser's own.

    Returns:
        (n_samples,) float32 in [-1, 1], `SAMPLE_RATE` samples a second.

    Raises:
        ValueError: for an unknown voice, a speed outside the range, or a text that is empty or too long.
        DataError: where the package is not installed.
    """
    encoded = text.encode()
    if not 80 <= words_per_minute <= 450 or not 0 < len(encoded) <= MAX_TEXT_BYTES:
        raise ValueError(f"needs a speed of 80 to 450 words a minute and a text, got {words_per_minute} and {text[:40]!r}")
    library, chunks = _espeak(), []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def keep(samples, n_samples, events):
        if samples and n_samples > 0:
            chunks.append(np.ctypeslib.as_array(samples, (n_samples,)).copy())
        return 0  # go on

    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"the synthesiser has no voice {voice!r}")
    rate_parameter, utf8 = 1, 1  # espeakRATE, espeakCHARS_UTF8
    library.espeak_SetParameter(rate_parameter, words_per_minute, 0)
    library.espeak_SetSynthCallback(keep)
    library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, utf8, None, None)
    library.espeak_Synchronize()
    return np.concatenate([np.zeros(0, np.int16), *chunks]).astype(np.float32) / 2**15


class Utterance(NamedTuple):
    """Something said."""

    waveform: np.ndarray  # (n_samples,) float32 in [-1, 1]
    text: str  # in small letters, without punctuation
    speaker: str


def resample(waveform: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """The same sound at another number of samples a second; what the new rate cannot carry is filtered out first."""
    if rate == new_rate:
        return waveform
    divisor = math.gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    return signal.resample_poly(waveform, up, down, window=_low_pass(max(up, down))).astype(np.float32)


@functools.cache
def _low_pass(ratio: int) -> np.ndarray:
    """scipy's own filter for resampling; designing it takes as long as using it, so it is kept."""
    return signal.firwin(20 * ratio + 1, 1 / ratio, window=("kaiser", 5.0))


def speak(
    texts: Sequence[str], voices: Sequence[str], seed: int, *, word_by_word: float = 0.0, sample_rate: int = TELEPHONE_RATE
) -> list[Utterance]:
    """Say each text in a voice and at a speed (120 to 210 words a minute) that are drawn at random.

    Args:
        texts: what to say.
        voices: to draw from, such as `VOICES`.
        seed: of the draws; the waveforms also depend on what this process said before (`ESPEAK.flaws`).
        word_by_word: the share of the texts whose words are said one by one, with pauses of up to a quarter of a second.
        sample_rate: samples a second.
    """
    draw, spoken = random.Random(seed), []
    for text in texts:
        voice, words_per_minute = draw.choice(voices), draw.randint(120, 210)
        pieces = text.split() if draw.random() < word_by_word else [text]
        waves = [resample(synthesize(piece, voice, words_per_minute), SAMPLE_RATE, sample_rate) for piece in pieces]
        if len(pieces) > 1:
            waves = [np.pad(trim(wave), (0, draw.randrange(sample_rate // 4))) for wave in waves]
        spoken.append(Utterance(np.concatenate(waves), text, voice))
    return spoken


def vary(utterances: Iterable[Utterance], seed: int, lowest_snr_db: float = 0.0) -> list[Utterance]:
    """Each utterance played faster and higher or slower and lower, by up to a fifth, and with white noise of some loudness.

    Args:
        utterances: to vary.
        seed: of the draws.
        lowest_snr_db: the loudest noise; the softest, at 40 dB, is hardly heard (`mix`).
    """
    generator, varied = np.random.default_rng(seed), []
    for utterance in utterances:
        wave = resample(utterance.waveform, 16, int(generator.integers(13, 20)))  # more samples: slower and lower
        wave = mix(wave, generator.normal(size=len(wave)), generator.uniform(lowest_snr_db, 40))
        varied.append(utterance._replace(waveform=wave))
    return varied


def trim(waveform: np.ndarray, threshold: float = 0.02) -> np.ndarray:
    """Without the beginning and the end that stay below `threshold` times the loudest sample."""
    (loud,) = np.nonzero(np.abs(waveform) >= threshold * np.abs(waveform).max())
    return waveform[loud[0] : loud[-1] + 1]


NUMBER_NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred"
)
NUMBER_WORDS = tuple(NUMBER_NAMES.split())
ONES, TENS = NUMBER_WORDS[:20], NUMBER_WORDS[20:28]


def number_in_words(number: int) -> str:
    """The American name of a number from 0 to 999: 243 is "two hundred forty three".

    Raises:
        ValueError: for another number.
    """
    if not 0 <= number <= 999:
        raise ValueError(f"names numbers from 0 to 999, got {number}")
    hundreds, rest = divmod(number, 100)
    tens = [ONES[rest]] if rest < 20 else [TENS[rest // 10 - 2], *([ONES[rest % 10]] if rest % 10 else [])]
    return " ".join(([ONES[hundreds], "hundred"] if hundreds else []) + (tens if rest or not hundreds else []))


SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
RECORDINGS = Card(
    title="The English phrases of a telephone exchange: one woman, Allison Smith, 8 kHz",
    source="Debian's package asterisk-core-sounds-en-wav 1.6.1-1 (https://packages.debian.org/asterisk-core-sounds-en-wav)",
    licence="CC BY-SA 3.0, Allison Smith",
    n_rows={"recordings": 568, "with words": 551},
    sha256={
        TRANSCRIPTS.name: "436538195b7c7361bd227036686f1a4039f694648c76573bdaca956655d34450",
        "all recordings, by name, joined": "dca3dba15cf9bd8f236f76d3425ddede456b98668baec7475d3f926941c1fee4",
        "number words, joined": "af91ce8edfe5e3bfe30fc5020650c1f71ed42547b562f71e9246377371a06725",
    },
    flaws=(
        "one speaker in a studio: a score on her says nothing about other people, or about rooms and streets",
        "words are spoken one at a time, to be joined by a machine: longer than in a sentence, with silence between",
        "transcripts were written for people: digits as numerals, stars and hashes as signs, some words misspelt ('fourtieth')",
        "17 recordings hold tones, silence or monkeys (`load_recordings` leaves them out)",
    ),
    n_bytes=24_493_106,
    splits="none: for testing only",
)


def load_recordings(sounds: Path = SOUNDS, transcripts: Path = TRANSCRIPTS) -> dict[str, Utterance]:
    """The recordings of people's words, by name ("digits/7", "vm-goodbye"), `TELEPHONE_RATE` samples a second.

    Numerals are written out digit by digit, as they are read, and `*` and `#` as star and pound.

    Raises:
        DataError: where the package is not installed or is another version, and where its transcripts were left out.
    """
    _require_recordings(sounds)
    if not transcripts.is_file():
        raise DataError(
            f"{transcripts} is missing: this system installs packages without documentation; run `apt-get install --reinstall -o "
            f"Dpkg::Options::=--path-include={transcripts.parent}/* asterisk-core-sounds-en`"
        )
    check_sha256(transcripts, RECORDINGS.sha256[transcripts.name])
    paths = sorted(sounds.rglob("*.wav"))
    _check_together(paths, "all recordings, by name, joined")
    lines = gzip.decompress(transcripts.read_bytes()).decode().splitlines()
    texts = dict(re.match(r"([^;:]+):(.*)", line).groups() for line in lines if re.match(r"[^;:]+:", line))
    found = {path.relative_to(sounds).with_suffix("").as_posix(): path for path in paths}
    spoken = {name: (path, spell_out(texts[name])) for name, path in found.items() if name in texts}
    return {name: Utterance(_read_wav(path), text, "Allison Smith") for name, (path, text) in spoken.items() if text}


def load_number_words(sounds: Path = SOUNDS) -> dict[str, np.ndarray]:
    """The recordings of `NUMBER_WORDS`, by word, `TELEPHONE_RATE` samples a second; needs no transcripts.

    Raises:
        DataError: where the package is not installed or is another version.
    """
    _require_recordings(sounds)
    names = [*range(20), *range(20, 100, 10), "hundred"]  # in the order of NUMBER_WORDS
    paths = [sounds / "digits" / f"{name}.wav" for name in names]
    _check_together(paths, "number words, joined")
    return {word: _read_wav(path) for word, path in zip(NUMBER_WORDS, paths)}


def spell_out(transcript: str) -> str:
    """Small letters, apostrophes and spaces; numerals digit by digit; remarks in brackets dropped.

    >>> spell_out("Press 1 to start, or * to exit. (simple tone)")
    'press one to start or star to exit'
    """
    text = re.sub(r"\[.*?\]|<.*?>|\(.*?\)", " ", transcript).replace("*", " star ").replace("#", " pound ")
    text = re.sub(r"\d", lambda digit: f" {ONES[int(digit[0])]} ", text)
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


def _require_recordings(sounds: Path) -> None:
    if not sounds.is_dir():
        raise DataError(
            "the recordings come with a package of Debian and Ubuntu: install it with `apt install asterisk-core-sounds-en-wav`"
        )


def _check_together(paths: Sequence[Path], name: str) -> None:
    """Refuse files whose contents, joined, have not the sha256 that the card gives under this name."""
    joined = hashlib.sha256(b"".join(path.read_bytes() for path in paths if path.is_file())).hexdigest()
    expected = RECORDINGS.sha256[name]
    if joined != expected:
        raise DataError(
            f"{name}: sha256 {joined}, the card says {expected}: another version of asterisk-core-sounds-en-wav than 1.6.1-1, "
            "or a damaged one; reinstall it"
        )


def _read_wav(path: Path) -> np.ndarray:
    rate, samples = wavfile.read(path)
    if rate != TELEPHONE_RATE or samples.dtype != np.int16:
        raise DataError(f"{path} has {rate} samples a second of type {samples.dtype}: expected {TELEPHONE_RATE} and int16")
    return samples.astype(np.float32) / 2**15


def read_librispeech(table: pd.DataFrame, sample_rate: int = 16_000) -> list[Utterance]:
    """Read speech as utterances.

    Args:
        table: rows of `downloads.list_librispeech`.
        sample_rate: samples a second; the files have 16,000.

    Raises:
        DataError: where soundfile, which reads FLAC, is not installed.
    """
    if importlib.util.find_spec("soundfile") is None:
        raise DataError("reading FLAC files needs a package: install it with `pip install soundfile`")
    import soundfile

    files = [soundfile.read(path, dtype="float32") for path in table.path]
    waves = [resample(wave, rate, sample_rate) for wave, rate in files]
    return [Utterance(wave, text.lower(), str(speaker)) for wave, text, speaker in zip(waves, table.text, table.speaker)]


@dataclass(frozen=True)
class LogMelConfig:
    """How sound becomes frames: the usual 25 ms windows every 10 ms."""

    sample_rate: int = SAMPLE_RATE  # samples a second
    window_s: float = 0.025  # of sound in a frame
    hop_s: float = 0.010  # from one frame to the next
    n_mels: int = 40  # frequency bands a frame
    floor: float = 1e-6  # added to the energies, so that silence has a logarithm

    @property
    def n_window(self) -> int:
        """Samples of a window."""
        return round(self.sample_rate * self.window_s)

    @property
    def n_hop(self) -> int:
        """Samples from one window to the next."""
        return round(self.sample_rate * self.hop_s)

    def count_frames(self, n_samples: int) -> int:
        """Whole windows that fit into a waveform."""
        return max(0, (n_samples - self.n_window) // self.n_hop + 1)


def mel(frequency_hz: Tensor) -> Tensor:
    """Frequencies in mel, 2595 log10(1 + f / 700): equal steps sound about equally far apart (O'Shaughnessy 1987)."""
    return 2595 * torch.log10(1 + frequency_hz / 700)


def mel_filters(config: LogMelConfig = LogMelConfig()) -> Tensor:
    """Triangles of height 1, equally wide in mel, over the frequencies of a window's Fourier transform.

    Returns:
        (n_window // 2 + 1, n_mels).
    """
    frequencies = torch.linspace(0, config.sample_rate / 2, config.n_window // 2 + 1, dtype=torch.float64)
    top = 2595 * math.log10(1 + config.sample_rate / 2 / 700)
    corners_hz = 700 * (10 ** (torch.linspace(0, top, config.n_mels + 2, dtype=torch.float64) / 2595) - 1)
    left, middle, right = corners_hz[:-2], corners_hz[1:-1], corners_hz[2:]  # (n_mels)
    rising = (frequencies[:, None] - left) / (middle - left)
    falling = (right - frequencies[:, None]) / (right - middle)
    return torch.minimum(rising, falling).clamp(min=0).float()


def power_spectrogram(waveform: np.ndarray | Tensor, config: LogMelConfig = LogMelConfig()) -> Tensor:
    """Energy at each frequency of each window: Hann windows, the last incomplete one left out.

    Args:
        waveform: (n_samples,), at least one window long.

    Returns:
        (n_frames, n_window // 2 + 1) float32; the frequencies are 0 to half the sample rate.

    Raises:
        ValueError: for a waveform of another shape, or shorter than a window.
    """
    waveform = torch.as_tensor(waveform, dtype=torch.float32)
    if waveform.ndim != 1 or len(waveform) < config.n_window:
        raise ValueError(f"expected {config.n_window} samples or more in one row, got shape {tuple(waveform.shape)}")
    windows = waveform.unfold(0, config.n_window, config.n_hop) * torch.hann_window(config.n_window)  # (T, n_window)
    return torch.fft.rfft(windows).abs().square()


def log_mel(waveform: np.ndarray | Tensor, config: LogMelConfig = LogMelConfig()) -> Tensor:
    """Logarithm of the energy in each mel band of each window.

    Args:
        waveform: as for `power_spectrogram`.

    Returns:
        (n_frames, n_mels) float32.
    """
    return torch.log(power_spectrogram(waveform, config) @ mel_filters(config) + config.floor)


def cosines(n_bands: int, n_coefficients: int) -> Tensor:
    """The first rows of the orthonormal discrete cosine transform (type II), as columns: (n_bands, n_coefficients)."""
    bands = torch.arange(n_bands, dtype=torch.float64)
    orders = torch.arange(n_coefficients, dtype=torch.float64)
    waves = torch.cos(math.pi / n_bands * (bands[:, None] + 0.5) * orders) * math.sqrt(2 / n_bands)
    waves[:, 0] /= math.sqrt(2)
    return waves.float()


def mfcc(waveform: np.ndarray | Tensor, config: LogMelConfig = LogMelConfig(), n_coefficients: int = 13) -> Tensor:
    """Mel-frequency cepstral coefficients (Davis and Mermelstein 1980, https://doi.org/10.1109/TASSP.1980.1163420).

    The cosine transform of a frame's log-mel energies: the first coefficients are the spectrum's broad shape.

    Returns:
        (n_frames, n_coefficients).
    """
    return log_mel(waveform, config) @ cosines(config.n_mels, n_coefficients)


def features(waveform: np.ndarray, config: LogMelConfig) -> Tensor:
    """Log-mel energies without what loudness and channel add: the loudest sample is 1, each band has mean 0 over the recording,
    and all together have variance 1.

    Returns:
        (n_frames, n_mels).
    """
    frames = log_mel(waveform / max(float(np.abs(waveform).max()), 1e-6), config)
    frames = frames - frames.mean(dim=0)
    return frames / frames.square().mean().sqrt().clamp(min=1e-6)


def mix(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add noise, so loud that the speech has 10^(snr_db / 10) times its energy.

    Args:
        waveform: (n_samples,).
        noise: (n_samples or more,); the rest is cut off.
    """
    noise = noise[: len(waveform)]
    scale = np.sqrt(np.square(waveform).mean() / np.square(noise).mean() / 10 ** (snr_db / 10))
    return (waveform + scale * noise).astype(np.float32)


LETTERS = " 'abcdefghijklmnopqrstuvwxyz"  # labels 1 to 28; 0 is CTC's blank


def encode(text: str) -> list[int]:
    """Letters to labels.

    Raises:
        ValueError: for a character that is not one of `LETTERS`.
    """
    unknown = sorted(set(text) - set(LETTERS))
    if unknown:
        raise ValueError(f"{text[:40]!r} has characters that are no labels: {' '.join(unknown)}; `spell_out` helps")
    return [LETTERS.index(letter) + 1 for letter in text]


def decode(labels: Iterable[int]) -> str:
    """Labels to letters."""
    return "".join(LETTERS[label - 1] for label in labels)


def fits(utterance: Utterance, config: LogMelConfig, max_frames: int) -> bool:
    """Whether an utterance has at most `max_frames` frames, and enough for CTC to write its letters one a frame."""
    labels = encode(utterance.text)
    n_needed = len(labels) + sum(a == b for a, b in pairwise(labels))  # a blank between equal letters
    return n_needed <= config.count_frames(len(utterance.waveform)) <= max_frames


def to_tensors(utterances: Sequence[Utterance], config: LogMelConfig, max_frames: int | None = None) -> Split:
    """What a network reads and what it is to write, padded to one length.

    Args:
        utterances: each one that `fits`.
        config: of the frames.
        max_frames: to pad to; None: the longest of these.

    Returns:
        a split with x = (frames (N, T, n_mels), their numbers (N,)) and y = (labels (N, S), their numbers (N,), numbers of
        frames (N,)), as `ctc.loss` expects.

    Raises:
        ValueError: for an utterance that does not fit.
    """
    frames = [features(utterance.waveform, config) for utterance in utterances]
    max_frames = max_frames or max(map(len, frames))
    for utterance in utterances:
        if not fits(utterance, config, max_frames):
            n_frames = config.count_frames(len(utterance.waveform))
            raise ValueError(
                f"{utterance.text[:40]!r} has {n_frames} frames, too few for its letters or more than {max_frames}"
            )
    labels = [torch.tensor(encode(utterance.text)) for utterance in utterances]
    n_frames, n_labels = (torch.tensor([len(row) for row in rows]) for rows in (frames, labels))
    x = pad_sequence([F.pad(frames[0], (0, 0, 0, max_frames - len(frames[0]))), *frames[1:]], batch_first=True)
    return Split((x, n_frames), (pad_sequence(labels, batch_first=True), n_labels, n_frames))


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """The fewest insertions, deletions and substitutions that make one text the other (Levenshtein distance).

    Args:
        reference: what was said: words, or letters.
        hypothesis: what was heard.

    Returns:
        pairs (said, heard) in order; (None, b) is an insertion, (a, None) a deletion.
    """
    n, m = len(reference), len(hypothesis)
    cost = [[max(i, j) if 0 in (i, j) else 0 for j in range(m + 1)] for i in range(n + 1)]
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            replaced = cost[i - 1][j - 1] + (reference[i - 1] != hypothesis[j - 1])
            cost[i][j] = min(replaced, cost[i - 1][j] + 1, cost[i][j - 1] + 1)
    pairs, i, j = [], n, m
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (reference[i - 1] != hypothesis[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((reference[i], hypothesis[j]))
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            pairs.append((reference[i], None))
        else:
            j -= 1
            pairs.append((None, hypothesis[j]))
    return pairs[::-1]


def count_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Insertions, deletions and substitutions."""
    return sum(said != heard for said, heard in align(reference, hypothesis))


class ErrorRate(NamedTuple):
    """Errors for each word (or letter) that was said, and its interval."""

    rate: float  # may exceed 1: insertions count
    low: float  # 2.5 % quantile of the bootstrap
    high: float  # 97.5 % quantile

    def __str__(self) -> str:
        return f"{self.rate:.0%} ({self.low:.0%} to {self.high:.0%})"


def error_rate(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    unit: str = "word",
    groups: Sequence[str] | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> ErrorRate:
    """Word or character error rate of many texts together: all errors over all words said.

    Args:
        references: what was said.
        hypotheses: what was heard, in the same order.
        unit: "word" (WER) or "letter" (CER).
        groups: of texts that belong together, such as the speakers; the bootstrap draws whole groups. None: each for itself.
        n_bootstrap: resamples for the interval.
        seed: of the resamples.

    Raises:
        ValueError: for texts that are not equally many, or no words said.
    """
    split = str.split if unit == "word" else list
    if len(references) != len(hypotheses) or not any(map(split, references)):
        raise ValueError(f"needs as many texts heard as said, and words in them, got {len(hypotheses)} and {len(references)}")
    counts = np.array(
        [(count_errors(split(said), split(heard)), len(split(said))) for said, heard in zip(references, hypotheses)]
    )
    _, group = np.unique(range(len(references)) if groups is None else groups, return_inverse=True)
    sums = np.zeros((group.max() + 1, 2))
    np.add.at(sums, group, counts)
    drawn = sums[np.random.default_rng(seed).integers(len(sums), size=(n_bootstrap, len(sums)))].sum(axis=1)  # (n_bootstrap, 2)
    low, high = np.quantile(drawn[:, 0] / np.maximum(drawn[:, 1], 1), [0.025, 0.975])
    return ErrorRate(counts[:, 0].sum() / counts[:, 1].sum(), float(low), float(high))


@dataclass(frozen=True)
class Players:
    """Sounds to listen to in a notebook or a web page; in print, a list of them."""

    sounds: Mapping[str, np.ndarray]  # a caption for each waveform
    sample_rate: int = TELEPHONE_RATE

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        rows = "".join(
            f'<tr><td>{html.escape(caption)}</td><td><audio controls aria-label="{html.escape(caption)}" '
            f'src="data:audio/wav;base64,{base64.b64encode(to_wav(wave, self.sample_rate)).decode()}"></audio></td></tr>'
            for caption, wave in self.sounds.items()
        )
        listed = [f"{caption} ({len(wave) / self.sample_rate:.1f} s)" for caption, wave in self.sounds.items()]
        return {
            "text/html": f"<table><tbody>{rows}</tbody></table>",
            "text/markdown": "To listen to, in the notebook or on the web page: " + "; ".join(listed) + ".",
            "text/plain": "\n".join(listed),
        }


def to_wav(waveform: np.ndarray, sample_rate: int) -> bytes:
    """A WAV file of 16-bit samples, the loudest at nine tenths of what fits."""
    scaled = waveform * (0.9 * 32_767 / max(float(np.abs(waveform).max()), 1e-6))
    file = io.BytesIO()
    wavfile.write(file, sample_rate, scaled.round().astype(np.int16))
    return file.getvalue()
