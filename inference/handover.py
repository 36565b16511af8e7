"""KV blocks on their way between two servers: bytes and back, every one of them checked. Knows no HTTP and no engine.

Who asks sends what it wants in one message with a digest; the answer is a row of frames, a head first, then blocks:

    frame   magic "MKV1" · number of the frame u32 · length of the content u64 · content · digest of all that, 32 bytes

Digests are BLAKE2b with the shared secret as key, which itself never travels; those of the answer depend on the whole
question, its nonce included: a frame that was changed, cut, left out, or made for another question does not fit.
Arrays are raw and little-endian.
"""

import dataclasses
import hashlib
import json
import math
import secrets
import struct
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from inference.request import Prompt

MAGIC = b"MKV1"
FRAME = struct.Struct("<4sIQ")
ASK = struct.Struct("<4s16sIII")  # magic, nonce, blocks the asker has, bytes of the salt, tokens
DIGEST, NAME = 32, 32  # bytes
HEAD_LIMIT = 2**20  # bytes
TOKENS_LIMIT = 2**22
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "int8": np.dtype(np.int8)}
WIRE = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2"), "int8": np.dtype("i1")}  # as numbers of one width


class DamagedError(ValueError):
    """Bytes that are not what they should be."""


class StrangerError(ValueError):
    """Somebody who does not know the secret."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """Which blocks a server would like to have."""

    tokens: Prompt
    salt: str
    have: int = 0  # of the first blocks, which need not come
    nonce: bytes = dataclasses.field(default_factory=lambda: secrets.token_bytes(16))

    def written(self) -> bytes:
        """All of it."""
        salt = self.salt.encode()
        head = ASK.pack(MAGIC, self.nonce, self.have, len(salt), len(self.tokens))
        return head + salt + np.asarray(self.tokens, "<i4").tobytes()

    def sealed(self, secret: str) -> bytes:
        """As it travels."""
        content = self.written()
        return content + hashlib.blake2b(content, key=key_of(secret), digest_size=DIGEST).digest()


def read_ask(sealed: bytes, secret: str) -> Ask:
    """What `Ask.sealed` gave; StrangerError where it was sealed with another secret."""
    content, digest = sealed[:-DIGEST], sealed[-DIGEST:]
    if not secrets.compare_digest(hashlib.blake2b(content, key=key_of(secret), digest_size=DIGEST).digest(), digest):
        raise StrangerError("the question is sealed with another secret")
    if len(content) < ASK.size:
        raise DamagedError(f"the question has {len(content)} bytes, fewer than its {ASK.size} of head")
    magic, nonce, have, salt, tokens = ASK.unpack_from(content)
    size = ASK.size + salt + 4 * tokens
    if magic != MAGIC or tokens > TOKENS_LIMIT or len(content) != size:
        raise DamagedError(f"the question is no {MAGIC.decode()} of {size} bytes: {len(content)} came")
    try:
        text = content[ASK.size : ASK.size + salt].decode()
    except UnicodeDecodeError as error:
        raise DamagedError("the salt is no text") from error
    numbers = np.frombuffer(content, "<i4", offset=ASK.size + salt)
    return Ask(tokens=tuple(numbers.tolist()), salt=text, have=have, nonce=nonce)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of a block's contents."""

    shape: tuple[int, ...]  # of one block
    axis: int  # along which blocks stand
    dtype: str

    def of(self, count: int) -> tuple[int, ...]:
        """The shape of several blocks."""
        return (*self.shape[: self.axis], count, *self.shape[self.axis + 1 :])

    @property
    def num_bytes(self) -> int:
        """Of one block."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


Layout = tuple[Leaf, ...]


def block_bytes(layout: Layout) -> int:
    """Of one block with its name."""
    return NAME + sum(leaf.num_bytes for leaf in layout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """What the frames after it bring, and how the model behind them sees a known text."""

    layout: Layout
    blocks: int  # that come, after those the asker has
    fingerprint: tuple[float, ...]  # log-probabilities: other weights give others
    computed: int  # prompt tokens that were not in the cache there
    seconds: float  # that these took, the queue included

    def written(self) -> bytes:
        """As it travels."""
        return json.dumps(dataclasses.asdict(self)).encode()


def read_head(content: bytes) -> Head:
    """What `Head.written` gave."""
    try:
        fields = json.loads(content)
        layout = tuple(
            Leaf(shape=tuple(map(int, leaf["shape"])), axis=int(leaf["axis"]), dtype=str(leaf["dtype"]))
            for leaf in fields["layout"]
        )
        return Head(
            layout=layout,
            blocks=int(fields["blocks"]),
            fingerprint=tuple(map(float, fields["fingerprint"])),
            computed=int(fields["computed"]),
            seconds=float(fields["seconds"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"the head cannot be read: {type(error).__name__} {error}") from error


def written_blocks(names: Sequence[bytes], leaves: Sequence[np.ndarray], layout: Layout) -> bytes:
    """Blocks as the content of a frame."""
    parts = [*names]
    for leaf, array in zip(layout, leaves, strict=True):
        assert array.shape == leaf.of(len(names))
        assert array.dtype == DTYPES[leaf.dtype]
        wire = WIRE[leaf.dtype]
        parts.append(np.ascontiguousarray(array).view(wire.newbyteorder("=")).astype(wire, copy=False).tobytes())
    return b"".join(parts)


def read_blocks(content: bytes, names: Sequence[bytes], layout: Layout) -> list[np.ndarray]:
    """The arrays of these blocks; others, or of other sizes, are refused."""
    size = len(names) * block_bytes(layout)
    if len(content) != size:
        raise DamagedError(f"{len(names)} blocks have {size} bytes, but {len(content)} came")
    place = len(names) * NAME
    if content[:place] != b"".join(names):
        raise DamagedError("the blocks are not those of this prompt")
    leaves = []
    for leaf in layout:
        shape, wire = leaf.of(len(names)), WIRE[leaf.dtype]
        numbers = np.frombuffer(content, wire, math.prod(shape), place)
        place += numbers.nbytes
        leaves.append(numbers.astype(wire.newbyteorder("="), copy=False).view(DTYPES[leaf.dtype]).reshape(shape))
    return leaves


def key_of(secret: str) -> bytes:
    """The secret in the length that BLAKE2b takes."""
    return hashlib.blake2b(secret.encode()).digest()


class Sealing:
    """Frames of one answer, numbered and sealed: made on one side, opened on the other."""

    def __init__(self, secret: str, ask: Ask):
        self._key = hashlib.blake2b(ask.written(), key=key_of(secret)).digest()
        self._number = 0

    def seal(self, content: bytes) -> bytes:
        """The next frame."""
        head = FRAME.pack(MAGIC, self._number, len(content))
        self._number += 1
        return head + content + self._digest(head, content)

    def length(self, head: bytes, limit: int) -> int:
        """Bytes that come after the first ones of the next frame; no more than its content may have."""
        magic, number, size = FRAME.unpack(head)
        if magic != MAGIC or number != self._number:
            raise DamagedError(f"frame {self._number} of the answer does not begin as one")
        if size > limit:
            raise DamagedError(f"frame {number} of the answer has {size} bytes; {limit} are the most")
        return size + DIGEST

    def opened(self, head: bytes, rest: bytes) -> bytes:
        """The content of the next frame."""
        content, digest = rest[:-DIGEST], rest[-DIGEST:]
        if not secrets.compare_digest(self._digest(head, content), digest):
            raise DamagedError(f"frame {self._number} of the answer is damaged, or sealed with another secret")
        self._number += 1
        return content

    def _digest(self, head: bytes, content: bytes) -> bytes:
        digest = hashlib.blake2b(head, key=self._key, digest_size=DIGEST)
        digest.update(content)
        return digest.digest()
