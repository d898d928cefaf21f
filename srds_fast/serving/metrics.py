"""Metrics of a server, in the text format of Prometheus; with Ray they are also exported as those of Ray itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .contract import Usage

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
# status of a request whose client did not wait for the answer: no such answer is sent, and nginx counts it so
CLIENT_LEFT = 499
# values of one label that are told apart: plans and reasons are sentences, which may hold numbers
MOST_VALUES, MOST_CHARS, OTHER = 32, 160, "other"


@dataclass(frozen=True)
class Measure:
    """What is measured. kind: "counter", "gauge" or "histogram", which alone has buckets."""

    kind: str
    about: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


MEASURES = {
    "srds_fast_requests": Measure("counter", f"Requests, by HTTP status; {CLIENT_LEFT}: the client left.", ("status",)),
    "srds_fast_request_seconds": Measure("histogram", "From the arrival of a request to its end.", buckets=SECONDS),
    "srds_fast_queue_seconds": Measure("histogram", "How long answered requests had waited.", buckets=SECONDS),
    "srds_fast_queue_length": Measure("gauge", "Requests that wait."),
    "srds_fast_running_calls": Measure("gauge", "Calls that run."),
    "srds_fast_slots": Measure("gauge", "Calls that may run at once."),
    "srds_fast_calls": Measure("counter", "Calls, by how they were to sample and by what ran.", ("way", "plan")),
    "srds_fast_batch": Measure("histogram", "Requests that shared a call.", buckets=COUNTS),
    "srds_fast_waves": Measure("histogram", "Batched network calls of a call.", buckets=COUNTS),
    "srds_fast_rows": Measure("histogram", "Rows of a call.", buckets=COUNTS),
    "srds_fast_fallbacks": Measure("counter", "Calls that did not run parallel in time, by reason.", ("reason",)),
    "srds_fast_warmup_seconds": Measure("gauge", "What the warm-up took, by images of a call.", ("images",)),
    "srds_fast_tolerance_misses": Measure("counter", "Samples that may be beyond the tolerance."),
}


class Metrics:
    """Counts what a server does.

    Args:
        with_ray: export all of it through Ray too, whose agents Prometheus reads.

    Raises:
        ImportError: prometheus_client is not installed, or Ray with `with_ray`.
    """

    def __init__(self, *, with_ray: bool = False) -> None:
        from prometheus_client import CollectorRegistry

        self._registry = CollectorRegistry()
        self._sinks = [{name: _prometheus(name, each, self._registry) for name, each in MEASURES.items()}]
        if with_ray:
            self._sinks.append({name: _ray(name, each) for name, each in MEASURES.items()})
        self._values: dict[str, set[str]] = {}

    def answered(self, status: int, seconds: float) -> None:
        """A request has ended, so long after its arrival."""
        self._add("srds_fast_requests", 1, status=str(status))
        self._observe("srds_fast_request_seconds", seconds)

    def made(self, usage: Usage, way: str, *, first: bool) -> None:
        """Images of a request were made.

        way: how its call was to sample. first: it is the first request of its call, for which the call is counted.
        """
        self._observe("srds_fast_queue_seconds", usage.queued_seconds)
        if first:
            self._add("srds_fast_calls", 1, way=way, plan=usage.plan)
            self._observe("srds_fast_batch", usage.batch)
            self._observe("srds_fast_waves", usage.waves)
            self._observe("srds_fast_rows", usage.rows)
            self._add("srds_fast_tolerance_misses", usage.missed)
            if usage.fallback is not None:
                self._add("srds_fast_fallbacks", 1, reason=usage.fallback)

    def queue(self, length: int, running: int, slots: int) -> None:
        """So many requests wait, so many calls run, and so many may."""
        for name, value in (("queue_length", length), ("running_calls", running), ("slots", slots)):
            for sink in self._sinks:
                sink[f"srds_fast_{name}"].set(value, {})

    def warmed(self, single: float, shared: float) -> None:
        """What the warm-up took: of calls for one image, and of those for several."""
        for images, seconds in (("one", single), ("several", shared)):
            for sink in self._sinks:
                sink["srds_fast_warmup_seconds"].set(seconds, {"images": images})

    def text(self) -> str:
        """All of it, as Prometheus reads it."""
        from prometheus_client import generate_latest

        return str(generate_latest(self._registry), "utf-8")

    def _add(self, name: str, amount: float, **labels: str) -> None:
        labels = {label: self._bounded(f"{name} {label}", value) for label, value in labels.items()}
        for sink in self._sinks:
            sink[name].add(amount, labels)

    def _observe(self, name: str, value: float) -> None:
        for sink in self._sinks:
            sink[name].observe(value)

    def _bounded(self, label: str, value: str) -> str:
        value = value[:MOST_CHARS]
        known = self._values.setdefault(label, set())
        if value not in known and len(known) >= MOST_VALUES:
            return OTHER
        known.add(value)
        return value


class _Sink:
    """One measure of one library. Both libraries know the same kinds and name some methods otherwise."""

    def __init__(self, metric: Any, *, ray: bool) -> None:
        self._metric, self._ray = metric, ray

    def add(self, amount: float, labels: dict[str, str]) -> None:
        if amount <= 0:  # Ray takes no zeros
            return
        if self._ray:
            self._metric.inc(amount, tags=labels)
        else:
            (self._metric.labels(**labels) if labels else self._metric).inc(amount)

    def set(self, value: float, labels: dict[str, str]) -> None:
        if self._ray:
            self._metric.set(value, tags=labels)
        else:
            (self._metric.labels(**labels) if labels else self._metric).set(value)

    def observe(self, value: float) -> None:
        self._metric.observe(value)


def _prometheus(name: str, measure: Measure, registry: Any) -> _Sink:
    import prometheus_client

    kinds = {
        "counter": prometheus_client.Counter,
        "gauge": prometheus_client.Gauge,
        "histogram": prometheus_client.Histogram,
    }
    more = {"buckets": measure.buckets} if measure.buckets else {}
    return _Sink(kinds[measure.kind](name, measure.about, measure.labels, registry=registry, **more), ray=False)


def _ray(name: str, measure: Measure) -> _Sink:
    from ray.util import metrics

    if measure.kind == "histogram":
        return _Sink(metrics.Histogram(name, measure.about, boundaries=list(measure.buckets)), ray=True)
    made = metrics.Counter if measure.kind == "counter" else metrics.Gauge
    return _Sink(made(name, measure.about, tag_keys=measure.labels), ray=True)
