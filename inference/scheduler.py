"""Who takes part in the next step, and who gets which blocks: plain Python. Knows no arrays, no model and no text.

Continuous batching (Orca, OSDI 2022, section 4.1): before every step each running sequence gets the one token it is
at, or a chunk of its prompt (Sarathi, arXiv:2308.16369), and those that wait are let in where there is room. Where
blocks run out, the sequence that stands last gives its own back and computes them again later. A step is planned before
the tokens of the one before it are known: what a sequence has chosen but not told yet is `in_flight`.
"""

import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from inference.blocks import NOBODY, BlockPool, Copy, OutOfBlocks, block_names
from inference.request import Finish, Request

TURNS = 64  # a request of priority p lets at most so many times p later ones go first


class Kind(NamedTuple):
    """A kind of layers, whose blocks are counted together."""

    name: str
    window: int | None  # tokens that a query sees, its own included; None is all
    num_blocks: int  # P


class Limits(NamedTuple):
    """What one step can hold."""

    max_rows: int  # R, sequences
    block_size: int  # Z
    tile: int  # Q, prompt tokens of one sequence that stand together
    max_tiles: int
    max_length: int  # tokens of a sequence


class SequenceState:
    """What the host knows of one request on its way."""

    def __init__(self, id: int, request: Request, room: int):
        self.id, self.request = id, request
        self.rank = (id + TURNS * request.priority, id)
        self.tokens = list(request.prompt)  # and the answer, as far as it has been fetched
        self.budget = min(request.max_tokens, room)  # tokens it may choose
        self.in_flight = 0  # tokens chosen by steps that have not been fetched
        self.is_held = False  # until someone tells how it goes on
        self.computed = 0  # tokens whose keys and values stand in its blocks once the planned steps have run
        self.slot: int | None = None
        self.blocks: dict[str, list[int]] = {}  # by kind
        self.names: list[bytes] = []  # of its full blocks
        self.num_named = 0  # blocks that bear theirs
        self.finish: Finish | None = None

    @property
    def length(self) -> int:
        """Tokens, those in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def num_chosen(self) -> int:
        """Tokens of the answer, those in flight included."""
        return self.length - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be chosen; 0 where the answer is complete but for fetching."""
        return self.length - self.computed if self.num_chosen < self.budget else 0

    @property
    def answer(self) -> list[int]:
        """Tokens of the answer that are known."""
        return self.tokens[len(self.request.prompt) :]


class Work(NamedTuple):
    """A sequence's part of a step: some consecutive tokens of it."""

    sequence: SequenceState
    start: int  # position of the first
    tokens: list[int]  # empty where there is one token and only the device knows it
    index: int  # place in the answer of the token that is chosen after the first (a row) or the last (a tile)
    chooses: bool  # False in the middle of a prompt
    num_drafts: int = 0  # guesses among the tokens, the last of them


class Forked(NamedTuple):
    """How beams went on."""

    ids: dict[int, list[int]]  # of each beam the ids of what came of it, its own the first
    copies: dict[str, list[Copy]]  # of each kind: blocks to copy before anything else is written
    running: list[SequenceState]  # new ones that got a slot


class Plan(NamedTuple):
    """One step."""

    rows: list[Work]  # a token each, and guesses after it
    tiles: list[Work]  # parts of prompts
    admitted: list[SequenceState]  # that got a slot


@runtime_checkable
class Guesses(Protocol):
    """Whoever guesses tokens ahead."""

    def guess(self, id: int, tokens: Sequence[int]) -> list[int]:
        """Tokens that may come next in the text of that id."""
        ...

    def learn(self, id: int, *, guessed: int, right: int) -> None:
        """How the last guesses went."""
        ...

    def forget(self, id: int) -> None:
        """The text has ended."""
        ...


