"""The router before servers that answer, refuse, hang and die: no request is lost silently, none repeated in part."""

import concurrent.futures
import contextlib
import json
import signal
import socket
import time

import httpx
import openai
import pytest

import infer
from inference.event_stream import LONGEST, Events, event
from inference.router_counts import total
from inference.routing import RouterConfig, addresses
from tests.processes import PATIENCE, free_port, running

ADMIN = "admin-key"
QUICK = ["--health-every", "0.2", "--health-within", "0.5", "--failures", "2"]


class Fleet:
    """A router process and the servers behind it."""

    def __init__(self, router, servers, port, ports):
        self.process, self.servers = router, servers
        self.address, self.replicas = f"http://127.0.0.1:{port}", [f"http://127.0.0.1:{port}" for port in ports]
        self.http = httpx.Client(base_url=self.address, timeout=PATIENCE, trust_env=False)

    def ask(self, prompt="Hello", path="/v1/completions", **more) -> httpx.Response:
        """One request."""
        return self.http.post(path, json={"model": "fake", "prompt": prompt, **more})

    def stream(self, prompt="Hello", **more):
        """One streamed request."""
        body = {"model": "fake", "prompt": prompt, "stream": True, **more}
        return self.http.stream("POST", "/v1/completions", json=body)

    def count(self, name: str, *labels: str) -> float:
        """A counter of the router."""
        return total(self.http.get("/metrics").content, f"meshlight_router_{name}", labels)

    def report(self, index: int) -> dict:
        """What a server saw."""
        return httpx.get(self.replicas[index] + "/report", trust_env=False).json()

    def seen(self, what: str) -> list[int]:
        """A counter of each server."""
        return [self.report(index)["seen"].get(what, 0) for index in range(len(self.replicas))]

    def tell(self, index: int, **control) -> None:
        """Change how a server behaves."""
        httpx.post(self.replicas[index] + "/control", json=control, trust_env=False).raise_for_status()

    def release(self) -> None:
        """Let held streams go on."""
        for replica in self.replicas:
            httpx.post(replica + "/release", trust_env=False)

    def home(self, prompt: str) -> int:
        """The server that takes this prompt when nobody is busy."""
        return self.by(self.ask(prompt))

    def by(self, response: httpx.Response) -> int:
        """The server that answered, which says its port with each word."""
        assert response.status_code == 200, response.text
        return self.replicas.index("http://127.0.0.1:" + response.json()["choices"][0]["text"].partition("-")[0])

    def admin(self, verb: str, replica: str = "", key: str = ADMIN) -> httpx.Response:
        """POST /admin/…"""
        query = {"replica": replica} if replica else {}
        return self.http.post(f"/admin/{verb}", params=query, headers={"authorization": f"Bearer {key}"})

    def all_are_counted(self) -> bool:
        """Whether every request that came has an outcome."""
        return self.count("came_total") == self.count("requests_total")


