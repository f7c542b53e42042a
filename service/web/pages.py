"""The dashboard: HTML pages for people, made on the server. What they show and do is what the API shows and does."""

from __future__ import annotations

import hmac
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode, urlsplit

import structlog
from fastapi import APIRouter, Form, HTTPException, Query, Request, Response
from fastapi.responses import RedirectResponse
from fastapi.templating import Jinja2Templates

from service import alerts, chain, refusals
from service.report.words import NOTICES
from service.shared import VERSION, audit
from service.shared.audit import AuditKind
from service.shared.db import Analysis, AuditEvent, Study
from service.shared.messages import AnalysisOutput, Flag
from service.shared.settings import leaves, routes, spool_folder
from service.situation import look
from service.web import accounts, images, queries
from service.web.access import (
    COOKIE,
    Permission,
    Visitor,
    Web,
    find_visitor,
    record_audit_read,
    record_list,
    record_look,
    record_view,
    the_web,
)
from service.web.accounts import AccountError
from service.web.health import check_all
from service.web.oidc import CALLBACK, NotSignedIn
from service.web.queries import Narrowing, StudyFilter
from service.web.schemas import AnalysisOut, StudyOut
from service.web.stories import study_story, study_summary

STATE_COOKIE = "medpruner_oidc"
HINT_COOKIE = "medpruner_oidc_hint"  # the ID token, for signing out; sent to /logout only
MOST_OF_A_HINT = 3500  # bytes; browsers drop a cookie of more than 4096
PAGE = 25
EVENTS = 60
MOST_REFUSALS = 5
WORST_FIRST = ("failed", "refused", "quarantined", "rejected", "pending")
TONES = {
    "good": ("done", "delivered", "committed", "complete", "chosen", "built"),
    "bad": ("failed", "rejected", "quarantined", "patient-mismatch"),
    "odd": ("refused", "held", "superseded", "cancelled"),
    "wait": ("queued", "pending", "receiving"),
    "run": ("running", "read"),
}
FUNNEL = (
    ("Slices", (("slices_in_series", "in the series"), ("slices_sampled", "sampled"), ("inputs_kept", "read"))),
    ("Visual tokens", (("tokens_in", "in all slices"), ("tokens_kept", "kept"))),
)

log = structlog.get_logger(__name__)
router = APIRouter(include_in_schema=False)
templates = Jinja2Templates(Path(__file__).parent / "templates")


# --- sign in --------------------------------------------------------------------------------------------------------


@router.get("/login")
def login_page(request: Request, following: Annotated[str, Query(alias="next", max_length=512)] = "/") -> Response:
    return _login_page(request, following)


@router.post("/login")
def login(
    request: Request,
    name: Annotated[str, Form(max_length=64)],
    password: Annotated[str, Form(max_length=1024)],
    following: Annotated[str, Form(alias="next", max_length=512)] = "/",
) -> Response:
    """Open a session; every failure takes as long and says as little as every other."""
    web = the_web(request)
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403, "sign in from this site's own page")
    now, address = web.clock(), _address(request)
    keys = (f"name {name}", f"address {address}")
    wait = web.throttle.wait_s(keys, now)
    if wait > 0:
        said = f"Too many failed attempts. Try again in {round(wait) + 1} s."
        response = _login_page(request, following, status=429, fault=said)
        response.headers["Retry-After"] = str(round(wait) + 1)
        return response
    life = timedelta(hours=web.settings.web.session_hours)
    with web.sessions.begin() as session:
        secret = accounts.sign_in(session, name, password, now=now, life=life, address=address)
    if secret is None:
        web.throttle.failed(keys, now)
        said = "Name or password is wrong."
        return _login_page(request, following, status=401, fault=said)
    web.throttle.succeeded(keys)
    response = _signed_in(request, secret, following)
    if web.sign_in_service is not None:
        response.delete_cookie(HINT_COOKIE, path="/logout")  # of somebody whom the service signed in here before
    return response


