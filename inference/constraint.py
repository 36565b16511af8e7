"""Answers that follow a grammar: JSON, a JSON schema, a regular expression, a choice, Lark. Knows no engine, no logits.

What may come next is computed by `llguidance`: Earley's parser over a lexer by derivatives, along a trie of the tokens.
A grammar comes from strangers: all that is computed for it is bounded, and what it cannot do is a ValueError.
"""

import functools
import json
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import llguidance
import numpy as np

from data.tokenizer import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer, Tokenizer

MAX_CHARACTERS = 200_000  # of a grammar
SPACE = r"[\x20\x0A\x0D\x09]{1,40}"  # between JSON's tokens; without a bound, weak models write blanks for ever
NOTHING = "NoExtensionBias"  # as llguidance says that nothing can come
PATIENCE = 5.0  # seconds for a grammar to be prepared; most take some milliseconds
LIMITS = {  # without them some hundred characters of Lark take half a minute and 1.5 GB
    "initial_lexer_fuel": 50_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_lexer_states": 20_000,  # up to 2 kB each
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # what stands in a grammar belongs to its writer
}
BUSY = threading.BoundedSemaphore(2)  # grammars being prepared at once


class Grammar(NamedTuple):
    """What an answer has to look like. Nothing is checked before it meets a tokenizer."""

    kind: str  # as errors call it
    source: str  # as llguidance reads it


def json_object() -> Grammar:
    """Any JSON object."""
    return json_schema({"type": "object"})


def json_schema(schema: Any) -> Grammar:
    """JSON that a schema describes. Keywords that cannot be followed are refused, not ignored."""
    if not isinstance(schema, dict):
        raise ValueError(f"the JSON schema is a {type(schema).__name__}; give an object")
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the JSON schema is no JSON: {error}; give an object of plain values") from None
    checked("JSON schema", text)
    return Grammar("JSON schema", llguidance.LLMatcher.grammar_from_json_schema(text, {"whitespace_pattern": SPACE}))


def regex(pattern: str) -> Grammar:
    """Text that a regular expression matches from its beginning to its end (the syntax of Rust's `regex`)."""
    checked("regular expression", pattern)
    return Grammar("regular expression", llguidance.LLMatcher.grammar_from_regex(pattern))


def choice(texts: Sequence[str]) -> Grammar:
    """One of these texts."""
    if not texts:
        raise ValueError("the choice has no texts; give at least one")
    lark = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    checked("choice", lark)
    return Grammar("choice", llguidance.LLMatcher.grammar_from_lark(lark))


def lark(text: str) -> Grammar:
    """Text that a context-free grammar derives from `start` (the syntax of Lark, as llguidance extends it)."""
    checked("Lark grammar", text)
    return Grammar("Lark grammar", llguidance.LLMatcher.grammar_from_lark(text))


