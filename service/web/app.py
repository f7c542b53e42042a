"""The web server: its parts put together, and the headers that every answer carries."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles
from sqlalchemy.orm import Session, sessionmaker

from service.shared import VERSION
from service.shared.db import open_engine, open_sessions
from service.shared.settings import Settings, database_url
from service.web import accounts, api, faults, health, metrics, pages
from service.web.access import Web
from service.web.oidc import origin

STATIC = Path(__file__).parent / "static"
STOP_GRACE_S = 5
# Everything comes from this host, nothing is inline: a report text that holds markup can run nothing.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}

log = structlog.get_logger(__name__)


def build_app(
    settings: Settings,
    sessions: sessionmaker[Session],
    reading: sessionmaker[Session] | None = None,
    *,
    loopback: bool | None = None,
) -> FastAPI:
    """The application. reading: sessions that cannot write; loopback: whether it listens on loopback only."""
    app = FastAPI(
        title="medpruner-pacs",
        version=VERSION,
        summary="Research software, not a medical device.",
        docs_url=None,  # the documentation pages of FastAPI load scripts from other hosts
        redoc_url=None,
        openapi_url="/api/v1/openapi.json",
    )
    own = is_loopback(settings.web.host) if loopback is None else loopback
    app.state.web = Web(settings, sessions, reading or sessions, own)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.include_router(api.router)
    app.include_router(pages.router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    faults.handle(app)
    app.middleware("http")(_adding(_headers(settings)))  # last, so that it is outermost: faults carry them too
    return app


def serve_web(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> None:
    """Serve until `stop`. Without users on loopback only, whatever [web] host says."""
    if not settings.web.enabled:
        log.warning("web_not_enabled", remedy="[web] enabled = true")
        stop.wait()
        return
    with sessions() as session:
        users = accounts.count_users(session)
    host = settings.web.host
    if not users and not settings.web.signs_in_elsewhere and not is_loopback(host):
        log.warning("web_on_loopback_only", reason="there are no users", remedy="`./run user add NAME`, then restart")
        host = "127.0.0.1"
    if not is_loopback(host) and settings.web.tls_certificate is None:
        log.warning("web_without_tls", remedy="[web] tls_certificate and tls_key, or a TLS proxy before it")
    reading = open_sessions(open_engine(database_url(settings), read_only=True))
    server = uvicorn.Server(
        uvicorn.Config(
            build_app(settings, sessions, reading, loopback=is_loopback(host)),
            host=host,
            port=settings.web.port,
            ssl_certfile=settings.web.tls_certificate,
            ssl_keyfile=settings.web.tls_key,
            access_log=False,  # addresses of pages hold what was searched for
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=STOP_GRACE_S,
        )
    )
    thread = Thread(target=server.run, name="web")
    thread.start()
    log.info("web_serving", host=host, port=settings.web.port, users=users)
    while thread.is_alive() and not stop.wait(0.2):
        pass
    server.should_exit = True
    thread.join()
    if not stop.is_set():
        raise SystemExit(f"[web] {host}:{settings.web.port}: cannot be listened on; is the port taken?")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _headers(settings: Settings) -> dict[str, str]:
    """HEADERS; a form may also lead to the sign-in service, which is where signing out ends."""
    if settings.web.oidc_issuer is None:
        return HEADERS
    policy = HEADERS["Content-Security-Policy"]
    allowed = policy.replace("form-action 'self'", f"form-action 'self' {origin(settings.web.oidc_issuer)}")
    return {**HEADERS, "Content-Security-Policy": allowed}


def _adding(headers: Mapping[str, str]) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Any]:
    async def add_headers(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await go_on(request)
        for name, value in headers.items():
            response.headers.setdefault(name, value)
        if not request.url.path.startswith("/static/"):
            response.headers.setdefault("Cache-Control", "no-store")
        return response

    return add_headers
