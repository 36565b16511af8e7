"""Where a loader stands: a place in an order of examples, which must be the order that it was counted in."""

from typing import Any


def check_order(state: dict[str, Any], identity: dict[str, Any]) -> None:
    """ValueError where `state` counts the examples of another order than that of `identity`."""
    for name, value in identity.items():
        if state.get(name) != value:
            raise ValueError(
                f"the checkpoint stands in another order of examples: {name} was {state.get(name)!r}, "
                f"now it is {value!r}; restore the old value, or start a new run with another name"
            )
