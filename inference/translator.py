"""A translation run that a user named, and its texts: lines of one language in, lines of the other out."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from data.pair_batches import encode_sources
from data.tokenizer import Tokenizer, load_tokenizer
from inference.beam import Beam
from inference.config import BeamConfig
from inference.translation import translate
from inference.weights import Dtype, averaged_parameters, run_checkpoint, run_parameters, run_shape
from model.parameters import Parameters
from model.seq2seq_config import Seq2SeqConfig
from parallel.config import AxisRules

SMALLEST_TABLE = 64  # rows of a table: a vocabulary is rounded up to a multiple of them


class Translator(NamedTuple):
    """An encoder–decoder without its numbers."""

    name: str
    config: Seq2SeqConfig
    source_tokenizer: Tokenizer
    tokenizer: Tokenizer  # the target's; the same object where both languages share one
    lower: bool  # whether it learned from lower-cased text
    load: Callable[[Mesh, AxisRules], Parameters]


class Translation(NamedTuple):
    """A line in the other language."""

    text: str
    beam: Beam | None  # its tokens; None of an empty line


def open_translator(folder: pathlib.Path, *, dtype: Dtype = "float32", average: int = 0) -> Translator:
    """A run's shape and tokenizers; ValueError or OSError where files are missing, damaged or do not fit.

    Its parameters are the best that it kept, where it kept some, else the newest; or the mean of the last `average`.
    """
    config, found = run_shape(folder, Seq2SeqConfig), run_checkpoint(folder, "best", "checkpoints")

    def load(mesh: Mesh, rules: AxisRules) -> Parameters:
        if average:
            return averaged_parameters(config, folder, average, mesh, rules)
        return run_parameters(config, found, mesh, rules)

    tokenizer, source = load_tokenizer(folder / "tokenizer"), folder / "source_tokenizer"
    translator = Translator(
        name=str(folder),
        config=dataclasses.replace(config, compute_dtype=dtype),
        source_tokenizer=load_tokenizer(source) if source.is_dir() else tokenizer,
        tokenizer=tokenizer,
        lower=learned_lower(folder),
        load=load,
    )
    check_vocabularies(translator)
    return translator


def learned_lower(folder: pathlib.Path) -> bool:
    """Whether a run's texts were lower-cased."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return bool(fields.get("data", {}).get("lower", False))


def check_vocabularies(translator: Translator) -> None:
    """ValueError where a tokenizer cannot be the weights' own; weights may have some rows to spare."""
    config = translator.config
    own_rows = config.vocab_size if config.shared else config.source_vocab_size
    both = [("source", translator.source_tokenizer, own_rows), ("target", translator.tokenizer, config.vocab_size)]
    for side, tokenizer, V in both:
        num_tokens = tokenizer.vocab_size
        if not num_tokens <= V <= max(2 * num_tokens, SMALLEST_TABLE):
            raise ValueError(
                f"{translator.name}: the {side} tokenizer has {num_tokens} tokens but the run's weights have {V} rows "
                "for them; this language pair is not the run's: give the tokenizers that it was trained with"
            )
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise ValueError(
                f"{translator.name}: the {side} tokenizer has no token that begins or ends a text; a translation needs "
                "both: give the tokenizers that the run was trained with"
            )


def translated(
    translator: Translator,
    parameters: Parameters,
    mesh: Mesh,
    rules: AxisRules,
    texts: Sequence[str],
    *,
    beam: BeamConfig,
    cut: bool = False,
) -> list[Translation]:
    """Each line's translation, in their order; that of an empty line is empty.

    ValueError tells the line that is longer than the model takes; with `cut` its end is left out instead.
    """
    config, tokenizer, source = translator.config, translator.tokenizer, translator.source_tokenizer
    assert tokenizer.bos_id is not None
    assert tokenizer.eos_id is not None
    assert source.eos_id is not None
    lines, room = [text.strip() for text in texts], config.max_length
    allowed = sys.maxsize if cut else room
    encoded = encode_sources(source, lines, max_length=allowed, lower=translator.lower)
    sources = [ids if len(ids) <= room else [*ids[: room - 1], source.eos_id] for ids in encoded]
    full = [place for place, line in enumerate(lines) if line]
    beams = translate(
        config, parameters, mesh, rules, [sources[place] for place in full],
        beam=beam, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, max_tokens=room,
    )  # fmt: skip
    found = dict(zip(full, beams, strict=True))
    return [said(found.get(place), tokenizer) for place in range(len(lines))]


def said(beam: Beam | None, tokenizer: Tokenizer) -> Translation:
    """Its words, on one line."""
    if beam is None:
        return Translation("", None)
    tokens = beam.tokens[:-1] if beam.finish == "stop" else beam.tokens
    return Translation(" ".join(tokenizer.decode(tokens).split()), beam)