def checked(kind: str, text: str) -> None:
    """ValueError where a grammar is too long, or no text."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the {kind} has {len(text)} characters, {MAX_CHARACTERS} at most; make it shorter")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {kind} has half a surrogate pair at {error.start}, which is no text; remove it"
        ) from None


class GrammarConstraint:
    """Where one answer stands in its grammar (request.Constraint)."""

    def __init__(self, matcher: llguidance.LLMatcher, end: int, num_tokens: int):
        self._matcher, self._end, self._num_tokens = matcher, end, num_tokens
        self._look()

    def allowed(self) -> np.ndarray:
        """Bits of the tokens that may come next; those that end a text are among them where the grammar may end."""
        return self._bits

    def take(self, token: int) -> None:
        """The answer went on with this token."""
        self._matcher.consume_token(token)
        self._look()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more can come: the answer is complete, or has become too costly to follow (see `error`)."""
        return self._matcher.is_stopped()

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return not self.error and self._matcher.is_accepting()

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any more; empty where it can."""
        return one_line(self._matcher.get_error())

    def copy(self) -> "GrammarConstraint":
        """The same state for another answer."""
        return GrammarConstraint(self._matcher.deep_copy(), self._end, self._num_tokens)

    def _look(self) -> None:
        """Compute what may come next. Here and not when asked: the device is computing while tokens are taken."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32).copy()
        if self._end == self._num_tokens:  # an end that only the grammar knows
            bits[self._end // 32] &= ~np.uint32(1 << self._end % 32)
        self._bits = bits[: -(-self._num_tokens // 32)]


def constrain(grammar: Grammar, tokenizer: Tokenizer) -> GrammarConstraint:
    """A grammar's beginning; ValueError where it is none, cannot be followed, or takes more effort than LIMITS let.

    Waits up to PATIENCE, other threads run; TimeoutError where others' grammars take all of that time.
    """
    tokens = grammar_tokens(tokenizer)

    def prepare() -> GrammarConstraint | str:
        matcher = llguidance.LLMatcher(tokens, grammar.source, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
        if not matcher.is_error():
            constraint = GrammarConstraint(matcher, tokens.eos_token, tokenizer.vocab_size)
            if not constraint.error and constraint.allowed().any():
                return constraint
        return one_line(matcher.get_error()) or NOTHING

    prepared = within(PATIENCE, prepare)
    if isinstance(prepared, GrammarConstraint):
        return prepared
    why = {NOTHING: "no text follows it that the tokenizer can write", None: f"it takes over {PATIENCE:g} s to prepare"}
    raise ValueError(f"the {grammar.kind} cannot be followed: {why.get(prepared, prepared)}; correct or simplify it")


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What some work gives if it is done in so many seconds, else None: then it goes on in vain, and counts as busy."""
    if not BUSY.acquire(timeout=seconds):
        raise TimeoutError("the grammars of other requests are still being prepared; try again in a moment")
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(work())
        finally:
            BUSY.release()

    threading.Thread(target=run, daemon=True, name="grammar").start()
    try:
        return results.get(timeout=seconds)
    except queue.Empty:
        return None


def one_line(error: str, length: int = 240) -> str:
    """The beginning of an error of several lines."""
    return " ".join(error.replace("<non-verbose/>", "").split())[:length]


@functools.lru_cache(maxsize=8)
def grammar_tokens(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    """The tokenizer as grammars see it: a trie of bytes. Made once, in about a second for 50,000 tokens."""
    match tokenizer:
        case HuggingFaceTokenizer():
            ends, size = list(tokenizer.end_ids), tokenizer.vocab_size
            try:
                return llguidance.LLTokenizer(
                    tokenizer.tokenizer.to_str(), n_vocab=size if ends else size + 1, eos_token=ends or [size]
                )
            except Exception as error:  # llguidance raises nothing more specific
                raise ValueError(
                    f"grammars cannot follow this tokenizer: {one_line(str(error))}; ask without a grammar"
                ) from None
        case CharTokenizer():
            place = {character: id_ for id_, character in enumerate(tokenizer.characters)}
            known = lambda text: [place[one] for one in text.decode(errors="ignore") if one in place]  # noqa: E731
            units = Units([one.encode() for one in place], len(place), None, known)
        case ByteTokenizer():
            texts = [bytes([byte]) for byte in range(256)]
            units = Units([*texts, b"<bos>"], 257, 256, list)
        case _:
            raise ValueError(f"grammars cannot follow a {type(tokenizer).__name__}; ask without a grammar")
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(units))


class Units:
    """Tokens that are one character or one byte each, in the form that llguidance asks for. The last one is the end."""

    def __init__(self, texts: list[bytes], end: int, begin: int | None, encode: Callable[[bytes], list[int]]):
        assert end == len(texts)
        self.tokens, self.eos_token_id, self.bos_token_id = [*texts, b"<eos>"], end, begin
        self.special_token_ids = [end] if begin is None else [begin, end]
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text, which llguidance writes for text that the grammar forces."""
        return self._encode(text)
