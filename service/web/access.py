"""Who asks, and may they? From cookie or bearer token to a Visitor, and from a Visitor to 401 or 403.

Without any user, a web that listens on loopback only answers everybody there, without identifiers, reports or
images, and takes no commands.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from threading import Lock
from typing import Annotated, cast

from fastapi import Depends, HTTPException, Request, Security
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session, sessionmaker

from service.shared import audit
from service.shared.audit import AuditKind
from service.shared.db import Role
from service.shared.settings import Settings
from service.web import accounts
from service.web.accounts import SignedIn, Throttle
from service.web.oidc import SignInService
from service.web.proxy import ProxySignIn

COOKIE = "medpruner_session"
CSRF_HEADER = "X-CSRF-Token"
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]", "::1", "testserver"}
MOST_VIEWS = 10_000
ONE_LOOK = timedelta(minutes=10)
THE_AUDIT, THE_FIRST_PAGE = 0, -1  # where a look is at no study
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Permission(StrEnum):
    CONTENT = "content"  # patient identifiers, report text, images
    COMMANDS = "commands"  # requeue, cancel, re-send, pause
    EVENTS = "events"  # every event, also those of users
    CONFIGURATION = "configuration"


PERMISSIONS: dict[Role, frozenset[Permission]] = {
    Role.VIEWER: frozenset({Permission.CONTENT}),
    Role.OPERATOR: frozenset(Permission),
    Role.AUDITOR: frozenset({Permission.EVENTS, Permission.CONFIGURATION}),
}


@dataclass(slots=True)
class RecentViews:
    """Who looked at which study lately, or at THE_AUDIT: the many requests of one look are one view in the audit."""

    _seen: dict[tuple[str, int], datetime] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def is_new(self, actor: str, study_id: int, now: datetime) -> bool:
        """Whether this begins a look of its own."""
        with self._lock:
            last = self._seen.pop((actor, study_id), None)
            self._seen[actor, study_id] = now
            while len(self._seen) > MOST_VIEWS:
                del self._seen[next(iter(self._seen))]
        return last is None or now - last >= ONE_LOOK


@dataclass(slots=True)
class Web:
    """What every request needs; lives in `app.state.web`."""

    settings: Settings
    sessions: sessionmaker[Session]  # writes
    reading: sessionmaker[Session]  # cannot write, and keeps no writer waiting
    loopback: bool  # listens on loopback only
    throttle: Throttle = field(default_factory=Throttle)
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    new_reference: Callable[[], str] = lambda: secrets.token_hex(4)  # of a fault, in the answer and the log
    recent_views: RecentViews = field(default_factory=lambda: RecentViews())
    proxy: ProxySignIn = field(init=False)
    sign_in_service: SignInService | None = field(init=False)

    def __post_init__(self) -> None:
        web = self.settings.web
        self.proxy = ProxySignIn(web)
        self.sign_in_service = SignInService(web) if web.oidc_issuer is not None else None


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks. `who` is None for anybody on loopback while there are no users."""

    who: SignedIn | None
    csrf: str | None = None

    @property
    def actor(self) -> str:
        return f"web/{self.who.name}" if self.who else "web/anonymous"

    def may(self, permission: Permission) -> bool:
        return self.who is not None and permission in PERMISSIONS[self.who.role]

    @property
    def can_sign_out(self) -> bool:
        """Here; whom a proxy signed in signs out there."""
        return self.who is not None and self.who.secret_sha256 != ""

    @property
    def sees_content(self) -> bool:
        return self.may(Permission.CONTENT)


_cookie = APIKeyCookie(name=COOKIE, auto_error=False, description="A session of the dashboard")
_bearer = HTTPBearer(auto_error=False, description="A token of `./run user token NAME`")


def the_web(request: Request) -> Web:
    return cast(Web, request.app.state.web)


def find_visitor(request: Request, cookie: str | None, bearer: str | None) -> Visitor | None:
    """The visitor; None when somebody must sign in first."""
    web = the_web(request)
    if bearer is None and (named := _named_by_proxy(web, request)) is not None:
        return named
    secret = bearer or cookie
    with web.reading() as session:
        if secret:
            now = web.clock()
            found = accounts.who_holds(
                session, secret, now=now, idle=timedelta(minutes=web.settings.web.session_idle_min)
            )
            if found and found[0].is_token is (bearer is not None):
                who, seen_at = found
                if now - seen_at > accounts.SEEN_EVERY and "poll" not in request.query_params:
                    with web.sessions.begin() as writing:
                        accounts.touch(writing, who, now=now)
                return Visitor(who, None if who.is_token else accounts.csrf_token(secret))
        # a name that is not loopback's own, on a loopback address, is another site's (DNS rebinding)
        nobody = (
            web.loopback
            and not web.settings.web.signs_in_elsewhere
            and request.url.hostname in LOOPBACK_NAMES
            and accounts.count_users(session) == 0
        )
    return Visitor(None) if nobody else None


