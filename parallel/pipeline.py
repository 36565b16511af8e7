"""Pipeline parallelism: microbatches flow through ranks that hold different layers. Knows no model.

The layers are dealt to the ranks of a mesh axis; a rank works on one microbatch while its neighbours work on others.
Everything here is per-device code for the inside of a `jax.shard_map(..., check_vma=False)`: each schedule is one
`lax.scan` over ticks in which every rank does the same work on different data, then hands it on by `lax.ppermute`.
What a rank does at a tick is arithmetic on (tick, rank), so a schedule is a small function and its picture is a test.

**Circular** (`circular`). A rank holds `repeats` chunks of layers: virtual stage repeat * ranks + rank. A microbatch
goes that many times around the ring. One time is GPipe (arXiv:1811.06965), more the interleaved schedule of Megatron
(arXiv:2104.04473). This is M = 4 with 2 ranks and 2 repeats; a number is a microbatch, a letter the chunk that it
passes, a dot a tick of the bubble:

    tick     0   1   2   3   4   5   6   7   8
    rank 0   0a  1a  0b  1b  2a  3a  2b  3b  .
    rank 1   .   0a  1a  0b  1b  2a  3a  2b  3b

Jax differentiates it: the backward pass is the same picture from right to left. All forwards come before the first
backward, so what a tick keeps for it is kept M * repeats + ranks - 1 times; `remat` says what that is.

**One forward, one backward** (`one_forward_one_backward`; after PipeDream, arXiv:1806.03377). A microbatch's backward
begins as soon as it has come out, so a rank keeps 2 * ranks stage inputs however large M is. In every tick a rank does
the backward of an old microbatch beside the forward of a new one, and all ranks together do head and loss (`finish`)
of one, each on its part of the tokens. This is M = 4 with 2 ranks:

    tick              0   1   2   3   4   5   6
    rank 0  forward   0   1   2   3   .   .   .
    rank 0  finish    .   .   0   1   2   3   .
    rank 0  backward  .   .   .   0   1   2   3
    rank 1  forward   .   0   1   2   3   .   .
    rank 1  finish    .   .   0   1   2   3   .
    rank 1  backward  .   .   0   1   2   3   .

Finish stands a tick after the last forward so that collectives need not be waited for: gathering its gradient does not
depend on the tick's forward, nor handing over and dealing out the forward's result on the tick's backward.

**The bubble.** A rank in the bubble computes too, on zeros, since the ranks run one program. Nothing of that reaches a
result: inputs, sums and gradients are *selected* by whether the turn was real, never multiplied by it, so that a stage
which makes NaN of zeros does no harm.

**The objective** is the sum over all devices of local shares of the loss; every collective is a linear map and its
transpose is its derivative. So gradients of parameters are this device's own: the caller sums them over the axes that
a parameter is not split over (those of `finish` also over the pipe axis).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Tree = Any  # a pytree of arrays
Stage = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]  # parameters of a chunk, x, side -> y like x, aux
Finish = Callable[[Tree, Tree, Tree], tuple[Float[Array, ""], Tree]]  # parameters, y, side -> share of loss, aux
Number = int | Int[Array, "..."]  # the schedules also take many ticks at once


# ---- The schedules: what a rank does at a tick ----


class Turn(NamedTuple):
    """One piece of work of one rank at one tick."""

    is_real: Bool[Array, "..."]  # False in the bubble, where the other fields are any of their valid values
    microbatch: Int[Array, "..."]
    repeat: Int[Array, "..."]  # which of the rank's chunks


def circular_ticks(microbatches: int, ranks: int, repeats: int) -> int:
    """Ticks of `circular`: the last rank begins ranks - 1 after the first and has M * repeats turns."""
    return microbatches * repeats + ranks - 1


def circular_turn(tick: Number, rank: Number, *, microbatches: int, ranks: int, repeats: int) -> Turn:
    """Microbatches go around in groups that fill the ring: one comes back just when the last of its group has left.

    Hence what arrives is always what is needed: nothing waits in a queue. With one repeat the groups don't matter.
    """
    turn, is_real = _within(tick - rank, microbatches * repeats)
    group, turn = turn // (ranks * repeats), turn % (ranks * repeats)
    return Turn(is_real, group * ranks + turn % ranks, turn // ranks)


class Turns(NamedTuple):
    """What one rank does at one tick of `one_forward_one_backward`."""

    forward: Turn
    finish: Turn
    backward: Turn


def one_forward_one_backward_ticks(microbatches: int, ranks: int) -> int:
    """Ticks of `one_forward_one_backward`: the last microbatch begins at M - 1, goes up and comes down."""
    return microbatches + 2 * ranks - 1


def one_forward_one_backward_turns(tick: Number, rank: Number, *, microbatches: int, ranks: int) -> Turns:
    """Microbatch m goes forward at tick m + rank, is finished at m + ranks, goes backward at m + 2 ranks - 1 - rank."""

    def turn(delay: Number) -> Turn:
        microbatch, is_real = _within(tick - delay, microbatches)
        return Turn(is_real, microbatch, jnp.zeros_like(microbatch))

    return Turns(turn(rank), turn(ranks), turn(2 * ranks - 1 - rank))


def _within(turn: Number, length: int) -> tuple[Int[Array, "..."], Bool[Array, "..."]]:
    """A turn moved into 0..length - 1, and whether it was there."""
    turn = jnp.asarray(turn, jnp.int32)
    return jnp.clip(turn, 0, length - 1), (turn >= 0) & (turn < length)


def bubble(microbatches: int, ranks: int, repeats: int = 1) -> float:
    """Part of `circular`'s ticks that a rank spends in the bubble: (ranks - 1) / (M * repeats + ranks - 1).

        bubble(8, 4) == 3 / 11        bubble(8, 4, 2) == 3 / 19

    GPipe has it as O((K - 1) / (M + K - 1)) (arXiv:1811.06965, section 2.3); Megatron's (p - 1) / (v m)
    (arXiv:2104.04473, section 2.2) is the same bubble over the ideal time instead of over the whole. Interleaving
    pays with `repeats` times the hand-overs.
    """
    return (ranks - 1) / circular_ticks(microbatches, ranks, repeats)


def one_forward_one_backward_bubble(microbatches: int, ranks: int) -> float:
    """Part of `one_forward_one_backward`'s ticks that a rank spends in the bubble: (2 ranks - 1) / (M + 2 ranks - 1).

    PipeDream-Flush (arXiv:2104.04473, section 2.2) has GPipe's bubble: its ranks do a forward *or* a backward, as it
    comes. One program for all ranks does both in each tick, so filling costs backwards and draining forwards. It is
    made for many microbatches, which cost it no memory.
    """
    return (2 * ranks - 1) / one_forward_one_backward_ticks(microbatches, ranks)


def layer_order(num_layers: int, ranks: int, repeats: int) -> tuple[int, ...]:
    """Layers in the order in which to stack them, so that an even split over the pipe axis deals out the chunks.

        layer_order(8, 2, 2) == (0, 1, 4, 5,   2, 3, 6, 7)   # rank 0 holds layers 01 and 45, rank 1 23 and 67

    A rank's part, its leading dim reshaped to [repeats, L / (ranks * repeats)], is `circular`'s `chunks`.
    """
    chunks = ranks * repeats
    if num_layers % chunks:
        raise ValueError(
            f"num_layers={num_layers} does not divide into {chunks} chunks ({ranks} pipe ranks x {repeats} repeats); "
            f"make {chunks} a divisor of {num_layers} by another pipe or repeats"
        )
    size = num_layers // chunks
    starts = [(repeat * ranks + rank) * size for rank in range(ranks) for repeat in range(repeats)]
    return tuple(start + layer for start in starts for layer in range(size))


# ---- GPipe and interleaved: differentiated by jax ----


def circular(
    stage: Stage,
    chunks: Tree,  # [repeats, ...]: this rank's parameters; chunk r is virtual stage r * ranks + rank
    inputs: Tree,  # [M, ...]: activations, read on rank 0
    sides: Tree,  # [M, ...]: what is not differentiated (positions, segments), the same on all ranks of the axis
    *,
    axis: str,
    repeats: int,
    remat: Callable[[Callable], Callable] = lambda run: run,
) -> tuple[Tree, Tree]:
    """All M microbatches through all ranks * repeats stages -> (outputs [M, ...], aux).

    Outputs are valid on the last rank and zero on the others, so that a psum_scatter deals them out. Aux is what this
    rank's stages returned, summed over its real ticks. Gradients of `inputs` come out on rank 0, zero elsewhere.

    `remat` wraps the choice of a tick's chunk and its stage: under `jax.checkpoint` a tick keeps its stage input only.
    With repeats > 1 and no remat, a tick also keeps a copy of its chunk's parameters.
    """
    rank, ranks = lax.axis_index(axis), lax.axis_size(axis)
    microbatches = _leading(inputs)
    assert _leading(chunks) == repeats, (_leading(chunks), repeats)
    if repeats > 1 and microbatches % ranks:
        raise ValueError(
            f"{microbatches} microbatches do not fill the ring of {ranks} pipe ranks evenly, which {repeats} repeats "
            f"need; make {ranks} a divisor of {microbatches}, or take repeats=1"
        )
    sides = lax.stop_gradient(sides)
    is_last_rank = rank == ranks - 1

    @remat
    def run(chunks: Tree, x: Tree, sides: Tree, turn: Turn) -> tuple[Tree, Tree]:
        chunk = _gradient_only(turn.is_real, _pick(chunks, turn.repeat) if repeats > 1 else _first(chunks))
        return stage(chunk, x, _pick(sides, turn.microbatch))

    def tick(carry: tuple[Tree, Tree], number: Int[Array, ""]):
        arrived, outputs = carry
        # 1. Whose turn it is.
        turn = circular_turn(number, rank, microbatches=microbatches, ranks=ranks, repeats=repeats)
        # 2. The first virtual stage begins with an input, every other goes on with what arrived.
        is_first = (rank == 0) & (turn.repeat == 0)
        x = _only(turn.is_real, _choose(is_first, _pick(inputs, turn.microbatch), arrived))
        # 3. One chunk of layers.
        y, aux = run(chunks, x, sides, turn)
        # 4. What leaves the last virtual stage is an output. Zeros written on the way there are overwritten by it:
        #    the last rank's last tick is real.
        is_output = turn.is_real & is_last_rank & (turn.repeat == repeats - 1)
        outputs = _put(outputs, turn.microbatch, _only(is_output, y))
        # 5. Hand over to the next rank; from the last to the first where there is another round.
        return (_hand_over(y, axis, by=1, around=repeats > 1), outputs), _only(turn.is_real, aux)

    start = (_zeros(_first(inputs)), _zeros(inputs))
    (_, outputs), aux = lax.scan(tick, start, jnp.arange(circular_ticks(microbatches, ranks, repeats)))
    return outputs, _sum(aux)


# ---- One forward, one backward: gradients made on the way ----


class Result(NamedTuple):
    """Loss and gradients of all M microbatches; each device's own share."""

    loss: Float[Array, ""]  # share of the objective: of `finish`, and `penalty` of this rank's stages
    stage_aux: Tree  # sums over this rank's stage turns
    finish_aux: Tree  # sums over this rank's finish turns
    chunk_grads: Tree  # of this rank's layers, float32
    finish_grads: Tree  # of this rank's part of the tokens, float32
    input_grads: Tree  # [M, ...]: on rank 0, zero elsewhere


