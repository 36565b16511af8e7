"""A bench reports medians, its roof and its peer; a peer that cannot start is one clear line."""

import json
import sys

import pytest

from model.config import ModelConfig
from perf import __main__ as door
from perf import bench, roofline
from perf.bench import BenchConfig
from perf.peer import Peer

TINY = ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24, max_length=64,
    rope_theta=1e4, norm_eps=1e-6,
)  # fmt: skip
PEER = """
import json, sys
json.loads(sys.argv[1]); print(json.dumps({"ready": "a peer"}), flush=True)
for _ in sys.stdin: print(0.5, flush=True)
"""


@pytest.fixture
def peer(tmp_path):
    path = tmp_path / "peer.py"
    path.write_text(PEER)
    return str(path)


@pytest.fixture(autouse=True)
def quick_roof(monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda **_: roofline.Roof(1e9, 1e9))


def test_the_roofs_are_measured(monkeypatch):
    monkeypatch.undo()
    roof = roofline.measure(rounds=1, size=64, megabytes=1)
    assert min(roof) > 0


@pytest.mark.parametrize("kind", ["train", "prefill", "decode"])
def test_every_kind_is_measured_beside_a_peer(kind, peer, monkeypatch):
    monkeypatch.setitem(bench.KINDS, kind, (lambda: TINY, bench.KINDS[kind][1]))
    monkeypatch.setattr(bench, "Peer", lambda _, __, ask: Peer(sys.executable, peer, ask))
    said = []
    config = BenchConfig(kind=kind, batch=8, length=16, tokens=4, rounds=2, peer="python")
    result = json.loads(json.dumps(bench.run(config, said.append)))
    assert result["peer"] == "a peer"
    assert result["ratio_to_peer"] == pytest.approx(result["tokens_per_second"] / result["peer_tokens_per_second"])
    assert result["share_of_roof"] == pytest.approx(
        result["tokens_per_second"] / result["roof_tokens_per_second"], rel=0.5
    )
    assert len(said) == 1 + config.rounds


def test_a_peer_without_its_packages_is_named(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    with pytest.raises(ValueError, match=r"exit status 3; its interpreter needs torch"):
        Peer(sys.executable, str(broken), {})


@pytest.mark.parametrize("arguments", [["bench", "tarin"], ["bench", "train", "--rounds", "0"], []])
def test_a_wrong_command_line_ends_with_status_2(arguments):
    with pytest.raises(SystemExit) as end:
        door.main(arguments)
    assert end.value.code == 2
