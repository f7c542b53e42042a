"""The hash chain over the audit, on SQLite and PostgreSQL: what it covers, and what it notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from service import chain
from service.shared import audit
from service.shared.audit import AuditKind
from service.shared.db import AuditChain, AuditEvent
from tests.rows import ACTOR, NOW, after, open_database

TRIGGERS = ("audit_event_no_update", "audit_event_no_delete", "audit_chain_no_update", "audit_chain_no_delete")


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        yield opened


def add_events(sessions: sessionmaker[Session], count: int = 1) -> None:
    with sessions.begin() as session:
        for number in range(count):
            audit.append(
                session,
                AuditKind.STUDY_COMPLETE,
                now=after(number / 7),
                actor=ACTOR,
                study_id=number,
                why="Gößße \u2028 \U0001f600",
                revision=number,
                ratio=0.1 * number,
                nothing=None,
            )


def append_all(sessions: sessionmaker[Session], *, search_all: bool = False) -> int:
    done = 0
    while True:
        with sessions.begin() as session:
            appended = chain.append_batch(session, search_all=search_all)
        done += appended
        if appended < chain.BATCH:
            return done


def verified(sessions: sessionmaker[Session], *heads: chain.Head) -> chain.Verification:
    with sessions() as session:
        return chain.verify(session.connection(), list(heads))


def chained_ids(sessions: sessionmaker[Session]) -> list[int]:
    with sessions() as session:
        return list(session.scalars(select(AuditChain.event_id).order_by(AuditChain.seq)))


def tamper(sessions: sessionmaker[Session], *statements: str) -> None:
    """Change what is append-only, as one could who owns the database: without its triggers."""
    with sessions.begin() as session:
        if session.get_bind().dialect.name == "postgresql":
            session.execute(text("SET LOCAL session_replication_role = replica"))
        else:
            for name in TRIGGERS:
                session.execute(text(f"DROP TRIGGER {name}"))
        for statement in statements:
            session.execute(text(statement))


def test_every_event_gets_its_place_once(sessions: sessionmaker[Session]) -> None:
    """More than one batch, in the order of their ids; a second round finds nothing."""
    add_events(sessions, chain.BATCH + 5)

    assert append_all(sessions) == chain.BATCH + 5
    assert append_all(sessions) == 0

    found = verified(sessions)
    assert (found.checked, found.not_chained, found.fault) == (chain.BATCH + 5, 0, None)
    assert chained_ids(sessions) == sorted(chained_ids(sessions))


def test_chain_is_what_its_documentation_says(sessions: sessionmaker[Session]) -> None:
    """An auditor with the page in hand and a SHA-256 comes to the same head."""
    with sessions.begin() as session:
        audit.append(
            session, AuditKind.STUDY_OPENED, now=NOW, actor="ä", study_id=7, vouches_sha256="0" * 64, b=1.5, a=[1, None]
        )
    append_all(sessions)
    with sessions() as session:
        (event_id,) = session.scalars(select(AuditEvent.id))

    canonical = (
        f'[1,{event_id},"2026-03-01 12:00:00.000000","study-opened","\\u00e4",7,null,null,null,'
        f'{{"a":[1,null],"b":1.5}},"{"0" * 64}"]'
    )

    assert verified(sessions).head == chain.hashlib.sha256(bytes(32) + canonical.encode()).hexdigest()


def test_events_that_wait_are_counted(sessions: sessionmaker[Session]) -> None:
    """By `verify`, and as the lag that `status` shows."""
    add_events(sessions, 3)
    append_all(sessions)
    add_events(sessions, 2)

    assert verified(sessions).not_chained == 2
    with sessions() as session:
        lag = chain.lag(session)
    assert (lag.chained, lag.waiting, lag.oldest_waiting_at) == (3, 2, NOW)


def test_event_that_commits_late_is_chained_when_it_comes(sessions: sessionmaker[Session]) -> None:
    """PostgreSQL draws ids before transactions commit: a lower id may appear after a higher one was chained."""
    add_events(sessions, 3)
    _add_with_id(sessions, 100)
    append_all(sessions)
    _add_with_id(sessions, 50)

    assert append_all(sessions) == 1

    assert chained_ids(sessions)[-2:] == [100, 50]
    assert verified(sessions).fault is None


def test_event_that_commits_very_late_is_found_by_the_search_of_all(sessions: sessionmaker[Session]) -> None:
    """Nothing is skipped for ever, and `verify` counts it meanwhile."""
    _add_with_id(sessions, 10 * chain.WINDOW)
    append_all(sessions)
    _add_with_id(sessions, 5)

    assert append_all(sessions) == 0
    assert verified(sessions).not_chained == 1

    assert append_all(sessions, search_all=True) == 1
    assert verified(sessions).not_chained == 0


def test_chainers_at_once_make_one_chain(sessions: sessionmaker[Session]) -> None:
    """Two services beside one database wait for each other; no place is given twice."""
    add_events(sessions, 50)
    gate = Barrier(3)

    def run() -> int:
        gate.wait()
        return append_all(sessions)

    with ThreadPoolExecutor(3) as pool:
        done = [one.result() for one in [pool.submit(run) for _ in range(3)]]

    assert sum(done) == 50
    assert verified(sessions).fault is None


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("UPDATE audit_event SET actor = 'nobody' WHERE id = 4", "event 4 was altered"),
        ("UPDATE audit_event SET detail = '{}' WHERE id = 4", "event 4 was altered"),
        ("UPDATE audit_event SET at = '2026-03-01 12:00:01.000000' WHERE id = 4", "event 4 was altered"),
        ("DELETE FROM audit_event WHERE id = 4", "event 4 is missing"),
        ("DELETE FROM audit_chain WHERE seq = 4", "row 4 of audit_chain is missing"),
        ("UPDATE audit_chain SET hash = '{zeros}' WHERE seq = 4", "event 4 was altered, or row 4"),
    ],
)
def test_first_row_that_is_not_as_it_was_is_named(sessions: sessionmaker[Session], statement: str, fault: str) -> None:
    """Altered or missing, event or link."""
    add_events(sessions, 10)
    append_all(sessions)

    tamper(sessions, statement.replace("{zeros}", "0" * 64))

    found = verified(sessions)
    assert found.fault is not None
    assert found.fault.startswith(fault)
    assert found.checked == 3


def test_swapped_rows_are_named(sessions: sessionmaker[Session]) -> None:
    """The first of them, with the event that belongs there."""
    add_events(sessions, 10)
    append_all(sessions)

    tamper(
        sessions,
        "UPDATE audit_chain SET event_id = -6 WHERE seq = 4",
        "UPDATE audit_chain SET event_id = 4 WHERE seq = 6",
        "UPDATE audit_chain SET event_id = 6 WHERE seq = 4",
    )

    assert verified(sessions).fault == "row 4 of audit_chain was reordered: event 6 stands where event 4 belongs"


def test_end_that_was_cut_off_is_noticed_by_an_exported_head(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Alone, a shorter chain is whole; the head that somebody kept says that there was more."""
    add_events(sessions, 10)
    append_all(sessions)
    chain.export_head(sessions, tmp_path / "heads.jsonl", NOW)

    tamper(sessions, "DELETE FROM audit_chain WHERE seq > 7", "DELETE FROM audit_event WHERE id > 7")

    assert verified(sessions).fault is None
    fault = verified(sessions, *chain.read_heads(tmp_path / "heads.jsonl")).fault
    assert fault == "row 8 of audit_chain is missing: the exported head reaches to 10, the chain to 7"


