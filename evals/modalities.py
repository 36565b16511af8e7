"""How well a decoder tells apart what it never saw or heard, and draws what it is told. Knows no training."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float64

from data import images, speech
from data.labelled import Words
from data.tokenizer import Tokenizer
from inference import generate
from inference.config import EngineConfig, GenerationConfig, SamplingConfig
from inference.engine import Engine
from inference.location import Location, kind_of
from inference.weights import open_model, serving_parameters
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh

TEXTS_AT_ONCE = 512  # that are scored
ROWS = 64  # that are drawn at once


class Subject(NamedTuple):
    """A run's model, ready to be asked."""

    engine: Engine
    tokenizer: Tokenizer
    path: str  # the run's data.path


class Tally(NamedTuple):
    """How many answers were right."""

    right: int
    total: int

    def __str__(self) -> str:
        return f"{self.right} of {self.total} ({self.right / self.total:.1%})"


class Drawings(NamedTuple):
    """Digits that a model drew, a row for each drawing that is a picture, and what became of the others."""

    pixels: Float64[np.ndarray, "n rows columns"]
    labels: list[int]  # what was asked for
    tally: Tally  # of all drawings: those whose nearest real picture of those kept apart shows what was asked for
    broken: int  # drawings that are no picture
    copies: int  # drawings that are a training picture, code by code

    def __str__(self) -> str:
        return (
            f"{self.tally} look like what was asked for (nearest neighbour among the digits kept apart); "
            f"{self.broken} are no picture, {self.copies} are training pictures again"
        )


def opened(run: pathlib.Path, modality: str) -> Subject:
    """The newest checkpoint of a run on that kind of text, on one device."""
    if not run.is_dir() or kind_of(run) != "run":
        raise ValueError(f"{run} is no run's folder; train one: `uv run train.py configs/{modality}.py`")
    path = json.loads((run / "config.json").read_text(encoding="utf-8"))["data"]["path"]
    if path.split(":")[0] != modality:
        raise ValueError(f"{run} was trained on data.path={path}, not {modality}; give a run of configs/{modality}.py")
    model = open_model(Location("run", run))
    mesh, rules = make_mesh(MeshConfig(data=1), jax.devices()[:1]), AxisRules()
    config, parameters = serving_parameters(model.config, model.load(mesh, rules), mesh)
    options = EngineConfig(max_rows=ROWS, cache_tokens=generate.cache_for([config.max_length] * ROWS))
    engine = Engine(config, parameters, mesh, rules, num_tokens=model.tokenizer.vocab_size, options=options)
    return Subject(engine, model.tokenizer, path)


