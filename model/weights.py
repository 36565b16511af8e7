"""Foreign tensors into parameters and back: which tensor fills which leaf, in which layout. Knows no file format.

A leaf is built shard by shard, each layer's tensor read when its turn comes, so a host holds one shard of one leaf
beside the parameters themselves.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from jax.sharding import Mesh

from model.config import ModelConfig
from model.parameters import Parameters, abstract, shardings
from parallel.config import AxisRules

# Layouts of PyTorch's nn.Linear, [out, in], to ours: the layout of most checkpoints.
LINEAR = {
    "embedding.tokens": "V D -> V D",
    "embedding.positions": "S D -> S D",
    "head": "V D -> V D",
    "norm.scale": "D -> D",
    "norm.bias": "D -> D",
    "layers.attention_norm.scale": "D -> D",
    "layers.attention_norm.bias": "D -> D",
    "layers.attention.q": "(N H) D -> D N H",
    "layers.attention.q_bias": "(N H) -> N H",
    "layers.attention.q_norm.scale": "H -> H",
    "layers.attention.k": "(K H) D -> D K H",
    "layers.attention.k_bias": "(K H) -> K H",
    "layers.attention.k_norm.scale": "H -> H",
    "layers.attention.v": "(K H) D -> D K H",
    "layers.attention.v_bias": "(K H) -> K H",
    "layers.attention.o": "D (N H) -> N H D",
    "layers.attention.o_bias": "D -> D",
    "layers.attention_post_norm.scale": "D -> D",
    "layers.ffn_norm.scale": "D -> D",
    "layers.ffn_norm.bias": "D -> D",
    "layers.ffn.up": "F D -> D F",
    "layers.ffn.up_bias": "F -> F",
    "layers.ffn.gate": "F D -> D F",
    "layers.ffn.down": "D F -> F D",
    "layers.ffn.down_bias": "D -> D",
    "layers.ffn_post_norm.scale": "D -> D",
}
# GPT-2's q, k and v in one tensor, as nn.Linear has it; P counts the parts.
FUSED_LINEAR = {f"layers.attention.{mine}": "(P N H) D -> P D N H" for mine in "qkv"} | {
    f"layers.attention.{mine}_bias": "(P N H) -> P N H" for mine in "qkv"
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """One foreign tensor, or one part of it, and the parameter it fills.

    Slot(name="model.layers.{l}.self_attn.q_proj.weight", path="layers.attention.q", layout="(N H) D -> D N H")
    """

    name: str  # of the foreign tensor; {l} is the layer
    path: str  # of our leaf, dotted
    layout: str  # einops pattern, foreign -> ours, in the letters of the alphabet; P counts parts
    part: int | None = None  # which of the P equal parts of the foreign tensor, where it holds several leaves
    added: float = 0.0  # what the foreign format adds to our numbers


class Foreign(NamedTuple):
    """Tensors of a foreign checkpoint, read when asked."""

    where: str  # the file or folder, for messages
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]  # any float type; may be a view of a mapped file


def slots(
    config: ModelConfig, names: Mapping[str, str], layouts: Mapping[str, str], *, added_to_norms: float = 0.0
) -> list[Slot]:
    """One slot for each leaf that this config has, layers counted once: the tree says which leaves there are."""
    paths = dict.fromkeys(re.sub(r"^layers\.\d+\.", "layers.", path) for path, _ in leaves(abstract(config).shapes))
    found = []
    for path in paths:
        part = "qkv".index(path.split(".")[-1][0]) if "P" in layouts[path] else None
        added = added_to_norms if path.endswith("norm.scale") else 0.0
        found.append(Slot(name=names[path], path=path, layout=layouts[path], part=part, added=added))
    return found


def sizes(config: ModelConfig) -> dict[str, int]:
    """Length of each letter that a layout may use."""
    return {
        "V": config.vocab_size, "D": config.embed_dim, "N": config.num_heads, "K": config.num_kv_heads,
        "H": config.head_dim, "F": config.ffn_dim, "S": config.max_length, "h": config.head_dim // 2, "two": 2, "P": 3,
    }  # fmt: skip


def _letters(layout: str, config: ModelConfig) -> dict[str, int]:
    known = sizes(config)
    return {letter: known[letter] for letter in set(re.findall(r"\w+", layout))}


def foreign_shape(layout: str, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the foreign side: "(N H) D -> D N H" is (N * H, D)."""
    known = sizes(config)
    dims = re.findall(r"\([^)]*\)|\w+", layout.split("->")[0])
    return tuple(int(np.prod([known[letter] for letter in re.findall(r"\w+", dim)])) for dim in dims)