def test_chain_that_was_written_anew_is_noticed_by_an_exported_head(
    sessions: sessionmaker[Session], tmp_path: Path
) -> None:
    """Who may change everything can also compute every hash again, but not the head that lies elsewhere."""
    add_events(sessions, 3)
    append_all(sessions)
    chain.export_head(sessions, tmp_path / "heads.jsonl", NOW)

    tamper(sessions, "UPDATE audit_event SET actor = 'nobody' WHERE id = 1", "DELETE FROM audit_chain")
    append_all(sessions, search_all=True)

    assert verified(sessions).fault is None
    fault = verified(sessions, *chain.read_heads(tmp_path / "heads.jsonl")).fault
    assert fault == "row 3 of audit_chain differs from the exported head: the chain was written anew"


def test_head_is_exported_when_it_has_moved(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """One line each; nothing new, no line."""
    heads = tmp_path / "elsewhere" / "heads.jsonl"
    assert chain.export_head(sessions, heads, NOW) is None
    add_events(sessions, 2)
    append_all(sessions)

    first = chain.export_head(sessions, heads, NOW)
    assert chain.export_head(sessions, heads, after(1)) is None
    add_events(sessions)
    append_all(sessions)
    second = chain.export_head(sessions, heads, after(2))

    assert chain.read_heads(heads) == [first, second]
    assert verified(sessions, *chain.read_heads(heads)).heads_checked == 2


def test_head_that_was_cut_off_by_a_power_cut_is_left_out(tmp_path: Path) -> None:
    """Anything else that is no head is an error with its line."""
    heads = tmp_path / "heads.jsonl"
    line = chain.Head(1, "0" * 64, NOW).to_json()
    heads.write_text(f'{line}\n{{"seq": 2')
    assert [head.seq for head in chain.read_heads(heads)] == [1]

    heads.write_text(f"{line}\nnothing\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        chain.read_heads(heads)


@pytest.mark.parametrize(
    "change",
    [
        lambda: update(AuditChain).values(hash="0" * 64),
        lambda: delete(AuditChain),
        lambda: text("UPDATE audit_chain SET seq = seq + 100"),
    ],
)
def test_chain_can_neither_be_changed_nor_thinned(sessions: sessionmaker[Session], change: Callable[[], text]) -> None:
    """The database itself refuses, whoever asks."""
    add_events(sessions, 2)
    append_all(sessions)

    with pytest.raises(DBAPIError, match="append-only"), sessions.begin() as session:
        session.execute(change())

    assert verified(sessions).fault is None


def test_chain_cannot_be_overwritten_by_an_insert(sqlite_url: str) -> None:
    """SQLite's INSERT OR REPLACE deletes without firing a trigger for it."""
    with open_database(sqlite_url) as sessions:
        add_events(sessions, 2)
        append_all(sessions)

        with pytest.raises(DBAPIError, match="append-only"), sessions.begin() as session:
            session.execute(text("INSERT OR REPLACE INTO audit_chain VALUES (1, 2, 'x')"))


def _add_with_id(sessions: sessionmaker[Session], event_id: int) -> None:
    with sessions.begin() as session:
        session.execute(insert(AuditEvent).values(id=event_id, at=NOW, kind="x", actor=ACTOR, detail={"n": event_id}))
