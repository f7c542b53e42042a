"""Refusals of the receiver -> audit, each once: who was turned away is a security event. Decides nothing.

The receiver writes files alone; this loop reads them. What is on record already says where to go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event

import structlog
from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service import refusals
from service.refusals import Refused
from service.shared import audit
from service.shared.audit import AuditKind
from service.shared.db import AuditEvent
from service.shared.log import explain_exception

ACTOR = "service/receive"
EVERY_S = 30.0
MOST = 100  # events of one round; a flood of invented AE titles becomes one more that counts the rest
FARTHEST = timedelta(days=7)  # how far back the first look goes

log = structlog.get_logger(__name__)


def record_for_ever(spool: Path, sessions: sessionmaker[Session], stop: Event) -> None:
    """Put refusals on record until `stop`."""
    while not stop.is_set():
        try:
            record(spool, sessions, now=datetime.now(UTC))
        except (OperationalError, InterfaceError) as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        except Exception as error:  # noqa: BLE001  # this loop must live; what went wrong is logged and tried again
            log.error("refusal_feed_fault", error=explain_exception(error))
        stop.wait(EVERY_S)


def record(spool: Path, sessions: sessionmaker[Session], *, now: datetime) -> int:
    """Put on record what was refused since the last time; how many events."""
    with sessions.begin() as session:
        last = session.scalar(
            select(AuditEvent.at)
            .where(AuditEvent.kind == AuditKind.ASSOCIATION_REFUSED)
            .order_by(AuditEvent.id.desc())
            .limit(1)
        )
        since = now - FARTHEST if last is None else last + timedelta(microseconds=1)
        refused = sorted(refusals.recent(spool, since), key=lambda one: one.at)
        for one in _bounded(refused):
            audit.append(
                session,
                AuditKind.ASSOCIATION_REFUSED,
                now=one.at,
                actor=ACTOR,
                calling_ae=one.calling_ae,
                called_ae=one.called_ae,
                peer_address=one.address,
                reason=one.reason,
                count=one.count,
            )
    return min(len(refused), MOST + 1)


def _bounded(refused: Sequence[Refused]) -> list[Refused]:
    if len(refused) <= MOST:
        return list(refused)
    rest = refused[MOST:]
    several = Refused(
        rest[-1].at, "", "", "", f"{len(rest)} more senders or reasons", "", sum(one.count for one in rest)
    )
    return [*refused[:MOST], several]
