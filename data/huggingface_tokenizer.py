"""Subword tokenizers by Hugging Face's `tokenizers`: load, train, save. Knows no text source."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int32

from data.words import WordTable

BOS, EOS = "<|bos|>", "<|eos|>"
FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]


class _Facts(NamedTuple):
    vocab_size: int
    adds_bos: bool
    special_ids: frozenset[int]
    byte_ids: frozenset[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer:
    """A `tokenizers.Tokenizer` and the use of its special tokens. Special tokens written in a text are recognised."""

    tokenizer: tokenizers.Tokenizer
    bos_id: int | None = None  # begins a text
    eos_id: int | None = None  # ends a text
    end_ids: tuple[int, ...] = ()  # every token that ends a text or a turn, eos_id among them
    chat_template: str | None = None  # Jinja

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; ids may have holes."""
        return self._facts.vocab_size

    @property
    def adds_bos(self) -> bool:
        """Whether texts begin with bos_id; the tokenizer's own post-processor says so."""
        return self._facts.adds_bos

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens without text."""
        return self._facts.special_ids

    @property
    def byte_ids(self) -> frozenset[int]:
        """SentencePiece's byte tokens <0x00> to <0xFF>: their text depends on the bytes after them."""
        return self._facts.byte_ids

    @functools.cached_property
    def _facts(self) -> "_Facts":
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        added = self.tokenizer.get_added_tokens_decoder()
        byte_tokens = (f"<0x{byte:02X}>" for byte in range(256))
        return _Facts(
            vocab_size=max(vocab.values()) + 1,
            adds_bos=self.bos_id is not None and self.tokenizer.encode("").ids[:1] == [self.bos_id],
            special_ids=frozenset(id_ for id_, token in added.items() if token.special),
            byte_ids=frozenset(vocab[token] for token in byte_tokens if token in vocab),
        )

    @functools.cached_property
    def letters(self) -> tokenizers.Tokenizer:
        """A twin to which special tokens in a text are the letters they are spelled with. Threads may share it."""
        twin = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        twin.encode_special_tokens = True
        return twin

    def encode(self, text: str) -> list[int]:
        """Tokens of a text alone: no bos, no eos."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """Tokens of many texts, by the table of words where that gives the same tokens, else on all cores."""
        in_table = [self._words is not None and self._by_words(text) for text in texts]
        others = iter(self._encode_each([text for text, is_in in zip(texts, in_table, strict=True) if not is_in]))
        if self._words is None:
            return [np.array(ids, np.int32) for ids in others]
        known = iter(self._words.encode([text for text, is_in in zip(texts, in_table, strict=True) if is_in]))
        return [next(known) if is_in else np.array(next(others), np.int32) for is_in in in_table]

    def _encode_each(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _by_words(self, text: str) -> bool:
        return not any(token in text for token in self._added)

    @functools.cached_property
    def _added(self) -> tuple[str, ...]:
        return tuple(token.content for token in self.tokenizer.get_added_tokens_decoder().values())

    @functools.cached_property
    def _words(self) -> WordTable | None:
        """A table of words where the tokenizer is GPT-2's kind of BPE and nothing else."""
        parts = json.loads(self.tokenizer.to_str())
        cut, bpe = parts["pre_tokenizer"] or {}, parts["model"]
        is_gpt2 = (
            parts["normalizer"] is None
            and (cut.get("type"), cut.get("add_prefix_space"), cut.get("use_regex")) == ("ByteLevel", False, True)
            and (bpe.get("type"), bpe.get("dropout")) == ("BPE", None)
            and len(self._added) <= 8  # each is searched in each text
        )
        return WordTable(self._encode_each) if is_gpt2 else None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the tokens; special tokens and ids that no token has give none."""
        return self.tokenizer.decode([int(id_) for id_ in ids], skip_special_tokens=True)

    def save(self, folder: pathlib.Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json as `transformers` reads them."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": self._token(self.bos_id),
            "eos_token": self._token(self.eos_id),
            "end_token_ids": list(self.end_ids),
            "chat_template": self.chat_template,
        }
        (folder / "tokenizer.json").write_text(self.tokenizer.to_str(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def _token(self, id_: int | None) -> str | None:
        return None if id_ is None else self.tokenizer.id_to_token(id_)


def load_huggingface(path: pathlib.Path | str) -> HuggingFaceTokenizer:
    """The tokenizer of a folder with tokenizer.json, or of that file itself."""
    path = pathlib.Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; a Hugging Face tokenizer is a folder with tokenizer.json") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(
            f"{file} is not a tokenizer that `tokenizers` {tokenizers.__version__} reads: {error}"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_json(file.parent / "special_tokens_map.json") | _read_json(file.parent / "tokenizer_config.json")
    bos_id, eos_id = (_special_id(config, name, tokenizer, file) for name in ("bos_token", "eos_token"))
    ends = config.get("end_token_ids") or _read_json(file.parent / "generation_config.json").get("eos_token_id") or []
    ends = [ends] if isinstance(ends, int) else ends
    template = file.parent / "chat_template.jinja"
    return HuggingFaceTokenizer(
        tokenizer=tokenizer,
        bos_id=bos_id,
        eos_id=eos_id,
        end_ids=tuple(dict.fromkeys([*([] if eos_id is None else [eos_id]), *ends])),
        chat_template=template.read_text(encoding="utf-8") if template.exists() else _default_template(config),
    )


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    """Entries of a JSON file that are set; none where there is no file."""
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return {name: value for name, value in entries.items() if value is not None}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from None


def _special_id(config: dict[str, Any], name: str, tokenizer: tokenizers.Tokenizer, file: pathlib.Path) -> int | None:
    entry = config.get(name)
    content = entry.get("content") if isinstance(entry, dict) else entry
    if content is None:
        return None
    id_ = tokenizer.token_to_id(content)
    if id_ is None:
        raise ValueError(f"{name} {content!r} is not a token of {file}; correct {name} in tokenizer_config.json")
    return id_


def _default_template(config: dict[str, Any]) -> str | None:
    """A model may have several named chat templates; the one called default is meant."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def download_huggingface(name: str) -> pathlib.Path:
    """Folder of a model's tokenizer files, fetched from the hub or found in its local cache."""
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=[*FILES, "chat_template.jinja"]))
    except Exception as error:  # network, missing name, no access: many kinds, one meaning
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"tokenizer {name!r} is not bpe, byte, char, words, nor an existing folder or file, "
            f"and Hugging Face did not give it ({reason}); name a folder that holds its tokenizer.json"
        ) from None


def train_bpe(texts: Iterable[str], *, vocab_size: int, adds_bos: bool = True) -> HuggingFaceTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens: two specials, 256 bytes, then merges by frequency."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"bpe_vocab={vocab_size} is less than {len(alphabet) + 2}: 256 bytes and {BOS}, {EOS}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id, eos_id = 0, 1  # the trainer gives special tokens the first ids
    assert tokenizer.token_to_id(BOS) == bos_id
    assert tokenizer.token_to_id(EOS) == eos_id
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    return HuggingFaceTokenizer(tokenizer=tokenizer, bos_id=bos_id, eos_id=eos_id, end_ids=(eos_id,))
