"""Real servers of one model: two behind a router, of which one has its prompts computed by the other."""

import concurrent.futures
import contextlib
import dataclasses
import json
import signal
import time

import httpx
import openai
import pytest

from data.tokenizer import ByteTokenizer
from model import huggingface
from tests.inference.small import LLAMA, parameters
from tests.processes import PATIENCE, free_port, running

TINY = dataclasses.replace(LLAMA, vocab_size=320, max_length=256)
pytestmark = pytest.mark.slow  # two servers compile what they need: 20 to 70 seconds

SMALL = ["--max-rows", "2", "--chunk", "32", "--cache-tokens", "2048", "--block-size", "8", "--max-length", "256"]
LONG = "It was the best of times, it was the worst of times, it was the age of wisdom, " * 2


class Two:
    """A prefill server, a decode server, and a router before both."""

    def __init__(self, processes, ports):
        self.processes = processes
        self.prefill, self.decode, self.router = (f"http://127.0.0.1:{port}" for port in ports)

    def ask(self, at: str, prompt: str, **more) -> dict:
        """Twelve tokens, greedily, and what they are."""
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 0, "ignore_eos": True, **more}
        response = httpx.post(at + "/v1/completions", json=body, timeout=PATIENCE, trust_env=False)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["logprobs"]["tokens"]

    def count(self, at: str, name: str) -> float:
        """A counter of a server or the router."""
        text = httpx.get(at + "/metrics", timeout=PATIENCE, trust_env=False).text
        lines = [line for line in text.splitlines() if line.startswith(f"meshlight_{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """All three up; programs that one server compiled, the other finds."""
    folder, monkeypatch = tmp_path_factory.mktemp("many"), pytest.MonkeyPatch()
    huggingface.save(folder / "model", TINY, parameters(TINY), dtype="float32")
    ByteTokenizer().save(folder / "model")
    ports = [free_port() for _ in range(3)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    monkeypatch.setenv("MESHLIGHT_PREFILL_SECRET", "a secret of both servers")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    serve = ["infer.py", "serve", str(folder / "model"), *SMALL, "--port"]
    away = ["--prefill-from", urls[0], "--prefill-when", "always", "--min-away", "32"]
    route = ["infer.py", "route", *urls[:2], "--port", str(ports[2]), "--health-every", "0.3", "--failures", "2"]
    with contextlib.ExitStack() as stack:
        stack.callback(monkeypatch.undo)
        (first,) = stack.enter_context(running([[*serve, str(ports[0])]], folder / "first"))
        first.says("is served at")
        (second,) = stack.enter_context(running([[*serve, str(ports[1]), *away]], folder / "second"))
        second.says("is served at")
        (third,) = stack.enter_context(running([route], folder / "third"))
        third.says("stands before 2 replicas")
        made = Two([first, second, third], ports)
        until(lambda: made.count(made.router, "router_up{") == 2)
        yield made


def until(happens) -> None:
    """Wait for something that will happen."""
    end = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_prompts_computed_elsewhere_give_the_same_tokens(two):
    assert "prompts may go to" in two.processes[1].errors
    before = two.count(two.decode, "cached_tokens_total")
    assert two.ask(two.decode, LONG) == two.ask(two.prefill, LONG)
    assert two.count(two.decode, 'prefill_prompts_total{where="away"}') == 1
    assert two.count(two.decode, "cached_tokens_total") - before >= len(LONG) // 8 * 8
    assert two.ask(two.decode, "short") == two.ask(two.prefill, "short")
    assert two.count(two.decode, 'prefill_prompts_total{where="here"}') == 1


def test_strangers_get_no_blocks(two):
    for content in (b"", b"MKV1" * 100):
        response = httpx.post(two.prefill + "/internal/blocks", content=content, trust_env=False)
        assert response.status_code == 401
    assert httpx.post(two.router + "/internal/blocks", trust_env=False).status_code == 404


def test_the_router_sends_prompts_where_their_beginning_is_cached(two):
    cached = lambda: two.count(two.prefill, "cached_tokens_total") + two.count(two.decode, "cached_tokens_total")  # noqa: E731
    sent = lambda at: two.count(two.router, f'router_sent_total{{replica="{at}"')  # noqa: E731
    prompt, before = (
        "Call me Ishmael. Some years ago, never mind how long precisely. ",
        (sent(two.prefill), sent(two.decode)),
    )
    first = two.ask(two.router, prompt)
    known = cached()
    assert two.ask(two.router, prompt) == first
    assert cached() - known >= len(prompt) // 8 * 8 - 8
    assert sorted((sent(two.prefill) - before[0], sent(two.decode) - before[1])) == [0, 2]


def test_a_killed_server_is_missed_by_nobody_silently(two):
    def ask(index: int) -> str:
        """How a request through the router ends."""
        if index % 2:
            return "whole" if len(two.ask(two.router, f"{index} times", max_tokens=200)) == 200 else "short"
        client = openai.OpenAI(base_url=two.router + "/v1", api_key="x", max_retries=0, timeout=PATIENCE)
        try:
            model = client.models.list().data[0].id
            pieces = client.completions.create(
                model=model,
                prompt=f"{index} times",
                max_tokens=200,
                stream=True,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            return "whole" if [*pieces][-1].choices[0].finish_reason else "short"
        except openai.APIError as error:
            return error.message
        finally:
            client.close()

    before = two.count(two.prefill, "generated_tokens_total")
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(ask, index) for index in range(24)]
        until(lambda: two.count(two.prefill, "generated_tokens_total") > before + 20)
        two.processes[0].handle.send_signal(signal.SIGKILL)
        ends = [each.result() for each in asked]
    assert set(ends) <= {"whole", "the replica was lost; the answer is not whole"}
    assert ends[1::2] == ["whole"] * 12  # computed anew by the other server
    assert two.count(two.router, "router_retries_total") > 0
    assert two.count(two.router, "router_came_total") == two.count(two.router, "router_requests_total")
    # The decode server computes its prompts itself from now on.
    fresh = json.dumps([*range(40)])
    failed = two.count(two.decode, 'prefill_prompts_total{where="failed"}')
    assert len(two.ask(two.decode, fresh)) == 12
    assert two.count(two.decode, 'prefill_prompts_total{where="failed"}') >= max(failed, 1)
    assert "prompts are computed here for" in two.processes[1].errors


def test_sigterm_ends_the_router_and_the_server_in_order(two):
    for process in (two.processes[2], two.processes[1]):
        process.handle.send_signal(signal.SIGTERM)
        assert process.ends() == 0
        assert "Traceback" not in process.errors
