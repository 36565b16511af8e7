"""A decoder with quantized matrices: which of them, made where they stay, to a folder and back. Knows no tokenizer.

The folder has model.safetensors and a config.json of our own. A quantized leaf is up to three tensors: `codes` (4-bit
ones two a byte, the first in the low half), `scales`, `lows`. What is read back is what was written, bit for bit.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from model import safetensors_file
from model.config import ModelConfig
from model.parameters import Parameters, abstract, summed_dims
from model.weights import leaves, nested
from ops.quantize import SCHEMES, Quantized, Scheme, quantize
from parallel.config import AxisRules
from parallel.records import from_dict, nearest, to_dict
from parallel.sharding import Names, fitting, sharding

SINGLE, CONFIG = "model.safetensors", "config.json"
FORMAT = 1  # of the folder
KIND = "meshlight_quantized"  # key of config.json that tells our folder from others
UINT4 = np.dtype(jnp.uint4)


def making(names: Names, scheme: Scheme) -> Callable[..., Quantized] | None:
    """How a parameter is quantized; None where it is no matrix. Tables of the vocabulary have 8 bits at least."""
    summed = summed_dims(names)
    if summed is None:
        return None
    return functools.partial(
        quantize, summed=summed, scheme="int8" if "vocab" in names and scheme == "int4" else scheme
    )


def quantized(config: ModelConfig, parameters: Parameters, scheme: Scheme, mesh: Mesh, rules: AxisRules) -> Parameters:
    """The same tree with matrices quantized, leaf by leaf: of what is popped here no more than one is there twice."""
    held, tree = jax.tree.flatten(parameters)
    names = jax.tree.leaves(abstract(config).names, is_leaf=lambda names: isinstance(names, tuple))
    del parameters
    return jax.tree.unflatten(tree, [_leaf(held.pop(0), name, scheme, mesh, rules) for name in names])


def _leaf(w: Float[Array, "..."], names: Names, scheme: Scheme, mesh: Mesh, rules: AxisRules) -> Any:
    make = _maker(w.shape, names, scheme, mesh, rules)
    return w if make is None else make(w)


@functools.cache
def _maker(shape: tuple[int, ...], names: Names, scheme: Scheme, mesh: Mesh, rules: AxisRules) -> Callable | None:
    """What quantizes a parameter of these dims, onto the devices that have its part; None for one that stays."""
    make = making(names, scheme)
    if make is None:
        return None
    made = jax.eval_shape(make, jax.ShapeDtypeStruct(shape, jnp.float32))
    return jax.jit(make, out_shardings=places(made, names, mesh, rules))


def places(w: Quantized, names: Names, mesh: Mesh, rules: AxisRules) -> Quantized:
    """The sharding of each array: a dim of codes is split as the weight's, one of scales too where there are enough."""
    ordered = tuple(names[dim] for dim in w.order)
    return jax.tree.map(lambda part: fitting(ordered, part.shape, mesh, rules), w)


# A folder


def save(folder: pathlib.Path | str, config: ModelConfig, parameters: Parameters, scheme: Scheme) -> None:
    """Write the weights, then config.json, without which the folder is no model."""
    folder = pathlib.Path(folder)
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = dict(tensors(parameters))
    kinds = {name: _stored(array) for name, array in arrays.items()}
    safetensors_file.write_file(
        folder / SINGLE,
        {name: kind.shape for name, kind in kinds.items()},
        {name: np.dtype(kind.dtype) for name, kind in kinds.items()},
        lambda name: packed(np.asarray(arrays[name])),
    )
    fields = {KIND: FORMAT, "scheme": scheme, "decoder": to_dict(config)}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def check_free(folder: pathlib.Path) -> None:
    """Raise FileExistsError where a folder already holds a model."""
    for name in (SINGLE, CONFIG):
        if (folder / name).exists():
            raise FileExistsError(f"{folder} already holds {name}; choose another folder or remove it first")


