"""`python -m perf plan`: answers without anything heavy, and refuses in one line."""

import json
import pathlib
import subprocess
import sys

import pytest

from perf.__main__ import main

ROOT = pathlib.Path(__file__).parents[2]


def asked(capsys, words: str) -> tuple[int, str, str]:
    status = main(["plan", *words.split()])
    return status, *capsys.readouterr()


def test_a_model_on_chips_as_json(capsys):
    status, out, _ = asked(capsys, "llama3_2_1b --chip v5e --chips 16 --batch 64 --length 2048 --top 3 --json")
    found = json.loads(out.splitlines()[-1])
    assert status == 0
    assert len(found["plans"]) == 3
    assert (found["chip"], found["chips"], found["topology"]) == ("TPU v5e", 16, "v5e:4x4")
    assert found["plans"][0]["cost"] > 0


def test_a_config_file_as_text(capsys):
    status, out, _ = asked(capsys, f"{ROOT}/configs/case_e.py --tokens 1e12")
    assert status == 0
    assert out.startswith("case_e: training on sequences of 2,048 tokens, on 16 TPU v5e (4x4)")
    assert "US$ the run" in out
    assert f"to run the first: uv run train.py {ROOT}/configs/case_e.py mesh.data=" in out


def test_a_chip_without_a_price_costs_nothing_known(capsys):
    _, out, _ = asked(capsys, "llama3_2_1b --chip A100-SXM-40GB --chips 8 --batch 64 --length 2048 --json")
    assert {plan["cost"] for plan in json.loads(out)["plans"]} == {None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("llama3_2_1b --chip v5z --chips 8", "there is no chip v5z; the nearest are TPU v5p, TPU v5e"),
        ("llama3_2_1b --chip v5p --chips 65", "65 chips form no slice of TPU v5p; the nearest are 64, 128"),
        ("llama3_2_1b --topology v5p:4x4x5", "there is no topology v5p:4x4x5; the nearest are "),
        ("llama3_1_405b --chip v5p --chips 16", "take "),
        ("llama-9 --chip v5p --chips 16", "llama-9 is no config file and no published model"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(capsys, words, message):
    status, out, error = asked(capsys, words)
    assert status == 2
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_report_is_written(capsys, tmp_path):
    status, _, said = asked(
        capsys, f"llama3_2_1b --chip v5e --chips 4 --batch 16 --length 512 --report {tmp_path / 'plan.html'}"
    )
    assert status == 0
    assert said == f"written to {tmp_path / 'plan.html'}\n"
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")


def test_nothing_heavy_is_imported_to_answer():
    code = (
        "import sys; from perf.__main__ import main; "
        "main('plan llama3_2_1b --chip v5e --chips 4 --batch 16 --length 512 --json'.split()); "
        "assert not {'jax', 'flax', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
