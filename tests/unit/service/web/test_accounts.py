"""Who may sign in: passwords, sessions, tokens and the throttle."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import Role, UserAccount, WebSession
from service.web import accounts
from service.web.accounts import AccountError, Throttle
from tests.rows import kinds, open_database

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
PASSWORD = "correct horse battery"
IDLE = timedelta(minutes=30)
LIFE = timedelta(hours=12)


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        with opened.begin() as session:
            accounts.add_user(session, "olga", PASSWORD, Role.OPERATOR, now=NOW, actor="cli/root")
        yield opened


def signed_in(sessions: sessionmaker[Session], password: str = PASSWORD) -> str | None:
    with sessions.begin() as session:
        return accounts.sign_in(session, "olga", password, now=NOW, life=LIFE, address="192.0.2.1")


def holder(sessions: sessionmaker[Session], secret: str, now: datetime = NOW) -> str | None:
    with sessions() as session:
        found = accounts.who_holds(session, secret, now=now, idle=IDLE)
    return found[0].name if found else None


def test_right_password_opens_a_session(sessions: sessionmaker[Session]) -> None:
    """The secret names its user, and both steps are audited."""
    secret = signed_in(sessions)

    assert secret is not None
    assert holder(sessions, secret) == "olga"
    assert kinds(sessions) == ["user-added", "signed-in"]


def test_wrong_password_opens_nothing(sessions: sessionmaker[Session]) -> None:
    """No session, and the failure is audited."""
    assert signed_in(sessions, "wrong horse battery") is None
    assert kinds(sessions)[-1] == "sign-in-failed"


def test_database_holds_neither_password_nor_secret(sessions: sessionmaker[Session]) -> None:
    """Who reads the tables cannot sign in with what they find."""
    secret = signed_in(sessions)

    with sessions() as session:
        account = session.query(UserAccount).one()
        held = session.query(WebSession).one()
    assert account.password_hash.startswith("$argon2id$")
    assert PASSWORD not in account.password_hash
    assert secret != held.secret_sha256


@pytest.mark.parametrize(
    ("later", "name"), [(timedelta(minutes=29), "olga"), (timedelta(minutes=31), None), (timedelta(hours=13), None)]
)
def test_session_ends_when_idle_or_old(sessions: sessionmaker[Session], later: timedelta, name: str | None) -> None:
    """Half an hour without a request ends it, and so does its full life."""
    secret = signed_in(sessions)

    assert secret is not None
    assert holder(sessions, secret, NOW + later) == name


def test_signing_out_ends_the_session_at_the_server(sessions: sessionmaker[Session]) -> None:
    """A cookie that was copied before is worth nothing afterwards."""
    secret = signed_in(sessions)
    assert secret is not None
    with sessions.begin() as session:
        found = accounts.who_holds(session, secret, now=NOW, idle=IDLE)
        assert found is not None
        accounts.sign_out(session, found[0], now=NOW, address="192.0.2.1")

    assert holder(sessions, secret) is None


def test_removed_user_is_out_at_once(sessions: sessionmaker[Session]) -> None:
    """Sessions end, the password no longer works, and the name stays taken."""
    secret = signed_in(sessions)
    assert secret is not None
    with sessions.begin() as session:
        accounts.remove_user(session, "olga", now=NOW, actor="cli/root")

    assert holder(sessions, secret) is None
    assert signed_in(sessions) is None
    with sessions.begin() as session, pytest.raises(AccountError, match="taken"):
        accounts.add_user(session, "olga", PASSWORD, Role.VIEWER, now=NOW, actor="cli/root")


def test_new_password_ends_sessions(sessions: sessionmaker[Session]) -> None:
    """Whoever knew the old password is out."""
    secret = signed_in(sessions)
    assert secret is not None
    with sessions.begin() as session:
        accounts.change_user(session, "olga", password="another long password", now=NOW, actor="cli/root")

    assert holder(sessions, secret) is None
    assert signed_in(sessions) is None
    assert signed_in(sessions, "another long password") is not None


def test_token_outlives_idle_sessions(sessions: sessionmaker[Session]) -> None:
    """A program that asks once a month still may, for a year."""
    with sessions.begin() as session:
        token = accounts.make_token(session, "olga", now=NOW, actor="cli/root")

    assert holder(sessions, token, NOW + timedelta(days=300)) == "olga"
    assert holder(sessions, token, NOW + timedelta(days=366)) is None


@pytest.mark.parametrize(("name", "password"), [("Olga Ö", PASSWORD), ("otto", "short"), ("otto", "x" * 300)])
def test_account_that_cannot_be_is_refused(sessions: sessionmaker[Session], name: str, password: str) -> None:
    """Names of other characters, and passwords too short or absurdly long."""
    with sessions.begin() as session, pytest.raises(AccountError):
        accounts.add_user(session, name, password, Role.VIEWER, now=NOW, actor="cli/root")


def test_throttle_lets_a_few_failures_pass_and_then_waits_longer_each_time() -> None:
    """Five are free; then 2 s, 4 s, 8 s."""
    throttle = Throttle()
    waits = []
    for _ in range(7):
        throttle.failed(["name olga"], NOW)
        waits.append(throttle.wait_s(["name olga"], NOW))

    assert waits == [0, 0, 0, 0, 2, 4, 8]
    assert throttle.wait_s(["name olga"], NOW + timedelta(seconds=9)) == 0
    assert throttle.wait_s(["name otto"], NOW) == 0


def test_success_clears_the_throttle() -> None:
    """Who remembers the password at the sixth attempt is not punished tomorrow."""
    throttle = Throttle()
    for _ in range(6):
        throttle.failed(["name olga"], NOW)
    throttle.succeeded(["name olga"])

    assert throttle.wait_s(["name olga"], NOW) == 0


def test_throttle_forgets_the_oldest_when_it_is_full() -> None:
    """A flood of names costs bounded memory."""
    throttle = Throttle(remembered=10)
    for number in range(100):
        throttle.failed([f"name {number}"], NOW)

    assert len(throttle._failures) == 10