def _named_by_proxy(web: Web, request: Request) -> Visitor | None:
    """Whom a trusted proxy names; the first request of a while is a sign-in and audited."""
    proxied = web.proxy.person(request)
    if proxied is None:
        return None
    who = Visitor(SignedIn(proxied.name, proxied.role, "", False), proxied.csrf)
    now = web.clock()
    if web.proxy.is_new(proxied.name, now):
        address = request.client.host if request.client else "unknown"
        with web.sessions.begin() as session:
            audit.append(session, AuditKind.SIGNED_IN, now=now, actor=who.actor, address=address, by="proxy")
    return who


def visitor(
    request: Request,
    cookie: Annotated[str | None, Security(_cookie)] = None,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None,
) -> Visitor:
    """For the API: 401 without a session or token, 403 when a change of a session lacks its CSRF token."""
    found = find_visitor(request, cookie, bearer.credentials if bearer else None)
    if found is None:
        raise HTTPException(401, "sign in, or send a token", {"WWW-Authenticate": "Bearer"})
    if request.method not in SAFE_METHODS and found.csrf is not None:
        sent = request.headers.get(CSRF_HEADER, "")
        if not hmac.compare_digest(sent.encode(), found.csrf.encode()):
            raise HTTPException(403, f"header {CSRF_HEADER} is missing or of another session")
    return found


def _need(permission: Permission) -> Callable[[Visitor], Visitor]:
    def check(who: Annotated[Visitor, Depends(visitor)]) -> Visitor:
        if not who.may(permission):
            if who.who is None:
                raise HTTPException(403, f"needs a user with the right {permission.value!r}: `./run user add`")
            raise HTTPException(403, f"role {who.who.role.value} lacks the right {permission.value!r}")
        return who

    return check


AnyVisitor = Annotated[Visitor, Depends(visitor)]
Reader = Annotated[Visitor, Depends(_need(Permission.CONTENT))]
Operator = Annotated[Visitor, Depends(_need(Permission.COMMANDS))]
EventReader = Annotated[Visitor, Depends(_need(Permission.EVENTS))]
ConfigurationReader = Annotated[Visitor, Depends(_need(Permission.CONFIGURATION))]
TheWeb = Annotated[Web, Depends(the_web)]


def record_look(web: Web, who: Visitor, study_id: int, analysis_id: int | None = None) -> None:
    """A part of a study is shown, a slice for instance: on record unless this visitor looked at it a moment ago."""
    if web.recent_views.is_new(who.actor, study_id, web.clock()):
        which = {} if analysis_id is None else {"analysis_id": analysis_id}
        record_view(web, AuditKind.STUDY_VIEWED, who, study_id=study_id, **which)


def record_audit_read(web: Web, who: Visitor) -> None:
    """Somebody reads the audit: on record unless this visitor read it a moment ago."""
    if web.recent_views.is_new(who.actor, THE_AUDIT, web.clock()):
        record_view(web, AuditKind.AUDIT_READ, who)


def record_list(web: Web, who: Visitor, studies: int, *, again: bool = False) -> None:
    """Studies are listed with what names their patients; again: by a page that refreshes itself, which is one look."""
    is_new = web.recent_views.is_new(who.actor, THE_FIRST_PAGE, web.clock())
    if who.sees_content and (is_new or not again):
        record_view(web, AuditKind.STUDIES_LISTED, who, studies=studies)


def record_view(web: Web, kind: AuditKind, who: Visitor, **what: int | str) -> None:
    """Put on record that somebody looked, before anything is shown."""
    if kind is AuditKind.STUDY_VIEWED:
        web.recent_views.is_new(who.actor, int(what["study_id"]), web.clock())
    with web.sessions.begin() as session:
        audit.append(session, kind, now=web.clock(), actor=who.actor, **what)  # type: ignore[arg-type]
