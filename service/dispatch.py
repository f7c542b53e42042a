"""A complete study -> analysis rows -> one message each; what is overdue is rung for again.

The row is committed before its message is sent, so a message without a row cannot exist and a row without a
message is found by the sweep.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from pydicom import dcmread
from pydicom.multival import MultiValue
from redis.exceptions import RedisError
from sqlalchemy import and_, func, or_, select, update
from sqlalchemy.exc import InterfaceError
from sqlalchemy.exc import OperationalError as DatabaseAway
from sqlalchemy.orm import Session, sessionmaker

from service import routing
from service.shared import VERSION, audit, lifeline, transitions
from service.shared.audit import AuditKind
from service.shared.db import Analysis, AnalysisState, Instance, Study, StudyState
from service.shared.log import explain_exception
from service.shared.queue import TASK_READ_STUDY, celery_options
from service.shared.settings import RouteSettings, Settings, for_route, routes

ACTOR = "service/dispatch"
PRODUCER_TIMEOUT_S = 3.0

log = structlog.get_logger(__name__)


class Doorbell:
    """Sends analysis ids to the workers' queue; knows when the queue has run dry."""

    def __init__(self, settings: Settings) -> None:
        self._app = Celery("medpruner", set_as_current=False)
        self._app.conf.update(celery_options(settings))
        self._app.conf.broker_transport_options |= {
            "socket_connect_timeout": PRODUCER_TIMEOUT_S,
            "socket_timeout": PRODUCER_TIMEOUT_S,
        }
        self._queue = settings.queue.name

    def ring(self, analysis_ids: Iterable[int]) -> list[int]:
        """Send one message per id and return the ids that were sent; those left over wait for the next sweep."""
        sent: list[int] = []
        try:
            with self._app.producer_pool.acquire(block=True, timeout=PRODUCER_TIMEOUT_S) as producer:
                for analysis_id in analysis_ids:
                    self._app.send_task(
                        TASK_READ_STUDY,
                        [analysis_id],
                        queue=self._queue,
                        producer=producer,
                        retry=False,
                    )
                    sent.append(analysis_id)
        except (OperationalError, OSError) as error:
            log.warning("queue_unreachable", error=type(error).__name__, remedy="see [queue] url; rung again soon")
        return sent

    def is_dry(self) -> bool:
        """No message waits: whatever is still queued in the database has lost its message."""
        try:
            with self._app.connection_for_write() as connection:
                return int(connection.default_channel.client.llen(self._queue)) == 0  # type: ignore[attr-defined]
        except (OperationalError, OSError, RedisError):  # kombu translates none of the client's own
            return False

    def close(self) -> None:
        self._app.close()


def dispatch_for_ever(settings: Settings, sessions: sessionmaker[Session], spool: Path, stop: Event) -> None:
    """Queue what is complete and ring for what waits, until `stop`; survives a database or queue that is away."""
    doorbell = Doorbell(settings)
    while not stop.is_set():
        try:
            sweep(settings, sessions, spool, doorbell, datetime.now(UTC))
        except (DatabaseAway, InterfaceError) as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        except Exception as error:  # noqa: BLE001  # this loop must live; what went wrong is logged and tried again
            log.error("dispatch_fault", error=explain_exception(error))
        stop.wait(settings.assembly.sweep_s)
    doorbell.close()


def check(settings: Settings) -> None:
    """Raise ConfigurationError for routes that can never be followed."""
    routing.check_routes(routes(settings))


def sweep(settings: Settings, sessions: sessionmaker[Session], spool: Path, doorbell: Doorbell, now: datetime) -> None:
    """One round: complete studies are queued, leases of dead workers ended, exhausted analyses failed, waiting ones
    rung for."""
    with sessions() as session:
        waiting = session.scalars(
            select(Study.id).where(
                Study.state == StudyState.COMPLETE,
                Study.held.is_(False),
                Study.dispatched_revision < Study.revision,
            )
        ).all()
    for study_id in waiting:
        with sessions.begin() as session:
            queue_study(session, study_id, settings, spool, now)
    with sessions.begin() as session:
        for analysis in _held_by_the_dead(session, settings.data.path):
            if transitions.end_lease(session, analysis, now=now):
                log.warning("worker_died", analysis_id=analysis.id, worker=analysis.worker, fence=analysis.fence)
        transitions.fail_exhausted(session, max_attempts=settings.queue.max_attempts, now=now, actor=ACTOR)
    ring_waiting(settings, sessions, doorbell, now)


def queue_study(session: Session, study_id: int, settings: Settings, spool: Path, now: datetime) -> None:
    """One analysis for every route that takes the study; none when somebody queued this revision already."""
    study = session.get_one(Study, study_id)
    taken = session.execute(
        update(Study)
        .where(
            Study.id == study_id,
            Study.state == StudyState.COMPLETE,
            Study.revision == study.revision,
            Study.dispatched_revision < study.revision,
        )
        .values(dispatched_revision=study.revision)
        .execution_options(synchronize_session=False)
    )
    if taken.rowcount != 1:  # type: ignore[attr-defined]
        return
    chosen = routing.taking(routes(settings), series_attributes(session, study_id, spool, routes(settings)))
    if not chosen:
        audit.append(
            session,
            AuditKind.STUDY_UNROUTED,
            now=now,
            actor=ACTOR,
            study_id=study_id,
            revision=study.revision,
        )
        log.warning("study_unrouted", study_id=study_id, remedy="no [[route]] matches; see `explain`")
    for route in chosen:
        analysis = new_analysis(session, study, route, settings)
        if study.patient_mismatch:
            transitions.refuse_unqueued(
                session,
                analysis,
                code="patient-mismatch",
                reason="instances with conflicting patient identifiers arrived under this Study Instance UID; "
                "patients are never analysed together. Correct the study at its source and send it again",
                now=now,
                actor=ACTOR,
            )
            log.error("patient_mismatch", study_id=study_id, analysis_id=analysis.id)
        else:
            transitions.queue_analysis(session, analysis, now=now, actor=ACTOR)


