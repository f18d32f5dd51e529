"""Speech made here: a synthesiser that comes as a package, and the log-mel features that speech models read."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bigmodel_utils.data import Card, DataError

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


def log_mel(waveform: np.ndarray | Tensor, config: LogMelConfig = LogMelConfig()) -> Tensor:
    """Logarithm of the energy in each mel band of each window (Hann windows, the last incomplete one left out).

    Args:
        waveform: (n_samples,), at least one window long.

    Returns:
        (n_frames, n_mels) float32.

    Raises:
        ValueError: for a waveform of another shape, or shorter than a window.
    """
    waveform = torch.as_tensor(waveform, dtype=torch.float32)
    if waveform.ndim != 1 or len(waveform) < config.n_window:
        raise ValueError(f"expected {config.n_window} samples or more in one row, got shape {tuple(waveform.shape)}")
    windows = waveform.unfold(0, config.n_window, config.n_hop) * torch.hann_window(config.n_window)  # (T, n_window)
    energy = torch.fft.rfft(windows).abs().square()  # (T, n_window // 2 + 1)
    return torch.log(energy @ mel_filters(config) + config.floor)