def until(happens) -> None:
    """Wait for something that will happen."""
    end = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def fleet(folder, monkeypatch, *options: str, size: int = 3):
    """Servers and a router before them, once all are up."""
    monkeypatch.setenv("MESHLIGHT_ADMIN_KEY", ADMIN)
    ports, port = [free_port() for _ in range(size)], free_port()
    upstreams = [["-m", "tests.inference.fake_upstream", str(each)] for each in ports]
    urls = [f"http://127.0.0.1:{each}" for each in ports]
    with running(upstreams, folder / "servers") as servers:
        for server, each in zip(servers, ports, strict=True):
            server.waits(lambda each=each: listens(each))
        with running([["infer.py", "route", *urls, "--port", str(port), *QUICK, *options]], folder / "router") as (
            router,
        ):
            router.waits(lambda: listens(port))
            made = Fleet(router, servers, port, ports)
            try:
                until(lambda: made.count("up") == size)
                yield made
            finally:
                made.http.close()


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Three servers that no test ends."""
    options, folder = ["--body-limit", "20000", "--max-running", "6"], tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as monkeypatch, fleet(folder, monkeypatch, *options) as made:
        yield made


def test_the_official_client_works_through_it(calm):
    client = openai.OpenAI(base_url=calm.address + "/v1", api_key="secret", max_retries=0)
    messages = [{"role": "user", "content": "Hello"}]
    assert [model.id for model in client.models.list()] == ["fake"]
    whole = client.chat.completions.create(model="fake", messages=messages).choices[0].message.content
    pieces = client.chat.completions.create(model="fake", messages=messages, stream=True)
    assert "".join(piece.choices[0].delta.content for piece in pieces) == whole
    client.close()


def test_keys_queries_and_other_headers_go_through_and_those_of_one_connection_do_not(calm):
    headers = {"authorization": "Bearer secret", "x-own": "1", "te": "trailers", "connection": "x-hop", "x-hop": "1"}
    response = calm.http.post("/v1/completions?a=b%20c", json={"prompt": "headers"}, headers=headers)
    (arrival,) = (
        arrival for index in range(3) for arrival in calm.report(index)["arrivals"]
        if arrival["body"].get("prompt") == "headers"
    )  # fmt: skip
    assert response.headers["x-fake"] == "yes"
    assert arrival["query"] == "a=b%20c"
    assert arrival["headers"]["authorization"] == "Bearer secret"
    assert arrival["headers"]["x-own"] == "1"
    assert not {"te", "x-hop"} & arrival["headers"].keys()
    assert arrival["headers"]["host"] in calm.replicas[calm.by(response)]


def test_prompts_that_begin_alike_go_to_one_server_and_others_are_spread(calm):
    long = "You are a very helpful assistant. " * 20
    homes = {calm.by(calm.ask(long + ending)) for ending in ("Who?", "What?", "Where?", "Why?")}
    assert len(homes) == 1
    assert {calm.home(f"prompt {index}") for index in range(24)} == {0, 1, 2}


def test_a_stream_comes_as_it_is_made(calm):
    with calm.stream("as made", words=3, hold=1) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]  # while the server still holds
        calm.release()
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"


def test_what_is_no_request_is_refused_here_or_there(calm):
    assert calm.http.post("/v1/completions", content=b"{no json").json() == {"error": {"message": "no JSON"}}
    assert calm.http.post("/v1/completions", content=b"[" * 10_000).status_code == 400  # deeper than Python can
    large = calm.ask("x" * 20_000)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
    pieces = calm.http.post("/v1/completions", content=(b"x" * 1000 for _ in range(30)))
    assert pieces.status_code == 413
    assert calm.ask("still fine").status_code == 200


def test_only_the_public_paths_go_through(calm):
    for path in ("/internal/blocks", "/control", "/v1/../internal/blocks", "/v1/%2e%2e/internal/blocks"):
        with socket.create_connection(("127.0.0.1", int(calm.address.rpartition(":")[2]))) as plain:
            plain.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            assert plain.recv(100).startswith(b"HTTP/1.1 404"), path
    assert calm.http.get("/v1/nothing").status_code == 404  # the server's word


def test_who_leaves_is_cancelled_there_before_and_after_the_first_byte(calm):
    before = sum(calm.seen("cancelled"))
    with calm.stream("leaves", words=5, pause=60) as response:
        next(response.iter_raw())
    until(lambda: sum(calm.seen("cancelled")) == before + 1)
    with pytest.raises(httpx.ReadTimeout):
        calm.http.post("/v1/completions", json={"prompt": "leaves", "first": 60}, timeout=0.3)
    until(lambda: sum(calm.seen("cancelled")) == before + 2)
    until(lambda: calm.count("running") == 0)
    assert calm.count("requests_total", 'outcome="disconnected"') >= 2
    assert calm.all_are_counted()


def test_a_full_server_is_passed_over_and_when_all_are_full_their_word_is_passed_on(calm):
    home = calm.home("full")
    calm.tell(home, status=429)
    assert calm.by(calm.ask("full")) != home
    for index in range(3):
        calm.tell(index, status=429)
    refused = calm.ask("full")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
    assert refused.json() == {"error": {"message": "as told"}}
    for index in range(3):
        calm.tell(index, status=200)
    assert calm.by(calm.ask("full")) == home


def test_a_hot_beginning_spills_over_and_the_router_itself_is_full_at_last(calm):
    with concurrent.futures.ThreadPoolExecutor(19) as pool:
        slow = [pool.submit(calm.ask, "hot", first=1.5) for _ in range(18)]
        until(lambda: calm.count("running") == 18)
        assert [calm.count("running", f'replica="{name}"') for name in calm.replicas] == [6.0] * 3
        refused = calm.ask("hot")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert {calm.by(each.result()) for each in slow} == {0, 1, 2}
    assert calm.count("favoured_total", 'at="elsewhere"') >= 12


def test_a_drained_server_gets_nothing_new_finishes_and_comes_back(calm):
    home = calm.home("drained")
    name = calm.replicas[home]
    with calm.stream("drained", words=3, pause=0.2) as response:
        pieces = response.iter_raw()
        next(pieces)
        drained = calm.admin("drain", name)
        assert drained.json()["condition"] == "draining"
        assert drained.json()["running"] == 1
        assert calm.by(calm.ask("drained")) != home
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
    assert calm.admin("resume", name).status_code == 200
    until(lambda: calm.count("up") == 3)
    assert calm.by(calm.ask("drained")) == home


def test_administration_needs_its_key(calm):
    assert calm.admin("drain", calm.replicas[0], key="wrong").status_code == 401
    assert calm.http.post("/admin/drain").status_code == 401
    assert calm.admin("drain", "http://nobody").json()["error"]["message"].startswith("no replica http://nobody; there")
    listed = calm.http.get("/admin/replicas", headers={"authorization": f"Bearer {ADMIN}"}).json()
    assert [each["name"] for each in listed] == calm.replicas
    assert {each["condition"] for each in listed} == {"up"}


def test_a_stream_that_ends_too_early_is_told_from_one_that_is_whole(calm):
    with calm.stream("early", words=5, stop=2) as response:
        events = [line for line in response.iter_lines() if line]
    assert len(events) == 3
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_a_server_that_dies_before_the_first_byte_is_replaced_by_another(tmp_path, monkeypatch):
    with fleet(tmp_path, monkeypatch) as made:
        home = made.home("dies")
        made.tell(home, die=True)
        assert made.by(made.ask("dies")) != home
        assert made.count("retries_total", 'reason="lost"') == 1
        with made.stream("dies") as response:  # nobody listens there any more
            assert response.read().endswith(b"data: [DONE]\n\n")
        until(lambda: made.count("up") == 2)
        # One request that ends whoever takes it does not end all.
        for index in {0, 1, 2} - {home}:
            made.tell(index, die=True)
        lost = made.ask("poison")
        assert (lost.status_code, lost.json()["error"]["code"]) == (503, "replica_lost")
        assert lost.headers["retry-after"]
        until(lambda: made.http.get("/health").status_code == 503)
        down = made.ask("nobody")
        assert (down.status_code, down.json()["error"]["code"]) == (503, "no_replica")
        assert down.headers["retry-after"]
        assert made.all_are_counted()
        port = int(made.replicas[home].rpartition(":")[2])
        with running([["-m", "tests.inference.fake_upstream", str(port)]], tmp_path / "again"):
            until(lambda: made.http.get("/health").status_code == 200)
            assert made.by(made.ask("back")) == home


def test_a_death_in_the_middle_of_a_stream_is_told_and_nothing_is_repeated(tmp_path, monkeypatch):
    with fleet(tmp_path, monkeypatch, size=2) as made:
        client = openai.OpenAI(base_url=made.address + "/v1", api_key="x", max_retries=0)
        more = {"words": 5, "die": 2}
        pieces = client.completions.create(model="fake", prompt="middle", stream=True, extra_body=more)
        assert [next(pieces).choices[0].text.partition("-")[2] for _ in range(2)] == ["0 ", "1 "]
        with pytest.raises(openai.APIError, match="the replica was lost; the answer is not whole"):
            next(pieces)
        client.close()

        def alive() -> list[int]:
            return [index for index in (0, 1) if made.servers[index].handle.poll() is None]

        until(lambda: len(alive()) == 1)  # a process ends after its sockets
        assert made.report(*alive())["seen"].get("came", 0) == 0
        assert made.count("requests_total", 'outcome="broken"') == 1


def test_kill_minus_9_under_load_loses_nothing_silently(tmp_path, monkeypatch):
    with fleet(tmp_path, monkeypatch, size=2) as made:

        def ask(index: int) -> str:
            """How a request ended, as its client sees it."""
            if index % 2:
                answer = made.ask(f"load {index}", words=4, pause=0.3)
                return "whole" if answer.status_code == 200 else answer.json()["error"]["code"]
            with made.stream(f"load {index}", words=8, pause=0.15) as response:
                lines = [line for line in response.iter_lines() if line]
            return "whole" if lines[-1] == "data: [DONE]" else json.loads(lines[-1][6:])["error"]["code"]

        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            asked = [pool.submit(ask, index) for index in range(24)]
            until(lambda: made.count("running") == 24 and min(made.seen("came")) > 5)
            time.sleep(0.3)  # streams have begun
            made.servers[0].handle.send_signal(signal.SIGKILL)
            ends = [each.result() for each in asked]
        assert set(ends) == {"whole", "replica_lost"}  # told by an error event; plain answers were made anew elsewhere
        assert all(end == "whole" for end in ends[1::2])
        assert ends.count("replica_lost") == made.count("requests_total", 'outcome="broken"') > 0
        assert made.count("retries_total", 'reason="lost"') > 0
        assert made.count("requests_total", 'outcome="answered"') == ends.count("whole")
        assert made.all_are_counted()


def test_a_server_that_hangs_is_left_out_and_who_waits_for_it_goes_elsewhere(tmp_path, monkeypatch):
    with fleet(tmp_path, monkeypatch, size=2) as made:
        home = made.home("hangs")
        made.servers[home].handle.send_signal(signal.SIGSTOP)
        assert made.by(made.ask("hangs")) != home
        assert made.count("left_out_total", f'replica="{made.replicas[home]}"') == 1
        made.servers[home].handle.send_signal(signal.SIGCONT)
        until(lambda: made.count("up") == 2)
        assert made.by(made.ask("hangs")) == home
        # One that says it is draining is left out too, but what it computes is not taken from it.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            slow = pool.submit(made.ask, "hangs", first=1.5)
            until(lambda: made.count("running") == 1)
            made.tell(home, health=503)
            until(lambda: made.count("up") == 1)
            assert made.by(made.ask("hangs")) != home
            assert made.by(slow.result()) == home


def test_sigterm_lets_what_runs_end_and_refuses_what_comes(tmp_path, monkeypatch):
    with fleet(tmp_path, monkeypatch, size=1) as made, httpx.Client(base_url=made.address) as other:
        with made.stream("ends", words=3, hold=1) as response:
            pieces = response.iter_raw()
            next(pieces)
            assert other.get("/health").status_code == 200
            made.process.handle.send_signal(signal.SIGTERM)
            until(lambda: other.get("/health").json()["status"] == "draining")
            late = other.post("/v1/completions", json={"prompt": "late"})
            assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
            assert late.headers["retry-after"]
            made.release()
            assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
        assert made.process.ends() == 0
        assert "Traceback" not in made.process.errors


def test_what_does_not_end_in_time_is_cut_clearly(tmp_path, monkeypatch):
    with fleet(tmp_path, monkeypatch, "--drain-within", "0.3", size=1) as made:
        with made.stream("never", words=3, hold=1) as response:
            lines = response.iter_lines()
            next(lines)
            made.process.handle.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "router_shutdown"
        assert made.process.ends() == 0


def test_a_client_that_does_not_read_holds_up_its_own_stream_only(tmp_path, monkeypatch):
    with fleet(tmp_path, monkeypatch, "--stall", "1", size=1) as made:
        body = json.dumps({"prompt": "x", "stream": True, "words": 400, "bulk": 2**18}).encode()  # 100 MB
        with socket.create_connection(("127.0.0.1", int(made.address.rpartition(":")[2]))) as plain:
            plain.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            plain.recv(100)
            assert made.ask("meanwhile").status_code == 200
            until(lambda: made.count("requests_total", 'outcome="disconnected"') == 1)
            until(lambda: made.seen("cancelled") == [1])
            assert made.seen("sent")[0] < 2**25  # socket buffers; neither the router nor the server holds the rest


def test_events_are_passed_on_whole():
    events = Events()
    pieces = [
        b"data: a",
        b"\n",
        b"\ndata: b\n\ndata: c",
        b"\r\n\r\n",
        b": ping\n\n",
        b"data: [DO",
        b"NE]\n\n",
        b"data: x",
    ]
    assert [events.take(piece) for piece in pieces[:5]] == [
        b"",
        b"",
        b"data: a\n\ndata: b\n\n",
        b"data: c\r\n\r\n",
        pieces[4],
    ]
    assert not events.has_ended
    assert [events.take(piece) for piece in pieces[5:]] == [b"", b"data: [DONE]\n\n", b""]
    assert events.has_ended
    assert events.rest() == b""  # an event without an end is void


def test_an_event_is_held_back_up_to_a_length_and_an_end_needs_no_blank_line():
    events = Events()
    assert events.take(b"x" * LONGEST) == b""
    assert len(events.take(b"x")) == LONGEST + 1
    events = Events()
    assert events.take(b"data: [DONE]") == b""
    assert events.rest() == b"data: [DONE]\n\n"
    assert events.has_ended
    told = Events()
    assert told.take(event({"error": {"message": "\n\ndata: [DONE]"}})).count(b"\n\n") == 1
    assert told.has_ended


def test_addresses_are_checked():
    assert addresses(["http://a:1/v1/", "https://b"]) == ("http://a:1", "https://b")
    for urls, rule in [
        (["a:1"], "a:1 is no address"),
        (["ftp://a"], "ftp://a is no address"),
        (["http://a/x"], "is no address"),
        (["http://a", "http://a/"], "http://a is given twice"),
        ([], "at least one URL"),
    ]:
        with pytest.raises(ValueError, match=rule):
            addresses(urls)
    with pytest.raises(ValueError, match=r"router\.losses=0 must be between 1 and 100"):
        RouterConfig(losses=0)


def test_the_command_line_refuses_in_one_line(capsys):
    assert infer.main(["route", "nowhere"]) == 2
    assert "replica nowhere is no address of a server; give it as http://HOST:PORT" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert infer.main(["route", "http://a", "--port", str(taken.getsockname()[1])]) == 2
    assert "give another --port" in capsys.readouterr().err
