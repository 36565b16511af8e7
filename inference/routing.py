"""How a router treats clients and replicas: frozen records only. Knows no network and imports no web framework."""

import dataclasses
import urllib.parse
from collections.abc import Sequence

from parallel.records import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What a router allows, and how long it waits."""

    body_limit: int = 4 * 2**20  # bytes of a request's body; more is refused with 413
    losses: int = 2  # replicas that may be lost with one request before it fails: it may be what ends them
    patience: float = 600.0  # seconds without a byte from a replica, after which it has lost the request
    connect: float = 2.0  # seconds to reach a replica
    stall: float = 60.0  # seconds in which a client neither sends nor takes anything, after which it is let go
    health_every: float = 2.0  # seconds between two health checks of a replica
    health_within: float = 2.0  # seconds in which a replica has to answer one
    drain_within: float = 60.0  # seconds after SIGTERM in which running requests may end

    def __post_init__(self):
        require(self, "router", "body_limit", low=1024, high=2**30)
        require(self, "router", "losses", low=1, high=100)
        for name in ("patience", "connect", "stall", "health_every", "health_within"):
            require(self, "router", name, low=0.01, high=86400)
        require(self, "router", "drain_within", low=0, high=86400)


def addresses(urls: Sequence[str]) -> tuple[str, ...]:
    """The replicas' addresses without a path; ValueError where one is none or comes twice.

    ["http://10.0.0.1:8000/v1/", "http://b"]  ->  ("http://10.0.0.1:8000", "http://b")
    """
    found = []
    for url in urls:
        address = url.rstrip("/").removesuffix("/v1")
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or parts.username:
            raise ValueError(f"replica {url} is no address of a server; give it as http://HOST:PORT")
        if address in found:
            raise ValueError(f"replica {address} is given twice; each server counts once")
        found.append(address)
    if not found:
        raise ValueError("no replica is given; a router needs at least one URL")
    return tuple(found)
