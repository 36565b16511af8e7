"""Answers as pieces of text: what comes of a stream of tokens, choice by choice. Knows no wire format."""

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from data.tokenizer import Tokenizer
from inference.asking import Plan
from inference.constraint import GrammarConstraint
from inference.generate import Answer
from inference.openai_api import ApiError
from inference.request import Request, TopToken
from inference.service import Stream, UnavailableError


class Told(NamedTuple):
    """A token of an answer, with its log-probability and the likeliest ones at its place."""

    token: int
    logprob: float
    top: list[TopToken]


class Piece(NamedTuple):
    """More of one answer. Its last piece says how it ended."""

    index: int
    text: str
    told: list[Told]
    finish: str | None = None  # stop, length


def answers_of(plan: Plan, tokenizer: Tokenizer) -> list[Answer]:
    """An empty answer for every request of the plan."""
    answers = []
    for request in plan.requests:
        answer = Answer(request.prompt, tokenizer, plan.stop)
        answer.end_ids = frozenset(request.end_ids)
        answers.append(answer)
    return answers


async def pieces(stream: Stream, plan: Plan, answers: Sequence[Answer]) -> AsyncIterator[Piece]:
    """What comes, as it comes. An answer that has said a stop string ends, and the engine is told so."""
    open_ = set(range(len(answers)))
    async for index, output in stream:
        if index not in open_:
            continue
        if output.finish in ("error", "cancelled"):
            raise UnavailableError(output.error or "the answer was given up")
        answer, before = answers[index], len(answers[index].tokens)
        text = answer.take(output.tokens, output.logprobs)
        tops = output.top or [[]] * len(output.tokens)
        told = [Told(*each) for each in zip(output.tokens, output.logprobs, tops, strict=True)]
        finish = "stop" if answer.has_stopped else output.finish
        if finish is not None:
            check_followed(plan.requests[index])
        if finish is not None:
            open_.discard(index)
            text += answer.finish()
            stream.stop(index)
        if text or told or finish:
            yield Piece(index, text, told[: len(answer.tokens) - before], finish)
        if not open_:
            return


def check_followed(request: Request) -> None:
    """ApiError where an answer ended because its grammar took too much effort."""
    follows = request.constraint
    if isinstance(follows, GrammarConstraint) and follows.error:
        raise ApiError(400, f"the grammar could not be followed further: {follows.error}", code="invalid_grammar")


class Gathered:
    """Whole answers, one piece after the other."""

    def __init__(self, answers: Sequence[Answer]):
        self.answers = list(answers)
        self.told: list[list[Told]] = [[] for _ in answers]
        self.finish: list[str | None] = [None] * len(answers)

    async def read(self, stream: Stream, plan: Plan) -> "Gathered":
        """All there is."""
        async for piece in pieces(stream, plan, self.answers):
            self.told[piece.index] += piece.told
            self.finish[piece.index] = piece.finish or self.finish[piece.index]
        return self


def usage(plan: Plan, answers: Sequence[Answer]) -> dict[str, int]:
    """What an API request cost: every prompt is counted once."""
    asked, said = sum(map(len, plan.prompts)), sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
