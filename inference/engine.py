"""Prompts in, tokens out: one model, its cache, and the loop between host and device. Knows no text.

The only place where inference crosses from host to device. A dispatch is enqueued before the one before it is
fetched, so what the host does with some tokens takes place while the device computes the next.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from inference import steps
from inference.cache import Cache, Prompt
from inference.config import SamplingConfig
from inference.sampling import Knobs, knobs
from inference.steps import CHUNK, Chunk, Cursor, Limits, Program, power_of_two
from model.config import ModelConfig
from model.parameters import Parameters
from parallel import hosts
from parallel.config import AxisRules

PIECE = 512  # tokens of a prompt read at once, at most
SMALLEST_PIECE = 32
PATIENCE = 0.25  # seconds that a dispatch may take before the next ones grow no more


class Row(NamedTuple):
    """One answer to compute."""

    prompt: Prompt
    sampling: SamplingConfig
    budget: int  # tokens it may choose, at least 1


class Tokens(NamedTuple):
    """New tokens of one row, with their log-probabilities under the model."""

    tokens: list[int]
    logprobs: list[float]


class Engine:
    """Continues rows of tokens with one model. What the cache still holds of a prompt is not read again."""

    def __init__(self, config: ModelConfig, parameters: Parameters, mesh: Mesh, rules: AxisRules, *, num_tokens: int):
        self.parameters = parameters
        self.program = Program(config, mesh, rules, num_tokens)
        self.cache = Cache(self.program)
        self.num_read = 0  # tokens that the last prompts cost
        self._stopped = np.zeros(0, bool)

    def stream(self, rows: Sequence[Row], end_ids: Sequence[int]) -> Iterator[list[Tokens]]:
        """Every row's new tokens as they come, end tokens included, till all rows have ended. May be closed early."""
        prompts = [row.prompt for row in rows]
        unique = list(dict.fromkeys(prompts))
        logits, _ = self._read(unique, room=max(len(row.prompt) + row.budget for row in rows))
        if unique != prompts:
            source = self._padded([unique.index(prompt) for prompt in prompts], 0)
            logits = self.cache.spread(logits, self._put(np.asarray(source, np.int32)), source)
        yield from self._decode(rows, logits, end_ids)

    def stop(self, row: int) -> None:
        """End a row of the running stream, as if it had chosen an end token."""
        self._stopped[row] = True

    def logprobs(self, texts: Sequence[Prompt]) -> list[list[float]]:
        """For each text, log p of every token but the first, given those before it."""
        _, pieces = self._read(texts, room=0, scored=True)
        found = np.concatenate(jax.device_get(pieces), axis=1)
        return [row[: len(text) - 1].tolist() for row, text in zip(found, texts, strict=False)]

    def _read(self, prompts: Sequence[Prompt], *, room: int, scored: bool = False) -> tuple[jax.Array, list[jax.Array]]:
        """Bring the cache to these prompts; -> next-token logits and, if scored, log p of what follows each token."""
        prompts = self._padded(prompts, (0,))
        start = [0] * len(prompts) if scored else self.cache.common(prompts)
        left = [len(prompt) - at for prompt, at in zip(prompts, start, strict=True)]
        widths = piece_widths(max(left))
        memory = self.cache.take(len(prompts), max(room, max(start) + sum(widths)))
        logits: Any = self._put(np.zeros((len(prompts), self.program.config.vocab_size), np.float32))
        scores = []
        for done, width in zip(np.cumsum([0, *widths]), widths, strict=False):
            at = np.asarray(start, np.int32) + np.int32(done)
            tokens = cut(prompts, at, width + 1)
            put = self._put((tokens[:, :-1], at, np.asarray(left, np.int32) - np.int32(done)))
            logits, hidden, memory = steps.prefill(
                self.parameters, *put, logits, memory, program=self.program, begins=not at.any()
            )
            if scored:
                targets = self._put(tokens[:, 1:])
                scores.append(steps.target_logprobs(self.parameters, hidden, targets, program=self.program))
        self.cache.give(memory, prompts)
        self.num_read = sum(left)
        return logits, scores

    def _decode(self, rows: Sequence[Row], logits: jax.Array, end_ids: Sequence[int]) -> Iterator[list[Tokens]]:
        """Enqueue the next dispatch, then fetch and hand out the one before it, till every row has ended."""
        answers = [Answer(row, end_ids) for row in self._padded(rows, IDLE)]
        running, pending = self._first(answers, logits, end_ids)
        self._stopped = np.asarray([answer.ended for answer in answers])
        count, left, pace = 1, max(row.budget for row in rows) - 1, Pace()
        while count:
            further = 0 if self._stopped.all() else min(pace.steps, left)
            running, ahead = self._further(running, further) if further else (running, pending)
            fetched = jax.device_get(pending)
            pace.saw(count)
            columns = zip(answers, *fetched, strict=True)
            new = [answer.take(tokens[:count], logprobs[:count]) for answer, tokens, logprobs in columns]
            self.cache.held = [answer.held for answer in answers]
            self._stopped |= np.asarray([answer.ended for answer in answers])
            yield new[: len(rows)]
            pending, count, left = ahead, 0 if self._stopped.all() else further, left - further

    def _first(self, answers: "list[Answer]", logits: jax.Array, end_ids: Sequence[int]) -> "tuple[Running, Chunk]":
        """Put what the rows ask for on the device and choose their first tokens."""
        ids = np.arange(self.program.config.vocab_size)
        rows = [answer.row for answer in answers]
        seen = np.stack([np.isin(ids, row.prompt) for row in rows])
        position = np.asarray([len(row.prompt) for row in rows], np.int32)
        budget = np.asarray([row.budget for row in rows], np.int32)
        limits = Limits(*self._put((np.isin(ids, list(end_ids)), budget)))
        seen, position, settings = self._put((seen, position, knobs([row.sampling for row in rows])))
        cursor, chunk = steps.first(logits, seen, position, limits, settings, program=self.program)
        return Running(cursor, limits, settings), chunk

    def _further(self, running: "Running", count: int) -> "tuple[Running, Chunk]":
        """Enqueue `count` more tokens."""
        held = self.cache.held
        memory = self.cache.take(len(held), 0)
        put = self._put((self._stopped.copy(), np.asarray(count, np.int32)))  # a device may alias host memory
        cursor, memory, chunk = steps.decode(
            self.parameters, running.cursor, memory, running.limits, running.knobs, *put, program=self.program
        )
        self.cache.give(memory, held)
        return running._replace(cursor=cursor), chunk

    def _padded(self, rows: Sequence, idle) -> list:
        """Rows for a whole batch."""
        return [*rows, *[idle] * (self.program.batch(len(rows)) - len(rows))]

    def _put(self, host: Any) -> Any:
        """Host arrays on every device of the mesh."""
        return jax.device_put(host, NamedSharding(self.program.mesh, P()))


