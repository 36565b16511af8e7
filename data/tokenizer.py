"""Text to token ids and back: the interface, bytes, characters, words, and text as a stream. Knows no text source.

Tokenizers with subwords are in data/huggingface_tokenizer.py.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from data.huggingface_tokenizer import HuggingFaceTokenizer, load_huggingface, train_bpe

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "HuggingFaceTokenizer",
    "TextStream",
    "Tokenizer",
    "WordTokenizer",
    "char_with_ends",
    "fingerprint",
    "load_tokenizer",
    "train_bpe",
]
OWN_FILE = "meshlight_tokenizer.json"


@runtime_checkable  # tests check annotations when they run
class Tokenizer(Protocol):
    """What the rest of the house knows of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends a text or a turn."""
        ...

    @property
    def adds_bos(self) -> bool:
        """Whether texts, prompts too, begin with bos_id."""
        ...

    @property
    def chat_template(self) -> str | None:
        """How a conversation is written, in Jinja."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens without text."""
        ...

    @property
    def byte_ids(self) -> frozenset[int]:
        """Tokens whose text depends on the tokens after them."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a text alone: no bos, no eos."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """The same for many texts, fast."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the tokens; special tokens and ids that no token has give none."""
        ...

    def save(self, folder: pathlib.Path | str) -> None:
        """Write what load_tokenizer reads."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTokenizer:
    """One token a byte of UTF-8; 256 begins a text, 257 ends it."""

    adds_bos: bool = True
    vocab_size: int = 258
    bos_id: int | None = 256
    eos_id: int | None = 257
    end_ids: tuple[int, ...] = (257,)
    chat_template: str | None = None
    special_ids: frozenset[int] = frozenset({256, 257})
    byte_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """The bytes."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """The bytes of many texts."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes, U+FFFD where they are not UTF-8."""
        return bytes(id_ for id_ in ids if id_ < 256).decode(errors="replace")

    def save(self, folder: pathlib.Path | str) -> None:
        """Write what load_tokenizer reads."""
        _save_own(folder, {"kind": "byte", "adds_bos": self.adds_bos})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharTokenizer:
    """One token a character out of a fixed set, in the order of their code points; special tokens only if asked for."""

    characters: str  # sorted, each once
    adds_bos: bool = False
    bos_id: int | None = None
    eos_id: int | None = None
    end_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    special_ids: frozenset[int] = frozenset()
    byte_ids: frozenset[int] = frozenset()

    @property
    def vocab_size(self) -> int:
        """How many characters and special tokens there are."""
        return len(self.characters) + len(self.special_ids)

    @functools.cached_property
    def _points(self) -> np.ndarray:
        return _code_points(self.characters)

    def encode(self, text: str) -> list[int]:
        """Place of each character in the set; ValueError for a character that is not in it."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """The same for many texts."""
        return [self._look_up(text) for text in texts]

    def _look_up(self, text: str) -> np.ndarray:
        points = _code_points(text)
        places = np.searchsorted(self._points, points).clip(max=len(self._points) - 1)
        unknown = np.flatnonzero(self._points[places] != points)
        if len(unknown):
            character = text[unknown[0]]
            raise ValueError(
                f"character {character!r} (U+{ord(character):04X}) at {unknown[0]} is not among the "
                f"{len(self.characters)} characters of the tokenizer; leave it out, or train with data.tokenizer=byte"
            )
        return places.astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The characters."""
        return "".join(self.characters[id_] for id_ in ids if id_ < len(self.characters))

    def save(self, folder: pathlib.Path | str) -> None:
        """Write what load_tokenizer reads."""
        kind = "char" if self.eos_id is None else "char with ends"
        _save_own(folder, {"kind": kind, "characters": self.characters})


