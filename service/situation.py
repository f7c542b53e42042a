"""How everything stands at this moment, as numbers: for /metrics, for alerts, for the front page. Reads only.

Cheap at a million analyses: whatever is asked of the database is a handful of rows behind an index. Names no patient.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service import chain, refusals
from service.certificates import CertificateError, expiry
from service.refusals import Refused
from service.shared.db import (
    Acquisition,
    Analysis,
    AnalysisState,
    Delivery,
    DeliveryState,
    Destination,
    Result,
    ResultState,
    Study,
    StudyState,
    Tally,
    Worker,
)
from service.shared.heartbeat import SILENT_AFTER
from service.shared.settings import Settings, leaves, spool_folder
from service.spool import HEARTBEAT_STALE_S, waiting

OPEN = (AnalysisState.QUEUED, AnalysisState.RUNNING, AnalysisState.READ)
WAITING = (DeliveryState.PENDING, DeliveryState.REJECTED)
LATELY = timedelta(days=1)
MOST_NAMED = 10  # rows that an alert names


@dataclass(frozen=True, slots=True)
class Waiting:
    """Deliveries to one destination in one state."""

    count: int
    oldest_at: datetime | None


@dataclass(frozen=True, slots=True)
class Folder:
    """The file system that one of our folders lies on."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """What pruning kept of the tokens of one scanner and protocol by one method, lately and before."""

    scanner: str
    protocol: str
    method: str
    recent_analyses: int
    recent: float
    before_analyses: int
    before: float
    study_id: int  # the newest of the recent ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """One look. `*_ids`: row numbers as `history` prints them, the first few."""

    now: datetime
    receiving: int
    held: int
    mismatched_ids: tuple[int, ...] = ()  # studies whose instances name different patients, of the last day
    analyses: Mapping[str, int] = field(default_factory=dict)  # queued, running, read
    oldest_unfinished_at: datetime | None = None
    oldest_unfinished_ids: tuple[int, ...] = ()  # studies
    failed: int = 0  # within the last day, not resumed
    failed_ids: tuple[int, ...] = ()  # studies
    quarantined: int = 0
    quarantined_ids: tuple[int, ...] = ()  # studies
    workers: int = 0  # that are there
    workers_reading: int = 0  # that hold a valid lease
    deliveries: Mapping[tuple[str, str], Waiting] = field(default_factory=dict)  # destination, state
    paused: frozenset[str] = frozenset()
    chained: int = 0
    chain_waiting: int = 0
    chain_waiting_since: datetime | None = None
    tallied: int = 0
    folders: Mapping[str, Folder] = field(default_factory=dict)
    receipts_waiting: int = 0
    oldest_receipt_at: datetime | None = None
    associations: int = 0
    refused: int = 0  # associations, connections and instances, within the last hour
    refused_by: tuple[tuple[str, int], ...] = ()  # reason and how often, the most frequent first
    certificates: Mapping[str, float | None] = field(default_factory=dict)  # key -> days left; None: unreadable
    shares: Sequence[Share] = ()


def look(session: Session, settings: Settings, now: datetime, *, with_shares: bool = False) -> Situation:
    """How it stands. with_shares: also what pruning kept, per scanner and protocol, which costs more."""
    since = now - LATELY
    oldest = session.execute(
        select(Analysis.study_id, Analysis.queued_at)
        .where(Analysis.state.in_(OPEN))
        .order_by(Analysis.queued_at)
        .limit(MOST_NAMED)
    ).all()
    failed = select(Analysis.study_id).where(
        Analysis.state == AnalysisState.FAILED, Analysis.finished_at.is_not(None), Analysis.finished_at >= since
    )
    quarantined = (
        select(Analysis.study_id)
        .join(Result, Result.analysis_id == Analysis.id)
        .where(Result.state == ResultState.QUARANTINED, Analysis.state == AnalysisState.READ)
        .distinct()
    )
    mismatched = select(Study.id).where(Study.patient_mismatch.is_(True), Study.last_image_at >= since)
    behind = chain.lag(session)
    spool = spool_folder(settings)
    receipts, oldest_receipt = _waiting(spool)
    refused = refusals.recent(spool, now - timedelta(hours=1))
    return Situation(
        now=now,
        receiving=_count(session, select(Study.id).where(Study.state == StudyState.RECEIVING)),
        held=_count(session, select(Study.id).where(Study.held)),
        mismatched_ids=tuple(session.scalars(mismatched.order_by(Study.id).limit(MOST_NAMED))),
        analyses=_states(session),
        oldest_unfinished_at=oldest[0].queued_at if oldest else None,
        oldest_unfinished_ids=tuple(dict.fromkeys(row.study_id for row in oldest)),
        failed=_count(session, failed),
        failed_ids=tuple(session.scalars(failed.order_by(Analysis.id.desc()).limit(MOST_NAMED))),
        quarantined=_count(session, quarantined),
        quarantined_ids=tuple(session.scalars(quarantined.limit(MOST_NAMED))),
        workers=_count(session, select(Worker.name).where(Worker.seen_at >= now - SILENT_AFTER)),
        workers_reading=session.scalar(
            select(func.count(func.distinct(Analysis.worker))).where(
                Analysis.state == AnalysisState.RUNNING, Analysis.lease_until >= now
            )
        )
        or 0,
        deliveries=_deliveries(session),
        paused=frozenset(session.scalars(select(Destination.name).where(Destination.paused.is_(True)))),
        chained=behind.chained,
        chain_waiting=behind.waiting,
        chain_waiting_since=behind.oldest_waiting_at,
        tallied=session.scalar(select(Tally.seq)) or 0,
        folders={name: _folder(path) for name, path in (("spool", spool), ("data", settings.data.path))},
        receipts_waiting=receipts,
        oldest_receipt_at=None if oldest_receipt is None else datetime.fromtimestamp(oldest_receipt, UTC),
        associations=_associations(spool, now),
        refused=sum(one.count for one in refused),
        refused_by=_by_reason(refused),
        certificates=certificates(settings, now),
        shares=shares(session, settings, now) if with_shares else (),
    )


def shares(session: Session, settings: Settings, now: datetime) -> list[Share]:
    """What pruning kept per scanner and protocol: over the last drift_days, and over the four times as long before."""
    days = timedelta(days=settings.alerts.drift_days)

    def kept(start: datetime, end: datetime) -> dict[tuple[str, str, str], tuple[int, float, int]]:
        rows = session.execute(
            select(
                Acquisition.scanner,
                Acquisition.protocol,
                Acquisition.method,
                func.count(),
                func.sum(Acquisition.tokens_kept),
                func.sum(Acquisition.tokens_in),
                func.max(Acquisition.analysis_id),
            )
            .where(Acquisition.at >= start, Acquisition.at < end, Acquisition.tokens_in > 0)
            .group_by(Acquisition.scanner, Acquisition.protocol, Acquisition.method)
        )
        return {(row[0], row[1], row[2]): (row[3], float(row[4]) / float(row[5]), row[6]) for row in rows}

    recent, before = kept(now - days, now), kept(now - 5 * days, now - days)
    both = sorted(recent.keys() & before.keys())
    newest = [recent[key][2] for key in both]
    found = session.execute(select(Analysis.id, Analysis.study_id).where(Analysis.id.in_(newest))).all()
    studies = {row.id: row.study_id for row in found}
    return [
        Share(*key, recent_analyses=recent[key][0], recent=recent[key][1],
              before_analyses=before[key][0], before=before[key][1], study_id=studies[recent[key][2]])
        for key in both
    ]  # fmt: skip


def _states(session: Session) -> dict[str, int]:
    rows = session.execute(
        select(Analysis.state, func.count()).where(Analysis.state.in_(OPEN)).group_by(Analysis.state)
    )
    counted = {state.value: count for state, count in rows}
    return {state.value: counted.get(state.value, 0) for state in OPEN}


def _deliveries(session: Session) -> dict[tuple[str, str], Waiting]:
    rows = session.execute(
        select(Delivery.destination, Delivery.state, func.count(), func.min(Delivery.created_at))
        .where(Delivery.state.in_(WAITING))
        .group_by(Delivery.destination, Delivery.state)
    )
    return {(destination, state.value): Waiting(count, oldest) for destination, state, count, oldest in rows}


def _count(session: Session, query: Any) -> int:
    return session.scalar(select(func.count()).select_from(query.subquery())) or 0


def _folder(path: Path) -> Folder:
    there = next(one for one in (path, *path.resolve().parents) if one.exists())
    usage = shutil.disk_usage(there)
    return Folder(usage.free, usage.total)


def _waiting(folder: Path) -> tuple[int, float | None]:
    """Instances that ingest has not taken yet, and when the oldest of them was written."""
    try:
        paths = waiting(folder)
    except FileNotFoundError:  # no receiver has run yet
        return 0, None
    written = []
    for path in paths:
        with suppress(FileNotFoundError):  # taken meanwhile
            written.append(path.stat().st_mtime)
    return len(written), min(written, default=None)


def _by_reason(refused: Sequence[Refused]) -> tuple[tuple[str, int], ...]:
    counted: Counter[str] = Counter()
    for one in refused:
        counted[one.reason] += one.count
    return tuple(counted.most_common(MOST_NAMED))


def certificates(settings: Settings, now: datetime) -> dict[str, float | None]:
    """Days left of every certificate of ours that the configuration names, by its key."""
    found: dict[str, float | None] = {}
    for key, value in leaves(settings):
        if not key.endswith("certificate") or not isinstance(value, str):
            continue
        try:
            found[key] = expiry(Path(value)).days_left(now)
        except CertificateError:
            found[key] = None
    return found


def _associations(spool: Path, now: datetime) -> int:
    """Open associations that have brought instances: their heartbeats are fresh."""
    fresh = 0
    for path in (spool / "associations").glob("*.json"):
        try:
            fresh += now.timestamp() - path.stat().st_mtime <= HEARTBEAT_STALE_S
        except FileNotFoundError:  # closed meanwhile
            continue
    return fresh
