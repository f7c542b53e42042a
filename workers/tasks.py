"""Claim an analysis, read it, close it. Knows the database and the way; knows nothing of tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from time import sleep
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from billiard.exceptions import SoftTimeLimitExceeded
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service.shared import transitions
from service.shared.db import Analysis, AnalysisState, Study
from service.shared.inputs import inputs_of
from service.shared.log import explain_exception
from service.shared.messages import AnalysisOutput, store_output
from service.shared.settings import QueueSettings, Settings, spool_folder
from service.shared.study_cache import bound_cache, cache_folder, remove_cache
from service.shared.transitions import Claim
from workers import pipeline
from workers.errors import Refusal, RefusalCode
from workers.faults import Fault, fault_of

if TYPE_CHECKING:
    from workers.app import Child

CLOSE_AGAIN_S = (1, 2, 5, 10, 20, 30)  # pauses between tries to put an end on record

WAITING_LOOKED_AT = 64  # queued analyses, in search of those that want the same model
OUT_OF_MEMORY = (
    "not enough memory, also with fewer slices at a time ({}): lower [series] max_slices or [pruning] token_budget, or "
    "give the worker more"
)

T = TypeVar("T")

log = structlog.get_logger(__name__)


def read_study(analysis_id: int, child: Child) -> None:
    """Run one analysis if there is one to claim; a message delivered again finds nothing and returns.

    With [queue] batch_studies above 1 others that wait for the same model are claimed too and decoded together.
    Every end is a row: read, refused, queued again or failed. A lost fence ends in silence, for somebody else
    holds the analysis now.
    """
    claim = _claim(child.sessions, analysis_id, child.name, child.settings.queue)
    if claim is None:
        log.info("nothing_to_claim", analysis_id=analysis_id)
        return
    others = _companions(child, claim)
    with ExitStack() as leases:
        for one in (claim, *others):
            leases.enter_context(_lease_kept(child.sessions, one, child.settings.queue.lease_s))
        if others:
            _read_together([claim, *others], child)
        else:
            with _named(claim):
                _read_alone(claim, child)


def _read_alone(claim: Claim, child: Child) -> None:
    log.info("analysis_started")
    try:
        request = _request_with_cache(claim, child)
        output, arrays = pipeline.read(request, child.model_for(request.settings.model))
    except Exception as error:  # noqa: BLE001  # whatever it was, the analysis must not stay `running`
        _close_error([claim], child, error)
    else:
        _close_read(child, claim, output, arrays)


def _read_together(claims: list[Claim], child: Child) -> None:
    """Look at each study alone, then let the model speak about all of them; what fails together is tried singly."""
    looked: list[tuple[Claim, pipeline.Looked]] = []
    for place, claim in enumerate(claims):
        with _named(claim):
            log.info("analysis_started", together=len(claims))
            try:
                request = _request_with_cache(claim, child)
                looked.append((claim, pipeline.look(request, child.model_for(request.settings.model))))
            except Exception as error:  # noqa: BLE001  # of this study; the others go on
                if _ends_all(error):
                    _close_error([*(one for one, _ in looked), *claims[place:]], child, error)
                    return
                _close_error([claim], child, error)
    if not looked:
        return
    model = child.model_for(looked[0][1].request.settings.model)
    try:
        said = pipeline.say([study for _, study in looked], model)
    except Exception as error:  # noqa: BLE001  # nobody knows whose fault it was
        if _ends_all(error):
            _close_error([claim for claim, _ in looked], child, error)
            return
        log.warning("not_read_together", error=explain_exception(error), studies=len(looked))
        for place, (claim, study) in enumerate(looked):
            with _named(claim):
                try:
                    [(output, arrays)] = pipeline.say([study], model)
                except Exception as own:  # noqa: BLE001  # of this study; the others go on
                    if _ends_all(own):
                        _close_error([one for one, _ in looked[place:]], child, own)
                        return
                    _close_error([claim], child, own)
                else:
                    _close_read(child, claim, output, arrays)
        return
    for (claim, _), (output, arrays) in zip(looked, said, strict=True):
        with _named(claim):
            _close_read(child, claim, output, arrays)


def _ends_all(error: Exception) -> bool:
    """Is this the end of the whole task, not of one study?"""
    return isinstance(error, SoftTimeLimitExceeded) or fault_of(error) is Fault.STICKY


def _close_error(claims: Sequence[Claim], child: Child, error: Exception) -> None:
    """Put the end of these analyses on record; where the GPU is lost to this process, end it for a fresh one."""
    fault = fault_of(error)
    place = explain_exception(error)
    for claim in claims:
        with _named(claim):
            if isinstance(error, Refusal):
                _close_refused(child, claim, error)
                continue
            if isinstance(error, SoftTimeLimitExceeded):
                limit = child.settings.queue.hard_time_limit_s
                reason = f"took longer than [queue] hard_time_limit_s = {limit}"
                _close_fault(child, claim, "time-limit", reason)
                continue
            log.error("analysis_fault", error=place)
            if fault is Fault.OUT_OF_MEMORY:
                _close_fault(child, claim, fault, OUT_OF_MEMORY.format(place), last=True)
            else:
                _close_fault(child, claim, type(error).__name__[:64], f"a fault in the worker: {place}")
    if fault is Fault.STICKY:
        log.error("child_ends", reason="its GPU context is lost; a fresh process takes over", error=place)
        leave()


def leave() -> None:
    """End this process at once; Celery gives its message back and starts another."""
    os._exit(1)


def _companions(child: Child, claim: Claim) -> list[Claim]:
    """Claim others to be decoded with this one: queued, never tried before, for the same model.

    Whatever was tried before runs alone, so that a study that kills its worker takes no other with it again.
    """
    more = child.settings.queue.batch_studies - 1
    if more < 1 or claim.attempt > 1:
        return []
    with child.sessions() as session:
        mine = _model_of(session.get_one(Analysis, claim.analysis_id).settings)
        waiting = session.execute(
            select(Analysis.id, Analysis.settings)
            .where(Analysis.state == AnalysisState.QUEUED, Analysis.attempts == 0)
            .order_by(Analysis.id)
            .limit(WAITING_LOOKED_AT)
        ).all()
    found: list[Claim] = []
    for row in waiting:
        if len(found) == more:
            break
        if _model_of(row.settings) == mine:
            one = _claim(child.sessions, row.id, child.name, child.settings.queue)
            found += [one] if one is not None else []
    return found


def _model_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Which model an analysis was queued for, whatever the length of its report and the questions after it."""
    model = settings.get("model") or {}
    return {key: value for key, value in model.items() if key not in {"max_new_tokens", "coded_findings"}}


