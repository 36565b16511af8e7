"""The KV cache of one batch: the arrays on the device and, on the host, which tokens stand in each row."""

from collections.abc import Sequence
from typing import Any

import jax

from inference import steps
from inference.steps import Program, power_of_two

SMALLEST = 128  # slots

Prompt = tuple[int, ...]


class Cache:
    """Slots for a batch. While a step has the arrays, they are not here: a step that fails takes them with it."""

    def __init__(self, program: Program):
        self.program = program
        self.held: list[Prompt] = []  # the first tokens of each row; what stands behind them is unknown
        self.slots = 0
        self._memory: Any = None

    def common(self, prompts: Sequence[Prompt]) -> list[int]:
        """How many first tokens of each prompt stand here already; never all, since the last one's logits are asked."""
        if self._memory is None or len(self.held) != len(prompts):
            return [0] * len(prompts)
        return [min(shared(*pair), len(pair[1]) - 1) for pair in zip(self.held, prompts, strict=True)]

    def take(self, rows: int, slots: int) -> Any:
        """The arrays, with room for `slots` tokens in each of `rows` rows; new ones where those here are no use."""
        memory, self._memory = self._memory, None
        slots = slots_for(slots)
        if memory is None or len(self.held) != rows:
            memory = steps.empty_memory(self.program, rows, slots)()
        elif slots > self.slots:
            memory = steps.grown_memory(memory, program=self.program, slots=slots)
        else:
            slots = self.slots
        self.held, self.slots = [()] * rows, slots
        return memory

    def give(self, memory: Any, held: Sequence[Prompt]) -> None:
        """Put the arrays back, with these tokens in them."""
        self._memory, self.held = memory, list(held)

    def spread(self, logits: jax.Array, source: jax.Array, rows: list[int]) -> jax.Array:
        """Row i becomes a copy of row source[i], its next-token logits, too."""
        memory, self._memory = self._memory, None
        logits, memory = steps.spread(logits, memory, source, program=self.program)
        self.give(memory, [self.held[row] for row in rows])
        return logits


def slots_for(tokens: int) -> int:
    """Slots of a cache that has to hold so many tokens a row."""
    return max(power_of_two(tokens), SMALLEST)


def shared(one: Prompt, other: Prompt) -> int:
    """Length of the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
