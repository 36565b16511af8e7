"""Beam search: the likeliest answers, found by keeping the likeliest beginnings. Knows no text, no model and no device.

Who computes what comes after a beam is a `Stepper`: the engine for a prompt (inference/engine_search.py), an
encoder–decoder for many sources at once (inference/translation.py). The rules are those of `transformers`: 2K
candidates of which those that end go among the answers if they are of the best K, and K others go on.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from inference.config import BeamConfig
from inference.request import TopToken


class Beam(NamedTuple):
    """An answer, or the beginning of one."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: Literal["stop", "length"] = "length"

    @property
    def total(self) -> float:
        """Its log-probability."""
        return sum(self.logprobs, 0.0)

    def with_token(self, new: TopToken) -> "Beam":
        """One token longer."""
        return Beam((*self.tokens, new.token), (*self.logprobs, new.logprob))


class Candidate(NamedTuple):
    """A beam that could be kept, and the one that it goes on from."""

    parent: int  # id
    beam: Beam


@runtime_checkable  # tests check annotations when they run
class Stepper(Protocol):
    """Computes what may come after beams, which it knows by ids."""

    def likely(self, ids: Sequence[int]) -> Mapping[int, Sequence[TopToken]]:
        """The likeliest tokens after each of these beams, the likeliest first; at least 2K where there are as many."""
        ...

    def fork(self, children: Mapping[int, Sequence[int]]) -> Mapping[int, Sequence[int]]:
        """Each beam goes on with these tokens, those without any end; -> the ids of what came of each that goes on."""
        ...


class Search:
    """One search under way."""

    def __init__(self, id: int, config: BeamConfig, *, max_tokens: int, end_ids: Sequence[int]):
        self.config, self.max_tokens, self.end_ids = config, max_tokens, end_ids
        self.beams = {id: Beam()}  # as they were last computed
        self.going: list[Candidate] = []  # what goes on from them
        self.answers: list[Beam] = []  # as many as beams at most, the best first
        self.length, self.has_ended = 0, False

    def choose(self, likely: Mapping[int, Sequence[TopToken]]) -> None:
        """Let each beam grow by a token, and say which go on."""
        self.length += 1
        candidates = best_candidates(self.beams, likely, 2 * self.config.beams)
        ended, self.going = parted(candidates, self.end_ids, self.config.beams)
        if self.length == self.max_tokens:
            ended += [candidate.beam for candidate in self.going]
        self.answers = best_answers([*self.answers, *ended], self.config)
        self.has_ended = (
            self.length == self.max_tokens
            or not self.going
            or is_settled(self.answers, self.going[0].beam, self.config, max_tokens=self.max_tokens)
        )

    def children(self) -> dict[int, list[int]]:
        """With which tokens each beam goes on: none of a search that has ended."""
        tokens: dict[int, list[int]] = {id: [] for id in self.beams}
        for candidate in [] if self.has_ended else self.going:
            tokens[candidate.parent].append(candidate.beam.tokens[-1])
        return tokens

    def rename(self, ids: Mapping[int, Sequence[int]]) -> None:
        """What goes on has these ids, by its parents'."""
        children: dict[int, list[Beam]] = {id: [] for id in self.beams}
        for candidate in self.going:
            children[candidate.parent].append(candidate.beam)
        pairs = (zip(ids.get(parent, ()), beams, strict=True) for parent, beams in children.items())
        self.beams = {id: beam for pair in pairs for id, beam in pair}


def run(stepper: Stepper, searches: Sequence[Search]) -> None:
    """All searches to their ends, every beam of them computed in the same steps."""
    going = list(searches)
    while True:
        likely = stepper.likely([id for search in going for id in search.beams])
        children: dict[int, list[int]] = {}
        for search in going:
            search.choose(likely)
            children |= search.children()
        going = [search for search in going if not search.has_ended]
        if not going:
            return
        ids = stepper.fork(children)
        for search in going:
            search.rename(ids)


def best_candidates(beams: Mapping[int, Beam], likely: Mapping[int, Sequence[TopToken]], count: int) -> list[Candidate]:
    """The likeliest of all beams that are one token longer, the likeliest first."""
    totals = {id: beam.total for id, beam in beams.items()}
    longer = [(total + top.logprob, id, top) for id, total in totals.items() for top in likely[id]]
    best = sorted(longer, key=lambda one: -one[0])[:count]
    return [Candidate(id, beams[id].with_token(top)) for _, id, top in best]


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
