"""Tokens are told apart, and their bytes are theirs."""

import tokenizers
from tokenizers import decoders, models

from data.huggingface_tokenizer import HuggingFaceTokenizer
from data.tokenizer import ByteTokenizer
from inference.spelling import Spelling, byte_letters
from tests.inference.serving import END, tokenizer


def test_byte_level_tokens_have_their_bytes():
    spelling, made = Spelling(tokenizer()), tokenizer()
    euro = made.encode("€")
    assert [spelling.name(token) for token in euro] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert bytes(byte for token in euro for byte in spelling.bytes(token)) == "€".encode()
    assert spelling.name(made.encode("a")[0]) == "a"
    assert spelling.text(257) == END
    assert len({spelling.name(token) for token in range(258)}) == 258
    assert sorted(byte_letters().values()) == list(range(256))


def test_plain_bytes_and_nothing():
    spelling = Spelling(ByteTokenizer())
    assert [spelling.name(token) for token in (97, 0xE2, 256)] == ["a", "bytes:\\xe2", ""]


def test_sentencepiece_tokens_keep_their_blank():
    vocab = {"▁the": 0, "the": 1, "<0xE2>": 2}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    spelling = Spelling(HuggingFaceTokenizer(tokenizer=made))
    assert [spelling.name(token) for token in range(3)] == [" the", "the", "bytes:\\xe2"]
