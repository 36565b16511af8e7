"""Attention maps of an encoder–decoder that translates a text: to the source, and of either text to itself.

The translation is found first; then the pair is read as in training, all at once. Knows no pictures.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data.pair_batches import encode_sources
from data.tokenizer import Tokenizer
from evals.attention_maps import AttentionMap
from evals.reading import label
from inference.config import BeamConfig
from inference.translation import translate
from inference.translator import Translator
from model.parameters import seq2seq
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from parallel.sharding import use

BEAMS = 5


class TranslationMaps(NamedTuple):
    """A text, its translation, and what each token of them looked at."""

    translation: str
    cross: list[AttentionMap]  # a map for each layer, from the translation to the text
    source: list[AttentionMap]  # of the text to itself; an RNN has none
    target: list[AttentionMap]  # of the translation to itself; an RNN has none


def translation_maps(translator: Translator, text: str) -> TranslationMaps:
    """Translate a text and look; ValueError for a model that has nothing to look with."""
    config, tokenizer = translator.config, translator.tokenizer
    if config.kind == "fixed":
        raise ValueError(
            f"{translator.name} has model.kind=fixed: one vector stands for the source and nothing looks at it; "
            "give a run of kind attention or transformer"
        )
    assert tokenizer.bos_id is not None
    assert tokenizer.eos_id is not None
    mesh, rules = make_mesh(MeshConfig(data=1), jax.devices()[:1]), AxisRules()
    parameters = translator.load(mesh, rules)
    encoded = encode_sources(
        translator.source_tokenizer, [text.strip()], max_length=config.max_length, lower=translator.lower
    )
    (beam,) = translate(
        config, parameters, mesh, rules, encoded,
        beam=BeamConfig(beams=BEAMS), bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, max_tokens=config.max_length,
    )  # fmt: skip
    source, answer = np.array(encoded, np.int32), np.array([beam.tokens], np.int32)
    tokens = np.concatenate([np.full((1, 1), tokenizer.bos_id, np.int32), answer[:, :-1]], axis=1)

    @jax.jit
    def looks(parameters, source, tokens):
        with use(mesh, rules):
            return seq2seq(config, parameters).looks(source, jnp.ones(source.shape, jnp.float32), tokens)

    told = jax.device_get(looks(parameters, source, tokens))
    said, read, wrote = (
        _labels(*pair)
        for pair in ((tokenizer, answer[0]), (translator.source_tokenizer, source[0]), (tokenizer, tokens[0]))
    )
    words = " ".join(tokenizer.decode(beam.tokens).split())
    return TranslationMaps(
        words, _maps(told.cross, said, read), _maps(told.encoder, read, read), _maps(told.decoder, wrote, wrote)
    )


def _labels(tokenizer: Tokenizer, tokens: np.ndarray) -> tuple[str, ...]:
    return tuple(label(tokenizer, int(token)) for token in tokens)


def _maps(weights, queries: tuple[str, ...], keys: tuple[str, ...]) -> list[AttentionMap]:
    """A map for each layer of [1, L, N, T, S]."""
    if weights is None:
        return []
    return [
        AttentionMap(title=f"layer {at}", weights=np.asarray(layer), queries=queries, keys=keys)
        for at, layer in enumerate(weights[0])
    ]
