"""What the service tells Prometheus. Every app has its own registry, so that two in one process do not mix."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from service.problems import all_problems

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Telemetry:
    """The metrics. No label takes a value from a client, so the number of series is bounded."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("twogate_requests", "Requests answered", ["route", "method", "code"], registry=registry)
        self.request_seconds = Histogram(
            "twogate_request_seconds",
            "From the first byte to the answer",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.images_in_flight = Gauge("twogate_images_in_flight", "Images admitted, not yet answered", registry=registry)
        self.body_bytes_in_flight = Gauge(
            "twogate_body_bytes_in_flight", "Body bytes held by all requests", registry=registry
        )
        self.queue_images = Gauge("twogate_queue_images", "Images decoded, waiting for a forward", registry=registry)
        self.queue_wait_seconds = Histogram(
            "twogate_queue_wait_seconds", "One image's wait for a forward", buckets=_SECONDS, registry=registry
        )
        self.decode_seconds = Histogram(
            "twogate_decode_seconds", "Decoding of one image", buckets=_SECONDS, registry=registry
        )
        self.batch_images = Histogram(
            "twogate_batch_images", "Images in one forward", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.inference_seconds = Histogram("twogate_inference_seconds", "One forward", buckets=_SECONDS, registry=registry)
        self.forward_failures = Counter("twogate_forward_failures", "Forwards that failed", registry=registry)
        self.batcher_restarts = Counter(
            "twogate_batcher_restarts", "Times the batcher had to be restarted", registry=registry
        )
        self.verdicts = Counter("twogate_verdicts", "Images judged", ["flagged"], registry=registry)
        self.p_value = Histogram(
            "twogate_p_value",
            "p-values of the images judged: even on clean traffic, piled up at 0 under attack",
            buckets=(0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1),
            registry=registry,
        )
        self.rejects = Counter(
            "twogate_rejects", "Requests not answered with a result, by problem type", ["reason"], registry=registry
        )
        # From the start: Prometheus sees no rise in a series that begins with it.
        for flagged in ("true", "false"):
            self.verdicts.labels(flagged)
        for kind in all_problems():
            self.rejects.labels(kind.name)
        self.model = Info("twogate_model", "What is served", registry=registry)
        self.provider = Info("twogate_provider", "Where the graph really runs", registry=registry)
        self.ready = Gauge("twogate_ready", "1 while /health/ready answers 200", registry=registry)
        self.last_success = Gauge(
            "twogate_last_success_timestamp_seconds", "When a forward last succeeded, Unix time", registry=registry
        )

    def judged(self, p_value: float, flagged: bool) -> None:
        """Count one verdict."""
        self.verdicts.labels(str(flagged).lower()).inc()
        self.p_value.observe(p_value)

    def forward(self, images: int, seconds: float) -> None:
        """Count one successful forward."""
        self.batch_images.observe(images)
        self.inference_seconds.observe(seconds)
        self.last_success.set(time.time())
