"""`python -m evals attention`: its options, and what it does with them. Heavy imports come last."""

import argparse
import pathlib
import sys

from evals.verb import Verb
from inference.location import KINDS, Location, locate

LONGEST = 64  # tokens of a text whose maps can be read


def _add_attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=KINDS)
    parser.add_argument("text", metavar="TEXT", help=f"at most {LONGEST} tokens; a translation run translates it")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="PAGE.html", help="the page to write")
    parser.add_argument(
        "--png", type=pathlib.Path, metavar="DIR", help="folder of the pictures; default PAGE_pictures beside the page"
    )
    parser.add_argument(
        "--from", dest="query", metavar="WORD", help="rank heads by what this word gives; the#2 is the second “the”"
    )
    parser.add_argument("--to", dest="key", metavar="WORD", help="to this one, which stands before it")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="heads of the ranking to show; default 10")


def _attention(asked: argparse.Namespace) -> int:
    """The maps of a model that reads a text."""
    location = locate(asked.model)
    folder = asked.png or asked.out.with_name(f"{asked.out.stem}_pictures")
    _check_writable(asked.out, folder)
    if (asked.query is None) != (asked.key is None):
        raise ValueError("--from and --to belong together: the word that looks, and the word that it looks at")
    if asked.top < 1:
        raise ValueError(f"--top {asked.top} must be at least 1; it counts heads")
    from parallel.compilation import cache_compilations
    from parallel.platforms import look_only_where_chips_are

    look_only_where_chips_are()
    if location.kind == "translation":
        return _alignment(asked, location, folder)
    from evals.reading import read
    from inference.weights import open_model

    model = open_model(location)
    reading = read(model.tokenizer, asked.text)
    if len(reading.tokens) > LONGEST:
        raise ValueError(
            f"the text is {len(reading.tokens)} tokens long but maps of more than {LONGEST} cannot be read; shorten it"
        )
    pair = _pair(reading, asked.query, asked.key) if asked.query is not None else None
    cache_compilations()
    from evals import attention_page, page
    from evals.attention_maps import decoder_maps
    from evals.ties import ties

    maps = decoder_maps(model, asked.text)
    if pair is not None:
        best = ties(maps, pair.queries, pair.keys)[: asked.top]
        print("\n".join(attention_page.ranking(maps, best)), flush=True)
    lead = f"What {pathlib.Path(model.name).name} looks at, {len(maps)} layers of {len(maps[0].weights)} heads each."
    page.save(asked.out, folder, asked.text, lead, attention_page.sections(maps, pair, top=asked.top))
    print(f"written to {asked.out}, pictures to {folder}", file=sys.stderr)
    return 0


def _alignment(asked: argparse.Namespace, location: Location, folder: pathlib.Path) -> int:
    """The maps of an encoder–decoder that translates a text; the translation to stdout."""
    if asked.query is not None:
        raise ValueError("--from and --to are for decoder-only models; a translation's page has every head's map")
    from evals import attention_page, page
    from evals.translation_maps import translation_maps
    from inference.translator import open_translator
    from parallel.compilation import cache_compilations

    cache_compilations()
    told = translation_maps(open_translator(location.path), asked.text)
    print(told.translation, flush=True)
    sections = attention_page.sections(told.cross)
    for maps, heading in ((told.source, "The source's look at itself"), (told.target, "The translation's")):
        sections += attention_page.of_itself(maps, heading) if maps else []
    lead = f"What {location.path.name} looks at in “{asked.text}” while it writes “{told.translation}”."
    page.save(asked.out, folder, told.translation, lead, sections)
    print(f"written to {asked.out}, pictures to {folder}", file=sys.stderr)
    return 0


def _pair(reading, query: str, key: str):
    """The tokens of both words; ValueError where the first cannot see the second."""
    from evals.attention_page import Pair
    from evals.reading import tokens_of

    queries, keys = tokens_of(reading, query, "--from"), tokens_of(reading, key, "--to")
    if max(queries) < min(keys):
        raise ValueError(
            f"--from {query} is token {queries[0]} and --to {key} is token {keys[0]}; a decoder looks back only: "
            f"exchange them"
        )
    return Pair(query, key, queries, keys)


def _check_writable(page: pathlib.Path, folder: pathlib.Path) -> None:
    """Raise ValueError where a file or folder cannot be made."""
    for option, path in (("--out", page), ("--png", folder)):
        if not path.parent.is_dir():
            raise ValueError(f"{option} {path} is in {path.parent}, which is no folder; make it first")
    if page.is_dir():
        raise ValueError(f"--out {page} is a folder; give the page a name in it, such as {page / 'page.html'}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--png {folder} is a file; give another folder")


ATTENTION = Verb("every head's attention map of a text", _add_attention, _attention)
