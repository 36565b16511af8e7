"""What a server tells its watchers: Prometheus metrics of requests and of the engine. Knows no HTTP."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from inference.request import EngineStats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
COUNTERS = {
    "steps": "Steps of the engine",
    "prompt_tokens": "Tokens of the prompts that were let in",
    "cached_tokens": "Of these, not computed since the cache had them",
    "generated_tokens": "Tokens of answers",
    "preemptions": "Requests that had to give their blocks back and wait again",
    "drafted": "Tokens guessed ahead",
    "accepted": "Of these, right",
}


class Metrics:
    """Counts and times since the start, each server its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        histogram, counter = self._histogram, self._counter
        self._first = histogram("time_to_first_token_seconds", "From request to first token", SECONDS)
        self._token = histogram("time_per_output_token_seconds", "Between tokens after the first", PER_TOKEN)
        self._request = histogram("request_seconds", "From request to last token", SECONDS)
        self._finished = counter("requests", "Requests that ended, by how", ["finish"])
        self._responses = counter("responses", "HTTP responses", ["path", "status"])

    def first_token(self, seconds: float) -> None:
        """A request got its first token."""
        self._first.observe(seconds)

    def ended(self, finish: str, *, seconds: float, since_first: float, num_tokens: int) -> None:
        """A request ended."""
        self._finished.labels(finish).inc()
        self._request.observe(seconds)
        if num_tokens > 1:
            self._token.observe(since_first / (num_tokens - 1))

    def responded(self, path: str, status: int) -> None:
        """A response began."""
        self._responses.labels(path, str(status)).inc()

    def text(self, stats: EngineStats) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry) + generate_latest(of_engine(stats))

    def _histogram(self, name: str, note: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"meshlight_{name}", note, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, note: str, labels: list[str]) -> Counter:
        return Counter(f"meshlight_{name}", note, labels, registry=self.registry)


class Collected(Collector):
    """Metrics made when they are asked for."""

    def __init__(self, make: Callable[[], Iterator[GaugeMetricFamily | CounterMetricFamily]]):
        self._make = make

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The metrics now."""
        return self._make()


def of_engine(stats: EngineStats) -> CollectorRegistry:
    """The engine's own counts."""

    def families() -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        yield GaugeMetricFamily("meshlight_requests_waiting", "Requests in the queue", stats.waiting)
        yield GaugeMetricFamily("meshlight_requests_running", "Requests computed at once: the batch", stats.running)
        blocks = GaugeMetricFamily("meshlight_cache_blocks", "Blocks of the KV cache", labels=["state"])
        free = stats.blocks - stats.blocks_used - stats.blocks_cached
        for state, count in (("used", stats.blocks_used), ("cached", stats.blocks_cached), ("free", free)):
            blocks.add_metric([state], count)
        yield blocks
        hit_rate = stats.cached_tokens / max(1, stats.prompt_tokens)
        yield GaugeMetricFamily("meshlight_cache_hit_rate", "Part of prompt tokens that the cache had", hit_rate)
        for name, note in COUNTERS.items():
            yield CounterMetricFamily(f"meshlight_{name}", note, getattr(stats, name))

    registry = CollectorRegistry()
    registry.register(Collected(families))
    return registry
