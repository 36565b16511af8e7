"""Blocks meet where a query may see a key, once each, and every block is met."""

import jax.numpy as jnp
import numpy as np
import pytest

from ops import reference
from ops.attention import Places
from ops.visits import ALL, FIRST, KEY, LAST, MOST_BLOCKS, QUERY, SEEN, plan

BLOCK = 4


def places(positions, segments=None):
    positions = jnp.asarray(positions, jnp.int32)[None]
    return Places(positions, jnp.ones_like(positions) if segments is None else jnp.asarray(segments, jnp.int32)[None])


def drawn(q_at, k_at, window=None):
    """Rows of query blocks, columns of key blocks: `.` no visit, 0 nothing seen, 1 some, 2 all."""
    visits = plan(q_at, k_at, window, queries=BLOCK, keys=BLOCK)
    codes = np.asarray(visits.visits)[: int(visits.counts[0])]
    picture = np.full((q_at.positions.shape[1] // BLOCK, k_at.positions.shape[1] // BLOCK), ".")
    for code in codes:
        picture[code >> QUERY, (code >> KEY) % MOST_BLOCKS] = str(code & SEEN)
    assert sorted(codes) == list(codes)
    assert (picture != ".").sum() == len(codes)
    return ["".join(row) for row in picture]


ROW = np.arange(16)


@pytest.mark.parametrize(
    ("q_at", "k_at", "window", "expected"),
    [
        pytest.param(places(ROW), places(ROW), None, ["1...", "21..", "221.", "2221"], id="causal"),
        pytest.param(places(ROW), places(ROW), 5, ["1...", "11..", ".11.", "..11"], id="window"),
        pytest.param(places(ROW), places(ROW), 8, ["1...", "21..", "121.", ".121"], id="wider window"),
        pytest.param(places(ROW + 16), places(ROW), None, ["2222"] * 4, id="keys of an earlier chunk"),
        pytest.param(places(ROW), places(ROW + 16), None, ["0000", "0...", "0...", "0..."], id="keys of a later chunk"),
        pytest.param(
            *[places([*range(8), *range(6), 0, 1], [1] * 8 + [2] * 6 + [0] * 2)] * 2,
            None,
            ["1...", "21..", "..1.", "..11"],
            id="documents and padding",
        ),
        pytest.param(  # the second document begins in the second block and its later keys are hidden from it
            *[places([*range(6), *range(10)], [1] * 6 + [2] * 10)] * 2,
            None,
            ["1...", "11..", ".11.", ".121"],
            id="a document across blocks",
        ),
    ],
)
def test_blocks_that_meet(q_at, k_at, window, expected):
    assert drawn(q_at, k_at, window) == expected


@pytest.mark.parametrize("seed", range(20))
def test_random_places_miss_nothing(seed):
    rng = np.random.default_rng(seed)
    q_at, k_at = (places(rng.permutation(16), np.sort(rng.integers(0, rng.integers(1, 4), 16))) for _ in "qk")
    window = [None, 1, 6][seed % 3]
    mask = np.asarray(reference.visible(q_at.positions, k_at.positions, q_at.segments, k_at.segments, window=window)[0])
    blocks = mask.reshape(4, BLOCK, 4, BLOCK).swapaxes(1, 2).reshape(4, 4, -1)
    picture = np.array([list(row) for row in drawn(q_at, k_at, window)])
    assert np.all(np.isin(picture[blocks.any(-1)], ["1", "2"]))
    assert np.all(blocks[picture == str(ALL)])
    assert np.all((picture != ".").any(0))
    assert np.all((picture != ".").any(1))


def test_a_key_block_is_written_at_its_last_visit():
    visits = plan(places(ROW), places(ROW), 5, queries=BLOCK, keys=BLOCK)
    count = int(visits.counts[0])
    codes = np.asarray(visits.visits)[:count]
    rows = {"key": (codes >> KEY) % MOST_BLOCKS, "first": codes & FIRST > 0, "last": codes & LAST > 0}
    assert rows["key"].tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert rows["first"].tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert rows["last"].tolist() == [0, 1, 0, 1, 0, 1, 1]
    assert np.asarray(visits.leaving)[:count].tolist() == [0, 0, 1, 1, 2, 2, 3]
