import errno
import json
import os

import pytest

from training.folder import check_config, differences, held, write

CONFIG = {
    "name": "a",
    "out": "runs",
    "seed": 0,
    "model": {"embed_dim": 32, "vocab_size": 0, "layers": ["global"]},
    "mesh": {"data": -1, "fsdp": 1},
    "data": {"path": "stdlib", "workers": 0},
    "train": {"steps": 10},
}


def changed(section: str, **values) -> dict:
    return {**CONFIG, section: {**CONFIG[section], **values}}


@pytest.fixture
def begun(tmp_path):
    """A run with one step done, whose vocabulary came from its tokenizer."""
    write(tmp_path / "config.json", json.dumps(changed("model", vocab_size=320)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    return tmp_path


def test_the_same_config_goes_on(begun):
    assert check_config(begun, CONFIG) == {}
    assert check_config(begun, changed("model", vocab_size=320, layers=("global",))) == {}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed("model", embed_dim=64), "model.embed_dim is 32 there and 64 here"),
        (changed("model", vocab_size=640), "model.vocab_size is 320 there and 640 here"),
        (changed("train", steps=20), "train.steps is 10 there and 20 here"),
        (changed("data", path="b.txt"), "data.path is stdlib there and b.txt here"),
        ({**CONFIG, "seed": 1, "new": 2}, "seed is 0 there and 1 here, new is None there and 2 here"),
    ],
)
def test_another_config_is_refused_with_both_values(begun, config, said):
    before = (begun / "config.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run with another config") as error:
        check_config(begun, config)
    assert f"another config: {said}; give the same values" in str(error.value)
    assert "name=NAME" in str(error.value)
    assert (begun / "config.json").read_bytes() == before


def test_where_and_how_fast_it_runs_may_change(begun):
    moved = {**changed("mesh", fsdp=4), "name": "b", "out": "/elsewhere"}
    moved["data"] = {"path": "stdlib", "workers": 2}
    assert check_config(begun, moved) == {
        "name": ("a", "b"),
        "out": ("runs", "/elsewhere"),
        "mesh.fsdp": (1, 4),
        "data.workers": (0, 2),
    }


def test_before_the_first_step_any_config_may_be_given(begun):
    (begun / "metrics.jsonl").write_text("")
    assert check_config(begun, changed("model", embed_dim=64)) == {}
    (begun / "checkpoints" / "00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"model\.embed_dim"):
        check_config(begun, changed("model", embed_dim=64))


def test_differences_are_dotted():
    assert differences({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 2, "c": [1]}, "e": 3}) == {
        "a.b": (1, 2),
        "d": (2, None),
        "e": (None, 3),
    }


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is no run"), held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    refused = pytest.raises(ValueError, match="another process trains in")
    with held(tmp_path / "run"), refused, held(tmp_path / "run"):
        pass
    with held(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("a file where the runs should be")
    refused = pytest.raises(OSError, match=r"run folder .* cannot be written: .*; grant write access")
    with refused as error, held(tmp_path / "runs" / "a"):
        pass
    assert "\n" not in str(error.value)


def test_a_disk_that_fills_up_is_one_line(tmp_path):
    said = pytest.raises(OSError, match=r"run could not be written: No space left on device; the checkpoints are whole")
    with said, held(tmp_path / "run"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match="No such file or directory: 'text'"), held(tmp_path / "run"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "text")


def test_a_file_is_written_whole(tmp_path):
    write(tmp_path / "a", "one")
    write(tmp_path / "a", "two")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "two")]
