"""`python -m evals translation`: its options, and what it does with them. Heavy imports come last."""

import argparse
import json
import pathlib

from evals.verb import Verb
from inference.config import BeamConfig
from inference.location import Location, check_translation, locate


def _add_translation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="RUN", help="the run folder of an encoder–decoder, or several")
    for option, what in (("--source", "lines to translate"), ("--reference", "what they mean, line by line")):
        parser.add_argument(option, required=True, type=pathlib.Path, metavar="FILE", help=f"{what}; UTF-8, or .gz")
    parser.add_argument("--beam", type=int, default=5, metavar="N", help="beams of the search, 1 is greedy; default 5")
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, metavar="X",
        help="a translation's score is its log-probability over its length to this power; default 1",
    )  # fmt: skip
    parser.add_argument("--by-length", action="store_true", help="also BLEU by the number of words of the source")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="write the first run's translations there")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="draw every run's BLEU by length there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _translation(asked: argparse.Namespace) -> int:
    """BLEU and chrF of the translations of one run, or of several beside each other."""
    beam, locations = BeamConfig(beams=asked.beam, length_penalty=asked.length_penalty), list(map(locate, asked.models))
    if asked.beam == 1 and beam != BeamConfig():
        raise ValueError("--length-penalty is for a search; give --beam 2 or more")
    for location in locations:
        check_translation(location)
    for option, path in (("--out", asked.out), ("--plot", asked.plot)):
        if path and not path.parent.is_dir():
            raise ValueError(f"{option} {path} is in {path.parent}, which is no folder; make it first")
    sources, references = _parallel(asked.source, asked.reference)
    from parallel.platforms import look_only_where_chips_are

    look_only_where_chips_are()
    from evals.translation import Bucket, by_length, judged, report
    from parallel.compilation import cache_compilations

    cache_compilations()
    lengths: dict[str, list[Bucket]] = {}
    for place, location in enumerate(locations):
        texts, lower = _translated(location, sources, beam)
        if asked.out and place == 0:
            asked.out.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        judgement = judged(texts, references, lower=lower)
        buckets = by_length(sources, texts, references, lower=lower) if asked.by_length or asked.plot else []
        lengths[location.path.name] = buckets
        if asked.json:
            record = {"run": str(location.path), **judgement._asdict(), "by_length": [one._asdict() for one in buckets]}
            print(json.dumps(record, ensure_ascii=False))
        else:
            print("\n".join([*([str(location.path)] * (len(locations) > 1)), *report(judgement, buckets)]), flush=True)
    if asked.plot:
        from evals.pictures import bleu_by_length

        drawn = {
            name: [(one.low, one.high, one.lines, one.bleu) for one in some if one.bleu is not None]
            for name, some in lengths.items()
        }
        bleu_by_length(asked.plot, drawn)
    return 0


def _translated(location: Location, sources: list[str], beam: BeamConfig) -> tuple[list[str], bool]:
    """A run's translations, and whether it writes small letters alone."""
    import jax

    from inference.translator import open_translator, translated
    from parallel.config import AxisRules, MeshConfig
    from parallel.mesh import make_mesh

    translator, rules = open_translator(location.path), AxisRules()
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    found = translated(translator, translator.load(mesh, rules), mesh, rules, sources, beam=beam)
    return [one.text for one in found], translator.lower


def _parallel(source: pathlib.Path, reference: pathlib.Path) -> tuple[list[str], list[str]]:
    """The lines of both files; ValueError where they do not belong together."""
    from data.pairs import read_lines

    for option, path in (("--source", source), ("--reference", reference)):
        if not path.is_file():
            raise ValueError(f"{option} {path} is no file; give text, a sentence a line")
    sources, references = read_lines(source), read_lines(reference)
    if len(sources) != len(references):
        raise ValueError(
            f"{source} has {len(sources)} lines and {reference} has {len(references)}; line n of one must be the "
            "translation of line n of the other"
        )
    if not sources:
        raise ValueError(f"{source} has 0 lines; give at least 1 to translate")
    return sources, references


TRANSLATION = Verb("BLEU and chrF of a run's translations", _add_translation, _translation)