def tensors(parameters: Any) -> list[tuple[str, Any]]:
    """Every array of a tree by its dotted name, those of a quantized leaf each by itself."""
    found = []
    for path, leaf in leaves(parameters):
        if not isinstance(leaf, Quantized):
            found.append((path, leaf))
            continue
        parts = {"codes": leaf.codes, "scales": leaf.scales, "lows": leaf.lows}
        found += [(f"{path}.{name}", part) for name, part in parts.items() if part is not None]
    return found


def _stored(array: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of an array in the file."""
    if array.dtype != UINT4:
        return jax.ShapeDtypeStruct(array.shape, array.dtype)
    return jax.ShapeDtypeStruct((-(-math.prod(array.shape) // 2),), jnp.uint8)


def packed(array: np.ndarray) -> np.ndarray:
    """4-bit codes two a byte; anything else as it is."""
    if array.dtype != UINT4:
        return array
    flat = array.reshape(-1).astype(np.uint8)
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return flat[::2] | flat[1::2] << 4


def unpacked(stored: np.ndarray, like: Any) -> np.ndarray:
    """The array that `packed` had."""
    if like.dtype != UINT4:
        return stored
    flat = np.stack([stored & 15, stored >> 4], axis=1).reshape(-1)
    return flat[: math.prod(like.shape)].reshape(like.shape).astype(UINT4)


def read_config(folder: pathlib.Path) -> tuple[ModelConfig, Scheme]:
    """The decoder in a folder and how its matrices are kept; ValueError where the file is damaged or not ours."""
    path = folder / CONFIG
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get(KIND) != FORMAT:
        raise ValueError(
            f"{path}: {KIND} is {fields.get(KIND)!r}, this version reads {FORMAT}; quantize the model again"
        )
    scheme = fields.get("scheme")
    if scheme not in SCHEMES:
        raise ValueError(
            f"{path}: scheme {scheme!r} is unknown{nearest(str(scheme), SCHEMES)}; {', '.join(SCHEMES)} are known"
        )
    try:
        return from_dict(ModelConfig, fields["decoder"], "decoder."), scheme
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}; the file is damaged, or was written by another version") from error


def shapes(config: ModelConfig, scheme: Scheme) -> Parameters:
    """The tree of a quantized decoder, without numbers."""

    def shape(leaf: Any, names: Names) -> Any:
        make = making(names, scheme)
        return leaf if make is None else jax.eval_shape(make, leaf)

    return jax.tree.map(shape, abstract(config).shapes, abstract(config).names)


def load(folder: pathlib.Path, config: ModelConfig, scheme: Scheme, mesh: Mesh, rules: AxisRules) -> Parameters:
    """The parameters in a folder, on their devices. ValueError for tensors that are missing, superfluous or damaged."""
    path = folder / SINGLE
    file, wanted = safetensors_file.open_file(path), shapes(config, scheme)
    check(path, file.header, {name: _stored(like) for name, like in tensors(wanted)})
    names, built = dict(leaves(abstract(config).names)), {}
    for name, leaf in leaves(wanted):
        if not isinstance(leaf, Quantized):
            built[name] = jax.device_put(file.read(name), sharding(names[name], leaf.shape, mesh, rules))
            continue
        parts = {
            part: jax.device_put(
                unpacked(file.read(f"{name}.{part}", safetensors_file.CODES), getattr(leaf, part)), where
            )
            for part in ("codes", "scales", "lows")
            if (where := getattr(places(leaf, names[name], mesh, rules), part)) is not None
        }
        built[name] = dataclasses.replace(leaf, **parts)
    return nested(built)


def check(path: pathlib.Path, header: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError unless the file has these tensors and no others."""
    missing, extra = wanted.keys() - header.keys(), header.keys() - wanted.keys()
    if missing or extra:
        word, name = ("lacks", min(missing)) if missing else ("holds", min(extra))
        raise ValueError(f"{path} {word} tensor {name}, against its config.json; the folder is damaged: quantize again")
    for name, kind in wanted.items():
        found = header[name]["dtype"], tuple(header[name]["shape"])
        expected = safetensors_file.NAMES[np.dtype(kind.dtype)], kind.shape
        if found != expected:
            raise ValueError(f"{path}: tensor {name} is {found}, not {expected}; the folder is damaged: quantize again")
