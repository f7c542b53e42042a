"""What went wrong -> a page for people, problem details (RFC 9457) for programs. Neither shows a value nor a traceback.

What nobody foresaw is logged with a reference that the answer shows: whoever is told can be helped without telling
what was looked for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import InterfaceError, OperationalError
from starlette.exceptions import HTTPException

from service.shared.log import explain_exception
from service.web.access import the_web
from service.web.pages import error_page
from service.web.schemas import Problem

PROBLEM = "application/problem+json"
OF_PROGRAMS = ("/api/", "/health/", "/static/", "/metrics")
DOCUMENTED = ("HTTPValidationError", "ValidationError")  # FastAPI's shapes, which our answers do not have

log = structlog.get_logger(__name__)


def handle(app: FastAPI) -> None:
    """Answer every fault of this application, and say so in its OpenAPI document."""

    async def on_http_error(request: Request, error: HTTPException) -> Response:
        return _answer(request, error.status_code, str(error.detail), headers=error.headers)

    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        said = "The address or form holds a value that cannot be."
        errors = [{"where": ".".join(map(str, one["loc"])), "what": one["type"]} for one in error.errors()]
        return _answer(request, 422, said, errors=errors)

    app.exception_handler(HTTPException)(on_http_error)
    app.exception_handler(RequestValidationError)(on_invalid)
    app.middleware("http")(_catch)
    document = app.openapi
    app.openapi = lambda: _documented(document())  # type: ignore[method-assign]


async def _catch(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
    """Whatever else is raised: on record here, with a reference; its text may quote a patient and goes nowhere."""
    try:
        return await go_on(request)
    except (OperationalError, InterfaceError) as error:
        log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        return _answer(request, 503, "The database does not answer. Try again in a moment.")
    except Exception as error:  # noqa: BLE001  # the last place that can answer
        reference = the_web(request).new_reference()
        route = getattr(request.scope.get("route"), "path", None)  # the address itself may hold what was searched for
        log.error("web_fault", reference=reference, method=request.method, route=route, error=explain_exception(error))
        said = f"This is a fault of the service. Its log has more under the reference {reference}."
        return _answer(request, 500, said, reference=reference)


def _answer(
    request: Request,
    status: int,
    said: str,
    *,
    headers: Mapping[str, str] | None = None,
    reference: str | None = None,
    errors: list[dict[str, str]] | None = None,
) -> Response:
    if not request.url.path.startswith(OF_PROGRAMS):
        return error_page(request, status, said)
    problem = Problem(
        title=HTTPStatus(status).phrase, status=status, detail=said, reference=reference, errors=errors or []
    )
    return Response(problem.model_dump_json(exclude_none=True), status, headers, media_type=PROBLEM)


def _documented(document: dict[str, Any]) -> dict[str, Any]:
    """Problems under their media type, wherever the document speaks of one; in place, and twice is once."""
    for operation in (one for path in document["paths"].values() for one in path.values()):
        for answer in operation["responses"].values():
            shape = answer.get("content", {}).get("application/json", {}).get("schema", {})
            if shape.get("$ref", "").rpartition("/")[2] in ("Problem", *DOCUMENTED):
                answer["content"] = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for name in DOCUMENTED:
        document.get("components", {}).get("schemas", {}).pop(name, None)
    return document