def _request_with_cache(claim: Claim, child: Child) -> pipeline.Request:
    data = child.settings.data
    request = request_of(child.sessions, claim.analysis_id, child.settings)
    if not data.cache_gb:
        return request
    bound_cache(
        data.path, limit_bytes=int(data.cache_gb * 10**9), keep_s=data.cache_hours * 3600, now_s=_now().timestamp()
    )
    return replace(request, cache=cache_folder(data.path, claim.study_id))


@contextmanager
def _named(claim: Claim) -> Iterator[None]:
    """Every line of the log names the analysis."""
    with structlog.contextvars.bound_contextvars(
        analysis_id=claim.analysis_id, fence=claim.fence, attempt=claim.attempt
    ):
        yield


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
    if not closed:
        _leave_nothing(child, claim, path)


def _close_refused(child: Child, claim: Claim, refusal: Refusal) -> None:
    closed = _committed(
        child,
        lambda session: transitions.close_refused(
            session, claim, code=refusal.code, reason=refusal.reason, now=_now(), actor=child.name
        ),
    )
    log.info("analysis_refused" if closed else "fence_lost", code=refusal.code, reason=refusal.reason)
    if not closed:
        _leave_nothing(child, claim)


def _close_fault(child: Child, claim: Claim, code: str, reason: str, *, last: bool = False) -> None:
    """last: another attempt would end in the same way."""
    state = _committed(
        child,
        lambda session: transitions.close_fault(
            session,
            claim,
            code=code,
            reason=reason,
            max_attempts=claim.attempt if last else child.settings.queue.max_attempts,
            now=_now(),
            actor=child.name,
        ),
    )
    log.warning("analysis_closed", state=state or "fence lost", code=code)
    if state is None:
        _leave_nothing(child, claim)


def _leave_nothing(child: Child, claim: Claim, output: Path | None = None) -> None:
    """Remove what a worker that was taken for dead has written: meanwhile the study may have been forgotten.

    Whoever holds the analysis now has files of another fence, and loses kept features, which cost time only. An output
    that is on record was ours after all: only the answer to our commit was lost.
    """
    data = child.settings.data.path
    recorded = _committed(child, lambda session: session.get_one(Analysis, claim.analysis_id).output_path)
    if output is not None and recorded == str(output.relative_to(data)):
        return
    for path in [output, output.with_suffix(".npz")] if output is not None else []:
        path.unlink(missing_ok=True)
    remove_cache(data, claim.study_id)


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
