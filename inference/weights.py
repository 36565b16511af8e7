"""A model that a user named: first its shape and tokenizer, then, when asked, its weights. Knows no prompts."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
from jax.sharding import Mesh

from data import gguf_tokenizer
from data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from inference.location import Location
from model import gguf, gguf_file, huggingface
from model.config import ModelConfig
from model.parameters import Parameters, abstract, shardings, unrolled
from parallel import checkpoint
from parallel.config import AxisRules
from parallel.records import from_dict

Dtype = Literal["float32", "bfloat16"]


class Model(NamedTuple):
    """A model without its numbers."""

    name: str
    config: ModelConfig  # layers apart: decoding slices no stacked weights
    tokenizer: Tokenizer
    load: Callable[[Mesh, AxisRules], Parameters]


def open_model(location: Location, *, dtype: Dtype = "float32") -> Model:
    """Shape and tokenizer of the model there; ValueError or OSError where files are missing, damaged or do not fit."""
    openers = {"run": open_run, "huggingface": open_huggingface, "hub": open_hub, "gguf": open_gguf}
    model = openers[location.kind](location.path)
    check_vocabulary(model)
    return model._replace(config=dataclasses.replace(model.config, compute_dtype=dtype))


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
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        stacked = from_dict(ModelConfig, fields["model"], "model.")
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}; was the run made by another version?") from error
    newest = checkpoint.newest(folder / "checkpoints", lambda line: print(line, file=sys.stderr))
    if newest is None:
        raise ValueError(f"{folder} has no checkpoint yet; train it first, or further: train.py saves every save_every")
    config = dataclasses.replace(stacked, scan_layers=False, remat="none")

    def load(mesh: Mesh, rules: AxisRules) -> Parameters:
        averaged = any(name.startswith("ema.") for name in newest.shapes)
        wanted = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            abstract(stacked).shapes,
            shardings(stacked, mesh, rules),
        )
        part = "ema" if averaged else "parameters"
        return unrolled(stacked, checkpoint.load(newest, {part: wanted})[part])[1]

    return Model(str(folder), config, load_tokenizer(folder / "tokenizer"), load)


def check_vocabulary(model: Model) -> None:
    """Raise ValueError for a tokenizer that cannot be the weights' own. Weights may have some rows to spare."""
    V, num_tokens = model.config.vocab_size, model.tokenizer.vocab_size
    if num_tokens > V or 2 * num_tokens < V:
        raise ValueError(
            f"{model.name}: the tokenizer has {num_tokens} tokens but the weights have {V} rows for them; "
            "they do not belong together: give the tokenizer that the weights were trained with"
        )