def char_with_ends(characters: str) -> CharTokenizer:
    """A tokenizer of characters (sorted, each once) and after them one token to end and one to begin a text."""
    eos_id, bos_id = len(characters), len(characters) + 1
    return CharTokenizer(
        characters=characters,
        bos_id=bos_id,
        eos_id=eos_id,
        end_ids=(eos_id,),
        special_ids=frozenset({bos_id, eos_id}),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordTokenizer:
    """One token a word out of a fixed set, words being what white space parts; 0 begins a text, 1 ends it."""

    words: tuple[str, ...]  # sorted, each once
    adds_bos: bool = True
    bos_id: int | None = 0
    eos_id: int | None = 1
    end_ids: tuple[int, ...] = (1,)
    chat_template: str | None = None
    special_ids: frozenset[int] = frozenset({0, 1})
    byte_ids: frozenset[int] = frozenset()

    @property
    def vocab_size(self) -> int:
        """The words, begin and end."""
        return 2 + len(self.words)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: id_ for id_, word in enumerate(self.words, start=2)}

    def encode(self, text: str) -> list[int]:
        """Place of each word in the set; ValueError for a word that is not in it."""
        try:
            return [self._ids[word] for word in text.split()]
        except KeyError as error:
            raise ValueError(
                f"word {error.args[0]!r} is not among the {len(self.words)} words of the tokenizer; leave it out, or "
                "train with a text that has it"
            ) from None

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """The same for many texts."""
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The words, with one space between."""
        return " ".join(self.words[id_ - 2] for id_ in ids if 2 <= id_ < self.vocab_size)

    def save(self, folder: pathlib.Path | str) -> None:
        """Write what load_tokenizer reads."""
        _save_own(folder, {"kind": "words", "words": self.words, "adds_bos": self.adds_bos})


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _save_own(folder: pathlib.Path | str, entries: dict[str, object]) -> None:
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWN_FILE).write_text(json.dumps(entries), encoding="utf-8")


def load_tokenizer(folder: pathlib.Path | str) -> Tokenizer:
    """The tokenizer that `save` wrote, or that of a Hugging Face folder or tokenizer.json."""
    own = pathlib.Path(folder) / OWN_FILE
    if not own.exists():
        return load_huggingface(folder)
    try:
        entries = json.loads(own.read_text(encoding="utf-8"))
        if entries["kind"] == "byte":
            return ByteTokenizer(adds_bos=entries["adds_bos"])
        if entries["kind"] == "char with ends":
            return char_with_ends(entries["characters"])
        if entries["kind"] == "words":
            return WordTokenizer(words=tuple(entries["words"]), adds_bos=entries["adds_bos"])
        return CharTokenizer(characters=entries["characters"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{own} is not a tokenizer: {error!r}; it was damaged after it was written") from None


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of everything that decides how a document becomes tokens."""
    match tokenizer:
        case HuggingFaceTokenizer():
            content = tokenizer.tokenizer.to_str()
        case CharTokenizer():
            content = "char" + tokenizer.characters
        case WordTokenizer():
            content = "words " + " ".join(tokenizer.words)
        case _:
            content = "byte"
    rules = (content, tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos)
    return hashlib.blake2b(repr(rules).encode(), digest_size=16).hexdigest()


class TextStream:
    """Text of tokens that come one by one: each push gives what no later token can change.

    Characters of several tokens wait until they are whole. All pushes and the finish, joined, are `decode` of all
    tokens. Only the tokens since the last but one piece are decoded again, so a long text costs no more per token.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last piece, as context, and what came since
        self._context = 0  # how many of them belong to the last piece
        self._shown = 0  # characters of them that were given out

    def push(self, ids: Iterable[int]) -> str:
        """Take tokens; the text that is now certain, often empty."""
        hidden, size = self._tokenizer.special_ids, self._tokenizer.vocab_size
        self._ids.extend(int(id_) for id_ in ids if id_ < size and id_ not in hidden)
        if not self._ids or self._ids[-1] in self._tokenizer.byte_ids:
            return ""
        text = self._tokenizer.decode(self._ids)
        certain = len(text.rstrip("\ufffd"))  # an unfinished character shows as U+FFFD
        piece = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if piece and certain == len(text):
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._shown = len(self._tokenizer.decode(self._ids))
        return piece

    def finish(self) -> str:
        """The rest, with U+FFFD where a character stayed unfinished."""
        rest = self._tokenizer.decode(self._ids)[self._shown :]
        self._shown += len(rest)
        return rest
