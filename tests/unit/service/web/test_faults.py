"""What the web answers when something is wrong: a page or a problem, a reference, and no value of anybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker
from structlog.testing import capture_logs

from service.shared.db import Analysis, Role
from tests.rows import open_database
from tests.web_visits import add_named_study, add_user, sign_in, visit

MARK = "ZQX^PATIENT"


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        add_user(opened, "olga", Role.OPERATOR)
        yield opened


@pytest.fixture
def client(sessions: sessionmaker[Session], tmp_path: Path) -> TestClient:
    visitor = visit(sessions, tmp_path)
    visitor.app.state.web.new_reference = lambda: "4711cafe"  # type: ignore[attr-defined]
    sign_in(visitor, "olga")
    return visitor


def broken_study(sessions: sessionmaker[Session]) -> int:
    """A study whose analysis holds what no shape allows, with a mark in it; its row id."""
    study_id = add_named_study(sessions, 1, name=MARK)
    with sessions.begin() as session:
        session.execute(update(Analysis).where(Analysis.study_id == study_id).values(counts=MARK))
    return study_id


@pytest.mark.parametrize(
    ("address", "kind"), [("/studies/{}", "text/html"), ("/api/v1/studies/{}", "application/problem+json")]
)
def test_unforeseen_fault_is_told_by_its_reference_only(
    sessions: sessionmaker[Session], client: TestClient, address: str, kind: str
) -> None:
    """The answer and the log share a reference; neither has the value that broke it, nor the answer a traceback."""
    study_id = broken_study(sessions)

    with capture_logs() as lines:
        answer = client.get(address.format(study_id))

    assert answer.status_code == 500
    assert answer.headers["content-type"].startswith(kind)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "4711cafe" in answer.text
    assert "ZQX" not in answer.text
    assert "Traceback" not in answer.text
    (line,) = (one for one in lines if one["event"] == "web_fault")
    assert (line["reference"], line["route"]) == ("4711cafe", address.format("{study_id}"))
    assert "ValidationError in" in line["error"]
    assert "ZQX" not in str(lines)


def test_problem_of_a_program_has_its_parts(client: TestClient) -> None:
    """RFC 9457: type, title, status and detail."""
    answer = client.get("/api/v1/studies/99")

    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "there is no study 99",
        "errors": [],
    }


@pytest.mark.parametrize(
    "address", ["/api/v1/studies?state={}", "/studies?state={}", "/api/v1/{}", "/{}", "/metrics/{}"]
)
def test_what_was_asked_is_not_repeated(client: TestClient, address: str) -> None:
    """A search may name a patient: where and why it cannot be is said, its value is not."""
    answer = client.get(address.format(MARK * 3))

    assert answer.status_code in (404, 422)
    assert "ZQX" not in answer.text


def test_problem_says_where_a_request_is_wrong(client: TestClient) -> None:
    """The parameter and the rule that it broke."""
    answer = client.get("/api/v1/studies?limit=0")

    assert answer.json()["errors"] == [{"where": "query.limit", "what": "greater_than_equal"}]


def test_program_that_is_not_signed_in_gets_a_problem(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """With the header that says how to sign in."""
    answer = visit(sessions, tmp_path, loopback=False).get("/api/v1/studies")

    assert (answer.status_code, answer.headers["content-type"]) == (401, "application/problem+json")
    assert answer.json()["title"] == "Unauthorized"
