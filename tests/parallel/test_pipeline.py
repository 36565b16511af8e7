"""Any schedule over any pipe equals the layers one after the other, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from parallel import pipeline
from parallel.pipeline import bubble, circular, layer_order, one_forward_one_backward

LAYERS, B, T, D, V = 8, 4, 8, 6, 5
DATA = 2
CLOSE = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


# ---- A model of eight layers, a head and a loss ----


def layer(x, w, side):
    """Tokens differ by their side, and the batch is coupled over the data axis where there is one."""
    return x + jnp.tanh(x @ w + side["shift"][..., None])


def coupled_layer(x, w, side):
    return layer(x, w, side) + 0.1 * lax.psum(jnp.tanh(x @ w), "data")


def unsafe_layer(x, w, side):
    """Divides by the norm: NaN for zeros."""
    return x + jnp.tanh((x / jnp.linalg.norm(x, axis=-1, keepdims=True)) @ w + side["shift"][..., None])


def make_stage(layer):
    def stage(chunk, x, side):
        run = lambda x, w: (layer(x, w, side), jnp.sum(jnp.square(x)))  # noqa: E731
        x, squares = lax.scan(run, x, chunk)
        return x, {"squares": jnp.sum(squares), "layers": jnp.full(2, len(chunk))}

    return stage


def finish(head, y, side):
    logits = (y @ head).astype(jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), side["targets"][..., None], axis=-1)
    return -jnp.sum(chosen), {"tokens": jnp.float32(chosen.size)}


def keep(run):
    """No remat."""
    return run


def penalty(aux):
    return 1e-3 * aux["squares"].astype(jnp.float32)


def example(M, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    weights = jax.random.normal(keys[0], (LAYERS, D, D), dtype) * D**-0.5
    inputs = jax.random.normal(keys[1], (M, B, T, D), dtype)
    head = jax.random.normal(keys[2], (D, V), dtype)
    shift = jax.random.normal(keys[3], (M, B, T), dtype)
    targets = jax.random.randint(keys[4], (M, B, T), 0, V)
    return weights, head, inputs, {"shift": shift, "targets": targets}


def sequential(weights, head, inputs, sides, layer=layer):
    """The slow twin: every microbatch through every layer -> (loss, outputs)."""
    total, outputs = jnp.float32(0), []
    for x, shift, targets in zip(inputs, sides["shift"], sides["targets"], strict=True):
        side = {"shift": shift, "targets": targets}
        x, aux = make_stage(layer)(weights, x, side)
        loss, _ = finish(head, x, side)
        total += loss + penalty(aux)
        outputs.append(x)
    return total, jnp.stack(outputs)


def expected(weights, head, inputs, sides, layer=layer):
    """-> (loss, outputs), (weight grads, head grads, input grads)."""
    run = functools.partial(sequential, layer=layer)
    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(weights, head, inputs, sides)


# ---- The same on a mesh of pipe x data ----


def on_mesh(ranks, local, out_specs):
    """`local` per device: layers split over pipe, batch over data. Axes that a result is not split over are summed."""
    mesh = Mesh(np.asarray(jax.devices()[: ranks * DATA]).reshape(ranks, DATA), ("pipe", "data"))
    batch = P(None, "data")
    specs = (P("pipe"), P(), batch, {"shift": batch, "targets": batch})
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False))


def with_circular(ranks, repeats, layer=layer, remat=jax.checkpoint):
    def objective(weights, head, inputs, sides):
        chunks = weights.reshape(repeats, -1, D, D)
        outputs, aux = circular(make_stage(layer), chunks, inputs, sides, axis="pipe", repeats=repeats, remat=remat)
        # the head on the last rank only, as other ranks hold zeros
        loss = jnp.sum(jax.vmap(finish, in_axes=(None, 0, 0))(head, outputs, sides)[0])
        loss = jnp.where(lax.axis_index("pipe") == ranks - 1, loss, 0)
        return loss + penalty(aux), (outputs, aux)

    def local(weights, head, inputs, sides):
        both = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)
        (loss, (outputs, aux)), (d_weights, d_head, d_inputs) = both(weights, head, inputs, sides)
        return (
            (lax.psum(loss, ("pipe", "data")), lax.psum(outputs, "pipe")),
            (lax.psum(d_weights, "data"), lax.psum(d_head, ("pipe", "data")), lax.psum(d_inputs, "pipe")),
            aux["layers"][None],
        )

    batch = P(None, "data")
    return on_mesh(ranks, local, ((P(), batch), (P("pipe"), P(), batch), P(("pipe", "data"))))


def with_1f1b(ranks, layer=layer, split_dim=1):
    def local(weights, head, inputs, sides):
        result = one_forward_one_backward(
            make_stage(layer), finish, weights, head, inputs, sides, axis="pipe", split_dim=split_dim, penalty=penalty
        )
        return (
            lax.psum(result.loss, ("pipe", "data")),
            (
                lax.psum(result.chunk_grads, "data"),
                lax.psum(result.finish_grads, ("pipe", "data")),
                lax.psum(result.input_grads, "pipe"),
            ),
            (result.stage_aux["layers"][None], lax.psum(result.finish_aux["tokens"], ("pipe", "data"))),
        )

    batch = P(None, "data")
    return on_mesh(ranks, local, (P(), (P("pipe"), P(), batch), (P(("pipe", "data")), P())))


def ordered(weights, ranks, repeats=1):
    return weights[jnp.asarray(layer_order(LAYERS, ranks, repeats))]


def assert_trees(found, wanted):
    jax.tree.map(CLOSE, found, wanted)


@pytest.mark.parametrize(
    ("ranks", "repeats", "M"),
    [(1, 1, 3), (1, 2, 3), (2, 1, 1), (2, 1, 5), (2, 2, 4), (4, 1, 6), (4, 2, 4), (4, 2, 8)],
)
def test_circular_equals_the_layers_in_order(ranks, repeats, M):
    weights, head, inputs, sides = example(M)
    values, (d_weights, d_head, d_inputs) = expected(weights, head, inputs, sides)
    found, grads, layers = with_circular(ranks, repeats)(ordered(weights, ranks, repeats), head, inputs, sides)
    assert_trees(found, values)
    assert_trees(grads, (ordered(d_weights, ranks, repeats), d_head, d_inputs))
    # every rank has counted its own layers, once a microbatch
    np.testing.assert_array_equal(layers, np.full((ranks * DATA, 2), M * LAYERS // ranks))


@pytest.mark.parametrize(("ranks", "M", "split_dim"), [(1, 3, 1), (2, 1, 1), (2, 5, 0), (4, 2, 1), (4, 9, 1)])
def test_one_forward_one_backward_equals_the_layers_in_order(ranks, M, split_dim):
    weights, head, inputs, sides = example(M)
    (loss, _), (d_weights, d_head, d_inputs) = expected(weights, head, inputs, sides)
    found, grads, (layers, tokens) = with_1f1b(ranks, split_dim=split_dim)(weights, head, inputs, sides)
    CLOSE(found, loss)
    assert_trees(grads, (d_weights, d_head, d_inputs))
    np.testing.assert_array_equal(layers, np.full((ranks * DATA, 2), M * LAYERS // ranks))
    assert tokens == M * B * T


def test_both_schedules_agree_where_a_stage_has_collectives_of_its_own():
    weights, head, inputs, sides = example(4)
    values, grads, _ = with_circular(2, 1, coupled_layer)(weights, head, inputs, sides)
    loss, others, _ = with_1f1b(2, coupled_layer)(weights, head, inputs, sides)
    CLOSE(loss, values[0])
    assert_trees(others, grads)


def test_the_bubble_harms_nothing():
    """A stage that makes NaN of the zeros on which the bubble computes, with and without remat."""
    arguments = weights, head, inputs, sides = example(4)
    assert jnp.all(jnp.isnan(unsafe_layer(jnp.zeros_like(inputs[0]), weights[0], {"shift": sides["shift"][0]})))
    values, (d_weights, d_head, d_inputs) = expected(*arguments, unsafe_layer)
    for repeats, remat in [(1, jax.checkpoint), (1, keep), (2, keep)]:
        run = with_circular(2, repeats, unsafe_layer, remat)
        found, grads, _ = run(ordered(weights, 2, repeats), head, inputs, sides)
        assert_trees(found, values)
        assert_trees(grads, (ordered(d_weights, 2, repeats), d_head, d_inputs))
    loss, grads, _ = with_1f1b(2, unsafe_layer)(*arguments)
    CLOSE(loss, values[0])
    assert_trees(grads, (d_weights, d_head, d_inputs))


def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
    """40 times the same microbatch give 40 times its gradient, to float32's accuracy."""
    weights, head, *one = example(1, jnp.bfloat16)
    many = jax.tree.map(lambda x: jnp.repeat(x, 40, axis=0), one)
    _, (*single, _), _ = with_1f1b(2)(weights, head, *one)
    _, (*summed, d_inputs), _ = with_1f1b(2)(weights, head, *many)
    assert [grad.dtype for grad in summed] == [jnp.float32] * 2
    assert d_inputs.dtype == jnp.bfloat16
    jax.tree.map(lambda s, m: np.testing.assert_allclose(m, 40 * s, rtol=1e-5, atol=1e-5), single, summed)


