"""A safetensors file: views of its tensors in, a stream of tensors out. Knows the container and no model.

The layout is huggingface/safetensors' README: eight bytes of header length, a JSON header, the tensors. Reading is
by memory map, so that a slice of a tensor touches only its own pages, bfloat16 included; writing holds one tensor.
"""

import json
import math
import mmap
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
CODES = DTYPES | {"I8": np.int8, "U8": np.uint8, "F8_E4M3": jnp.float8_e4m3fn}  # of quantized weights
NAMES = {np.dtype(dtype): name for name, dtype in CODES.items()}


class File(NamedTuple):
    """An open file."""

    path: pathlib.Path
    header: dict[str, dict[str, Any]]  # name -> dtype, shape, data_offsets
    data_start: int  # byte of the file where offset 0 lies
    raw: mmap.mmap

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self.header[name]["shape"])

    def read(self, name: str, dtypes: Mapping[str, Any] = DTYPES) -> np.ndarray:
        """A view of one tensor in its own type, which must be one of `dtypes`."""
        entry = self.header[name]
        if entry["dtype"] not in dtypes:
            raise ValueError(f"{self.path}: tensor {name} is {entry['dtype']}; {', '.join(dtypes)} are supported")
        dtype, (begin, _) = np.dtype(dtypes[entry["dtype"]]), entry["data_offsets"]
        count = math.prod(entry["shape"])
        return np.frombuffer(self.raw, dtype, count, self.data_start + begin).reshape(entry["shape"])


def open_file(path: pathlib.Path) -> File:
    """The header of a file and a map of its bytes; ValueError where the file is not as long as its header says."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size >= 8 else None
    length = int.from_bytes(raw[:8], "little") if raw else 0
    if raw is None or 8 + length > size:
        raise ValueError(
            f"{path} has {size} bytes but its header ends at byte {8 + length}; it is truncated: fetch it again"
        )
    try:
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file: its header is not the JSON that one begins with") from error
    if end != size:
        raise ValueError(f"{path} has {size} bytes but its tensors end at byte {end}; it is truncated: fetch it again")
    return File(path, header, 8 + length, raw)


def write_file(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    make: Callable[[str], np.ndarray],
) -> None:
    """Write the tensors that `make` gives for each name; the file appears under its name when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shapes.items():
                array = np.ascontiguousarray(make(name).astype(dtypes[name], copy=False))
                assert array.shape == tuple(shape), (name, array.shape, shape)
                file.write(array.view(np.uint8).data if array.ndim else array.tobytes())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
