"""A model's parameters as a plain tree: shapes, then shardings, then arrays. Knows no files and no optimizer."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from model.config import ModelConfig
from model.decoder import Decoder
from model.layers import names_of
from model.seq2seq import Seq2Seq
from model.seq2seq_config import Seq2SeqConfig
from parallel.config import AxisRules
from parallel.sharding import Names, sharding, use

Parameters = dict[str, Any]  # nested; leaves are arrays
Shape = ModelConfig | Seq2SeqConfig  # a decoder's, or an encoder–decoder's
MODULES: dict[type, Any] = {ModelConfig: Decoder, Seq2SeqConfig: Seq2Seq}


class Abstract(NamedTuple):
    """A model without its numbers."""

    graphdef: nnx.GraphDef
    shapes: Parameters  # leaves are jax.ShapeDtypeStruct
    names: Parameters  # leaves are tuples of logical names


@functools.cache
def abstract(config: Shape) -> Abstract:
    """Structure, shapes and logical names of a model; computes nothing."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MODULES[type(config)](config, jax.random.key(0))))
    names = jax.tree.map(names_of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return Abstract(graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(names))


def num_parameters(config: Shape) -> int:
    """All of them, a tied table counted once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config).shapes))


def decoder(config: ModelConfig, parameters: Parameters) -> Decoder:
    """The decoder with these parameters; cheap, meant for the inside of a jitted function."""
    return nnx.merge(abstract(config).graphdef, parameters)


def seq2seq(config: Seq2SeqConfig, parameters: Parameters) -> Seq2Seq:
    """The encoder–decoder with these parameters; likewise."""
    return nnx.merge(abstract(config).graphdef, parameters)


def shardings(config: Shape, mesh: Mesh, rules: AxisRules) -> Parameters:
    """NamedSharding of every parameter; raises ValueError where the mesh does not divide one."""
    _, shapes, names = abstract(config)
    return jax.tree.map(lambda leaf, name: sharding(name, leaf.shape, mesh, rules), shapes, names)


def unrolled(config: ModelConfig, parameters: Parameters) -> tuple[ModelConfig, Parameters]:
    """The same decoder with layers apart instead of stacked, which decoding wants: no slicing of weights a step."""
    if not config.scan_layers:
        return config, parameters
    sizes = {"dense_layers": config.num_dense_layers, "layers": config.num_layers - config.num_dense_layers}
    apart = {
        stack: {l: jax.tree.map(lambda w, l=l: w[l], parameters[stack]) for l in range(size)}
        for stack, size in sizes.items()
        if size
    }
    return dataclasses.replace(config, scan_layers=False), {**parameters, **apart}


COUNTED = ("layers", "experts", "gates")  # dims that count matrices
INPUTS = ("embed", "expert_embed", "rank")  # dims of what a token is between products


def summed_dims(names: Names) -> tuple[int, ...] | None:
    """Which dims a product with this parameter sums over; None where it is no matrix (norms, biases, positions).

        (embed, heads, head) -> (0,)    (heads, head, embed) -> (0, 1)    (vocab, embed) -> (1,)
        (rank, heads, head) -> (0,)     (experts, expert_embed, expert_ffn) -> (1,)

    A leading "layers" or "experts" is counted but never summed over.
    """
    dims = [dim for dim, name in enumerate(names) if name not in COUNTED]
    if len(dims) < 2 or None in names or not any(name in INPUTS for name in names):
        return None
    return (dims[0],) if names[dims[0]] in INPUTS else (dims[-1],) if "vocab" in names else tuple(dims[:-1])


def initialize(config: Shape, mesh: Mesh, rules: AxisRules, *, key: jax.Array) -> Parameters:
    """Initial parameters, created where they stay; the same numbers on every mesh."""

    def make(key: jax.Array) -> Parameters:
        with use(mesh, rules):
            return nnx.to_pure_dict(nnx.state(MODULES[type(config)](config, key)))

    # Run once, so compiled in haste: on a CPU the random numbers take a third of the time to compile unoptimised.
    haste = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    return jax.jit(make, out_shardings=shardings(config, mesh, rules), compiler_options=haste)(key)
