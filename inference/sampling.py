"""Logits to tokens: bias, penalties, grammar, temperature, top-k, top-p, min-p, the draw. Pure functions; no model.

A row's token depends on that row alone: its logits, what its slot holds, its seed and the place in its answer. What is
rare (penalties, bias, grammars, filters, likely tokens to tell) is computed only in a step where some row asks for it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, UInt

from inference.config import MAX_BIASED, SamplingConfig
from inference.request import Request

BLOCK = 64  # values whose largest is taken at once
MAX_TOP = 20  # likeliest tokens that can be told with each token
FEW = 64  # up to this top_k the k-th largest score is found without counting
MAX_COUNT = 2**15 - 128  # of one token in an answer; more of the same are not counted
SMALLEST_P = 1e-30  # of top_p: the likeliest token is always kept
NO_TOKEN = 2**31 - 1  # an id that no vocabulary has


class Knobs(NamedTuple):
    """What each row asks for, as arrays: one compiled program serves every setting."""

    repetition_penalty: Float[Array, "B"]
    frequency_penalty: Float[Array, "B"]
    presence_penalty: Float[Array, "B"]
    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    seed: UInt[Array, "B"]
    num_biased: Int[Array, "B"]  # tokens whose logits get something added
    num_top: Int[Array, "B"]  # likeliest tokens to tell


class Slots(NamedTuple):
    """What choosing needs to know of R answers that are being computed; the slot after them is for padding."""

    token: Int[Array, "R"]  # chosen last
    counts: Int[Array, "R V"]  # of each token in the answer
    prompted: Bool[Array, "R V"]  # tokens of the prompt
    bias: Float[Array, "R V"]  # added to the logits
    allowed: UInt[Array, "R W"]  # bits of the tokens that the grammar lets come; all ones where there is none
    knobs: Knobs


class Admission(NamedTuple):
    """What a slot is filled with, on the host: one answer, begun or not."""

    tokens: Int[np.ndarray, "S"]  # prompt, then what is there of the answer, then padding
    prompt_length: Int[np.ndarray, ""]
    length: Int[np.ndarray, ""]  # of prompt and answer
    biased: Int[np.ndarray, "J"]  # tokens, padded with ids that no vocabulary has
    bias: Float[np.ndarray, "J"]
    knobs: Knobs  # of one row: no dimensions


class Choice(NamedTuple):
    """The next token of each row."""

    tokens: Int[Array, "O"]
    logprobs: Float[Array, "O"]  # of that token, under the model: before penalties, temperature and filters
    top_tokens: Int[Array, "O top"]  # the likeliest first; where no row asks for any, these two hold nothing
    top_logprobs: Float[Array, "O top"]


def knobs_of(sampling: SamplingConfig, num_top: int = 0) -> Knobs:
    """One row's settings as numpy scalars."""
    types = {"top_k": np.int32, "seed": np.uint32, "num_biased": np.int32, "num_top": np.int32}
    values = {**vars(sampling), "num_biased": len(sampling.logit_bias), "num_top": num_top}
    return Knobs(*(np.asarray(values[name], types.get(name, np.float32)) for name in Knobs._fields))  # type: ignore[arg-type]


