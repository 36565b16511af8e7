"""A trace played to servers that do not exist: the real balancing, schedulers and blocks, under a clock of its own.

How long a step takes is a function that it is given. Knows no model, no chip and no network but for the bytes that a
prefill server hands over. The same trace and the same function give the same times, to the last bit.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Callable
from typing import NamedTuple

from inference.balancing import Balancer, BalancingConfig, beginning
from inference.config import SamplingConfig
from inference.request import Request
from inference.scheduler import Kind, Limits
from parallel.records import require
from perf.answers import Answered, Played, Tick
from perf.replica import Replica, Seconds, Told
from perf.workload import Trace

GREEDY = SamplingConfig(temperature=0.0)
MANY = 2**20  # requests that a replica takes at once, where nothing else is said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handover:
    """How the blocks of a prompt go from a prefill server to a decode server."""

    replicas: int  # prefill servers
    bytes_per_token: float  # of keys and values
    link: float  # bytes a second into one decode server
    delay: float = 0.01  # seconds of a handover that do not depend on its size
    min_away: int = 64  # tokens of a prompt that the cache lacks, fewer of which are computed where it is answered

    def __post_init__(self):
        require(self, "handover", "replicas", low=1)
        require(self, "handover", "link", low=1)
        for name in ("bytes_per_token", "delay", "min_away"):
            require(self, "handover", name, low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """The servers behind one address."""

    kinds: tuple[Kind, ...]  # of layers, with the blocks that each server has for them
    limits: Limits  # of a step
    prefix_cache: bool = True
    replicas: int = 1  # that answer
    balancing: BalancingConfig = BalancingConfig(max_running=MANY)
    handover: Handover | None = None  # None: each computes its own prompts

    def __post_init__(self):
        require(self, "deployment", "replicas", low=1)
        if self.handover and (len(self.kinds) > 1 or not self.prefix_cache):
            raise ValueError(
                f"a prefill server hands over blocks of one kind of layers through the prefix cache; this deployment "
                f"has {len(self.kinds)} kinds and prefix_cache={self.prefix_cache}: give no prefill servers"
            )


class Load(NamedTuple):
    """What one server did."""

    name: str
    busy: float  # share of the time that it computed
    rows: float  # answers that a step goes on with, on average
    prompt_tokens: float  # that a step reads, on average
    fullest: float  # the largest share of its cache that requests held
    preemptions: int


class Simulated(NamedTuple):
    """How it went."""

    played: Played  # of the requests that were answered
    loads: list[Load]
    refused: int  # requests that no server had room for, and what would have followed them

    def figures(self) -> dict[str, float]:
        """What is reported, as of a measurement, and how full the servers were."""
        answering = [load for load in self.loads if not load.name.startswith("prefill")]
        return {
            **self.played.figures(),
            "busy": mean([load.busy for load in answering]),
            "rows_of_a_step": mean([load.rows for load in answering]),
            "prompt_tokens_of_a_step": mean([load.prompt_tokens for load in answering]),
            "kv_cache_fullest": max(load.fullest for load in answering),
            "preemptions": sum(load.preemptions for load in self.loads),
            "refused": self.refused,
            **({"prefill_busy": mean(away)} if (away := [x.busy for x in self.loads if x not in answering]) else {}),
        }


def simulate(trace: Trace, deployment: Deployment, seconds: Seconds, *, salt: str = "") -> Simulated:
    """Answer a trace, each answer to its full length, by servers whose steps take so long."""
    return _Simulation(trace, deployment, seconds, salt).run()


class _Simulation:
    """A trace on its way."""

    def __init__(self, trace: Trace, deployment: Deployment, seconds: Seconds, salt: str):
        self.trace, self.deployment, self.salt = trace, deployment, salt
        self.replicas = self._servers("replica", deployment.replicas, seconds)
        self.balancer = ready(self.replicas, deployment.balancing)
        away = deployment.handover.replicas if deployment.handover else 0
        self.prefill = self._servers("prefill", away, seconds)
        self.prefill_balancer = ready(self.prefill, BalancingConfig(max_running=MANY))
        self.next = {arrival.follows: place for place, arrival in enumerate(trace) if arrival.follows >= 0}
        self.root = list(range(len(trace)))  # the request that each conversation began with
        for place, arrival in enumerate(trace):
            if arrival.follows >= 0:
                self.root[place] = self.root[arrival.follows]
        self.texts: dict[int, tuple[int, ...]] = {}  # of the requests that have come, answers included
        self.owners: dict[tuple[str, int], Callable[[Told, float], None]] = {}  # by replica and the id there
        self.answers: dict[int, Answered] = {}
        self.linked: dict[str, float] = {}  # when the link into a decode server is free
        self.ticks: list[Tick] = []
        self.awake: set[str] = set()  # servers that are going to be looked after
        self.events: list[tuple[float, int, int, Callable[[float], None]]] = []
        self.count = itertools.count()

    def run(self) -> Simulated:
        for place, arrival in enumerate(self.trace):
            if arrival.follows < 0:
                self._at(arrival.time, lambda now, place=place: self._arrive(place, now), order=0)
        now = 0.0
        while self.events:
            now, _, _, happen = heapq.heappop(self.events)
            happen(now)
        servers = [*self.replicas.values(), *self.prefill.values()]
        answers = [self.answers[place] for place in sorted(self.answers)]
        seconds = max((answer.last for answer in answers), default=0.0)
        counted = counted_by(list(self.replicas.values()))
        played = Played(answers, self.ticks, seconds, counted)
        loads = [load_of(server, seconds) for server in servers]
        return Simulated(played, loads, len(self.trace) - len(answers))

    def _servers(self, role: str, count: int, seconds: Seconds) -> dict[str, Replica]:
        made, how = self.deployment, {"reuse": self.deployment.prefix_cache, "seconds": seconds}
        return {name: Replica(name, made.kinds, made.limits, **how) for name in names_of(role, count)}

    def _at(self, time: float, happen: Callable[[float], None], *, order: int) -> None:
        """Let something happen; of what comes at one time, the lower order goes first."""
        heapq.heappush(self.events, (time, order, next(self.count), happen))

    def _arrive(self, place: int, now: float) -> None:
        """A request comes: somebody takes it, or it is refused."""
        arrival = self.trace[place]
        key = None
        if len(self.replicas) > 1:
            key = beginning({"prompt": list(self.trace[self.root[place]].prompt)}, self.balancer.config.beginning)
        name = self.balancer.take(key)
        if name is None:
            return
        prompt = self.texts.get(arrival.follows, ()) + arrival.prompt
        self.texts[place] = prompt
        self.answers[place] = Answered(now, 0.0, 0.0, 0, 0)
        if not self._goes_away(place, self.replicas[name], now):
            self._let_in(place, self.replicas[name], now)

    def _let_in(self, place: int, replica: Replica, now: float) -> None:
        """The request waits for its turn."""
        request = self._request(self.texts[place], self.trace[place].max_tokens)
        id = replica.add(request)
        self.owners[replica.name, id] = lambda told, now: self._take(place, replica, told, now)
        self._wake(replica, now)

    def _request(self, prompt: tuple[int, ...], max_tokens: int) -> Request:
        return Request(prompt=prompt, sampling=GREEDY, max_tokens=max_tokens, salt=self.salt)

    def _take(self, place: int, replica: Replica, told: Told, now: float) -> None:
        """Tokens have come for a request."""
        self.answers[place] = self.answers[place].with_more(len(told.tokens), now)
        if place in self.next:
            self.texts[place] += tuple(told.tokens)
        if told.finish is None:
            return
        self.balancer.give_back(replica.name)
        if place in self.next:
            follower = self.next[place]
            due = now + self.trace[follower].time
            self._at(due, lambda now: self._arrive(follower, now), order=0)

    def _wake(self, replica: Replica, now: float) -> None:
        """Look after a server once all that comes at this time has come; one that computes looks by itself."""
        if replica.end is None and replica.name not in self.awake:
            self.awake.add(replica.name)
            self._at(now, lambda now: self._go_on(replica, now), order=1)

    def _go_on(self, replica: Replica, now: float) -> None:
        """Hand a server's device what it can do."""
        self.awake.discard(replica.name)
        replica.enqueue(now)
        if replica.end is not None:
            self._at(replica.end, lambda now: self._fetch(replica, now), order=1)

    def _fetch(self, replica: Replica, now: float) -> None:
        """A step has ended: its tokens are told and the step after the next is planned."""
        told = replica.fetch()
        for one in told:
            owner = self.owners[replica.name, one.id]
            if one.finish is not None:
                del self.owners[replica.name, one.id]
            owner(one, now)
        if told and replica.name in self.replicas:
            self.ticks.append(Tick(now, sum(len(one.tokens) for one in told)))
        self.awake.add(replica.name)
        self._at(now, lambda now: self._go_on(replica, now), order=2)

    def _goes_away(self, place: int, replica: Replica, now: float) -> bool:
        """Whether another server computes the prompt; then that has begun."""
        handover, size = self.deployment.handover, self.deployment.limits.block_size
        prompt = self.texts[place]
        full = prompt[: len(prompt) // size * size]
        if handover is None or not full:
            return False
        have = replica.known(full, self.salt)
        if have * size == len(full) or len(prompt) - have * size < handover.min_away:
            return False
        name = self.prefill_balancer.take(None)
        assert name is not None
        server = self.prefill[name]
        id = server.add(self._request(full, 1))
        self.owners[name, id] = lambda told, now: self._hand_over(place, server, replica, now)
        self._wake(server, now)
        return True

    def _hand_over(self, place: int, server: Replica, replica: Replica, now: float) -> None:
        """The prompt has been computed elsewhere: its blocks come over the link, one prompt after the other."""
        handover, size = self.deployment.handover, self.deployment.limits.block_size
        assert handover is not None
        self.prefill_balancer.give_back(server.name)
        prompt = self.texts[place]
        full = prompt[: len(prompt) // size * size]
        missing = len(full) - replica.known(full, self.salt) * size
        begin = max(now, self.linked.get(replica.name, 0.0))
        self.linked[replica.name] = end = begin + missing * handover.bytes_per_token / handover.link

        def come(now: float) -> None:
            replica.take_in(full, self.salt)
            self._let_in(place, replica, now)

        self._at(end + handover.delay, come, order=0)


def names_of(role: str, count: int) -> list[str]:
    """ "replica", 2  ->  ["replica-0", "replica-1"]"""
    return [f"{role}-{number}" for number in range(count)]


def ready(replicas: dict[str, Replica], config: BalancingConfig) -> Balancer:
    """A balancer that has found all of them healthy."""
    balancer = Balancer(replicas, config)
    for name in replicas:
        for _ in range(config.recoveries):
            balancer.healthy(name)
    return balancer


def counted_by(replicas: list[Replica]) -> dict[str, int]:
    """What engines count, by the names of EngineStats."""
    schedulers = [replica.scheduler for replica in replicas]
    return {
        "steps": sum(replica.num_steps for replica in replicas),
        "prompt_tokens": sum(scheduler.num_prompt for scheduler in schedulers),
        "cached_tokens": sum(scheduler.num_cached for scheduler in schedulers),
        "drafted": 0,
        "accepted": 0,
        "preemptions": sum(scheduler.num_preemptions for scheduler in schedulers),
    }


def load_of(replica: Replica, seconds: float) -> Load:
    """What a server did in so many seconds."""
    steps = max(replica.num_steps, 1)
    return Load(
        replica.name,
        replica.busy / seconds if seconds else 0.0,
        replica.num_rows / steps,
        replica.num_read / steps,
        replica.fullest,
        replica.scheduler.num_preemptions,
    )


def mean(values: list[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)
