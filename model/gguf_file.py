"""A GGUF file: its metadata and its tensors, each read when asked. Knows the container, no model and no tokenizer.

The layout is ggml's docs/gguf.md (versions 2 and 3, little-endian). The header is parsed here because the `gguf`
package's reader makes several numpy views of every vocabulary string, seconds for one model; what the tensors' blocks
mean is left to that package.
"""

import mmap
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ROW_BYTES = 32768  # raw bytes given to the package as one row; it works in groups of 16 rows, too small by themselves


class Block(NamedTuple):
    """A tensor as it lies in the file."""

    name: str
    shape: tuple[int, ...]  # slowest dim first, as numpy has it
    kind: int  # gguf.GGMLQuantizationType
    start: int  # first byte in the file
    size: int  # bytes


class File(NamedTuple):
    """An open GGUF file."""

    path: pathlib.Path
    metadata: dict[str, Any]  # {"general.architecture": "llama", "tokenizer.ggml.tokens": [...], ...}
    blocks: dict[str, Block]
    raw: mmap.mmap

    def read(self, name: str) -> np.ndarray:
        """One tensor in float32."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        block = self.blocks[name]
        kind = GGMLQuantizationType(block.kind)
        _, block_bytes = GGML_QUANT_SIZES[kind]
        raw = np.frombuffer(self.raw, np.uint8, block.size, block.start)
        count = block.size // block_bytes
        per_row = max(n for n in range(1, min(count, max(1, ROW_BYTES // block_bytes)) + 1) if count % n == 0)
        return dequantize(raw.reshape(-1, per_row * block_bytes), kind).reshape(block.shape)


def open_file(path: pathlib.Path | str) -> File:
    """Metadata and the table of tensors; ValueError where the file is no GGUF, or shorter than its table says."""
    path = pathlib.Path(path)
    with path.open("rb") as file:
        size = file.seek(0, 2)
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None
    if raw is None or raw[:4] != MAGIC:
        raise ValueError(f"{path} is no GGUF file: it starts with {raw[:4] if raw else b''!r}, not {MAGIC!r}")
    try:
        metadata, table, at = _header(_Cursor(raw))
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} ends inside its header at {size} bytes; it is truncated: fetch it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    align = metadata.get("general.alignment", 32)
    if align < 1:
        raise ValueError(f"{path}: general.alignment={align} must be at least 1; the file is damaged: fetch it again")
    start = -(-at // align) * align
    blocks = {name: _block(path, name, *rest, data_start=start) for name, *rest in table}
    end = max((block.start + block.size for block in blocks.values()), default=start)
    if end > size:
        raise ValueError(f"{path} has {size} bytes but its tensors end at byte {end}; it is truncated: fetch it again")
    return File(path, metadata, blocks, raw)


def _block(path: pathlib.Path, name: str, shape: tuple[int, ...], kind: int, offset: int, *, data_start: int) -> Block:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in GGML_QUANT_SIZES:
        raise ValueError(f"{path}: tensor {name} has quantisation type {kind}, which gguf {_version()} does not know")
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape[-1] % block_size:
        raise ValueError(f"{path}: tensor {name} has rows of {shape[-1]}, not a multiple of its blocks of {block_size}")
    count = int(np.prod(shape, dtype=np.int64))
    return Block(name, shape, kind, data_start + offset, count // block_size * block_bytes)


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("gguf")


class _Cursor:
    """Reads values one after another."""

    def __init__(self, raw: mmap.mmap):
        self.raw, self.at = raw, 0

    def take(self, form: str) -> tuple:
        values = struct.unpack_from("<" + form, self.raw, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        if self.at + length > len(self.raw):
            raise struct.error("text beyond the end")
        self.at += length
        return self.raw[self.at - length : self.at].decode("utf-8")

    def texts(self, count: int) -> list[str]:
        """Like `text` so many times, in one loop: a vocabulary has 10⁵ of them."""
        raw, at, length_at, found = self.raw, self.at, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            (length,) = length_at(raw, at)
            found.append(raw[at + 8 : at + 8 + length].decode("utf-8"))
            at += 8 + length
        if at > len(raw):
            raise struct.error("text beyond the end")
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.take("IQ")
            if count > len(self.raw):
                raise struct.error("array beyond the end")
            if inner in SCALARS:
                return list(self.take(f"{count}{SCALARS[inner]}"))
            if inner == STRING:
                return self.texts(count)
            return [self.value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"metadata of kind {kind} is unknown; GGUF has 0 to 12")
        return self.take(SCALARS[kind])[0]


def _header(cursor: _Cursor) -> tuple[dict[str, Any], list[tuple], int]:
    """-> metadata, rows of (name, shape, kind, offset), and where the header ends."""
    _, version = cursor.take("4sI")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not supported; versions 2 and 3 are")
    num_tensors, num_values = cursor.take("QQ")
    metadata = {}
    for _ in range(num_values):
        name, (kind,) = cursor.text(), cursor.take("I")
        metadata[name] = cursor.value(kind)
    table = []
    for _ in range(num_tensors):
        name, (num_dims,) = cursor.text(), cursor.take("I")
        shape = tuple(reversed(cursor.take(f"{num_dims}Q")))
        table.append((name, shape, *cursor.take("IQ")))
    return metadata, table, cursor.at
