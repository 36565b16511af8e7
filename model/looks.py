"""What an encoder–decoder looked at while it read a pair: a record. Knows no model."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Looks(NamedTuple):
    """Attention weights by layer and head, each None where a model has no such attention."""

    encoder: Float[Array, "B L N S S"] | None = None  # of the source to itself
    decoder: Float[Array, "B L N T T"] | None = None  # of the target to itself
    cross: Float[Array, "B L N T S"] | None = None  # of the target to the source
