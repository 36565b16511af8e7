"""Every config file in configs/ is a run that validates."""

import ast
import pathlib

import pytest

from configs.base import RunConfig
from configs.commandline import load
from parallel.records import from_dict, to_dict

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
RUNS = [path for path in sorted(CONFIGS.glob("*.py")) if "\nrun = " in path.read_text()]


def test_there_are_runs():
    assert {"quickstart", "shakespeare", "tiny"} <= {path.stem for path in RUNS}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_config_loads(path):
    run = load(path)
    assert run.name == path.stem, "a run is named after its file, so that its folder is found again"
    assert from_dict(RunConfig, to_dict(run)) == run


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_config_is_a_lab_note(path):
    note = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert "uv run train.py" in note, f"{path.name} does not show its command"
