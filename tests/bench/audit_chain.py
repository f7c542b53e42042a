"""How fast the audit is chained and verified, on SQLite and PostgreSQL.

./run bench audit_chain [EVENTS]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from sqlalchemy import insert
from sqlalchemy.orm import Session, sessionmaker

from service import chain
from service.shared.db import AuditEvent
from tests.rows import NOW, open_database
from tests.servers import PostgresServer

KINDS = ("instances-received", "study-opened", "analysis-queued", "analysis-read", "delivery-delivered")


def fill(sessions: sessionmaker[Session], count: int) -> None:
    """Events as they come on the way of a study, with the detail of a received association."""
    detail = {
        "association_id": "0" * 32,
        "instances": 120,
        "calling_ae": "CT01",
        "called_ae": "MEDPRUNER",
        "peer_address": "192.0.2.17",
        "instances_sha256": "a" * 64,
    }
    for start in range(0, count, 10_000):
        rows = [
            {
                "at": NOW + timedelta(milliseconds=number),
                "kind": KINDS[number % len(KINDS)],
                "actor": "service/ingest",
                "study_id": number // 20,
                "detail": detail,
            }
            for number in range(start, min(start + 10_000, count))
        ]
        with sessions.begin() as session:
            session.execute(insert(AuditEvent), rows)


def measure(name: str, sessions: sessionmaker[Session], count: int) -> str:
    fill(sessions, count)
    started = time.perf_counter()
    while True:
        with sessions.begin() as session:
            if chain.append_batch(session) < chain.BATCH:
                break
    chained = count / (time.perf_counter() - started)
    rates, of_processor = [], []
    for _ in range(3):
        started, processor_started = time.perf_counter(), time.process_time()
        with sessions() as session:
            found = chain.verify(session.connection(), [])
        rates.append(count / (time.perf_counter() - started))
        of_processor.append(count / (time.process_time() - processor_started))
        assert (found.checked, found.fault) == (count, None)
    return (
        f"{name}: {count:,} events, chained {chained:,.0f}/s, verified {min(rates):,.0f} to {max(rates):,.0f}/s "
        f"({min(of_processor):,.0f} to {max(of_processor):,.0f} per second of our own processor time)"
    )


@contextmanager
def databases() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder, PostgresServer(Path(folder) / "postgres") as server:
        yield {"SQLite": f"sqlite:///{folder}/audit.sqlite", "PostgreSQL": server.fresh_database()}


def main(arguments: list[str]) -> int:
    count = int(arguments[0]) if arguments else 1_000_000
    with databases() as urls:
        for name, url in urls.items():
            with open_database(url) as sessions:
                print(measure(name, sessions, count))  # noqa: T201  # its purpose
    return 0