def classify(subject: Subject, questions: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The label that makes each question's text the likeliest."""
    written = [f"{question} {label}" for question in questions for label in labels]
    texts = [tuple(generate.text_tokens(text, subject.tokenizer)) for text in written]
    for text in texts:
        generate.check_room(text, max_length=subject.engine.program.config.max_length + 1)
    found: list[float] = []
    for at in range(0, len(texts), TEXTS_AT_ONCE):
        found += [math.fsum(row) for row in subject.engine.logprobs(texts[at : at + TEXTS_AT_ONCE])]
    best = np.array(found).reshape(len(questions), len(labels)).argmax(axis=1)
    return [labels[int(place)] for place in best]


def tell(subject: Subject, words: Words, rows: Sequence[tuple[str, Sequence[int]]], labels: Sequence[str]) -> Tally:
    """How many labels of some codes a model finds."""
    answers = classify(subject, [words.question(codes) for _, codes in rows], labels)
    right = sum(answer == label for answer, (label, _) in zip(answers, rows, strict=True))
    return Tally(right, len(rows))


def tell_digits(subject: Subject) -> Tally:
    """Of the pictures that no run trains on."""
    _, apart = images.load()
    rows = [(str(label), row) for label, row in zip(apart.labels, images.codes(apart.pixels).tolist(), strict=True)]
    return tell(subject, images.WORDS, rows, [str(digit) for digit in range(10)])


def tell_speech(subject: Subject) -> Tally:
    """Of the clips that no run trains on."""
    known = speech.load(subject.path)
    return tell(subject, speech.WORDS, [(label, codes) for _, label, codes in known.apart], known.labels)


def draw(subject: Subject, wishes: Sequence[str], *, num_tokens: int, temperature: float, seed: int) -> list[str]:
    """What a model writes after each wish."""
    prompts = [tuple(generate.text_tokens(wish, subject.tokenizer)) for wish in wishes]
    answers = [generate.Answer(prompt, subject.tokenizer, ()) for prompt in prompts]
    how = GenerationConfig(sampling=SamplingConfig(temperature=temperature, seed=seed), max_tokens=num_tokens)
    for _ in generate.generate(subject.engine, subject.tokenizer, answers, how):
        pass
    return [answer.text for answer in answers]


def draw_digits(subject: Subject, *, each: int, temperature: float, seed: int) -> Drawings:
    """Every digit some times, judged by the nearest of the real pictures that no run trains on."""
    if each < 1:
        raise ValueError(f"--each {each} must be at least 1; it counts the drawings of a digit")
    _, apart = images.load()
    num_codes = len(images.patches(apart.pixels)[0])
    asked = [digit for digit in range(10) for _ in range(each)]
    wishes = [images.WORDS.wish(str(digit)) for digit in asked]
    texts = draw(subject, wishes, num_tokens=num_codes, temperature=temperature, seed=seed)
    drawn = [(digit, codes) for digit, text in zip(asked, texts, strict=True) if (codes := read(text, num_codes))]
    if not drawn:
        raise ValueError(f"none of {len(asked)} drawings is a picture, as {texts[0]!r}; train the run for longer")
    pixels = np.stack([images.picture(codes) for _, codes in drawn])
    near = np.square(pixels[:, None] - apart.pixels[None]).sum(axis=(2, 3)).argmin(axis=1)
    looks = sum(int(apart.labels[place]) == digit for place, (digit, _) in zip(near, drawn, strict=True))
    known = {tuple(codes) for rows in images.learned_codes().tolist() for codes in rows}
    return Drawings(
        pixels=pixels,
        labels=[digit for digit, _ in drawn],
        tally=Tally(looks, len(asked)),
        broken=len(asked) - len(drawn),
        copies=sum(tuple(codes) in known for _, codes in drawn),
    )


def read(text: str, num_codes: int) -> list[int]:
    """The codes of a drawing; none where it is no picture."""
    try:
        codes = images.WORDS.read(text)
    except ValueError:
        return []
    return codes if len(codes) == num_codes else []


def plot(drawings: Drawings, file: pathlib.Path, *, real: int = 3, drawn: int = 6) -> None:
    """Real digits that no run trains on above digits that the model drew, one column for each digit."""
    from matplotlib.figure import Figure

    _, apart = images.load()
    page = Figure(figsize=(6, 0.6 * (real + drawn) + 0.9), layout="constrained")
    upper, lower = page.subplots(2, 1, height_ratios=[real, drawn])
    upper.set_title("real, kept apart from training", fontsize=10)
    upper.imshow(sheet(apart.pixels, apart.labels.tolist(), rows=real), cmap="gray_r")
    lower.set_title("drawn by the decoder after “class N image”", fontsize=10)
    lower.imshow(sheet(drawings.pixels, drawings.labels, rows=drawn), cmap="gray_r")
    upper.set_axis_off()
    lower.set_axis_off()
    file.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(file, dpi=150)


def sheet(
    pixels: Float64[np.ndarray, "n rows columns"], labels: Sequence[int], *, rows: int
) -> Float64[np.ndarray, "height width"]:
    """The first pictures of each digit in a column of their own, with white around each."""
    n, height, width = pixels.shape
    page = np.zeros((rows, height + 2, 10, width + 2))
    for digit in range(10):
        chosen = [place for place, label in enumerate(labels) if label == digit][:rows]
        page[: len(chosen), 1:-1, digit, 1:-1] = pixels[chosen]
    return page.reshape(rows * (height + 2), 10 * (width + 2))
