"""Blocks come over the wire as they went, or not at all."""

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from inference.handover import (
    FRAME,
    Ask,
    DamagedError,
    Head,
    Leaf,
    Sealing,
    StrangerError,
    block_bytes,
    read_ask,
    read_blocks,
    read_head,
    written_blocks,
)

SECRET = "a secret of both servers"
ASK = Ask(tokens=(5, 6, 7, 100_000), salt="someone/ä", have=1)
LAYOUT = (
    Leaf(shape=(3, 1, 2, 4, 8), axis=1, dtype="bfloat16"),
    Leaf(shape=(1, 2, 4), axis=0, dtype="float32"),
    Leaf(shape=(1, 2, 4, 8), axis=0, dtype="int8"),
)
NAMES = [bytes([index]) * 32 for index in range(2)]


def leaves(count: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [
        draw.normal(size=LAYOUT[0].of(count)).astype(ml_dtypes.bfloat16),
        draw.normal(size=LAYOUT[1].of(count)).astype(np.float32),
        draw.integers(-128, 128, LAYOUT[2].of(count)).astype(np.int8),
    ]


def opened(sealing: Sealing, frame: bytes, limit: int = 10**6) -> bytes:
    """The content of a frame that came."""
    head, rest = frame[: FRAME.size], frame[FRAME.size :]
    if len(head) < FRAME.size or sealing.length(head, limit) != len(rest):
        raise DamagedError("cut")
    return sealing.opened(head, rest)


def test_blocks_come_as_they_went():
    content = written_blocks(NAMES, leaves(2), LAYOUT)
    assert len(content) == 2 * block_bytes(LAYOUT)
    for came, went in zip(read_blocks(content, NAMES, LAYOUT), leaves(2), strict=True):
        assert came.dtype == went.dtype
        np.testing.assert_array_equal(came, went)
    with pytest.raises(DamagedError, match="1 blocks have"):
        read_blocks(content, NAMES[:1], LAYOUT)
    with pytest.raises(DamagedError, match="not those of this prompt"):
        read_blocks(content, NAMES[::-1], LAYOUT)


def test_numbers_are_little_endian():
    layout = (Leaf(shape=(1,), axis=0, dtype="float32"),)
    assert written_blocks([b""], [np.array([1.0], np.float32)], layout) == b"\x00\x00\x80\x3f"


def test_questions_and_heads_come_as_they_went():
    assert read_ask(ASK.sealed(SECRET), SECRET) == ASK
    head = Head(layout=LAYOUT, blocks=2, fingerprint=(-1.5, -2.0), computed=9, seconds=0.25)
    assert read_head(head.written()) == head
    for content in (b"", b"{}", b"[]", b"\xff", b'{"layout": 3}', b"[" * 5000):
        with pytest.raises(DamagedError):
            read_head(content)


@hypothesis.given(place=st.integers(0, 10**6), change=st.integers(1, 255), cut=st.booleans())
@hypothesis.settings(max_examples=100, deadline=None)
def test_a_changed_or_cut_question_is_refused(place, change, cut):
    damaged = bytearray(ASK.sealed(SECRET))
    place %= len(damaged)
    damaged[place] ^= change
    with pytest.raises((DamagedError, StrangerError)):
        read_ask(bytes(damaged[:place] if cut else damaged), SECRET)


@hypothesis.given(place=st.integers(0, 10**6), change=st.integers(1, 255), cut=st.booleans())
@hypothesis.settings(max_examples=100, deadline=None)
def test_a_changed_or_cut_frame_is_refused(place, change, cut):
    frame = bytearray(Sealing(SECRET, ASK).seal(written_blocks(NAMES, leaves(2), LAYOUT)))
    place %= len(frame)
    frame[place] ^= change
    with pytest.raises(DamagedError):
        opened(Sealing(SECRET, ASK), bytes(frame[:place] if cut else frame))


def test_frames_fit_only_their_question_their_place_and_their_secret():
    made = Sealing(SECRET, ASK)
    first, second = made.seal(b"first"), made.seal(b"second")
    reader = Sealing(SECRET, ASK)
    assert [opened(reader, first), opened(reader, second)] == [b"first", b"second"]
    again = Ask(tokens=ASK.tokens, salt=ASK.salt, have=ASK.have)  # the same with another nonce
    for reader, frame in (
        (Sealing(SECRET, again), first),
        (Sealing("another secret", ASK), first),
        (Sealing(SECRET, ASK), second),
    ):
        with pytest.raises(DamagedError):
            opened(reader, frame)
    with pytest.raises(StrangerError):
        read_ask(ASK.sealed("another secret"), SECRET)


def test_a_frame_says_its_length_and_may_not_be_longer_than_what_is_waited_for():
    frame = Sealing(SECRET, ASK).seal(b"x" * 101)
    with pytest.raises(DamagedError, match="has 101 bytes; 100 are the most"):
        opened(Sealing(SECRET, ASK), frame, limit=100)
