"""Whatever comes, goes and runs out: no request starves, no block is lost or written by two, all answers are whole."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.blocks import NOBODY
from inference.config import SamplingConfig
from inference.request import Request
from inference.scheduler import TURNS, Kind, Limits, Scheduler
from inference.speculative import TextGuesses

LIMITS = Limits(max_rows=3, block_size=4, tile=4, max_tiles=3, max_length=64)
GREEDY = SamplingConfig(temperature=0.0)


def request(prompt, max_tokens=5, **more) -> Request:
    prompt = range(1, 1 + prompt) if isinstance(prompt, int) else prompt
    return Request(prompt=tuple(prompt), sampling=GREEDY, max_tokens=max_tokens, **more)


def scheduler(*, blocks=33, window=None, window_blocks=33, guesses=None, **limits) -> Scheduler:
    kinds = [Kind("global", None, blocks)]
    if window is not None:
        kinds.append(Kind("window", window, window_blocks))
    return Scheduler(kinds, LIMITS._replace(**limits), reuse=True, guesses=guesses)


def answer_of(tokens, place: int) -> int:
    """What the pretended model says at a place of a text: something that depends on all before."""
    return (sum(tokens[:place]) * 7 + place) % 11 + 50


class Device:
    """A pretended device: it knows what stands in each slot of each block, and refuses to read what was not written."""

    def __init__(self, scheduler: Scheduler, lag: int = 1):
        self.scheduler, self.lag = scheduler, lag
        self.written = {kind.name: {} for kind in scheduler.kinds}  # (block, place) -> (position, token)
        self.last, self.pending, self.answers = {}, [], {}
        self.plans, self.fresh = [], set()  # of this step: which slots were written

    def step(self) -> None:
        plan = self.scheduler.next()
        self.plans.append(plan)
        limits, works = self.scheduler.limits, [*plan.rows, *plan.tiles]
        assert len(plan.rows) <= limits.max_rows
        assert len(plan.tiles) <= limits.max_tiles
        slots = [sequence.slot for sequence in self.scheduler.running]
        assert len(set(slots)) == len(slots) <= limits.max_rows
        self.fresh = set()
        for work in works:
            assert 1 <= len(work.tokens or [0]) <= (limits.tile if work in plan.tiles else 9)
            for offset, token in enumerate(work.tokens or [self.last[work.sequence.id]]):
                self.write(work, work.start + offset, token)
        results = [(work, self.choose(work, plan)) for work in works if work.chooses]
        self.pending.append(results)
        while len(self.pending) > (0 if self.scheduler.guesses else self.lag if works else 0):
            for work, tokens in self.pending.pop(0):
                new = self.scheduler.commit(work, tokens)
                self.answers.setdefault(work.sequence.id, []).extend(new)

    def write(self, work, position: int, token: int) -> None:
        size = self.scheduler.limits.block_size
        for kind in self.scheduler.kinds:
            block = work.sequence.blocks[kind.name][position // size]
            assert block != NOBODY
            assert (kind.name, block, position % size) not in self.fresh, "written twice in one step"
            self.fresh.add((kind.name, block, position % size))
            self.written[kind.name][block, position % size] = (position, token)

    def choose(self, work, plan) -> list[int]:
        """Check that all a query sees stands where its table says, then choose."""
        size, tokens = self.scheduler.limits.block_size, work.tokens or [self.last[work.sequence.id]]
        end = work.start + len(tokens)
        text = None
        for kind in self.scheduler.kinds:
            first = 0 if kind.window is None else max(0, end - kind.window)
            read = []
            for position in range(first, end):
                block = work.sequence.blocks[kind.name][position // size]
                at, token = self.written[kind.name][block, position % size]
                assert at == position
                read.append(token)
            text = read if kind.window is None else text
        assert text is not None
        known = work.sequence.tokens
        assert text[: len(known)] == known[: len(text)] or work.num_drafts
        chosen = []
        for count in range(work.num_drafts + 1):
            place = end - work.num_drafts + count
            chosen.append(answer_of(text, place))
            if count < work.num_drafts and text[place] != chosen[-1]:
                break
        self.last[work.sequence.id] = chosen[-1]
        return chosen

    def finish(self, most: int = 2000) -> None:
        for _ in range(most):
            if not (self.scheduler.waiting or self.scheduler.running or any(self.pending)):
                return
            self.step()
        raise AssertionError("some request starves")


def expected(prompt, count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(answer_of(tokens, len(tokens)))
    return tokens[len(prompt) :]


def test_a_prompt_is_read_in_chunks_beside_what_runs():
    device = Device(scheduler())
    device.scheduler.add(request(2, 20))
    device.step()
    device.scheduler.add(request(30, 2))
    shapes = []
    for _ in range(4):
        device.step()
        plan = device.plans[-1]
        shapes.append(([len(work.tokens or [0]) for work in plan.rows], [len(work.tokens) for work in plan.tiles]))
    assert shapes == [([1], [4, 4, 4]), ([1], [4, 4, 4]), ([1], [4, 2]), ([1, 1], [])]


def test_who_comes_in_the_same_step_shares_what_the_first_one_computes():
    device = Device(scheduler(max_tiles=9))
    for _ in range(3):
        device.scheduler.add(request(18))
    device.step()
    assert [(work.sequence.id, work.start) for work in device.plans[0].tiles] == [
        *((0, start) for start in range(0, 18, 4)),
        (1, 16),
        (2, 16),
    ]
    assert device.scheduler.num_cached == 32
    device.finish()
    assert device.answers == dict.fromkeys(range(3), expected(range(1, 19), 5))


def test_a_priority_counts_as_coming_later_and_no_more():
    mine = scheduler(max_rows=1)
    ids = [mine.add(request(4, 1, priority=priority)).id for priority in (0, 1, 0, -1)]
    late = [mine.add(request(4, 1)).id for _ in range(TURNS)]
    device = Device(mine)
    device.finish()
    order = list(device.answers)
    assert order[:3] == [ids[3], ids[0], ids[2]]
    assert order.index(ids[1]) == 2 + TURNS - 2
    assert len(order) == len(ids) + len(late)


def test_the_last_gives_its_blocks_back_and_finds_them_again():
    device = Device(scheduler(blocks=9))  # 8 blocks of 4 tokens
    for start in (0, 100):
        device.scheduler.add(request(range(start, start + 8), 16))
    device.finish()
    assert device.scheduler.num_preemptions >= 1
    assert device.answers == {i: expected(range(start, start + 8), 16) for i, start in enumerate((0, 100))}
    assert device.scheduler.pools["global"].num_used == 0


def test_window_layers_give_up_what_no_query_sees():
    device = Device(scheduler(window=6, window_blocks=9))
    device.scheduler.add(request(8, 40))
    most = 0
    for _ in range(60):
        device.step()
        most = max(most, device.scheduler.pools["window"].num_used)
    assert device.answers[0] == expected(range(1, 9), 40)
    assert most <= 3
    assert device.scheduler.pools["global"].num_used == 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request(64, 1), "room for 64, its answer included; shorten the prompt to at most 63 tokens"),
        (request((), 1), "the prompt has 0 tokens"),
        (request(3, 0), "max_tokens=0; both must be at least 1"),
        (request(30, 20), "need 13 blocks of 4 tokens but the KV cache has 8; ask for fewer than 20 tokens"),
    ],
)
def test_what_never_fits_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        scheduler(blocks=9).add(asked)


def test_guesses_that_are_right_save_steps():
    class Knowing:
        def guess(self, id, tokens):
            return [*expected(tokens, 3), 1]

        def learn(self, id, *, guessed, right):
            assert right == min(guessed, 3)

        def forget(self, id):
            pass

    device = Device(scheduler(guesses=Knowing()))
    device.scheduler.add(request(5, 21))
    device.finish()
    assert device.answers[0] == expected(range(1, 6), 21)
    assert len(device.plans) == 1 + 5
    assert device.scheduler.num_accepted == 15


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([None, 3, 9]),
    st.integers(17, 40),
    st.booleans(),
    st.integers(1, 3),
)
def test_any_trace_is_answered_whole(seed, window, blocks, has_guesses, max_rows):
    """Random arrivals, lengths, shared beginnings, priorities, end tokens and cancellations."""
    rng = random.Random(seed)
    mine = scheduler(
        blocks=blocks, window=window, window_blocks=blocks, max_rows=max_rows, max_tiles=rng.randint(1, 4),
        guesses=TextGuesses(3) if has_guesses else None,
    )  # fmt: skip
    device, asked, cancelled = Device(mine), {}, set()
    beginnings = [[rng.randrange(9) for _ in range(rng.randint(1, 24))] for _ in range(3)]
    for _ in range(rng.randint(1, 60)):
        if rng.random() < 0.3:
            prompt = rng.choice(beginnings) + [rng.randrange(9) for _ in range(rng.randint(1, 9))]
            end_ids = (rng.randint(50, 60),) if rng.random() < 0.3 else ()
            made = request(prompt, rng.randint(1, 30), priority=rng.randint(-1, 1), end_ids=end_ids)
            made_id = mine.add(made).id
            asked[made_id] = made
        if asked and rng.random() < 0.05:
            id = rng.choice(list(asked))
            if mine.cancel(id) is not None:
                cancelled.add(id)
        device.step()
    device.finish()
    for id, made in asked.items():
        if id in cancelled:
            continue
        whole = expected(made.prompt, made.max_tokens)
        ends = [place for place, token in enumerate(whole) if token in made.end_ids]
        assert device.answers[id] == (whole[: ends[0] + 1] if ends else whole)
    assert all(pool.num_used == 0 for pool in mine.pools.values())
    assert mine.num_finished == len(asked)