class Running(NamedTuple):
    """What is on the device between two dispatches, beside the cache."""

    cursor: Cursor
    limits: Limits
    knobs: Knobs


class Answer:
    """What the host knows of a row: its tokens so far and whether more can come."""

    def __init__(self, row: Row, end_ids: Sequence[int]):
        self.row, self.tokens, self.end_ids = row, [], frozenset(end_ids)
        self.ended = row.budget <= 0

    def take(self, tokens: np.ndarray, logprobs: np.ndarray) -> Tokens:
        """The part of a dispatch that belongs to the answer: up to its end."""
        new = Tokens([], [])
        for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            if self.ended:
                break
            if not math.isfinite(logprob):
                raise ValueError(
                    f"the model gives token {token} the log-probability {logprob} after {len(self.tokens)} tokens; "
                    "its weights are damaged, or too large for compute_dtype"
                )
            for had, more in zip((*new, self.tokens), (token, logprob, token), strict=True):
                had.append(more)
            self.ended = token in self.end_ids or len(self.tokens) >= self.row.budget
        return new

    @property
    def held(self) -> Prompt:
        """What surely stands in the cache: all but the last token, which the next step writes."""
        return (*self.row.prompt, *self.tokens[:-1])


class Pace:
    """Tokens a dispatch: from one on, doubled as long as a reader would not notice that they come together.

    Of several processes each has a clock of its own, and all must dispatch alike: they double without looking at it.
    """

    def __init__(self):
        self.steps, self._last = 1, time.perf_counter()

    def saw(self, count: int) -> None:
        """A dispatch of `count` tokens has arrived."""
        now = time.perf_counter()
        is_quick = now - self._last < PATIENCE or hosts.count() > 1
        self.steps = min(CHUNK, 2 * count) if is_quick else max(1, count // 2)
        self._last = now


IDLE = Row((0,), SamplingConfig(temperature=0.0), 0)  # fills a batch up; ended from the start


def piece_widths(length: int) -> list[int]:
    """How a prompt is cut: whole pieces, then the rest in a power of two.  1100 -> [512, 512, 128]"""
    rest = length % PIECE
    return [PIECE] * (length // PIECE) + ([max(power_of_two(rest), SMALLEST_PIECE)] if rest else [])


def cut(prompts: Sequence[Prompt], at: np.ndarray, width: int) -> np.ndarray:
    """`width` tokens of each prompt from its position on, zeros after its end."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt, start in zip(tokens, prompts, at.tolist(), strict=True):
        part = prompt[start : start + width]
        row[: len(part)] = part
    return tokens
