"""A million analyses and ten million events in PostgreSQL: every page under 200 ms, the audit verified at its rate.

./run prove scale [--analyses 1000000] [--events 10000000] [--url URL]

--url takes a database of yours: an empty one is filled, one that this proof filled before is measured as it is.
Without it a PostgreSQL of its own is started, and thrown away at the end. Exit 1 when anything is missed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

from fastapi.testclient import TestClient
from rich.console import Console
from rich.table import Table
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from service import alerts, chain, history, stats, tally
from service.shared.db import Analysis, AuditChain, AuditEvent, Role, Study, open_engine, open_sessions
from service.shared.settings import DataSettings, DestinationSettings, Settings, SourceSettings
from service.web.app import build_app
from tests.prove.scale_rows import chain_all, fill
from tests.rows import open_database
from tests.servers import PostgresServer
from tests.web_visits import SITE, add_user, sign_in

LIMIT_MS = 200.0
VERIFY_PER_S = 50_000.0
ROUNDS = 5

console = Console()


@dataclass(frozen=True)
class Measured:
    """Milliseconds at the server: of the first call, and of those after it."""

    name: str
    first_ms: float
    median_ms: float
    worst_ms: float

    @property
    def well(self) -> bool:
        return self.median_ms <= LIMIT_MS


def settings_of(folder: Path) -> Settings:
    """Sources, routes and destinations as the rows name them."""
    destinations = tuple(
        DestinationSettings(name=name, ae_title=name.upper(), host="192.0.2.9", port=104)
        for name in ("pacs", "archive")
    )
    sources = tuple(SourceSettings(ae_title=f"CT{number:02d}") for number in range(12))
    return Settings(data=DataSettings(path=folder), destination=destinations, source=sources)


def questions(client: TestClient, session: Session, settings: Settings) -> Iterator[tuple[str, Callable[[], object]]]:
    """What people and programs ask, by name."""
    middle = session.scalar(select(func.max(Study.id))) // 2  # type: ignore[operator]
    study = session.get_one(Study, middle)
    day = study.first_received_at.date()
    newest = session.scalar(select(func.max(Study.first_received_at))) or datetime.now(UTC)

    def get(path: str) -> Callable[[], object]:
        def ask() -> object:
            answer = client.get(path)
            assert answer.status_code == 200, (path, answer.status_code)
            return answer

        return ask

    found = f"/studies/{middle}"
    yield "front page", get("/")
    yield "studies", get("/studies")
    yield "studies, page in the middle", get(f"/studies?before={middle}")
    yield "search: accession number", get(f"/studies?q=A{middle:010d}")
    yield "search: beginning of an accession number", get(f"/studies?q=A{middle:010d}"[:-3])
    yield "search: patient ID", get("/studies?q=PID00000042")
    yield "search: name", get("/studies?q=0A1")
    yield "search: Study Instance UID", get(f"/studies?q={study.study_uid}")
    yield "search: nothing fits", get("/studies?q=nobody-has-this")
    yield "filter: one day", get(f"/studies?since={day}&until={day + timedelta(days=1)}")
    yield "filter: since a year", get(f"/studies?since={newest.date() - timedelta(days=365)}")
    yield "filter: a day long ago and sender", get(f"/studies?since={day}&until={day + timedelta(days=1)}&sender=CT03")
    yield "filter: sender", get("/studies?sender=CT05")
    yield "filter: sender that sends nothing", get("/studies?sender=CT77")
    for state in ("receiving", "queued", "running", "read", "done", "refused", "failed", "held", "undelivered"):
        yield f"filter: {state}", get(f"/studies?state={state}")
    yield "filter: failed, from a sender, long ago", get(f"/studies?state=failed&sender=CT08&until={day}")
    yield "study page", get(found)
    yield "charts", get("/api/v1/charts")
    yield "events", get("/events")
    yield "events of a kind", get("/events?kind=delivery-delivered")
    yield "events of a kind that is rare", get("/events?kind=service-started")
    yield "events until a day long ago", get(f"/events?until={day}")
    yield "events of a kind until a day long ago", get(f"/events?kind=study-viewed&until={day}")
    yield "events of a person", get("/events?actor=web/somebody")
    yield "API: studies", get("/api/v1/studies")
    yield "API: studies of a patient", get("/api/v1/studies?patient_id=PID00000042")
    yield "API: studies of a route", get("/api/v1/studies?route=head")
    yield "API: studies of a destination", get("/api/v1/studies?destination=archive")
    yield "API: studies of a destination that got nothing", get("/api/v1/studies?destination=none")
    yield "API: analyses of a route that takes nothing", get("/api/v1/analyses?route=none")
    yield "API: deliveries to nobody", get("/api/v1/deliveries?destination=none")
    yield "API: study", get(f"/api/v1/studies/{middle}")
    yield "API: analyses failed", get("/api/v1/analyses?state=failed")
    yield "API: deliveries rejected", get("/api/v1/deliveries?state=rejected")
    yield "API: overview", get("/api/v1/overview")
    yield "/metrics", get("/metrics")
    yield "status", lambda: history.status(session, settings.destination, newest)
    yield "history", lambda: history.recent(session, limit=20)
    yield "history --state rejected", lambda: history.recent(session, limit=20, state="rejected")
    yield "history --state failed", lambda: history.recent(session, limit=20, state="failed")
    yield "history --sender", lambda: history.recent(session, limit=20, sender="CT05")
    yield "history --until", lambda: history.recent(session, limit=20, until=study.first_received_at)
    yield "history --patient", lambda: history.recent(session, limit=20, patient_id="PID00000042")
    yield "history --route", lambda: history.recent(session, limit=20, route="head")
    yield "history --route that takes nothing", lambda: history.recent(session, limit=20, route="none")
    yield "history --destination", lambda: history.recent(session, limit=20, destination="archive")
    yield "history --destination that got nothing", lambda: history.recent(session, limit=20, destination="none")
    yield "history --accession", lambda: history.recent(session, limit=20, accession=f"A{middle:010d}")
    yield "show", lambda: history.study_story(session, history.study_named(session, str(study.study_uid)))
    week = newest - timedelta(days=7)
    yield "stats of a week", lambda: stats.stats(session, since=week)
    yield "stats of a week and a sender", lambda: stats.stats(session, since=week, sender="CT05")
    yield "alerts", lambda: alerts.current(session, settings, newest)


@contextmanager
def visiting(sessions: sessionmaker[Session], settings: Settings) -> Iterator[tuple[TestClient, Session]]:
    """The web as an operator sees it, and a session of a command; both can only read what they measure."""
    name = f"prove{time.time_ns()}"
    add_user(sessions, name, Role.OPERATOR)
    engine = open_engine(sessions.kw["bind"].url.render_as_string(hide_password=False), read_only=True)
    reading = open_sessions(engine)
    app = build_app(settings, sessions, reading, loopback=False)
    client = TestClient(app, base_url=SITE, follow_redirects=False, client=("127.0.0.1", 50000))
    sign_in(client, name)
    try:
        with reading() as session:
            yield client, session
    finally:
        client.close()
        engine.dispose()


def measure(sessions: sessionmaker[Session], settings: Settings) -> Iterator[Measured]:
    """Ask everything a few times."""
    with visiting(sessions, settings) as (client, session):
        for name, ask in questions(client, session, settings):
            times = []
            for _ in range(ROUNDS + 1):
                started = time.perf_counter()
                ask()
                times.append((time.perf_counter() - started) * 1000)
                session.expunge_all()
            yield Measured(name, times[0], median(times[1:]), max(times[1:]))


def rate_of_verify(sessions: sessionmaker[Session]) -> tuple[float, float]:
    """Events verified per second by the clock; and how many seconds it took."""
    started = time.perf_counter()
    with sessions() as session:
        found = chain.verify(session.connection(), [], processes=min(4, os.cpu_count() or 1))
    seconds = time.perf_counter() - started
    assert found.fault is None, found.fault
    return found.checked / seconds, seconds


def prepare(url: str, sessions: sessionmaker[Session], settings: Settings, analyses: int, events: int) -> None:
    """Fill an empty database; chain and count its events."""
    with sessions() as session:
        there = session.scalar(select(func.max(Analysis.id)))
        chained = session.scalar(select(func.max(AuditChain.seq)))
    if there is None:
        started = time.perf_counter()
        for table, count in fill(url, analyses, events):
            console.print(f"{table}: {count:,} rows, {time.perf_counter() - started:.0f} s")
    if not chained:
        started = time.perf_counter()
        console.print(f"chained {chain_all(url):,} events, {time.perf_counter() - started:.0f} s")
    started, counted = time.perf_counter(), 0
    while batch := tally.tally_batch(sessions, tally.Names.of(settings)):
        counted += batch
    console.print(f"counted {counted:,} events for /metrics, {time.perf_counter() - started:.0f} s")


@contextmanager
def database(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory() as folder, PostgresServer(Path(folder) / "postgres") as server:
        yield server.fresh_database()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run prove scale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--analyses", type=int, default=1_000_000)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--url", help="a PostgreSQL database; without it, one is started and thrown away")
    chosen = parser.parse_args(arguments)
    with ExitStack() as stack:
        url = stack.enter_context(database(chosen.url))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sessions = stack.enter_context(open_database(url))
        settings = settings_of(folder)
        prepare(url, sessions, settings, chosen.analyses, chosen.events)
        with sessions() as session:
            size = session.scalar(select(func.count()).select_from(Analysis))
            events = session.scalar(select(func.count()).select_from(AuditEvent))
        table = Table(
            "at the server, ms", "first", "median", "worst", "", title=f"{size:,} analyses, {events:,} events"
        )
        missed = 0
        for one in measure(sessions, settings):
            missed += not one.well
            verdict = "" if one.well else f"[red]above {LIMIT_MS:g}"
            table.add_row(one.name, f"{one.first_ms:.0f}", f"{one.median_ms:.0f}", f"{one.worst_ms:.0f}", verdict)
        console.print(table)
        rate, seconds = rate_of_verify(sessions)
        slow = rate < VERIFY_PER_S
        console.print(f"audit verify: {rate:,.0f} events/s, {seconds:.1f} s{' [red]below 50,000' if slow else ''}")
    return 1 if missed or slow else 0
