"""An engine whose steps take as long as they are said to: the real scheduler and blocks, no device. Knows no clock.

As the engine does it, a step is planned while the one before it runs, and its tokens are told when it has ended.
"""

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

from inference.blocks import block_names
from inference.request import Finish, Request
from inference.scheduler import Kind, Limits, Plan, Scheduler, Work

AHEAD = 2  # steps that an engine has handed to its device: the one that runs, and the next


class Part(NamedTuple):
    """Consecutive tokens of one prompt."""

    start: int  # tokens before them
    tokens: int


class Step(NamedTuple):
    """What takes time in a step."""

    contexts: tuple[int, ...]  # of each answer that goes on: tokens that its next one sees, its own included
    parts: tuple[Part, ...]  # of prompts


Seconds = Callable[[Step], float]  # that a step takes


class Told(NamedTuple):
    """What a step gave one request."""

    id: int
    tokens: list[int]
    finish: Finish | None


class Pending(NamedTuple):
    """A step that is on its way."""

    plan: Plan
    end: float  # seconds


class Replica:
    """One server's engine. Times are the caller's; they must not go back."""

    def __init__(self, name: str, kinds: Sequence[Kind], limits: Limits, *, reuse: bool, seconds: Seconds):
        self.name, self._seconds = name, seconds
        self.scheduler = Scheduler(kinds, limits, reuse=reuse)
        self._pending: collections.deque[Pending] = collections.deque()
        self._free = 0.0  # when its device has done all that it was given
        self.busy = 0.0  # seconds that its device computed
        self.num_steps = self.num_rows = self.num_read = 0  # steps; tokens of answers and of prompts in them
        self.fullest = 0.0  # the largest share of the cache that requests held

    def add(self, request: Request) -> int:
        """Let a request wait for its turn; ValueError where its turn can never come."""
        return self.scheduler.add(request).id

    def enqueue(self, now: float) -> None:
        """Plan as many steps as the device is given ahead."""
        while len(self._pending) < AHEAD:
            plan = self.scheduler.next()
            if not plan.rows and not plan.tiles:
                return
            step = step_of(plan)
            seconds = self._seconds(step)
            self._free = max(now, self._free) + seconds
            self._pending.append(Pending(plan, self._free))
            self.busy += seconds
            self.num_steps += 1
            self.num_rows += len(step.contexts)
            self.num_read += sum(part.tokens for part in step.parts)
            self.fullest = max(self.fullest, self._held)

    @property
    def end(self) -> float | None:
        """When the first step that is on its way ends; None where none is."""
        return self._pending[0].end if self._pending else None

    def fetch(self) -> list[Told]:
        """What the first step on its way has given."""
        plan, told = self._pending.popleft().plan, []
        for work in (*plan.rows, *plan.tiles):
            if work.chooses and work.sequence.finish is None:
                tokens = self.scheduler.commit(work, [token_of(work)])
                told.append(Told(work.sequence.id, tokens, work.sequence.finish))
        return told

    def known(self, prompt: Sequence[int], salt: str) -> int:
        """Full blocks at the beginning of a prompt that the cache has, of the one kind of layers."""
        (pool,), count = self.scheduler.pools.values(), 0
        for name in block_names(prompt, self.scheduler.limits.block_size, salt=salt):
            if pool.find(name) is None:
                break
            count += 1
        return count

    def take_in(self, prompt: Sequence[int], salt: str) -> int:
        """Keep a prompt's full blocks as if a request had computed them; -> how many were new, as far as there is room.

        As Engine.import_blocks.
        """
        (pool,) = self.scheduler.pools.values()
        names = block_names(prompt, self.scheduler.limits.block_size, salt=salt)
        new = [name for name in names if pool.find(name) is None][: pool.num_available]
        blocks = [pool.take() for _ in new]
        for block, name in zip(blocks, new, strict=True):
            pool.name(block, name)
            pool.release(block)
        return len(new)

    @property
    def _held(self) -> float:
        pools = self.scheduler.pools.values()
        return max(pool.num_used / max(pool.num_blocks - 1, 1) for pool in pools)


def step_of(plan: Plan) -> Step:
    """A plan as what takes time in it."""
    parts: dict[int, Part] = {}
    for work in plan.tiles:
        part = parts.get(work.sequence.id, Part(work.start, 0))
        parts[work.sequence.id] = part._replace(tokens=part.tokens + len(work.tokens))
    return Step(tuple(work.start + 1 for work in plan.rows), tuple(parts.values()))


def token_of(work: Work) -> int:
    """Some token that hardly any other answer has at this place: texts that differ share no blocks."""
    return (work.sequence.id * 7919 + work.index * 104729) % (2**31 - 1)
