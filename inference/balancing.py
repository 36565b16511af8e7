"""Which of several replicas answers a request: prompts that begin alike go to the same one. Knows no network, no clock.

A request has a key (how its prompt begins), and each key ranks the replicas by a hash of both (rendezvous hashing): as
a replica leaves, only its own keys move; as one joins, keys move only to it. The first in the rank answers, since its
cache has the beginning, unless that would give it more than its share of what runs: then the least busy one does.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Iterable
from typing import Any, Literal

from parallel.records import require

Condition = Literal["up", "down", "draining"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalancingConfig:
    """How requests are spread over replicas, and when one is left out."""

    beginning: int = 512  # characters of a prompt that choose its replica
    share: float = 1.25  # a replica runs at most so many times the mean of all; beyond, requests go to the least busy
    slack: int = 4  # requests that a replica may run whatever its share
    max_running: int = 128  # requests of one replica at most; where all have so many, 429
    failures: int = 3  # in a row, after which a replica is left out until it is healthy again
    recoveries: int = 1  # good health checks in a row that bring it back

    def __post_init__(self):
        require(self, "balancing", "beginning", low=1, high=2**20)
        require(self, "balancing", "share", low=1, high=100)
        for name in ("slack", "max_running", "failures", "recoveries"):
            require(self, "balancing", name, low=1, high=2**20)


@dataclasses.dataclass
class Replica:
    """What is known of one server."""

    name: str  # its address
    condition: Condition = "down"  # until its first good health check
    running: int = 0  # requests
    failures: int = 0  # in a row
    recoveries: int = 0  # in a row


class Balancer:
    """The replicas, what each of them runs, and who is next."""

    def __init__(self, names: Iterable[str], config: BalancingConfig):
        self.config = config
        self.replicas = {name: Replica(name) for name in names}

    # Who is next.

    def take(self, key: bytes | None, *, without: Collection[str] = ()) -> str | None:
        """The replica for a request, which counts as running there until `give_back`; None where none can take it.

        A key of None has no favourite: the least busy one takes it.
        """
        able = [replica for replica in self.replicas.values() if self._is_able(replica, without)]
        if not able:
            return None
        ranked = sorted(able, key=lambda replica: rank(key, replica.name) if key is not None else 0)
        chosen, least = ranked[0], min(ranked, key=lambda replica: replica.running)
        if key is None or chosen.running >= self._bound(able):
            chosen = least
        chosen.running += 1
        return chosen.name

    def give_back(self, name: str) -> None:
        """A request that the replica took has ended, in whatever way."""
        replica = self.replicas[name]
        assert replica.running > 0
        replica.running -= 1

    def favourite(self, key: bytes) -> str | None:
        """Whose cache has the key's beginning, if any replica is up: what `take` gives when nobody is busy."""
        up = [replica.name for replica in self.replicas.values() if replica.condition == "up"]
        return min(up, key=lambda name: rank(key, name), default=None)

    def any_up(self, *, without: Collection[str] = ()) -> bool:
        """Whether a replica that is not among `without` takes requests, be it full or not."""
        return any(replica.condition == "up" and replica.name not in without for replica in self.replicas.values())

    def _is_able(self, replica: Replica, without: Collection[str]) -> bool:
        is_free = replica.running < self.config.max_running
        return replica.condition == "up" and is_free and replica.name not in without

    def _bound(self, able: list[Replica]) -> int:
        """Requests that one of them may run when one more comes. The least busy one always stays within it."""
        total = sum(replica.running for replica in able) + 1
        return max(self.config.slack, math.ceil(self.config.share * total / len(able)))

    # How they are.

    def failed(self, name: str) -> bool:
        """The replica did not answer; True where it is left out from now on, and was not before."""
        replica = self.replicas[name]
        replica.failures, replica.recoveries = replica.failures + 1, 0
        if replica.condition != "up" or replica.failures < self.config.failures:
            return False
        replica.condition = "down"
        return True

    def answered(self, name: str) -> None:
        """The replica answered a request; that alone does not bring it back."""
        self.replicas[name].failures = 0

    def healthy(self, name: str) -> bool:
        """The replica's health check was good; True where that brings it back."""
        replica = self.replicas[name]
        replica.failures, replica.recoveries = 0, replica.recoveries + 1
        if replica.condition != "down" or replica.recoveries < self.config.recoveries:
            return False
        replica.condition = "up"
        return True

    def drain(self, name: str) -> None:
        """No new requests for the replica; what runs there goes on."""
        self._known(name).condition = "draining"

    def resume(self, name: str) -> None:
        """End the draining; its next good health check brings the replica back."""
        replica = self._known(name)
        if replica.condition == "draining":
            replica.condition, replica.recoveries = "down", 0

    def _known(self, name: str) -> Replica:
        if name not in self.replicas:
            raise ValueError(f"no replica {name}; there are {', '.join(self.replicas)}")
        return self.replicas[name]


def rank(key: bytes, name: str) -> int:
    """The replica of the lowest number has the key."""
    return int.from_bytes(hashlib.blake2b(name.encode() + b"\0" + key, digest_size=8).digest())


def beginning(request: Any, length: int) -> bytes | None:
    """How the prompt of a request begins, as a key; None where the request has none (or is no object at all).

    Of a conversation everything up to the first thing that the user says, which all its turns share; of any other
    prompt its first `length` characters, or as many tokens.
    """
    if not isinstance(request, dict):
        return None
    messages, prompt = request.get("messages"), request.get("prompt")
    if isinstance(messages, list) and messages:
        return opening(messages, length)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str):
        prompt = prompt[0]  # of several prompts in one request
    return text(prompt[:length]) if isinstance(prompt, str | list) and prompt else None


def opening(messages: list, length: int) -> bytes:
    """The messages up to the first of the user, cut to a length."""
    parts, room = [], length
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, message)
        part = content[:room] if isinstance(content, str) else json.dumps(content)[:room]
        parts.append(f"{role}\0{part}"[:room])
        room -= len(part)
        if role == "user" or room <= 0:
            break
    return text("\0".join(parts))


def text(beginning: Any) -> bytes:
    """Text or tokens as bytes; what is no Unicode text still has some."""
    written = beginning if isinstance(beginning, str) else json.dumps(beginning)
    return written.encode("utf-8", "surrogatepass")
