"""Foreign tensors into parameters and back: which tensor fills which leaf, in which layout. Knows no file format.

A leaf is built shard by shard, each layer's tensor read when its turn comes, so a host holds one shard of one leaf
beside the parameters themselves.
"""

import dataclasses
import itertools
import math
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
# GPT-2's q, k and v in one tensor, as nn.Linear has it: a dim of parts, of which the leaf is the one in brackets.
FUSED_LINEAR = {
    "layers.attention.q": "[(N H)]+(K H)+(K H) D -> D N H",
    "layers.attention.k": "(N H)+[(K H)]+(K H) D -> D K H",
    "layers.attention.v": "(N H)+(K H)+[(K H)] D -> D K H",
    "layers.attention.q_bias": "[(N H)]+(K H)+(K H) -> N H",
    "layers.attention.k_bias": "(N H)+[(K H)]+(K H) -> K H",
    "layers.attention.v_bias": "(N H)+(K H)+[(K H)] -> K H",
}
# DeepSeek's attention: each head's part without position, then its rotary pairs (2h, 2h + 1); Q is the queries' rank.
LATENT_LINEAR = {
    "layers.attention.q_down": "Q D -> D Q",
    "layers.attention.q_norm.scale": "Q -> Q",
    "layers.attention.q": "(N [n]+(h two)) Q -> Q N n",
    "layers.attention.q_rope": "(N n+[(h two)]) Q -> Q N (two h)",
    "layers.attention.kv_down": "[R]+(h two) D -> D R",
    "layers.attention.kv_norm.scale": "R -> R",
    "layers.attention.k": "(N [n]+W) R -> R N n",
    "layers.attention.k_rope": "R+[(h two)] D -> D (two h)",
    "layers.attention.v": "(N n+[W]) R -> R N W",
    "layers.attention.o": "D (N W) -> N W D",
}
# A mixture of experts, one tensor an expert; f is the width of one, s of the shared ones.
EXPERTS_LINEAR = {
    "layers.ffn.router": "E D -> D E",
    "layers.ffn.router_bias": "E -> E",
    "layers.ffn.gate": "f D -> D f",
    "layers.ffn.up": "f D -> D f",
    "layers.ffn.down": "D f -> f D",
    "layers.ffn.shared.gate": "s D -> D s",
    "layers.ffn.shared.up": "s D -> D s",
    "layers.ffn.shared.down": "D s -> s D",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """One foreign tensor, or one part of it, and the parameter it fills, or the part of it.

    Slot(name="model.layers.{l}.self_attn.q_proj.weight", path="layers.attention.q", layout="(N H) D -> D N H")
    """

    name: str  # of the foreign tensor; {l} is the layer, {e} the expert
    path: str  # of our leaf, dotted
    layout: str  # einops pattern, foreign -> ours, in the letters of the alphabet; a+[b] is one dim, b's part after a's
    index: tuple[int, ...] = ()  # where in the leaf: its layer where layers are stacked, its expert
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
    paths = dict.fromkeys(re.sub(r"layers\.\d+\.", "layers.", path) for path, _ in leaves(abstract(config).shapes))
    found = []
    for path in paths:
        added = added_to_norms if path.endswith("norm.scale") else 0.0
        found.append(Slot(name=names[path], path=path, layout=layouts[path], added=added))
    return found


def with_dense_layers(table: Mapping[str, str]) -> dict[str, str]:
    """A table of names or layouts that also has the layers before those with experts."""
    return {**table, **{f"dense_{path}": value for path, value in table.items() if path.startswith("layers.")}}


def sizes(config: ModelConfig) -> dict[str, int]:
    """Length of each letter that a layout may use."""
    return {
        "V": config.vocab_size, "D": config.embed_dim, "N": config.num_heads, "K": config.num_kv_heads,
        "H": config.head_dim, "F": config.ffn_dim, "S": config.max_length, "h": config.rotary_dim // 2, "two": 2,
        "n": config.head_dim - config.rotary_dim, "W": config.value_dim or config.head_dim,
        "R": config.kv_rank, "Q": config.q_rank or config.embed_dim,
        "E": config.num_experts, "f": config.expert_ffn_dim, "s": config.shared_ffn_dim,
    }  # fmt: skip


PART = r"\[?(?:\([^()+]*\)|\w+)\]?"
JOINT = re.compile(rf"{PART}(?:\+{PART})+")  # a dim of parts: n+[(h two)]


class Sides(NamedTuple):
    """A layout taken apart."""

    foreign: str  # a dim of parts is written J
    parts: tuple[str, ...]  # of J, in order
    part: int  # which of them the leaf is
    ours: str


def sides(layout: str) -> Sides:
    """sides("(N n+[(h two)]) Q -> Q N (two h)") is ("(N J) Q", ("n", "(h two)"), 1, "Q N (two h)")"""
    foreign, ours = layout.split(" -> ")
    joint = JOINT.search(foreign)
    parts = joint[0].split("+") if joint else []
    part = next((number for number, part in enumerate(parts) if part[0] == "["), 0)
    return Sides(JOINT.sub("J", foreign), tuple(part.strip("[]") for part in parts), part, ours)


def _lengths(pattern: str, config: ModelConfig, parts: tuple[str, ...]) -> dict[str, int]:
    """Length of each letter in a pattern; J is as long as its parts together."""
    known = sizes(config)
    known |= {"J": sum(math.prod(known[letter] for letter in re.findall(r"\w+", part)) for part in parts)}
    return {letter: known[letter] for letter in set(re.findall(r"\w+", pattern))}


def foreign_shape(layout: str, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the foreign side: "(N H) D -> D N H" is (N * H, D), "[R]+(h two) D -> D R" is (R + 2h, D)."""
    foreign, parts, *_ = sides(layout)
    lengths = _lengths(foreign, config, parts)
    dims = re.findall(r"\([^)]*\)|\w+", foreign)
    return tuple(math.prod(lengths[letter] for letter in re.findall(r"\w+", dim)) for dim in dims)


def to_ours(slot: Slot, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The foreign tensor, or the slot's part of it, in our layout; a view where the layout allows it."""
    foreign, parts, part, ours = sides(slot.layout)
    if parts:
        apart = re.sub(r"[()]", "", foreign)
        tensor = rearrange(tensor, f"{foreign} -> {apart}", **_lengths(foreign, config, parts))
        start, end = (_lengths("J", config, parts[:count])["J"] for count in (part, part + 1))
        tensor = tensor[(slice(None),) * apart.split().index("J") + (slice(start, end),)]
        foreign = apart.replace("J", parts[part])
    return rearrange(tensor, f"{foreign} -> {ours}", **_lengths(foreign, config, parts))


def to_foreign(slots: list[Slot], leaves: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    """The foreign tensor that these slots, in order of part, are cut from."""
    foreign, parts, _, ours = sides(slots[0].layout)
    if not parts:
        return rearrange(leaves[0], f"{ours} -> {foreign}", **_lengths(foreign, config, parts))
    apart, cuts = re.sub(r"[()]", "", foreign), []
    for slot, leaf, part in zip(slots, leaves, parts, strict=True):
        ours = sides(slot.layout).ours
        cuts.append(rearrange(leaf, f"{ours} -> {apart.replace('J', part)}", **_lengths(ours, config, parts)))
    joined = np.concatenate(cuts, axis=apart.split().index("J"))
    return rearrange(joined, f"{apart} -> {foreign}", **_lengths(foreign, config, parts))


def leaves(tree: Mapping[Any, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted path: ("layers.attention.q", array), …"""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{section}{name}.")
        else:
            yield section + str(name), value


def by_leaf(slots: Iterable[Slot], config: ModelConfig) -> dict[str, list[Slot]]:
    """For each leaf of the tree its slots in order, one a layer and expert, which the name and the index say."""
    filled: dict[str, list[Slot]] = {}
    for slot in slots:
        dense, first = slot.path.startswith("dense_layers."), config.num_dense_layers
        layers = range(1) if "{l}" not in slot.name else range(first) if dense else range(first, config.num_layers)
        for l, e in itertools.product(layers, range(config.num_experts if "{e}" in slot.name else 1)):
            path, index = slot.path, (e,) * ("{e}" in slot.name)
            if "{l}" in slot.name and config.scan_layers:
                index = (l - layers.start, *index)
            elif "{l}" in slot.name:
                path = path.replace("layers.", f"layers.{l - layers.start}.", 1)
            name = slot.name.replace("{l}", str(l)).replace("{e}", str(e))
            filled.setdefault(path, []).append(dataclasses.replace(slot, name=name, path=path, index=index))
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


def nested(built: dict[str, Any]) -> Parameters:
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

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        if str(index) not in made:
            made[str(index)] = _read(config, slots, foreign, index, shape)
        return made[str(index)]

    return jax.make_array_from_callback(shape, sharding, shard)


def _read(config, slots: list[Slot], foreign: Foreign, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The part of a leaf at `index`, whose first entries say which of the slots, one a layer and expert."""
    spans = [range(*cut.indices(dim)) for cut, dim in zip(index, shape, strict=True)]
    out = np.empty([len(span) for span in spans], np.float32)
    for slot in slots:
        if all(place in span for place, span in zip(slot.index, spans, strict=False)):
            where = tuple(place - span.start for place, span in zip(slot.index, spans, strict=False))
            out[where] = to_ours(slot, foreign.read(slot.name), config)[index[len(where) :]]
            if slot.added:
                out[where] -= np.float32(slot.added)
    return out


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
