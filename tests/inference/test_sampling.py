"""Sampling equals a slow twin that sorts, draws what it should, and treats each row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import sampling
from inference.config import GenerationConfig, SamplingConfig
from inference.request import Request
from inference.sampling import Slots


def settings(**changes) -> SamplingConfig:
    return SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, **changes})


def slow_scores(logits, prompt, answer, config: SamplingConfig, allowed=None) -> np.ndarray:
    """Logits after bias, penalties and grammar: one row, token by token, in float64."""
    x = logits.astype(np.float64)
    for token, value in config.logit_bias:
        x[token] += value
    for token in {*prompt, *answer}:
        x[token] = x[token] * config.repetition_penalty if x[token] < 0 else x[token] / config.repetition_penalty
    for token in set(answer):
        x[token] -= list(answer).count(token) * config.frequency_penalty + config.presence_penalty
    return x if allowed is None else np.where(allowed, x, -np.inf)


def slow_distribution(scores: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """The probabilities that a token is drawn from: one row, by sorting, in float64."""
    x = scores.astype(np.float64)
    if config.temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    x = x / config.temperature
    if config.top_k:
        x = np.where(x >= np.sort(x)[::-1][min(config.top_k, len(x)) - 1], x, -np.inf)
    if config.top_p < 1:
        p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        order = np.argsort(-p, kind="stable")
        needed = np.searchsorted(np.cumsum(p[order]), config.top_p) + 1
        x = np.where(p >= p[order[needed - 1]], x, -np.inf)
    if config.min_p:
        x = np.where(x - x.max() >= np.log(config.min_p), x, -np.inf)
    p = np.exp(x - x.max())
    return p / p.sum()


ADMIT, RECORD = jax.jit(sampling.admit), jax.jit(sampling.record)
CHOOSE = jax.jit(sampling.choose, static_argnames="num_tokens")
CHANGED = jax.jit(sampling.changed)


def request(config: SamplingConfig, prompt=(0,), num_top=0) -> Request:
    return Request(prompt=tuple(prompt), sampling=config, max_tokens=9, num_top=num_top)


def filled(requests, answers=None, *, V: int) -> Slots:
    """Slots that hold these requests, one after the other."""
    slots = sampling.empty_slots(len(requests), V)
    for i, (one, answer) in enumerate(zip(requests, answers or [()] * len(requests), strict=True)):
        slots = ADMIT(slots, np.int32(i), sampling.admission(one, answer, slots=64))
    return slots


def choose(logits, rows, *, index=None, num_tokens=None, slots=None, slot=None):
    O, V = logits.shape
    slots = filled([request(row) for row in rows], V=V) if slots is None else slots
    slot = np.arange(O, dtype=np.int32) if slot is None else slot
    index = np.zeros(O, np.int32) if index is None else index
    return CHOOSE(jnp.asarray(logits), slots, jnp.asarray(slot), jnp.asarray(index), num_tokens=num_tokens or V)


DRAWS = 10_000
DRAW = jax.jit(sampling.draw)


def counts_of(scores: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """How often each token is drawn from one row of scores, over many seeds."""
    one = filled([request(config)], V=8).knobs
    knobs = jax.tree.map(lambda knob: jnp.full(DRAWS, knob[0]), one)._replace(seed=jnp.arange(DRAWS, dtype=jnp.uint32))
    rows = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (DRAWS, len(scores)))
    return np.bincount(DRAW(rows, jnp.full(DRAWS, 7), knobs), minlength=len(scores))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations the statistic is above its mean; tokens that hardly come are taken together."""
    rare = expected < 10
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = max(len(expected) - 1, 1)
    return float((np.sum((counts - expected) ** 2 / expected) - freedom) / np.sqrt(2 * freedom))


def packed(allowed: np.ndarray) -> np.ndarray:
    """Marks of tokens as bits of words."""
    padded = np.pad(allowed, ((0, 0), (0, -allowed.shape[-1] % 32)))
    return np.packbits(padded, axis=-1, bitorder="little").view(np.uint32)


ROWS = [
    settings(),
    settings(temperature=0.5),
    settings(temperature=1e-30),
    settings(top_k=1),
    settings(top_k=7),
    settings(top_k=100),
    settings(top_k=1000),
    settings(top_p=0.5),
    settings(top_p=1e-6),
    settings(min_p=0.2),
    settings(min_p=1.0),
    settings(temperature=2.0, top_k=20, top_p=0.8, min_p=0.05),
    settings(temperature=1.5, top_k=90, top_p=0.8),
]


