import dataclasses
import pathlib
import subprocess
import sys

import pytest

from configs.commandline import load, resolve
from configs.tiny import run

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.py"


def test_config_and_settings_come_in_any_order():
    default = CONFIGS / "quickstart.py"
    assert resolve([], TINY) == run
    changed = resolve(["seed=3", str(TINY), "name=b"], default)
    assert changed == dataclasses.replace(run, name="b", seed=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.py", "b.py"], "one config file makes a run, not 2: a.py b.py; settings are key=value"),
        (["--seed=3"], "unknown option --seed=3; settings are written key=value, as seed=3"),
        (["-v"], "unknown option -v; settings are written key=value"),
    ],
)
def test_other_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        resolve(arguments, TINY)
    assert str(error.value) == message


def test_a_missing_config_names_the_nearest(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    with pytest.raises(ValueError, match=r"quick is no config file .*; did you mean configs/quickstart.py\?$"):
        load(pathlib.Path("quick"))
    with pytest.raises(ValueError, match=r"; there are some in configs$"):
        load(pathlib.Path("zzz"))


TEMPLATE = TINY.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", " has no run = RunConfig(...); see configs/quickstart.py"),
        ("run = (", ", line 1: SyntaxError: '(' was never closed (mine.py, line 1)"),
        ("\nrun = nothing", ", line 2: NameError: name 'nothing' is not defined"),
        (TEMPLATE.replace("steps=10", "steps='10'"), ", line 26: train.steps='10' must be a number"),
        (
            TEMPLATE.replace("num_layers", "num_layer"),
            ", line 13: ModelConfig has no field num_layer; did you mean num_l",
        ),
        (TEMPLATE.replace("num_kv_heads=2", "num_kv_heads=3"), ", line 13: num_heads=2 is not a multiple of"),
        (TEMPLATE.replace('"tiny"', '"a/b"'), ", line 11: name='a/b' must be one folder's name"),
        (TEMPLATE.replace("rope_theta=10_000.0", "rope_theta='big'"), ": model.rope_theta='big' must be number"),
        (TEMPLATE.replace('"byte"', "5"), ": data.tokenizer=5 must be text"),
    ],
)
def test_a_wrong_config_file_is_refused_with_its_line(tmp_path, text, message):
    """In a process of its own: under pytest jaxtyping would find the wrong type first."""
    path = tmp_path / "mine.py"
    path.write_text(text)
    done = subprocess.run([sys.executable, CONFIGS.parent / "train.py", path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}{message}")
    assert done.stderr.count("\n") == 1


def test_a_binary_config_file_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="^" + str(path)):
        load(path)
