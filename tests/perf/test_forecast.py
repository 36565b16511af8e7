"""`python -m perf simulate` answers in seconds, says what cannot be, and asks no device."""

import json

import pytest

from perf import __main__ as door
from perf.forecast import ForecastConfig, run, shape_of
from perf.workload import Workload

FEW = ["--requests", "12", "--scale", "0.25", "--json"]


def simulated(capsys, *words: str) -> dict:
    assert door.main(["simulate", *FEW, *words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_family_on_a_chip(capsys):
    found = simulated(capsys, "llama3_8b", "--chip", "v5e", "--chips", "4", "--rate", "5")
    assert found["model"] == "llama3_8b"
    assert (found["chip"], found["chips"], found["requests"]) == ("TPU v5e", 4, 12)
    assert 0 < found["tpot_p50_ms"] < found["ttft_p99_ms"]
    assert 0 < found["busy"] <= 1
    assert found["dollars_per_million_tokens"] > 0
    assert found == simulated(capsys, "llama3_8b", "--chip", "v5e", "--chips", "4", "--rate", "5")


def test_more_chips_answer_quicker_and_hold_more(capsys):
    four, eight = (simulated(capsys, "llama3_8b", "--chip", "v5e", "--chips", str(n)) for n in (4, 8))
    assert eight["tpot_p50_ms"] < four["tpot_p50_ms"]
    assert eight["kv_cache_tokens"] > 1.5 * four["kv_cache_tokens"]


def test_servers_share_the_chips(capsys):
    found = simulated(capsys, "llama3_8b", "--chip", "H100", "--chips", "3", "--disaggregate", "1:2")
    assert (found["replicas"], found["prefill_servers"]) == (2, 1)
    assert found["prefill_busy"] > 0
    assert found["cache_hit_rate"] > 0.3


def test_a_runs_config_is_a_model_too(capsys):
    found = simulated(capsys, "configs/quickstart.py", "--chip", "v5e", "--scale", "0.1")
    assert found["output_tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["llama3_8b", "--chip", "v5x"], "v5x"),
        (["llama3_8c", "--chip", "v5e"], "did you mean|llama3_8b"),
        (["llama3_8b", "--chip", "v5e", "--chips", "4", "--replicas", "3"], "give a multiple of 3"),
        (["llama3_8b", "--chip", "v5e", "--chips", "3"], "num_heads=32 is not a multiple of the 3 devices"),
        (["llama3_70b", "--chip", "v5e", "--chips", "4"], "give a server more chips"),
        (["llama3_8b", "--chip", "v5e", "--replicas", "2", "--disaggregate", "1:1"], "leave out --replicas"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, words, why):
    assert door.main(["simulate", *words, *FEW]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert any(part in line for part in why.split("|"))


def test_a_context_that_is_too_short_says_so():
    config = ForecastConfig(chip="v5e", chips=4, work=Workload(requests=40, scale=8.0))
    with pytest.raises(ValueError, match="smaller --scale"):
        run(shape_of("llama2_7b"), config)
