"""Aligned plain text: rows as columns, bytes and seconds in the unit that shows them. Knows no report."""

import math
from collections.abc import Iterator, Sequence


def aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> Iterator[str]:
    """A table, columns padded; those of numbers to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = enumerate(zip(row, widths, strict=True))
        cells = (f"{cell:>{width}}" if at in right else f"{cell:<{width}}" for at, (cell, width) in padded)
        yield ("  " + "  ".join(cells)).rstrip()


def gib(bytes_: int | float) -> str:
    """3.37 GiB"""
    return f"{bytes_ / 2**30:,.2f} GiB" if bytes_ >= 2**27 else f"{bytes_ / 2**20:,.2f} MiB"


def seconds(value: int | float, like: int | float | None = None) -> str:
    """3.0 ms; of two values that stand together the second one's unit counts: seconds(0.2, like=3) is 0.20 s."""
    scale, unit = unit_of(value if like is None else like)
    return f"{digits(value * scale)} {unit}"


def unit_of(value: int | float) -> tuple[float, str]:
    """What to multiply seconds by, and the unit that they are in then."""
    for least, scale, unit in ((1.0, 1.0, "s"), (1e-3, 1e3, "ms")):
        if value >= least:
            return scale, unit
    return 1e6, "µs"


def digits(value: int | float) -> str:
    """Three digits that count: 1,234 123 12.3 1.23 0.123."""
    places = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(places, 0), 3)}f}"
