"""What a router counts, in the form that Prometheus reads. Knows no request and no network."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from inference.balancing import Balancer, Replica

# How a request ended. Each that came has exactly one of these, or still runs.
OUTCOMES = (
    "answered",  # whole, whatever its status
    "refused",  # replicas or this router are full or draining: 429 or 503 with Retry-After
    "unavailable",  # no replica is up
    "lost",  # replicas died with it before anything was sent: 503
    "broken",  # a replica died in the middle of the answer: an error event, or a connection cut
    "disconnected",  # the client left
    "invalid",  # too large, too slow, of no known path
    "failed",  # an error of the router itself: 500
)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class RouterCounts:
    """All counters of one router, in a registry of their own."""

    def __init__(self, balancer: Balancer):
        registry = self._registry = CollectorRegistry()
        self.came = Counter("meshlight_router_came", "Requests that came", registry=registry)
        self._ended = Counter("meshlight_router_requests", "Requests that ended", ["outcome"], registry=registry)
        self._sent = Counter("meshlight_router_sent", "Requests sent to a replica", ["replica"], registry=registry)
        self._retries = Counter(
            "meshlight_router_retries", "Requests sent to another replica", ["reason"], registry=registry
        )
        self._favoured = Counter(
            "meshlight_router_favoured", "Requests with a beginning, by whether its home took it", ["at"],
            registry=registry,
        )  # fmt: skip
        self.left_out = Counter("meshlight_router_left_out", "Replicas left out", ["replica"], registry=registry)
        self.first_byte = Histogram(
            "meshlight_router_first_byte_seconds", "From a request to the first byte of its answer", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        running = Gauge("meshlight_router_running", "Requests that a replica runs", ["replica"], registry=registry)
        up = Gauge("meshlight_router_up", "Whether a replica takes requests", ["replica"], registry=registry)
        for outcome in OUTCOMES:
            self._ended.labels(outcome)
        for replica in balancer.replicas.values():
            self._sent.labels(replica.name)
            running.labels(replica.name).set_function(lambda replica=replica: replica.running)
            up.labels(replica.name).set_function(lambda replica=replica: is_up(replica))

    def ended(self, outcome: str) -> None:
        """A request has ended so."""
        assert outcome in OUTCOMES
        self._ended.labels(outcome).inc()

    def sent(self, replica: str, favourite: str | None) -> None:
        """A request goes to a replica; its cache has the beginning where it is the favourite."""
        self._sent.labels(replica).inc()
        if favourite is not None:
            self._favoured.labels("home" if replica == favourite else "elsewhere").inc()

    def retried(self, reason: str) -> None:
        """A replica did not take a request, or lost it, and the next one is asked."""
        self._retries.labels(reason).inc()

    def exposition(self) -> bytes:
        """All of it as text."""
        return generate_latest(self._registry)


def is_up(replica: Replica) -> int:
    """1 or 0, as gauges have it."""
    return int(replica.condition == "up")


def total(exposition: bytes, name: str, labels: Iterable[str] = ()) -> float:
    """The sum of the samples of a name that have all these labels, as `outcome="lost"`."""
    lines = [line for line in exposition.decode().splitlines() if line.startswith((name + "{", name + " "))]
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in labels))
