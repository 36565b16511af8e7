"""Which KV block holds which tokens, how many hold the block, and which may be found again. Knows no arrays, no model.

A block is a place for the keys and values of Z consecutive tokens (PagedAttention, arXiv:2309.06180, section 4). A full
one is named after all the tokens up to its end, so that a prompt that begins alike finds it, as long as nobody has
needed the room since.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

NOBODY = 0  # a block that is never taken: tables point to it where nothing is to be seen


class Copy(NamedTuple):
    """A block whose contents have to be copied before it is written."""

    source: int
    target: int


class OutOfBlocks(Exception):  # noqa: N818
    """No block is free: some sequence has to give its own back first."""


class BlockPool:
    """P blocks, counted by holders. What nobody holds is given out anew, the longest unused first."""

    def __init__(self, num_blocks: int, *, reuse: bool = True):
        self.num_blocks, self.reuse = num_blocks, reuse
        self._free = deque(range(1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # named and held by nobody, the longest unused first
        self._holders = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._named: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and a prompt may find."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - 1 - self.num_available

    def take(self) -> int:
        """A block of one's own; OutOfBlocks where none can be had."""
        if self._free:
            block = self._free.popleft()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        else:
            raise OutOfBlocks
        self._holders[block] = 1
        return block

    def find(self, name: bytes) -> int | None:
        """The block with these contents, if there still is one."""
        return self._named.get(name)

    def hold(self, block: int) -> None:
        """One more holder of a block that is named or held."""
        self._cached.pop(block, None)
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """One holder less."""
        assert self._holders[block] > 0, f"block {block} is released and nobody holds it"
        self._holders[block] -= 1
        if self._holders[block] == 0 and self._names[block] is not None:
            self._cached[block] = None
        elif self._holders[block] == 0:
            self._free.append(block)

    def name(self, block: int, name: bytes) -> None:
        """The block is full, and this is what it holds. Of two with the same contents, the first is found."""
        if self.reuse and self._names[block] is None and name not in self._named:
            self._names[block], self._named[name] = name, block

    def writable(self, block: int) -> Copy | None:
        """None where the block's only holder may write it; else a block that takes its place, to be copied first."""
        if self._holders[block] == 1:
            return None
        copy = Copy(block, self.take())
        self.release(block)
        return copy

    def _forget(self, block: int) -> None:
        name, self._names[block] = self._names[block], None
        if name is not None:
            del self._named[name]


def block_names(tokens: Sequence[int], size: int, *, salt: str, after: Sequence[bytes] = ()) -> Iterator[bytes]:
    """Names of the full blocks of these tokens, those `after` known already. Another salt gives other names.

    SHA-256 of the name before it and of the block's own tokens: nobody can make a prompt that finds another's block.
    """
    name = after[-1] if after else hashlib.sha256(salt.encode()).digest()
    for start in range(len(after) * size, len(tokens) - size + 1, size):
        name = hashlib.sha256(name + np.asarray(tokens[start : start + size], np.int32).tobytes()).digest()
        yield name