@router.get("/login/oidc")
def login_elsewhere(request: Request, following: Annotated[str, Query(alias="next", max_length=512)] = "/") -> Response:
    """To the hospital's sign-in service; it sends the browser back to the address below."""
    web = the_web(request)
    if web.sign_in_service is None:
        raise HTTPException(404, "There is no such page.")
    try:
        address, state = web.sign_in_service.begin(_inside(following), web.clock())
    except NotSignedIn as error:
        log.warning("oidc_not_begun", reason=str(error))
        return _login_page(request, following, status=502, fault=f"Not possible now: {error}.")
    redirect = RedirectResponse(address, 303)
    redirect.set_cookie(  # the one who comes back is the one who went
        STATE_COOKIE, state, max_age=600, path="/login", httponly=True, samesite="lax", secure=_is_secure(request)
    )
    return redirect


@router.get(CALLBACK)
def login_from_elsewhere(
    request: Request,
    state: Annotated[str, Query(max_length=128)] = "",
    code: Annotated[str, Query(max_length=4096)] = "",
    error: Annotated[str, Query(max_length=128)] = "",
    issuer: Annotated[str | None, Query(alias="iss", max_length=512)] = None,
) -> Response:
    """From the sign-in service, with a code for this one sign-in. Every failure is audited and says why."""
    web = the_web(request)
    if web.sign_in_service is None:
        raise HTTPException(404, "There is no such page.")
    settings, now = web.settings.web, web.clock()
    address = _address(request)
    keys = (f"address {address}",)
    if web.throttle.wait_s(keys, now) > 0:
        return _login_page(request, "/", status=429, fault="Too many failed attempts. Try again later.")
    try:
        if not hmac.compare_digest(state.encode(), request.cookies.get(STATE_COOKIE, "").encode()) or not state:
            raise NotSignedIn("this sign-in was not begun in this browser; please begin again")
        if issuer is not None and issuer != settings.oidc_issuer:  # RFC 9207
            raise NotSignedIn("the answer is of another sign-in service")
        if error:
            raise NotSignedIn("the sign-in service said no")
        person, following = web.sign_in_service.finish(state, code, now)
        role = accounts.best_role(person.roles, settings.role_mapping)
        if role is None:
            raise NotSignedIn("you have no role here; an administrator sets [web] role_mapping")
        with web.sessions.begin() as session:
            secret = accounts.admit(
                session,
                person.name,
                role,
                issuer=settings.oidc_issuer or "",
                subject=person.subject,
                now=now,
                life=timedelta(hours=settings.session_hours),
                address=address,
            )
    except (NotSignedIn, AccountError) as refused:
        web.throttle.failed(keys, now)
        log.warning("oidc_refused", reason=str(refused))
        with web.sessions.begin() as session:
            audit.append(session, AuditKind.SIGN_IN_FAILED, now=now, actor="web", address=address, by="oidc")
        return _login_page(request, "/", status=401, fault=f"Not signed in: {refused}.")
    response = _signed_in(request, secret, following)
    response.delete_cookie(STATE_COOKIE, path="/login")
    hint = person.id_token if len(person.id_token) <= MOST_OF_A_HINT else ""
    _set_cookie(request, response, HINT_COOKIE, f"id_token:{hint}", path="/logout")
    return response


@router.post("/logout")
def logout(request: Request, csrf: Annotated[str, Form(max_length=128)] = "") -> Response:
    web, who = the_web(request), _visitor(request)
    if who is not None and who.who is not None:
        if csrf != who.csrf:
            raise HTTPException(403, "the form is of another session")
        with web.sessions.begin() as session:
            accounts.sign_out(session, who.who, now=web.clock(), address=_address(request))
    response = RedirectResponse(_way_out(web, request.cookies.get(HINT_COOKIE)), 303)
    response.delete_cookie(COOKIE)
    response.delete_cookie(HINT_COOKIE, path="/logout")
    return response


def _way_out(web: Web, hint: str | None) -> str:
    """To the sign-in page; by way of the sign-in service where it signed this browser in and can sign it out."""
    if hint is None or web.sign_in_service is None:
        return "/login"
    try:
        return web.sign_in_service.leave(hint.partition(":")[2]) or "/login"
    except NotSignedIn as error:
        log.warning("oidc_not_left", reason=str(error))
        return "/login"


