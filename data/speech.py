"""Spoken words as words: sound becomes log-mel frames, and each 20 ms of them one code. Knows no tokens, no runs.

Clips are WAV files under a folder, labelled by their folder or by the name before the first `_` (7_jackson_32.wav says
7), or vowels made here. A quarter of them is kept apart: no document, no codebook is made of them.
"""

import functools
import hashlib
import pathlib
import wave
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from data import codebook
from data.labelled import Example, Words

PREFIX = "speech:"  # of data.path
VOWELS = "vowels"  # what stands after it for the clips made here
WINDOW, HOP = 0.025, 0.010  # seconds
NUM_MELS = 40
STACK = 2  # frames in one code
NUM_CODES = 128
KEPT_APART = 4  # one clip in so many
WORDS = Words("audio", "a")
VOWEL_RATE, VOWELS_EACH = 8000, 200  # samples a second, clips of each vowel
# What decides the documents, beside the sound.
RULES = (PREFIX, WINDOW, HOP, NUM_MELS, STACK, NUM_CODES, KEPT_APART, VOWEL_RATE, VOWELS_EACH)
# Hz of the first three formants of men: G. E. Peterson and H. L. Barney, J. Acoust. Soc. Am. 24(2), 1952, table II.
FORMANTS = {
    "heed": (270, 2290, 3010), "hid": (390, 1990, 2550), "head": (530, 1840, 2480), "had": (660, 1720, 2410),
    "hod": (730, 1090, 2440), "hawed": (570, 840, 2410), "hood": (440, 1020, 2240), "whod": (300, 870, 2240),
    "hud": (640, 1190, 2390), "heard": (490, 1350, 1690),
}  # fmt: skip


class Clip(NamedTuple):
    """A sound between -1 and 1, and what is said."""

    name: str
    label: str
    rate: int  # samples a second
    samples: Float64[np.ndarray, " samples"]


class Speech(NamedTuple):
    """Clips as codes: those to train on and those kept apart, each with its label."""

    train: list[tuple[str, str, list[int]]]  # name, label, codes
    apart: list[tuple[str, str, list[int]]]
    labels: list[str]  # all of them, sorted


def list_clips(path: str) -> list[pathlib.Path]:
    """The WAV files of data.path=speech:FOLDER, sorted; none where the clips are made."""
    folder = pathlib.Path(path.removeprefix(PREFIX))
    if path == PREFIX + VOWELS:
        return []
    if not folder.is_dir():
        raise ValueError(f"data.path={path}: {folder} is no folder; give one of WAV files, or {PREFIX}{VOWELS}")
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() == ".wav" and file.name[0] != ".")
    if not found:
        raise ValueError(f"data.path={path}: {folder} holds no .wav file; give a folder of WAV files of 16-bit PCM")
    return found


