"""Attention to paged keys and values, plain and in Pallas, equals the reference; and a TPU's compiler takes the kernel.

Pallas is interpreted as on a TPU: memory that nothing was copied to holds NaN, and copies arrive when they are waited
for.
"""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ops import paged_attention, paged_reference, reference
from ops.paged_attention import EVERYTHING
from ops.ragged import Blocks, Ragged, quantized
from parallel.topology import ENVIRONMENT
from tests.tpu import needs_libtpu

P, Z, M, H = 26, 8, 6, 16
GROUPS = ((4, 1), (3, 4))  # a row has at most M · Z = 48 tokens
STARTS = (0, 1, 2, 3, 4, 8, 12)
SCALE = 0.3
F32_BOUND = 1e-5  # 48 terms of order one, each rounded by 2^-23
BF16_BOUND = 2**-6  # weights and values of order one, each rounded by 2^-8, and the result

# (position, length) of each row: what stands before the position is in the cache, what comes from there on is asked
ROWS = {
    "decode only": [(0, 1), (37, 1), (7, 1), (8, 1), (0, 0), (0, 0), (0, 0)],
    "prefill only": [(0, 0), (0, 0), (0, 0), (0, 0), (0, 4), (15, 4), (30, 2)],
    "mixed, with idle rows": [(0, 0), (47, 1), (0, 0), (15, 1), (0, 0), (21, 3), (0, 1)],
    "nothing at all": [(0, 0)] * 7,
}


def filled(rows, *, K=2, G=2, window=EVERYTHING, dtype=jnp.float32, seed=0):
    """Queries, pools and rows. All that no row owns is NaN; blocks before every window are given back."""
    rng = np.random.default_rng(seed)
    k, v = np.full((2, P, K, Z, H), np.nan, np.float32)
    tables, free = np.zeros((len(rows), M), np.int32), list(rng.permutation(np.arange(1, P)))
    for table, (position, length) in zip(tables, rows, strict=True):
        for slot in range(max(0, position - window + 1), position + length if length else 0):
            table[slot // Z] = table[slot // Z] or free.pop()
            k[table[slot // Z], :, slot % Z], v[table[slot // Z], :, slot % Z] = rng.normal(size=(2, K, H))
    q = rng.normal(size=(sum(count * width for count, width in GROUPS), K * G, H))
    positions, lengths = np.asarray(rows, np.int32).T
    ragged = Ragged(*(jnp.asarray(x, jnp.int32) for x in (tables, STARTS, lengths, positions)))
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype), ragged


def slow(q, k, v, rows, *, window=EVERYTHING, softcap=None):
    """Every row's own keys side by side, as the reference takes them; what it does not see is left 0."""
    B, (_, K, _, _), longest = len(STARTS), k.shape, max(width for _, width in GROUPS)
    rows, k, v = jax.tree.map(np.asarray, rows), np.asarray(k, np.float32), np.asarray(v, np.float32)
    keys, values = np.zeros((2, B, M * Z, K, H), np.float32)
    queries = np.minimum(rows.starts[:, None] + np.arange(longest), len(q) - 1)
    for b, (table, length, position) in enumerate(zip(rows.tables, rows.lengths, rows.positions, strict=True)):
        slots = np.arange(max(0, position - window + 1), position + length if length else 0)
        keys[b, slots], values[b, slots] = (pool[table[slots // Z], :, slots % Z] for pool in (k, v))
    distance = rows.positions[:, None, None] + np.arange(longest)[:, None] - np.arange(M * Z)
    mask = (distance >= 0) & (distance < window)
    q = np.asarray(q, np.float32)[queries]
    found = reference.attention(*map(jnp.asarray, (q, keys, values, mask)), scale=SCALE, softcap=softcap)
    out = np.zeros((sum(count * width for count, width in GROUPS), *found.shape[2:]), np.float32)
    for b, (start, length) in enumerate(zip(rows.starts, rows.lengths, strict=True)):
        out[start : start + length] = found[b, :length]
    return out


@functools.partial(jax.jit, static_argnames=("kernel", "softcap", "early"))
def fast(q, k, v, rows, window, *, kernel, softcap=None, early=None):
    """Compiled once for all rows and windows, unless a window is known early."""
    knobs = {"groups": GROUPS, "window": window if early is None else early, "scale": SCALE, "softcap": softcap}
    if kernel == "pallas":
        knobs["interpret"] = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")
        return paged_attention.attend(q, k, v, rows, **knobs)
    return paged_reference.attend(q, k, v, rows, **knobs)


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    """Two blocks each, so that a row has several."""
    monkeypatch.setattr(paged_attention, "SLOTS", 2 * Z)


@pytest.mark.parametrize("kernel", ["plain", "pallas"])
@pytest.mark.parametrize(
    ("name", "window"),
    [
        *[pytest.param(name, EVERYTHING, id=name) for name in ROWS],
        pytest.param("mixed, with idle rows", 1, id="a window of itself"),
        pytest.param("mixed, with idle rows", 11, id="a window"),
        pytest.param("prefill only", 20, id="a window that begins within a block"),
    ],
)
def test_equals_the_reference(kernel, name, window):
    q, k, v, rows = filled(ROWS[name], window=window)
    out = fast(q, Blocks(k, None), Blocks(v, None), rows, jnp.int32(window), kernel=kernel)
    np.testing.assert_allclose(out, slow(q, k, v, rows, window=window), atol=F32_BOUND)


@pytest.mark.parametrize("kernel", ["plain", "pallas"])
@pytest.mark.parametrize(
    ("shape", "window", "softcap"),
    [
        pytest.param({"K": 1, "G": 3}, 11, 2.0, id="one head of keys, window known early, softcap"),
        pytest.param({"K": 3, "G": 1}, None, None, id="one query a key, no window"),
    ],
)
def test_every_shape_and_knob_equals_the_reference(kernel, shape, window, softcap, monkeypatch):
    monkeypatch.setattr(paged_attention, "ROWS_AT_ONCE", 8)  # one head at a time
    monkeypatch.setattr(paged_attention, "MOST_ENTRIES", 2 * M)  # two rows a call
    q, k, v, rows = filled(ROWS["mixed, with idle rows"], window=window or EVERYTHING, **shape)
    knobs = {"kernel": kernel, "softcap": softcap, "early": window}
    out = fast(q, Blocks(k, None), Blocks(v, None), rows, jnp.int32(0) if window else None, **knobs)
    np.testing.assert_allclose(out, slow(q, k, v, rows, window=window or EVERYTHING, softcap=softcap), atol=F32_BOUND)


@pytest.mark.parametrize("kernel", ["plain", "pallas"])
def test_int8_equals_the_reference_of_what_it_stands_for(kernel):
    q, k, v, rows = filled(ROWS["mixed, with idle rows"], window=11)
    (k8, k_scales), (v8, v_scales) = quantized(k), quantized(v)
    pools = Blocks(k8, k_scales), Blocks(v8, v_scales)
    if kernel == "pallas":  # rows of a pool may be longer than H and Z, zeros at their ends
        pools = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 4)]), pools)
    out = fast(q, *pools, rows, jnp.int32(11), kernel=kernel)
    k, v = k8.astype(jnp.float32) * k_scales[..., None], v8.astype(jnp.float32) * v_scales[..., None]
    np.testing.assert_allclose(out, slow(q, k, v, rows, window=11), atol=F32_BOUND)


@pytest.mark.parametrize("kernel", ["plain", "pallas"])
def test_bfloat16_is_near_the_float32_reference(kernel):
    q, k, v, rows = filled(ROWS["mixed, with idle rows"], dtype=jnp.bfloat16)
    out = fast(q, Blocks(k, None), Blocks(v, None), rows, jnp.int32(EVERYTHING), kernel=kernel)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), slow(q, k, v, rows), atol=BF16_BOUND, rtol=BF16_BOUND)