def test_activations_and_parameters_may_be_trees():
    """Two streams of activations; whole numbers among the parameters say what a layer is, and have no gradient."""
    weights, head, inputs, sides = example(4)

    def stage(chunk, x, side):
        def layer(x, chunk):
            first = x["first"] + jnp.where(chunk["kind"] == 1, 0.5, 1) * jnp.tanh(x["first"] @ chunk["w"])
            return {"first": first, "second": x["second"] + first}, ()

        return lax.scan(layer, x, chunk)

    def last(head, y, side):
        return finish(head, y["first"] + y["second"], side)

    def local(weights, head, inputs, sides):
        chunk = {"w": weights, "kind": jnp.arange(4) % 2}
        streams = {"first": inputs, "second": inputs}

        def objective(w, head):
            chunks = jax.tree.map(lambda leaf: leaf[None], chunk | {"w": w})
            y, _ = circular(stage, chunks, streams, sides, axis="pipe", repeats=1)
            loss = jnp.sum(jax.vmap(last, in_axes=(None, 0, 0))(head, y, sides)[0])
            return jnp.where(lax.axis_index("pipe") == 1, loss, 0)

        loss, (d_w, d_head) = jax.value_and_grad(objective, argnums=(0, 1))(weights, head)
        result = one_forward_one_backward(stage, last, chunk, head, streams, sides, axis="pipe", split_dim=1)
        by_1f1b = (result.loss, result.chunk_grads["w"], result.finish_grads)
        return *map(summed, ((loss, d_w, d_head), by_1f1b)), result.chunk_grads["kind"]

    def summed(results):
        loss, d_w, d_head = results
        return lax.psum(loss, ("pipe", "data")), lax.psum(d_w, "data"), lax.psum(d_head, ("pipe", "data"))

    specs = (P(), P("pipe"), P())
    one, other, none = on_mesh(2, local, (specs, specs, P("pipe")))(weights, head, inputs, sides)
    assert_trees(one, other)
    np.testing.assert_array_equal(none, np.zeros(8))


