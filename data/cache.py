"""Tokenised text on disk, written once and mapped into memory. Knows what a key is for, not what goes into one.

An entry is a folder named by its key: `tokens` of one integer type, `offsets` where documents start, `entry.json`.
It is written beside its place and moved there when it is whole, so whatever bears its name is whole; an entry that
something truncated later is noticed by its sizes and counts as missing.
"""

import array
import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
from jaxtyping import Int64, Integer

FORMAT = 1  # of entries; a change makes older entries missing
STALE_SECONDS = 86_400  # after which an unfinished entry of a killed writer is swept away
SPLITS = ("train", "valid")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCache:
    """Documents as token ids, mapped from disk when first used; cheap to send to another process."""

    folder: str
    split: str  # train or valid
    dtype: str  # uint16 or uint32
    num_tokens: int
    num_documents: int
    num_bytes: int  # of the text

    @functools.cached_property
    def tokens(self) -> Integer[np.ndarray, " tokens"]:
        """Every document's tokens, one document after the other."""
        return self._map("tokens", self.dtype, self.num_tokens)

    @functools.cached_property
    def offsets(self) -> Int64[np.ndarray, " borders"]:
        """Where each document starts, and the end of the last."""
        return self._map("offsets", "int64", self.num_documents + 1)

    def _map(self, name: str, dtype: str, size: int) -> np.ndarray:
        path = pathlib.Path(self.folder, f"{self.split}.{name}")
        return np.memmap(path, dtype, "r", shape=(size,)) if size else np.zeros(0, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def is_whole(self) -> bool:
        """Whether both files have the size that the entry says."""
        sizes = {
            "tokens": self.num_tokens * np.dtype(self.dtype).itemsize,
            "offsets": (self.num_documents + 1) * 8,
        }
        files = {name: pathlib.Path(self.folder, f"{self.split}.{name}") for name in sizes}
        return all(file.is_file() and file.stat().st_size == sizes[name] for name, file in files.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One source's tokens, in two parts, and notes of whoever wrote them."""

    train: TokenCache
    valid: TokenCache
    notes: dict[str, Any]


class TokenWriter:
    """Appends documents to one split of an entry that is being written."""

    def __init__(self, folder: pathlib.Path, split: str, dtype: str):
        self._folder, self._split, self._dtype = folder, split, dtype
        self._offsets = array.array("q")
        self._num_tokens = self._num_bytes = 0
        with explained(folder):
            self._file = (folder / f"{split}.tokens").open("wb")

    def append(self, tokens: Integer[np.ndarray, " tokens"], *, starts: bool, num_bytes: int) -> None:
        """Add a document, or go on with the last one where `starts` is false."""
        if starts or not self._offsets:
            self._offsets.append(self._num_tokens)
        with explained(self._folder):
            self._file.write(tokens.astype(self._dtype).tobytes())
        self._num_tokens += len(tokens)
        self._num_bytes += num_bytes

    def finish(self) -> dict[str, Any]:
        """Write the offsets, bring everything to the disk; what entry.json says of this split."""
        with explained(self._folder), self._file as file:
            with (self._folder / f"{self._split}.offsets").open("wb") as offsets:
                offsets.write((self._offsets + array.array("q", [self._num_tokens])).tobytes())
                _sync(offsets)
            _sync(file)
        return {
            "dtype": self._dtype,
            "num_tokens": self._num_tokens,
            "num_documents": len(self._offsets),
            "num_bytes": self._num_bytes,
        }

    def close(self) -> None:
        """Close the file, finished or not; what a full disk did not take is lost with the unnamed folder."""
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def token_writers(folder: pathlib.Path, dtype: str) -> Iterator[dict[str, TokenWriter]]:
    """A writer for each split."""
    writers = {split: TokenWriter(folder, split, dtype) for split in SPLITS}
    try:
        yield writers
    finally:
        for writer in writers.values():
            writer.close()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def cache_root(cache_dir: str) -> pathlib.Path:
    """Where entries are: the folder asked for, else meshlight/ in the user's cache folder."""
    if cache_dir:
        return pathlib.Path(cache_dir)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "meshlight"


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@contextlib.contextmanager
def new_folder(place: pathlib.Path, *, is_whole: Callable[[pathlib.Path], bool]) -> Iterator[pathlib.Path]:
    """A folder to fill, moved to `place` at the end. On an error nothing is left; a kill leaves a folder without name.

    A whole folder that another process put there meanwhile stays, since the same key means the same content; a
    damaged one gives way.
    """
    with explained(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place.parent)
        folder = _unnamed(place)
        folder.mkdir()
    try:
        yield folder
        with explained(place):
            if place.exists() and not is_whole(place):
                damaged = _unnamed(place)
                place.rename(damaged)
                shutil.rmtree(damaged, ignore_errors=True)
            try:
                folder.rename(place)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unnamed(place: pathlib.Path) -> pathlib.Path:
    return place.with_name(f".new-{secrets.token_hex(8)}")


def _sweep(root: pathlib.Path) -> None:
    """Remove what killed writers left long ago."""
    for folder in root.glob(".new-*"):
        with contextlib.suppress(OSError):
            last = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - last > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def explained(place: pathlib.Path) -> Iterator[None]:
    """Turn an OSError of writing at `place` into one that names the cache and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OSError(
            f"cannot keep tokenised text in {place.parent}: {error.strerror}; set data.cache_dir to a folder with room"
        ) from None


def write_entry(folder: pathlib.Path, writers: dict[str, TokenWriter], notes: dict[str, Any]) -> None:
    """Finish both splits and describe them."""
    described = {split: writer.finish() for split, writer in writers.items()}
    content = json.dumps({"format": FORMAT, **described, "notes": notes}).encode()
    with explained(folder), (folder / "entry.json").open("wb") as file:
        file.write(content)
        _sync(file)


def open_entry(place: pathlib.Path) -> Entry | None:
    """The entry at `place`; None where there is none or it is damaged."""
    try:
        described = json.loads((place / "entry.json").read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            return None
        train, valid = (TokenCache(folder=str(place), split=split, **described[split]) for split in SPLITS)
        entry = Entry(train=train, valid=valid, notes=described["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entry if train.is_whole() and valid.is_whole() else None