def test_a_quantized_row_is_near_itself_and_zeros_stay_zeros():
    x = jnp.stack([jnp.linspace(-3.0, 2.0, 64), jnp.zeros(64)])
    values, scales = quantized(x)
    assert values.dtype == jnp.int8
    assert int(values[0, 0]) == -127
    np.testing.assert_allclose(np.asarray(values) * np.asarray(scales)[:, None], x, atol=3 / 127 / 2 * 1.001)


def test_blocks_that_no_tile_fits_are_refused():
    q, k, v, rows = filled(ROWS["mixed, with idle rows"])
    k, v = k[:, :, :6], v[:, :, :6]
    with pytest.raises(ValueError, match="blocks of 6 tokens do not fill a TPU's tiles"):
        paged_attention.attend(
            q, Blocks(k, None), Blocks(v, None), rows, groups=GROUPS, window=None, scale=SCALE, softcap=None
        )


COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ops.paged_attention import attend
from ops.ragged import Blocks, Ragged

HEADS, WHOLE, GROUPS = PartitionSpec(None, "tensor"), PartitionSpec(), ((16, 1), (2, 32))

def compile_for(name, dtype, window, *, parts):
    devices = np.array(topologies.get_topology_desc(name, "tpu").devices)[:parts]
    mesh = Mesh(devices, ("tensor",), axis_types=(AxisType.Auto,))
    shape = lambda spec, dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))
    int8 = dtype == jnp.int8
    blocks = Blocks(shape(HEADS, dtype, 64, 4, 32, 128), shape(HEADS, jnp.float32, 64, 4, 32) if int8 else None)
    rows = Ragged(shape(WHOLE, jnp.int32, 18, 8), *[shape(WHOLE, jnp.int32, 18)] * 3)
    q = shape(HEADS, jnp.float32 if dtype == jnp.float32 else jnp.bfloat16, 16 + 64, 16, 128)

    def step(q, k, v, rows):
        return attend(q, k, v, rows, groups=GROUPS, window=window, scale=0.1, softcap=30.0 if int8 else None)

    split = jax.shard_map(step, mesh=mesh, in_specs=(HEADS, HEADS, HEADS, WHOLE), out_specs=HEADS, check_vma=False)
    hlo = jax.jit(split if parts > 1 else step).lower(q, blocks, blocks, rows).compile().as_text()
    print(sum("tpu_custom_call" in line and "paged_attention" in line for line in hlo.splitlines()))

compile_for("v5e:2x2", jnp.bfloat16, None, parts=2)
compile_for("v5p:2x2x1", jnp.int8, 40, parts=2)
compile_for("v6e:2x2", jnp.float32, None, parts=1)
compile_for("tpu7x:2x2x1", jnp.int8, None, parts=1)
"""


@needs_libtpu
def test_every_generation_compiles_it():
    """Floats and int8, on one device and with heads split; a call a group."""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=root,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"] * 4
