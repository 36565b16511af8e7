"""Translations by an encoder–decoder: sources in batches, greedily or by beam search. Knows no text and no files.

The encoder is the prefill, then come steps of a token. A greedy batch is one program with the loop on the device. In a
search K beams of each source are rows of the device, copied and dropped as the rules of inference/beam.py say. A batch
holds sources of like length, so that few shapes are compiled and rows end at about the same time.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from inference.beam import Beam, Search, run
from inference.config import BeamConfig
from inference.request import TopToken
from inference.sampling import argmax, largest, logprobs_of
from inference.steps import everywhere, power_of_two
from model.parameters import Parameters, seq2seq
from model.seq2seq_config import Seq2SeqConfig
from parallel.config import AxisRules
from parallel.sharding import use

MOST_ROWS = 128  # beams that are computed at once
SHORTEST = 16  # source tokens that a batch has room for at least


class Program(NamedTuple):
    """What is compiled for."""

    config: Seq2SeqConfig
    mesh: Mesh
    rules: AxisRules
    room: int  # tokens of a translation at most, in this batch
    beams: int  # K
    bos_id: int
    eos_id: int


class Batch(NamedTuple):
    """Sources of like length; rows behind them are empty."""

    places: list[int]  # of the sources among all
    source: Int[np.ndarray, "B S"]
    mask: Float[np.ndarray, "B S"]  # 1 for the source's tokens
    limits: Int[np.ndarray, "B"]  # tokens that each translation may have, 0 in empty rows


class Turn(NamedTuple):
    """A greedy batch after some tokens."""

    step: Int[Array, ""]
    last: Int[Array, "B"]
    state: Any
    tokens: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]
    lengths: Int[Array, "B"]  # tokens that count
    has_ended: Bool[Array, "B"]


def translate(
    config: Seq2SeqConfig,
    parameters: Parameters,
    mesh: Mesh,
    rules: AxisRules,
    sources: Sequence[Sequence[int]],
    *,
    beam: BeamConfig,
    bos_id: int,
    eos_id: int,
    max_tokens: int,
) -> list[Beam]:
    """The best translation of each source: no bos, and eos as its last token where it ended by itself.

    A source of n tokens, its eos included, gets at most 2n + 10, `max_tokens` and config.max_length tokens.
    """
    most, found = min(max_tokens, config.max_length), {}
    check_lengths(sources, max_length=config.max_length)
    for batch in batches(sources, rows=max(1, MOST_ROWS // beam.beams), longest=config.max_length, most=most):
        B, S = batch.source.shape
        program = Program(config, mesh, rules, min(most, most_tokens(S)), beam.beams, bos_id, eos_id)
        answer = greedy_answers if beam.beams == 1 else functools.partial(searched_answers, beam=beam)
        found |= dict(zip(batch.places, answer(program, parameters, batch), strict=True))
    return [found[place] for place in range(len(sources))]


def check_lengths(sources: Sequence[Sequence[int]], *, max_length: int) -> None:
    """ValueError where a source is empty or does not fit."""
    for place, source in enumerate(sources):
        if not 1 <= len(source) <= max_length:
            raise ValueError(
                f"source {place} has {len(source)} tokens but the model takes 1 to {max_length}; cut it in two"
            )


def most_tokens(length: int) -> int:
    """How long a translation of so many tokens may be."""
    return 2 * length + 10


def batches(sources: Sequence[Sequence[int]], *, rows: int, longest: int, most: int) -> Iterator[Batch]:
    """All sources, those of like length together; widths are powers of two, and so are counts of rows."""
    widths: dict[int, list[int]] = {}
    for place in sorted(range(len(sources)), key=lambda place: len(sources[place])):
        width = min(max(power_of_two(len(sources[place])), SHORTEST), longest)
        widths.setdefault(width, []).append(place)
    for width, places in widths.items():
        size = min(power_of_two(len(places)), power_of_two(rows + 1) // 2)
        for start in range(0, len(places), size):
            yield filled(sources, places[start : start + size], shape=(size, width), most=most)


def filled(sources: Sequence[Sequence[int]], places: list[int], *, shape: tuple[int, int], most: int) -> Batch:
    """Some of the sources as arrays."""
    tokens, mask, limits = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape[0], np.int32)
    mask[:, 0] = 1  # empty rows attend to something
    for row, place in enumerate(places):
        source = sources[place]
        tokens[row, : len(source)], mask[row, : len(source)] = source, 1
        limits[row] = min(most, most_tokens(len(source)))
    return Batch(places, tokens, mask, limits)


def put(host: Any, mesh: Mesh) -> Any:
    """Host arrays on every device of the mesh."""
    return jax.device_put(host, NamedSharding(mesh, P()))


def check_finite(logprobs: Float[np.ndarray, "..."]) -> None:
    """ValueError for numbers that no model gives which is whole."""
    if not np.isfinite(logprobs).all():
        raise ValueError(
            "the model gives a token no log-probability; its weights are damaged, or too large for compute_dtype"
        )


# Greedy


def greedy_answers(program: Program, parameters: Parameters, batch: Batch) -> list[Beam]:
    """The likeliest token after each."""
    arrays = put((batch.source, batch.mask, batch.limits), program.mesh)
    tokens, logprobs, lengths = jax.device_get(greedy(parameters, *arrays, program=program))
    answers = []
    for row in range(len(batch.places)):
        some, told = tokens[row, : lengths[row]].tolist(), logprobs[row, : lengths[row]]
        check_finite(told)
        answers.append(Beam(tuple(some), tuple(told.tolist()), "stop" if some[-1] == program.eos_id else "length"))
    return answers


@functools.partial(jax.jit, static_argnames="program")
def greedy(
    parameters: Parameters,
    source: Int[Array, "B S"],
    mask: Float[Array, "B S"],
    limits: Int[Array, "B"],
    *,
    program: Program,
) -> tuple[Int[Array, "B T"], Float[Array, "B T"], Int[Array, "B"]]:
    """Tokens, their log-probabilities and how many count: steps till all rows have ended, all on the device."""
    with use(program.mesh, program.rules):
        model = seq2seq(program.config, parameters)
        encoded = model.encode(source, mask)

        def go_on(turn: Turn) -> Turn:
            hidden, state, _ = model.step(encoded, turn.state, turn.last)
            logits = model.logits(hidden[:, None])[:, 0]
            last = argmax(logits)
            lengths = turn.lengths + (~turn.has_ended).astype(jnp.int32)
            return Turn(
                step=turn.step + 1,
                last=last,
                state=state,
                tokens=turn.tokens.at[:, turn.step].set(last),
                logprobs=turn.logprobs.at[:, turn.step].set(logprobs_of(logits, last)),
                lengths=lengths,
                has_ended=turn.has_ended | (last == program.eos_id) | (lengths >= limits),
            )

        start = model.start(encoded, program.room)
        end = jax.lax.while_loop(lambda turn: ~jnp.all(turn.has_ended), go_on, first_turn(start, limits, program))
        return everywhere((end.tokens, end.logprobs, end.lengths))


def first_turn(state: Any, limits: Int[Array, "B"], program: Program) -> Turn:
    """Before the first token."""
    (B,), T = limits.shape, program.room
    return Turn(
        step=jnp.int32(0),
        last=jnp.full(B, program.bos_id, jnp.int32),
        state=state,
        tokens=jnp.zeros((B, T), jnp.int32),
        logprobs=jnp.zeros((B, T), jnp.float32),
        lengths=jnp.zeros(B, jnp.int32),
        has_ended=limits <= 0,
    )


# Search


def searched_answers(program: Program, parameters: Parameters, batch: Batch, *, beam: BeamConfig) -> list[Beam]:
    """The best that a search finds for each source, all of them searched at once."""
    K, ends = program.beams, (program.eos_id,)
    limits = batch.limits[: len(batch.places)].tolist()
    searches = [Search(row * K, beam, max_tokens=limit, end_ids=ends) for row, limit in enumerate(limits)]
    run(Rows(program, parameters, batch), searches)
    return [search.answers[0] for search in searches]


class Rows:
    """Beams as rows of the device, K of each source: the steps of a search. A beam's id is its row."""

    def __init__(self, program: Program, parameters: Parameters, batch: Batch):
        self.program, self.parameters = program, parameters
        arrays = put((batch.source, batch.mask), program.mesh)
        self._encoded, self._state = prefill(parameters, *arrays, program=program)
        self._parents = np.arange(len(batch.source) * program.beams, dtype=np.int32)
        self._tokens = np.full_like(self._parents, program.bos_id)

    def likely(self, ids: Sequence[int]) -> dict[int, list[TopToken]]:
        """The likeliest 2K tokens after each of these rows."""
        turn = put((self._parents, self._tokens), self.program.mesh)
        self._state, *told = step(self.parameters, self._encoded, self._state, *turn, program=self.program)
        tokens, logprobs = jax.device_get(told)
        check_finite(logprobs[ids, 0])
        pairs = zip(ids, tokens[ids].tolist(), logprobs[ids].tolist(), strict=True)
        return {id: [top for top in map(TopToken, *some) if top.logprob > float("-inf")] for id, *some in pairs}

    def fork(self, children: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """The rows that the next step goes on from, and with which tokens."""
        K, taken, ids = self.program.beams, {}, {}
        self._parents = np.arange(len(self._parents), dtype=np.int32)
        for parent, tokens in children.items():
            first = taken.get(parent // K, parent // K * K)
            ids[parent] = list(range(first, first + len(tokens)))
            taken[parent // K] = first + len(tokens)
            self._parents[ids[parent]], self._tokens[ids[parent]] = parent, tokens
        return ids


@functools.partial(jax.jit, static_argnames="program")
def prefill(
    parameters: Parameters, source: Int[Array, "B S"], mask: Float[Array, "B S"], *, program: Program
) -> tuple[Any, Any]:
    """Read the sources; -> what steps need of them and the first state, both K times."""
    with use(program.mesh, program.rules):
        model = seq2seq(program.config, parameters)
        encoded = jax.tree.map(lambda x: jnp.repeat(x, program.beams, axis=0), model.encode(source, mask))
        return encoded, model.start(encoded, program.room)


@functools.partial(jax.jit, static_argnames="program")
def step(
    parameters: Parameters,
    encoded: Any,
    state: Any,
    parents: Int[Array, "B"],
    tokens: Int[Array, "B"],
    *,
    program: Program,
) -> tuple[Any, Int[Array, "B top"], Float[Array, "B top"]]:
    """Each row goes on from a row with a token; -> the states, and the likeliest 2K tokens of each."""
    with use(program.mesh, program.rules):
        model = seq2seq(program.config, parameters)
        state = jax.tree.map(lambda x: jnp.take(x, parents, axis=0, mode="clip"), state)
        hidden, state, _ = model.step(encoded, state, tokens)
        logits = model.logits(hidden[:, None])[:, 0]
        values, likeliest = largest(logits, 2 * program.beams)
        return state, *everywhere((likeliest, values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)))
