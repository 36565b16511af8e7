import pathlib
import wave

import numpy as np
import pytest

from data import sources, speech
from data.config import SourceConfig

RATE = 8000


def write(file: pathlib.Path, samples, *, rate=RATE, channels=1, width=2) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes(np.round(np.asarray(samples) * 32767).astype(f"<i{width}").tobytes())
    return file


def tone(frequency: float, seconds: float = 0.3, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


@pytest.fixture
def folder(tmp_path):
    """Forty clips of two labels, named as the free spoken digit dataset does."""
    draw = np.random.default_rng(0)
    for number in range(20):
        for label, frequency in (("low", 300), ("high", 2000)):
            sound = tone(frequency * draw.uniform(0.9, 1.1)) + draw.normal(0, 0.01, 2400)
            write(tmp_path / f"{label}_someone_{number}.wav", sound)
    return tmp_path


def test_a_file_is_read(tmp_path):
    samples = tone(440)
    clip = speech.read_wav(write(tmp_path / "a.wav", samples), label="a")
    assert (clip.rate, clip.label) == (RATE, "a")
    np.testing.assert_allclose(clip.samples, samples, atol=1e-4)


def test_channels_become_their_mean(tmp_path):
    file = write(tmp_path / "a.wav", np.stack([tone(440), np.zeros(2400)], axis=1), channels=2)
    np.testing.assert_allclose(speech.read_wav(file, label="a").samples, tone(440) / 2, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "label"),
    [("7_jackson_32.wav", "7"), ("yes/0a_nohash.wav", "yes"), ("go left/a.wav", "go-left"), ("alone.wav", "alone")],
)
def test_labels_are_names(name, label):
    assert speech.label_of(pathlib.Path("root", name), pathlib.Path("root")) == label


def test_the_loudest_filter_is_the_tone_s_own():
    size = round(speech.WINDOW * RATE)
    peaks = np.fft.rfftfreq(size, 1 / RATE)[speech.mel_filters(RATE, size).argmax(axis=1)]
    for frequency in (500, 1000, 3000):
        loudest = speech.log_mel(tone(frequency), rate=RATE).mean(axis=0).argmax()
        assert abs(peaks[loudest] - frequency) < 0.1 * frequency
    assert (np.diff(peaks) >= 0).all()


def test_a_frame_comes_every_ten_milliseconds():
    assert speech.log_mel(tone(440, 1.0), rate=RATE).shape == (98, 40)  # the last window begins 25 ms before the end
    assert speech.log_mel(tone(440, 0.001), rate=RATE).shape == (1, 40)
    assert np.isfinite(speech.log_mel(np.zeros(800), rate=RATE)).all()


def test_loudness_does_not_matter():
    sound = tone(440) + np.random.default_rng(0).normal(0, 0.1, 2400)
    np.testing.assert_allclose(speech.log_mel(sound, rate=RATE), speech.log_mel(sound / 8, rate=RATE), atol=1e-2)


def test_frames_are_stacked_whole():
    frames = np.arange(6.0).reshape(3, 2)
    assert speech.stacked(frames).tolist() == [[0, 1, 2, 3], [4, 5, 4, 5]]


def test_a_resonance_is_its_recursion():
    """D. H. Klatt's y[t] = a x[t] + b y[t-1] + c y[t-2], up to the gain a."""
    sound, frequency, bandwidth = np.random.default_rng(0).normal(size=200), 500.0, 60.0
    c = -np.exp(-2 * np.pi * bandwidth / RATE)
    b = 2 * np.exp(-np.pi * bandwidth / RATE) * np.cos(2 * np.pi * frequency / RATE)
    slow = np.zeros(202)
    for t, x in enumerate(sound):
        slow[t + 2] = x + b * slow[t + 1] + c * slow[t]
    np.testing.assert_allclose(speech.resonance(sound, frequency, bandwidth), slow[2:], atol=1e-9)


def test_clips_become_documents(folder, monkeypatch):
    monkeypatch.setattr(speech, "NUM_CODES", 8)
    path = f"speech:{folder}"
    known = speech.load(path)
    assert known.labels == ["high", "low"]
    assert len(known.train) + len(known.apart) == 40
    assert 0 < len(known.apart) < 20
    documents = list(sources.read_documents(SourceConfig(path=path)))
    assert len(documents) == len(known.train)
    words = documents[0].text.split()
    assert (words[0], words[-2], words[-1]) == ("audio", "class", known.train[0][1])
    assert speech.WORDS.read(" ".join(words[1:-2])) == known.train[0][2]
    sounds = {
        label: {code for _, found, codes in known.train for code in codes if found == label} for label in known.labels
    }
    assert not sounds["low"] & sounds["high"]


def test_a_touched_file_is_seen(folder, monkeypatch):
    monkeypatch.setattr(speech, "NUM_CODES", 8)
    source = SourceConfig(path=f"speech:{folder}")
    before, known = sources.stat_fingerprint(source), speech.load(source.path)
    write(folder / "low_someone_0.wav", tone(300, 0.5))
    assert sources.stat_fingerprint(source) != before
    assert speech.load(source.path) != known


def test_files_in_the_root_keep_apart_what_their_names_say(folder, monkeypatch):
    monkeypatch.setattr(speech, "NUM_CODES", 8)
    before = {name for name, *_ in speech.load(f"speech:{folder}").apart}
    write(folder / "new_someone_1.wav", tone(700))
    after = {name for name, *_ in speech.load(f"speech:{folder}").apart}
    assert before == after - {"new_someone_1.wav"}


def test_what_is_no_sound_is_refused(tmp_path):
    def refused(message, *files):
        with pytest.raises(ValueError, match=message) as error:
            list(sources.read_documents(SourceConfig(path=f"speech:{tmp_path}")))
        assert "\n" not in str(error.value)
        for file in files:
            file.unlink()

    refused("holds no .wav file; give a folder of WAV files of 16-bit PCM")
    (tmp_path / "a.wav").write_bytes(b"not a wave")
    refused("a.wav is no WAV file of PCM: .*; convert it to 16-bit PCM", tmp_path / "a.wav")
    refused("a.wav has 32 bits a sample and 16 are read", write(tmp_path / "a.wav", [0.0] * 99, width=4))
    refused("a.wav holds no sound; leave it out", write(tmp_path / "a.wav", []))
    write(tmp_path / "a.wav", tone(440))
    write(tmp_path / "b.wav", tone(440, rate=16000), rate=16000)
    refused("b.wav has 16000 samples a second and .*a.wav has 8000; convert all clips to one rate")
    with pytest.raises(ValueError, match="nowhere is no folder; give one of WAV files, or speech:vowels"):
        sources.list_files(SourceConfig(path="speech:nowhere"))


def test_vowels_are_always_the_same(monkeypatch):
    monkeypatch.setattr(speech, "VOWELS_EACH", 2)
    first, again = list(speech.vowels()), list(speech.vowels())
    assert [clip.name for clip in first] == [f"{label}_{number}" for number in range(2) for label in speech.FORMANTS]
    assert all((one.samples == other.samples).all() for one, other in zip(first, again, strict=True))
    assert all(0.2 <= np.abs(clip.samples).max() < 1 for clip in first)
