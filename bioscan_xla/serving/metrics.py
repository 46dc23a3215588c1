"""What the server counts, for Prometheus.

Input: requests and batches as they end. Output: the text that Prometheus reads.
Invariants: labels have few values, none of them from a client.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_FILL = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "bioscan_requests", "Requests", ["endpoint", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "bioscan_request_seconds",
            "From the first byte of a request to the last of its answer",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.sequences = Counter(
            "bioscan_sequences", "Sequences answered", ["endpoint"], registry=self.registry
        )
        self.tokens = Counter("bioscan_tokens", "Tokens computed", registry=self.registry)
        self.batches = Counter("bioscan_batches", "Batches computed", registry=self.registry)
        self.device_seconds = Counter(
            "bioscan_device_seconds", "Time that the device was busy", registry=self.registry
        )
        self.fill = Histogram(
            "bioscan_batch_fill",
            "Tokens of a batch over the most it can hold",
            buckets=_FILL,
            registry=self.registry,
        )
        self.queue_tokens = Gauge(
            "bioscan_queue_tokens", "Tokens in the queue", registry=self.registry
        )
        self.queue_requests = Gauge(
            "bioscan_queue_requests", "Requests in the queue", registry=self.registry
        )
        self.models = Gauge("bioscan_models", "Versions of models held", registry=self.registry)

    def count_batch(self, tokens: int, fill: float, seconds: float) -> None:
        """Count a batch that the device has computed."""
        self.tokens.inc(tokens)
        self.batches.inc()
        self.device_seconds.inc(seconds)
        self.fill.observe(fill)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
