"""What an API request asks of an engine: prompts as tokens, limits kept, sampling, grammar. Knows no HTTP server.

What people write stays text here, too: a control token spelled out in a prompt is encoded as letters.
"""

import dataclasses
import json
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from data import chat
from data.chat import ChatTemplate
from data.tokenizer import HuggingFaceTokenizer, Tokenizer
from inference import constraint
from inference.config import SamplingConfig, ServerConfig
from inference.constraint import Grammar, GrammarConstraint
from inference.openai_api import ApiError, AskedText, StructuredOutputs
from inference.request import Prompt, Request
from inference.spelling import Spelling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A model as the API shows it."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_length: int  # tokens of a prompt and its answer
    created: int  # seconds since 1970
    spelling: Spelling


class Plan(NamedTuple):
    """What the engine has to do for one API request."""

    prompts: list[Prompt]
    requests: list[Request]  # as many for each prompt, one prompt after the other
    stop: tuple[str, ...]


def check_model(asked: str | None, served: Served) -> None:
    """Refuse a model that is not here."""
    if asked is not None and asked != served.name:
        message = f"the model {asked!r} is not served here; ask for {served.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def check_count(asked: AskedText, num_prompts: int, each: int, *, config: ServerConfig, capacity: int) -> None:
    """Refuse more answers than the server would ever compute at once."""
    if each > config.max_n:
        raise ApiError(400, f"n={each} is more than the {config.max_n} answers that one prompt may have", param="n")
    if num_prompts * each > capacity:
        raise ApiError(
            400, f"{num_prompts} prompts with n={each} are more than the {capacity} answers that fit at once", param="n"
        )


def text_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text's letters as tokens, after the token that begins a text where the model wants one or there is no other."""
    is_subword = isinstance(tokenizer, HuggingFaceTokenizer)
    tokens = chat.encode_letters(text, tokenizer) if is_subword else tokenizer.encode(text)
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if begin is not None and (tokenizer.adds_bos or not tokens):
        tokens = [begin, *tokens]
    return tokens


def prompts(
    given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    served: Served,
    *,
    param: str,
    config: ServerConfig,
) -> list[Prompt]:
    """One prompt or several, as texts or as tokens."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        several: Sequence[Any] = [given]
    else:
        several = given
    if not 1 <= len(several) <= config.max_inputs:
        raise ApiError(400, f"{param} has {len(several)} items; 1 to {config.max_inputs} may be given", param=param)
    return [one_prompt(item, served, param=param) for item in several]


def one_prompt(given: str | Sequence[int], served: Served, *, param: str) -> Prompt:
    """A text or tokens, checked."""
    tokenizer = served.tokenizer
    tokens = text_prompt(given, tokenizer) if isinstance(given, str) else list(given)
    if not tokens:
        raise ApiError(400, f"{param} is empty; give the model something to go on", param=param)
    unknown = next((token for token in tokens if token >= tokenizer.vocab_size), None)
    if unknown is not None:
        raise ApiError(400, f"{param} has token {unknown}, but there are {tokenizer.vocab_size}", param=param)
    return tuple(tokens)


def budget(asked: int | None, prompt: Prompt, served: Served, *, param: str, config: ServerConfig) -> int:
    """Tokens that an answer may have: as asked, or as many as there is room for."""
    room, limit = served.max_length - len(prompt), config.max_answer or served.max_length
    if asked == 0 and room >= 0:
        return 0
    if room < 1 or (asked is not None and asked > room):
        more = f" and {asked} for its answer" if asked else ""
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens{more}, but the model's context is {served.max_length}, "
            "answer included; shorten the prompt or ask for less",
            param=param, code="context_length_exceeded",
        )  # fmt: skip
    if asked is not None and asked > limit:
        raise ApiError(400, f"{param}={asked} is more than the {limit} tokens that an answer may have", param=param)
    return min(room, limit) if asked is None else asked


def sampling(asked: AskedText, served: Served) -> SamplingConfig:
    """How tokens are chosen; without a seed each request draws anew."""
    bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
    unknown = next((token for token in bias if token >= served.tokenizer.vocab_size), None)
    if unknown is not None:
        message = f"logit_bias names token {unknown}, but there are {served.tokenizer.vocab_size}"
        raise ApiError(400, message, param="logit_bias")
    if len(bias) < len(asked.logit_bias or {}):
        raise ApiError(400, "logit_bias names a token twice", param="logit_bias")

    def given(value: float | None, default: float) -> float:
        return default if value is None else float(value)

    return SamplingConfig(
        logit_bias=tuple(bias.items()),
        repetition_penalty=given(asked.repetition_penalty, 1.0),
        frequency_penalty=given(asked.frequency_penalty, 0.0),
        presence_penalty=given(asked.presence_penalty, 0.0),
        temperature=given(asked.temperature, 1.0),
        top_k=max(0, asked.top_k or 0),
        top_p=given(asked.top_p, 1.0),
        min_p=given(asked.min_p, 0.0),
        seed=secrets.randbits(32) if asked.seed is None else asked.seed % 2**32,
    )


def stops(asked: AskedText) -> tuple[str, ...]:
    """Texts that end the answer."""
    return (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())


def form_of(asked: AskedText) -> Grammar | None:
    """The form that one of vLLM's fields asks for."""
    wanted = asked.structured_outputs or StructuredOutputs()
    schemas, patterns = (asked.guided_json, wanted.json_), (asked.guided_regex, wanted.regex)
    choices, grammars = (asked.guided_choice, wanted.choice), (asked.guided_grammar, wanted.grammar)
    return only(
        [
            *(constraint.json_schema(schema_of(schema)) for schema in schemas if schema is not None),
            *(constraint.regex(pattern) for pattern in patterns if pattern is not None),
            *(constraint.choice(words) for words in choices if words is not None),
            *(constraint.lark(grammar) for grammar in grammars if grammar is not None),
            *([constraint.json_object()] if wanted.json_object else []),
        ]
    )


def only(forms: Sequence[Grammar]) -> Grammar | None:
    """The one form that was asked for."""
    if len(forms) > 1:
        kinds = " and a ".join(form.kind for form in forms)
        raise ApiError(400, f"a {kinds} are asked for at once; an answer follows one", param="structured_outputs")
    return forms[0] if forms else None


def schema_of(given: dict[str, Any] | str) -> dict[str, Any]:
    """A schema that was perhaps written as text."""
    try:
        schema = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the JSON schema is no JSON: {error}", code="invalid_grammar") from None
    if not isinstance(schema, dict):
        raise ApiError(400, "the JSON schema is no object", code="invalid_grammar")
    return schema


def constraints(form: Grammar | None, tokenizer: Tokenizer, *, count: int) -> list[GrammarConstraint] | list[None]:
    """The beginning of the form for each of so many answers."""
    if form is None:
        return [None] * count
    try:
        first = constraint.constrain(form, tokenizer)
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_grammar") from error
    except TimeoutError as error:
        raise ApiError(503, str(error), code="unavailable", Retry_After="1") from error
    return [first, *(first.copy() for _ in range(count - 1))]


def requests(
    asked: AskedText,
    prompt: Prompt,
    served: Served,
    *,
    count: int,
    max_tokens: int,
    num_top: int,
    salt: str,
    form: Grammar | None,
) -> list[Request]:
    """So many answers to one prompt; answer i draws with seed + i."""
    chosen = sampling(asked, served)
    return [
        Request(
            prompt=prompt,
            sampling=dataclasses.replace(chosen, seed=(chosen.seed + i) % 2**32),
            max_tokens=max_tokens,
            end_ids=() if asked.ignore_eos else tuple(served.tokenizer.end_ids),
            priority=asked.priority or 0,
            salt=f"{salt}/{asked.cache_salt or ''}",
            num_top=num_top,
            constraint=follows,
        )
        for i, follows in enumerate(constraints(form, served.tokenizer, count=count))
    ]
