"""How tokens are chosen and when to stop: frozen records only. Imports no jax."""

import dataclasses
from typing import Literal

from parallel.records import require

MAX_BEAMS = 10
MAX_BIASED = 300  # tokens of a logit bias, as in OpenAI's API


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen. The steps are taken in the order of the fields, as in `transformers`."""

    logit_bias: tuple[tuple[int, float], ...] = ()  # what is added to the logits of some tokens, by their ids
    repetition_penalty: float = 1.0  # logits of tokens already there: divided by it if positive, else multiplied
    frequency_penalty: float = 0.0  # taken off a token's logit for each time the answer has it
    presence_penalty: float = 0.0  # taken off a token's logit if the answer has it
    temperature: float = 0.8  # logits are divided by it; 0 takes the likeliest token
    top_k: int = 0  # only this many of the likeliest tokens; 0 is all
    top_p: float = 0.95  # only the likeliest tokens that together reach this probability; 1 is all
    min_p: float = 0.0  # only tokens at least this likely relative to the likeliest; 0 is all
    seed: int = 0  # the draw depends on it, on the place in the answer and on the probabilities alone

    def __post_init__(self):
        check_bias(self.logit_bias)
        require(self, "sampling", "repetition_penalty", low=0.01, high=100)
        require(self, "sampling", "frequency_penalty", low=-2, high=2)
        require(self, "sampling", "presence_penalty", low=-2, high=2)
        require(self, "sampling", "temperature", low=0, high=100)
        require(self, "sampling", "top_k", low=0, high=2**24)
        require(self, "sampling", "min_p", low=0, high=1)
        require(self, "sampling", "seed", low=0, high=2**32 - 1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p} must be above 0 and at most 1; 1 keeps every token")


def check_bias(bias: tuple[tuple[int, float], ...]) -> None:
    """ValueError where a bias is none that OpenAI's API takes."""
    if len(bias) > MAX_BIASED:
        raise ValueError(
            f"sampling.logit_bias names {len(bias)} tokens, {MAX_BIASED} at most; leave the least needed out"
        )
    if len({token for token, _ in bias}) < len(bias):
        raise ValueError("sampling.logit_bias names a token twice; give each at most once")
    for token, value in bias:
        if token < 0:
            raise ValueError(f"sampling.logit_bias names token {token}; ids begin at 0")
        if not -100 <= value <= 100:
            raise ValueError(f"sampling.logit_bias adds {value} to token {token}; it must be between -100 and 100")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a prompt is continued, and how far."""

    sampling: SamplingConfig = SamplingConfig()
    max_tokens: int = 256  # the answer ends after this many, or where the model's context is full
    stop: tuple[str, ...] = ()  # the answer ends before the first of these texts

    def __post_init__(self):
        require(self, "generation", "max_tokens", low=1)
        if "" in self.stop:
            raise ValueError('stop="" is empty and would end every answer at once; give a text or leave it out')


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """How the likeliest answers are searched for."""

    beams: int = 1  # beginnings that are kept at each step, the likeliest ones; 1 draws answers instead of searching
    length_penalty: float = 1.0  # an answer's score is its log-probability over its length to this power
    early_stopping: bool = False  # end with as many answers as beams, even if a better one could still come

    def __post_init__(self):
        require(self, "beam", "length_penalty", low=-10, high=10)
        if not 1 <= self.beams <= MAX_BEAMS:
            raise ValueError(
                f"beams={self.beams} must be between 1 and {MAX_BEAMS}: a step tells 20 tokens of each row"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How many sequences an engine computes at once, and how large its KV cache is."""

    max_rows: int = 32  # R, sequences computed at once; others wait
    cache_tokens: int = 16384  # tokens that the KV cache holds, over all sequences
    block_size: int = 32  # Z, tokens of a KV block, the unit that sequences own and share
    chunk: int = 256  # prompt tokens that one step reads at most, beside a token of each running sequence
    max_length: int = 0  # tokens of a sequence, its answer included; 0 is the model's context
    kv_dtype: Literal["compute", "int8"] = "compute"  # of the KV cache; int8 keeps a scale per token and head
    prefix_cache: bool = True  # prompts that begin alike share the blocks of their beginning
    speculation: Literal["off", "ngram", "draft"] = "off"  # guess tokens ahead, from the text or by a draft model
    one_shape: bool = False  # each step as large as the largest: what else runs changes no bit of an answer; slow
    draft_length: int = 4  # W - 1, tokens guessed ahead at most; fewer where guesses fail

    def __post_init__(self):
        for name in ("max_rows", "cache_tokens", "block_size", "chunk", "draft_length"):
            require(self, "engine", name, low=1)
        require(self, "engine", "max_length", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where a server listens, who may ask it, and for how much."""

    host: str = "127.0.0.1"  # address to listen at; 0.0.0.0 is every network
    port: int = 8000  # 0 takes a free one
    name: str = ""  # of the model in the API; default the last part of MODEL
    api_key: tuple[str, ...] = ()  # who asks has to know one; also from the variable MESHLIGHT_API_KEYS, with commas
    api_keys_file: str = ""  # more keys, one a line
    isolate_keys: bool = False  # cached prompts are shared only between requests of one key
    queue: int = 128  # requests that may wait, beside those computed at once; further ones are refused with 429
    max_n: int = 16  # answers to one prompt
    max_answer: int = 0  # tokens of an answer; 0 is what the context has room for
    max_inputs: int = 128  # prompts, or texts to embed, of one request
    max_body: int = 4_194_304  # bytes of a request
    timeout: float = 600.0  # seconds that an answer may take, waiting included
    patience: float = 30.0  # seconds that a client may take to send a request, or leave an answer unread
    buffer: int = 4096  # tokens that came and a client did not read yet, at most
    drain: float = 60.0  # seconds that running answers get to end after SIGTERM

    def __post_init__(self):
        require(self, "server", "port", low=0, high=65535)
        for name in ("queue", "max_answer"):
            require(self, "server", name, low=0)
        for name in ("max_n", "max_inputs", "max_body", "buffer"):
            require(self, "server", name, low=1)
        for name in ("timeout", "patience", "drain"):
            require(self, "server", name, low=0.01, high=10**6)
        if "" in self.api_key:
            raise ValueError("server.api_key is empty, which everybody knows; give a key or leave it out")
