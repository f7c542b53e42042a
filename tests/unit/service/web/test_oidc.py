"""Sign-in at a service of the hospital's, against a real OpenID Connect provider in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import Role, UserAccount
from service.shared.settings import DataSettings, Settings, WebSettings
from service.web import accounts
from service.web.accounts import AccountError
from service.web.app import build_app
from tests.oidc_provider import CLIENT, SECRET
from tests.receiving import wait_until
from tests.rows import NOW, event, get, kinds, open_database
from tests.servers import free_port
from tests.web_visits import SITE, add_user, csrf, sign_in

PROJECT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    address = f"http://127.0.0.1:{(port := free_port())}"
    process = subprocess.Popen([sys.executable, "-m", "tests.oidc_provider", str(port)], cwd=PROJECT)
    try:
        wait_until(lambda: answers(address), timeout_s=60)
        yield address
    finally:
        process.kill()
        process.wait()


def answers(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/keys").status_code == 200
    except httpx2.ConnectError:
        return False


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        yield opened


@pytest.fixture
def client(sessions: sessionmaker[Session], issuer: str, tmp_path: Path) -> TestClient:
    secret = tmp_path / "oidc.secret"
    secret.write_text(SECRET + "\n", encoding="utf-8")
    web = WebSettings(
        public_url=SITE,
        role_mapping={"radiology-admins": "operator", "radiologists": "viewer"},
        oidc_issuer=issuer,
        oidc_client_id=CLIENT,
        oidc_client_secret_file=secret,
        oidc_role_claim="realm.roles",
    )
    app = build_app(Settings(data=DataSettings(path=tmp_path), web=web), sessions, loopback=True)
    return TestClient(app, base_url=SITE, follow_redirects=False)


def be(issuer: str, *, name: str = "Rosa", sub: str = "42", roles: Any = ("radiologists",), fault: str = "") -> None:
    """Who the provider signs in from now on, and how its tokens are wrong."""
    httpx2.post(f"{issuer}/person", json={"name": name, "sub": sub, "roles": roles, "fault": fault})


def come_back(client: TestClient, address: str = "/studies") -> httpx2.Response:
    """What a browser does: to us, to the provider, back to us."""
    there = client.get(f"/login/oidc?next={address}")
    assert there.status_code == 303, there.text
    back = httpx2.get(there.headers["location"]).headers["location"]
    assert back.startswith(f"{SITE}/login/oidc/callback?")
    return client.get(back.removeprefix(SITE))


def test_person_of_the_hospital_signs_in(sessions: sessionmaker[Session], client: TestClient, issuer: str) -> None:
    """The first time makes an account; name and role are the service's; the address asked for follows."""
    be(issuer)
    answer = come_back(client, "/studies?state=done")

    assert (answer.status_code, answer.headers["location"]) == (303, "/studies?state=done")
    assert "rosa" in client.get("/studies").text
    assert client.get("/api/v1/events").status_code == 403, "a viewer"
    assert kinds(sessions)[-3:] == ["user-added", "signed-in", "studies-listed"]
    assert event(sessions, "signed-in").actor == "web/rosa"


def sign_out(client: TestClient) -> httpx2.Response:
    return client.post("/logout", data={"csrf": csrf(client)})


def test_signing_out_ends_at_the_sign_in_service(
    sessions: sessionmaker[Session], client: TestClient, issuer: str
) -> None:
    """The session here is over, the service is told whose it was, and the browser comes back to our sign-in page."""
    be(issuer, sub="42")
    come_back(client)
    answer = sign_out(client)

    assert answer.status_code == 303
    assert answer.headers["location"].startswith(f"{issuer}/end?")
    back = httpx2.get(answer.headers["location"])
    assert (back.status_code, back.headers["location"]) == (302, f"{SITE}/login?signed_out=42")
    assert client.get("/studies").headers["location"] == "/login?next=/studies"
    assert kinds(sessions)[-1] == "signed-out"
    assert f"form-action 'self' {issuer};" in client.get("/login").headers["content-security-policy"]


def test_id_token_is_kept_for_signing_out_only(client: TestClient, issuer: str) -> None:
    """In a cookie that no script reads and no other page gets; it goes when the person does."""
    be(issuer)
    come_back(client)
    (cookie,) = (one for one in client.cookies.jar if one.name == "medpruner_oidc_hint")
    assert (cookie.path, cookie.has_nonstandard_attr("HttpOnly")) == ("/logout", True)

    sign_out(client)

    assert "medpruner_oidc_hint" not in {one.name for one in client.cookies.jar}


def test_local_user_signs_out_here(sessions: sessionmaker[Session], client: TestClient, issuer: str) -> None:
    """Whom the service did not sign in it need not sign out; also after somebody else whom it did."""
    add_user(sessions, "olga", Role.OPERATOR)
    be(issuer)
    come_back(client)
    sign_in(client, "olga")

    assert sign_out(client).headers["location"] == "/login"


