"""The audit -> totals for /metrics: every chained event is counted exactly once, by one loop. Knows no Prometheus.

Counting what the audit already holds needs no counter in any process: a restart loses nothing, several processes
need not agree, and a scrape reads one row. Labels are configured names and codes, never a value from outside.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from threading import Event
from typing import Any, cast

import structlog
from sqlalchemy import CursorResult, func, select, update
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service.shared.audit import AuditKind
from service.shared.db import Analysis, AuditChain, AuditEvent, Study, Tally
from service.shared.log import explain_exception
from service.shared.settings import Settings, routes

BATCH = 5000  # places of the chain per transaction
EVERY_S = 5.0
OTHER = "other"
MOST_NAMES = 32  # of steps, reasons and kinds of results; what comes later is `other`

SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0)
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

OF_ANALYSIS = (Analysis.id, Analysis.route, Analysis.revision, Analysis.queued_at, Analysis.started_at)
OF_READING = (Analysis.id, Analysis.timings_s, Analysis.counts)
OF_STUDY = (Study.id, Study.revision, Study.completed_at)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Names:
    """The configured names that may be labels."""

    sources: frozenset[str]
    routes: frozenset[str]
    destinations: frozenset[str]

    @classmethod
    def of(cls, settings: Settings) -> Names:
        return cls(
            frozenset(one.ae_title for one in settings.source),
            frozenset(one.name for one in routes(settings)),
            frozenset(one.name for one in settings.destination),
        )


@dataclass(frozen=True, slots=True)
class Fact:
    """One event of the audit, with what its row says beside it."""

    kind: str
    at: datetime
    detail: Mapping[str, Any]
    route: str | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None
    timings_s: Mapping[str, float] | None = None
    counts: Mapping[str, int] | None = None
    completed_at: datetime | None = None  # of the study, where this is a delivery of its newest revision


ARRIVALS = {
    AuditKind.INSTANCES_RECEIVED: "new",
    AuditKind.INSTANCES_RECEIVED_AGAIN: "again",
    AuditKind.INSTANCE_CONFLICT: "conflict",
    AuditKind.RESULT_RETURNED: "own-result",
}
STUDIES = {
    AuditKind.STUDY_OPENED: "opened",
    AuditKind.STUDY_REOPENED: "reopened",
    AuditKind.STUDY_COMPLETE: "complete",
    AuditKind.STUDY_UNROUTED: "unrouted",
    AuditKind.PATIENT_MISMATCH: "patient-mismatch",
    AuditKind.STUDY_FORGOTTEN: "forgotten",
    AuditKind.SPOOL_REMOVED: "spool-removed",
}
ANALYSES = {
    AuditKind.ANALYSIS_QUEUED: "queued",
    AuditKind.ANALYSIS_STARTED: "started",
    AuditKind.ANALYSIS_RETRIED: "retried",
    AuditKind.ANALYSIS_READ: "read",
    AuditKind.ANALYSIS_DONE: "done",
    AuditKind.ANALYSIS_REFUSED: "refused",
    AuditKind.ANALYSIS_FAILED: "failed",
    AuditKind.ANALYSIS_SUPERSEDED: "superseded",
    AuditKind.ANALYSIS_CANCELLED: "cancelled",
}
RESULTS = {AuditKind.RESULT_BUILT: "built", AuditKind.RESULT_QUARANTINED: "quarantined"}
DELIVERIES = {
    AuditKind.DELIVERY_DELIVERED: "delivered",
    AuditKind.DELIVERY_POSTPONED: "postponed",
    AuditKind.DELIVERY_REJECTED: "rejected",
}
SIGN_INS = {AuditKind.SIGNED_IN: "accepted", AuditKind.SIGN_IN_FAILED: "refused"}
ENDED = (AuditKind.ANALYSIS_REFUSED, AuditKind.ANALYSIS_FAILED)
COUNTED: tuple[str, ...] = tuple(
    str(kind.value)
    for kind in (*ARRIVALS, *STUDIES, *ANALYSES, *RESULTS, *DELIVERIES, *SIGN_INS, AuditKind.RECEIPT_UNUSABLE)
)


class Totals:
    """Counters and histograms by name and labels; JSON holds them between rounds."""

    def __init__(self, content: Mapping[str, Any] | None = None) -> None:
        content = content or {}
        self.counters: dict[str, dict[str, float]] = {k: dict(v) for k, v in content.get("counters", {}).items()}
        self.histograms: dict[str, dict[str, Any]] = {k: dict(v) for k, v in content.get("histograms", {}).items()}

    def to_json(self) -> dict[str, Any]:
        return {"counters": self.counters, "histograms": self.histograms}

    def add(self, name: str, *labels: str, by: float = 1) -> None:
        series = self.counters.setdefault(name, {})
        key = "\t".join(labels)
        series[key] = series.get(key, 0) + by

    def observe(self, name: str, *labels: str, value: float, bounds: tuple[float, ...] = SECONDS) -> None:
        """One observation; buckets are not cumulative, the last one is that above every bound."""
        series = self.histograms.setdefault(name, {})
        one = series.setdefault("\t".join(labels), {"buckets": [0] * (len(bounds) + 1), "sum": 0.0})
        one["buckets"][bisect_left(bounds, value)] += 1
        one["sum"] = round(one["sum"] + value, 6)

    def bounded(self, name: str, label: str) -> str:
        """The label itself while it is known or there is room for another one."""
        known = self.counters.get(name) or self.histograms.get(name) or {}
        return label if label in known or len(known) < MOST_NAMES else OTHER


def fold(totals: Totals, facts: Iterable[Fact], names: Names) -> None:
    """Add these events to the totals, in place."""
    for fact in facts:
        _fold(totals, fact, names)


def _fold(totals: Totals, fact: Fact, names: Names) -> None:
    try:
        kind = AuditKind(fact.kind)
    except ValueError:  # an event of a newer version
        return
    route = _known(fact.route, names.routes)
    if kind in ARRIVALS:
        source = _known(fact.detail.get("calling_ae"), names.sources)
        totals.add("instances", source, ARRIVALS[kind], by=int(fact.detail.get("instances", 1)))
    elif kind in STUDIES:
        totals.add("studies", STUDIES[kind])
    elif kind in ANALYSES:
        totals.add("analyses", route, ANALYSES[kind])
        if kind in ENDED:
            totals.add("reasons", totals.bounded("reasons", str(fact.detail.get("code", OTHER))))
        if kind is AuditKind.ANALYSIS_STARTED and fact.queued_at is not None and fact.detail.get("attempt") == 1:
            totals.observe("waited_seconds", route, value=_seconds(fact.queued_at, fact.at))
        if kind is AuditKind.ANALYSIS_READ:
            _fold_reading(totals, fact, route)
    elif kind in RESULTS:
        kind_of_result = totals.bounded("results", str(fact.detail.get("kind_of_result", OTHER)))
        totals.add("results", kind_of_result, RESULTS[kind])
    elif kind in DELIVERIES:
        destination = _known(fact.detail.get("destination"), names.destinations)
        totals.add("deliveries", destination, DELIVERIES[kind])
        if kind is AuditKind.DELIVERY_DELIVERED and fact.completed_at is not None:
            totals.observe("delivery_seconds", destination, value=_seconds(fact.completed_at, fact.at))
    elif kind in SIGN_INS:
        totals.add("sign_ins", SIGN_INS[kind])
    else:
        totals.add("receipts_unusable")


def _fold_reading(totals: Totals, fact: Fact, route: str) -> None:
    if fact.started_at is not None:
        totals.observe("read_seconds", route, value=_seconds(fact.started_at, fact.at))
    for step, seconds in (fact.timings_s or {}).items():
        totals.observe("step_seconds", totals.bounded("step_seconds", step), value=float(seconds))
    counts = fact.counts or {}
    for name, part, whole in (("inputs_kept", "inputs_kept", "inputs"), ("tokens_kept", "tokens_kept", "tokens_in")):
        if counts.get(whole):
            totals.observe(name, route, value=counts[part] / counts[whole], bounds=SHARES)


def _known(name: object, configured: frozenset[str]) -> str:
    return name if isinstance(name, str) and name in configured else OTHER


def _seconds(start: datetime, end: datetime) -> float:
    return max(0.0, (end - start).total_seconds())


# --- the loop -------------------------------------------------------------------------------------------------------


def tally_for_ever(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> None:
    """Count what was chained, until `stop`."""
    names = Names.of(settings)
    while not stop.is_set():
        counted = 0
        try:
            counted = tally_batch(sessions, names)
        except (OperationalError, InterfaceError) as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        except Exception as error:  # noqa: BLE001  # this loop must live; what went wrong is logged and tried again
            log.error("tally_fault", error=explain_exception(error))
        if counted < BATCH:
            stop.wait(EVERY_S)


def tally_batch(sessions: sessionmaker[Session], names: Names) -> int:
    """Count the next places of the chain, at most BATCH; how many. 0 also when somebody else counted them first."""
    with sessions() as session:
        seq, totals = read_totals(session)
        last = session.scalar(select(func.max(AuditChain.seq))) or 0
        upto = min(last, seq + BATCH)
        facts = [] if upto <= seq else _facts(session, seq, upto)
    if upto <= seq:
        return 0
    fold(totals, facts, names)
    with sessions.begin() as session:
        if seq == 0 and session.get(Tally, 1) is None:
            session.add(Tally(id=1, seq=upto, totals=totals.to_json()))
            return upto - seq
        changed = cast(
            "CursorResult[Any]",
            session.execute(
                update(Tally).where(Tally.id == 1, Tally.seq == seq).values(seq=upto, totals=totals.to_json())
            ),
        )
        return upto - seq if changed.rowcount == 1 else 0


def read_totals(session: Session) -> tuple[int, Totals]:
    """How far the chain was counted, and what it adds up to."""
    row = session.execute(select(Tally.seq, Tally.totals)).one_or_none()
    return (0, Totals()) if row is None else (row.seq, Totals(row.totals))


def _facts(session: Session, after: int, upto: int) -> list[Fact]:
    events = session.execute(
        select(AuditEvent.kind, AuditEvent.at, AuditEvent.detail, AuditEvent.study_id, AuditEvent.analysis_id)
        .join(AuditChain, AuditChain.event_id == AuditEvent.id)
        .where(AuditChain.seq > after, AuditChain.seq <= upto, AuditEvent.kind.in_(COUNTED))
        .order_by(AuditChain.seq)
    ).all()
    analyses = _rows(session, OF_ANALYSIS, {row.analysis_id for row in events if row.analysis_id is not None})
    readings = _rows(session, OF_READING, {row.analysis_id for row in events if row.kind == AuditKind.ANALYSIS_READ})
    studies = _rows(session, OF_STUDY, {row.study_id for row in events if row.kind == AuditKind.DELIVERY_DELIVERED})
    return [
        _fact(row, analyses.get(row.analysis_id), readings.get(row.analysis_id), studies.get(row.study_id))
        for row in events
    ]


def _fact(event: Any, analysis: Any, reading: Any, study: Any) -> Fact:
    newest = analysis is not None and study is not None and analysis.revision == study.revision
    return Fact(
        event.kind,
        event.at,
        event.detail or {},
        route=None if analysis is None else analysis.route,
        queued_at=None if analysis is None else analysis.queued_at,
        started_at=None if analysis is None else analysis.started_at,
        timings_s=None if reading is None else reading.timings_s,
        counts=None if reading is None else reading.counts,
        completed_at=study.completed_at if newest else None,
    )


def _rows(session: Session, columns: tuple[Any, ...], ids: set[int]) -> dict[int, Any]:
    """The rows by id, which is the first of these columns."""
    ordered = sorted(ids)
    parts = (ordered[start : start + 1000] for start in range(0, len(ordered), 1000))
    return {row[0]: row for part in parts for row in session.execute(select(*columns).where(columns[0].in_(part)))}
