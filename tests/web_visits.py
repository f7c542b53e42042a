"""What the tests of the web share: the application on a database with studies, and visitors who are signed in."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fastapi.testclient import TestClient
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import Role, StudyHeader
from service.shared.settings import DataSettings, DestinationSettings, Settings
from service.web import accounts
from service.web.access import Web
from service.web.app import build_app
from tests.rows import add_deliveries, add_instance, add_study

PASSWORD = "correct horse battery"
SITE = "http://testserver"


class Clock:
    """Time that tests move."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def settings_in(folder: Path) -> Settings:
    pacs = DestinationSettings(name="pacs", ae_title="PACS", host="192.0.2.9", port=104)
    return Settings(data=DataSettings(path=folder), destination=(pacs,))


def visit(
    sessions: sessionmaker[Session], folder: Path, *, loopback: bool = True, clock: Clock | None = None
) -> TestClient:
    """A browser that is not signed in."""
    app = build_app(settings_in(folder), sessions, loopback=loopback)
    if clock is not None:
        web: Web = app.state.web
        web.clock = clock
    return TestClient(app, base_url=SITE, follow_redirects=False)


def add_user(sessions: sessionmaker[Session], name: str, role: Role) -> None:
    with sessions.begin() as session:
        accounts.add_user(session, name, PASSWORD, role, now=datetime.now(UTC), actor="cli/test")


def sign_in(client: TestClient, name: str, password: str = PASSWORD, address: str = "/studies") -> None:
    """Through the form, as a person does; every later change carries the page's CSRF token."""
    answer = client.post("/login", data={"name": name, "password": password, "next": address})
    assert answer.status_code == 303, answer.text
    client.headers["X-CSRF-Token"] = csrf(client)


def csrf(client: TestClient) -> str:
    found = re.search(r'name="csrf" content="([0-9a-f]{64})"', client.get("/charts").text)
    assert found is not None
    return found[1]


def add_named_study(
    sessions: sessionmaker[Session], number: int, *, name: str = "DOE^JANE", accession: str | None = None
) -> int:
    """A done study with a header, one instance, a result and a delivery that is pending."""
    study_id = add_study(sessions, f"2.25.77{number}")
    add_instance(sessions, study_id)
    with sessions.begin() as session:
        session.add(
            StudyHeader(
                study_id=study_id,
                salt="00",
                patient_id=f"PID{number}",
                issuer_of_patient_id="",
                patient_name=name,
                patient_birth_date="19700101",
                patient_sex="F",
                accession_number=accession or f"ACC{number}",
                study_date="20260301",
                study_description="CHEST",
            )
        )
    add_deliveries(sessions, study_id, "pacs")
    return study_id
