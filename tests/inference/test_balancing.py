"""Replicas are chosen by how a prompt begins, within a bound on their load, and only where they are up."""

import collections

import hypothesis
import hypothesis.strategies as st
import pytest

from inference.balancing import Balancer, BalancingConfig, beginning

NAMES = [f"http://replica-{index}" for index in range(6)]
KEYS = [f"prompt {index}".encode() for index in range(200)]
names = st.lists(st.sampled_from(NAMES), min_size=1, unique=True)
calm = hypothesis.settings(max_examples=60, deadline=None)


def balancer(names, **config) -> Balancer:
    """All of them up."""
    made = Balancer(names, BalancingConfig(**config))
    for name in names:
        made.healthy(name)
    return made


def homes(names) -> dict[bytes, str | None]:
    """Where each key goes when nothing runs."""
    made = balancer(names)
    return {key: made.favourite(key) for key in KEYS}


@calm
@hypothesis.given(names=names)
def test_a_key_moves_only_from_who_leaves_and_only_to_who_joins(names):
    before, gone = homes(names), names[0]
    after = homes(names[1:])  # read from right to left: `gone` joins
    for key in KEYS:
        assert after[key] == before[key] or before[key] == gone


def test_keys_are_spread_evenly():
    counts = collections.Counter(homes(NAMES).values())
    assert set(counts) == set(NAMES)
    assert max(counts.values()) < 2 * len(KEYS) / len(NAMES)


actions = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "take", "take", "end", "fail", "heal", "drain", "resume"]),
        st.integers(0, 5),
        st.sets(st.sampled_from(NAMES), max_size=2),
    ),
    max_size=80,
)


@calm
@hypothesis.given(names=names, actions=actions, share=st.floats(1, 2), slack=st.integers(1, 4), limit=st.integers(1, 6))
def test_the_bound_holds_and_only_those_that_are_up_are_chosen(names, actions, share, slack, limit):
    made = balancer(names, share=share, slack=slack, max_running=limit, failures=2)
    running = []
    for action, number, without in actions:
        name = names[number % len(names)]
        if action == "take":
            able = [
                r for r in made.replicas.values()
                if r.condition == "up" and r.running < limit and r.name not in without
            ]  # fmt: skip
            total = sum(replica.running for replica in able) + 1
            chosen = made.take(KEYS[number] if number else None, without=without)
            assert (chosen is None) == (not able)
            if chosen is not None:
                running.append(chosen)
                assert chosen in {replica.name for replica in able}
                assert made.replicas[chosen].running <= max(slack, -(-share * total // len(able)))
        elif action == "end" and running:
            made.give_back(running.pop(number % len(running)))
        elif action in ("fail", "heal", "drain", "resume"):
            {"fail": made.failed, "heal": made.healthy, "drain": made.drain, "resume": made.resume}[action](name)
        assert {name: replica.running for name, replica in made.replicas.items()} == {
            name: running.count(name) for name in names
        }


def test_a_hot_beginning_stays_at_home_till_its_home_is_busy_and_then_spills_to_the_least_busy():
    made = balancer(NAMES[:3], slack=4, share=1.25)
    home = made.favourite(b"hot")
    assert [made.take(b"hot") for _ in range(4)] == [home] * 4
    others = {made.take(b"hot"), made.take(b"hot")}
    assert others == set(NAMES[:3]) - {home}
    for _ in range(90):
        made.take(b"hot")
    loads = sorted(replica.running for replica in made.replicas.values())
    assert loads[2] == made.replicas[home].running == 40  # 1.25 × 96 / 3
    made.give_back(home)
    assert made.take(b"hot") == home


def test_failures_in_a_row_leave_a_replica_out_and_health_brings_it_back():
    made = balancer(NAMES[:1], failures=3, recoveries=2)
    (name,) = made.replicas
    made.replicas[name].condition = "up"
    assert [made.failed(name), made.failed(name)] == [False, False]
    made.answered(name)  # not in a row
    assert [made.failed(name) for _ in range(4)] == [False, False, True, False]
    made.answered(name)
    assert made.take(b"x") is None
    assert not made.any_up()
    assert [made.healthy(name), made.healthy(name), made.healthy(name)] == [False, True, False]
    assert made.take(b"x") == name


def test_a_drained_replica_is_not_brought_back_by_health_but_by_resume():
    made = balancer(NAMES[:1])
    made.drain(NAMES[0])
    assert not made.healthy(NAMES[0])
    assert made.take(None) is None
    made.resume(NAMES[0])
    assert made.healthy(NAMES[0])
    assert made.take(None) == NAMES[0]
    with pytest.raises(ValueError, match=r"no replica x; there are http://replica-0"):
        made.drain("x")


SYSTEM = {"role": "system", "content": "You are kind."}


def ask(*texts):
    """A conversation: system, then user and assistant in turns."""
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [SYSTEM, *({"role": r, "content": t} for r, t in zip(roles, texts, strict=False))]}


def test_all_turns_of_a_conversation_have_one_key():
    key = beginning(ask("Hello"), 512)
    assert key == b"system\0You are kind.\0user\0Hello"
    assert beginning(ask("Hello", "Hi", "What now?"), 512) == key
    assert beginning(ask("Goodbye"), 512) != key
    assert beginning(ask("Hello"), 10) == beginning(ask("Goodbye"), 10)  # the long system prompt alone chooses


@pytest.mark.parametrize(
    ("request_", "key"),
    [
        ({"prompt": "abcdef"}, b"abcd"),
        ({"prompt": ["abcdef", "x"]}, b"abcd"),
        ({"prompt": [1, 2, 3, 4, 5]}, b"[1, 2, 3, 4]"),
        ({"prompt": [[1, 2, 3, 4, 5], [6]]}, b"[1, 2, 3, 4]"),
        ({"prompt": "\ud800"}, b"\xed\xa0\x80"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, b"user"),
        ({"messages": [7]}, b"None"),
        ({"input": "abcdef"}, None),
        ({"prompt": ""}, None),
        ({"messages": []}, None),
        ({"prompt": 7}, None),
        ([1], None),
        (None, None),
    ],
)
def test_keys_of_requests(request_, key):
    assert beginning(request_, 4) == key


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"balancing\.share=0\.5 must be between 1 and 100"):
        BalancingConfig(share=0.5)
