"""Prompts in, text out: tokens become words as they come, and answers end at end tokens, stop strings and limits."""

import dataclasses
from collections.abc import Iterator, Sequence

from jax.sharding import Mesh

from data.tokenizer import TextStream, Tokenizer
from inference.config import EngineConfig, GenerationConfig, SamplingConfig
from inference.engine import Engine
from inference.request import Output, Prompt, Request
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

    def take(self, tokens: Sequence[int], logprobs: Sequence[float]) -> str:
        """More tokens; -> what of their text can be shown."""
        shown = ""
        for token, logprob in zip(tokens, logprobs, strict=True):
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
    """Continue every answer's prompt to its end; -> each answer's new text, step by step. May be closed early.

    Answer i draws with seed + i: it is what a run for it alone with that seed gives.
    """
    open_ = {}
    for i, answer in enumerate(answers):
        request = Request(
            prompt=answer.prompt,
            sampling=seeded(config.sampling, i),
            max_tokens=config.max_tokens,
            end_ids=tokenizer.end_ids,
        )
        open_[engine.add(request)] = i
    try:
        while open_:
            pieces = [""] * len(answers)
            for output in engine.step():
                if output.id in open_:
                    pieces[open_[output.id]] = _taken(answers[open_[output.id]], output)
                    if output.finish is not None or answers[open_[output.id]].has_stopped:
                        engine.cancel(output.id)
                        del open_[output.id]
            if any(pieces):
                yield pieces
    finally:
        for id in open_:
            engine.cancel(id)
    yield [answer.finish() for answer in answers]


def _taken(answer: Answer, output: Output) -> str:
    """What of an output's text can be shown."""
    if output.finish == "error":
        raise ValueError(output.error)
    return answer.take(output.tokens, output.logprobs)


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


def cache_for(lengths: Sequence[int]) -> int:
    """Cache tokens that surely hold sequences of these lengths at once; of a few sizes, so that few are compiled."""
    size = EngineConfig().block_size
    blocks = sum(-(-length // size) + 1 for length in lengths) + 1
    return size * (1 << blocks.bit_length())


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
    tokens = check_room(text_tokens(prompt, tokenizer), max_length=config.max_length)
    options = EngineConfig(max_rows=1, cache_tokens=cache_for([len(tokens) + num_tokens]), prefix_cache=False)
    engine = Engine(config, parameters, mesh, rules, num_tokens=tokenizer.vocab_size, options=options)
    answer = Answer(tokens, tokenizer, ())
    for _ in generate(engine, tokenizer, [answer], GenerationConfig(sampling=sampling, max_tokens=num_tokens)):
        pass
    return answer.text
