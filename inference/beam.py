"""Beam search: the likeliest answers, found by keeping the likeliest beginnings. Knows no text, no cache and no device.

Each beam is a request of the engine that is held after every token; the beams that go on are forks of those before them
and share their blocks. The rules are those of `transformers`: 2K candidates of which those that end go among the
answers if they are of the best K, and K others go on.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from inference.config import BeamConfig, SamplingConfig
from inference.engine import Engine
from inference.request import Prompt, Request, TopToken


class Beam(NamedTuple):
    """An answer, or the beginning of one."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: Literal["stop", "length"] = "length"

    @property
    def total(self) -> float:
        """Its log-probability."""
        return sum(self.logprobs)

    def with_token(self, new: TopToken) -> "Beam":
        """One token longer."""
        return Beam((*self.tokens, new.token), (*self.logprobs, new.logprob))


class Candidate(NamedTuple):
    """A beam that could be kept, and the one that it goes on from."""

    parent: int  # id
    beam: Beam


def search(
    engine: Engine, prompt: Prompt, config: BeamConfig, *, max_tokens: int, end_ids: Sequence[int]
) -> list[Beam]:
    """As many answers as beams at most, the best first. One search at a time on an engine, beside other requests."""
    max_tokens = min(max_tokens, engine.max_length - len(prompt))
    check_room(engine, prompt, config, max_tokens=max_tokens)
    request = Request(
        prompt=prompt,
        sampling=SamplingConfig(temperature=0.0, top_p=1.0),
        max_tokens=max_tokens,
        num_top=2 * config.beams,
        is_beam=True,
    )
    beams, answers = {engine.add(request): Beam()}, []
    try:
        for length in range(1, max_tokens + 1):
            candidates = best_candidates(beams, likely_tokens(engine, beams), 2 * config.beams)
            ended, going = parted(candidates, end_ids, config.beams)
            answers = best_answers([*answers, *ended], config)
            if length == max_tokens:
                return best_answers([*answers, *(candidate.beam for candidate in going)], config)
            if not going or is_settled(answers, going[0].beam, config, max_tokens=max_tokens):
                return answers
            beams = forked(engine, beams, going)
    finally:
        for id in beams:
            engine.cancel(id)
    raise AssertionError("a search returns at its longest answers")


def check_room(engine: Engine, prompt: Prompt, config: BeamConfig, *, max_tokens: int) -> None:
    """ValueError where the beams cannot all be computed at once."""
    rows, size = engine.options.max_rows, engine.options.block_size
    if config.beams > rows:
        raise ValueError(f"{config.beams} beams need as many rows and the engine has {rows}; give it more max_rows")
    length = len(prompt) + max_tokens
    need, room = config.beams * (-(-length // size) + 1), engine.options.cache_tokens // size
    if need > room:
        raise ValueError(
            f"{config.beams} beams of {length} tokens need up to {need} blocks, the cache has {room}; "
            "search with fewer beams or tokens, or give the engine more cache_tokens"
        )


def likely_tokens(engine: Engine, beams: Mapping[int, Beam]) -> dict[int, list[TopToken]]:
    """Step till every beam has chosen; -> the likeliest tokens after each. Outputs of other requests are not kept."""
    likely: dict[int, list[TopToken]] = {}
    while len(likely) < len(beams):
        for output in engine.step():
            if output.id in beams and output.finish == "error":
                raise ValueError(output.error)
            if output.id in beams and output.tokens:
                likely[output.id] = [top for top in output.top[0] if top.logprob > float("-inf")]
    return likely


def best_candidates(beams: Mapping[int, Beam], likely: Mapping[int, Sequence[TopToken]], count: int) -> list[Candidate]:
    """The likeliest of all beams that are one token longer, the likeliest first."""
    longer = [Candidate(id, beam.with_token(top)) for id, beam in beams.items() for top in likely[id]]
    return sorted(longer, key=lambda candidate: -candidate.beam.total)[:count]


def parted(candidates: Sequence[Candidate], end_ids: Sequence[int], count: int) -> tuple[list[Beam], list[Candidate]]:
    """Those of the best `count` that have ended, and the best `count` that go on."""
    is_end = [candidate.beam.tokens[-1] in end_ids for candidate in candidates]
    ended = [candidate.beam for candidate, ends in zip(candidates[:count], is_end, strict=False) if ends]
    going = [candidate for candidate, ends in zip(candidates, is_end, strict=True) if not ends]
    return [beam._replace(finish="stop") for beam in ended], going[:count]


def score(beam: Beam, config: BeamConfig, length: int | None = None) -> float:
    """Log-probability over length to the power of the penalty (arXiv:1609.08144, eq. 14, as `transformers` has it)."""
    return beam.total / (length or len(beam.tokens)) ** config.length_penalty


def best_answers(answers: Sequence[Beam], config: BeamConfig) -> list[Beam]:
    """As many answers as beams, the best first."""
    return sorted(answers, key=lambda beam: -score(beam, config))[: config.beams]


def is_settled(answers: Sequence[Beam], likeliest: Beam, config: BeamConfig, *, max_tokens: int) -> bool:
    """Whether the search can end: what goes on loses probability, and can gain by its length at most so much."""
    if len(answers) < config.beams:
        return False
    length = max_tokens if config.length_penalty > 0 else len(likeliest.tokens)
    return config.early_stopping or score(likeliest, config, length) <= score(answers[-1], config)


def forked(engine: Engine, beams: Mapping[int, Beam], going: Sequence[Candidate]) -> dict[int, Beam]:
    """Let the engine go on with these, and with no other beam."""
    children: dict[int, list[Beam]] = {id: [] for id in beams}
    for candidate in going:
        children[candidate.parent].append(candidate.beam)
    ids = engine.fork({id: [beam.tokens[-1] for beam in some] for id, some in children.items()})
    return {new: beam for id, some in ids.items() for new, beam in zip(some, children[id], strict=True)}