def empty_slots(R: int, V: int) -> Slots:
    """R slots and the one for padding, whose rows are greedy and ask for nothing."""
    idle = knobs_of(SamplingConfig(temperature=0.0, top_p=1.0))
    return Slots(
        token=jnp.zeros(R + 1, jnp.int32),
        counts=jnp.zeros((R + 1, V), jnp.int16),
        prompted=jnp.zeros((R + 1, V), bool),
        bias=jnp.zeros((R + 1, V), jnp.float32),
        allowed=jnp.full((R + 1, -(-V // 32)), 2**32 - 1, jnp.uint32),
        knobs=jax.tree.map(lambda knob: jnp.full(R + 1, knob), idle),
    )


def admission(request: Request, answer: Sequence[int], *, slots: int) -> Admission:
    """A request and what is there of its answer, padded to `slots` tokens. Nothing of it is on a device."""
    tokens = np.zeros(slots, np.int32)
    length = len(request.prompt) + len(answer)
    tokens[:length] = (*request.prompt, *answer)
    biased, bias = np.full(MAX_BIASED, NO_TOKEN, np.int32), np.zeros(MAX_BIASED, np.float32)
    for j, (token, value) in enumerate(request.sampling.logit_bias):
        biased[j], bias[j] = token, value
    knobs = knobs_of(request.sampling, request.num_top)
    return Admission(
        tokens, np.asarray(len(request.prompt), np.int32), np.asarray(length, np.int32), biased, bias, knobs
    )


def admit(slots: Slots, slot: Int[Array, ""], admission: Admission) -> Slots:
    """Fill a slot: afterwards it is as if every token of the answer had been recorded. No grammar holds there yet."""
    (S,), (_, V) = admission.tokens.shape, slots.counts.shape
    place = jnp.arange(S)
    is_prompt = place < admission.prompt_length
    is_answer = ~is_prompt & (place < admission.length)
    counts = jnp.zeros(V, jnp.int32).at[admission.tokens].add(is_answer.astype(jnp.int32))
    row = Slots(
        token=jnp.asarray(admission.tokens)[admission.length - 1],
        counts=jnp.minimum(counts, MAX_COUNT).astype(jnp.int16),
        prompted=jnp.zeros(V, bool).at[admission.tokens].max(is_prompt),
        bias=jnp.zeros(V).at[admission.biased].add(admission.bias, mode="drop"),
        allowed=jnp.full(slots.allowed.shape[1:], 2**32 - 1, jnp.uint32),
        knobs=admission.knobs,
    )
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one), slots, row)


def choose(
    logits: Float[Array, "O V"],
    slots: Slots,
    slot: Int[Array, "O"],
    index: Int[Array, "O"],
    *,
    num_tokens: int,
    drafts: Int[Array, "O w"] | None = None,
) -> Choice:
    """Choose a token a row, for the place `index` of the answer in its slot.

    `drafts` are the tokens that a row supposes between what its slot has recorded and this place, -1 where none is.
    Rows of the table past the tokenizer's `num_tokens` have no text and are never chosen.
    """
    knobs = jax.tree.map(lambda knob: knob[slot], slots.knobs)
    likely = logits if num_tokens >= logits.shape[-1] else without_text(logits, num_tokens)
    is_changed = is_penalized(knobs) | (knobs.num_biased > 0) | jnp.any(~slots.allowed[slot] != 0, axis=-1)
    scores = jax.lax.cond(
        jnp.any(is_changed), lambda: changed(likely, slots, slot, knobs, drafts=drafts), lambda: likely
    )
    likeliest = argmax(scores)
    drawn = jax.lax.cond(jnp.any(knobs.temperature > 0), draw, lambda *_: likeliest, scores, index, knobs)
    tokens = jnp.where(knobs.temperature > 0, drawn, likeliest)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    top = jax.lax.cond(jnp.any(knobs.num_top > 0), top_of, nothing_of, likely, normalizer)
    return Choice(tokens, taken(logits, tokens) - normalizer, *top)


def record(slots: Slots, slot: Int[Array, "O"], tokens: Int[Array, "O"], is_taken: Bool[Array, "O"]) -> Slots:
    """The answers went on with those tokens that are taken; those of one slot stand in their order."""
    (R,), (O,) = slots.token.shape, tokens.shape
    is_counted = is_taken & (slots.counts[slot, tokens] < MAX_COUNT)
    last = jnp.full(R, -1).at[slot].max(jnp.where(is_taken, jnp.arange(O), -1))
    return slots._replace(
        token=jnp.where(last >= 0, tokens[last], slots.token),
        counts=slots.counts.at[slot, tokens].add(is_counted.astype(slots.counts.dtype)),
    )


def allow(slots: Slots, slot: Int[Array, "n"], bits: UInt[Array, "n W"]) -> Slots:
    """Only these tokens may come next there: token t is bit t % 32 of word t // 32. Slots past the last are ignored."""
    return slots._replace(allowed=slots.allowed.at[slot].set(bits))


def logprobs_of(logits: Float[Array, "... V"], tokens: Int[Array, "..."]) -> Float[Array, "..."]:
    """Log-probability of one token under each row of logits."""
    return taken(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)


def taken(x: Float[Array, "... V"], tokens: Int[Array, "..."]) -> Float[Array, "..."]:
    """One value of each row."""
    return jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]


def top_of(
    logits: Float[Array, "O V"], normalizer: Float[Array, "O"]
) -> tuple[Int[Array, "O top"], Float[Array, "O top"]]:
    """The likeliest tokens of each row and their log-probabilities."""
    values, tokens = largest(logits, MAX_TOP)
    return tokens, values - normalizer[:, None]


def nothing_of(
    logits: Float[Array, "O V"], normalizer: Float[Array, "O"]
) -> tuple[Int[Array, "O top"], Float[Array, "O top"]]:
    """What stands there when no row asks."""
    shape = (len(logits), MAX_TOP)
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)


def without_text(logits: Float[Array, "O V"], num_tokens: int) -> Float[Array, "O V"]:
    """Logits where ids from `num_tokens` on cannot come."""
    return jnp.where(jnp.arange(logits.shape[-1])[None] < num_tokens, logits, -jnp.inf)


