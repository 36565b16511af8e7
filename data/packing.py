"""Rows of fixed length out of documents: which tokens stand in which row. Knows no files, no epochs and no devices.

A document of n tokens fills n - 1 slots: each slot holds a token and, as its target, the token after it. So no slot
is spent on a last token that predicts nothing, and every token but a document's first is predicted exactly once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer


class Batch(NamedTuple):
    """B rows of T slots on one host, as numpy arrays."""

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]  # the token after each token
    mask: Float32[np.ndarray, "B T"]  # 1 where the target counts for the loss
    segments: Int32[np.ndarray, "B T"]  # 0 is padding; documents count from 1 within a row
    positions: Int32[np.ndarray, "B T"]  # from 0 in each document


class Rows(NamedTuple):
    """A plan: row r holds pieces bounds[r] up to bounds[r + 1]; piece p is lengths[p] slots from token starts[p] on."""

    starts: Int64[np.ndarray, " pieces"]
    lengths: Int64[np.ndarray, " pieces"]
    bounds: Int64[np.ndarray, " borders"]

    @property
    def num_rows(self) -> int:
        """How many rows the plan has."""
        return len(self.bounds) - 1

    def fill(self, length: int) -> float:
        """Share of slots that hold a token."""
        return float(self.lengths.sum() / max(1, self.num_rows * length))


def plan_rows(offsets: Int64[np.ndarray, " borders"], *, length: int) -> Rows:
    """Put whole documents into rows of `length` slots; document d is the tokens offsets[d] up to offsets[d + 1].

    A document longer than a row is cut: full rows first, the rest is packed like a short document. Packing is best-fit
    decreasing (arXiv:2404.10830, section 3): longest first, each into the fullest row that still has room for it.

        offsets = [0, 4, 7, 9], length 4: documents of 3, 2 and 1 slots -> rows of 3 + 1 and 2 slots
    """
    slots = np.maximum(np.diff(offsets) - 1, 0)
    full, rest = np.divmod(slots, length)
    num_full = int(full.sum())
    nth = np.arange(num_full) - np.repeat(np.cumsum(full) - full, full)
    full_starts = np.repeat(offsets[:-1], full) + nth * length
    order = np.argsort(-rest, kind="stable")
    order = order[rest[order] > 0]
    row = _best_fit(rest[order], length)
    order, row = order[np.argsort(row, kind="stable")], np.sort(row, kind="stable")
    pieces = np.bincount(row) if len(row) else np.zeros(0, np.int64)
    return Rows(
        starts=np.concatenate([full_starts, offsets[:-1][order] + full[order] * length]),
        lengths=np.concatenate([np.full(num_full, length, np.int64), rest[order]]),
        bounds=np.concatenate([[0], np.cumsum(np.concatenate([np.ones(num_full, np.int64), pieces]))]),
    )


def _best_fit(needs: Int64[np.ndarray, " pieces"], length: int) -> Int64[np.ndarray, " pieces"]:
    """The row of each piece; pieces come longest first.

    Rows are kept by the room left in them, and bit n of `rooms` says that some row has n slots left, so the fullest
    row with enough room is the lowest bit set at or above the piece's length.
    """
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms, num_rows, row_of = 0, 0, []
    for need in needs.tolist():
        enough = rooms >> need
        if enough:
            room = need + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row, num_rows = length, num_rows, num_rows + 1
        row_of.append(row)
        if room > need:
            by_room[room - need].append(row)
            rooms |= 1 << (room - need)
    return np.array(row_of, np.int64)


def empty_batch(batch_size: int, length: int) -> Batch:
    """Rows of nothing but padding."""
    whole = [np.zeros((batch_size, length), np.int32) for _ in range(4)]
    return Batch(whole[0], whole[1], np.zeros((batch_size, length), np.float32), whole[2], whole[3])


def fill_rows(tokens: Integer[np.ndarray, " tokens"], rows: Rows, picks: Sequence[int], *, length: int) -> Batch:
    """The picked rows of a plan, read from the tokens it was made for."""
    batch = empty_batch(len(picks), length)
    for b, pick in enumerate(picks):
        at = 0
        for segment, piece in enumerate(range(rows.bounds[pick], rows.bounds[pick + 1]), start=1):
            start, size = int(rows.starts[piece]), int(rows.lengths[piece])
            here = np.s_[b, at : at + size]
            batch.tokens[here] = tokens[start : start + size]
            batch.targets[here] = tokens[start + 1 : start + size + 1]
            batch.mask[here] = 1
            batch.segments[here] = segment
            batch.positions[here] = np.arange(size)
            at += size
    return batch


def pack(documents: Sequence[Sequence[int]], *, length: int) -> Batch:
    """Whole documents packed into as few rows as best fit finds.

    >>> pack([[1, 2, 3, 9], [4, 5, 9], [6, 9]], length=4)
    tokens    [[1, 2, 3, 6], [4, 5, 0, 0]]
    targets   [[2, 3, 9, 9], [5, 9, 0, 0]]
    mask      [[1, 1, 1, 1], [1, 1, 0, 0]]
    segments  [[1, 1, 1, 2], [1, 1, 0, 0]]
    positions [[0, 1, 2, 0], [0, 1, 0, 0]]
    """
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    tokens = np.array([token for document in documents for token in document], np.int64)
    rows = plan_rows(offsets, length=length)
    return fill_rows(tokens, rows, range(rows.num_rows), length=length)


def num_cuts(num_tokens: int, *, length: int) -> int:
    """How many rows of one epoch a stream gives, whatever the shift: one shift's worth of tokens is left over."""
    return max(1, (num_tokens - length) // length) if num_tokens > length else 0


def cut(
    tokens: Integer[np.ndarray, " tokens"], starts: Integer[np.ndarray, " B"] | Sequence[int], *, length: int
) -> Batch:
    """Rows of one long stream, from each of `starts` on; documents in it see each other.

    >>> cut(np.arange(10, 20), [0, 3], length=3)
    tokens    [[10, 11, 12], [13, 14, 15]]
    targets   [[11, 12, 13], [14, 15, 16]]
    """
    batch = empty_batch(len(starts), length)
    for b, start in enumerate(starts):
        batch.tokens[b] = tokens[start : start + length]
        batch.targets[b] = tokens[start + 1 : start + length + 1]
    batch.mask[:] = 1
    batch.segments[:] = 1
    batch.positions[:] = np.arange(length)
    return batch


def pad_rows(batch: Batch, *, batch_size: int) -> Batch:
    """The same batch with rows of padding added until there are `batch_size`."""
    missing = batch_size - len(batch.tokens)
    return Batch(*(np.concatenate([array, np.zeros((missing, array.shape[1]), array.dtype)]) for array in batch))