def test_nobody_gets_in_without_signing_in(client: TestClient) -> None:
    """Also on loopback and before the first person came: there is a way to sign in."""
    assert client.get("/studies").headers["location"] == "/login?next=/studies"
    assert "Sign in at 127.0.0.1" in client.get("/login").text


def test_role_follows_the_sign_in_service(sessions: sessionmaker[Session], client: TestClient, issuer: str) -> None:
    """A new role ends the sessions of before; of several roles the one with the most rights counts."""
    be(issuer)
    come_back(client)
    before = client.cookies["medpruner_session"]
    be(issuer, roles=["others", "radiologists", "radiology-admins"])
    come_back(client)

    assert client.get("/api/v1/events").status_code == 200
    client.cookies.clear()
    client.cookies.set("medpruner_session", before)
    assert client.get("/api/v1/overview").status_code == 401
    assert get(sessions, UserAccount, 1).role is Role.OPERATOR


@pytest.mark.parametrize("fault", ["nonce", "audience", "issuer", "expired", "alg-none", "hmac", "other-key", "denied"])
def test_token_that_does_not_hold_signs_nobody_in(
    sessions: sessionmaker[Session], client: TestClient, issuer: str, fault: str
) -> None:
    """Audited as a failed sign-in; no session, no account."""
    be(issuer, fault=fault)
    answer = come_back(client)

    assert answer.status_code == 401
    assert "Not signed in" in answer.text
    assert "medpruner_session" not in client.cookies
    assert kinds(sessions) == ["sign-in-failed"]


def test_new_key_of_the_service_is_learnt(client: TestClient, issuer: str) -> None:
    """Keys rotate; the next sign-in fetches them again."""
    be(issuer)
    come_back(client)
    be(issuer, fault="new-key")

    assert come_back(client).status_code == 303


@pytest.mark.parametrize("roles", [[], ["others"], "others", None, 7])
def test_person_without_a_role_stays_outside(client: TestClient, issuer: str, roles: Any) -> None:
    """Whatever stands in the claim: no name that is mapped, no role."""
    be(issuer, roles=roles)
    answer = come_back(client)

    assert answer.status_code == 401
    assert "no role" in answer.text


def test_answer_is_good_once_and_in_one_browser(client: TestClient, issuer: str) -> None:
    """Another browser cannot be signed in as me, and my code cannot be used again."""
    be(issuer)
    there = client.get("/login/oidc").headers["location"]
    back = httpx2.get(there).headers["location"].removeprefix(SITE)
    state = client.cookies["medpruner_oidc"]
    other = TestClient(client.app, base_url=SITE, follow_redirects=False)

    assert other.get(back).status_code == 401
    assert client.get(back).status_code == 303
    client.cookies.set("medpruner_oidc", state)
    assert client.get(back).status_code == 401


def test_name_of_another_person_is_not_given_away(
    sessions: sessionmaker[Session], client: TestClient, issuer: str
) -> None:
    """A local user's name stays theirs, and so does that of a person of another subject."""
    add_user(sessions, "olga", Role.OPERATOR)
    be(issuer, name="olga")
    local = come_back(client)
    be(issuer, name="rosa", sub="42")
    come_back(client)
    be(issuer, name="rosa", sub="43")
    namesake = come_back(client)

    assert (local.status_code, namesake.status_code) == (401, 401)
    assert "another person" in namesake.text


def test_removed_person_stays_removed(sessions: sessionmaker[Session], client: TestClient, issuer: str) -> None:
    """`user remove` holds whatever the service says; and nobody sets a password beside it."""
    be(issuer)
    come_back(client)
    with sessions.begin() as session, pytest.raises(AccountError, match="signs in at"):
        accounts.change_user(session, "rosa", password="long enough for all", now=NOW, actor="cli/test")
    with sessions.begin() as session:
        accounts.remove_user(session, "rosa", now=NOW, actor="cli/test")

    assert client.get("/api/v1/overview").status_code == 401
    assert come_back(client).status_code == 401


def test_person_without_password_has_none_to_guess(client: TestClient, issuer: str) -> None:
    """The form does not take an empty or any other one."""
    be(issuer)
    come_back(client)

    assert client.post("/login", data={"name": "rosa", "password": " "}).status_code == 401


def test_service_that_is_away_is_said(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Local users go on; the page says what does not work."""
    web = WebSettings(
        public_url=SITE,
        role_mapping={"a": "viewer"},
        oidc_issuer=f"http://127.0.0.1:{free_port()}",
        oidc_client_id="medpruner",
    )
    app = build_app(Settings(data=DataSettings(path=tmp_path), web=web), sessions, loopback=True)
    answer = TestClient(app, base_url=SITE, follow_redirects=False).get("/login/oidc")

    assert answer.status_code == 502
    assert "does not answer" in answer.text


def test_link_cannot_lead_elsewhere_by_way_of_the_service(client: TestClient, issuer: str) -> None:
    """The address to follow is one of this site."""
    be(issuer)

    assert urlsplit(come_back(client, "//evil.example").headers["location"]).path == "/"
