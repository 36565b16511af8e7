"""Attention maps as the sections of a page: which heads tie two words, all heads, their mean. Knows no model."""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from evals import pictures
from evals.attention_maps import AttentionMap, first_share, mean_of_heads, without_first
from evals.page import Picture, Section, Table
from evals.ties import Tie, ties
from evals.viewer import viewer

DRAWN = 3  # heads of a ranking that are drawn large


class Pair(NamedTuple):
    """A word that looks and a word that is looked at, and the tokens of both."""

    query: str
    key: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]


def sections(maps: Sequence[AttentionMap], pair: Pair | None = None, *, top: int = 10) -> list[Section]:
    """Everything about maps of one text or of several; a pair of words is asked of maps of one."""
    found = [] if pair is None else ties(maps, pair.queries, pair.keys)[:top]
    best = found[0] if found else None
    query = pair.queries[-1] if pair else len(maps[0].queries) - 1
    live = viewer(maps, map=best.layer if best else 0, head=best.head if best else 0, query=query)
    marked = [(tie.layer, tie.head) for tie in found[:DRAWN]]
    return [
        *([tied(maps, pair, found)] if pair else []),
        Section("One head at a time", ("Choose a map and a head; point at a row to read it in the text.",), live=live),
        Section("All heads", (_how_drawn(maps),), pictures=(_overview(maps, marked),), beside=tuple(_labelled(maps))),
        *means(maps),
    ]


def of_itself(maps: Sequence[AttentionMap], heading: str) -> list[Section]:
    """A text's look at itself, beside the maps of another: an overview."""
    words = ("Queries down, keys across: the same tokens.",)
    name = heading.lower().replace(" ", "_").replace("'", "")
    return [Section(heading, words, pictures=(_overview(maps, ())._replace(name=name),))]


def tied(maps: Sequence[AttentionMap], pair: Pair, found: Sequence[Tie]) -> Section:
    """The ranking of heads, and the first of them drawn large."""
    words = [
        f"Weight that goes from “{pair.query}” to “{pair.key}”: summed over the tokens of “{pair.key}”, averaged over "
        f"those of “{pair.query}”. All {sum(len(map.weights) for map in maps)} heads are ranked; the best are shown."
    ]
    if maps[0].is_of_itself:
        words.append(
            "Heads with nothing to look for rest on the first token; “without it” is the share of what is left."
        )
        words.append(
            "A decoder reads from left to right: what stands after a word cannot change what that word looks at. And "
            "where a head looks is not yet what the model makes of it (arXiv:1902.10186)."
        )
    pictures_ = tuple(_one(maps, pair, tie, place) for place, tie in enumerate(found[:DRAWN], 1))
    heading = f"Which heads tie “{pair.query}” to “{pair.key}”"
    return Section(heading, tuple(words), Table(HEAD, tuple(cells(maps, tie) for tie in found)), pictures_)


HEAD = ("map", "head", "weight", "without the first", "on the first", "looks most at", "with")


def cells(maps: Sequence[AttentionMap], tie: Tie) -> tuple[str, ...]:
    """A row of the ranking under HEAD."""
    shares = [f"{share:.1%}" for share in (tie.weight, tie.without_first, tie.first)]
    return (maps[tie.layer].title, str(tie.head), *shares, tie.most, f"{tie.most_weight:.1%}")


def ranking(maps: Sequence[AttentionMap], found: Sequence[Tie]) -> list[str]:
    """The same as lines of text."""
    rows = [HEAD, *(cells(maps, tie) for tie in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def means(maps: Sequence[AttentionMap]) -> Iterator[Section]:
    """The mean over all heads, with the first token and without it; nothing where maps are of several texts.

    Where queries are other words than keys, it is drawn as an alignment.
    """
    first, *others = maps
    if any((other.queries, other.keys) != (first.queries, first.keys) for other in others):
        return
    heads = sum(len(map.weights) for map in maps)
    mean = mean_of_heads(maps, f"mean of {heads} heads" if heads > 1 else first.title)
    draw = pictures.heat_map if first.is_of_itself else pictures.alignment
    drawn = [
        Picture("mean", pictures.png(draw(mean, 0)), f"The mean of all {heads} heads." if heads > 1 else mean.title)
    ]
    words: tuple[str, ...] = ()
    if first.is_of_itself and len(first.keys) > 2:
        shares = np.concatenate([first_share(map) for map in maps])
        words = (
            f"{np.mean(shares):.0%} of all weight goes to the first token “{first.keys[0]}”, which says little about "
            f"it: {np.sum(shares > 0.5)} of {heads} heads rest there with more than half of theirs "
            "(attention sinks, arXiv:2309.17453). The second picture leaves it out.",
        )
        rest = mean_of_heads([without_first(mean)], f"mean of {heads} heads without the first token")
        drawn.append(
            Picture("mean_without_first", pictures.png(pictures.heat_map(rest, 0)), "The same without the first token.")
        )
    yield Section("The mean over heads" if heads > 1 else "The only head", words, pictures=tuple(drawn))


def _one(maps: Sequence[AttentionMap], pair: Pair, tie: Tie, place: int) -> Picture:
    figure = pictures.heat_map(maps[tie.layer], tie.head, queries=pair.queries, keys=pair.keys)
    words = f"{place}. {maps[tie.layer].title}, head {tie.head}: {tie.weight:.1%} from “{pair.query}” to “{pair.key}”."
    return Picture(f"tie_{place}", pictures.png(figure), words)


def _how_drawn(maps: Sequence[AttentionMap]) -> str:
    seen = "what stands before it and itself" if maps[0].is_of_itself else "the tokens across"
    return (
        f"A small map for each head: queries down, keys across, so each row says how one token shares its look over "
        f"{seen}. Shades go by the square root of the weight, so that 5 % can be seen. Layers and heads count from 0. "
        "The folder of pictures has a file for each row, with its words."
    )


def _overview(maps: Sequence[AttentionMap], marked: Collection[tuple[int, int]]) -> Picture:
    words = "All heads, a row for each map." + (" Framed: the best of the ranking, in its order." if marked else "")
    return Picture("overview", pictures.png(pictures.overview(maps, list(marked))), words)


def _labelled(maps: Sequence[AttentionMap]) -> Iterator[Picture]:
    width = len(str(len(maps) - 1))
    for at, map in enumerate(maps):
        yield Picture(f"map_{at:0{width}}", pictures.png(pictures.layer(map)), f"{map.title}, with its words")
