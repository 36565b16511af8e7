"""A model that a user named: first its shape and tokenizer, then, when asked, its weights. Knows no prompts."""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from data import gguf_tokenizer
from data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from inference.location import Location, check_decoder
from model import gguf, gguf_file, huggingface, quantized
from model.config import ModelConfig
from model.parameters import Parameters, abstract, shardings, summed_dims, unrolled
from model.seq2seq_config import Seq2SeqConfig
from ops.quantize import Quantized, Scheme, streamed
from ops.slabs import Slabs, slabs
from parallel import checkpoint
from parallel.checkpoint import Checkpoint
from parallel.config import AxisRules
from parallel.records import from_dict
from parallel.sharding import Names, located

Dtype = Literal["float32", "bfloat16"]
MOST_SLABS = 8  # a few cores read as fast as the memory gives; more parts would only be more programs to start


class Model(NamedTuple):
    """A model without its numbers."""

    name: str
    config: ModelConfig  # layers apart: decoding slices no stacked weights
    tokenizer: Tokenizer
    load: Callable[[Mesh, AxisRules], Parameters]
    scheme: Scheme | None = None  # of its matrices, where they are quantized


def open_model(location: Location, *, dtype: Dtype = "float32", scheme: Scheme | None = None) -> Model:
    """Shape and tokenizer of the model there; ValueError or OSError where files are missing, damaged or do not fit.

    With a `scheme` its matrices are quantized when they are loaded.
    """
    check_decoder(location)
    openers = {
        "run": open_run,
        "huggingface": open_huggingface,
        "hub": open_hub,
        "gguf": open_gguf,
        "quantized": open_quantized,
    }
    model = openers[location.kind](location.path)
    check_vocabulary(model)
    model = model._replace(config=dataclasses.replace(model.config, compute_dtype=dtype))
    return model if scheme is None else quantized_on_load(model, scheme)


def quantized_on_load(model: Model, scheme: Scheme) -> Model:
    """The same model in fewer bits; ValueError where it has few already."""
    if model.scheme is not None:
        raise ValueError(
            f"{model.name} has {model.scheme} weights already; leave out --weights {scheme}, "
            "or give the model that it was made from"
        )

    def load(mesh: Mesh, rules: AxisRules) -> Parameters:
        return quantized.quantized(model.config, model.load(mesh, rules), scheme, mesh, rules)

    return model._replace(load=load, scheme=scheme)


def open_gguf(path: pathlib.Path) -> Model:
    """A GGUF file, which holds all three."""
    file = gguf_file.open_file(path)
    config = gguf.config_of(file, scan_layers=False)
    told = gguf_tokenizer.build(file.metadata)
    tokenizer = HuggingFaceTokenizer(
        tokenizer=told.tokenizer,
        bos_id=told.bos_id,
        eos_id=told.eos_id,
        end_ids=told.end_ids,
        chat_template=told.chat_template,
    )
    return Model(str(path), config, tokenizer, lambda mesh, rules: gguf.load_parameters(file, config, mesh, rules))


def open_huggingface(folder: pathlib.Path) -> Model:
    """A folder with config.json, safetensors and tokenizer.json."""
    config = huggingface.read_config(folder, scan_layers=False)

    def load(mesh: Mesh, rules: AxisRules) -> Parameters:
        return huggingface.load(folder, mesh, rules, scan_layers=False)[1]

    return Model(str(folder), config, load_tokenizer(folder), load)


def open_quantized(folder: pathlib.Path) -> Model:
    """A folder of `infer.py quantize`."""
    config, scheme = quantized.read_config(folder)

    def load(mesh: Mesh, rules: AxisRules) -> Parameters:
        return quantized.load(folder, config, scheme, mesh, rules)

    return Model(str(folder), config, load_tokenizer(folder), load, scheme)


def save_quantized(folder: pathlib.Path, model: Model, mesh: Mesh, rules: AxisRules) -> None:
    """Write a quantized model, its tokenizer included, so that `open_quantized` gives it back bit for bit."""
    assert model.scheme is not None
    quantized.check_free(folder)
    model.tokenizer.save(folder)
    quantized.save(folder, model.config, model.load(mesh, rules), model.scheme)


def open_hub(name: pathlib.Path) -> Model:
    """A model by its name on Hugging Face, downloaded or found in its local cache."""
    import huggingface_hub

    files = ["*.json", "*.safetensors", "*.jinja"]
    try:
        folder = huggingface_hub.snapshot_download(str(name), allow_patterns=files)
    except Exception as error:  # no network, no such name, no access: many kinds, one meaning
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"MODEL {name} is no folder here, and Hugging Face did not give it ({reason}); "
            "check the name and the network, or give a folder that holds it"
        ) from None
    return open_huggingface(pathlib.Path(folder))._replace(name=str(name))


def open_run(folder: pathlib.Path) -> Model:
    """A folder of train.py: the newest whole checkpoint, averaged parameters where the run keeps them."""
    stacked = run_shape(folder, ModelConfig)
    newest = run_checkpoint(folder, "checkpoints")
    config = dataclasses.replace(stacked, scan_layers=False, remat="none")

    def load(mesh: Mesh, rules: AxisRules) -> Parameters:
        return unrolled(stacked, run_parameters(stacked, newest, mesh, rules))[1]

    return Model(str(folder), config, load_tokenizer(folder / "tokenizer"), load)