# --- look -----------------------------------------------------------------------------------------------------------


@router.get("/")
def overview_page(request: Request) -> Response:
    who = _visitor(request)
    if who is None:
        return _to_login(request)
    web = the_web(request)
    with web.reading() as session:
        now = web.clock()
        glance = queries.overview(session, now)
        told = alerts.decide(look(session, web.settings, now), web.settings)
        destinations = queries.destinations(session, web.settings.destination)
        rows, _ = queries.list_studies(session, StudyFilter(), before=None, limit=8, by_identifier=False)
        studies = [study_summary(row, who) for row in rows]
    record_list(web, who, len(studies), again="poll" in request.query_params)
    return _page(
        request,
        "overview.html",
        who,
        glance=glance,
        alerts=told,
        destinations=destinations,
        studies=studies,
        checks=check_all(web),
        refused=refusals.last_day(spool_folder(web.settings), now)[:MOST_REFUSALS],
        now=now,
    )


@router.get("/studies")
def studies_page(
    request: Request,
    q: Annotated[str, Query(max_length=128)] = "",
    state: Annotated[str, Query(max_length=16)] = "",
    sender: Annotated[str, Query(max_length=16)] = "",
    since: Annotated[str, Query(max_length=10)] = "",
    until: Annotated[str, Query(max_length=10)] = "",
    route: Annotated[str, Query(max_length=32)] = "",
    destination: Annotated[str, Query(max_length=32)] = "",
    cursor: Annotated[str, Query(max_length=18)] = "",
) -> Response:
    """A list that narrows as one types; `cursor` brings the next rows of the same list."""
    who = _visitor(request)
    if who is None:
        return _to_login(request)
    web = the_web(request)
    text = q.strip().replace("\0", "")
    which = StudyFilter(
        text or None,
        Narrowing(state) if state in list(Narrowing) else None,
        sender.replace("\0", "") or None,
        _day(since),
        _day(until, timedelta(days=1)),
        route=route.replace("\0", "") or None,
        destination=destination.replace("\0", "") or None,
    )
    with web.reading() as session:
        rows, following = queries.list_studies(
            session,
            which,
            before=int(cursor) if cursor.isdigit() else None,
            limit=PAGE,
            by_identifier=who.sees_content,
        )
        studies = [study_summary(row, who) for row in rows]
    record_list(web, who, len(studies))
    chosen = {"q": text, "state": state, "sender": sender, "since": since, "until": until}
    chosen |= {"route": route, "destination": destination}
    more = None
    if following is not None:
        more = "/studies?" + urlencode({**{key: value for key, value in chosen.items() if value}, "cursor": following})
    return _page(
        request,
        "studies.html",
        who,
        studies=studies,
        more=more,
        chosen=chosen,
        states=list(Narrowing),
        senders=sorted({source.ae_title for source in web.settings.source}),
        routes=[one.name for one in routes(web.settings)],
        destinations=[one.name for one in web.settings.destination],
    )


@router.get("/studies/{study_id}")
def study_page(request: Request, study_id: int, analysis: Annotated[int | None, Query()] = None) -> Response:
    """One study; `analysis` chooses which of its analyses is shown, the newest that has a report otherwise."""
    who = _visitor(request)
    if who is None:
        return _to_login(request)
    web = the_web(request)
    if not 0 < study_id < 2**63:
        raise HTTPException(404, "there is no such study")
    with web.reading() as session:
        study = session.get(Study, study_id)
        if study is None:
            raise HTTPException(404, f"there is no study {study_id}")
        story = study_story(session, study, who)
        events, _ = queries.list_events(session, study_id=study_id, limit=200)
    chosen = _chosen(story.analyses, analysis)
    output = _output(web, chosen)
    if "poll" in request.query_params:  # the page refreshes itself: a part of the look that began with it
        record_look(web, who, study_id)
    else:
        record_view(web, AuditKind.STUDY_VIEWED, who, study_id=study_id)
    running = story.state == "receiving" or any(one.state in ("queued", "running", "read") for one in story.analyses)
    pending = any(d.state == "pending" for a in story.analyses for r in a.results for d in r.deliveries)
    return _page(
        request,
        "study.html",
        who,
        study=story,
        analysis=chosen,
        candidates={one.series_uid: one for one in output.candidates} if output else {},
        coverage=output.retention.coverage if output else (),
        answers=output.answers if output and who.sees_content else (),
        events=_runs(events),
        live=running or pending,
        resumable=_is_resumable(story),
        notices=[NOTICES.get(Flag(flag), flag) for flag in (chosen.flags or [])] if chosen else [],
        funnel=FUNNEL,
    )


