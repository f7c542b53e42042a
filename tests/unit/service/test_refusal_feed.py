"""Who was turned away by the receiver stands in the audit, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.refusal_feed import MOST, record
from service.refusals import Refusals, Refused
from service.shared.db import AuditEvent
from tests.rows import after, open_database


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        yield opened


def refuse(spool: Path, seconds: float, calling_ae: str) -> None:
    refused = Refused(after(seconds), calling_ae, "MEDPRUNER", "192.0.2.7", "unknown calling AE title", "[[source]]")
    Refusals(spool).record(refused)


def details(sessions: sessionmaker[Session]) -> list[tuple[str, int]]:
    with sessions() as session:
        events = session.scalars(select(AuditEvent).order_by(AuditEvent.id)).all()
    assert {one.kind for one in events} <= {"association-refused"}
    return [(one.detail["calling_ae"], one.detail["count"]) for one in events]


def test_refusal_is_put_on_record_once(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """With its own time, whoever looks how often; a later one follows."""
    refuse(tmp_path, 0, "WHO1")
    for _ in range(2):
        record(tmp_path, sessions, now=after(10))
    refuse(tmp_path, 20, "WHO2")
    record(tmp_path, sessions, now=after(30))
    record(tmp_path, sessions, now=after(40))

    assert details(sessions) == [("WHO1", 1), ("WHO2", 1)]


def test_flood_of_invented_names_stays_bounded(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """One event counts what is above the limit of a round, and nothing comes twice."""
    for number in range(MOST + 20):
        refuse(tmp_path, number / 100, f"AE{number}")
    record(tmp_path, sessions, now=after(10))
    record(tmp_path, sessions, now=after(20))

    found = details(sessions)
    assert len(found) == MOST + 1
    assert found[-1] == ("", 20)


def test_nothing_refused_is_no_event(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Not even where the receiver has never run."""
    assert record(tmp_path / "absent", sessions, now=after(0)) == 0
    assert details(sessions) == []