# ---- What is kept ----


def all_shapes(jaxpr):
    """Shapes of every array in a program and in the programs inside it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in [*equation.invars, *equation.outvars])
        for inner in jaxprs_in_params(equation.params):
            yield from all_shapes(inner)


def shapes_of(run, M):
    return set(all_shapes(jax.make_jaxpr(run)(*example(M)).jaxpr))


ACTIVATION = (B // DATA, T, D)


def test_circular_keeps_what_remat_says_of_every_tick():
    """M = 11, P = 2: 12 ticks, a rank has 4 layers."""
    every_layer, weights, once = (12, 4, *ACTIVATION), (12, 4, D, D), (12, *ACTIVATION)
    kept, everything = shapes_of(with_circular(2, 1), 11), shapes_of(with_circular(2, 1, remat=keep), 11)
    assert once in kept
    assert every_layer not in kept
    assert every_layer in everything
    assert weights not in kept | everything  # never a copy of the parameters


def test_one_forward_one_backward_keeps_two_inputs_a_rank():
    """M = 11, P = 2: 14 ticks. The only activations of all microbatches are the inputs, which become gradients."""
    shapes = shapes_of(with_1f1b(2), 11)
    assert (2 * 2, *ACTIVATION) in shapes
    assert {shape for shape in shapes if shape[:1] == (14,)} <= {(14,), (14, 2)}  # the loss and aux
    assert {shape for shape in shapes if shape[:1] == (11,) and shape[-1:] == (D,)} == {
        (11, B, T, D),
        (11, *ACTIVATION),
    }


def test_only_circular_grows_with_microbatches():
    """Temporaries by XLA, in activations per microbatch: 1F1B's one is the gradient of the input itself."""
    activation = 4 * np.prod(ACTIVATION)

    def growth(run):
        few, many = (run.lower(*example(M)).compile().memory_analysis().temp_size_in_bytes for M in (4, 16))
        return (many - few) / 12 / activation

    assert growth(with_1f1b(2)) < 1.2
    assert growth(with_circular(2, 1)) > 3