@router.get("/charts")
def charts_page(request: Request, days: Annotated[int, Query(ge=1, le=366)] = 7) -> Response:
    who = _visitor(request)
    return _to_login(request) if who is None else _page(request, "charts.html", who, days=days)


@router.get("/events")
def events_page(
    request: Request,
    kind: Annotated[str, Query(max_length=48)] = "",
    actor: Annotated[str, Query(max_length=128)] = "",
    study: Annotated[str, Query(max_length=18)] = "",
    since: Annotated[str, Query(max_length=10)] = "",
    until: Annotated[str, Query(max_length=10)] = "",
    cursor: Annotated[str, Query(max_length=18)] = "",
) -> Response:
    """Everything that happened, also what users did; for auditors and operators."""
    who = _visitor(request)
    if who is None:
        return _to_login(request)
    _must(who, Permission.EVENTS)
    web = the_web(request)
    with web.reading() as session:
        events, following = queries.list_events(
            session,
            kind=kind or None,
            actor=actor.replace("\0", "") or None,
            study_id=int(study) if study.isdecimal() else None,
            since=_day(since),
            until=_day(until, timedelta(days=1)),
            before=int(cursor) if cursor.isdigit() else None,
            limit=EVENTS,
        )
        lag = chain.lag(session)
    record_audit_read(web, who)
    asked = {"kind": kind, "actor": actor, "study": study, "since": since, "until": until}
    chosen = {key: value for key, value in asked.items() if value}
    more = "/events?" + urlencode({**chosen, "cursor": following}) if following else None
    kinds = list(AuditKind)
    return _page(request, "events.html", who, events=events, more=more, kinds=kinds, chosen=chosen, lag=lag)


@router.get("/configuration")
def configuration_page(request: Request) -> Response:
    """Every key as resolved, secrets masked; for auditors and operators."""
    who = _visitor(request)
    if who is None:
        return _to_login(request)
    _must(who, Permission.CONFIGURATION)
    sections: dict[str, list[tuple[str, Any]]] = {}
    for key, value in leaves(the_web(request).settings):
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append((name or section, value))
    return _page(request, "configuration.html", who, sections=sections)


def error_page(request: Request, status: int, said: str) -> Response:
    return _page(request, "error.html", None, status=status, said=said)


# --- inside ---------------------------------------------------------------------------------------------------------


def _login_page(request: Request, following: str, status: int = 200, fault: str | None = None) -> Response:
    web = the_web(request)
    with web.reading() as session:
        users = accounts.count_users(session)
    issuer = web.settings.web.oidc_issuer
    return _page(
        request,
        "login.html",
        None,
        status=status,
        following=_inside(following),
        users=users,
        fault=fault,
        elsewhere=urlsplit(issuer).hostname if issuer else None,
    )


def _signed_in(request: Request, secret: str, following: str) -> Response:
    redirect = RedirectResponse(_inside(following), 303)
    _set_cookie(request, redirect, COOKIE, secret)
    return redirect


def _set_cookie(request: Request, response: Response, name: str, value: str, path: str = "/") -> None:
    response.set_cookie(
        name,
        value,
        max_age=int(the_web(request).settings.web.session_hours * 3600),
        path=path,
        httponly=True,
        samesite="lax",  # strict would sign people out who follow a link from their RIS
        secure=_is_secure(request),
    )


def _address(request: Request) -> str:
    return request.client.host if request.client else "unknown"


def _is_secure(request: Request) -> bool:
    """Whether browsers reach this over TLS, be it ours or a proxy's."""
    public = the_web(request).settings.web.public_url or ""
    return request.url.scheme == "https" or public.startswith("https://")


