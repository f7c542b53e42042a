"""Who may see and do what, in every role and without any; and the headers of every answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import Role
from tests.rows import event, kinds, open_database, result
from tests.web_visits import Clock, add_named_study, add_user, sign_in, visit

PATIENT = ("DOE", "Jane", "PID1", "ACC1", "1970", "CHEST")


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        add_named_study(opened, 1)
        yield opened


def test_without_users_loopback_shows_no_identifier(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Counts and states for everybody on this machine; nothing that names a patient, no report, no command."""
    client = visit(sessions, tmp_path)
    pages = [client.get(path) for path in ("/", "/studies", "/studies/1", "/api/v1/studies", "/api/v1/studies/1")]

    assert [page.status_code for page in pages] == [200] * 5
    for page in pages:
        assert not [word for word in PATIENT if word in page.text]
        assert "The lungs are clear" not in page.text
    assert client.get("/api/v1/results/1/text").status_code == 403
    assert client.get("/api/v1/analyses/1/frames/0").status_code == 403
    assert client.post("/api/v1/deliveries/1/resend").status_code == 403
    assert client.get("/events").status_code == 403


def test_without_users_search_finds_no_identifier(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Otherwise a guess could be confirmed."""
    client = visit(sessions, tmp_path)

    assert client.get("/api/v1/studies?q=ACC1").json()["items"] == []
    assert len(client.get("/api/v1/studies?q=2.25.771").json()["items"]) == 1


def test_without_users_another_address_gets_nothing(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """A server that others reach, or a name that another site points at loopback, asks to sign in."""
    reached = visit(sessions, tmp_path, loopback=False)
    rebound = visit(sessions, tmp_path)
    rebound.headers["Host"] = "evil.example"

    assert reached.get("/api/v1/studies").status_code == 401
    assert reached.get("/").headers["location"] == "/login?next=/"
    assert rebound.get("/api/v1/studies").status_code == 401


def test_with_users_everything_asks_to_sign_in(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Also on loopback; only health stays open."""
    add_user(sessions, "vera", Role.VIEWER)
    client = visit(sessions, tmp_path)

    assert client.get("/studies/1").headers["location"] == "/login?next=/studies/1"
    assert client.get("/api/v1/overview").status_code == 401
    assert client.get("/health/live").status_code == 200


def test_viewer_reads_and_does_not_command(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Identifiers and report, no button and no command."""
    add_user(sessions, "vera", Role.VIEWER)
    client = visit(sessions, tmp_path)
    sign_in(client, "vera")
    page = client.get("/studies/1").text

    assert "DOE, JANE" in page
    assert "The lungs are clear" in page
    assert "data-send" not in page
    assert client.post("/api/v1/deliveries/1/resend").status_code == 403
    assert client.get("/api/v1/events").status_code == 403


def test_each_kind_of_result_has_a_name_of_its_own(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    with sessions.begin() as session:
        session.add_all(
            result(1, 10 + place, kind=kind) for place, kind in enumerate(("sc", "seg", "pm", "kos", "pdf"))
        )
    add_user(sessions, "vera", Role.VIEWER)
    client = visit(sessions, tmp_path)
    sign_in(client, "vera")
    page = client.get("/studies/1").text

    names = ("Secondary Capture", "Segmentation", "Parametric Map", "Key objects", "Report (PDF)")
    assert [name for name in names if name not in page] == []


def test_auditor_reads_events_and_no_patient(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Every event and the configuration, and nobody's name."""
    add_user(sessions, "adam", Role.AUDITOR)
    client = visit(sessions, tmp_path)
    sign_in(client, "adam")
    pages = [client.get(path).text for path in ("/events", "/studies/1", "/configuration", "/api/v1/studies/1")]

    assert "analysis queued" in pages[0]
    assert "DOE" not in "".join(pages)
    assert client.get("/api/v1/results/1/file").status_code == 403


def test_change_without_the_token_of_the_page_is_refused(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """A form on another site has the cookie sent along, and not the token."""
    add_user(sessions, "olga", Role.OPERATOR)
    client = visit(sessions, tmp_path)
    sign_in(client, "olga")
    client.headers["X-CSRF-Token"] = "0" * 64

    answer = client.put("/api/v1/destinations/pacs", json={"paused": True})

    assert answer.status_code == 403
    assert "destination-paused" not in kinds(sessions)


def test_command_is_audited_with_its_user(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """The event names who paused what."""
    add_user(sessions, "olga", Role.OPERATOR)
    client = visit(sessions, tmp_path)
    sign_in(client, "olga")
    answer = client.put("/api/v1/destinations/pacs", json={"paused": True})

    assert answer.json() == {"done": ["pacs is paused"]}
    paused = event(sessions, "destination-paused")
    assert (paused.actor, paused.detail) == ("web/olga", {"destination": "pacs"})


@pytest.mark.parametrize("address", ["/studies/1", "/api/v1/studies/1", "/api/v1/analyses/1"])
def test_every_view_of_a_study_is_audited(sessions: sessionmaker[Session], tmp_path: Path, address: str) -> None:
    """Page and API alike, with the user's name."""
    add_user(sessions, "vera", Role.VIEWER)
    client = visit(sessions, tmp_path)
    sign_in(client, "vera")
    client.get(address)

    viewed = event(sessions, "study-viewed")
    assert (viewed.actor, viewed.study_id) == ("web/vera", 1)


def test_failed_sign_ins_are_throttled(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """After five, even the right password waits; later it works."""
    add_user(sessions, "vera", Role.VIEWER)
    clock = Clock()
    client = visit(sessions, tmp_path, clock=clock)
    for _ in range(5):
        assert client.post("/login", data={"name": "vera", "password": "no"}).status_code == 401

    refused = client.post("/login", data={"name": "vera", "password": "correct horse battery"})
    clock.pass_time(60)

    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    sign_in(client, "vera")


@pytest.mark.parametrize("address", ["//evil.example", "https://evil.example", "/\\evil.example"])
def test_sign_in_leads_to_this_site_only(sessions: sessionmaker[Session], tmp_path: Path, address: str) -> None:
    """A link cannot send people elsewhere by way of our sign-in."""
    add_user(sessions, "vera", Role.VIEWER)
    client = visit(sessions, tmp_path)
    answer = client.post("/login", data={"name": "vera", "password": "correct horse battery", "next": address})

    assert answer.headers["location"] == "/"


def test_cookie_is_out_of_reach_of_scripts(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """HttpOnly, SameSite, and Secure where the page came over TLS."""
    add_user(sessions, "vera", Role.VIEWER)
    client = TestClient(visit(sessions, tmp_path).app, base_url="https://testserver", follow_redirects=False)
    cookie = client.post("/login", data={"name": "vera", "password": "correct horse battery"}).headers["set-cookie"]

    assert {"HttpOnly", "SameSite=lax", "Secure"} <= set(cookie.split("; "))


def test_signing_out_needs_the_token_and_ends_the_session(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Another site can sign nobody out; the button can."""
    add_user(sessions, "vera", Role.VIEWER)
    client = visit(sessions, tmp_path)
    sign_in(client, "vera")

    assert client.post("/logout").status_code == 403
    assert client.post("/logout", data={"csrf": client.headers["X-CSRF-Token"]}).status_code == 303
    assert client.get("/api/v1/overview").status_code == 401


def test_every_answer_forbids_other_hosts_and_inline_code(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Pages, errors, API and static files alike."""
    client = visit(sessions, tmp_path)

    for path in ("/", "/nowhere", "/api/v1/studies", "/api/v1/nothing", "/static/app.js"):
        policy = client.get(path).headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy


def test_markup_in_names_and_reports_is_text(sqlite_url: str, tmp_path: Path) -> None:
    """What a scanner or a model wrote is never run."""
    with open_database(sqlite_url) as opened:
        add_named_study(opened, 1, name="<script>alert(1)</script>", accession='"><img src=x>')
        add_user(opened, "vera", Role.VIEWER)
        client = visit(opened, tmp_path)
        sign_in(client, "vera")
        pages = client.get("/studies").text + client.get("/studies/1").text

    assert "<script>alert" not in pages
    assert "<img src=x" not in pages
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in pages


def test_page_that_refreshes_itself_is_one_look_and_never_none(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Asking for the refresh alone is on record as well: no address shows a patient without a trace."""
    add_user(sessions, "vera", Role.VIEWER)
    clock = Clock()
    visitor = visit(sessions, tmp_path, clock=clock)
    sign_in(visitor, "vera", address="/charts")
    for _ in range(3):
        assert "DOE, JANE" in visitor.get("/studies/1?poll=1").text
        assert "DOE, JANE" in visitor.get("/?poll=1").text
        clock.pass_time(3)
    assert kinds(sessions, actor="web/vera")[1:] == ["study-viewed", "studies-listed"]

    clock.pass_time(700)
    visitor.get("/studies/1?poll=1")

    assert kinds(sessions, actor="web/vera")[-1] == "study-viewed"