Kind = TypeVar("Kind", ModelConfig, Seq2SeqConfig)


def run_shape(folder: pathlib.Path, kind: type[Kind]) -> Kind:
    """The shape of a run's model."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        return from_dict(kind, fields["model"], "model.")
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}; was the run made by another version?") from error


def run_checkpoint(folder: pathlib.Path, *places: str) -> Checkpoint:
    """The newest whole checkpoint of the first of these folders in a run's that has one; ValueError where none has."""
    damaged = None
    for place in places:
        try:
            found = checkpoint.newest(folder / place, lambda line: print(line, file=sys.stderr))
        except ValueError as error:  # all of them; there may be whole ones in the next folder
            damaged = damaged or error
            continue
        if found is not None:
            return found
    if damaged:
        raise damaged
    raise ValueError(f"{folder} has no checkpoint yet; train it first: train.py saves every train.save_every steps")


def run_parameters(config: ModelConfig | Seq2SeqConfig, found: Checkpoint, mesh: Mesh, rules: AxisRules) -> Parameters:
    """A checkpoint's parameters on a mesh, averaged ones where it has them."""
    part = "ema" if any(name.startswith("ema.") for name in found.shapes) else "parameters"
    wanted = located(abstract(config).shapes, shardings(config, mesh, rules))
    return checkpoint.load(found, {part: wanted})[part]


def averaged_parameters(
    config: ModelConfig | Seq2SeqConfig, folder: pathlib.Path, count: int, mesh: Mesh, rules: AxisRules
) -> Parameters:
    """The mean of a run's last `count` checkpoints' parameters (arXiv:1706.03762, section 6.1).

    ValueError where it has fewer, or one of them is damaged.
    """
    paths = checkpoint.written(folder / "checkpoints")[-count:]
    if len(paths) < count:
        raise ValueError(
            f"--average {count} asks for as many checkpoints but {folder} has {len(paths)}; "
            f"give --average {len(paths)}, or train with train.keep={count}"
        )
    wanted, total = {"parameters": located(abstract(config).shapes, shardings(config, mesh, rules))}, None
    for path in paths:
        fresh = checkpoint.load(checkpoint.verified(path), wanted)["parameters"]
        total = fresh if total is None else jax.tree.map(jax.numpy.add, total, fresh)
    return jax.tree.map(lambda leaf: leaf / count, total)


def check_vocabulary(model: Model) -> None:
    """Raise ValueError for a tokenizer that cannot be the weights' own. Weights may have some rows to spare."""
    V, num_tokens = model.config.vocab_size, model.tokenizer.vocab_size
    if num_tokens > V or 2 * num_tokens < V:
        raise ValueError(
            f"{model.name}: the tokenizer has {num_tokens} tokens but the weights have {V} rows for them; "
            "they do not belong together: give the tokenizer that the weights were trained with"
        )


def serving_parameters(config: ModelConfig, parameters: Parameters, mesh: Mesh) -> tuple[ModelConfig, Parameters]:
    """The decoder as this mesh decodes best: layers apart, matrices in the type they multiply in and, on a CPU, cut.

    Leaf by leaf: where the caller keeps no `parameters`, no more than one leaf is there twice.
    """
    if config.scan_layers:
        parameters = jax.jit(lambda stacked: unrolled(config, stacked)[1])(parameters)
        config = dataclasses.replace(config, scan_layers=False)
    leaves, tree = jax.tree.flatten(parameters, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    names = jax.tree.leaves(abstract(config).names, is_leaf=lambda names: isinstance(names, tuple))
    del parameters
    return config, jax.tree.unflatten(tree, [served_leaf(leaves.pop(0), name, config, mesh) for name in names])


def served_leaf(w: Any, names: Names, config: ModelConfig, mesh: Mesh) -> Any:
    """One leaf as it is served; norms, biases, positions and routers stay as they are, experts whole."""
    if isinstance(w, Quantized):
        return streamed(w) if num_slabs(mesh) > 1 else w
    summed, num_parts = summed_dims(names), 1 if "experts" in names else num_slabs(mesh)
    if summed is None or (num_parts == 1 and w.dtype == config.compute_dtype):
        return w
    return served_matrix(w, summed=summed, num_parts=num_parts, dtype=config.compute_dtype)


@functools.partial(jax.jit, static_argnames=("summed", "num_parts", "dtype"))
def served_matrix(
    w: Float[Array, "..."], *, summed: tuple[int, ...], num_parts: int, dtype: Dtype
) -> Float[Array, "..."] | Slabs:
    """A matrix in the type it multiplies in, in slabs where there are several."""
    w = w.astype(dtype)
    return slabs(w, summed, num_parts) if num_parts > 1 else w


def num_slabs(mesh: Mesh) -> int:
    """Parts of each matrix: one a core where one CPU device does all the work; several devices have their own parts."""
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return 1
    return min(MOST_SLABS, cores())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
