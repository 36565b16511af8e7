"""Weights in 8 or 4 bits: made from float ones, and multiplied by as they are. Knows no mesh, no model, no file.

    scheme   codes                        value of a weight       error of a weight
    int8     int8, -127…127               code * scale            at most scale / 2, scale = largest of its output / 127
    fp8      float8_e4m3fn                code * scale            at most |weight| / 16, or scale / 1024 if that is more
    int4     uint4, groups of 32 inputs   code * scale + low      at most 0.51 * (highest - lowest of its group) / 15
                                                                  where no weight is clipped; else see `grouped`

A product sums over a weight's inputs; what is left are its outputs. int8 and fp8 have one scale an output, int4 one
scale and one low (float16) a group: 5 bits a weight. Two forms multiply alike: *plain*, in einsum's own words, which a
TPU's compiler fuses, and *streamed*, the one form in which XLA:CPU reads the codes and not their float32 copy
(docs/benchmarks/quantization.md).
"""

import dataclasses
import functools
import math
from types import EllipsisType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

Scheme = Literal["int8", "int4", "fp8"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
GROUP = 32  # inputs of int4 that share a scale, at most
SMALLEST = 1e-30  # of an output that scales are made of: zeros stay zeros
SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.80)  # of a group's range, tried by int4: clipping its ends may cost less
LARGEST = {"int8": 127.0, "fp8": 448.0}
FEW_ROWS = 16  # for which groups of int4 are multiplied before they are scaled
TILE_BYTES = 2**20  # of float32 weights that exist at once in a streamed product of several rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight as codes, its dims in another order: outputs, then inputs. Multiplies as the array it was made from."""

    codes: Any  # array
    scales: Any  # array; each dim 1, or as many as there are outputs or groups of inputs
    lows: Any  # array as scales, what code 0 means; None is 0
    order: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # dim of the weight that each dim of codes is
    num_inputs: int = dataclasses.field(metadata={"static": True})  # dims, the last ones of codes
    is_streamed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array it was made from."""
        return tuple(self.codes.shape[self.order.index(dim)] for dim in range(self.codes.ndim))

    @property
    def num_bytes(self) -> int:
        """Of codes and scales as they are stored: 4-bit codes take half a byte, wherever they are held."""
        bits = 4 if self.lows is not None else 8
        lows = 0 if self.lows is None else self.lows.size
        return -(-self.codes.size * bits // 8) + 2 * (self.scales.size + lows) * (1 if bits == 4 else 2)

    def __getitem__(self, whole: EllipsisType) -> "Quantized":
        """The weight itself, as `array[...]` is."""
        return self

    def astype(self, dtype: jnp.dtype) -> Float[Array, "..."]:
        """The weight as an array."""
        values = decoded(self.codes, self.scales, self.lows).astype(dtype)
        return values.transpose([self.order.index(dim) for dim in range(values.ndim)])

    def einsum(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`jnp.einsum(equation, x, weight)`; streamed for an equation that sums over the last letters of x alone."""
        inputs, y = equation.split("->")
        left, right = inputs.split(",")
        letters = "".join(right[dim] for dim in self.order)
        if self.is_streamed:
            return self._streamed(x)
        if self.lows is not None and math.prod(x.shape) <= FEW_ROWS * math.prod(self.codes.shape[-self.num_inputs :]):
            return self._by_group(x, left, letters, y)
        if self.lows is not None:
            return jnp.einsum(f"{left},{letters}->{y}", x, decoded(self.codes, self.scales, self.lows).astype(x.dtype))
        product = jnp.einsum(f"{left},{letters}->{y}", x, self.codes.astype(x.dtype))
        kept = len(letters) - self.num_inputs
        scales = self.scales.reshape((1,) * (product.ndim - kept) + self.scales.shape[:kept])
        return (product.astype(jnp.float32) * scales).astype(x.dtype)

    def _by_group(self, x: Float[Array, "..."], left: str, letters: str, y: str) -> Float[Array, "..."]:
        """A product for each group of inputs, then scaled: else a TPU's compiler writes scales weight by weight."""
        codes, rows = (part.reshape(*part.shape[:-1], self.scales.shape[-1], -1) for part in (self.codes, x))
        inputs = letters[-self.num_inputs :]
        groups = jnp.einsum(
            f"{left}z,{letters}z->{y}{inputs}", rows, codes.astype(x.dtype), preferred_element_type=jnp.float32
        )
        scales, lows = self.scales.astype(jnp.float32), self.lows.astype(jnp.float32)
        product = jnp.einsum(f"{y}{inputs},{letters}->{y}", groups, scales)
        sums = jnp.sum(rows.astype(jnp.float32), axis=-1)
        return (product + jnp.einsum(f"{left},{letters}->{y}", sums, lows)).astype(x.dtype)

    def _streamed(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """In float32, whatever x is: outputs by inputs, in tiles of outputs where x has several rows.

        XLA:CPU computes x anew for every output, unless that is dear: a division is, and by 1 it changes nothing.
        A loop over tokens would decode the weight once, before it, and read float32 then: the barrier ties it to x.
        """
        kept = x.shape[: x.ndim - self.num_inputs]
        outputs = self.codes.shape[: self.codes.ndim - self.num_inputs]
        rows = x.reshape(math.prod(kept), -1).astype(jnp.float32)
        rows = rows / (1 + 0 * rows)  # ones that the compiler cannot know
        parts = jax.tree.map(functools.partial(_flat, num_inputs=self.num_inputs), (self.codes, self.scales, self.lows))
        rows, parts = jax.lax.optimization_barrier((rows, parts))
        return _product(rows, *parts).reshape(*kept, *outputs).astype(x.dtype)

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... inputs"]:
        """Rows `ids` of a table whose first dim is its only output."""
        parts = jax.tree.map(
            lambda part: part.at[ids].get(mode="promise_in_bounds"), (self.codes, self.scales, self.lows)
        )
        return decoded(*parts)


def streamed(w: Quantized) -> Quantized:
    """The same weight as one CPU multiplies by it: 4-bit codes a byte each, float16 scales as float32."""
    codes = w.codes.astype(jnp.uint8) if w.codes.dtype == jnp.uint4 else w.codes
    wide = jax.tree.map(lambda part: part.astype(jnp.float32), (w.scales, w.lows))
    return dataclasses.replace(w, codes=codes, scales=wide[0], lows=wide[1], is_streamed=True)


def quantize(w: Float[Array, "..."], summed: tuple[int, ...], scheme: Scheme) -> Quantized:
    """`w` in a scheme; `summed` are the dims that a product sums over."""
    order = (*(dim for dim in range(w.ndim) if dim not in summed), *summed)
    values, inputs = w.transpose(order).astype(jnp.float32), tuple(range(w.ndim - len(summed), w.ndim))
    parts = grouped(values) if scheme == "int4" else scaled(values, inputs, scheme)
    return Quantized(*parts, order=order, num_inputs=len(summed))


def scaled(
    w: Float[Array, "..."], inputs: tuple[int, ...], scheme: Scheme
) -> tuple[Num[Array, "..."], Float[Array, "..."], None]:
    """One scale an output, so that its largest weight has the largest code."""
    scales = jnp.maximum(jnp.max(jnp.abs(w), axis=inputs, keepdims=True), SMALLEST) / LARGEST[scheme]
    codes = w / scales
    return (jnp.round(codes).astype(jnp.int8) if scheme == "int8" else codes.astype(jnp.float8_e4m3fn)), scales, None


def grouped(w: Float[Array, "..."]) -> tuple[Num[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Groups of the last dim, each from its lowest to its highest weight, or the part of that with the least error.

    Of the ranges tried (SHRINKS) the one with the least sum of squares is taken, so that is never more than without.
    """
    size = group_size(w.shape[-1])
    groups = w.reshape(*w.shape[:-1], -1, size)
    low, high = jnp.min(groups, axis=-1, keepdims=True), jnp.max(groups, axis=-1, keepdims=True)
    best = _within(groups, low, high)
    for shrink in SHRINKS[1:]:
        cut = (high - low) * ((1 - shrink) / 2)
        best = _better(groups, best, _within(groups, low + cut, high - cut))
    codes, scale, low = best
    return codes.reshape(w.shape).astype(jnp.uint4), scale[..., 0], low[..., 0]


def _within(groups, low, high):
    """Codes between two ends, which are rounded to float16 before, so that codes make up for it."""
    low, scale = low.astype(jnp.float16), ((high - low) / 15).astype(jnp.float16)
    step = jnp.where(scale > 0, scale, 1).astype(jnp.float32)
    return jnp.clip(jnp.round((groups - low.astype(jnp.float32)) / step), 0, 15), scale, low


def _better(groups, one, other):
    """The one of two tries that is nearer to its group."""
    errors = [
        jnp.sum((codes * scale.astype(jnp.float32) + low.astype(jnp.float32) - groups) ** 2, axis=-1, keepdims=True)
        for codes, scale, low in (one, other)
    ]
    return tuple(jnp.where(errors[1] < errors[0], theirs, mine) for mine, theirs in zip(one, other, strict=True))


def group_size(inputs: int) -> int:
    """The largest divisor of a dim that is at most GROUP."""
    return next(size for size in range(min(GROUP, inputs), 0, -1) if inputs % size == 0)


def decoded(
    codes: Num[Array, "..."], scales: Float[Array, "..."], lows: Float[Array, "..."] | None
) -> Float[Array, "..."]:
    """The weights that codes mean, in float32."""
    values = _as_float(codes) * _spread(scales, codes.shape)
    return values if lows is None else values + _spread(lows, codes.shape)


def _spread(part: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """In float32; a number for several weights is repeated for each, one for all is not."""
    part = part.astype(jnp.float32)
    for dim, (size, wanted) in enumerate(zip(part.shape, shape, strict=True)):
        if size not in (1, wanted):
            part = jnp.repeat(part, wanted // size, axis=dim)
    return part


def _as_float(codes: Num[Array, "..."]) -> Float[Array, "..."]:
    """Codes in float32; e4m3 as float16 of 256 times less, its bits in their place: XLA:CPU converts value by value."""
    if codes.dtype != jnp.float8_e4m3fn:
        return codes.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16).astype(jnp.float32) * 256


def _flat(part: Num[Array, "..."], num_inputs: int) -> Num[Array, "outputs _"]:
    return part.reshape(math.prod(part.shape[: part.ndim - num_inputs]), -1)


def _product(rows: Float[Array, "rows inputs"], codes, scales, lows) -> Float[Array, "rows outputs"]:
    """rows times the weight transposed.

    One row: XLA:CPU fuses decoding into the product, as long as the weight is written transposed and nothing else uses
    it. More rows: it would write the whole weight as float32 first, so a tile at a time that the cache holds.
    """
    outputs, inputs = codes.shape
    size = max(1, TILE_BYTES // (4 * inputs))
    if len(rows) == 1 or outputs <= size:
        return rows @ decoded(codes, scales, lows).T

    def tile(start, length):
        parts = jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, start, length), (codes, scales, lows))
        return rows @ decoded(*parts).T

    def body(i, y):
        return jax.lax.dynamic_update_slice_in_dim(y, tile(i * size, size), i * size, 1)

    whole, rest = divmod(outputs, size)
    y = jax.lax.fori_loop(0, whole, body, jnp.zeros((len(rows), outputs), jnp.float32))
    return jax.lax.dynamic_update_slice_in_dim(y, tile(whole * size, rest), whole * size, 1) if rest else y
