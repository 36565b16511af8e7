"""Serving is measured on traces that are answered whole; sharing and guessing show in what is counted."""

import json
import sys

import pytest

from inference.config import EngineConfig
from model.config import ModelConfig
from parallel import compilation, host_memory
from perf import __main__ as door
from perf import overhead, serving, serving_plot
from perf.answers import Answered, Played, Tick, percentiles
from perf.peer import Peer
from perf.playing import play
from perf.workload import Arrival, Workload

TINY = ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24, max_length=256,
    rope_theta=1e4, norm_eps=1e-6, scan_layers=False,
)  # fmt: skip
PEER = """
import json, sys
json.loads(sys.argv[1]); print(json.dumps({"ready": "a peer"}), flush=True)
for _ in sys.stdin: print(0.5, flush=True)
"""


@pytest.fixture(scope="module")
def served():
    import jax

    from inference import weights
    from model.parameters import initialize
    from parallel.config import MeshConfig
    from parallel.mesh import make_mesh

    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])  # as on a machine that was not cut into devices
    parameters = initialize(TINY, mesh, serving.RULES, key=jax.random.key(0))
    encode = lambda text: [ord(c) % 64 for c in text]  # noqa: E731
    return serving.Served(*weights.serving_parameters(TINY, parameters, mesh), mesh, encode)


@pytest.fixture(scope="module")
def engine(served):
    return serving.engine_for(served, EngineConfig(max_rows=4, cache_tokens=1024, block_size=8, chunk=32))


def asked(count, *, prompt=12, tokens=3):
    return [Arrival(0.0, tuple(range(place, place + prompt)), tokens + place % 2) for place in range(count)]


@pytest.mark.parametrize("together", [None, 2, 1])
def test_a_trace_is_answered_whole(engine, together):
    trace = asked(5)
    played = play(engine, trace, salt=f"whole {together}", together=together)
    assert [answer.tokens for answer in played.answers] == [arrival.max_tokens for arrival in trace]
    assert all(0 <= answer.due < answer.first < answer.last <= played.seconds for answer in played.answers)
    assert sum(tick.tokens for tick in played.ticks) == sum(arrival.max_tokens for arrival in trace)
    assert not engine.has_work


def test_a_static_batch_waits_for_the_one_before(engine):
    answers = play(engine, asked(5), salt="static", together=2).answers
    assert min(answers[2].first, answers[3].first) > max(answers[0].last, answers[1].last)
    assert answers[4].first > max(answers[2].last, answers[3].last)


def test_latency_counts_from_when_a_request_was_due(engine):
    trace = [Arrival(0.0, (1, 2, 3), 4), Arrival(0.05, (4, 5, 6), 4)]
    answers = play(engine, trace, salt="due").answers
    assert [answer.due for answer in answers] == [0.0, 0.05]
    assert answers[1].first > 0.05


def test_prompts_are_shared_within_a_salt_unless_kept_apart(engine):
    trace = [arrival._replace(prompt=tuple(range(32)) + arrival.prompt) for arrival in asked(3)]
    together = play(engine, trace, salt="shared")
    apart = play(engine, trace, salt="kept", apart=True)
    assert (together.counted["cached_tokens"], apart.counted["cached_tokens"]) == (2 * 32, 0)
    assert play(engine, trace, salt="another").counted == together.counted


def test_a_follower_has_the_conversation_before_it(engine):
    trace = [Arrival(0.0, tuple(range(20)), 12), Arrival(0.01, (5, 6), 3, follows=0)]
    played = play(engine, trace, salt="chat")
    assert played.answers[1].due == pytest.approx(played.answers[0].last + 0.01)
    assert played.counted["prompt_tokens"] == 20 + 20 + 12 + 2
    assert played.counted["cached_tokens"] == 24  # of 31 computed: full blocks of 8


