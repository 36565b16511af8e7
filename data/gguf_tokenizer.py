"""The tokenizer that GGUF metadata describes, as a `tokenizers.Tokenizer`. Knows no file and no weights.

A GGUF file has no tokenizer.json: it lists tokens, their types, and merges (byte-level BPE, `gpt2`) or scores
(SentencePiece BPE, `llama`), and names the rule that cuts text into words, as llama.cpp's llama-vocab.cpp has them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace("{1,3}", "")  # digits one by one


class Described(NamedTuple):
    """A tokenizer and what the file says about its use."""

    tokenizer: Tokenizer
    bos_id: int | None  # begins a text
    eos_id: int | None  # ends a text
    end_ids: tuple[int, ...]  # every token that ends a turn or a text
    pad_id: int | None
    add_bos: bool  # whether a text is to begin with bos; `encode` does so by itself
    chat_template: str | None  # Jinja


def build(metadata: Mapping[str, Any]) -> Described:
    """The tokenizer of a file's metadata; ValueError where its kind is not supported."""
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = values.get("model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"GGUF tokenizer {kind!r} is not supported; gpt2 (byte-level BPE) and llama (SentencePiece) are"
        )
    tokens, types = values["tokens"], values.get("token_type")
    types = [NORMAL] * len(tokens) if types is None else types
    is_gemma = str(metadata.get("general.architecture")).startswith("gemma")
    tokenizer = _byte_level(values) if kind == "gpt2" else _sentencepiece(values, types, is_gemma=is_gemma)
    added = {CONTROL: tokenizer.add_special_tokens, USER_DEFINED: tokenizer.add_tokens}
    for mine, add in added.items():
        add(
            [
                AddedToken(token, normalized=False, special=mine == CONTROL)
                for token, type_ in zip(tokens, types, strict=True)
                if type_ == mine
            ]
        )
    ids = {name: values.get(f"{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")}
    bos_id = ids["bos"]
    add_bos = values.get("add_bos_token", kind == "llama" or values.get("pre") == "llama-bpe")
    if add_bos and bos_id is not None:
        tokenizer.post_processor = _after(tokenizer.post_processor, tokens[bos_id], bos_id)
    return Described(
        tokenizer=tokenizer,
        bos_id=bos_id,
        eos_id=ids["eos"],
        end_ids=tuple(dict.fromkeys(end for end in (ids["eos"], ids["eot"], ids["eom"]) if end is not None)),
        pad_id=ids["padding"],
        add_bos=bool(add_bos) and bos_id is not None,
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _after(first: processors.PostProcessor | None, bos: str, bos_id: int) -> processors.PostProcessor:
    """Put `bos` in front of every text."""
    begin = processors.TemplateProcessing(single=f"{bos}:0 $A:0", special_tokens=[(bos, bos_id)])
    return begin if first is None else processors.Sequence([first, begin])


def _words(pre: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging, by llama.cpp's name for it."""
    if pre in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    rules = {"llama-bpe": LLAMA3_WORDS, "llama3": LLAMA3_WORDS, "qwen2": QWEN2_WORDS, "deepseek-r1-qwen": QWEN2_WORDS}
    if pre not in rules:
        known = ", ".join(["gpt-2", "default", "smollm", *rules])
        raise ValueError(f"GGUF pre-tokenizer {pre!r} is not supported; {known} are")
    cut = pre_tokenizers.Split(Regex(rules[pre]), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_level(values: Mapping[str, Any]) -> Tokenizer:
    """GPT-2's BPE over bytes written as printable characters."""
    pre = values.get("pre", "default")
    vocab = {token: index for index, token in enumerate(values["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in values["merges"]]
    ignore_merges = pre in ("llama-bpe", "llama3")  # a whole word in the vocabulary is taken as it is
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _words(pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece(values: Mapping[str, Any], types: list[int], *, is_gemma: bool) -> Tokenizer:
    """SentencePiece's BPE: blanks are ▁, unknown characters are bytes, the best-scored piece is merged first."""
    tokens: list[str] = values["tokens"]
    if is_gemma:  # llama.cpp writes its runs of blanks as blanks
        tokens = ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    pieces = {token for token, type_ in zip(tokens, types, strict=True) if type_ in (NORMAL, USER_DEFINED, UNUSED)}
    # Gemma's scores are not in the order of its merges; its ids are.
    rank = vocab if is_gemma else {token: -score for token, score in zip(tokens, values["scores"], strict=True)}
    found = [(rank[left + right], vocab[left], vocab[right], left, right) for left, right in _pairs(vocab, pieces)]
    merges = [(left, right) for *_, left, right in sorted(found)]
    unknown = tokens[values.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = values.get("add_space_prefix", not is_gemma)
    blanks: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *blanks] if prefix else blanks)
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)
    return tokenizer


def _pairs(vocab: Mapping[str, int], pieces: set[str]) -> Iterator[tuple[str, str]]:
    """Every way to cut a piece into two pieces."""
    for piece in pieces:
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                yield piece[:cut], piece[cut:]
