import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

import train
from data import images, speech
from evals import __main__ as door
from evals import modalities

pytest.importorskip("sklearn")

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TINY = [
    "model.embed_dim=16", "model.num_layers=1", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=16",
    "model.ffn_dim=16", "train.steps=2", "train.save_every=2", "train.eval_every=2", "train.eval_batches=1",
    "train.sample_tokens=0", "train.batch_size=8", "optim.warmup_steps=1",
]  # fmt: skip


def trained(name: str, folder: pathlib.Path) -> pathlib.Path:
    """A run that learned next to nothing."""
    settings = [*TINY, f"out={folder}", f"data.cache_dir={folder / 'cache'}"]
    assert train.main([str(CONFIGS / f"{name}.py"), *settings]) == 0
    return folder / name


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Iterator[pathlib.Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "VARIANTS", 0)
        images.learned_codes.cache_clear()
        yield trained("digits", tmp_path_factory.mktemp("runs"))
    images.learned_codes.cache_clear()


def test_digits_are_told_apart_and_drawn(digits, tmp_path, capsys, monkeypatch):
    train_, apart = images.load()
    few = images.Digits(apart.pixels[:20], apart.labels[:20])
    monkeypatch.setattr(images, "load", lambda: (train_, few))
    page = tmp_path / "new" / "digits.png"
    assert door.main(["digits", str(digits), "--each", "1", "--out", str(page)]) in (0, 2)
    told = capsys.readouterr()
    assert " of 20 (" in told.out
    assert page.exists() or "drawings is a picture, as" in told.err


def test_the_likeliest_label_is_the_answer(digits):
    """Beside the whole text's log-likelihood, one text at a time."""
    subject, labels = modalities.opened(digits, "digits"), ["3", "7"]
    questions = [images.WORDS.question([code] * 16) for code in (0, 1, 2)]
    slow = []
    for question in questions:
        texts = [(0, *subject.tokenizer.encode(f"{question} {label}")) for label in labels]
        slow.append(labels[int(np.argmax([sum(subject.engine.logprobs([text])[0]) for text in texts]))])
    assert modalities.classify(subject, questions, labels) == slow


def test_good_drawings_are_counted(digits, monkeypatch):
    """A model that draws what it was asked for, copies, and what is no picture."""
    subject = modalities.opened(digits, "digits")
    learned, apart = images.load()
    spelled = lambda pixels: images.WORDS.spell(images.codes(pixels[None])[0].tolist()).removeprefix("image ")  # noqa: E731
    ideal = [spelled(apart.pixels[apart.labels.tolist().index(digit)]) for digit in range(10)]
    ideal[3] = "p1 p2"
    ideal[4] = spelled(learned.pixels[learned.labels.tolist().index(4)])
    monkeypatch.setattr(modalities, "draw", lambda *given, **how: ideal)
    drawings = modalities.draw_digits(subject, each=1, temperature=1.0, seed=0)
    assert drawings.labels == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert (drawings.broken, drawings.tally.total) == (1, 10)
    assert drawings.tally.right >= 8
    assert drawings.copies >= 1


def test_clips_are_told_apart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speech, "VOWELS_EACH", 4)
    speech._load.cache_clear()
    run = trained("speech", tmp_path)
    capsys.readouterr()
    assert door.main(["speech", str(run)]) == 0
    assert " of the clips that are kept apart" in capsys.readouterr().out
    speech._load.cache_clear()


def test_what_is_no_such_run_is_one_line(digits, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({"model": {}, "data": {"path": "stdlib"}}))
    for arguments, message in (
        (
            ["digits", str(tmp_path / "nowhere")],
            "nowhere is no run's folder; train one: `uv run train.py configs/digits.py`",
        ),
        (["speech", str(digits)], "was trained on data.path=digits, not speech; give a run of configs/speech.py"),
        (["digits", str(tmp_path / "text")], "was trained on data.path=stdlib, not digits"),
        (["digits", str(digits), "--each", "0"], "--each 0 must be at least 1"),
    ):
        assert door.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
