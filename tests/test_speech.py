"""The synthesiser, the recordings, the features against two libraries and a literal sum, and the error rates against a third."""

import base64
import io
import math
import re
import shutil
import subprocess
import sys
import types
import warnings
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft, signal
from scipy.io import wavfile

from bigmodel_utils import ctc, data, speech

FEW = settings(deadline=None, max_examples=40)
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

    def test_no_two_voices_are_nearly_the_same(self):
        import espeakng_loader

        def definition(voice: str) -> set[str]:
            text = (Path(espeakng_loader.get_data_path()) / "voices/!v" / voice.split("+")[1]).read_text(errors="replace")
            lines = {" ".join(line.partition("//")[0].split()) for line in text.splitlines()}
            return {line for line in lines if line and line.split()[0] not in ("name", "language", "gender", "variant")}

        definitions = [definition(voice) for voice in speech.VOICES]
        assert max(len(a & b) / len(a | b) for a, b in combinations(definitions, 2)) <= 0.5
        assert len(definitions) == len(set(speech.VOICES)) == 57

    def test_texts_are_said_in_voices_drawn_by_the_seed(self):
        texts = ["one hundred", "seven"] * 10
        drawn = [[u[1:] for u in speech.speak(texts, speech.VOICES[:4], seed)] for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert [text for text, _ in drawn[0]] == texts and {voice for _, voice in drawn[0]} == set(speech.VOICES[:4])

    def test_word_by_word_is_longer_and_rates_change_the_number_of_samples_only(self):
        def n_samples(**options) -> int:
            return sum(
                len(u.waveform) for u in speech.speak(["nine hundred ninety nine"] * 20, speech.VOICES[:1], 0, **options)
            )

        assert n_samples(word_by_word=1.0) > 1.3 * n_samples()
        assert n_samples(sample_rate=16_000) == pytest.approx(2 * n_samples(), rel=0.02)


@pytest.fixture(scope="module")
def torchaudio():
    """The library without its compiled parts, which may not fit this torch; gone again afterwards."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = types.SimpleNamespace(_IS_TORCHAUDIO_EXT_AVAILABLE=False, fail_if_no_align=lambda function: function)
        patch.setitem(sys.modules, "torchaudio._extension", parts)
        yield pytest.importorskip("torchaudio.transforms")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            patch.delitem(sys.modules, name)


def draw_wave(n_samples: int = 8000, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).normal(size=n_samples)).astype(np.float32)


@pytest.mark.parametrize("rate, n_mels, hop_s", [(8000, 20, 0.01), (16_000, 40, 0.0125), (22_050, 40, 0.02)])
def test_features_equal_torchaudios(torchaudio, rate, n_mels, hop_s):
    config = speech.LogMelConfig(rate, hop_s=hop_s, n_mels=n_mels)
    options = {"n_fft": config.n_window, "hop_length": config.n_hop, "center": False}
    wave = torch.from_numpy(draw_wave())
    theirs = torchaudio.Spectrogram(**options)(wave).T
    torch.testing.assert_close(speech.power_spectrogram(wave, config), theirs, rtol=1e-4, atol=1e-5)
    theirs = torchaudio.MelSpectrogram(rate, n_mels=n_mels, **options)(wave).T
    torch.testing.assert_close(speech.log_mel(wave, config), torch.log(theirs + 1e-6), rtol=1e-4, atol=2e-4)
    theirs = torchaudio.MFCC(rate, 13, log_mels=True, melkwargs={"n_mels": n_mels, **options})(wave).T
    torch.testing.assert_close(speech.mfcc(wave, config, 13), theirs, rtol=1e-3, atol=1e-3)


def test_spectrogram_equals_scipys():
    wave = draw_wave()
    window = signal.get_window("hann", CONFIG.n_window)
    overlap = CONFIG.n_window - CONFIG.n_hop
    _, _, theirs = signal.spectrogram(
        wave, 8000, window, CONFIG.n_window, overlap, detrend=False, scaling="spectrum", mode="magnitude"
    )
    ours = speech.power_spectrogram(wave, CONFIG).sqrt().T.numpy()
    np.testing.assert_allclose(ours, theirs * window.sum(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_bands, n_coefficients", [(20, 20), (40, 13), (1, 1)])
def test_cosine_transform_equals_scipys(n_bands, n_coefficients):
    x = draw_wave(n_bands)
    theirs = fft.dct(x, type=2, norm="ortho")[:n_coefficients]
    np.testing.assert_allclose(x @ speech.cosines(n_bands, n_coefficients).numpy(), theirs, rtol=1e-4, atol=1e-6)


@given(st.integers(0, 30_000))
def test_frames_are_counted_as_made(n_samples):
    n_frames = CONFIG.count_frames(n_samples)
    starts = [k * CONFIG.n_hop for k in range(500) if k * CONFIG.n_hop + CONFIG.n_window <= n_samples]
    assert n_frames == len(starts)
    if n_frames:
        assert len(speech.power_spectrogram(np.zeros(n_samples, np.float32), CONFIG)) == n_frames


def test_features_forget_loudness_and_channel():
    wave, config = tone(500) * np.linspace(0, 1, 4000, dtype=np.float32) + draw_wave(4000), speech.LogMelConfig(8000, n_mels=20)
    frames = speech.features(wave, config)
    assert frames.mean(dim=0).abs().max() < 1e-5 and frames.square().mean().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(speech.features(0.01 * wave, config), frames, atol=1e-3, rtol=1e-3)
    filtered = signal.lfilter([1, -0.9], [1], wave).astype(np.float32)  # a channel that makes the treble louder
    raw = [speech.log_mel(each, config) for each in (wave, filtered)]
    assert (speech.features(filtered, config) - frames).abs().mean() < 0.1 * (raw[1] - raw[0]).abs().mean()
    assert torch.isfinite(speech.features(np.zeros(4000, np.float32), config)).all()


@given(st.floats(-20, 40), st.integers(0, 100))
def test_mixing_gives_the_ratio_of_energies(snr_db, seed):
    wave, noise = draw_wave(500, seed), draw_wave(700, seed + 1)
    added = speech.mix(wave, noise, snr_db).astype(np.float64) - wave
    assert 10 * math.log10(np.square(wave).mean() / np.square(added).mean()) == pytest.approx(snr_db, abs=1e-2)
    assert np.corrcoef(added, noise[:500])[0, 1] > 0.999


def test_resampling_equals_scipys_and_keeps_what_fits():
    wave = draw_wave(4000)
    np.testing.assert_allclose(speech.resample(wave, 22_050, 8000), signal.resample_poly(wave, 160, 441), rtol=1e-4, atol=1e-6)
    assert speech.resample(wave, 8000, 8000) is wave
    for frequency, remains in ((1000, 1.0), (3500, 0.0)):
        middle = speech.resample(tone(frequency), 8000, 6000)[500:-500]
        expected = np.sin(2 * math.pi * frequency * np.arange(500, 500 + len(middle)) / 6000)
        np.testing.assert_allclose(middle, remains * expected, atol=0.02)


def test_variations_last_four_fifths_to_six_fifths():
    said = [speech.Utterance(tone(500), "one", "x")] * 60
    varied = speech.vary(said, seed=0)
    ratios = {round(len(u.waveform) / 4000 * 16) for u in varied}
    assert ratios == set(range(13, 20)) and all(u[1:] == ("one", "x") for u in varied)
    spectra = [np.abs(fft.rfft(u.waveform)) for u in varied]
    heard = {round(spectrum.argmax() / len(u.waveform) * 8000 * len(u.waveform) / 4000) for spectrum, u in zip(spectra, varied)}
    assert heard == {500}  # as many waves as before, faster or slower
    again = speech.vary(said, seed=0)
    assert all(np.array_equal(a.waveform, b.waveform) for a, b in zip(varied, again))


def test_trimming_keeps_from_the_first_to_the_last_loud_sample():
    assert speech.trim(np.array([0, 0.01, 1, 0, -0.5, 0.01, 0])).tolist() == [1, 0, -0.5]


def test_number_names_say_their_number():
    value = {word: number for number, word in enumerate(speech.ONES)} | {word: 10 * k for k, word in enumerate(speech.TENS, 2)}
    for number in range(1000):
        *hundreds, rest = re.split(r" ?hundred ?", speech.number_in_words(number))
        assert sum(100 * value[word] for word in hundreds) + sum(value[word] for word in rest.split()) == number
    assert speech.number_in_words(243) == "two hundred forty three"
    for number in (-1, 1000):
        with pytest.raises(ValueError, match="0 to 999"):
            speech.number_in_words(number)


@given(st.text(speech.LETTERS))
def test_letters_come_back(text):
    labels = speech.encode(text)
    assert speech.decode(labels) == text and all(1 <= label <= 28 for label in labels)


def test_letters_that_are_none():
    with pytest.raises(ValueError, match="no labels: 2 A"):
        speech.encode("A2a")


def test_tensors_are_what_the_loss_expects():
    said = [speech.Utterance(draw_wave(n), text, "x") for n, text in ((4000, "ab"), (6000, "see"), (2000, ""))]
    part = speech.to_tensors(said, CONFIG, max_frames=80)
    (frames, n_frames), (labels, n_labels, n_frames_again) = part.x, part.y
    assert frames.shape == (3, 80, 20) and labels.tolist() == [[3, 4, 0], [21, 7, 7], [0, 0, 0]]
    assert n_frames.tolist() == n_frames_again.tolist() == [48, 73, 23] and n_labels.tolist() == [2, 3, 0]
    torch.testing.assert_close(frames[0, :48], speech.features(said[0].waveform, CONFIG))
    assert frames[0, 48:].abs().max() == 0
    assert torch.isfinite(ctc.loss(torch.zeros(2, 80, 29).log_softmax(dim=-1), tuple(values[:2] for values in part.y)))
    assert speech.to_tensors(said, CONFIG).x[0].shape[1] == 73


@pytest.mark.parametrize(
    "n_samples, text, fit", [(360, "abc", True), (360, "aab", False), (279, "ab", False), (1000, "a", False)]
)
def test_what_has_too_few_or_too_many_frames_does_not_fit(n_samples, text, fit):
    utterance = speech.Utterance(draw_wave(n_samples), text, "x")
    assert speech.fits(utterance, CONFIG, max_frames=10) == fit
    if not fit:
        with pytest.raises(ValueError, match=f"{text!r} has .* frames"):
            speech.to_tensors([utterance], CONFIG, max_frames=10)


WORDS = st.lists(st.sampled_from("ab"), max_size=6)
TEXTS = st.lists(st.tuples(WORDS.filter(bool), WORDS), min_size=1, max_size=6)


@given(WORDS, WORDS)
def test_alignments_are_complete_and_shortest(said, heard):
    pairs = speech.align(said, heard)
    assert [a for a, _ in pairs if a is not None] == said and [b for _, b in pairs if b is not None] == heard
    assert (None, None) not in pairs

    def fewest(i: int, j: int) -> int:
        if min(i, j) == 0:
            return max(i, j)
        return min(fewest(i - 1, j) + 1, fewest(i, j - 1) + 1, fewest(i - 1, j - 1) + (said[i - 1] != heard[j - 1]))

    assert speech.count_errors(said, heard) == fewest(len(said), len(heard))


@FEW
@given(TEXTS)
def test_error_rates_equal_jiwers(texts):
    jiwer = pytest.importorskip("jiwer")
    said, heard = ([" ".join(words) for words in side] for side in zip(*texts))
    assert speech.error_rate(said, heard, n_bootstrap=2).rate == pytest.approx(jiwer.wer(said, heard))
    assert speech.error_rate(said, heard, unit="letter", n_bootstrap=2).rate == pytest.approx(jiwer.cer(said, heard))


def test_intervals_cover_what_they_should():
    generator = np.random.default_rng(0)
    said = ["a"] * 400
    heard = ["b" if wrong else "a" for wrong in generator.random(400) < 0.3]
    result = speech.error_rate(said, heard)
    half = 1.96 * math.sqrt(result.rate * (1 - result.rate) / 400)
    assert result.high - result.rate == pytest.approx(half, rel=0.2) == result.rate - result.low
    speakers = [str(k // 100) for k in range(400)]
    bad_speaker = ["b" if speaker == "0" else "a" for speaker in speakers]
    assert speech.error_rate(said, bad_speaker, groups=speakers)[1:] == (0, 0.75)
    assert speech.error_rate(said, heard, groups=["one"] * 400) == (result.rate,) * 3
    assert str(speech.ErrorRate(0.054, 0.0, 1.12)) == "5% (0% to 112%)"


@pytest.mark.parametrize("said, heard", [(["a"], []), ([], []), (["", " "], ["a", "b"])])
def test_error_rates_of_nothing_are_refused(said, heard):
    with pytest.raises(ValueError, match="as many texts heard as said"):
        speech.error_rate(said, heard)


def test_players_hold_the_sound_and_name_it():
    wave = draw_wave(800)
    shown = speech.Players({"a <b>": wave, "two": 0 * wave})._repr_mimebundle_()
    first, second = (base64.b64decode(code) for code in re.findall(r"base64,([^\"]+)", shown["text/html"]))
    rate, samples = wavfile.read(io.BytesIO(first))
    assert rate == 8000 and samples.dtype == np.int16 and np.abs(samples).max() == round(0.9 * 32_767)
    np.testing.assert_allclose(samples / np.abs(samples).max(), wave / np.abs(wave).max(), atol=1e-4)
    assert not wavfile.read(io.BytesIO(second))[1].any() and "a &lt;b&gt;" in shown["text/html"]
    assert "a <b> (0.1 s); two (0.1 s)." in shown["text/markdown"] and shown["text/plain"] == "a <b> (0.1 s)\ntwo (0.1 s)"


@pytest.mark.parametrize(
    "transcript, text",
    [
        ("Press 12, or * / #.", "press one two or star pound"),
        ("o'clock", "o'clock"),
        ("[beep]", ""),
        ("(1 second of silence)", ""),
        ("<beep ascending>", ""),
        ("at [@]", "at"),
    ],
)
def test_transcripts_are_spelt_out(transcript, text):
    assert speech.spell_out(transcript) == text


class TestRecordings:
    """Where the package of recordings is installed."""

    @pytest.fixture(autouse=True)
    def installed(self):
        if not speech.SOUNDS.is_dir():
            pytest.skip("asterisk-core-sounds-en-wav is not installed")

    def test_number_words_are_the_recordings_of_that_name(self):
        words = speech.load_number_words()
        assert tuple(words) == speech.NUMBER_WORDS
        assert all(wave.dtype == np.float32 and 0.3 < len(wave) / 8000 < 1.5 for wave in words.values())
        if speech.TRANSCRIPTS.is_file():
            recordings = speech.load_recordings().values()
            assert all(
                any(u.text == word and np.array_equal(u.waveform, wave) for u in recordings) for word, wave in words.items()
            )

    def test_all_recordings_have_words_that_can_be_spelt(self):
        if not speech.TRANSCRIPTS.is_file():
            pytest.skip("the package's documentation is not installed")
        recordings = speech.load_recordings()
        assert len(recordings) == speech.RECORDINGS.n_rows["with words"]
        assert recordings["vm-goodbye"].text == "goodbye" and recordings["digits/7"].text == "seven"
        assert "tt-monkeys" not in recordings and "beep" not in recordings
        assert all(speech.encode(utterance.text) for utterance in recordings.values())

    def test_another_version_is_refused(self, tmp_path):
        copied = tmp_path / speech.SOUNDS.name
        shutil.copytree(speech.SOUNDS / "digits", copied / "digits")
        path = copied / "digits" / "7.wav"
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(data.DataError, match="another version"):
            speech.load_number_words(copied)
        path.unlink()
        with pytest.raises(data.DataError, match="another version"):
            speech.load_number_words(copied)

    def test_an_empty_folder_is_refused(self, tmp_path):
        if speech.TRANSCRIPTS.is_file():
            with pytest.raises(data.DataError, match="another version"):
                speech.load_recordings(tmp_path)

    def test_missing_transcripts_are_explained(self, tmp_path):
        with pytest.raises(data.DataError, match="path-include"):
            speech.load_recordings(transcripts=tmp_path / "none.txt.gz")


def test_without_recordings_the_error_says_what_to_install(tmp_path):
    for load in (speech.load_recordings, speech.load_number_words):
        with pytest.raises(data.DataError, match="apt install asterisk-core-sounds-en-wav"):
            load(tmp_path / "nothing")


def test_wav_files_of_another_kind_are_refused(tmp_path):
    wavfile.write(tmp_path / "x.wav", 16_000, np.zeros(10, np.int16))
    with pytest.raises(data.DataError, match="expected 8000 and int16"):
        speech._read_wav(tmp_path / "x.wav")


def test_read_speech_becomes_utterances(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    wave = draw_wave(16_000)
    soundfile.write(tmp_path / "1.flac", wave, 16_000)
    table = pd.DataFrame({"path": [tmp_path / "1.flac"], "speaker": [84], "text": ["IT'S ONE"]})
    [read] = speech.read_librispeech(table)
    assert read[1:] == ("it's one", "84")
    np.testing.assert_allclose(read.waveform, wave, atol=1e-4)
    assert len(speech.read_librispeech(table, 8000)[0].waveform) == 8000
