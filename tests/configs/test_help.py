import dataclasses

from configs.help import comments, help_text, written
from configs.tiny import run
from model.config import RopeScaling
from parallel.records import keys
from training.config import TrainConfig


def test_every_key_is_listed_once_with_its_comment():
    text = help_text(run)
    for key in keys(run):
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {key.path}=")]
        comment = line.removeprefix(f"  {key.path}={written(key.value)}").rpartition("  [")[0]
        assert comment.strip(), f"{key.path} has no comment in its dataclass"


def test_a_line_shows_value_comment_and_type():
    lines = {" ".join(line.split()) for line in help_text(run).splitlines()}
    assert "train.steps=10 optimizer steps [int]" in lines
    assert "data.dedup=exact drop repeated documents; near uses MinHash [none|exact|near]" in lines
    assert "train: Length, batch and rhythm of a run." in lines


def test_comments_are_read_from_the_source():
    assert comments(RopeScaling)["kind"] == "which published rule"
    assert comments(TrainConfig).keys() == {field.name for field in dataclasses.fields(TrainConfig)}


def test_values_are_written_as_the_command_line_takes_them():
    values = [None, True, 3, 1e-4, "a", "a b", "\n", "", ("x", "y")]
    assert list(map(written, values)) == ["none", "true", "3", "0.0001", "a", "'a b'", r"'\n'", "", "x,y"]
