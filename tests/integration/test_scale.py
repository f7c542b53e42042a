"""A tenth of the proof of scale: no page and no command reads more rows of PostgreSQL than it shows, by far.

Times stand in the output and decide nothing here; `./run prove scale` decides by them at full size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session, sessionmaker

from service import chain
from service.shared.settings import Settings
from tests.prove import scale
from tests.rows import open_database

pytestmark = [pytest.mark.scale, pytest.mark.slow, pytest.mark.timeout(900)]

ANALYSES, EVENTS = 100_000, 1_000_000
MOST_ROWS = 10_000  # that one question may touch, of two million


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return scale.settings_of(tmp_path_factory.mktemp("scale"))


@pytest.fixture(scope="module")
def filled(postgres_server: Any, settings: Settings) -> Iterator[sessionmaker[Session]]:
    url = postgres_server.fresh_database()
    with open_database(url) as sessions:
        for _ in scale.fill(url, ANALYSES, EVENTS):
            pass
        scale.chain_all(url)
        yield sessions


def rows_touched(plan: dict[str, Any]) -> int:
    """What the scans at the leaves read, also what they threw away."""
    children = plan.get("Plans", ())
    own = 0
    if plan["Node Type"].endswith("Scan") and plan["Node Type"] not in ("Bitmap Index Scan", "Subquery Scan"):
        removed = plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Index Recheck", 0)
        own = round((plan["Actual Rows"] + removed) * plan["Actual Loops"])
    return own + sum(rows_touched(child) for child in children)


def test_no_question_reads_many_rows(filled: sessionmaker[Session], settings: Settings, capsys: Any) -> None:
    """Every statement of every page and command is explained with what it really read."""
    touched: dict[str, int] = {}
    with scale.visiting(filled, settings) as (client, session):
        bind = session.get_bind()
        statements: list[tuple[str, Any]] = []
        event.listen(
            bind,
            "before_cursor_execute",
            lambda _c, _k, statement, parameters, *_: statements.append((statement, parameters)),
        )
        for name, ask in scale.questions(client, session, settings):
            statements.clear()
            ask()
            touched[name] = sum(_touched(session, *one) for one in list(statements) if one[0].startswith("SELECT"))
    with capsys.disabled():
        for one in scale.measure(filled, settings):
            print(f"{one.name:50} {touched[one.name]:8} rows {one.median_ms:8.1f} ms")  # noqa: T201  # recorded

    many = {name: rows for name, rows in touched.items() if rows > MOST_ROWS}
    assert many == {}


def test_audit_is_verified_by_several_processes(filled: sessionmaker[Session]) -> None:
    """Spans that are checked apart make one whole, and the first wrong row is named as it is by one process."""
    with filled() as session:
        alone = chain.verify(session.connection(), [])
        together = chain.verify(session.connection(), [], processes=2)
    assert alone == together
    assert (together.checked, together.fault) == (EVENTS, None)

    with filled.begin() as session:
        session.execute(text("SET LOCAL session_replication_role = replica"))
        session.execute(text("UPDATE audit_event SET actor = 'nobody' WHERE id = 600000"))
    with filled() as session:
        found = chain.verify(session.connection(), [], processes=2)

    assert found.fault == "event 600000 was altered, or row 600000 of audit_chain"
    assert found.checked == 599_999


def _touched(session: Session, statement: str, parameters: Any) -> int:
    with session.connection().connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement}", parameters)
        (answer,) = cursor.fetchone()
    plans = json.loads(answer) if isinstance(answer, str) else answer
    return rows_touched(plans[0]["Plan"])
