"""The server around a real engine with a tiny model: answers are the engine's own, blocks come back, processes end."""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from inference.spelling import Spelling
from model import huggingface
from tests import processes
from tests.inference import small
from tests.inference.serving import raw, serving, tokenizer
from tests.inference.small import parameters, row, run

TINY = dataclasses.replace(small.LLAMA, vocab_size=258, max_length=512)
HI = [{"role": "user", "content": "Hi"}]


def engine(**options):
    return small.engine(TINY, num_tokens=258, **{"max_rows": 4, "cache_tokens": 1024, "chunk": 32, **options})


@pytest.fixture(scope="module")
def server():
    with serving(engine(), queue=64) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as made:
        yield made


def waits(happened) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def post(server, body, path="/v1/completions") -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=120)


def test_answers_are_the_engines_own(client):
    prompts = ["Hello", "Hello there", "abc"]
    expected = run(engine(), [row(tokenizer().encode(text), 9, end_ids=(257,)) for text in prompts])
    found = client.completions.create(model="tiny", prompt=prompts, max_tokens=9, temperature=0, logprobs=3)
    for choice, (tokens, logprobs) in zip(found.choices, expected, strict=True):
        assert choice.text == tokenizer().decode(tokens)
        np.testing.assert_allclose(choice.logprobs.token_logprobs, logprobs, rtol=1e-4, atol=1e-5)
        for top, logprob in zip(choice.logprobs.top_logprobs, choice.logprobs.token_logprobs, strict=True):
            assert max(top.values()) == pytest.approx(logprob, abs=1e-6)  # the likeliest was taken


def test_the_same_seed_gives_the_same_answer_whole_streamed_and_among_others(server, client):
    asked = {"model": "tiny", "messages": HI, "max_tokens": 12, "seed": 5, "n": 2}
    whole = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    with concurrent.futures.ThreadPoolExecutor(6) as askers:
        others = [askers.submit(post, server, {"prompt": "x" * i, "max_tokens": 20}) for i in range(1, 7)]
        streamed = ["", ""]
        for chunk in client.chat.completions.create(**asked, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert all(other.result().status_code == 200 for other in others)
    assert streamed == whole
    assert whole[0] != whole[1]


def token_id(name: str) -> int:
    """The token that a list of log-probabilities calls so."""
    names = {Spelling(tokenizer()).name(token): token for token in range(258)}
    assert len(names) == 258
    return names[name]


def test_echoed_logprobs_are_those_of_the_whole_text(client):
    asked = {"model": "tiny", "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 0}
    first = client.completions.create(prompt="abcdef", **asked).choices[0]
    ids = [token_id(name) for name in first.logprobs.tokens]
    full = small.full_logprobs(TINY, ids)
    expected = [full[i, token] for i, token in enumerate(ids[1:])]
    np.testing.assert_allclose(first.logprobs.token_logprobs[1:], expected, rtol=1e-3, atol=1e-4)


def test_embeddings_of_like_texts_are_alike(client):
    texts = ["the same text", "the same text", "the same texts", "0123456789"]
    vectors = np.asarray([item.embedding for item in client.embeddings.create(model="tiny", input=texts).data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    alike = vectors @ vectors[0]
    assert alike[1] == pytest.approx(1, abs=1e-5)
    assert alike[1] > alike[2] > alike[3]


def test_answers_follow_a_schema(client):
    yes_or_no = {"a": {"type": "boolean"}}
    schema = {"type": "object", "properties": yes_or_no, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    found = client.chat.completions.create(model="tiny", messages=HI, n=3, max_tokens=200, response_format=wanted)
    for choice in found.choices:
        assert isinstance(json.loads(choice.message.content)["a"], bool)
        assert choice.finish_reason == "stop"


def test_a_second_turn_reads_the_first_from_the_cache(server, client):
    long = "a conversation that is long enough to fill some blocks of eight tokens each"
    before = server.service.stats.cached_tokens
    for text in (long + "!", long + "?"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], max_tokens=2)
    assert server.service.stats.cached_tokens - before >= len(long) - 8


def test_a_salted_cache_is_nobody_elses():
    text = "a secret that is long enough to fill some blocks of eight tokens each"
    with serving(engine(), keys=("one", "two"), isolate_keys=True) as server:
        cached = []
        for key in ("one", "two", "one"):
            with server.client(key) as client:
                client.completions.create(model="tiny", prompt=text, max_tokens=2)
            cached.append(server.service.stats.cached_tokens)
    assert cached[0] == cached[1] == 0
    assert cached[2] >= len(text) - 8


def test_a_thousand_cancelled_requests_leak_no_block(server):
    """Clients that hang up: before, while and after their prompt is read, streaming or not."""
    address, body = server.address, {"prompt": "x" * 60, "max_tokens": 400, "ignore_eos": True}

    def hang_up(i: int) -> None:
        asked = {**body, "prompt": f"{i} " + "x" * (i % 60), "stream": i % 2 == 0}
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(raw("/v1/completions", json.dumps(asked).encode()))
            if i % 4 == 0:
                connection.recv(200)
            elif i % 4 == 1:
                time.sleep(0.002)

    with concurrent.futures.ThreadPoolExecutor(16) as askers:
        list(askers.map(hang_up, range(1000)))
    waits(lambda: server.service.num_open == 0)
    stats = server.service.stats
    assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)
    assert server.service._engine.stats().blocks_used == 0
    assert post(server, {"prompt": "ab", "max_tokens": 3, "ignore_eos": True}).json()["usage"]["completion_tokens"] == 3


# Processes.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    huggingface.save(path, TINY, parameters(TINY), dtype="float32")
    tokenizer().save(path)
    return path


def serve(folder, port: int, *more) -> list[str]:
    few = ["--max-rows", "2", "--cache-tokens", "512", "--max-length", "256", "--chunk", "32"]
    return ["infer.py", "serve", str(folder), "--port", str(port), *few, *map(str, more)]


def test_sigterm_lets_answers_end_and_refuses_new_ones(folder, tmp_path):
    port = processes.free_port()
    with contextlib.ExitStack() as stack:
        started = processes.running([serve(folder, port, "--name", "tiny")], tmp_path / "said")
        [process] = stack.enter_context(started)
        process.says(f"tiny is served at http://127.0.0.1:{port}")
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(url + "/health").json()["status"] == "ok"
        connection = stack.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)))
        body = {"prompt": "x", "max_tokens": 250, "stream": True, "ignore_eos": True, "temperature": 0}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.readline()
        process.handle.send_signal(signal.SIGTERM)
        refused = None
        while refused is None:  # until the signal has arrived
            try:
                response = httpx.post(url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=60)
                refused = response if response.status_code != 200 else None
            except httpx.ConnectError:
                break  # it has drained meanwhile
        if refused is not None:
            assert refused.status_code == 503
            assert "shutting down" in refused.json()["error"]["message"]
        events = [line for line in answer.read().decode().split("\n\n") if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert process.ends() == 0
        assert "error" not in process.errors.lower()


def test_a_port_in_use_is_told_in_one_line_before_anything_is_loaded(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, *serve(folder, port)]
        done = subprocess.run(command, cwd=processes.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: port {port} of 127.0.0.1 can not be had (Address already in use); "
        "give another --port, or 0 for a free one\n"
    )