class _Carry(NamedTuple):
    """What goes from tick to tick."""

    arrived: Tree  # from the rank before: stage input of the coming forward
    returned: Tree  # from the rank after: gradient of the stage output of the coming backward
    part: Tree  # this rank's tokens of the last stage's output, to be finished
    stash: Tree  # [2 * ranks, ...]: stage inputs whose backward is to come; microbatch m in slot m % (2 * ranks)
    inputs: Tree  # [M, ...]: an input's place is taken by its gradient
    chunk_grads: Tree
    finish_grads: Tree


def one_forward_one_backward(
    stage: Stage,
    finish: Finish,
    chunk: Tree,  # this rank's parameters
    finish_params: Tree,  # of head and loss, the same on all ranks of the axis
    inputs: Tree,  # [M, ...]: activations, read on rank 0
    sides: Tree,  # [M, ...]: what is not differentiated (positions, segments, targets), the same on all ranks
    *,
    axis: str,
    split_dim: int,
    penalty: Callable[[Tree], Float[Array, ""]] = lambda aux: jnp.float32(0),
) -> Result:
    """Loss and gradients with 2 * ranks stage inputs alive, however large M is; a backward makes its forward again.

    `finish` is shared by the ranks: each has its part of dim `split_dim` of a microbatch (of y, and of every leaf of
    `sides` that has this dim), so it must be a sum over that dim. `penalty` is what a stage's aux adds to the loss.
    """
    rank, ranks = lax.axis_index(axis), lax.axis_size(axis)
    microbatches, slots = _leading(inputs), 2 * lax.axis_size(axis)
    is_first_rank, is_last_rank = rank == 0, rank == ranks - 1
    _check_split(inputs, ranks, split_dim)

    def run(chunk: Tree, x: Tree, side: Tree):
        y, aux = stage(chunk, x, side)
        return (y, penalty(aux)), aux

    def tick(carry: _Carry, number: Int[Array, ""]):
        forward, finishing, backward = one_forward_one_backward_turns(
            number, rank, microbatches=microbatches, ranks=ranks
        )
        # 1. Finish: head and loss of this rank's tokens, and their gradient, all-gathered for the last rank. The
        #    forward below does not wait for that.
        side = _part(_pick(sides, finishing.microbatch), rank, ranks, split_dim)
        share = lambda params, y: finish(params, y, side)  # noqa: E731
        loss, pull, finish_aux = jax.vjp(share, finish_params, carry.part, has_aux=True)
        d_params, d_part = pull(jnp.ones_like(loss))
        finish_grads = _add(carry.finish_grads, d_params, finishing.is_real)
        d_last = jax.tree.map(lambda d: lax.all_gather(d, axis, axis=split_dim, tiled=True), d_part)

        # 2. Forward: keep the stage input, nothing else. The slots go on turning in the bubble: its zeros take the
        #    place of what has had its backward.
        x = _choose(is_first_rank, _pick(carry.inputs, forward.microbatch), carry.arrived)
        x = _only(forward.is_real, x)
        (y, extra), stage_aux = run(chunk, x, _pick(sides, forward.microbatch))
        stash = _put(carry.stash, (number - rank) % slots, x)

        # 3. Backward: the forward again from the input that was kept, then its transpose.
        side = _pick(sides, backward.microbatch)
        _, pull, _ = jax.vjp(
            lambda chunk, x: run(chunk, x, side), chunk, _pick(stash, backward.microbatch % slots), has_aux=True
        )
        d_y = _only(backward.is_real, _choose(is_last_rank, d_last, carry.returned))
        d_chunk, d_x = pull((d_y, jnp.ones_like(extra)))
        chunk_grads = _add(carry.chunk_grads, d_chunk, backward.is_real)
        #    On rank 0 the bubble's zeros go to slot 0, after its input was read and before its gradient comes.
        gradients = _put(carry.inputs, backward.microbatch, _only(backward.is_real & is_first_rank, d_x))

        # 4. Hand over: y to the next rank, d_x to the one before; the last rank's y in parts to all, by a
        #    reduce-scatter in which the others' is zero.
        leaving = _only(forward.is_real & is_last_rank, y)
        scatter = lambda y: lax.psum_scatter(y, axis, scatter_dimension=split_dim, tiled=True)  # noqa: E731
        carry = _Carry(
            arrived=_hand_over(y, axis, by=1),
            returned=_hand_over(d_x, axis, by=-1),
            part=jax.tree.map(scatter, leaving),
            stash=stash,
            inputs=gradients,
            chunk_grads=chunk_grads,
            finish_grads=finish_grads,
        )
        loss = _only(finishing.is_real, loss) + _only(forward.is_real, extra)
        return carry, (loss, _only(forward.is_real, stage_aux), _only(finishing.is_real, finish_aux))

    x = _zeros(_first(inputs))
    start = _Carry(
        arrived=x,
        returned=x,
        part=_part(x, 0, ranks, split_dim),
        stash=jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), x),
        inputs=inputs,
        chunk_grads=_gradient_sums(chunk),
        finish_grads=_gradient_sums(finish_params),
    )
    end, sums = lax.scan(tick, start, jnp.arange(one_forward_one_backward_ticks(microbatches, ranks)))
    loss, stage_aux, finish_aux = _sum(sums)
    return Result(loss, stage_aux, finish_aux, end.chunk_grads, end.finish_grads, end.inputs)


