"""Sign-in by a proxy's headers: believed from its address, ignored from any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session, sessionmaker

from service.shared.settings import DataSettings, DestinationSettings, Settings, WebSettings
from service.web.app import build_app
from tests.rows import event, kinds, open_database
from tests.web_visits import SITE, add_named_study, csrf

PROXY, ELSEWHERE = ("10.0.0.5", 40000), ("10.0.0.6", 40000)


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        add_named_study(opened, 1)
        yield opened


def visit(
    sessions: sessionmaker[Session], folder: Path, *, user: str, role: str, peer: tuple[str, int] = PROXY
) -> TestClient:
    """A browser behind the proxy, or somebody who says so."""
    web = WebSettings.model_validate(
        {
            "role_mapping": {"radiologists": "viewer"},
            "proxy_user_header": "X-Remote-User",
            "proxy_role_header": "X-Remote-Roles",
            "proxy_addresses": ["10.0.0.5", "fd00::/8"],
        }
    )
    pacs = DestinationSettings(name="pacs", ae_title="PACS", host="192.0.2.9", port=104)
    app = build_app(Settings(data=DataSettings(path=folder), destination=(pacs,), web=web), sessions, loopback=True)
    headers = {"X-Remote-User": user, "X-Remote-Roles": role}
    return TestClient(app, base_url=SITE, follow_redirects=False, client=peer, headers=headers)


def test_person_whom_the_proxy_names_is_signed_in(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """By a mapped name of a role; the sign-in is audited once, views each with the name."""
    client = visit(sessions, tmp_path, user="Rosa", role="others, radiologists")
    client.get("/studies")
    page = client.get("/studies/1").text

    assert "DOE, JANE" in page
    assert "Sign out" not in page
    assert kinds(sessions, actor="web/rosa") == ["signed-in", "studies-listed", "study-viewed"]


@pytest.mark.parametrize("peer", [ELSEWHERE, ("127.0.0.1", 1), ("fe80::1", 1)])
def test_header_from_another_address_is_ignored_and_said(
    sessions: sessionmaker[Session], tmp_path: Path, peer: tuple[str, int]
) -> None:
    """Nobody is signed in, not even as nobody on loopback; the log names the address once."""
    client = visit(sessions, tmp_path, user="rosa", role="operator", peer=peer)
    with structlog.testing.capture_logs() as logs:
        answers = [client.get("/api/v1/overview").status_code for _ in range(3)]

    assert answers == [401] * 3
    assert [(one["event"], one["address"]) for one in logs] == [("proxy_header_ignored", peer[0])]


@pytest.mark.parametrize("peer", [("::ffff:10.0.0.5", 1), ("fd00::7", 1)])
def test_address_of_the_proxy_in_other_forms(
    sessions: sessionmaker[Session], tmp_path: Path, peer: tuple[str, int]
) -> None:
    """A dual-stack socket shows IPv4 addresses mapped; a network covers its addresses."""
    assert visit(sessions, tmp_path, user="rosa", role="viewer", peer=peer).get("/api/v1/overview").status_code == 200


@pytest.mark.parametrize(("user", "role"), [("rosa", "others"), ("rosa", ""), ("", "viewer"), ("a b", "viewer")])
def test_name_or_role_that_cannot_be_is_refused(
    sessions: sessionmaker[Session], tmp_path: Path, user: str, role: str
) -> None:
    """No role by default, no name by guessing."""
    assert visit(sessions, tmp_path, user=user, role=role).get("/api/v1/overview").status_code == 403


def test_two_user_headers_are_refused(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """A proxy that lets the browser's own header through must not sign anybody in."""
    client = visit(sessions, tmp_path, user="rosa", role="viewer")
    headers = [("X-Remote-User", "olga"), ("X-Remote-User", "rosa"), ("X-Remote-Roles", "viewer")]
    client.headers.clear()

    assert client.get("/api/v1/overview", headers=headers).status_code == 403


def test_command_needs_the_token_of_the_page(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """The proxy signs every request, also one that another site's page makes the browser send."""
    client = visit(sessions, tmp_path, user="olga", role="operator")
    without = client.put("/api/v1/destinations/pacs", json={"paused": True})
    with_token = client.put("/api/v1/destinations/pacs", json={"paused": True}, headers={"X-CSRF-Token": csrf(client)})

    assert (without.status_code, with_token.status_code) == (403, 200)
    assert event(sessions, "destination-paused").actor == "web/olga"
