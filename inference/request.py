"""What an engine is asked for and what it answers: plain records. Knows no text, no cache and no device."""

import dataclasses
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from inference.config import SamplingConfig

Prompt = tuple[int, ...]
Finish = Literal["stop", "length", "cancelled", "error"]  # stop: at an end token, or where the grammar ends


@runtime_checkable
class Constraint(Protocol):
    """A grammar that an answer has to follow: what may come next, and the state after each token."""

    def allowed(self) -> np.ndarray:
        """Bits of the tokens that may come next: uint32 [ceil(V / 32)], token t is bit t % 32 of word t // 32."""
        ...

    def take(self, token: int) -> None:
        """The answer went on with this token."""
        ...

    @property
    def has_ended(self) -> bool:
        """Whether the grammar lets nothing more come."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One answer to compute."""

    prompt: Prompt  # at least one token
    sampling: SamplingConfig
    max_tokens: int  # tokens it may choose, at least 1
    end_ids: tuple[int, ...] = ()  # tokens that end it
    priority: int = 0  # a request of priority p stands in the queue as if it had come p turns of waiting later
    salt: str = ""  # prompts share cached blocks only with prompts of the same salt
    num_top: int = 0  # so many likeliest tokens are told with each token, at most 20
    constraint: Constraint | None = None
    is_beam: bool = False  # after each token it is held until Engine.fork tells how it goes on


class TopToken(NamedTuple):
    """A likely token."""

    token: int
    logprob: float


class Output(NamedTuple):
    """What came of one request in one step of the engine. The last one has `finish`."""

    id: int  # as Engine.add gave it
    tokens: list[int]  # the end token included
    logprobs: list[float]  # of each under the model: before penalties, temperature and filters
    top: list[list[TopToken]]  # as many per token as the request asked for, the likeliest first
    finish: Finish | None = None
    error: str = ""  # with finish "error": one line


class EngineStats(NamedTuple):
    """What an engine holds and has done since its start."""

    waiting: int  # requests
    running: int
    blocks: int  # of the KV cache, over all kinds of layers
    blocks_used: int  # that a request holds now
    blocks_cached: int  # that none holds, kept for prompts that begin alike
    steps: int
    prompt_tokens: int  # of all requests that were let in
    cached_tokens: int  # of these, not computed since the cache had them
    generated_tokens: int
    preemptions: int
    drafted: int  # tokens guessed ahead
    accepted: int  # of these, right
    finished: int  # requests, cancelled ones too
