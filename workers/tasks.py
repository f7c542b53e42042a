"""Claim an analysis, read it, close it. Knows the database and the way; knows nothing of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from threading import Event, Thread
from time import sleep
from typing import TYPE_CHECKING, TypeVar

import structlog
from billiard.exceptions import SoftTimeLimitExceeded
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service.shared import transitions
from service.shared.db import Analysis, Study
from service.shared.inputs import inputs_of
from service.shared.log import explain_exception
from service.shared.messages import AnalysisOutput, store_output
from service.shared.settings import QueueSettings, Settings, spool_folder
from service.shared.transitions import Claim
from workers import pipeline
from workers.errors import Refusal, RefusalCode

if TYPE_CHECKING:
    from workers.app import Child

CLOSE_AGAIN_S = (1, 2, 5, 10, 20, 30)  # pauses between tries to put an end on record

T = TypeVar("T")

log = structlog.get_logger(__name__)


def read_study(analysis_id: int, child: Child) -> None:
    """Run one analysis if there is one to claim; a message delivered again finds nothing and returns.

    Every end is a row: read, refused, queued again or failed. A lost fence ends in silence, for somebody else
    holds the analysis now.
    """
    settings, sessions = child.settings, child.sessions
    claim = _claim(sessions, analysis_id, child.name, settings.queue)
    if claim is None:
        log.info("nothing_to_claim", analysis_id=analysis_id)
        return
    with (
        structlog.contextvars.bound_contextvars(analysis_id=analysis_id, fence=claim.fence, attempt=claim.attempt),
        _lease_kept(sessions, claim, settings.queue.lease_s),
    ):
        log.info("analysis_started")
        try:
            request = request_of(sessions, claim.analysis_id, settings)
            output, arrays = pipeline.read(request, child.model_for(request.settings.model))
        except Refusal as refusal:
            _close_refused(child, claim, refusal)
        except SoftTimeLimitExceeded:
            limit = settings.queue.hard_time_limit_s
            _close_fault(child, claim, "time-limit", f"took longer than [queue] hard_time_limit_s = {limit}")
        except Exception as error:  # noqa: BLE001  # whatever it was, the analysis must not stay `running`
            place = explain_exception(error)
            log.error("analysis_fault", error=place)
            _close_fault(child, claim, type(error).__name__[:64], f"a fault in the worker: {place}")
        else:
            _close_read(child, claim, output, arrays)


def _claim(sessions: sessionmaker[Session], analysis_id: int, worker: str, queue: QueueSettings) -> Claim | None:
    now = _now()
    with sessions.begin() as session:
        return transitions.claim_analysis(
            session,
            analysis_id,
            worker=worker,
            now=now,
            lease_until=now + timedelta(seconds=queue.lease_s),
            max_attempts=queue.max_attempts,
        )


def request_of(sessions: sessionmaker[Session], analysis_id: int, settings: Settings) -> pipeline.Request:
    """What to read and how: the inputs of the analysis, the settings of its route.

    Raises Refusal when retention removed some: a part of a study is no study.
    """
    with sessions() as session:
        analysis = session.get_one(Analysis, analysis_id)
        study = session.get_one(Study, analysis.study_id)
        inputs = inputs_of(session, analysis)
    spool = spool_folder(settings)
    paths = tuple(spool / one.path for one in inputs)
    gone = sum(not path.exists() for path in paths)
    if gone:
        reason = f"{gone} of {len(paths)} images were removed by age; send the whole study again"
        raise Refusal(RefusalCode.INPUT_REMOVED, reason)
    return pipeline.Request(
        analysis_id=analysis.id,
        study_uid=study.study_uid,
        paths=paths,
        prompt=analysis.prompt,
        settings=_as_queued(settings, analysis),
    )


def _as_queued(settings: Settings, analysis: Analysis) -> Settings:
    """The settings that were on record when the analysis was queued, whatever the file says by now."""
    return Settings.model_validate(settings.model_dump() | analysis.settings)


def _close_read(child: Child, claim: Claim, output: AnalysisOutput, arrays: bytes) -> None:
    data = child.settings.data.path
    folder = data / "outputs" / str(claim.analysis_id)
    path, sha256 = store_output(folder, claim.fence, output, arrays)
    closed = _committed(
        child,
        lambda session: transitions.close_read(
            session,
            claim,
            output,
            output_path=str(path.relative_to(data)),
            output_sha256=sha256,
            now=_now(),
            actor=child.name,
        ),
    )
    log.info("analysis_read" if closed else "fence_lost", **output.counts.model_dump())


def _close_refused(child: Child, claim: Claim, refusal: Refusal) -> None:
    closed = _committed(
        child,
        lambda session: transitions.close_refused(
            session, claim, code=refusal.code, reason=refusal.reason, now=_now(), actor=child.name
        ),
    )
    log.info("analysis_refused" if closed else "fence_lost", code=refusal.code, reason=refusal.reason)


def _close_fault(child: Child, claim: Claim, code: str, reason: str) -> None:
    state = _committed(
        child,
        lambda session: transitions.close_fault(
            session,
            claim,
            code=code,
            reason=reason,
            max_attempts=child.settings.queue.max_attempts,
            now=_now(),
            actor=child.name,
        ),
    )
    log.warning("analysis_closed", state=state or "fence lost", code=code)


def _committed(child: Child, close: Callable[[Session], T]) -> T:
    """Close in a transaction; wait a while for a database that is away, else minutes of reading would be lost."""
    for pause_s in CLOSE_AGAIN_S:
        try:
            with child.sessions.begin() as session:
                return close(session)
        except (OperationalError, InterfaceError) as error:
            log.warning("database_unreachable", error=type(error).__name__, again_in_s=pause_s)
            sleep(pause_s)
    with child.sessions.begin() as session:
        return close(session)


@contextmanager
def _lease_kept(sessions: sessionmaker[Session], claim: Claim, lease_s: float) -> Iterator[None]:
    """Renew the lease every third of it while the block runs; a renewal that fails is tried again."""
    over = Event()

    def renew() -> None:
        while not over.wait(lease_s / 3):
            try:
                with sessions.begin() as session:
                    held = transitions.renew_lease(session, claim, lease_until=_now() + timedelta(seconds=lease_s))
            except DBAPIError as error:
                log.warning("lease_not_renewed", error=type(error).__name__)
            else:
                if not held:
                    log.warning("lease_lost")
                    return

    keeper = Thread(target=renew, name="lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()


def _now() -> datetime:
    return datetime.now(UTC)
