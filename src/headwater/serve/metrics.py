"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)


class Metrics:
    """The server's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.answers = Counter("headwater_answers", "Answers, by how they ended", ["model", "finish"], registry=own)
        self.refused = Counter("headwater_refused_requests", "Requests refused", ["status"], registry=own)
        self.tokens = Counter("headwater_tokens", "Tokens read (prompt), written (completion)", ["kind"], registry=own)
        self.seconds = Histogram(
            "headwater_answer_seconds", "From request to last token", buckets=_SECONDS, registry=own
        )
        self.first = Histogram(
            "headwater_first_token_seconds", "From request to first token", buckets=_SECONDS, registry=own
        )
        self.batch = Histogram(
            "headwater_batch_rows", "Rows of a forward", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=own
        )

    def watch(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Reads the engine's two sizes whenever they are asked for."""
        Gauge("headwater_running_requests", "Requests in the batch", registry=self.registry).set_function(running)
        Gauge("headwater_waiting_requests", "Requests in the queue", registry=self.registry).set_function(waiting)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
