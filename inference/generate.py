"""Prompts in, text out: tokens become words as they come, and answers end at end tokens, stop strings and limits."""

import dataclasses
from collections.abc import Iterator, Sequence

from jax.sharding import Mesh

from data.tokenizer import TextStream, Tokenizer
from inference.cache import Prompt
from inference.config import GenerationConfig, SamplingConfig
from inference.engine import Engine, Row, Tokens
from inference.stopping import UntilStop
from model.config import ModelConfig
from model.parameters import Parameters
from parallel.config import AxisRules


class Answer:
    """The text of one row as far as it has come."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer, stop: Sequence[str]):
        self.prompt, self.end_ids = prompt, frozenset(tokenizer.end_ids)
        self.tokens: list[int] = []  # an end token, or those that spell a stop string, included
        self.logprobs: list[float] = []
        self.text = ""  # neither of them included
        self._stream, self._until = TextStream(tokenizer), UntilStop(stop)

    @property
    def has_stopped(self) -> bool:
        """Whether the model ended the answer, or a stop string did."""
        return self._until.found or (bool(self.tokens) and self.tokens[-1] in self.end_ids)

    @property
    def finish_reason(self) -> str:
        """Why a finished answer ended: at an end token or a stop string, or at its length."""
        return "stop" if self.has_stopped else "length"

    def take(self, new: Tokens) -> str:
        """More tokens; -> what of their text can be shown."""
        shown = ""
        for token, logprob in zip(*new, strict=True):
            if self._until.found:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token not in self.end_ids:
                shown += self._until.feed(self._stream.push([token]))
        self.text += shown
        return shown

    def finish(self) -> str:
        """No more tokens come; -> the text that waited for them."""
        rest = self._until.feed(self._stream.finish()) + self._until.finish()
        self.text += rest
        return rest


def generate(
    engine: Engine, tokenizer: Tokenizer, answers: Sequence[Answer], config: GenerationConfig
) -> Iterator[list[str]]:
    """Continue every answer's prompt to its end; -> each answer's new text, dispatch by dispatch.

    Answer i draws with seed + i: it is what a run for it alone with that seed gives.
    """
    max_length = engine.program.config.max_length
    rows = [
        Row(answer.prompt, seeded(config.sampling, i), min(config.max_tokens, max_length - len(answer.prompt)))
        for i, answer in enumerate(answers)
    ]
    for news in engine.stream(rows, tokenizer.end_ids):
        yield [answer.take(new) for answer, new in zip(answers, news, strict=True)]
        for i, answer in enumerate(answers):
            if answer.has_stopped:
                engine.stop(i)
    yield [answer.finish() for answer in answers]


def seeded(sampling: SamplingConfig, offset: int) -> SamplingConfig:
    """The same settings for another draw."""
    return dataclasses.replace(sampling, seed=(sampling.seed + offset) % 2**32)


def text_tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text's tokens, after the token that begins a text where the model wants one, or where there is nothing else."""
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    tokens = tokenizer.encode(text)
    if begin is not None and (tokenizer.adds_bos or not tokens):
        tokens = [begin, *tokens]
    if not tokens:
        raise ValueError("the text is empty and this model has no token that begins one; give it something to go on")
    return tokens


def check_room(tokens: Sequence[int], *, max_length: int) -> Prompt:
    """The tokens as a prompt; ValueError where the model's context has no room for one more."""
    if len(tokens) >= max_length:
        raise ValueError(
            f"the prompt is {len(tokens)} tokens long but the model's context is {max_length}, its answer included; "
            f"shorten the prompt to at most {max_length - 1} tokens"
        )
    return tuple(tokens)


def sample(
    config: ModelConfig,
    parameters: Parameters,
    tokenizer: Tokenizer,
    mesh: Mesh,
    rules: AxisRules,
    *,
    prompt: str,
    num_tokens: int,
    sampling: SamplingConfig,
) -> str:
    """One answer from parameters where they are, stacked layers and all: for training, which looks at some text."""
    engine = Engine(config, parameters, mesh, rules, num_tokens=tokenizer.vocab_size)
    answer = Answer(check_room(text_tokens(prompt, tokenizer), max_length=config.max_length), tokenizer, ())
    for _ in generate(engine, tokenizer, [answer], GenerationConfig(sampling=sampling, max_tokens=num_tokens)):
        pass
    return answer.text
