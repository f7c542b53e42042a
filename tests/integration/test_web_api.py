"""The API keeps to its own OpenAPI document, whatever it is sent: schemathesis, against the real application.

Driven by hand and not through its pytest plugin, which does not know this pytest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from sqlalchemy.orm import sessionmaker

from service.shared.db import Role
from service.shared.settings import Settings
from service.web import accounts
from service.web.app import build_app
from tests.rows import open_database
from tests.web_visits import add_named_study, add_user, settings_in

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
OPERATIONS = [
    (path, method)
    for path, operations in build_app(Settings(), sessionmaker()).openapi()["paths"].items()
    for method in operations
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """The API's document with its application behind it, and a token of an operator."""
    folder = tmp_path_factory.mktemp("web")
    with open_database(f"sqlite:///{folder / 'medpruner.sqlite'}") as sessions:
        add_named_study(sessions, 1)
        add_user(sessions, "olga", Role.OPERATOR)
        with sessions.begin() as session:
            token = accounts.make_token(session, "olga", now=datetime.now(UTC), actor="cli/test")
        app = build_app(settings_in(folder), sessions, loopback=False)
        yield schemathesis.openapi.from_asgi("/api/v1/openapi.json", app), token


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_api_answers_as_its_document_says(served: tuple[Any, str], path: str, method: str) -> None:
    """Only documented statuses, types and shapes; never a 500."""
    document, token = served
    # 503 is how readiness says that something it needs is away, as Redis is here
    checks = [check for check in CHECKS if path != "/health/ready" or check is not not_a_server_error]

    @settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=document[path][method].as_strategy())
    def answers_well(case: Case) -> None:
        case.call_and_validate(headers={"Authorization": f"Bearer {token}"}, checks=checks)

    answers_well()


@pytest.mark.parametrize(("path", "method"), [one for one in OPERATIONS if one[0].startswith("/api/")])
@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer made-up"}, {"Cookie": "medpruner_session=made-up"}])
def test_api_answers_nobody_without_a_token(
    served: tuple[Any, str], path: str, method: str, header: dict[str, str]
) -> None:
    """401 before anything else is looked at, whatever secret is made up."""
    client = TestClient(served[0].app)
    address = re.sub(r"\{[a-z_]+\}", "1", path)

    assert client.request(method, address, headers=header).status_code == 401
