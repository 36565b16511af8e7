"""A run's text, cleaned, split and tokenised: sources in, caches out. Knows no rows, no order and no batches.

Two passes over the text. The first decides each document's fate and samples the text; the second tokenises what is
kept. Both are skipped where a small index knows the files by their sizes and times of change.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers

from data import cache
from data.cache import Entry, TokenCache
from data.config import DataConfig, SourceConfig
from data.huggingface_tokenizer import download_huggingface, load_huggingface
from data.quality import Repeats, Report, content_hash
from data.sources import read_with_progress, stat_fingerprint
from data.survey import Fate, Survey, mark, survey
from data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    fingerprint,
    load_tokenizer,
    train_bpe,
)

GROUP_CHARS = 1 << 22  # tokenised at once
NOT_TEXT = {"path", "field", "mixture", "packing", "prefetch", "workers", "cache_dir"}  # do not change the tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Everything that is known of a run's text when training starts; one cache of each kind for each source."""

    tokenizer: Tokenizer
    sources: tuple[str, ...]  # where the text is from
    train: tuple[TokenCache, ...]
    valid: tuple[TokenCache, ...]
    weights: tuple[float, ...]  # of the sources
    reports: tuple[Report, ...]  # what was dropped of each source, and why
    key: str  # equal keys mean equal tokens
    packing: Literal["pack", "stream"]
    prefetch: int
    workers: int
    seed: int  # of the order of examples

    def describe(self) -> list[str]:
        """A line for each source."""
        return [
            f"{source}: {report}; {train.num_tokens:,} tokens train, {valid.num_tokens:,} held out "
            f"({(train.num_bytes + valid.num_bytes) / max(1, train.num_tokens + valid.num_tokens):.2f} bytes a token)"
            for source, report, train, valid in zip(self.sources, self.reports, self.train, self.valid, strict=True)
        ]


def prepare(config: DataConfig, *, seed: int) -> Corpus:
    """Read, clean, split and tokenise a run's text, or find that done in the cache."""
    root = cache.cache_root(config.cache_dir)
    index = root / "index" / f"{_quick_key(config)}.json"
    found = _find_prepared(root, index)
    if found is None:
        found = _prepare_anew(config, root)
        _write_index(index, found)
    tokenizer, entries = found
    return Corpus(
        tokenizer=tokenizer,
        sources=tuple(source.path for source in config.sources),
        train=tuple(entry.train for entry in entries),
        valid=tuple(entry.valid for entry in entries),
        weights=tuple(source.weight for source in config.sources),
        reports=tuple(Report(**entry.notes["report"]) for entry in entries),
        key=_hash([pathlib.Path(entry.train.folder).name for entry in entries]),
        packing=config.packing,
        prefetch=config.prefetch,
        workers=config.workers,
        seed=seed,
    )


