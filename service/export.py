"""The audit for other programs: events by time, study, sender and destination, as JSON Lines or CSV. Reads only.

Every event comes with its place in the chain and the hash there, so that whoever holds an export and an exported
head can tell later whether both speak of the same history. The time is that of the event, UTC.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, TextIO

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from service.shared.db import AuditChain, AuditEvent, Instance, Study

PAGE = 5000
COLUMNS = (
    "id",
    "at",
    "kind",
    "actor",
    "study_id",
    "analysis_id",
    "result_id",
    "delivery_id",
    "detail",
    "vouches_sha256",
    "seq",
    "hash",
    "study_uid",
)


class Format(StrEnum):
    JSONL = "jsonl"  # one JSON object a line
    CSV = "csv"  # RFC 4180, with a header line; `detail` is JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which events; None does not restrict."""

    since: datetime | None = None
    until: datetime | None = None  # exclusive
    study_id: int | None = None
    sender: str | None = None  # AE title: everything about the studies of which it sent an instance
    destination: str | None = None  # deliveries to it, and what was done to it


def events(session: Session, selection: Selection) -> Iterator[dict[str, Any]]:
    """The chosen events by id, each as COLUMNS; memory does not grow with their number."""
    query: Select[AuditEvent, int, str, str] = (
        select(AuditEvent, AuditChain.seq, AuditChain.hash, Study.study_uid)
        .outerjoin(AuditChain, AuditChain.event_id == AuditEvent.id)
        .outerjoin(Study, Study.id == AuditEvent.study_id)
        .order_by(AuditEvent.id)
        .limit(PAGE)
    )
    query = _restricted(query, selection)
    after = 0
    while rows := session.execute(query.where(AuditEvent.id > after)).all():
        for event, seq, link, study_uid in rows:
            columns = {column.key: getattr(event, column.key) for column in AuditEvent.__mapper__.column_attrs}
            yield columns | {"at": event.at.isoformat(), "seq": seq, "hash": link, "study_uid": study_uid}
        after = rows[-1][0].id
        session.expunge_all()


def write(rows: Iterable[dict[str, Any]], form: Format, stream: TextIO) -> int:
    """Write the events; how many."""
    written = 0
    table = csv.writer(stream)
    if form is Format.CSV:
        table.writerow(COLUMNS)
    for row in rows:
        if form is Format.JSONL:
            stream.write(json.dumps({name: row[name] for name in COLUMNS}) + "\n")
        else:
            table.writerow([_cell(row[name]) for name in COLUMNS])
        written += 1
    return written


def _restricted(query: Select[AuditEvent, int, str, str], selection: Selection) -> Select[AuditEvent, int, str, str]:
    if selection.since is not None:
        query = query.where(AuditEvent.at >= selection.since)
    if selection.until is not None:
        query = query.where(AuditEvent.at < selection.until)
    if selection.study_id is not None:
        query = query.where(AuditEvent.study_id == selection.study_id)
    if selection.sender is not None:
        sent = select(Instance.study_id).where(Instance.calling_ae == selection.sender)
        named = AuditEvent.detail["calling_ae"].as_string() == selection.sender
        query = query.where(or_(AuditEvent.study_id.in_(sent), named))
    if selection.destination is not None:
        query = query.where(AuditEvent.detail["destination"].as_string() == selection.destination)
    return query


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula is quoted by an apostrophe (an AE title may begin with =)."""
    text = json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
    return f"'{text}" if isinstance(text, str) and text[:1] in ("=", "+", "-", "@") else text