def to_ours(slot: Slot, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The foreign tensor in our layout; a view where the layout allows it."""
    ours = rearrange(tensor, slot.layout, **_letters(slot.layout, config))
    return ours if slot.part is None else ours[slot.part]


def to_foreign(slots: list[Slot], leaves: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    """The foreign tensor that these slots, in order of part, are cut from."""
    foreign, arrow, ours = slots[0].layout.partition("->")
    array = leaves[0] if slots[0].part is None else np.stack(leaves)
    return rearrange(array, f"{ours}{arrow}{foreign}", **_letters(slots[0].layout, config))


def leaves(tree: Mapping[Any, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted path: ("layers.attention.q", array), …"""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{section}{name}.")
        else:
            yield section + str(name), value


def by_leaf(slots: Iterable[Slot], config: ModelConfig) -> dict[str, list[Slot]]:
    """For each leaf of the tree, the slots of its layers in order, each with its layer in the name (and the path)."""
    filled: dict[str, list[Slot]] = {}
    for slot in slots:
        layered = "{l}" in slot.name
        for l in range(config.num_layers if layered else 1):
            path = slot.path
            if layered and not config.scan_layers:
                path = path.replace("layers.", f"layers.{l}.", 1)
            name = slot.name.replace("{l}", str(l))
            filled.setdefault(path, []).append(dataclasses.replace(slot, name=name, path=path))
    return filled


def assemble(
    config: ModelConfig, slots: Iterable[Slot], foreign: Foreign, mesh: Mesh, rules: AxisRules, *, spare: str = r"$^"
) -> Parameters:
    """Float32 parameters, each created on its sharding. Tensors whose whole name matches `spare` need no slot.

    Raises ValueError naming tensors that are missing, superfluous or of another shape, before any is read.
    """
    by_path = by_leaf(slots, config)
    check(config, [slot for group in by_path.values() for slot in group], foreign, spare=spare)
    shapes = dict(leaves(abstract(config).shapes))
    assert by_path.keys() == shapes.keys(), sorted(by_path.keys() ^ shapes.keys())
    split = dict(leaves(shardings(config, mesh, rules)))
    built = {path: _build(config, by_path[path], foreign, shapes[path].shape, split[path]) for path in shapes}
    return nested(built)


def nested(built: dict[str, jax.Array]) -> Parameters:
    """A tree from dotted paths; layers that stand apart have whole numbers as keys."""
    tree: dict[Any, Any] = {}
    for path, leaf in built.items():
        *sections, last = path.split(".")
        inside = tree
        for section in sections:
            inside = inside.setdefault(int(section) if section.isdigit() else section, {})
        inside[last] = leaf
    return tree


def _build(config: ModelConfig, slots: list[Slot], foreign: Foreign, shape: tuple[int, ...], sharding) -> jax.Array:
    """One leaf: every distinct shard is read once, replicas share it."""
    made: dict[str, np.ndarray] = {}
    stacked = config.scan_layers and slots[0].path.startswith("layers.")

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        if str(index) not in made:
            made[str(index)] = _read(config, slots, foreign, index if stacked else (slice(0, 1), *index), shape)
        return made[str(index)]

    return jax.make_array_from_callback(shape, sharding, shard)


def _read(config, slots: list[Slot], foreign: Foreign, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The part of a leaf at `index`, whose first entry says which of the slots, one a layer."""
    which, *within = index
    dims = shape[len(shape) - len(within) :]
    extents = [len(range(*cut.indices(dim))) for cut, dim in zip(within, dims, strict=True)]
    chosen = slots[which]
    out = np.empty([len(chosen), *extents], np.float32)
    for row, slot in zip(out, chosen, strict=True):
        row[...] = to_ours(slot, foreign.read(slot.name), config)[tuple(within)]
        if slot.added:
            row -= np.float32(slot.added)
    return out if len(dims) < len(shape) else out[0]


def check(config: ModelConfig, slots: list[Slot], foreign: Foreign, *, spare: str) -> None:
    """Raise ValueError unless the foreign tensors are exactly those of the slots, each in its shape."""
    wanted = {slot.name: foreign_shape(slot.layout, config) for slot in slots}
    missing = [name for name in wanted if name not in foreign.shapes]
    if missing:
        raise ValueError(f"{foreign.where} lacks {_some(missing)}, which this config needs")
    extra = [name for name in foreign.shapes if name not in wanted and not re.fullmatch(spare, name)]
    if extra:
        raise ValueError(f"{foreign.where} holds {_some(extra)}, for which this config has no place")
    wrong = [name for name, shape in wanted.items() if tuple(foreign.shapes[name]) != shape]
    if wrong:
        found, shape = tuple(foreign.shapes[wrong[0]]), wanted[wrong[0]]
        raise ValueError(f"{foreign.where}: {_some(wrong)} has shape {found} where the config asks for {shape}")


def _some(names: list[str]) -> str:
    """The first names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ("tensor " if len(names) == 1 else "tensors ") + ", ".join(names[:3]) + more
