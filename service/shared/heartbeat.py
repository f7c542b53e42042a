"""Which workers are there, and on what: a row per worker child, written again every few seconds.

For people only. Who may close an analysis is decided by lease and fence (transitions.py), never by this.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.shared.db import Analysis, AnalysisState, Worker

BEAT_S = 10.0
SILENT_AFTER = timedelta(seconds=35)  # three beats and a slow database
GONE_AFTER = timedelta(days=1)  # a worker that is silent for so long leaves the list


@dataclass(frozen=True, slots=True)
class Presence:
    """What a worker says of itself; the columns of Worker say what each means."""

    name: str
    host: str
    process: int
    parent_process: int
    device: str
    device_name: str | None
    memory_bytes: int | None
    memory_used_bytes: int | None
    model: str | None
    weights_sha256: str | None
    software_version: str


def beat(session: Session, presence: Presence, *, now: datetime) -> None:
    """The worker is there. Its first beat takes the place of the child before it, under the same parent."""
    row = session.get(Worker, presence.name)
    if row is None:
        replaced = (Worker.host == presence.host) & (Worker.parent_process == presence.parent_process)
        session.execute(delete(Worker).where(replaced | (Worker.seen_at < now - GONE_AFTER)))
        session.add(Worker(**asdict(presence), started_at=now, seen_at=now))
        return
    for key, value in asdict(presence).items():
        setattr(row, key, value)
    row.seen_at = now


def leave(session: Session, name: str) -> None:
    """The worker ends as planned and is not missed."""
    session.execute(delete(Worker).where(Worker.name == name))


def workers(session: Session, now: datetime) -> list[dict[str, Any]]:
    """Every worker by name with what it reads; `silent` when its beats stopped.

    A worker that reads and never beat (of an older version) is there too, with what is known of it.
    """
    running = {
        one.worker: one
        for one in session.scalars(select(Analysis).where(Analysis.state == AnalysisState.RUNNING))
        if one.worker is not None
    }
    known = {one.name: one for one in session.scalars(select(Worker).where(Worker.seen_at >= now - GONE_AFTER))}
    return [_row(name, known.get(name), running.get(name), now) for name in sorted(known.keys() | running.keys())]


def _row(name: str, worker: Worker | None, reads: Analysis | None, now: datetime) -> dict[str, Any]:
    lease_valid = None if reads is None else reads.lease_until is not None and reads.lease_until >= now
    return {
        "worker": name,
        "host": worker.host if worker else name.partition("/")[0],
        "device": worker.device if worker else None,
        "device_name": worker.device_name if worker else None,
        "memory_bytes": worker.memory_bytes if worker else None,
        "memory_used_bytes": worker.memory_used_bytes if worker else None,
        "model": worker.model if worker else None,
        "weights_sha256": worker.weights_sha256 if worker else None,
        "software_version": worker.software_version if worker else None,
        "started_at": worker.started_at if worker else None,
        "seen_at": worker.seen_at if worker else None,
        "silent": worker.seen_at + SILENT_AFTER < now if worker else not lease_valid,
        "analysis_id": reads.id if reads else None,
        "study_id": reads.study_id if reads else None,
        "running_s": _age_s(reads.started_at, now) if reads else None,
        "lease_valid": lease_valid,
    }


def _age_s(at: datetime | None, now: datetime) -> int | None:
    return None if at is None else max(0, round((now - at).total_seconds()))
