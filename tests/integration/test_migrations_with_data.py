"""Every migration runs down and up again with rows in the tables, on SQLite and PostgreSQL; what is older stays."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, MetaData, select

from service import chain
from service.shared import schema
from service.shared.db import AuditEvent, Result, open_sessions
from tests.rows import NOW, add_deliveries, add_instance, add_study, open_database

REVISIONS = ("0009", "0008", "0007", "0006", "0005", "0004", "0003", "0002", "0001")


def content(engine: Engine) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table as the database holds it."""
    there = MetaData()
    there.reflect(engine)
    with engine.connect() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key))]
            for table in there.sorted_tables
        }


def fill(engine: Engine) -> None:
    sessions = open_sessions(engine)
    study_id = add_study(sessions, "2.25.1", held=True)
    add_instance(sessions, study_id)
    add_deliveries(sessions, study_id, "pacs", "archive")
    with sessions.begin() as session:
        chain.append_batch(session)


@pytest.mark.parametrize("revision", REVISIONS)
def test_rows_survive_the_way_down_and_up(database_url: str, revision: str) -> None:
    """Tables that the older version has keep their rows, and work again afterwards."""
    with open_database(database_url) as sessions:
        engine: Engine = sessions.kw["bind"]
        fill(engine)
        before = content(engine)
        schema.downgrade(engine, revision)
        older = content(engine)
        schema.upgrade(engine)
        after = content(engine)
        schema.check(engine)

        kept = ("study", "study_header", "instance", "result", "report_text", "audit_event")
        assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
        assert all(older[name] for name in ("study", "analysis", "delivery", "audit_event"))
        assert [row[:4] for row in after["delivery"]] == [row[:4] for row in before["delivery"]]
        _works(engine)


def test_history_stays_append_only_on_the_way(database_url: str) -> None:
    """A rebuilt table would lose its triggers without a word."""
    with open_database(database_url) as sessions:
        engine: Engine = sessions.kw["bind"]
        fill(engine)
        schema.downgrade(engine, "0003")
        schema.upgrade(engine)

        with pytest.raises(Exception, match="append-only"), sessions.begin() as session:
            session.delete(session.scalars(select(AuditEvent).limit(1)).one())


def _works(engine: Engine) -> None:
    """Foreign keys still name their tables, and the chain is whole once it is made again."""
    sessions = open_sessions(engine)
    study_id = add_study(sessions, "2.25.2", first_received_at=NOW)
    add_deliveries(sessions, study_id, "pacs")
    with sessions.begin() as session:
        chain.append_batch(session, search_all=True)
    with sessions() as session:
        found = chain.verify(session.connection(), [])
        assert session.scalars(select(Result)).all()
    assert (found.fault, found.not_chained) == (None, 0)