def _check_split(inputs: Tree, ranks: int, dim: int) -> None:
    """Every activation's tokens must divide over the ranks."""
    for x in jax.tree.leaves(_first(inputs)):
        if x.shape[dim] % ranks:
            raise ValueError(
                f"dim {dim} of size {x.shape[dim]} (a microbatch {x.shape}) does not divide over {ranks} pipe ranks, "
                f"which share the head; make {ranks} a divisor of it, or split another dim"
            )


def _part(tree: Tree, rank: Number, ranks: int, dim: int) -> Tree:
    """This rank's part of `dim` of every leaf that has it."""

    def part(x: Array) -> Array:
        if x.ndim <= dim:
            return x
        size = x.shape[dim] // ranks
        return lax.dynamic_slice_in_dim(x, rank * size, size, dim)

    return jax.tree.map(part, tree)


def _gradient_sums(params: Tree) -> Tree:
    """Zeros to add gradients to."""
    return jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)


def _add(sums: Tree, grads: Tree, is_real: Bool[Array, ""]) -> Tree:
    """Gradients added where they are real; a leaf that has none (whole numbers) stays zero."""

    def add(total: Array, grad: Array) -> Array:
        if grad.dtype == jax.dtypes.float0:
            return total
        return total + _only(is_real, grad.astype(total.dtype))

    return jax.tree.map(add, sums, grads)


