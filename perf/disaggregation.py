"""What long prompts cost running answers, with and without a prefill server: real servers on this machine's cores.

    python -m perf.disaggregation MODEL [--tokens 512] [--prompts 3] [--streams 2] [--rounds 3]

Three servers, each on one core: a plain one and a decode server that take turns on the first, and the decode server's
prefill server on the second. In each round answers run, first undisturbed, then while long prompts come one after the
other. The last line is one JSON object.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import httpx

ROOT = pathlib.Path(__file__).parents[1]
QUIET = 4.0  # seconds for which answers run undisturbed
OPTIONS = ["--max-rows", "4", "--chunk", "128", "--cache-tokens", "8192", "--max-length", "2048", "--port", "0"]
Seconds = list[float]


class Round(NamedTuple):
    """Seconds of one server in one round."""

    quiet: Seconds  # between tokens of running answers
    disturbed: Seconds  # the same, beside prompts
    first: Seconds  # from each prompt to its first token


class Server(NamedTuple):
    """A server in a process of its own."""

    url: str
    log: pathlib.Path


@contextlib.contextmanager
def server(name: str, model: str, core: int, folder: pathlib.Path, *more: str) -> Iterator[Server]:
    """The server on one core, once it answers."""
    command = ["taskset", "-c", str(core), sys.executable, "infer.py", "serve", model, *OPTIONS, *more]
    said, log = folder / f"{name}.out", folder / f"{name}.err"
    environment = {**os.environ, "MESHLIGHT_PREFILL_SECRET": "a secret for a minute"}
    with open(said, "w") as out, open(log, "w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=errors)
    try:
        while "is served at " not in said.read_text():
            if process.poll() is not None:
                raise OSError(f"the {name} server did not start: {log.read_text()[-500:]}")
            time.sleep(0.2)
        yield Server(said.read_text().split("is served at ")[1].split()[0], log)
    finally:
        process.terminate()
        process.wait()


async def watch(http: httpx.AsyncClient, url: str, prompt: list[int], times: Seconds) -> None:
    """Run an answer and note when each token comes."""
    body = {"prompt": prompt, "max_tokens": 1500, "ignore_eos": True, "temperature": 0, "stream": True, "logprobs": 0}
    async with http.stream("POST", url + "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())


async def play(url: str, draw: random.Random, *, tokens: int, prompts: int, streams: int) -> Round:
    """One round with one server."""
    async with httpx.AsyncClient(timeout=600, trust_env=False) as http:
        times: list[Seconds] = [[] for _ in range(streams)]
        running = [asyncio.create_task(watch(http, url, random_tokens(draw, 16), each)) for each in times]
        while not all(times):
            for task in running:
                if task.done():
                    task.result()
            await asyncio.sleep(0.05)
        start = time.perf_counter()
        await asyncio.sleep(QUIET)
        middle, first = time.perf_counter(), []
        for _ in range(prompts):
            body = {"prompt": random_tokens(draw, tokens), "max_tokens": 1, "temperature": 0}
            began = time.perf_counter()
            (await http.post(url + "/v1/completions", json=body)).raise_for_status()
            first.append(time.perf_counter() - began)
        end = time.perf_counter()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.sleep(0.5)  # the server notices
    return Round(gaps(times, start, middle), gaps(times, middle, end), first)


def gaps(times: Sequence[Seconds], start: float, end: float) -> Seconds:
    """Seconds between tokens, of all answers, of which the later came within a time."""
    return [later - earlier for each in times for earlier, later in itertools.pairwise(each) if start <= later <= end]


def random_tokens(draw: random.Random, count: int) -> list[int]:
    """A prompt that nobody has seen."""
    return [draw.randrange(1000, 40_000) for _ in range(count)]


def summary(rounds: Sequence[Round]) -> dict[str, float]:
    """Of all rounds together."""
    quiet, disturbed, first = (sorted(itertools.chain(*part)) for part in zip(*rounds, strict=True))
    return {
        "quiet_median": statistics.median(quiet),
        "disturbed_mean": statistics.fmean(disturbed),
        "disturbed_median": statistics.median(disturbed),
        "disturbed_p95": disturbed[int(0.95 * (len(disturbed) - 1))],
        "disturbed_max": disturbed[-1],
        "first_token_median": statistics.median(first),
    }


def measure(asked: argparse.Namespace, folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """All rounds, the two servers in turns."""
    away = ["--prefill-when", "always", "--min-away", "64", "--prefill-from"]
    size = {"tokens": asked.tokens, "prompts": asked.prompts, "streams": asked.streams}
    draw, found = random.Random(0), {"alone": [], "disaggregated": []}
    with (
        server("prefill", asked.model, 1, folder) as prefill,
        server("decode", asked.model, 0, folder, *away, prefill.url) as decode,
        server("plain", asked.model, 0, folder) as plain,
    ):
        print(decode.log.read_text().splitlines()[-1])
        for number in range(asked.rounds):
            for name, url in (("alone", plain.url), ("disaggregated", decode.url)):
                found[name].append(asyncio.run(play(url, draw, **size)))
                print(f"round {number + 1}  {name:<14}", json.dumps(rounded(summary(found[name][-1:]))), flush=True)
        lines = httpx.get(decode.url + "/metrics", trust_env=False).text.splitlines()
        print(*(line for line in lines if line.startswith("meshlight_prefill")), sep="\n")
    return {name: rounded(summary(rounds)) for name, rounds in found.items()}


def rounded(values: dict[str, float]) -> dict[str, float]:
    """To milliseconds."""
    return {name: round(value, 3) for name, value in values.items()}


def main(arguments: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.disaggregation", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="as for infer.py")
    parser.add_argument("--tokens", type=int, default=512, help="of each long prompt")
    parser.add_argument("--prompts", type=int, default=3, help="that come one after the other in a round")
    parser.add_argument("--streams", type=int, default=2, help="answers that run meanwhile, at most 3")
    parser.add_argument("--rounds", type=int, default=3)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(parser.parse_args(arguments), pathlib.Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
