"""What the engines count, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from amed_engine.serving.http.service import Service

LABELS = ("model", "device")
# Name -> field of ServingStats, what it is.
GAUGES = {
    "amed_rows": ("rows", "Rows that the engine has."),
    "amed_rows_live": ("live", "Rows in which a sample is drawn now."),
    "amed_samples_waiting": ("waiting", "Samples that wait for a row."),
}
COUNTERS = {
    "amed_ticks": ("ticks", "Evaluations of all live rows at once."),
    "amed_tick_seconds": ("tick_seconds", "Seconds in ticks."),
    "amed_evaluations": ("evaluations", "Evaluations of live rows."),
    "amed_evaluated": ("evaluated", "Rows computed, padding and the halves of guidance included."),
    "amed_admitted": ("admitted", "Samples that were given a row."),
    "amed_completed": ("completed", "Samples that were drawn."),
    "amed_failed": ("failed", "Samples that failed."),
    "amed_cancelled": ("cancelled", "Samples that were cancelled before they were done."),
    "amed_refused": ("refused", "Samples that were refused: the queue was full, or the deadline out of reach."),
    "amed_deadline_misses": ("missed", "Samples whose deadline passed."),
    "amed_beside": ("beside", "Samples that were drawn beside the rows."),
    "amed_captures": ("captures", "Graphs captured."),
}


class Engines(Collector):
    """Asks every engine when it is asked."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        found = [((model, device), engine.stats()) for model, device, engine in self._service]
        yield from _families(GaugeMetricFamily, GAUGES, found)
        yield from _families(CounterMetricFamily, COUNTERS, found)
        by_bucket = GaugeMetricFamily("amed_bucket_seconds", "Recent mean of a tick.", labels=(*LABELS, "rows"))
        for labels, stats in found:
            for bucket, seconds in sorted(stats.bucket_seconds.items()):
                by_bucket.add_metric((*labels, str(bucket)), seconds)
        yield by_bucket


def _families(make: Callable[..., Any], table: dict[str, tuple[str, str]], found: Iterable[Any]) -> Iterator[Metric]:
    for name, (field, what) in table.items():
        family = make(name, what, labels=LABELS)
        for labels, stats in found:
            family.add_metric(labels, getattr(stats, field))
        yield family


def registry(service: Service) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(Engines(service))
    return registry