class Scheduler:
    """The queue, the running sequences in the order of their ranks, and their blocks."""

    def __init__(self, kinds: Sequence[Kind], limits: Limits, *, reuse: bool, guesses: Guesses | None = None):
        self.kinds, self.limits, self.guesses = tuple(kinds), limits, guesses
        self.pools = {kind.name: BlockPool(kind.num_blocks, reuse=reuse) for kind in kinds}
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []
        self.num_preemptions = self.num_prompt = self.num_cached = self.num_finished = 0
        self.num_drafted = self.num_accepted = 0
        self._slots = list(range(limits.max_rows - 1, -1, -1))
        self._sequences: dict[int, SequenceState] = {}
        self._next_id = 0

    def add(self, request: Request) -> SequenceState:
        """Let a request wait for its turn; ValueError where its turn can never come."""
        length, Z = len(request.prompt), self.limits.block_size
        if length < 1 or request.max_tokens < 1:
            raise ValueError(
                f"the prompt has {length} tokens and max_tokens={request.max_tokens}; both must be at least 1"
            )
        if length >= self.limits.max_length:
            raise ValueError(
                f"the prompt is {length} tokens long but a sequence has room for {self.limits.max_length}, its answer "
                f"included; shorten the prompt to at most {self.limits.max_length - 1} tokens"
            )
        sequence = SequenceState(self._next_id, request, self.limits.max_length - length)
        for kind in self.kinds:
            need, room = self._blocks_for(kind, length + sequence.budget), kind.num_blocks - 1
            if need > room:
                raise ValueError(
                    f"the prompt and its answer need {need} blocks of {Z} tokens but the KV cache has {room}; "
                    f"ask for fewer than {request.max_tokens} tokens, or give the engine more cache_tokens"
                )
        self._next_id += 1
        self._sequences[sequence.id] = sequence
        bisect.insort(self.waiting, sequence, key=by_rank)
        return sequence

    def cancel(self, id: int) -> SequenceState | None:
        """End a request and free what it holds; -> None where it has ended already."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self.end(sequence, "cancelled")
        return sequence

    def next(self) -> Plan:
        """Plan a step over all that can go on."""
        plan, self._is_full = Plan([], [], []), False
        for sequence in self.running:
            self._leave_window(sequence)
        for sequence in tuple(self.running):
            if sequence.slot is not None:  # else a sequence before it took its blocks
                self._continue(sequence, plan)
        while self.waiting and not self._is_full and self._slots and len(plan.tiles) < self.limits.max_tiles:
            first = next((sequence for sequence in self.waiting if not sequence.is_held), None)
            if first is None or not self._admit(first, plan):
                break
        return plan

    def fork(self, children: Mapping[int, Sequence[int]]) -> Forked:
        """Held beams go on with these tokens instead of the one that each chose last; those without any end."""
        for id, tokens in children.items():
            if not tokens:
                self.cancel(id)
        forked = Forked({}, {kind.name: [] for kind in self.kinds}, [])
        for id, tokens in children.items():
            if tokens:
                beam = self._sequences[id]
                assert beam.is_held, f"beam {id} has not chosen yet"
                beam.is_held, beam.tokens[-1] = False, tokens[0]
                del beam.names[beam.computed // self.limits.block_size :]  # the token may have been in the last one's
                forked.ids[id] = [id, *(self._twin(beam, token, forked).id for token in tokens[1:])]
        return forked

    def commit(self, work: Work, tokens: Sequence[int]) -> list[int]:
        """The step has run and chose these; -> those that belong to the answer, up to its end."""
        sequence = work.sequence
        if sequence.finish is not None:
            return []
        sequence.in_flight -= 1
        if work.num_drafts and self.guesses is not None:
            sequence.computed -= work.num_drafts + 1 - len(tokens)
            self.num_drafted += work.num_drafts
            self.num_accepted += len(tokens) - 1
            self.guesses.learn(sequence.id, guessed=work.num_drafts, right=len(tokens) - 1)
        taken = []
        for token in tokens:
            taken.append(token)
            sequence.tokens.append(token)
            if token in sequence.request.end_ids:
                self.end(sequence, "stop")
                return taken
            if len(sequence.answer) >= sequence.budget:
                self.end(sequence, "length")
                return taken
        sequence.is_held = sequence.request.is_beam
        self._name(sequence)
        return taken

    def end(self, sequence: SequenceState, finish: Finish) -> None:
        """The request is answered, or given up."""
        self._sequences.pop(sequence.id, None)
        if self.guesses is not None:
            self.guesses.forget(sequence.id)
        self._name(sequence)
        if sequence.slot is not None:
            self._vacate(sequence)
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.finish = finish
        self.num_finished += 1

    def _continue(self, sequence: SequenceState, plan: Plan) -> None:
        """Plan what a running sequence can do: one token more, or the next chunk of its prompt."""
        if sequence.is_held:
            return
        if sequence.remaining == 1 and self._is_ready(sequence):
            drafts = self._guessed(sequence)
            if self._grow(sequence, sequence.computed + 1 + len(drafts)):
                self._plan_row(sequence, drafts, plan)
        elif sequence.remaining > 1:
            room = (self.limits.max_tiles - len(plan.tiles)) * self.limits.tile
            count = min(room, sequence.remaining)
            if count and self._grow(sequence, sequence.computed + count):
                self._plan_tiles(sequence, count, plan)

    def _is_ready(self, sequence: SequenceState) -> bool:
        """What a grammar allows, what is guessed and how a beam goes on depends on all tokens before."""
        return not sequence.in_flight or (self.guesses is None and not needs_host(sequence.request))

    def _guessed(self, sequence: SequenceState) -> list[int]:
        """Tokens to try; a grammar would have to follow each of them, so there are none."""
        room = sequence.budget - sequence.num_chosen - 1
        if self.guesses is None or needs_host(sequence.request) or room < 1:
            return []
        return self.guesses.guess(sequence.id, sequence.tokens)[:room]

    def _plan_row(self, sequence: SequenceState, drafts: list[int], plan: Plan) -> None:
        start = sequence.computed
        known = sequence.tokens[start : start + 1]
        plan.rows.append(Work(sequence, start, known + drafts, sequence.num_chosen, True, len(drafts)))
        sequence.computed += 1 + len(drafts)
        sequence.in_flight += 1

    def _plan_tiles(self, sequence: SequenceState, count: int, plan: Plan) -> None:
        """`count` tokens, cut into tiles. Whoever comes after finds the blocks that these fill."""
        end, index = sequence.computed + count, sequence.num_chosen
        for start in range(sequence.computed, end, self.limits.tile):
            tokens = sequence.tokens[start : min(start + self.limits.tile, end)]
            chooses = start + len(tokens) == sequence.length
            plan.tiles.append(Work(sequence, start, tokens, index, chooses))
        sequence.computed = end
        self._name(sequence)
        sequence.in_flight += end == sequence.length

    def _admit(self, sequence: SequenceState, plan: Plan) -> bool:
        """Give a waiting sequence a slot and plan its first chunk; False where there is no room for all of it yet."""
        if sequence.in_flight:  # it gave its blocks back while a token of it was on the way
            return False
        self._find(sequence)
        spare = len(self.running)  # each of those that run may soon need one more
        for kind in self.kinds:
            lacking = self._blocks_for(kind, sequence.length) - len(sequence.blocks[kind.name])
            if max(lacking, 1) + spare > self.pools[kind.name].num_available:
                self._vacate(sequence)
                return False
        self.waiting.remove(sequence)
        sequence.slot = self._slots.pop()
        if not sequence.num_chosen:
            self.num_prompt += len(sequence.request.prompt)
            self.num_cached += sequence.computed
        bisect.insort(self.running, sequence, key=by_rank)
        plan.admitted.append(sequence)
        self._continue(sequence, plan)
        return True

    def _find(self, sequence: SequenceState) -> None:
        """Hold the blocks of the longest beginning that all pools still have; its last token is always computed."""
        size = self.limits.block_size
        self._extend_names(sequence)
        count = min(len(sequence.names), (sequence.length - 1) // size)
        while count and not all(self._has(kind, sequence.names[:count]) for kind in self.kinds):
            count -= 1
        for kind in self.kinds:
            first, pool = self._first_seen(kind, count * size), self.pools[kind.name]
            found = [pool.find(name) for name in sequence.names[first:count]]
            held = [block for block in found if block is not None]
            for block in held:
                pool.hold(block)
            sequence.blocks[kind.name] = [NOBODY] * min(first, count) + held
        sequence.computed, sequence.num_named = count * size, count

    def _has(self, kind: Kind, names: Sequence[bytes]) -> bool:
        """Whether a sequence that goes on after these blocks finds all that it can see."""
        first = self._first_seen(kind, len(names) * self.limits.block_size)
        return all(self.pools[kind.name].find(name) is not None for name in names[first:])

    def _first_seen(self, kind: Kind, position: int) -> int:
        """The first block that a query at the position sees something of."""
        return 0 if kind.window is None else max(0, position - kind.window + 1) // self.limits.block_size

    def _blocks_for(self, kind: Kind, length: int) -> int:
        """Blocks that a sequence of the length holds at most at one time."""
        size = self.limits.block_size
        need = -(-length // size)
        if kind.window is None:
            return need
        return min(need, -(-(kind.window + self.limits.tile * self.limits.max_tiles) // size) + 1)

    def _grow(self, sequence: SequenceState, length: int) -> bool:
        """Blocks for the first `length` tokens, if need be of sequences that stand later; False: it lost its own."""
        for kind in self.kinds:
            blocks = sequence.blocks[kind.name]
            while len(blocks) * self.limits.block_size < length:
                try:
                    blocks.append(self.pools[kind.name].take())
                except OutOfBlocks:
                    victim = self.running[-1]
                    self._preempt(victim)
                    if victim is sequence:
                        return False
        return True

    def _leave_window(self, sequence: SequenceState) -> None:
        """Give back blocks that no later query sees. Steps that read them have been enqueued before any that writes."""
        for kind in self.kinds:
            blocks = sequence.blocks[kind.name]
            for place in range(min(self._first_seen(kind, sequence.computed), len(blocks)) - 1, -1, -1):
                if blocks[place] == NOBODY:
                    break
                self.pools[kind.name].release(blocks[place])
                blocks[place] = NOBODY

    def _twin(self, beam: SequenceState, token: int, forked: Forked) -> SequenceState:
        """The same beam with another last token: beside it where there is room, else it waits and is computed again."""
        twin = SequenceState(self._next_id, beam.request, beam.budget)
        self._next_id += 1
        self._sequences[twin.id] = twin
        twin.rank, twin.tokens, twin.names = (beam.rank[0], twin.id), [*beam.tokens[:-1], token], list(beam.names)
        has_room = all(pool.num_available for pool in self.pools.values())  # one block of each kind is copied
        if beam.slot is None or not self._slots or not has_room:
            bisect.insort(self.waiting, twin, key=by_rank)
            return twin
        for kind, blocks in beam.blocks.items():
            twin.blocks[kind] = self._shared(kind, blocks, beam.computed, forked.copies[kind])
        twin.computed, twin.num_named, twin.slot = beam.computed, beam.num_named, self._slots.pop()
        bisect.insort(self.running, twin, key=by_rank)
        forked.running.append(twin)
        return twin

    def _shared(self, kind: str, blocks: Sequence[int], computed: int, copies: list[Copy]) -> list[int]:
        """The same blocks for another holder; the last one, where it is not full yet, as a copy to be written."""
        pool, size = self.pools[kind], self.limits.block_size
        shared = list(blocks[: -(-computed // size)])
        for block in shared:
            if block != NOBODY:
                pool.hold(block)
        if computed % size:
            copy = pool.writable(shared[-1])
            assert copy is not None
            copies.append(copy)
            shared[-1] = copy.target
        return shared

    def _preempt(self, sequence: SequenceState) -> None:
        """Back into the queue; what it has computed may still be found when its turn comes."""
        self._name(sequence)
        self._vacate(sequence)
        self.running.remove(sequence)
        bisect.insort(self.waiting, sequence, key=by_rank)
        self.num_preemptions += 1
        self._is_full = True

    def _vacate(self, sequence: SequenceState) -> None:
        """Give back the slot and all blocks, the last block first, so that beginnings are found the longest."""
        for kind, blocks in sequence.blocks.items():
            for block in reversed(blocks):
                if block != NOBODY:
                    self.pools[kind].release(block)
        if sequence.slot is not None:
            self._slots.append(sequence.slot)
        sequence.blocks, sequence.slot, sequence.computed, sequence.num_named = {}, None, 0, 0

    def _name(self, sequence: SequenceState) -> None:
        """Name the full blocks whose tokens are known and computed."""
        self._extend_names(sequence)
        full = min(sequence.computed, len(sequence.tokens)) // self.limits.block_size
        for kind, blocks in sequence.blocks.items():
            for place in range(sequence.num_named, full):
                if blocks[place] != NOBODY:
                    self.pools[kind].name(blocks[place], sequence.names[place])
        sequence.num_named = max(full, sequence.num_named)

    def _extend_names(self, sequence: SequenceState) -> None:
        size, salt = self.limits.block_size, sequence.request.salt
        if len(sequence.tokens) // size > len(sequence.names):
            sequence.names += block_names(sequence.tokens, size, salt=salt, after=sequence.names)


def needs_host(request: Request) -> bool:
    """Whether each of its tokens has to be seen before the next one is computed."""
    return request.constraint is not None or request.is_beam


def by_rank(sequence: SequenceState) -> tuple[int, int]:
    """Whose turn comes first."""
    return sequence.rank
