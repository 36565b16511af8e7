"""Sections as one HTML page that needs no network, and their pictures as files beside it. Knows not what they say."""

import base64
import html
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

STYLE = """
:root { --ink: #1d1d1f; --soft: #666; --line: #e2e2e2; --best: #eef5fb; --mark: #d55e00; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .4rem }
p { max-width: 52rem; margin: .4rem 0 } p.lead, figcaption { color: var(--soft) }
figure { margin: 1.2rem 0 } figcaption { font-size: .9rem; max-width: 52rem } img { max-width: 100%; height: auto }
.scroll { overflow-x: auto } table.rows { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .9rem; margin: .8rem 0 }
.rows th, .rows td { padding: .26rem .8rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap }
.rows th { font-weight: 600; color: var(--soft) } .rows tr:nth-child(2) td { background: var(--best) }
"""


class Picture(NamedTuple):
    """An image and what it shows."""

    name: str  # of its file, without .png
    png: bytes
    words: str


class Table(NamedTuple):
    """Rows under a head; the first row is the best."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Section(NamedTuple):
    """A part of a page."""

    heading: str
    words: tuple[str, ...] = ()  # a paragraph each
    table: Table | None = None
    pictures: tuple[Picture, ...] = ()
    beside: tuple[Picture, ...] = ()  # files only, too many for the page
    live: str = ""  # HTML of its own, put in as it is


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    body = "\n".join(part for section in sections for part in _section(section))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f'<body><h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>\n{body}</body></html>\n'
    )


def save(path: pathlib.Path, folder: pathlib.Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the page, and every picture in a folder of its own, which is made where it is missing."""
    folder.mkdir(exist_ok=True)
    for section in sections:
        for picture in (*section.pictures, *section.beside):
            (folder / f"{picture.name}.png").write_bytes(picture.png)
    path.write_text(page(title, lead, sections), encoding="utf-8")


def _section(section: Section) -> Iterator[str]:
    yield f"<h2>{html.escape(section.heading)}</h2>"
    yield from (f"<p>{html.escape(words)}</p>" for words in section.words)
    if section.table is not None:
        yield _table(section.table)
    yield from (_figure(picture) for picture in section.pictures)
    yield section.live


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.head)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table.rows)
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table class="rows"><tr>{head}</tr>{lines}</table></div>'


def _figure(picture: Picture) -> str:
    data, words = base64.b64encode(picture.png).decode(), html.escape(picture.words)
    image = f'<img loading="lazy" alt="{words}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>"