def new_analysis(session: Session, study: Study, route: RouteSettings, settings: Settings) -> Analysis:
    """The next run of `route` over the study's present revision, with its settings and its predecessor."""
    earlier = session.scalars(
        select(Analysis)
        .where(Analysis.study_id == study.id, Analysis.route == route.name)
        .order_by(Analysis.revision, Analysis.run_number)
    ).all()
    reported = [one.id for one in earlier if one.state in (AnalysisState.READ, AnalysisState.DONE)]
    running = [one.id for one in earlier if one.state is AnalysisState.RUNNING]
    runs = [one.run_number for one in earlier if one.revision == study.revision]
    applied = for_route(settings, route.name)
    return Analysis(
        study_id=study.id,
        revision=study.revision,
        route=route.name,
        run_number=max(runs, default=0) + 1,
        predecessor_id=next(iter([*running[-1:], *reported[-1:]]), None),
        attempts=0,
        fence=0,
        settings=_snapshot(applied),
        prompt=applied.report.prompt,
        software_version=VERSION,
    )


def series_attributes(
    session: Session, study_id: int, spool: Path, configured: Iterable[RouteSettings]
) -> list[dict[str, list[str]]]:
    """The attributes that routes match on, from one image instance of every series of the study."""
    wanted = sorted(routing.keywords(tuple(configured)))
    first_of_series: dict[str, str] = {}
    for series_uid, path in session.execute(
        select(Instance.series_uid, Instance.path)
        .where(Instance.study_id == study_id, Instance.is_image.is_(True))
        .order_by(Instance.id)
    ):
        first_of_series.setdefault(series_uid, path)
    if not wanted:
        return [{} for _ in first_of_series]
    return [_values(spool / path, wanted) for path in first_of_series.values()]


def ring_waiting(settings: Settings, sessions: sessionmaker[Session], doorbell: Doorbell, now: datetime) -> None:
    """Ring for what was never rung for or lost its worker since; and again for what is overdue, once the queue is dry
    or something that was rung for later is being read.

    Otherwise the queue, which keeps its order, may still hold the messages: ringing would only pile up more of them.
    """
    overdue = now - timedelta(seconds=settings.queue.ring_again_s)
    waits = or_(
        Analysis.state == AnalysisState.QUEUED,
        and_(Analysis.state == AnalysisState.RUNNING, Analysis.lease_until <= now),
    )
    with sessions() as session:
        rows = session.execute(
            select(Analysis.id, Analysis.rung_at, Analysis.lease_until).where(waits).order_by(Analysis.queued_at)
        ).all()
    ids, again = [], {}
    for analysis_id, rung_at, lease_until in rows:
        if rung_at is None or (lease_until is not None and rung_at < lease_until):
            ids.append(analysis_id)
        elif rung_at < overdue:
            again[analysis_id] = rung_at
    if again and doorbell.is_dry():
        ids += again
    elif again:
        with sessions() as session:
            running = (Analysis.state == AnalysisState.RUNNING) & (Analysis.lease_until > now)
            newest = session.scalar(select(func.max(Analysis.rung_at)).where(running))
        ids += [analysis_id for analysis_id, rung_at in again.items() if newest is not None and rung_at < newest]
    if not ids:
        return
    sent = doorbell.ring(ids)
    if sent:
        with sessions.begin() as session:
            session.execute(update(Analysis).where(Analysis.id.in_(sent)).values(rung_at=now))


def hand_back_of_the_dead(sessions: sessionmaker[Session], data: Path, now: datetime) -> int:
    """Queue again what workers of this machine were reading when they were ended; how many. A planned stop is no fault
    of the study, so it costs no attempt."""
    with sessions.begin() as session:
        return sum(
            transitions.hand_back(session, analysis, now=now, actor=ACTOR)
            for analysis in _held_by_the_dead(session, data)
        )


def _held_by_the_dead(session: Session, data: Path) -> list[Analysis]:
    """What runs on record, and whose worker has surely died; of the others their leases tell."""
    running = session.scalars(select(Analysis).where(Analysis.state == AnalysisState.RUNNING)).all()
    return [one for one in running if one.worker is not None and lifeline.is_cut(data, one.worker)]


def _snapshot(settings: Settings) -> dict[str, Any]:
    """What decides how a study is read, as configured; kept with the analysis, so that it can be repeated."""
    return {section: getattr(settings, section).model_dump(mode="json") for section in ("model", "pruning", "series")}


def _values(path: Path, wanted: list[str]) -> dict[str, list[str]]:
    """The values of these attributes as text; without those that cannot be read."""
    try:
        header = dcmread(path, specific_tags=wanted, stop_before_pixels=True, force=True)
    except Exception as error:  # noqa: BLE001  # pydicom raises whatever a broken header makes it raise
        log.warning("header_unreadable", file=path.name, error=explain_exception(error))
        return {}
    found: dict[str, list[str]] = {}
    for keyword in wanted:
        try:
            value = header.get(keyword)
            texts = [str(one) for one in (value if isinstance(value, MultiValue) else [value])]
        except Exception as error:  # noqa: BLE001  # a value that breaks its VR; the text would quote it
            log.warning("attribute_unreadable", keyword=keyword, error=type(error).__name__)
            continue
        if value is not None:
            found[keyword] = texts
    return found