def is_penalized(knobs: Knobs) -> Bool[Array, "O"]:
    """Whether what a row has already changes what comes."""
    return (knobs.repetition_penalty != 1) | (knobs.frequency_penalty != 0) | (knobs.presence_penalty != 0)


def changed(
    scores: Float[Array, "O V"],
    slots: Slots,
    slot: Int[Array, "O"],
    knobs: Knobs,
    *,
    drafts: Int[Array, "O w"] | None = None,
) -> Float[Array, "O V"]:
    """Bias, then penalties, then the grammar."""

    def biased(scores):
        return scores + slots.bias[slot]

    def penalized(scores):
        counts = slots.counts[slot]
        if drafts is not None:
            rows = jnp.arange(len(drafts))[:, None]
            counts = counts.at[rows, jnp.where(drafts < 0, NO_TOKEN, drafts)].add(jnp.int16(1), mode="drop")
        return penalize(scores, counts, slots.prompted[slot], knobs)

    def constrained(scores):
        return jnp.where(unpacked(slots.allowed[slot], scores.shape[-1]), scores, -jnp.inf)

    for is_asked, change in (
        (knobs.num_biased > 0, biased),
        (is_penalized(knobs), penalized),
        (jnp.any(~slots.allowed[slot] != 0, axis=-1), constrained),
    ):
        scores = jax.lax.cond(jnp.any(is_asked), change, lambda x: x, scores)
    return scores


def penalize(
    scores: Float[Array, "O V"], counts: Int[Array, "O V"], prompted: Bool[Array, "O V"], knobs: Knobs
) -> Float[Array, "O V"]:
    """Make tokens less likely that prompt or answer have (arXiv:1909.05858, section 4.1), then as OpenAI's API does."""
    factor = knobs.repetition_penalty[:, None]
    repeated = jnp.where(scores < 0, scores * factor, scores / factor)
    scores = jnp.where(prompted | (counts > 0), repeated, scores)
    frequency = knobs.frequency_penalty[:, None] * counts.astype(jnp.float32)
    return scores - frequency - jnp.where(counts > 0, knobs.presence_penalty[:, None], 0.0)


def unpacked(bits: UInt[Array, "O W"], V: int) -> Bool[Array, "O V"]:
    """Bit t % 32 of word t // 32, for each token t."""
    each = (bits[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & jnp.uint32(1)
    return rearrange(each, "O W b -> O (W b)")[:, :V] != 0


def draw(scores: Float[Array, "O V"], index: Int[Array, "O"], knobs: Knobs) -> Int[Array, "O"]:
    """A random token a row of what top-k, then top-p of what that leaves, then min-p leave.

    Top-p by rejection, without knowing its set: a token is in it if those likelier have less than top_p together.
    If it is not, it is drawn again among those likelier, which on average halves what is outside: a few passes over the
    row, where finding the set takes a sort or 32 halvings. FlashInfer's kernels reject likewise, with uniform noise.
    """
    scores = temper(scores, knobs.temperature)
    scores = jax.lax.cond(jnp.any(knobs.top_k > 0), keep_top_k, lambda x, _: x, scores, knobs.top_k)
    p = jnp.exp(in_blocks(scores))  # of each token relative to the likeliest
    target = jnp.where(knobs.top_p < 1, jnp.maximum(knobs.top_p, SMALLEST_P) * jnp.sum(p, axis=(1, 2)), jnp.inf)

    def propose(floor, sums, attempt):
        noise = gumbel(knobs.seed, index, attempt, count=sums.shape[-1] + BLOCK)
        return proposed(p, floor, sums, noise)

    def look(carry):
        attempt, tokens, was_outside = carry
        floor = taken(rearrange(p, "O n b -> O (n b)"), tokens)
        sums = sums_above(p, floor)
        is_outside = was_outside & (jnp.sum(sums, axis=-1) >= target)
        return attempt + 1, jnp.where(is_outside, propose(floor, sums, attempt), tokens), is_outside

    floor = jnp.nextafter(knobs.min_p, -1.0)
    first = propose(floor, sums_above(p, floor), jnp.int32(0))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[-1]), look, (jnp.int32(1), first, knobs.top_p < 1))[1]


def proposed(
    p: Float[Array, "O n b"], floor: Float[Array, "O"], sums: Float[Array, "O n"], noise: Float[Array, "O m"]
) -> Int[Array, "O"]:
    """A token above the floor by Gumbel-max: argmax of log p + noise has distribution p (arXiv:1611.01144, eq. 1).

    First a block by its sum, then a token in it: noise for n + b values instead of n * b.
    """
    _, n, b = p.shape
    which = jnp.argmax(jnp.log(sums) + noise[:, :n], axis=-1)
    block = jnp.take_along_axis(p, which[:, None, None], axis=1)[:, 0]
    block = jnp.where(block > floor[:, None], block, 0.0)
    return (which * b + jnp.argmax(jnp.log(block) + noise[:, n:], axis=-1)).astype(jnp.int32)


