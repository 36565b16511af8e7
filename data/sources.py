"""Documents out of text files, folders, .jsonl, .parquet, Python's sources, the Hugging Face hub, pictures and sound.

Knows what text is and where it stands; knows no tokens.
"""

import contextlib
import gzip
import hashlib
import json
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from data import images, speech
from data.config import SourceConfig

PART_BYTES = 1 << 22  # a longer text comes in parts of about this size
NOT_SOURCES = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}  # of the standard library
HUB = "install what reads it with `uv sync --group hub`"


class Document(NamedTuple):
    """A text, or a part of a long one: parts of one text follow each other."""

    name: str
    text: str
    starts: bool = True  # the first part
    ends: bool = True  # the last part
    origin: str = ""  # documents of one origin are held out together; none is the document itself


def read_documents(source: SourceConfig) -> Iterator[Document]:
    """Every document of a source, always in the same order; ValueError or OSError where something is not text."""
    if source.path.startswith("hf:"):
        yield from _read_hub(source)
        return
    if is_made(source):
        for example in images.examples() if source.path == images.PATH else speech.examples(source.path):
            yield Document(example.origin, example.text, origin=example.origin)
        return
    files = list_files(source)
    for path in files:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_jsonl(path, source.field)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, source.field)
        else:
            yield from _read_text(path, is_alone=len(files) == 1)


def is_made(source: SourceConfig) -> bool:
    """Whether the text is written here, about pictures or sound."""
    return source.path == images.PATH or source.path.startswith(speech.PREFIX)


def list_files(source: SourceConfig) -> list[pathlib.Path]:
    """Files of a source on disk, sorted; hidden ones are left out."""
    if is_made(source):
        return [] if source.path == images.PATH else speech.list_clips(source.path)
    if source.path == "stdlib":
        return _stdlib_files()
    root = pathlib.Path(source.path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(
            f"data.path={source.path} does not exist; "
            "give stdlib, a text file or folder, .jsonl, .parquet, hf:NAME, digits or speech:FOLDER"
        )
    files = _walk(root)
    if not files:
        raise ValueError(f"folder {root} holds no file; data.path needs at least one text")
    return files


def _walk(root: pathlib.Path, skip: frozenset[str] | set[str] = frozenset()) -> list[pathlib.Path]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        found += [pathlib.Path(folder, name) for name in sorted(files) if not name.startswith(".")]
    return found


def _stdlib_files() -> list[pathlib.Path]:
    """Python's own modules without their tests; what a build writes about its machine is no source."""
    files = _walk(pathlib.Path(sysconfig.get_path("stdlib")), NOT_SOURCES)
    return [file for file in files if file.suffix == ".py" and not file.name.startswith("_sysconfigdata")]


def stat_fingerprint(source: SourceConfig) -> str:
    """Hash of paths, sizes and times of change: equal means that nobody touched the files. Reads none of them.

    A data set of the hub is taken as fixed by its name and split.
    """
    facts: list[Any] = [source.field]
    if source.path.startswith("hf:"):
        facts += [source.path, source.split]
    else:
        facts += [images.RULES, speech.RULES, source.path] if is_made(source) else []
        for path in list_files(source):
            stat = os.stat(path)
            facts.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def total_bytes(source: SourceConfig) -> int | None:
    """Size on disk; None where it is not known before reading."""
    if source.path.startswith("hf:") or is_made(source):
        return None
    return sum(path.stat().st_size for path in list_files(source))


def read_with_progress(source: SourceConfig, what: str) -> Iterator[Document]:
    """A source's documents, with a bar where a person watches."""
    from tqdm import tqdm

    bar = tqdm(
        desc=f"{what} {source.path}", total=total_bytes(source), unit="B", unit_scale=True, disable=None, delay=0.5
    )
    with contextlib.closing(bar):
        for document in read_documents(source):
            yield document
            bar.update(len(document.text))


def _read_text(path: pathlib.Path, *, is_alone: bool) -> Iterator[Document]:
    """A file of text as one document. An empty file is refused where it is the only one, else has no document."""
    at = 0
    with path.open("rb") as file:
        part = file.read(PART_BYTES)
        if not part and is_alone:
            raise ValueError(f"{path} is empty; data.path needs text")
        while part:
            following = file.read(PART_BYTES)
            part, rest = _cut(part) if following else (part, b"")
            yield Document(str(path), _decode(part, path, at), starts=at == 0, ends=not following)
            at += len(part)
            part = rest + following


def _cut(part: bytes) -> tuple[bytes, bytes]:
    """Cut after the last line end, or before the last character's first byte where there is none."""
    end = part.rfind(b"\n") + 1
    if not end:
        end = len(part) - 1
        while end > 1 and part[end] & 0xC0 == 0x80:  # a continuation byte
            end -= 1
    return part[:end], part[end:]


def _decode(part: bytes, path: pathlib.Path, at: int) -> str:
    """Text of UTF-8 bytes that stand at byte `at` of a file."""
    wrong = part.find(0)
    try:
        text = part.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = error.start if wrong < 0 else min(wrong, error.start)
        text = ""
    if wrong >= 0:
        raise ValueError(
            f"{path} is not text: byte 0x{part[wrong]:02X} at offset {at + wrong} is "
            f"{'binary' if part[wrong] == 0 else 'not UTF-8'}; convert the file to UTF-8 or leave it out"
        )
    return text


def _read_jsonl(path: pathlib.Path, field: str) -> Iterator[Document]:
    with path.open("rb") as plain, gzip.open(plain, "rb") if path.suffix == ".gz" else plain as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _document(f"{path}:{number}", _text_of(line, field, path, number), field)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}; fetch or compress it again") from None


def _text_of(line: bytes, field: str, path: pathlib.Path, number: int) -> Any:
    """What one line holds under `field`."""
    try:
        entries = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path} line {number} is not JSON: {error}; each line holds one object") from None
    if not isinstance(entries, dict) or field not in entries:
        has = sorted(entries) if isinstance(entries, dict) else type(entries).__name__
        raise ValueError(f"{path} line {number} has no field {field!r}, it has {has}; set data.field")
    return entries[field]


def _read_parquet(path: pathlib.Path, field: str) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"{path} needs pyarrow, which is not installed; {HUB}") from None
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise ValueError(f"{path} has no column {field!r}, it has {file.schema_arrow.names}; set data.field")
            row = 0
            for batch in file.iter_batches(columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield _document(f"{path}:{row}", text, field)
    except ArrowException as error:
        raise ValueError(f"{path} is not a whole parquet file: {str(error).splitlines()[0]}") from None


def _read_hub(source: SourceConfig) -> Iterator[Document]:
    name = source.path.removeprefix("hf:")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"{source.path} needs the datasets library, which is not installed; {HUB}") from None
    try:
        rows = datasets.load_dataset(name, split=source.split)
    except Exception as error:  # network, missing name, missing split: many kinds, one meaning
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"data set {name!r}, split {source.split!r}, did not come from Hugging Face ({reason}); "
            "fetch it where the network allows and give its files"
        ) from None
    if source.field not in rows.column_names:
        raise ValueError(f"{source.path} has no column {source.field!r}, it has {rows.column_names}; set data.field")
    for number, row in enumerate(rows):
        yield _document(f"{source.path}:{number}", row[source.field], source.field)


def _document(name: str, text: Any, field: str) -> Document:
    """A document out of one row; a missing value is an empty text."""
    if not isinstance(text, str | None):
        raise ValueError(f"{name} holds {type(text).__name__} under {field!r} instead of text; set data.field")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a surrogate pair at character {error.start}, which no text has") from None
    return Document(name, text or "")
