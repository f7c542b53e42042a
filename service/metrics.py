"""Situation and totals -> Prometheus metrics. No patient data; every label is a configured name or a code of ours.

Totals come from the audit (tally.py), so that they survive restarts and are the same whichever process is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from service.shared import VERSION
from service.situation import Situation
from service.tally import ANALYSES, ARRIVALS, DELIVERIES, OTHER, SECONDS, SHARES, Names, Totals

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "medpruner_"

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "instances": ("Instances received, by source and what they were.", ("source", "arrival")),
    "studies": ("What happened to studies.", ("event",)),
    "analyses": ("What happened to analyses, by route.", ("route", "event")),
    "reasons": ("Why analyses were refused or failed.", ("code",)),
    "results": ("Results built or quarantined, by kind.", ("kind", "event")),
    "deliveries": ("Ends of delivery attempts, by destination.", ("destination", "event")),
    "sign_ins": ("Sign-ins of the web.", ("outcome",)),
    "receipts_unusable": ("Receipts whose instance could not be used.", ()),
}
HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "waited_seconds": ("From queued to the first attempt.", ("route",), SECONDS),
    "read_seconds": ("From the start of the last attempt to its output.", ("route",), SECONDS),
    "step_seconds": ("Time of each step of reading.", ("step",), SECONDS),
    "delivery_seconds": ("From a study's completion to its result's delivery.", ("destination",), SECONDS),
    "inputs_kept": ("Share of the model's inputs that the slice stage kept.", ("route",), SHARES),
    "tokens_kept": ("Share of the visual tokens that pruning kept.", ("route",), SHARES),
}


def exposition(situation: Situation, totals: Totals, names: Names) -> bytes:
    """Everything in the text format of Prometheus."""
    registry = CollectorRegistry()
    registry.register(_Collected([*gauges(situation, names), *counted(totals, names)]))
    return bytes(generate_latest(registry))


class _Collected(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def gauges(now: Situation, names: Names) -> Iterator[Metric]:
    """How it stands."""
    yield _gauge("build_info", "The version that answers.", ("version",), {(VERSION,): 1})
    yield _gauge("studies_receiving", "Studies that images may still come for.", (), {(): now.receiving})
    yield _gauge("studies_held", "Studies rebuilt from the spool that wait for a command.", (), {(): now.held})
    yield _gauge("analyses_open", "Analyses not finished.", ("state",), {(k,): v for k, v in now.analyses.items()})
    yield _gauge(
        "oldest_unfinished_seconds",
        "Age of the oldest analysis that is not finished; 0 without any.",
        (),
        {(): _age(now.now, now.oldest_unfinished_at)},
    )
    yield _gauge("analyses_failed_day", "Failed within a day and not resumed.", (), {(): now.failed})
    yield _gauge("studies_quarantined", "Studies with a result that did not pass the gate.", (), {(): now.quarantined})
    yield _gauge("workers", "Workers that are there.", (), {(): now.workers})
    yield _gauge("workers_reading", "Workers that read a study now.", (), {(): now.workers_reading})
    yield from _of_destinations(now, names)
    yield _gauge("audit_chain_events", "Events that have their place in the hash chain.", (), {(): now.chained})
    yield _gauge("audit_chain_lag_events", "Events that wait for their place.", (), {(): now.chain_waiting})
    yield _gauge(
        "audit_chain_lag_seconds",
        "Age of the oldest event that waits for its place.",
        (),
        {(): _age(now.now, now.chain_waiting_since)},
    )
    yield _gauge(
        "tally_lag_events",
        "Chained events that the totals here do not count yet.",
        (),
        {(): max(0, now.chained - now.tallied)},
    )
    folders = now.folders.items()
    yield _gauge("disk_free_bytes", "Free space.", ("folder",), {(k,): v.free_bytes for k, v in folders})
    yield _gauge("disk_total_bytes", "Size of the file system.", ("folder",), {(k,): v.total_bytes for k, v in folders})
    yield _gauge("receipts_waiting", "Received instances that ingest has not taken.", (), {(): now.receipts_waiting})
    yield _gauge(
        "oldest_receipt_seconds",
        "Age of the oldest of them.",
        (),
        {(): _age(now.now, now.oldest_receipt_at)},
    )
    yield _gauge("associations_open", "Open associations that have brought instances.", (), {(): now.associations})
    yield _gauge("refused_hour", "Associations and instances refused within an hour.", (), {(): now.refused})
    days = {(key,): days for key, days in now.certificates.items() if days is not None}
    yield _gauge("certificate_days", "Days that a certificate of ours is still valid.", ("key",), days)
    unreadable = {(key,): float(days is None) for key, days in now.certificates.items()}
    yield _gauge("certificate_unreadable", "1: the certificate cannot be read.", ("key",), unreadable)


def _of_destinations(now: Situation, names: Names) -> Iterator[Metric]:
    counts = {(name, state): 0.0 for name in names.destinations for state in ("pending", "rejected")}
    oldest = dict.fromkeys(((name,) for name in names.destinations), 0.0)
    for (destination, state), waiting in now.deliveries.items():
        name = destination if destination in names.destinations else OTHER
        counts[name, state] = counts.get((name, state), 0) + waiting.count
        if state == "pending" and waiting.oldest_at is not None:
            age = _age(now.now, waiting.oldest_at)
            oldest[(name,)] = max(oldest.get((name,), 0.0), age)
    yield _gauge("deliveries_waiting", "Deliveries pending or rejected.", ("destination", "state"), counts)
    yield _gauge("delivery_oldest_seconds", "Age of the oldest pending delivery.", ("destination",), oldest)
    paused = {(name,): float(name in now.paused) for name in names.destinations}
    yield _gauge("destination_paused", "1: paused by a command.", ("destination",), paused)


def counted(totals: Totals, names: Names) -> Iterator[Metric]:
    """What happened since the first event of the audit."""
    zeros: dict[str, list[str]] = {
        "instances": [f"{name}\t{arrival}" for name in names.sources for arrival in ARRIVALS.values()],
        "analyses": [f"{name}\t{event}" for name in names.routes for event in ANALYSES.values()],
        "deliveries": [f"{name}\t{event}" for name in names.destinations for event in DELIVERIES.values()],
        "receipts_unusable": [""],
    }
    for name, (words, labels) in COUNTERS.items():
        counter = CounterMetricFamily(PREFIX + name, words, labels=labels)
        series = dict.fromkeys(zeros.get(name, ()), 0.0) | totals.counters.get(name, {})
        for key, value in sorted(series.items()):
            counter.add_metric(key.split("\t") if labels else [], value)
        yield counter
    for name, (words, labels, bounds) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(PREFIX + name, words, labels=labels)
        for key, one in sorted(totals.histograms.get(name, {}).items()):
            edges = [*map(floatToGoString, bounds), "+Inf"]
            buckets = list(zip(edges, accumulate(one["buckets"]), strict=True))
            histogram.add_metric(key.split("\t"), buckets, one["sum"])
        yield histogram


def _gauge(name: str, words: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, words, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(list(key), value)
    return family


def _age(now: datetime, since: datetime | None) -> float:
    return 0.0 if since is None else max(0.0, round((now - since).total_seconds(), 1))