def sums_above(p: Float[Array, "O n b"], floor: Float[Array, "O"]) -> Float[Array, "O n"]:
    """The sum of each block's values above the row's floor."""
    return jnp.sum(jnp.where(p > floor[:, None, None], p, 0.0), axis=-1)


def gumbel(seed: UInt[Array, "O"], index: Int[Array, "O"], attempt: Int[Array, ""], *, count: int) -> jax.Array:
    """Noise of each row, from its seed, its place in the answer and the attempt alone."""

    def one(seed, index):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), attempt)
        return jax.random.gumbel(key, (count,))

    return jax.vmap(one)(seed, index)


def argmax(x: Float[Array, "O V"]) -> Int[Array, "O"]:
    """Index of each row's largest value, the first of equal ones: the block that has it, then the place in the block.

    XLA:CPU takes maxima of blocks with vector instructions and `jnp.argmax` value by value: 0.3 against 7 ms for
    O = 32, V = 49,152 on two cores.
    """
    blocks = in_blocks(x)
    which = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    block = jnp.take_along_axis(blocks, which[:, None, None], axis=1)[:, 0]
    return (which * BLOCK + jnp.argmax(block, axis=-1)).astype(jnp.int32)


def in_blocks(x: Float[Array, "O V"]) -> Float[Array, "O n b"]:
    """Each row cut into blocks, the last filled up with -inf."""
    _, V = x.shape
    return rearrange(jnp.pad(x, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf), "O (n b) -> O n b", b=BLOCK)


def largest(x: Float[Array, "O V"], k: int) -> tuple[Float[Array, "O k"], Int[Array, "O k"]]:
    """The k largest values of each row, largest first, and where they are: all in the k blocks with the largest maxima.

    Where V < k, the rest is -inf at places past V.
    """
    blocks = in_blocks(x)
    _, n, _ = blocks.shape
    _, which = jax.lax.top_k(jnp.max(blocks, axis=-1), min(k, n))
    which = jnp.sort(which, axis=-1)  # of equal values the first is taken
    among = rearrange(jnp.take_along_axis(blocks, which[:, :, None], axis=1), "O n b -> O (n b)")
    values, places = jax.lax.top_k(among, k)
    block = jnp.take_along_axis(which, places // BLOCK, axis=-1)
    return values, (block * BLOCK + places % BLOCK).astype(jnp.int32)


def temper(scores: Float[Array, "O V"], temperature: Float[Array, "O"]) -> Float[Array, "O V"]:
    """Scores over temperature, the largest at 0 so that no temperature overflows. Greedy rows (0) are left at 1."""
    scores = scores - jnp.max(scores, axis=-1, keepdims=True)
    return scores / jnp.where(temperature > 0, temperature, 1.0)[:, None]


def keep_top_k(scores: Float[Array, "O V"], k: Int[Array, "O"]) -> Float[Array, "O V"]:
    """The k largest scores, and any equal to the last of them; 0 keeps all."""

    def by_rank(scores):
        values, _ = largest(scores, FEW)
        return scores >= taken(values, jnp.clip(k - 1, 0, FEW - 1))[:, None]

    def by_count(scores):
        return reaching(scores, jnp.ones_like(scores), k.astype(jnp.float32))

    kept = jax.lax.cond(jnp.any(k > FEW), by_count, by_rank, scores)
    return jnp.where(kept | (k <= 0)[:, None], scores, -jnp.inf)


def reaching(
    values: Float[Array, "O V"], weights: Float[Array, "O V"], target: Float[Array, "O"]
) -> Bool[Array, "O V"]:
    """Marks values >= t for the greatest t at which the weights of the marked reach `target` (or t = the smallest).

    No sort: 32 halvings of the range of float32 seen as integers, which order as the floats do. On XLA:CPU this takes
    a fifteenth of the time of a sort at V = 49,152.
    """
    order = ordered(values)

    def halve(_, bounds):
        low, high = bounds  # t is in low…high
        middle = high - ((high - low) >> 1)  # unsigned, so the difference cannot overflow
        enough = jnp.sum(jnp.where(order >= middle[:, None], weights, 0.0), axis=-1) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    t, _ = jax.lax.fori_loop(0, 32, halve, (jnp.min(order, axis=-1), jnp.max(order, axis=-1)))
    return order >= t[:, None]


def ordered(x: Float[Array, "O V"]) -> UInt[Array, "O V"]:
    """Unsigned integers in the order of the float32 values: the sign bit is flipped, all bits where it was set."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    return jnp.where((bits & sign) != 0, ~bits, bits | sign)
