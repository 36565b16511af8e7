"""Whatever a grammar lets come follows it, and no grammar, however hostile, does more harm than a clear error."""

import json
import re
import threading
import time

import jsonschema
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Subwords
from tokenizers import decoders, models

from data.tokenizer import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer, train_bpe
from inference import constraint
from inference.constraint import constrain
from inference.request import Constraint
from tests.inference.small import LLAMA, engine, row

BYTES = ByteTokenizer()
PRINTABLE = CharTokenizer(characters="\n" + "".join(map(chr, range(32, 127))))  # as many as the tiny models' ids
BPE = train_bpe(['{"name": "a", "items": [1, 22, true, null]}\n' * 3, "other words, é你"], vocab_size=320)


def sentencepiece() -> HuggingFaceTokenizer:
    """Blanks are ▁ and what has no piece is bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", '"a', "ab"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Subwords(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return HuggingFaceTokenizer(tokenizer=tokenizer, bos_id=1, eos_id=2, end_ids=(2,))


TOKENIZERS = {"bytes": BYTES, "characters": PRINTABLE, "bpe": BPE, "sentencepiece": sentencepiece()}


def ids_of(state: Constraint, tokenizer) -> np.ndarray:
    """Tokens that may come next."""
    bits = state.allowed()
    assert bits.dtype == np.uint32
    assert bits.shape == (-(-tokenizer.vocab_size // 32),)
    marks = np.unpackbits(bits.view(np.uint8), bitorder="little")
    assert not marks[tokenizer.vocab_size :].any()
    return np.flatnonzero(marks)


def walk(grammar, tokenizer, random: np.random.Generator, *, wild: int = 25) -> str:
    """Text of a random answer: `wild` tokens of any kind, then, where there are any, such that come to an end."""
    state, tokens = constrain(grammar, tokenizer), []
    for step in range(3000):
        if state.has_ended:
            assert state.is_complete
            return tokenizer.decode(tokens)
        ids = ids_of(state, tokenizer)
        assert len(ids)
        token = int(random.choice(ids if step < wild else closing(ids, tokenizer)))
        if token in tokenizer.end_ids:
            assert state.is_complete
            return tokenizer.decode(tokens)
        tokens.append(token)
        state.take(token)
        assert not state.error
        if step >= wild and state.is_complete:
            return tokenizer.decode(tokens)
    raise AssertionError(f"no end after {tokenizer.decode(tokens)!r}")


def closing(ids: np.ndarray, tokenizer) -> np.ndarray:
    """Those of the tokens that bring JSON to its end the soonest."""
    ends = [token for token in ids if token in tokenizer.end_ids]
    texts = {token: tokenizer.decode([token]) for token in ids.tolist()}
    for kind in ('"', "}", "]", ",", *"1234567890", *"abcdefghijklmnopqrstuvwxyz:"):
        ends = ends or [token for token, text in texts.items() if text == kind]
    return np.asarray(ends) if ends else ids


TEXT = st.characters(min_codepoint=32, max_codepoint=126)  # what all of the tokenizers can write


def schemas() -> st.SearchStrategy:
    """Schemas of the kinds that people write."""
    names = st.sampled_from(["a", "b", "name", "~", "x y", 'q"'])
    small = st.integers(-20, 20)
    pairs = st.tuples(small, small).map(sorted)
    leaves = st.one_of(
        st.sampled_from([{"type": "string"}, {"type": "boolean"}, {"type": "null"}, {"type": "integer"}]),
        pairs.map(lambda p: {"type": "integer", "minimum": p[0], "maximum": p[1]}),
        pairs.map(lambda p: {"type": "number", "minimum": p[0], "exclusiveMaximum": p[1] + 1}),
        st.tuples(st.integers(0, 3), st.integers(3, 6)).map(
            lambda p: {"type": "string", "minLength": p[0], "maxLength": p[1]}
        ),
        st.sampled_from(["^[a-c]{2,3}$", "^(x|yz)+$"]).map(lambda p: {"type": "string", "pattern": p}),
        st.lists(st.one_of(st.none(), st.booleans(), small, st.text(TEXT, max_size=4)), min_size=1, max_size=4).map(
            lambda values: {"enum": values}
        ),
        small.map(lambda value: {"const": value}),
        st.just({"type": ["integer", "null"]}),
    )

    def larger(inner):
        return st.one_of(
            st.tuples(inner, st.integers(0, 2), st.integers(2, 4)).map(
                lambda p: {"type": "array", "items": p[0], "minItems": p[1], "maxItems": p[2]}
            ),
            st.tuples(st.dictionaries(names, inner, max_size=3), st.integers(0, 3), st.booleans()).map(
                lambda p: {
                    "type": "object",
                    "properties": p[0],
                    "required": list(p[0])[: p[1]],
                    "additionalProperties": p[2],
                }
            ),
            st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
        )

    return st.recursive(leaves, larger, max_leaves=6)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None, phases=[Phase.generate])  # shrinking takes minutes
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_every_random_answer_is_json_that_its_schema_describes(name, schema, seed):
    tokenizer = TOKENIZERS[name]
    grammar = constraint.json_schema(schema)
    jsonschema.validate(json.loads(walk(grammar, tokenizer, np.random.default_rng(seed))), schema)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_json_object_is_one(name):
    for seed in range(20):
        text = walk(constraint.json_object(), TOKENIZERS[name], np.random.default_rng(seed), wild=40)
        assert isinstance(json.loads(text), dict)
        assert not re.search(r"[ \n\t\r]{50}", text)  # blanks are bounded


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("pattern", [r"[a-z]{3,9}@[a-z]{1,9}\.(com|org)", r"(\+|-)?[0-9]{1,3}(\.[0-9]+)?", "", r"a*"])
def test_a_regular_expression_is_matched_whole(name, pattern):
    if pattern == "" and not TOKENIZERS[name].end_ids:
        return  # an empty answer needs a token that ends it
    for seed in range(10):
        assert re.fullmatch(pattern, walk(constraint.regex(pattern), TOKENIZERS[name], np.random.default_rng(seed)))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_choice_is_one_of_its_texts(name):
    texts = ["yes", "no", 'a "quoted"\none', "yes, but", "a"]
    answers = {walk(constraint.choice(texts), TOKENIZERS[name], np.random.default_rng(seed)) for seed in range(60)}
    assert answers <= set(texts)
    assert len(answers) >= 3


@pytest.mark.parametrize("name", TOKENIZERS)
def test_brackets_of_a_context_free_grammar_match(name):
    lark = constraint.lark('start: "(" start ")" | "[" start "]" | /[0-9]{1,3}/')
    for seed in range(10):
        text = walk(lark, TOKENIZERS[name], np.random.default_rng(seed), wild=9)
        middle = len(text) // 2
        inner = re.fullmatch(r"([(\[]*)[0-9]{1,3}([)\]]*)", text)
        assert inner
        assert inner[1][::-1].translate(str.maketrans("([", ")]")) == inner[2], text[:middle]


def test_an_end_token_may_come_exactly_where_the_answer_may_end():
    state = constrain(constraint.regex("ab*"), BYTES)
    seen = []
    for byte in b"abb":
        seen.append(257 in ids_of(state, BYTES))
        state.take(byte)
    seen.append(257 in ids_of(state, BYTES))
    assert seen == [False, True, True, True]
    assert not state.has_ended
    state.take(257)
    assert state.has_ended
    assert 256 not in ids_of(constrain(constraint.regex("(?s:.*)"), BYTES), BYTES)  # no token begins a text within it


def test_an_answer_ends_where_nothing_can_follow():
    state = constrain(constraint.choice(["ok"]), PRINTABLE)
    for token in PRINTABLE.encode("ok"):
        assert not state.has_ended
        assert ids_of(state, PRINTABLE).tolist() == [token]
        state.take(token)
    assert state.has_ended
    assert state.is_complete


def test_a_copy_goes_its_own_way():
    state = constrain(constraint.choice(["ab", "ac"]), BYTES)
    state.take(ord("a"))
    other = state.copy()
    other.take(ord("b"))
    assert ids_of(state, BYTES).tolist() == [ord("b"), ord("c")]
    assert other.has_ended


def test_a_token_that_is_not_allowed_ends_the_answer_with_an_error():
    state = constrain(constraint.choice(["ab"]), BYTES)
    state.take(ord("x"))
    assert state.has_ended
    assert not state.is_complete
    assert state.error


def test_the_tokenizer_is_prepared_once():
    assert constraint.grammar_tokens(BPE) is constraint.grammar_tokens(BPE)
    assert constraint.grammar_tokens(ByteTokenizer()) is constraint.grammar_tokens(BYTES)


def nested(depth: int) -> dict:
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED = {
    "no type": (lambda: constraint.json_schema({"type": "foo"}), "JSON schema cannot be followed: Invalid type: foo"),
    "unknown keyword": (lambda: constraint.json_schema({"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
    "nothing fits": (lambda: constraint.json_schema({"type": "string", "minLength": 5, "maxLength": 2}), "Unsatisf"),
    "false": (lambda: constraint.json_schema({"anyOf": [False]}), "JSON schema cannot be followed"),
    "no object": (lambda: constraint.json_schema([1]), "the JSON schema is a list; give an object"),
    "not a number": (lambda: constraint.json_schema({"const": float("nan")}), "the JSON schema is no JSON"),
    "not a schema": (lambda: constraint.json_schema({"const": object()}), "the JSON schema is no JSON"),
    "deep": (lambda: constraint.json_schema(nested(400)), "recursion limit"),
    "a loop of references": (lambda: constraint.json_schema({"$ref": "#"}), "no text follows it"),
    "another's server": (lambda: constraint.json_schema({"$ref": "http://127.0.0.1:1/x"}), "does not fetch"),
    "too large a product": (
        lambda: constraint.json_schema(
            {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": True}} for j in range(6)]} for i in range(10)]}
        ),
        "too large",
    ),
    "many values": (lambda: constraint.json_schema({"enum": [f"v{i}" for i in range(15_000)]}), "too big"),
    "half a pattern": (lambda: constraint.regex("(a"), "unclosed group"),
    "parentheses": (lambda: constraint.regex("(" * 50_000 + "a" + ")" * 50_000), "regular expression"),
    "nothing at all": (lambda: constraint.regex(r"[^\s\S]"), "no text follows it"),
    "an intersection": (
        lambda: constraint.lark("start: X\nX: ~/(.*a.{12}b.*)/ & /[ab]{1000,}/"), "fuel exhausted",
    ),
    "half a character": (lambda: constraint.regex("a\ud800"), "half a surrogate pair at 1"),
    "no rule": (lambda: constraint.lark("start: missing"), "unknown name"),
    "no start": (lambda: constraint.lark("other: /a/"), "start"),
    "empty": (lambda: constraint.lark(""), "Empty grammar"),
    "deep Lark": (lambda: constraint.lark("start: " + "(" * 50_000 + '"a"' + ")" * 50_000), "deeply nested"),
    "too long": (lambda: constraint.regex("a" * 300_000), "has 300000 characters, 200000 at most"),
    "no choice": (lambda: constraint.choice([]), "the choice has no texts"),
    "other characters": (lambda: constraint.choice(["é"]), "no text follows it that the tokenizer can write"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_one_clear_line(name):
    make, message = REFUSED[name]
    tokenizer = PRINTABLE if name == "other characters" else BYTES
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        constrain(make(), tokenizer)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


HOSTILE = {
    "repetitions of repetitions": lambda: constraint.regex("(((a{100}){100}){100}){100}"),
    "many values": lambda: constraint.json_schema({"enum": [f"v{i}" for i in range(2000)]}),
    "many properties": lambda: constraint.json_schema({"properties": {f"p{i}": {"const": i} for i in range(300)}}),
    "a complement": lambda: constraint.lark("start: X\nX: ~/(.*a.{9}b.*)/ & /[ab]{100,}/"),
    "states": lambda: constraint.regex("(a|b)*a(a|b){300}"),
    "ambiguity": lambda: constraint.lark('start: start start start | start start | "a" | "b"'),
    "long arrays": lambda: constraint.json_schema(
        {"type": "array", "minItems": 3000, "items": {"type": "array", "items": {"type": "integer"}, "minItems": 3000}}
    ),
    "long strings": lambda: constraint.json_schema({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_end_in_bounded_time_or_go_on(name):
    """The longest of these steps takes 15 ms; seconds are for a busy machine."""
    random = np.random.default_rng(0)
    state = constrain(HOSTILE[name](), BYTES)
    for _ in range(300):
        if state.has_ended:
            break
        token = int(random.choice(ids_of(state, BYTES)))
        start = time.process_time()
        state.take(token)
        assert time.process_time() - start < 2
        assert state.error == "" or state.has_ended


def test_a_grammar_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(constraint, "PATIENCE", 0.01)
    begin, matcher = threading.Event(), constraint.llguidance.LLMatcher

    class Slow:
        grammar_from_regex = matcher.grammar_from_regex

        def __new__(cls, *args, **kwargs):
            begin.wait()
            return matcher(*args, **kwargs)

    monkeypatch.setattr(constraint.llguidance, "LLMatcher", Slow)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"the regular expression cannot be followed: it takes over 0.01 s to prepare"
        ):
            constrain(constraint.regex("a"), BYTES)
    with pytest.raises(TimeoutError, match="the grammars of other requests are still being prepared"):
        constrain(constraint.regex("a"), BYTES)
    begin.set()
    monkeypatch.setattr(constraint, "PATIENCE", 60.0)
    assert constrain(constraint.regex("a"), BYTES).allowed().any()


def test_the_engine_follows_grammars_beside_other_requests():
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"enum": [1, 22, 333]}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    kept = engine(LLAMA)

    def asked(seed):
        return row(
            (5, 9, 11),
            budget=150,
            temperature=1.0,
            seed=seed,
            constraint=constrain(constraint.json_schema(schema), PRINTABLE),
        )

    def answers(requests):
        found, ends = [[] for _ in requests], [None] * len(requests)
        for outputs in kept.run(requests):
            for output in outputs:
                found[output.id] += output.tokens
                ends[output.id] = output.finish
        return found, ends

    together, ends = answers([asked(0), row((5, 9, 11), budget=30), asked(1), row((7,), budget=20, temperature=1.0)])
    for i in (0, 2):
        assert ends[i] == "stop"
        jsonschema.validate(json.loads(PRINTABLE.decode(together[i])), schema)
    assert ends[1] == ends[3] == "length"
    assert answers([asked(0)])[0] == [together[0]]
    assert answers([row((5, 9, 11), budget=30)])[0] == [together[1]]