def read_wav(file: pathlib.Path, *, label: str) -> Clip:
    """A clip of 16-bit PCM; several channels become their mean."""
    try:
        with wave.open(str(file), "rb") as sound:
            channels, width, rate = sound.getnchannels(), sound.getsampwidth(), sound.getframerate()
            content = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{file} is no WAV file of PCM: {error or 'it is cut'}; convert it to 16-bit PCM") from None
    if width != 2:
        raise ValueError(f"{file} has {8 * width} bits a sample and 16 are read; convert it to 16-bit PCM")
    samples = np.frombuffer(content[: len(content) // (2 * channels) * 2 * channels], "<i2").astype(np.float64) / 32768
    if not len(samples):
        raise ValueError(f"{file} holds no sound; leave it out")
    return Clip(str(file), label, rate, samples.reshape(-1, channels).mean(axis=1))


def label_of(file: pathlib.Path, root: pathlib.Path) -> str:
    """What a file says: its folder's name, or where it lies in the root itself, its name up to the first `_`."""
    label = file.stem.split("_")[0] if file.parent == root else file.parent.name
    return "-".join(label.split()) or "-"


def load(path: str) -> Speech:
    """Every clip of a data.path as codes of one codebook, which the clips to train on alone decide."""
    files = list_clips(path)
    stats = [file.stat() for file in files]
    return _load(path, tuple(files), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


@functools.lru_cache(maxsize=1)
def _load(path: str, files: tuple[pathlib.Path, ...], stats: tuple[tuple[int, int], ...]) -> Speech:
    """The same, kept as long as the files stay as they are: a run reads its documents twice."""
    root = pathlib.Path(path.removeprefix(PREFIX))
    clips = [read_wav(file, label=label_of(file, root)) for file in files] if files else list(vowels())
    check_rates(clips)
    names = [str(file.relative_to(root)) for file in files] or [clip.name for clip in clips]
    frames = [stacked(log_mel(clip.samples, rate=clip.rate)) for clip in clips]
    is_apart = [kept_apart(name) for name in names]
    seen = [these for these, apart in zip(frames, is_apart, strict=True) if not apart]
    if len(seen) in (0, len(clips)):
        raise ValueError(f"data.path={path} has {len(clips)} clips, {len(seen)} of them to train on; give more of them")
    centres = codebook.fit(np.concatenate(seen), size=NUM_CODES)
    rows = [
        (name, clip.label, codebook.nearest(these, centres).tolist())
        for name, clip, these in zip(names, clips, frames, strict=True)
    ]
    return Speech(
        train=[row for row, apart in zip(rows, is_apart, strict=True) if not apart],
        apart=[row for row, apart in zip(rows, is_apart, strict=True) if apart],
        labels=sorted({clip.label for clip in clips}),
    )


def check_rates(clips: list[Clip]) -> None:
    """All clips have as many samples a second: what a code means depends on it."""
    for clip in clips:
        if clip.rate != clips[0].rate:
            raise ValueError(
                f"{clip.name} has {clip.rate} samples a second and {clips[0].name} has {clips[0].rate}; "
                "convert all clips to one rate"
            )


def kept_apart(name: str) -> bool:
    """Whether a clip is kept apart: its name alone says so, and no other clip's coming or going."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()[0] % KEPT_APART == 0


def log_mel(samples: Float64[np.ndarray, " samples"], *, rate: int) -> Float64[np.ndarray, "frames mels"]:
    """Log of the mel spectrum, around the clip's own mean: loudness and microphone are no part of a word."""
    size, hop = round(WINDOW * rate), round(HOP * rate)
    samples = np.pad(samples, (0, max(0, size - len(samples))))
    windows = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop]
    power = np.square(np.abs(np.fft.rfft(windows * np.hamming(size), axis=1)))
    logs = np.log(power @ mel_filters(rate, size).T + 1e-8)
    return logs - logs.mean(axis=0).mean()


@functools.lru_cache(maxsize=8)
def mel_filters(rate: int, size: int) -> Float64[np.ndarray, "mels bins"]:
    """Overlapping triangles, even on the mel scale, each of the same area.

    S. B. Davis and P. Mermelstein, IEEE Trans. ASSP 28(4), 1980, figure 1; mel(f) = 2595 log10(1 + f / 700) is of
    D. O'Shaughnessy, Speech Communication, 1987, p. 150; equal areas as in M. Slaney's Auditory Toolbox, 1998, p. 29.
    """
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, NUM_MELS + 2) / 2595) - 1)
    low, middle, high = (edges[i : i + NUM_MELS, None] for i in range(3))
    bins = np.fft.rfftfreq(size, 1 / rate)
    rise, fall = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low)


def stacked(frames: Float64[np.ndarray, "frames mels"]) -> Float64[np.ndarray, "vectors stacked"]:
    """Neighbouring frames as one vector; the last frame is repeated where one is missing."""
    whole = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % STACK, axis=0)])
    return whole.reshape(-1, STACK * frames.shape[1])


def examples(path: str) -> Iterator[Example]:
    """The documents of the clips to train on: "audio a3 … a90 class seven"."""
    for name, label, codes in load(path).train:
        yield Example(f"{path}:{name}", WORDS.labelled(codes, label))


def vowels() -> Iterator[Clip]:
    """Made vowels of many voices: a pulse train through one resonance for each formant, and noise.

    A voice is its pitch, its length of throat, which scales all formants, and 5 % of chance on each of them. The
    resonances are those of D. H. Klatt, J. Acoust. Soc. Am. 67(3), 1980, equation 2.
    """
    draw = np.random.default_rng(0)
    for number in range(VOWELS_EACH):
        for label, formants in FORMANTS.items():
            length, pitch, throat = draw.uniform(0.2, 0.4), draw.uniform(90, 250), draw.uniform(0.95, 1.2)
            sound = pulses(int(length * VOWEL_RATE), pitch)
            for formant, bandwidth in zip(formants, (60.0, 90.0, 120.0), strict=True):
                sound = resonance(sound, throat * formant * draw.normal(1, 0.05), bandwidth)
            sound = sound / np.abs(sound).max() * draw.uniform(0.2, 0.9)
            yield Clip(f"{label}_{number}", label, VOWEL_RATE, sound + draw.normal(0, 0.005, len(sound)))


def pulses(num_samples: int, pitch: float) -> Float64[np.ndarray, " samples"]:
    """A voice without a mouth: one pulse a period."""
    phase = np.floor(np.arange(num_samples) * pitch / VOWEL_RATE)
    return np.diff(phase, prepend=-1.0)


def resonance(
    samples: Float64[np.ndarray, " samples"], frequency: float, bandwidth: float
) -> Float64[np.ndarray, " samples"]:
    """y[t] = a x[t] + b y[t-1] + c y[t-2], as a convolution with what it makes of one pulse."""
    decay, turn = np.pi * bandwidth / VOWEL_RATE, 2 * np.pi * frequency / VOWEL_RATE
    t = np.arange(len(samples))
    answer = np.exp(-decay * t) * np.sin(turn * (t + 1)) / np.sin(turn)
    size = 2 * len(samples)
    return np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(answer, size), size)[: len(samples)]
