"""The synthesiser and the log-mel features."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from bigmodel_utils import speech

CONFIG = speech.LogMelConfig(sample_rate=8000, n_mels=20)


def tone(frequency_hz: float, seconds: float = 0.5) -> np.ndarray:
    """A sine at 8000 samples a second."""
    return np.sin(2 * math.pi * frequency_hz * np.arange(round(8000 * seconds)) / 8000).astype(np.float32)


def test_frames_equal_a_slow_transform():
    """A literal sum over samples, frequencies and triangles, in float64, for two frames."""
    wave = tone(700) + 0.3 * tone(1900)
    n, hop = CONFIG.n_window, CONFIG.n_hop
    window = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(n) / n)
    corners = [700 * (10 ** (k * 2595 * math.log10(1 + 4000 / 700) / 21 / 2595) - 1) for k in range(22)]
    frames = speech.log_mel(wave, CONFIG)
    for t in (0, 7):
        piece = wave[t * hop : t * hop + n].astype(np.float64) * window
        power = [abs(sum(piece * np.exp(-2j * math.pi * k * np.arange(n) / n))) ** 2 for k in range(n // 2 + 1)]
        for band in range(CONFIG.n_mels):
            left, middle, right = corners[band : band + 3]
            energy = 0.0
            for k, p in enumerate(power):
                f = k * 8000 / n
                energy += p * max(0.0, min((f - left) / (middle - left), (right - f) / (right - middle)))
            assert abs(frames[t, band].item() - math.log(energy + CONFIG.floor)) < 5e-3


def test_a_tone_is_loudest_in_its_band():
    corners = torch.linspace(0, speech.mel(torch.tensor(4000.0)).item(), 22)
    for frequency in (300, 1000, 2500):
        band = speech.log_mel(tone(frequency), CONFIG).mean(dim=0).argmax().item()
        assert corners[band] < speech.mel(torch.tensor(float(frequency))) < corners[band + 2]


def test_the_filters_cover_every_frequency_once():
    """Neighbouring triangles add up to one between the first and the last middle."""
    filters = speech.mel_filters(speech.LogMelConfig(n_mels=8))
    sums = filters.sum(dim=1)
    inside = slice(int(filters[:, 0].argmax()) + 1, int(filters[:, -1].argmax()))
    assert torch.allclose(sums[inside], torch.ones_like(sums[inside]), atol=1e-5)


def test_number_of_frames():
    assert len(speech.log_mel(np.zeros(CONFIG.n_window, np.float32), CONFIG)) == 1
    assert len(speech.log_mel(np.zeros(CONFIG.n_window + CONFIG.n_hop, np.float32), CONFIG)) == 2
    with pytest.raises(ValueError, match="samples"):
        speech.log_mel(np.zeros(CONFIG.n_window - 1, np.float32), CONFIG)


class TestSynthesis:
    """Where the synthesiser is installed."""

    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("espeakng_loader")

    def test_a_fresh_process_says_the_same(self):
        program = (
            "import hashlib; from bigmodel_utils import speech;"
            "print([hashlib.sha256(speech.synthesize(w, v).tobytes()).hexdigest() for w in ('one', 'two', 'one') for v in ('en', 'en+f2')])"
        )
        said = {
            subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout for _ in "ab"
        }
        assert len(said) == 1

    def test_repetitions_are_nearly_alike_and_other_words_are_not(self):
        first, second, other = (speech.synthesize(word) for word in ("seven", "seven", "three"))
        assert abs(len(first) - len(second)) < 0.01 * len(first) < 0.1 * abs(len(first) - len(other))
        assert first.dtype == np.float32 and 0.1 < np.abs(first).max() <= 1

    def test_speed_and_voice_change_it(self):
        slow, fast = (speech.synthesize("seventeen", words_per_minute=speed) for speed in (120, 240))
        assert len(slow) > 1.3 * len(fast)
        assert not np.array_equal(speech.synthesize("one", "en+m1")[:5000], speech.synthesize("one", "en+f2")[:5000])

    def test_errors_are_clear(self):
        with pytest.raises(ValueError, match="no voice"):
            speech.synthesize("one", "xx")
        with pytest.raises(ValueError, match="80 to 450"):
            speech.synthesize("one", words_per_minute=20)
        with pytest.raises(ValueError, match="a text"):
            speech.synthesize("")