@pytest.mark.parametrize("config", ROWS)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_draws_over_seeds_follow_the_slow_twin(config, spread):
    """V spans several blocks and ends within one."""
    scores = np.random.default_rng(0).normal(0, spread, 150)
    expected = DRAWS * slow_distribution(scores.astype(np.float32), config)
    counts = counts_of(scores, config)
    assert np.all(counts[expected == 0] == 0)
    assert np.all(counts[expected > 20] > 0)
    assert chi_square(counts, expected) < 4


def test_ties_at_the_edge_are_all_kept():
    scores = np.log(np.asarray([0.1, 0.2, 0.4, 0.2, 0.1]))
    assert np.flatnonzero(counts_of(scores, settings(top_k=2))).tolist() == [1, 2, 3]
    assert np.flatnonzero(counts_of(scores, settings(top_p=0.5))).tolist() == [1, 2, 3]
    assert np.flatnonzero(counts_of(scores, settings(top_k=3, top_p=0.4))).tolist() == [2]
    assert np.flatnonzero(counts_of(scores, settings(min_p=0.45))).tolist() == [1, 2, 3]


@pytest.mark.parametrize("row", [[-np.inf] * 5, [np.nan] * 5, [np.inf] * 5])
def test_damaged_scores_do_not_hang(row):
    assert counts_of(np.asarray(row), settings(top_p=0.5)).sum() == DRAWS


CHANGES = [
    settings(),
    settings(repetition_penalty=1.7),
    settings(repetition_penalty=0.5),
    settings(frequency_penalty=0.7),
    settings(frequency_penalty=-2.0, presence_penalty=1.5),
    settings(presence_penalty=-0.3),
    settings(logit_bias=((3, 100.0), (49, -7.5), (0, -100.0))),
    settings(logit_bias=((7, 2.0),), repetition_penalty=1.2, frequency_penalty=0.1, presence_penalty=0.2),
]


@pytest.mark.parametrize("is_resumed", [False, True])
def test_bias_penalties_and_grammar_equal_the_slow_twin(is_resumed):
    random, V = np.random.default_rng(5), 50
    logits = random.normal(0, 3, (len(CHANGES), V)).astype(np.float32)
    prompts, answers = ([random.integers(0, V, 12).tolist() for _ in CHANGES] for _ in range(2))
    allowed = random.random(logits.shape) < 0.5
    requests = [request(config, prompt) for config, prompt in zip(CHANGES, prompts, strict=True)]
    rows = jnp.arange(len(CHANGES))
    if is_resumed:
        slots = filled(requests, answers, V=V)
    else:
        slots = filled(requests, V=V)
        for tokens in zip(*answers, strict=True):
            slots = RECORD(slots, rows, jnp.asarray(tokens), jnp.ones(len(CHANGES), bool))
    knobs = jax.tree.map(lambda knob: knob[:-1], slots.knobs)
    for grammar in (None, allowed):
        if grammar is not None:
            slots = sampling.allow(slots, rows[::2], jnp.asarray(packed(allowed))[::2])
        found = CHANGED(jnp.asarray(logits), slots, rows, knobs)
        for i, config in enumerate(CHANGES):
            bits = grammar[i] if grammar is not None and i % 2 == 0 else None
            slow = slow_scores(logits[i], prompts[i], answers[i], config, bits)
            np.testing.assert_allclose(found[i], slow, rtol=1e-5, atol=1e-5)
        greedy = slots._replace(knobs=slots.knobs._replace(temperature=jnp.zeros_like(slots.knobs.temperature)))
        np.testing.assert_array_equal(choose(logits, None, slots=greedy).tokens, np.argmax(found, axis=-1))


def test_a_resumed_answer_is_as_if_its_tokens_had_been_recorded():
    prompt, answer, V = (4, 4, 9), [7, 1, 7, 7, 30, 9], 31
    one = request(settings(logit_bias=((2, 1.0),), seed=2**32 - 1), prompt, num_top=3)
    resumed, begun = filled([one], [answer], V=V), filled([one], V=V)
    assert int(begun.token[0]) == 9
    for token in answer:
        begun = RECORD(begun, jnp.asarray([0]), jnp.asarray([token]), jnp.asarray([True]))
    jax.tree.map(np.testing.assert_array_equal, resumed, begun)
    assert np.flatnonzero(resumed.prompted[0]).tolist() == [4, 9]
    assert resumed.counts[0, :10].tolist() == [0, 1, 0, 0, 0, 0, 0, 3, 0, 1]


def test_tokens_of_one_slot_are_recorded_in_their_order_and_only_what_is_taken():
    slots = filled([request(settings(), [5]), request(settings(), [6])], V=40)
    slot, tokens = [1, 1, 1, 1, 0, 2, 2], [3, 3, 8, 9, 11, 12, 13]
    taken = [True, True, True, False, False, False, False]
    slots = RECORD(slots, jnp.asarray(slot), jnp.asarray(tokens), jnp.asarray(taken))
    assert slots.token.tolist()[:2] == [5, 8]
    assert {int(t): int(slots.counts[1, t]) for t in np.flatnonzero(slots.counts[1])} == {3: 2, 8: 1}
    assert not slots.counts[0].any()
    assert not slots.counts[2].any()