def _hash(facts: Any) -> str:
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def _quick_key(config: DataConfig) -> str:
    """Hash of all settings that decide the tokens, and of the files' sizes and times of change."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_TEXT}
    files = [stat_fingerprint(source) for source in config.sources]
    named = pathlib.Path(config.tokenizer)
    own = sorted(named.iterdir()) if named.is_dir() else [named] if named.is_file() else []
    stats = [(os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in own]
    return _hash((cache.FORMAT, tokenizers.__version__, settings, files, stats))


def _find_prepared(root: pathlib.Path, index: pathlib.Path) -> tuple[Tokenizer, list[Entry]] | None:
    """What the index points to, if all of it is whole."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(root / names["tokenizer"])
        entries = [cache.open_entry(root / name) for name in names["entries"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = [entry for entry in entries if entry is not None]
    return (tokenizer, whole) if len(whole) == len(entries) else None


def _write_index(index: pathlib.Path, found: tuple[Tokenizer, list[Entry]]) -> None:
    tokenizer, entries = found
    names = {
        "tokenizer": _tokenizer_name(tokenizer),
        "entries": [pathlib.Path(entry.train.folder).name for entry in entries],
    }
    with cache.explained(index.parent):
        index.parent.mkdir(parents=True, exist_ok=True)
        fresh = index.with_name(f".new-{secrets.token_hex(8)}")
        fresh.write_text(json.dumps(names), encoding="utf-8")
        fresh.replace(index)


def _tokenizer_name(tokenizer: Tokenizer) -> str:
    return f"tokenizer-{fingerprint(tokenizer)}"


def _prepare_anew(config: DataConfig, root: pathlib.Path) -> tuple[Tokenizer, list[Entry]]:
    repeats = Repeats(config.dedup, threshold=config.near_threshold)
    surveys = [survey(source, config, repeats) for source in config.sources]
    tokenizer = _make_tokenizer(config, surveys)
    place = root / _tokenizer_name(tokenizer)
    if not _holds(place, tokenizer):
        fresh = cache.new_folder(place, is_whole=lambda folder: _holds(folder, tokenizer))
        with fresh as folder, cache.explained(place):
            tokenizer.save(folder)
    sources = zip(config.sources, surveys, strict=True)
    return tokenizer, [tokenise(source, found, tokenizer, root) for source, found in sources]


def _holds(folder: pathlib.Path, tokenizer: Tokenizer) -> bool:
    """Whether a folder holds this very tokenizer."""
    try:
        return fingerprint(load_tokenizer(folder)) == fingerprint(tokenizer)
    except (OSError, ValueError):
        return False


def _make_tokenizer(config: DataConfig, surveys: list[Survey]) -> Tokenizer:
    adds_bos = not all(found.is_lone for found in surveys)
    match config.tokenizer:
        case "byte":
            return ByteTokenizer(adds_bos=adds_bos)
        case "char":
            return CharTokenizer(characters="".join(sorted(set().union(*(found.characters for found in surveys)))))
        case "words":
            return WordTokenizer(words=_all_words(config, surveys), adds_bos=adds_bos)
        case "bpe":
            sample = [segment for found in surveys for segment in found.sample]
            return train_bpe(sample, vocab_size=config.bpe_vocab, adds_bos=adds_bos)
        case name if pathlib.Path(name).exists():
            return load_tokenizer(name)
        case name:
            return load_huggingface(download_huggingface(name))


def _all_words(config: DataConfig, surveys: list[Survey]) -> tuple[str, ...]:
    """Every word of the sources, sorted; ValueError where one may be cut in two."""
    if any(Fate.CUT in found.fates for found in surveys):
        raise ValueError(
            f"data.tokenizer=words keeps words whole but data.split={config.split} cuts a text to hold out its end; "
            "set data.split=document or data.valid_fraction=0"
        )
    return tuple(sorted(frozenset().union(*(found.words for found in surveys))))


class _Piece(NamedTuple):
    """A document or part of one, on its way into a split."""

    split: str
    text: str
    starts: bool
    ends: bool


def tokenise(source: SourceConfig, found: Survey, tokenizer: Tokenizer, root: pathlib.Path) -> Entry:
    """The second pass over a source: its tokens on disk, or what an equal source left there."""
    place = root / f"tokens-{_hash((found.content, found.fates, found.cut, fingerprint(tokenizer)))}"
    entry = cache.open_entry(place)
    if entry is None:
        with cache.new_folder(place, is_whole=lambda folder: cache.open_entry(folder) is not None) as folder:
            _write_tokens(source, found, tokenizer, folder)
        entry = cache.open_entry(place)
        assert entry is not None, f"{place} is damaged right after it was written"
    return entry


def _write_tokens(source: SourceConfig, found: Survey, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    with cache.token_writers(folder, cache.token_dtype(tokenizer.vocab_size)) as writers:
        for group in _groups(_pieces(source, found)):
            encoded = tokenizer.encode_batch([piece.text for piece in group])
            for piece, ids in zip(group, encoded, strict=True):
                framed = ids if found.is_lone else _frame(ids, piece, tokenizer)
                writers[piece.split].append(framed, starts=piece.starts, num_bytes=len(piece.text.encode()))
        cache.write_entry(folder, writers, {"source": source.path, "report": dataclasses.asdict(found.report)})


def _pieces(source: SourceConfig, found: Survey) -> Iterator[_Piece]:
    """What is kept of a source, in order; ValueError if the text is not the one that was surveyed."""
    digest, fates = hashlib.blake2b(digest_size=16), iter(found.fates)
    for document in read_with_progress(source, "tokenising"):
        digest.update(mark(document, content_hash(document.text)))
        match next(fates, Fate.DROPPED):
            case Fate.TRAIN:
                yield _Piece("train", document.text, document.starts, document.ends)
            case Fate.VALID:
                yield _Piece("valid", document.text, document.starts, document.ends)
            case Fate.CUT:
                yield _Piece("train", document.text[: found.cut], document.starts, False)
                yield _Piece("valid", document.text[found.cut :], False, document.ends)
    if digest.hexdigest() != found.content:
        raise ValueError(f"the text of {source.path} changed while it was read; start again when it is complete")


def _groups(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in groups of about GROUP_CHARS."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= GROUP_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _frame(ids: np.ndarray, piece: _Piece, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of a text between those that begin and end a text, where the tokenizer has them."""
    begin = [tokenizer.bos_id] if piece.starts and tokenizer.adds_bos and tokenizer.bos_id is not None else []
    end = [tokenizer.eos_id] if piece.ends and tokenizer.eos_id is not None else []
    return np.concatenate([np.array(begin, np.int32), ids, np.array(end, np.int32)])
