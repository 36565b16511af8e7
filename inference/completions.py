"""POST /v1/completions: prompts continued. From the wire to a plan, from pieces to the wire. Knows no HTTP server."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from inference import asking
from inference.asking import Plan, Served
from inference.config import ServerConfig
from inference.generate import Answer
from inference.openai_api import ApiError, AskedCompletion
from inference.pieces import Gathered, Piece, Told, pieces, usage
from inference.service import Stream


class Echo(NamedTuple):
    """A prompt as it is told again: its text, and its tokens with their log-probabilities where these are asked for."""

    text: str
    tokens: list[int]
    logprobs: list[float | None]  # the first token has none


def check(asked: AskedCompletion) -> None:
    """Refuse what contradicts itself."""
    if asked.suffix:
        raise ApiError(400, "suffix is not supported: this model continues texts and fills none in", param="suffix")
    if asked.max_tokens == 0 and not asked.echo:
        raise ApiError(400, "max_tokens=0 asks for nothing unless echo is true", param="max_tokens")
    best_of = asked.best_of or asked.n or 1
    if best_of < (asked.n or 1):
        raise ApiError(400, f"best_of={best_of} must be at least n={asked.n}", param="best_of")
    if asked.stream and best_of > (asked.n or 1):
        raise ApiError(400, "best_of picks answers when all have ended, so they cannot be streamed", param="best_of")


def plan(asked: AskedCompletion, served: Served, config: ServerConfig, *, salt: str, capacity: int) -> Plan:
    """What the engine has to do."""
    check(asked)
    prompts = asking.prompts(asked.prompt, served, param="prompt", config=config)
    count = max(asked.n or 1, asked.best_of or 1)
    asking.check_count(asked, len(prompts), count, config=config, capacity=capacity)
    form, requests = asking.form_of(asked), []
    for prompt in prompts:
        given = 16 if asked.max_tokens is None else asked.max_tokens
        max_tokens = asking.budget(given, prompt, served, param="max_tokens", config=config)
        if max_tokens:
            requests += asking.requests(
                asked, prompt, served, count=count, max_tokens=max_tokens, num_top=asked.logprobs or 0, salt=salt,
                form=form,
            )  # fmt: skip
    return Plan(prompts, requests, asking.stops(asked))


class Texts:
    """The wire form of one request's answers."""

    def __init__(self, asked: AskedCompletion, plan: Plan, served: Served, *, id: str, echoes: Sequence[Echo]):
        self._asked, self._plan, self._served, self._echoes = asked, plan, served, echoes
        self._head = {"id": id, "object": "text_completion", "created": int(time.time()), "model": served.name}
        self._each = max(1, len(plan.requests) // len(plan.prompts))  # answers a prompt

    async def whole(self, stream: Stream, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answers when all have ended."""
        gathered = await Gathered(answers).read(stream, self._plan)
        choices = [self._choice(index, place, gathered) for index, place in enumerate(self._picked(gathered))]
        return {**self._head, "choices": choices, "usage": usage(self._plan, answers)}

    def only_echo(self) -> dict[str, Any]:
        """The prompts told again, with nothing after them."""
        choices = [
            self._wire(index, echo.text, self._listed([], echo, 0), "length") for index, echo in enumerate(self._echoes)
        ]
        return {**self._head, "choices": choices, "usage": usage(self._plan, [])}

    async def chunks(self, stream: Stream, answers: Sequence[Answer]) -> AsyncIterator[dict[str, Any]]:
        """The answers as they come."""
        shown = [0] * len(answers)
        for index in range(len(answers)) if self._echoes else ():
            echo = self._echoes[index // self._each]
            shown[index] = len(echo.text)
            yield {**self._head, "choices": [self._wire(index, echo.text, self._listed([], echo, 0), None)]}
        async for piece in pieces(stream, self._plan, answers):
            if piece.text or piece.finish or self._asked.logprobs is not None:
                yield {**self._head, "choices": [self._chunk(piece, shown[piece.index])]}
            shown[piece.index] += len(piece.text)
        if self._asked.stream_options and self._asked.stream_options.include_usage:
            yield {**self._head, "choices": [], "usage": usage(self._plan, answers)}

    def _picked(self, gathered: Gathered) -> list[int]:
        """Of every prompt's answers the n likeliest, token for token, where more were computed."""
        n, picked = self._asked.n or 1, []
        for start in range(0, len(gathered.answers), self._each):
            those = list(range(start, start + self._each))
            if self._each > n:
                those = sorted(those, key=lambda i: -mean(gathered.answers[i].logprobs))[:n]
            picked += those
        return picked

    def _choice(self, index: int, place: int, gathered: Gathered) -> dict[str, Any]:
        echo = self._echoes[place // self._each] if self._echoes else None
        text = (echo.text if echo else "") + gathered.answers[place].text
        return self._wire(index, text, self._listed(gathered.told[place], echo, 0), gathered.finish[place])

    def _chunk(self, piece: Piece, offset: int) -> dict[str, Any]:
        return self._wire(piece.index, piece.text, self._listed(piece.told, None, offset), piece.finish)

    def _wire(self, index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _listed(self, told: Sequence[Told], echo: Echo | None, offset: int) -> dict[str, Any] | None:
        """Log-probabilities in lists, those of the prompt first."""
        if self._asked.logprobs is None:
            return None
        spelling, top = self._served.spelling, self._asked.logprobs > 0
        tokens = [*(echo.tokens if echo else []), *(each.token for each in told)]
        tops = [{spelling.name(token): logprob for token, logprob in each.top} for each in told]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(spelling.text(token))
        return {
            "tokens": [spelling.name(token) for token in tokens],
            "token_logprobs": [*(echo.logprobs if echo else []), *(each.logprob for each in told)],
            "top_logprobs": [*([None] * len(echo.tokens) if echo else []), *tops] if top else None,
            "text_offset": offsets,
        }


def mean(values: Sequence[float]) -> float:
    """The mean; nothing at all is the worst."""
    return sum(values) / len(values) if values else float("-inf")