def test_a_slot_keeps_nothing_of_the_answer_before():
    first = request(settings(logit_bias=((1, 5.0),), frequency_penalty=1.0, min_p=0.5), [1, 2, 3], num_top=4)
    used = sampling.allow(filled([first], [[8, 8]], V=40), jnp.asarray([0]), jnp.zeros((1, 2), jnp.uint32))
    second = request(settings(), [9])
    again = ADMIT(used, np.int32(0), sampling.admission(second, (), slots=64))
    jax.tree.map(np.testing.assert_array_equal, again, filled([second], V=40))


def test_drafts_count_as_if_they_had_been_recorded():
    V, config = 40, settings(frequency_penalty=0.9, repetition_penalty=1.5, temperature=0.7, seed=3)
    logits = np.random.default_rng(3).normal(0, 1, (3, V)).astype(np.float32)
    slots = filled([request(config, [1, 2])], V=V)
    slot, index = jnp.zeros(3, jnp.int32), jnp.arange(3)
    drafts = jnp.asarray([[-1, -1], [7, -1], [7, 7]])
    ahead = CHOOSE(jnp.asarray(logits), slots, slot, index, num_tokens=V, drafts=drafts)
    for i in range(3):
        one = CHOOSE(jnp.asarray(logits[i : i + 1]), slots, slot[:1], index[i : i + 1], num_tokens=V)
        assert one.tokens[0] == ahead.tokens[i]
        slots = RECORD(slots, slot[:1], jnp.asarray([7]), jnp.asarray([True]))


def test_counts_stop_before_they_overflow():
    slots = filled([request(settings(), [1])], V=8)
    slots = slots._replace(counts=jnp.full_like(slots.counts, sampling.MAX_COUNT - 1))
    for _ in range(3):
        slots = RECORD(slots, jnp.asarray([0]), jnp.asarray([5]), jnp.asarray([True]))
    assert slots.counts[0, 5] == sampling.MAX_COUNT


def test_reaching_orders_every_float():
    values = np.asarray([[-np.inf, -3e38, -1.0, -1e-40, 0.0, 1e-40, 1.0, 3e38, np.inf]], np.float32)
    for k in range(1, values.size + 1):
        kept = sampling.reaching(jnp.asarray(values), jnp.ones_like(values), jnp.asarray([float(k)]))
        assert np.asarray(kept).tolist() == [[False] * (values.size - k) + [True] * k]


@pytest.mark.parametrize("V", [1, 63, 64, 200])
def test_argmax_is_the_first_of_the_largest(V):
    x = np.random.default_rng(V).integers(-3, 3, (40, V)).astype(np.float32)
    x[0] = -np.inf
    np.testing.assert_array_equal(sampling.argmax(jnp.asarray(x)), x.argmax(-1))


@pytest.mark.parametrize(("V", "k"), [(7, 20), (64, 20), (300, 20), (5000, 64)])
def test_the_largest_are_those_of_a_sort(V, k):
    x = np.random.default_rng(V).integers(-9, 9, (30, V)).astype(np.float32)
    values, places = sampling.largest(jnp.asarray(x), k)
    order = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(places[:, :V], order)
    np.testing.assert_array_equal(values[:, :V], np.take_along_axis(x, order, axis=-1))


def test_likely_tokens_are_those_of_a_sorted_log_softmax():
    logits = np.random.default_rng(0).normal(0, 2, (4, 700)).astype(np.float32)
    slots = filled([request(settings(), num_top=top) for top in (0, 5, 0, 20)], V=700)
    choice = choose(logits, None, slots=slots, num_tokens=690)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    order = np.argsort(-exact[:, :690], axis=-1)[:, :20]
    np.testing.assert_array_equal(choice.top_tokens, order)
    np.testing.assert_allclose(choice.top_logprobs, np.take_along_axis(exact, order, -1), rtol=1e-5)


@pytest.mark.parametrize("config", [settings(seed=5), settings(seed=6, temperature=0.7, top_k=40, top_p=0.9)])
def test_draws_along_one_answer_follow_the_distribution(config):
    logits = np.random.default_rng(8).normal(0, 1.5, 200).astype(np.float32)
    expected = DRAWS * slow_distribution(logits, config)
    slots = filled([request(config)], V=200)
    along = np.arange(DRAWS, dtype=np.int32)
    tokens = choose(np.tile(logits, (DRAWS, 1)), None, slots=slots, slot=np.zeros(DRAWS, np.int32), index=along).tokens
    counts = np.bincount(tokens, minlength=200)
    assert np.all(counts[expected == 0] == 0)
    assert chi_square(counts, expected) < 4


