"""Requests in, tokens out: the border between the scheduler, which is the host's, and the device. Knows no text.

A step is enqueued before the tokens of the one before it are fetched, so what the host does with these takes place
while the device computes; the tokens themselves stay there. Only guesses and grammars need them on the host first.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from inference import sampling, speculative, steps
from inference.blocks import NOBODY, block_names
from inference.config import EngineConfig
from inference.drafting import Draft, check_draft, draft
from inference.request import EngineStats, Output, Prompt, Request, TopToken
from inference.room import kinds_of, limits_of
from inference.scheduler import Plan, Scheduler, SequenceState, Work
from inference.steps import Batch, Program, Shape, power_of_two
from model.config import ModelConfig, with_kernels
from model.parameters import Parameters
from parallel.config import AxisRules

SHORTEST = 32  # tokens that a text is padded to, at least


class Pending(NamedTuple):
    """A step that is on its way."""

    plan: Plan
    shape: Shape
    choice: sampling.Choice
    is_taken: jax.Array


class Exported(NamedTuple):
    """Blocks of the cache outside of it: what a prompt begins with, computed elsewhere."""

    names: list[bytes]
    contents: Any  # as Engine's pools, [n, K, Z, H] each, numpy; None where there is no block


class Engine:
    """Answers requests with one model, many at a time. To be called by one thread only."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        mesh: Mesh,
        rules: AxisRules,
        *,
        num_tokens: int,
        options: EngineConfig,
        draft: Draft | None = None,
    ):
        platform = mesh.devices.flat[0].platform
        config = with_kernels(config, platform)
        self.parameters, self.options = parameters, options
        self.program = Program(config, mesh, rules, num_tokens)
        limits, kinds = limits_of(config, options), kinds_of(config, options)
        self.max_length = limits.max_length
        guesses = guesses_of(options, draft)
        self.scheduler = Scheduler(kinds, limits, reuse=options.prefix_cache, guesses=guesses)
        self._num_blocks = {kind.name: kind.num_blocks for kind in kinds}
        self._slots = jax.jit(
            functools.partial(sampling.empty_slots, options.max_rows, config.vocab_size), out_shardings=self._whole
        )()
        self._pools = self._empty_pools(self.program)
        self._drafting: tuple[Program, Parameters] | None = None
        if draft is not None:
            check_draft(draft.config, config, max_length=self.max_length)
            self._drafting = self.program._replace(config=with_kernels(draft.config, platform)), draft.parameters
            self._draft_pools = self._empty_pools(self._drafting[0])
        self._pending: Pending | None = None
        self._told: list[Output] = []  # that the next step tells beside its own
        self._num_steps = self._num_generated = 0

    def add(self, request: Request) -> int:
        """Let a request wait for its turn; ValueError where it can never be answered."""
        foreign = [token for token, _ in request.sampling.logit_bias if token >= self.program.num_tokens]
        if foreign:
            raise ValueError(
                f"sampling.logit_bias names token {foreign[0]} but the model has {self.program.num_tokens}; "
                "leave it out"
            )
        return self.scheduler.add(request).id

    def cancel(self, id: int) -> None:
        """End a request, if it has not ended yet; the next step tells so."""
        if self.scheduler.cancel(id) is not None:
            self._told.append(Output(id, [], [], [], "cancelled"))

    def fork(self, children: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """Held beams go on with these tokens instead of the one that each has chosen last; those without any end.

        -> of each that goes on, the ids of what came of it. They share blocks, but for the one that each writes next.
        """
        forked = self.scheduler.fork(children)
        most = max(map(len, forked.copies.values()))
        if most:
            blocks = {kind: np.full((2, power_of_two(most)), NOBODY, np.int32) for kind in forked.copies}
            for kind, copies in forked.copies.items():
                blocks[kind][:, : len(copies)] = np.asarray(copies, np.int32).reshape(-1, 2).T
            copies = self._put(tuple({kind: both[i] for kind, both in blocks.items()} for i in range(2)))
            self._pools = steps.copy_blocks(self._pools, *copies, program=self.program)
            if self._drafting is not None:
                self._draft_pools = steps.copy_blocks(self._draft_pools, *copies, program=self._drafting[0])
        for sequence in forked.running:
            self._fill(sequence)
        return forked.ids

    @property
    def has_work(self) -> bool:
        """Whether another step would do something."""
        return bool(self._pending or self._told or self.scheduler.waiting or self.scheduler.running)

    def step(self) -> list[Output]:
        """Enqueue the next step, then fetch the one before it; -> what has come of each request."""
        plan = self.scheduler.next()
        ahead = self._enqueue(plan) if plan.rows or plan.tiles else None
        told, self._told = self._told, []
        if self._pending is not None:
            told += self._fetch(self._pending)
        self._pending = ahead
        if ahead is not None and self.scheduler.guesses is not None:  # guesses go on from what was chosen
            told += self._fetch(ahead)
            self._pending = None
        return told

    def run(self, requests: Sequence[Request]) -> Iterator[list[Output]]:
        """Answer these requests and whatever else is there; outputs have their places among the requests as ids."""
        places = {self.add(request): place for place, request in enumerate(requests)}
        while places:
            outputs = [output for output in self.step() if output.id in places]
            yield [output._replace(id=places[output.id]) for output in outputs]
            for output in outputs:
                if output.finish is not None:
                    del places[output.id]

    def stats(self) -> EngineStats:
        """What the engine holds and has done."""
        scheduler, pools = self.scheduler, self.scheduler.pools.values()
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            blocks=sum(pool.num_blocks - 1 for pool in pools),
            blocks_used=sum(pool.num_used for pool in pools),
            blocks_cached=sum(pool.num_cached for pool in pools),
            steps=self._num_steps,
            prompt_tokens=scheduler.num_prompt,
            cached_tokens=scheduler.num_cached,
            generated_tokens=self._num_generated,
            preemptions=scheduler.num_preemptions,
            drafted=scheduler.num_drafted,
            accepted=scheduler.num_accepted,
            finished=scheduler.num_finished,
        )

    def shapes(self) -> list[Shape]:
        """Every shape that a step can have."""
        limits, width = self.scheduler.limits, self._width
        if self.options.one_shape:
            return [Shape(power_of_two(limits.max_rows), width, self._tile_counts[-1])]
        rows, tiles = powers_to(limits.max_rows), self._tile_counts
        widths = [width] if self._drafting else sorted({1, width})
        return [
            *(Shape(count, w, 0) for count in rows for w in widths),
            *(Shape(count, w, many) for count, w in {(0, 1), *((rows[-1], w) for w in widths)} for many in tiles),
        ]

    def warm_up(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Compile all that serving needs: afterwards nothing is compiled."""
        assert not self.has_work, "warm up before the first request"
        shapes = self.shapes()
        for number, shape in enumerate(shapes, 1):
            start = time.perf_counter()
            self._run(shape, self._batch(Plan([], [], []), shape))
            jax.block_until_ready(self._slots)
            say(f"shape {number}/{len(shapes)}  {shape}  {time.perf_counter() - start:.1f} s")
        for length in self._admission_lengths():
            request = Request(prompt=(0,), sampling=sampling.SamplingConfig(temperature=0.0), max_tokens=1)
            self._admit(self.options.max_rows, request, [], slots=length)
        self._allow([])

    def logprobs(self, texts: Sequence[Prompt]) -> list[list[float]]:
        """For each text, log p of every token but the first, given those before it."""
        length = max(power_of_two(max(map(len, texts)) - 1), SHORTEST)
        tokens = padded(texts, rows=power_of_two(len(texts)), length=length + 1)
        found = jax.device_get(steps.score(self.parameters, self._put(tokens), program=self.program))
        return [row[: len(text) - 1].tolist() for row, text in zip(found, texts, strict=False)]

    def embed(self, texts: Sequence[Prompt]) -> np.ndarray:
        """[n, D]: each text's mean final hidden state, of length one."""
        length = max(power_of_two(max(map(len, texts))), SHORTEST)
        tokens = padded(texts, rows=power_of_two(len(texts)), length=length)
        lengths = np.zeros(len(tokens), np.int32)
        lengths[: len(texts)] = [len(text) for text in texts]
        found = steps.embed(self.parameters, *self._put((tokens, lengths)), program=self.program)
        return np.asarray(jax.device_get(found))[: len(texts)]

    def known_blocks(self, tokens: Prompt, salt: str = "") -> list[int]:
        """The full blocks that the cache has of this beginning. Models with several kinds of layers give none."""
        pool, *more = self.scheduler.pools.values()
        names = () if more else block_names(tokens, self.options.block_size, salt=salt)
        found = (pool.find(name) for name in names)
        return [block for block in itertools.takewhile(lambda block: block is not None, found) if block is not None]

    def block_shapes(self) -> Any:
        """One exported block as shapes: what `Exported.contents` is made of."""
        return jax.eval_shape(steps.read_blocks, self._pools, jax.ShapeDtypeStruct((1,), np.int32))

    def export_blocks(self, tokens: Prompt, salt: str = "", *, start: int = 0, most: int | None = None) -> Exported:
        """What the cache has of this beginning, from block `start` on."""
        blocks = self.known_blocks(tokens, salt)[start:][:most]
        if not blocks:
            return Exported([], None)
        names = block_names(tokens, self.options.block_size, salt=salt)
        index = np.full(power_of_two(len(blocks)), NOBODY, np.int32)
        index[: len(blocks)] = blocks
        contents = jax.device_get(steps.read_blocks(self._pools, self._put(index)))
        some = lambda axis, pool: np.take(pool, np.arange(len(blocks)), axis=axis)  # noqa: E731
        return Exported(list(itertools.islice(names, start, start + len(blocks))), steps.over_blocks(some, contents))

    def import_blocks(self, exported: "Exported") -> int:
        """Keep these blocks as if a request had computed them; -> how many were new. Where there is no room, fewer."""
        pool, *more = self.scheduler.pools.values()
        new = [place for place, name in enumerate(exported.names) if pool.find(name) is None]
        new = [] if more or not pool.reuse else new[: pool.num_available]
        if not new:
            return 0
        size = power_of_two(len(new))
        blocks, places = np.full(size, NOBODY, np.int32), np.zeros(size, np.int32)
        for i, place in enumerate(new):
            blocks[i], places[i] = pool.take(), place
        contents = steps.over_blocks(lambda axis, pool: np.take(pool, places, axis=axis), exported.contents)
        self._pools = steps.write_blocks(self._pools, *self._put((blocks, contents)))
        for block, place in zip(blocks.tolist(), new, strict=False):
            pool.name(block, exported.names[place])
            pool.release(block)
        return len(new)

    @property
    def _width(self) -> int:
        return 1 + (0 if self.options.speculation == "off" else self.options.draft_length)

    @property
    def _tile_counts(self) -> list[int]:
        """How many tiles a step can have: every other power of two, so that few shapes are compiled."""
        return powers_to(self.scheduler.limits.max_tiles)[::-2][::-1]

    @property
    def _whole(self) -> NamedSharding:
        """On every device of the mesh."""
        return NamedSharding(self.program.mesh, P())

    def _put(self, host: Any) -> Any:
        """Host arrays on every device of the mesh."""
        return jax.device_put(host, self._whole)

    def _enqueue(self, plan: Plan) -> Pending:
        """Hand the plan to the device, rows in the order of their lengths: ops/paged_reference.py gains from it."""
        plan.rows.sort(key=lambda work: work.start)
        for sequence in plan.admitted:
            self._fill(sequence)
        constrained = [
            work.sequence for work in (*plan.rows, *plan.tiles) if work.chooses and work.sequence.request.constraint
        ]
        if constrained:
            self._allow(constrained)
        shape = self._shape(plan)
        stepped = self._run(shape, self._batch(plan, shape))
        self._num_steps += 1
        return Pending(plan, shape, stepped.choice, stepped.is_taken)

    def _empty_pools(self, program: Program) -> Any:
        options = self.options
        return steps.empty_pools(program, self._num_blocks, options.block_size, int8=options.kv_dtype == "int8")

    def _run(self, shape: Shape, batch: Batch) -> steps.Stepped:
        batch = self._put(batch)
        if self._drafting is not None:
            program, parameters = self._drafting
            tokens, self._draft_pools = draft(
                parameters, self._slots, self._draft_pools, batch, program=program, shape=shape
            )
            batch = batch._replace(tokens=tokens)
        stepped = steps.step(self.parameters, self._slots, self._pools, batch, program=self.program, shape=shape)
        self._slots, self._pools = stepped.slots, stepped.pools
        return stepped

    def _shape(self, plan: Plan) -> Shape:
        """The smallest of the shapes that holds the plan."""
        if self.options.one_shape:
            return self.shapes()[0]
        width = self._width if self._drafting or any(work.num_drafts for work in plan.rows) else 1
        rows = power_of_two(len(plan.rows)) if plan.rows else 0
        if not plan.tiles:
            return Shape(min(rows, power_of_two(self.options.max_rows)), width, 0)
        rows = power_of_two(self.options.max_rows) if rows else 0
        return Shape(rows, width if rows else 1, next(count for count in self._tile_counts if count >= len(plan.tiles)))

    def _batch(self, plan: Plan, shape: Shape) -> Batch:
        """The plan as arrays; what nobody uses belongs to the slot for padding."""
        limits, num = self.scheduler.limits, shape.rows + shape.tiles
        batch = Batch(
            tokens=filled(len(shape.owners), 0),
            slots=filled(num, limits.max_rows),
            positions=filled(num, 0),
            lengths=filled(num, 0),
            index=filled(num, 0),
            chooses=filled(num, False),
            tables={
                kind.name: filled((num, -(-limits.max_length // limits.block_size)), NOBODY)
                for kind in self.scheduler.kinds
            },
        )
        starts = shape.starts
        placed = [*enumerate(plan.rows), *enumerate(plan.tiles, shape.rows)]
        for row, work in placed:
            tokens = work.tokens or [-1]
            batch.tokens[starts[row] : starts[row] + len(tokens)] = tokens
            batch.slots[row] = work.sequence.slot
            batch.positions[row], batch.lengths[row] = work.start, len(tokens)
            batch.index[row], batch.chooses[row] = work.index, work.chooses
            for kind, blocks in work.sequence.blocks.items():
                batch.tables[kind][row, : len(blocks)] = blocks
        return batch

    def _admission_lengths(self) -> list[int]:
        """Lengths that a prompt is padded to when its slot is filled."""
        *some, most = [length for length in powers_to(max(self.max_length, SHORTEST)) if length >= SHORTEST]
        return [*some[::2], most]

    def _fill(self, sequence: SequenceState) -> None:
        """Fill a sequence's slot."""
        length = next(length for length in self._admission_lengths() if length >= len(sequence.tokens))
        self._admit(sequence.slot, sequence.request, sequence.answer, slots=length)

    def _admit(self, slot: int | None, request: Request, answer: list[int], *, slots: int) -> None:
        """Fill a slot."""
        told = sampling.admission(request, answer, slots=slots)
        self._slots = admit(self._slots, *self._put((np.asarray(slot, np.int32), told)))

    def _allow(self, sequences: Sequence[SequenceState]) -> None:
        """Tell what grammars allow next."""
        limits, words = self.scheduler.limits, -(-self.program.config.vocab_size // 32)
        slots = np.full(limits.max_rows, limits.max_rows + 1, np.int32)
        bits = np.zeros((limits.max_rows, words), np.uint32)
        for row, sequence in enumerate(sequences):
            assert sequence.request.constraint is not None
            allowed = sequence.request.constraint.allowed()
            assert sequence.slot is not None
            slots[row], bits[row, : len(allowed)] = sequence.slot, allowed
        self._slots = allow(self._slots, *self._put((slots, bits)))

    def _fetch(self, pending: Pending) -> list[Output]:
        """Wait for a step and hand out its tokens."""
        works = [*enumerate(pending.plan.rows), *enumerate(pending.plan.tiles, pending.shape.rows)]
        choosing = [(row, work) for row, work in works if work.chooses]
        if not choosing:
            return []
        tokens, logprobs, is_taken = jax.device_get((pending.choice.tokens, pending.choice.logprobs, pending.is_taken))
        asks = any(work.sequence.request.num_top for _, work in choosing)
        top = jax.device_get((pending.choice.top_tokens, pending.choice.top_logprobs)) if asks else None
        told = []
        for row, work in choosing:
            if work.sequence.finish is not None:
                continue
            W, rows = pending.shape.width, pending.shape.rows
            places = range(row * W, (row + 1) * W) if row < rows else [rows * W + row - rows]
            places = [place for place in places if is_taken[place]]
            told.append(self._tell(work, places, tokens, logprobs, top))
        return told

    def _tell(self, work: Work, places: list[int], tokens, logprobs, top) -> Output:
        """What a step gave one request."""
        sequence = work.sequence
        damaged = next((place for place in places if not math.isfinite(logprobs[place])), None)
        if damaged is not None:
            self.scheduler.end(sequence, "error")
            why = (
                f"the model gives token {tokens[damaged]} the log-probability {logprobs[damaged]} after "
                f"{len(sequence.answer)} tokens; its weights are damaged, or too large for compute_dtype"
            )
            return Output(sequence.id, [], [], [], "error", why)
        new = self.scheduler.commit(work, [int(tokens[place]) for place in places])
        self._num_generated += len(new)
        places, count = places[: len(new)], sequence.request.num_top
        tops = [likeliest(top, place, count) for place in places] if count else []
        self._advance_grammar(sequence, new)
        return Output(sequence.id, new, [float(logprobs[place]) for place in places], tops, sequence.finish)

    def _advance_grammar(self, sequence: SequenceState, new: Sequence[int]) -> None:
        """Let the request's grammar follow; it may end the answer."""
        grammar = sequence.request.constraint
        if grammar is None or sequence.finish is not None:
            return
        for token in new:
            grammar.take(token)
        if grammar.has_ended:
            self.scheduler.end(sequence, "stop")


def filled(shape: int | tuple[int, int], value: int | bool) -> Any:
    """An array on the host."""
    return np.full(shape, value, np.bool_ if isinstance(value, bool) else np.int32)


def likeliest(top: tuple[np.ndarray, np.ndarray], place: int, count: int) -> list[TopToken]:
    """The tokens that a request asked for, of one choice."""
    tokens, logprobs = top[0][place, :count].tolist(), top[1][place, :count].tolist()
    return [TopToken(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]


admit = jax.jit(sampling.admit, donate_argnames="slots")
allow = jax.jit(sampling.allow, donate_argnames="slots")


def guesses_of(options: EngineConfig, draft: Draft | None) -> speculative.TextGuesses | speculative.ModelGuesses | None:
    """Who guesses; ValueError where the model that shall is missing, or is given for nothing."""
    if (options.speculation == "draft") != (draft is not None):
        raise ValueError(
            f"engine.speculation={options.speculation} and a draft model is {'given' if draft else 'missing'}; "
            "the two go together"
        )
    kinds = {"off": None, "ngram": speculative.TextGuesses, "draft": speculative.ModelGuesses}
    make = kinds[options.speculation]
    return None if make is None else make(options.draft_length)


def powers_to(most: int) -> list[int]:
    """Powers of two up to the first that is at least `most`.  6 -> [1, 2, 4, 8]"""
    return [1 << i for i in range(power_of_two(most).bit_length())]


def padded(texts: Sequence[Prompt], *, rows: int, length: int) -> np.ndarray:
    """Texts as rows of one length, zeros behind them."""
    tokens = np.zeros((rows, length), np.int32)
    for row, text in zip(tokens, texts, strict=False):
        row[: len(text)] = text
    return tokens
