"""Who may read /metrics, and that it names no patient."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session, sessionmaker

from service import chain
from service.shared.db import Role
from service.tally import Names, tally_batch
from service.web.app import build_app
from tests.rows import open_database
from tests.web_visits import add_named_study, add_user, settings_in


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        add_named_study(opened, 1)
        add_user(opened, "somebody", Role.VIEWER)
        with opened.begin() as session:
            chain.append_batch(session)
        yield opened


def visit_from(sessions: sessionmaker[Session], folder: Path, address: str, *allowed: str) -> TestClient:
    settings = settings_in(folder)
    networks = tuple(ip_network(one) for one in allowed)
    web = settings.web.model_copy(update={"metrics_addresses": networks})
    app = build_app(settings.model_copy(update={"web": web}), sessions, loopback=False)
    return TestClient(app, base_url="http://testserver", client=(address, 50000))


@pytest.mark.parametrize(
    ("address", "allowed", "headers", "status"),
    [
        ("127.0.0.1", (), {}, 200),
        ("::1", (), {}, 200),
        ("192.0.2.1", (), {}, 401),
        ("192.0.2.1", ("192.0.2.0/24",), {}, 200),
        ("::ffff:192.0.2.1", ("192.0.2.0/24",), {}, 200),
        ("192.0.3.1", ("192.0.2.0/24",), {}, 401),
        ("127.0.0.1", (), {"X-Forwarded-For": "192.0.2.1"}, 401),
        ("192.0.2.1", (), {"Authorization": "Bearer wrong"}, 401),
    ],
)
def test_metrics_are_for_this_machine_and_listed_addresses(
    sessions: sessionmaker[Session],
    tmp_path: Path,
    address: str,
    allowed: tuple[str, ...],
    headers: dict[str, str],
    status: int,
) -> None:
    """Without signing in; what a proxy on this machine forwards is not from this machine."""
    answer = visit_from(sessions, tmp_path, address, *allowed).get("/metrics", headers=headers)

    assert answer.status_code == status


def test_metrics_show_counts_and_no_patient(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """What the audit adds up to and how it stands now."""
    tally_batch(sessions, Names.of(settings_in(tmp_path)))

    answer = visit_from(sessions, tmp_path, "127.0.0.1").get("/metrics")

    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "medpruner_analyses_total" in answer.text
    assert 'medpruner_deliveries_waiting{destination="pacs",state="pending"} 1.0' in answer.text
    for word in ("DOE", "Jane", "PID1", "ACC1", "2.25.", "SENDER"):
        assert word not in answer.text