def test_latencies_are_percentiles():
    answers = [Answered(due=1.0, first=1.0 + n / 100, last=2.0 + n / 100, tokens=11, outputs=11) for n in range(101)]
    played = Played(answers, [], 10.0, {"cached_tokens": 1, "prompt_tokens": 4})
    figures = played.figures()
    assert figures["ttft_p50_ms"] == pytest.approx(500)
    assert figures["ttft_p90_ms"] == pytest.approx(900)
    assert figures["tpot_p99_ms"] == pytest.approx(100)
    assert figures["output_tokens_per_second"] == pytest.approx(101 * 11 / 10)
    assert figures["cache_hit_rate"] == 0.25
    assert percentiles("tpot", [])["tpot_p50_ms"] != 0


def test_the_hosts_share_is_measured_and_everything_is_put_back(engine):
    with overhead.watched(engine) as watch:
        play(engine, asked(2), salt="watched")
    assert 0 < watch.device < watch.steps
    assert 0 < watch.host_share < 1
    before = watch.steps
    play(engine, asked(2), salt="unwatched")
    assert watch.steps == before


def test_the_share_of_choosing_is_measured(engine):
    shares = overhead.sampling_shares(engine.program, engine.parameters, rows=2, context=16, rounds=2, block_size=8)
    assert set(shares) == {"greedy_sampling_share", "drawn_sampling_share"}
    assert all(share < 1 for share in shares.values())


@pytest.fixture
def tiny(monkeypatch, served, tmp_path):
    path = tmp_path / "peer.py"
    path.write_text(PEER)
    monkeypatch.setattr(serving, "serve", lambda model: served)
    monkeypatch.setattr(serving, "Peer", lambda _, __, ask: Peer(sys.executable, str(path), ask))
    monkeypatch.setattr(serving, "COPIED", 40)
    for owner, name in ((compilation, "cache_compilations"), (host_memory, "keep_freed_memory")):
        monkeypatch.setattr(owner, name, lambda: None)  # they change the process, which other tests share
    return tmp_path


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (
            ["--mix", "sharegpt", "--peer", "python"],
            ["ratio_to_peer", "ratio_to_best_fixed_batch", "ratio_to_static", "ratio_to_one_at_a_time"],
        ),
        (["--mix", "prefix"], ["ttft_ratio_to_without_reuse"]),
        (["--mix", "copy", "--model", "smollm2"], ["ratio_of_decode_steps", "acceptance_rate"]),
    ],
)
def test_the_command_prints_every_ratio_and_draws(tiny, monkeypatch, capsys, words, keys):
    work = serving.workload.trace
    short = lambda it: [a._replace(prompt=a.prompt[-40:], max_tokens=min(a.max_tokens, 6)) for a in work(it)]  # noqa: E731
    monkeypatch.setattr(serving.workload, "trace", short)
    options = ["--requests", "4", "--rows", "2", "--rounds", "1", "--plot", str(tiny / "a.png"), "--json"]
    assert door.main(["bench", "serve", *words, *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(result[key] > 0 for key in keys)
    assert {"ttft_p50_ms", "tpot_p99_ms", "cache_hit_rate", "host_share", "greedy_sampling_share"} <= set(result)
    assert (tiny / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--mix", "copy"], "random weights copy nothing"),
        (["--mix", "chat", "--peer", "python"], "leave out --peer"),
        (["--rate", "2", "--peer", "python"], "no --rate"),
    ],
)
def test_what_cannot_be_compared_is_refused(capsys, words, why):
    assert door.main(["bench", "serve", *words]) == 2
    assert why in capsys.readouterr().err


def test_throughput_over_time_adds_up():
    ticks = [Tick(float(second), 5) for second in range(1, 11)]
    times, speed = serving_plot.throughput(ticks, 10.0)
    assert (times[0], times[-1]) == (0, 10)
    assert speed == pytest.approx(5.0)


def test_a_workload_has_as_many_requests_as_it_says():
    assert len(serving.workload.trace(Workload(requests=7))) == 7
