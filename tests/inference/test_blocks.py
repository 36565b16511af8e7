"""A block has the holders it is said to have, is found by what it holds, and is given out the longest unused first."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.blocks import BlockPool, Copy, OutOfBlocks, block_names


def test_blocks_are_found_by_their_contents_till_the_room_is_needed():
    pool = BlockPool(4)
    one, two = pool.take(), pool.take()
    pool.name(one, b"one")
    pool.name(two, b"two")
    pool.release(two)
    pool.release(one)
    assert (pool.num_available, pool.num_cached, pool.num_used) == (3, 2, 0)
    assert (pool.find(b"one"), pool.find(b"two"), pool.find(b"three")) == (one, two, None)
    pool.take()  # the one that never held anything
    pool.hold(two)
    pool.release(two)  # now `one` is the longest unused
    assert pool.take() == one
    assert (pool.find(b"one"), pool.find(b"two")) == (None, two)
    pool.hold(two)
    with pytest.raises(OutOfBlocks):
        pool.take()


def test_of_two_with_the_same_contents_the_first_is_found():
    pool = BlockPool(4)
    one, two = pool.take(), pool.take()
    pool.name(one, b"same")
    pool.name(two, b"same")
    assert pool.find(b"same") == one
    pool.release(two)
    assert pool.num_cached == 0


def test_nothing_is_found_where_nothing_is_reused():
    pool = BlockPool(4, reuse=False)
    pool.name(pool.take(), b"one")
    assert pool.find(b"one") is None


def test_a_shared_block_is_copied_before_it_is_written():
    pool = BlockPool(4)
    block = pool.take()
    assert pool.writable(block) is None
    pool.hold(block)
    copy = pool.writable(block)
    assert copy == Copy(block, copy.target)
    assert copy.target != block
    assert pool.writable(block) is None  # whoever is left may write it
    assert pool.num_used == 2


def test_names_depend_on_all_tokens_before_and_on_the_salt():
    tokens = list(range(10))
    names = list(block_names(tokens, 4, salt=""))
    assert len(names) == 2
    assert list(block_names(tokens, 4, salt="", after=names[:1])) == names[1:]
    assert next(block_names([*tokens[:4], 9, 9, 9, 9], 4, salt="")) == names[0]
    others = [[9, *tokens[1:]], tokens[4:8] + tokens[:4]]
    for other in (*(block_names(other, 4, salt="") for other in others), block_names(tokens, 4, salt="s")):
        assert not set(other) & set(names)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("thrnw"), st.integers(0, 30)), max_size=80))
def test_whatever_is_done_every_block_is_free_cached_or_held(moves):
    pool, held = BlockPool(7), []
    for move, number in moves:
        if move == "t":
            assert (pool.num_available > 0) == (len(set(held)) < 6)
            if pool.num_available:
                block = pool.take()
                assert block not in held
                assert block != 0
                held.append(block)
        elif move == "h" and (block := pool.find(bytes([number % 5]))) is not None:
            pool.hold(block)
            held.append(block)
        elif held and move == "r":
            pool.release(held.pop(number % len(held)))
        elif held and move == "n":
            pool.name(held[number % len(held)], bytes([number % 5]))
        elif held and move == "w" and pool.num_available:
            block = held.pop(number % len(held))
            copy = pool.writable(block)
            assert (copy is None) == (block not in held)
            held.append(block if copy is None else copy.target)
        assert pool.num_used == len(set(held))
        assert pool.num_available + pool.num_used == 6
        assert pool.num_cached <= pool.num_available
