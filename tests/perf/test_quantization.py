"""One command compares a model with itself in fewer bits; its rescaled twin is the same function on no grid."""

import dataclasses
import json

import numpy as np
import pytest

from data.tokenizer import ByteTokenizer
from model import huggingface
from parallel import compilation, host_memory
from perf import __main__ as door
from perf import quantization
from perf.quantization import QuantizationConfig, rescaled
from perf.tables import quantization_lines
from tests.inference.small import LLAMA, parameters

TINY = dataclasses.replace(LLAMA, vocab_size=320, max_length=128)


@pytest.fixture(autouse=True)
def _keep_nothing(monkeypatch):
    monkeypatch.setattr(compilation, "cache_compilations", lambda: None)
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: None)


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    huggingface.save(tmp_path / "model", TINY, parameters(TINY), dtype="float32")
    ByteTokenizer().save(tmp_path / "model")
    (tmp_path / "text").write_text("Hello, world. " * 20)
    return ["quantize", str(tmp_path / "model"), "--file", str(tmp_path / "text"), "--tokens", "100", "--json"]


def test_bytes_loss_and_speed_of_each_scheme(capsys, arguments):
    assert door.main([*arguments, "--schemes", "int8", "--decoded", "3", "--rounds", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain, small = found["results"]["float32"], found["results"]["int8"]
    assert (plain["bytes_ratio"], plain["increase"], plain["speedup"]) == (1, 0, 1)
    assert 2.5 < small["bytes_ratio"] < 4
    assert small["bytes_ratio"] == plain["bytes"] / small["bytes"]
    assert small["increase"] == pytest.approx(small["perplexity"] / plain["perplexity"] - 1)
    assert small["perplexity"] != plain["perplexity"]
    assert abs(small["increase"]) < 0.05
    assert small["tokens_per_second"] > 0
    assert len(list(quantization_lines(found))) == 4


def test_unknown_schemes_are_refused(capsys, arguments):
    assert door.main([*arguments, "--schemes", "int8", "int5"]) == 2
    assert capsys.readouterr().err == "error: --schemes int5 is unknown; int8, int4, fp8 are known\n"


def test_the_twin_is_the_same_function(tmp_path, arguments):
    config = QuantizationConfig(model=arguments[1], file=tmp_path / "text", schemes=(), tokens=60, decoded=0, rounds=1)
    said = []
    plain, twin = (
        quantization.run(dataclasses.replace(config, is_rescaled=flag), said.append)["results"]["float32"]
        for flag in (False, True)
    )
    assert twin["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
    changed = rescaled(TINY, parameters(TINY))["layers"][0]["ffn"]["down"]
    ratio = np.asarray(changed / parameters(TINY)["layers"][0]["ffn"]["down"])
    assert 0.9 < ratio.min() < 0.93
    assert 1.07 < ratio.max() < 1.12
