"""An engine that computes nothing: for tests of what stands around one. Its answers repeat the prompt's tokens."""

import itertools
import math
import threading
import time
from collections.abc import Sequence

import numpy as np

from inference.request import EngineStats, Output, Prompt, Request, TopToken


class FakeEngine:
    """One token of each running request a step. Whoever calls it from two threads is told."""

    def __init__(self, *, max_rows: int = 4, max_length: int = 512, pace: float = 0.0):
        self.max_rows, self.max_length, self.pace = max_rows, max_length, pace
        self.gate = threading.Event()  # no step goes through while it is not set
        self.gate.set()
        self.is_held = False  # whether a step waits at the gate
        self.fails_with: Exception | None = None  # what the next step raises
        self.requests: list[Request] = []
        self.num_steps = self.num_finished = self.num_cancelled = self.num_tokens = self.num_looks = 0
        self._ids = itertools.count()
        self._said: dict[int, int] = {}  # tokens said by each unfinished request
        self._asked: dict[int, Request] = {}
        self._told: list[Output] = []
        self._thread: int | None = None

    def add(self, request: Request) -> int:
        self._check_thread()
        if len(request.prompt) + 1 > self.max_length:
            raise ValueError(f"the prompt has {len(request.prompt)} tokens, {self.max_length - 1} at most")
        id_ = next(self._ids)
        self.requests.append(request)
        self._asked[id_], self._said[id_] = request, 0
        return id_

    def cancel(self, id: int) -> None:
        self._check_thread()
        if self._asked.pop(id, None) is not None:
            self.num_cancelled += 1
            self._told.append(Output(id, [], [], [], "cancelled"))

    @property
    def has_work(self) -> bool:
        self.num_looks += 1
        return bool(self._asked or self._told)

    def step(self) -> list[Output]:
        self._check_thread()
        self.is_held = not self.gate.is_set()
        assert self.gate.wait(60)
        self.is_held = False
        time.sleep(self.pace)
        if self.fails_with is not None:
            raise self.fails_with
        self.num_steps += 1
        told, self._told = self._told, []
        for id_, request in list(self._asked.items())[: self.max_rows]:
            told.append(self._say(id_, request))
        self.num_finished += sum(output.finish is not None for output in told)
        return told

    def _say(self, id_: int, request: Request) -> Output:
        count = self._said[id_]
        token, logprob = request.prompt[count % len(request.prompt)], -0.25
        if request.constraint is not None:
            token = first_bit(request.constraint.allowed())
            request.constraint.take(token)
        top = [TopToken((token + i) % 256, math.log(0.5) - i) for i in range(request.num_top)]
        self._said[id_] = count + 1
        self.num_tokens += 1
        has_ended = token in request.end_ids or (request.constraint is not None and request.constraint.has_ended)
        finish = "stop" if has_ended else "length" if count + 1 >= request.max_tokens else None
        if finish:
            del self._asked[id_]
        return Output(id_, [token], [logprob], [top], finish)

    def stats(self) -> EngineStats:
        running = min(len(self._asked), self.max_rows)
        return EngineStats(
            waiting=len(self._asked) - running, running=running, blocks=64, blocks_used=running, blocks_cached=3,
            steps=self.num_steps, prompt_tokens=sum(len(r.prompt) for r in self.requests), cached_tokens=0,
            generated_tokens=self.num_tokens, preemptions=0, drafted=0, accepted=0, finished=self.num_finished,
        )  # fmt: skip

    def embed(self, texts: Sequence[Prompt]) -> np.ndarray:
        self._check_thread()
        vectors = np.array([[sum(text), len(text), 1.0] for text in texts], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def logprobs(self, texts: Sequence[Prompt]) -> list[list[float]]:
        self._check_thread()
        return [[-0.5] * (len(text) - 1) for text in texts]

    def _check_thread(self) -> None:
        self._thread = self._thread or threading.get_ident()
        assert self._thread == threading.get_ident(), "an engine belongs to one thread"


def first_bit(bits: np.ndarray) -> int:
    """The first token that is allowed."""
    word = int(np.flatnonzero(bits)[0])
    return 32 * word + (int(bits[word]) & -int(bits[word])).bit_length() - 1