# ---- Trees of arrays ----


def _leading(tree: Tree) -> int:
    (size,) = {len(leaf) for leaf in jax.tree.leaves(tree)}
    return size


def _first(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x[0], tree)


def _pick(tree: Tree, index: Int[Array, ""]) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(tree: Tree, index: Int[Array, ""], items: Tree) -> Tree:
    return jax.tree.map(lambda x, item: lax.dynamic_update_index_in_dim(x, item, index, 0), tree, items)


def _choose(condition: Bool[Array, ""], these: Tree, those: Tree) -> Tree:
    return jax.tree.map(lambda a, b: lax.select_n(condition, b, a), these, those)


def _only(condition: Bool[Array, ""], tree: Tree) -> Tree:
    """The tree, or zeros; also of its gradient, whatever it is."""
    return _choose(condition, tree, _zeros(tree))


def _zeros(tree: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, tree)


def _sum(tree: Tree) -> Tree:
    """Over ticks."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)


def _hand_over(tree: Tree, axis: str, *, by: int, around: bool = False) -> Tree:
    """To the rank `by` further; the end of the row receives zeros unless it goes around."""
    ranks = lax.axis_size(axis)
    pairs = [(rank, (rank + by) % ranks) for rank in range(ranks) if around or 0 <= rank + by < ranks]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), tree)


def _gradient_only(condition: Bool[Array, ""], tree: Tree) -> Tree:
    """The tree as it is, and its gradient selected: zeros, even for NaN, where the condition does not hold."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return jax.tree.map(lambda x: _selected_gradient(x, condition) if is_float(x) else x, tree)


@jax.custom_jvp
def _selected_gradient(x: Array, condition: Bool[Array, ""]) -> Array:
    return x


@_selected_gradient.defjvp
def _selected_gradient_jvp(primals, tangents):
    # a rule, not a select of the value: that would be another array, which a tick would keep beside the parameters
    x, condition = primals
    return x, _only(condition, tangents[0])
