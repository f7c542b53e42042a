"""Audit -> repository: every chained event as DICOM audit messages, in the order of the chain, none left out.

The audit in the database is the spool: what an outage keeps back stays there, append-only, and how far the
repository got is one number in a file. So nothing about a patient lies in a second place, and what was forgotten
meanwhile is sent without the patient.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Event as Signal
from typing import Any

import structlog
from sqlalchemy import func, select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service import atna
from service.atna import Event, Node, Peer, StudyObject
from service.chain import Head
from service.shared.db import AuditChain, AuditEvent, Instance, Result, Study, StudyHeader
from service.shared.durable import make_folder, write_durably
from service.shared.log import explain_exception
from service.shared.settings import Settings
from service.syslog_tls import HEAD_ID, MESSAGE_ID, Message, NotSent, send

BATCH = 200  # events per connection

log = structlog.get_logger(__name__)


def feed_for_ever(settings: Settings, sessions: sessionmaker[Session], node: Node, stop: Signal) -> None:
    """Send what was chained until `stop`; an outage is logged once and survived."""
    away = False
    while not stop.is_set():
        sent = 0
        try:
            sent = feed(settings, sessions, node)
            if away and sent:
                log.info("audit_repository_back", host=settings.audit.syslog_host)
            away = away and not sent
        except NotSent as error:
            if not away:
                log.error("audit_repository_away", host=settings.audit.syslog_host, reason=str(error))
            away = True
        except (OperationalError, InterfaceError) as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        except Exception as error:  # noqa: BLE001  # this loop must live; what went wrong is logged and tried again
            log.error("audit_feed_fault", error=explain_exception(error))
        if sent < BATCH:
            stop.wait(settings.audit.syslog_interval_s)


def feed(settings: Settings, sessions: sessionmaker[Session], node: Node) -> int:
    """Send the next events, at most BATCH; how many. Raises NotSent, and then all of them go again."""
    cursor = cursor_file(settings)
    reached = _reached(cursor)
    with sessions() as session:
        rows = session.execute(
            select(AuditChain.seq, AuditChain.hash, AuditEvent)
            .join(AuditEvent, AuditEvent.id == AuditChain.event_id)
            .where(AuditChain.seq > reached)
            .order_by(AuditChain.seq)
            .limit(BATCH)
        ).all()
        outgoing = [
            Message(event.at, MESSAGE_ID, text)
            for _, _, event in rows
            for text in atna.messages(_described(session, event, settings), node)
        ]
    if not rows:
        return 0
    if outgoing:
        head = Head(rows[-1].seq, rows[-1].hash, datetime.now(UTC))  # the chain as far as this batch vouches for it
        send(settings.audit, [*outgoing, Message(head.at, HEAD_ID, head.to_json().encode())])
    make_folder(cursor.parent)
    write_durably(cursor, json.dumps({"seq": rows[-1].seq}).encode())
    return len(rows)


def cursor_file(settings: Settings) -> Path:
    """How far the repository got; removing it sends everything again."""
    return settings.data.path / "audit" / "syslog.json"


def _reached(cursor: Path) -> int:
    return int(json.loads(cursor.read_bytes())["seq"]) if cursor.exists() else 0


def _described(session: Session, event: AuditEvent, settings: Settings) -> Event:
    result = None if event.result_id is None else session.get(Result, event.result_id)
    return Event(
        event.kind,
        event.at,
        event.actor,
        event.detail,
        _study(session, event),
        _peer(event.detail, settings),
        series_uid=result.series_uid if result else "",
        sop_instance_uid=result.sop_instance_uid if result else "",
    )


def _peer(detail: dict[str, Any], settings: Settings) -> Peer | None:
    """The sender of what was received, or the destination of what was sent."""
    if "calling_ae" in detail:
        return Peer(str(detail["calling_ae"]), str(detail.get("peer_address", "")))
    for one in settings.destination:
        if one.name == detail.get("destination"):
            return Peer(one.ae_title, one.host)
    return Peer(str(detail["destination"]), "") if "destination" in detail else None


def _study(session: Session, event: AuditEvent) -> StudyObject | None:
    study = None if event.study_id is None else session.get(Study, event.study_id)
    if study is None:
        return None
    header = session.get(StudyHeader, study.id)
    return StudyObject(
        study.study_uid,
        accession_number=header.accession_number if header else "",
        patient_id=header.patient_id if header else "",
        patient_name=header.patient_name if header else "",
        sop_classes=_sop_classes(session, event),
    )


def _sop_classes(session: Session, event: AuditEvent) -> tuple[tuple[str, int], ...]:
    """Of the result the event names, else of the study's instances."""
    if event.result_id is not None:
        result = session.get(Result, event.result_id)
        return () if result is None else ((result.sop_class_uid, 1),)
    counted: Sequence[Any] = session.execute(
        select(Instance.sop_class_uid, func.count())
        .where(Instance.study_id == event.study_id)
        .group_by(Instance.sop_class_uid)
        .order_by(Instance.sop_class_uid)
    ).all()
    return tuple((uid, int(count)) for uid, count in counted)