def _page(request: Request, name: str, who: Visitor | None, status: int = 200, **content: Any) -> Response:
    path = request.url.path
    return templates.TemplateResponse(
        request,
        name,
        {"who": who, "path": path, "version": VERSION, "Permission": Permission, **content},
        status_code=status,
    )


def _visitor(request: Request) -> Visitor | None:
    return find_visitor(request, request.cookies.get(COOKIE), None)


def _to_login(request: Request) -> Response:
    address = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    response = RedirectResponse(f"/login?next={quote(address)}", 303)
    if request.headers.get("hx-request"):
        response = RedirectResponse("/login", 303)
        response.status_code = 401
        response.headers["HX-Redirect"] = "/login"
    return response


def _must(who: Visitor, permission: Permission) -> None:
    if not who.may(permission):
        raise HTTPException(403, "Your role does not include this page.")


def _inside(address: str) -> str:
    """An address of this site, whatever a link asked for."""
    return address if address.startswith("/") and not address.startswith(("//", "/\\")) else "/"


def _day(text: str, later: timedelta = timedelta(0)) -> datetime | None:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC) + later
    except ValueError:
        return None


def _chosen(analyses: list[AnalysisOut], wanted: int | None) -> AnalysisOut | None:
    for one in analyses:
        if one.id == wanted:
            return one
    return next((one for one in analyses if one.counts), analyses[0] if analyses else None)


def _is_resumable(story: StudyOut) -> bool:
    """Whether `requeue` would find anything: held, failed in its present revision, or rejected."""
    failed = any(one.state == "failed" and one.revision == story.revision for one in story.analyses)
    rejected = any(d.state == "rejected" for a in story.analyses for r in a.results for d in r.deliveries)
    return story.held or failed or rejected


def _output(web: Web, chosen: AnalysisOut | None) -> AnalysisOutput | None:
    """What the worker said, where it is still there and as it was."""
    if chosen is None or chosen.counts is None:
        return None
    with web.reading() as session:
        try:
            return images.read_output(web.settings, session.get_one(Analysis, chosen.id))[0]
        except images.NotShowable:
            return None


def _runs(events: list[AuditEvent]) -> list[tuple[AuditEvent, int]]:
    """Newest first; neighbours of one kind by one actor become the newest of them, with their number."""
    runs: list[tuple[AuditEvent, int]] = []
    for event in events:
        if runs and (runs[-1][0].kind, runs[-1][0].actor) == (event.kind, event.actor):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((event, 1))
    return runs


def _person(name: str) -> str:
    """PS3.5 6.2.1.1 PN, alphabetic group, as people write it: FAMILY, Given Middle."""
    family, _, rest = name.split("=")[0].partition("^")
    given = " ".join(part for part in rest.split("^")[:2] if part)
    return f"{family}, {given}" if given else family


def _date(text: str) -> str:
    return f"{text[:4]}-{text[4:6]}-{text[6:]}" if len(text) == 8 and text.isdigit() else text


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _number(count: float | None) -> str:
    return "–" if count is None else f"{count:,}".replace(",", " ")


def _percent(part: float | None, whole: float | None) -> str:
    return "–" if part is None or not whole else f"{100 * part / whole:.0f} %"


def _words(kind: str) -> str:
    return kind.replace("-", " ").replace("_", " ")


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{_words(key)} {value}" for key, value in values.items() if value is not None)


def _delivery_word(counts: dict[str, int]) -> str:
    """The state that matters most among a study's deliveries."""
    present = Counter(counts)
    return next((state for state in WORST_FIRST if present[state]), next(iter(counts), ""))


def _tone(state: str) -> str:
    """How a state is marked, in colour and shape."""
    return next((tone for tone, states in TONES.items() if state in states), "plain")


templates.env.filters |= {
    "person": _person,
    "dicom_date": _date,
    "duration": _duration,
    "size": _size,
    "number": _number,
    "words": _words,
    "pairs": _pairs,
    "delivery_word": _delivery_word,
    "tone": _tone,
}
templates.env.globals |= {"percent": _percent}