MIXED = [
    settings(seed=1),
    settings(temperature=0.0),
    settings(seed=3, top_k=9),
    settings(seed=4, top_k=100, top_p=0.9),
    settings(seed=5, top_p=0.5),
    settings(seed=6, min_p=0.1, temperature=2.0),
    settings(seed=7, frequency_penalty=1.0, presence_penalty=0.5),
    settings(seed=8, logit_bias=((0, 3.0),), repetition_penalty=2.0),
]


def test_a_row_depends_on_itself_alone():
    """Bitwise: alone, beside rows that ask for everything, and in another order."""
    B, V = len(MIXED), 330
    logits = np.random.default_rng(0).normal(0, 1, (B, V)).astype(np.float32)
    requests = [request(row, [i, 3], num_top=i % 3) for i, row in enumerate(MIXED)]
    answers = [[i, 5, 5] for i in range(B)]
    index = np.arange(B, dtype=np.int32)
    slots = sampling.allow(
        filled(requests, answers, V=V), jnp.asarray([2]), jnp.full((1, 11), 0xF0F0F0F0, dtype=jnp.uint32)
    )
    together = choose(logits, None, slots=slots, index=index)
    for b in range(B):
        slot = np.asarray([b], np.int32)
        alone = choose(logits[b : b + 1], None, slots=slots, slot=slot, index=index[b : b + 1])
        assert alone.tokens[0] == together.tokens[b]
        assert alone.logprobs[0] == together.logprobs[b]
        if requests[b].num_top:
            np.testing.assert_array_equal(alone.top_logprobs[0], together.top_logprobs[b])
    order = np.asarray([3, 0, B, 7, 1, 2, 6, 5, 4, B], np.int32)
    moved = choose(
        np.concatenate([logits, logits[:1]])[order], None, slots=slots, slot=order, index=np.append(index, 0)[order]
    )
    where = order < B
    np.testing.assert_array_equal(moved.tokens[where], together.tokens[order[where]])
    np.testing.assert_array_equal(moved.logprobs[where], together.logprobs[order[where]])


def test_greedy_takes_the_likeliest_beside_rows_that_draw():
    logits = np.random.default_rng(1).normal(0, 1, (2, 30)).astype(np.float32)
    rows = [settings(temperature=0.0), settings(temperature=5.0, seed=9)]
    assert int(choose(logits, rows).tokens[0]) == int(np.argmax(logits[0]))


def test_logprobs_are_those_of_the_model():
    logits = np.random.default_rng(2).normal(0, 2, (1, 30)).astype(np.float32)
    row = settings(temperature=0.3, top_k=2, repetition_penalty=2.0, logit_bias=((4, 50.0),))
    choice = choose(logits, [row])
    expected = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    np.testing.assert_allclose(choice.logprobs[0], expected[int(choice.tokens[0])], rtol=1e-6)


def test_rows_of_the_table_without_a_token_are_never_chosen():
    logits = np.asarray([[0.0, 1.0, 9.0]], np.float32)
    for config in (settings(temperature=0.0), settings(), settings(logit_bias=((2, 100.0),))):
        assert int(choose(logits, [config], num_tokens=2).tokens[0]) < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "sampling.temperature=-1.0 must be between 0 and 100"),
        ({"temperature": float("nan")}, "sampling.temperature=nan"),
        ({"top_p": 0.0}, "sampling.top_p=0.0 must be above 0"),
        ({"top_k": -1}, "sampling.top_k=-1"),
        ({"min_p": 1.5}, "sampling.min_p=1.5"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty=0.0"),
        ({"seed": -1}, "sampling.seed=-1"),
        ({"frequency_penalty": 2.5}, "sampling.frequency_penalty=2.5 must be between -2 and 2"),
        ({"presence_penalty": -3.0}, "sampling.presence_penalty=-3.0 must be between -2 and 2"),
        ({"logit_bias": ((1, 101.0),)}, "sampling.logit_bias adds 101.0 to token 1"),
        ({"logit_bias": ((1, float("nan")),)}, "sampling.logit_bias adds nan to token 1"),
        ({"logit_bias": ((-1, 1.0),)}, "sampling.logit_bias names token -1"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "sampling.logit_bias names a token twice"),
        ({"logit_bias": tuple((i, 1.0) for i in range(301))}, "sampling.logit_bias names 301 tokens, 300 at most"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message.split(" must")[0]):
        SamplingConfig(**changes)


def test_impossible_lengths_are_refused():
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        GenerationConfig(max_tokens=0)
    with pytest.raises(ValueError, match="stop"):
        GenerationConfig(stop=("",))
