"""FLOPs of the matrix products in a jaxpr: what the real program multiplies, nothing run and nothing compiled."""

import math

from jax._src.interpreters import partial_eval


def product_flops(closed) -> int:
    """Two a multiply-add, loops unrolled, after dead code is gone (as XLA sees it).

    A product sums, and has free dims on both sides: a row times itself, and outer products without a sum (of the
    statistic that balances experts), are vector work. Of a `platform_dependent` grouped product the ragged one counts,
    of which each row meets one matrix.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return _flops(jaxpr)


def _flops(jaxpr) -> int:
    return sum(_of(eqn) for eqn in jaxpr.eqns)


def _of(eqn) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return _dot(eqn)
    if name == "ragged_dot_general":
        left, right, _ = (var.aval.shape for var in eqn.invars)
        (result,) = (var.aval.shape for var in eqn.outvars)
        rows, inner = left
        return 2 * rows * inner * (right[-1] if len(result) == 2 else result[-1])
    if name == "scan":
        return params["length"] * _flops(params["jaxpr"].jaxpr)
    if name == "cond":
        branches = [_flops(branch.jaxpr) for branch in params["branches"] if not _has(branch.jaxpr, "while")]
        return max(branches)
    inside = [_flops(inner) for inner in inner_jaxprs(params)]
    if name == "while":
        assert not any(inside), "a product in a loop of unknown length"
    return sum(inside)


def _dot(eqn) -> int:
    (left, right), ((contracted, _), (batch, _)) = (
        [var.aval.shape for var in eqn.invars], eqn.params["dimension_numbers"]
    )  # fmt: skip
    free = [len(shape) - len(batch) - len(contracted) for shape in (left, right)]
    (result,) = eqn.outvars
    return (
        2 * math.prod(result.aval.shape) * math.prod(left[dim] for dim in contracted) if contracted and all(free) else 0
    )


def _has(jaxpr, primitive: str) -> bool:
    return any(
        eqn.primitive.name == primitive or any(_has(inner, primitive) for inner in inner_jaxprs(eqn.params))
        for eqn in jaxpr.eqns
    )


def inner_jaxprs(params):
    """Jaxprs among the parameters of an equation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner
