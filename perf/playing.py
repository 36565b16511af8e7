"""Plays a trace to an engine in this process, and records when each token came. Knows no model and no other engine."""

import heapq
import time

from inference.config import SamplingConfig
from inference.engine import Engine
from inference.request import EngineStats, Request
from perf.answers import Answered, Played, Tick
from perf.workload import Trace

GREEDY = SamplingConfig(temperature=0.0)
COUNTED = ("steps", "prompt_tokens", "cached_tokens", "drafted", "accepted", "preemptions")


def play(engine: Engine, trace: Trace, *, salt: str, together: int | None = None, apart: bool = False) -> Played:
    """Answer a trace greedily, each answer to its full length.

    Cached blocks are shared among the requests of one `salt`; with `apart`, not even among these. `together` makes
    static batches of at most so many, each waited for whole before the next; 1 answers one request at a time.
    """
    return _Play(engine, trace, salt, together, apart).run()


class _Play:
    """A trace on its way."""

    def __init__(self, engine: Engine, trace: Trace, salt: str, together: int | None, apart: bool):
        self.engine, self.trace, self.salt, self.together, self.apart = engine, trace, salt, together, apart
        self.due = [(arrival.time, place) for place, arrival in enumerate(trace) if arrival.follows < 0]
        heapq.heapify(self.due)
        self.next = {arrival.follows: place for place, arrival in enumerate(trace) if arrival.follows >= 0}
        self.texts: dict[int, tuple[int, ...]] = {}  # of the requests that have been let in, answers included
        self.places: dict[int, int] = {}  # of the requests that are being answered, by the engine's ids
        self.answers: dict[int, Answered] = {}
        self.ticks: list[Tick] = []

    def run(self) -> Played:
        before, start = self.engine.stats(), time.perf_counter()
        now = 0.0
        while self.due or self.places:
            self._let_in(now)
            if self.places:
                outputs = self.engine.step()
                now = time.perf_counter() - start
                self._take(outputs, now)
            else:
                time.sleep(max(0.0, self.due[0][0] - now))
                now = time.perf_counter() - start
        while self.engine.has_work:  # a step that was enqueued for nobody
            self.engine.step()
        ordered = [self.answers[place] for place in range(len(self.trace))]
        return Played(ordered, self.ticks, now, differences(before, self.engine.stats()))

    def _let_in(self, now: float) -> None:
        """Hand the engine what is due; static batches only where the one before has been answered whole."""
        if self.together is not None and self.places:
            return
        while self.due and self.due[0][0] <= now and (self.together is None or len(self.places) < self.together):
            time_, place = heapq.heappop(self.due)
            arrival = self.trace[place]
            prompt = self.texts.get(arrival.follows, ()) + arrival.prompt
            salt = f"{self.salt}/{place}" if self.apart else self.salt
            request = Request(prompt=prompt, sampling=GREEDY, max_tokens=arrival.max_tokens, salt=salt)
            self.places[self.engine.add(request)] = place
            self.texts[place] = prompt
            self.answers[place] = Answered(time_, 0.0, 0.0, 0, 0)

    def _take(self, outputs, now: float) -> None:
        for output in outputs:
            place = self.places[output.id]
            if output.error:
                raise ValueError(output.error)
            if output.tokens:
                self.answers[place] = self.answers[place].with_more(len(output.tokens), now)
                self.texts[place] += tuple(output.tokens)
            if output.finish is not None:
                del self.places[output.id]
                if place in self.next:
                    follower = self.next[place]
                    heapq.heappush(self.due, (now + self.trace[follower].time, follower))
        count = sum(len(output.tokens) for output in outputs)
        if count:
            self.ticks.append(Tick(now, count))


def differences(before: EngineStats, after: EngineStats) -> dict[str, int]:
    """What an engine did between two looks at it."""
    return {name: getattr(after, name) - getattr(before, name) for name in COUNTED}