# ---- The schedules themselves ----


def table(rows):
    return "\n".join("    " + "".join(row).rstrip() for row in rows)


def circular_timeline(microbatches, ranks, repeats):
    ticks = pipeline.circular_ticks(microbatches, ranks, repeats)

    def cell(tick, rank):
        turn = pipeline.circular_turn(tick, rank, microbatches=microbatches, ranks=ranks, repeats=repeats)
        return f"{turn.microbatch}{'ab'[int(turn.repeat)]}" if turn.is_real else "."

    rows = [[f"rank {rank:<4}", *(f"{cell(tick, rank):<4}" for tick in range(ticks))] for rank in range(ranks)]
    return table([["tick     ", *(f"{tick:<4}" for tick in range(ticks))], *rows])


def one_forward_one_backward_timeline(microbatches, ranks):
    ticks = pipeline.one_forward_one_backward_ticks(microbatches, ranks)
    rows = [["tick              ", *(f"{tick:<4}" for tick in range(ticks))]]
    for rank in range(ranks):
        turns = [
            pipeline.one_forward_one_backward_turns(tick, rank, microbatches=microbatches, ranks=ranks)
            for tick in range(ticks)
        ]
        for work in pipeline.Turns._fields:
            cells = [getattr(turn, work) for turn in turns]
            rows.append([f"rank {rank}  {work:<10}", *(f"{c.microbatch if c.is_real else '.'!s:<4}" for c in cells)])
    return table(rows)


def test_the_pictures_in_the_docstring():
    assert circular_timeline(4, 2, 2) in pipeline.__doc__
    assert one_forward_one_backward_timeline(4, 2) in pipeline.__doc__


@pytest.mark.parametrize(("M", "ranks", "repeats"), [(5, 1, 1), (2, 4, 1), (6, 4, 1), (4, 4, 2), (6, 2, 3)])
def test_every_microbatch_meets_every_stage_in_order(M, ranks, repeats):
    """And goes from stage to stage in one tick, so that nothing waits in a queue."""
    ticks = jnp.arange(pipeline.circular_ticks(M, ranks, repeats))
    seen = {}
    for rank in range(ranks):
        turn = pipeline.circular_turn(ticks, rank, microbatches=M, ranks=ranks, repeats=repeats)
        for tick, is_real, microbatch, repeat in zip(range(len(ticks)), *map(np.asarray, turn), strict=True):
            if is_real:
                assert seen.setdefault((int(microbatch), int(repeat) * ranks + rank), tick) == tick
    assert len(seen) == M * ranks * repeats
    assert all(tick == seen[microbatch, 0] + stage for (microbatch, stage), tick in seen.items())
    assert bubble(M, ranks, repeats) == pytest.approx(1 - M * repeats / len(ticks))


def test_bubble():
    assert bubble(8, 1) == 0
    assert bubble(8, 4) == 3 / 11
    assert bubble(8, 4, 2) == 3 / 19
    assert pipeline.one_forward_one_backward_bubble(8, 4) == 7 / 15


def test_layer_order():
    assert layer_order(8, 2, 2) == (0, 1, 4, 5, 2, 3, 6, 7)
    assert layer_order(4, 4, 1) == (0, 1, 2, 3)
    assert sorted(layer_order(24, 4, 3)) == list(range(24))


# ---- What is refused ----


def test_layers_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"num_layers=30 does not divide into 8 chunks \(4 pipe ranks x 2 repeats\)"):
        layer_order(30, 4, 2)


def test_microbatches_that_do_not_fill_the_ring_are_refused():
    with pytest.raises(ValueError, match=r"6 microbatches do not fill the ring of 4 pipe ranks .* repeats=1"):
        with_circular(4, 2)(*example(6))


def test_tokens_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"dim 0 of size 2 .* does not divide over 4 pipe ranks"):
        with_1f1b(4, split_dim=0)(*example(4))
