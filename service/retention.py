"""What is removed, and when: files by age and state, never before delivery; everything of a patient on command.

History (rows, events, the chain over them) stays in both cases. Removal is recorded before it is done, so that a
process that dies in between leaves a file too many, never a removal that nobody knows of.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event

import structlog
from sqlalchemy import delete, func, select, text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service.shared import audit, delivery_transitions, transitions
from service.shared.audit import AuditKind
from service.shared.db import (
    Acquisition,
    Analysis,
    AnalysisState,
    Delivery,
    DeliveryState,
    Instance,
    ReportText,
    Result,
    Study,
    StudyHeader,
    StudyState,
)
from service.shared.log import explain_exception
from service.shared.settings import Settings
from service.shared.study_cache import bound_cache, remove_cache
from service.spool import ReceiptError, Spool, key, remove_instance

ACTOR = "service/retention"
SWEEP_S = 3600.0
FIRST_SWEEP_S = 60.0

FINISHED = (AnalysisState.DONE, AnalysisState.REFUSED, AnalysisState.CANCELLED, AnalysisState.SUPERSEDED)
SENT = (DeliveryState.DELIVERED, DeliveryState.COMMITTED)

log = structlog.get_logger(__name__)


class CannotForget(Exception):
    """The study is under way; the message says what to wait for or to do first."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What the decision to remove a study's instances looks at."""

    complete: bool
    held: bool
    dispatched: bool  # every revision has its analyses, or none can come
    analyses: tuple[AnalysisState, ...]
    deliveries: tuple[DeliveryState, ...]
    last_change: datetime  # of anything about it


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What `forget` removed."""

    instances: int
    results: int
    outputs: int
    reports: int
    header: bool


# --- decisions ------------------------------------------------------------------------------------------------------


def why_kept(standing: Standing, *, now: datetime, keep_days: float) -> str | None:
    """Why the files must stay, or None when they may go. What failed or was rejected stays until a person decides."""
    if not standing.complete or not standing.dispatched:
        return "still on its way"
    if standing.held:
        return "held"
    if any(state not in FINISHED for state in standing.analyses):
        return "an analysis is not finished"
    if any(state not in SENT for state in standing.deliveries):
        return "a result is not delivered"
    if now - standing.last_change < timedelta(days=keep_days):
        return "too young"
    return None


# --- by age ---------------------------------------------------------------------------------------------------------


def remove_for_ever(settings: Settings, sessions: sessionmaker[Session], spool: Spool, stop: Event) -> None:
    """Remove what is old enough, once an hour, until `stop`."""
    wait_s = FIRST_SWEEP_S
    while not stop.wait(wait_s):
        wait_s = SWEEP_S
        try:
            now = datetime.now(UTC)
            remove_instances(sessions, spool, settings.data.path, keep_days=settings.spool.keep_days, now=now)
            remove_results(sessions, settings.data.path, keep_days=settings.data.keep_days, now=now)
            bound_cache(
                settings.data.path,
                limit_bytes=int(settings.data.cache_gb * 10**9),
                keep_s=settings.data.cache_hours * 3600,
                now_s=now.timestamp(),
            )
        except (OperationalError, InterfaceError) as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        except Exception as error:  # noqa: BLE001  # this loop must live; what went wrong is logged and tried again
            log.error("retention_fault", error=explain_exception(error))


def remove_instances(
    sessions: sessionmaker[Session], spool: Spool, data: Path, *, keep_days: float, now: datetime
) -> int:
    """Remove the settled instances of every study that may go, and the features kept of it; how many instances.

    What its sender was promised to be kept (custody.py) never goes by age; `forget` alone removes it.
    """
    removed = 0
    limit = now.timestamp() - keep_days * 86_400
    for paths in spool.settled_studies():
        if max(_changed_at(path) for path in paths) > limit:
            continue
        try:
            study_uid = spool.read(paths[0]).study_uid
        except ReceiptError as error:
            log.warning("receipt_unusable", file=paths[0].name, reason=str(error))
            continue
        if key(study_uid) in spool.open_studies(now):
            continue
        with spool.removing_or_committing():
            removed += _remove_study(sessions, spool, data, study_uid, paths, keep_days=keep_days, now=now)
    return removed


def _remove_study(
    sessions: sessionmaker[Session],
    spool: Spool,
    data: Path,
    study_uid: str,
    paths: Sequence[Path],
    *,
    keep_days: float,
    now: datetime,
) -> int:
    if spool.is_committed(study_uid):
        return 0
    with sessions.begin() as session:
        study = session.scalars(select(Study).where(Study.study_uid == study_uid)).one_or_none()
        if study is None or why_kept(_standing(session, study), now=now, keep_days=keep_days):
            return 0
        audit.append(
            session,
            AuditKind.SPOOL_REMOVED,
            now=now,
            actor=ACTOR,
            study_id=study.id,
            instances=len(paths),
            keep_days=keep_days,
        )
    # only what was seen before the decision: an instance that came meanwhile opens the study again
    for path in paths:
        remove_instance(path)
    remove_cache(data, study.id)
    log.info("spool_removed", study_id=study.id, instances=len(paths))
    return len(paths)


def remove_results(sessions: sessionmaker[Session], data: Path, *, keep_days: float, now: datetime) -> int:
    """Remove outputs and stored results of analyses that may go; how many analyses. Their rows and texts stay."""
    removed = 0
    limit = now.timestamp() - keep_days * 86_400
    folders = sorted((data / "outputs").iterdir()) if (data / "outputs").is_dir() else []
    for folder in folders:
        if not folder.name.isdecimal() or _changed_at(folder) > limit:
            continue
        with sessions.begin() as session:
            analysis = session.get(Analysis, int(folder.name))
            if analysis is None:
                continue
            study = session.get_one(Study, analysis.study_id)
            if why_kept(_standing(session, study), now=now, keep_days=keep_days):
                continue
            paths = session.scalars(select(Result.path).where(Result.analysis_id == analysis.id)).all()
            audit.append(
                session,
                AuditKind.RESULTS_REMOVED,
                now=now,
                actor=ACTOR,
                study_id=study.id,
                analysis_id=analysis.id,
                results=len(paths),
                keep_days=keep_days,
            )
        _remove_outputs(data, [analysis.id], paths)
        removed += 1
        log.info("results_removed", analysis_id=analysis.id, results=len(paths))
    return removed


def _standing(session: Session, study: Study) -> Standing:
    analyses = session.execute(
        select(Analysis.state, Analysis.queued_at, Analysis.finished_at).where(Analysis.study_id == study.id)
    ).all()
    deliveries = session.execute(
        select(Delivery.state, Delivery.created_at, Delivery.delivered_at)
        .join(Result, Result.id == Delivery.result_id)
        .join(Analysis, Analysis.id == Result.analysis_id)
        .where(Analysis.study_id == study.id)
    ).all()
    newest = session.scalar(select(func.max(Instance.received_at)).where(Instance.study_id == study.id))
    times = [study.first_received_at, study.completed_at, newest]
    times += [at for row in (*analyses, *deliveries) for at in row[1:]]
    return Standing(
        complete=study.state is StudyState.COMPLETE,
        held=study.held,
        dispatched=study.dispatched_revision >= study.revision,
        analyses=tuple(row.state for row in analyses),
        deliveries=tuple(row.state for row in deliveries),
        last_change=max(at for at in times if at is not None),
    )


# --- on command -----------------------------------------------------------------------------------------------------


def forget(
    sessions: sessionmaker[Session], spool: Spool, data: Path, study_id: int, *, now: datetime, actor: str
) -> Forgotten:
    """Erase whatever names or describes the patient of a study: files, header, texts, and the salts of digests.

    Raises CannotForget while the study is under way. Repeating it after a fault finishes it. UIDs, codes, counts and
    times stay in the history, and the chain over the audit stays whole, for no event ever held more.
    """
    with sessions.begin() as session:
        study = session.get_one(Study, study_id)
        _stop(session, study, spool, now, actor)
    with sessions() as session:
        analyses = session.scalars(select(Analysis.id).where(Analysis.study_id == study_id)).all()
        results = session.execute(
            select(Result.path, Result.sop_instance_uid).where(Result.analysis_id.in_(analyses))
        ).all()
        uids = [row.sop_instance_uid for row in results]
        # our own reports that came back, wherever they were filed, and all that was ever filed here
        filed = session.scalars(
            select(Instance.path).where((Instance.study_id == study_id) | Instance.sop_instance_uid.in_(uids))
        ).all()
    with spool.removing_or_committing():
        instances = _remove_filed(spool, study.study_uid, filed)
    remove_cache(data, study_id)
    files, outputs = _remove_outputs(data, analyses, [row.path for row in results])
    with sessions.begin() as session:
        session.execute(delete(Acquisition).where(Acquisition.analysis_id.in_(analyses)))
        reports = _deleted(session, delete(ReportText).where(ReportText.analysis_id.in_(analyses)))
        header = _deleted(session, delete(StudyHeader).where(StudyHeader.study_id == study_id))
        forgotten = Forgotten(instances, files, outputs, reports, bool(header))
        audit.append(
            session,
            AuditKind.STUDY_FORGOTTEN,
            now=now,
            actor=actor,
            study_id=study_id,
            instances=forgotten.instances,
            results=forgotten.results,
            outputs=forgotten.outputs,
            reports=forgotten.reports,
            header=forgotten.header,
        )
    _scrub(sessions)
    return forgotten


def _stop(session: Session, study: Study, spool: Spool, now: datetime, actor: str) -> None:
    """Nothing about the study may move any more: cancel what waits, refuse while something runs."""
    waiting = [path for path in spool.incoming() if _study_of(spool, path) in (study.study_uid, None)]
    if study.state is StudyState.RECEIVING or key(study.study_uid) in spool.open_studies(now) or waiting:
        raise CannotForget(f"instances of study {study.id} are still arriving; try again once it is complete")
    for analysis in session.scalars(select(Analysis).where(Analysis.study_id == study.id)).all():
        if analysis.state is AnalysisState.QUEUED:
            transitions.cancel_queued(session, analysis.id, now=now, actor=actor)
        elif analysis.state is AnalysisState.RUNNING:
            raise CannotForget(f"analysis {analysis.id} is running; try again when it has ended")
        elif analysis.state is AnalysisState.READ and not _has_results(session, analysis.id):
            raise CannotForget(f"the results of analysis {analysis.id} are being built; try again in a moment")
    pending = session.scalars(
        select(Delivery)
        .join(Result, Result.id == Delivery.result_id)
        .join(Analysis, Analysis.id == Result.analysis_id)
        .where(Analysis.study_id == study.id, Delivery.state == DeliveryState.PENDING)
    ).all()
    for one in pending:
        delivery_transitions.reject_delivery(
            session, one, status=None, reason="the study was forgotten", now=now, actor=actor
        )


def _study_of(spool: Spool, receipt: Path) -> str | None:
    """The study a waiting receipt names; None when it cannot be read, empty when it is gone meanwhile."""
    try:
        return spool.read(receipt).study_uid
    except ReceiptError:
        return None
    except FileNotFoundError:
        return ""


def _has_results(session: Session, analysis_id: int) -> bool:
    return session.scalar(select(Result.id).where(Result.analysis_id == analysis_id).limit(1)) is not None


def _deleted(session: Session, statement: object) -> int:
    return int(session.execute(statement).rowcount)  # type: ignore[call-overload]  # a DELETE has its count


def _scrub(sessions: sessionmaker[Session]) -> None:
    """Take erased rows out of the database's files, as far as a client can; backups are the administrator's."""
    engine = sessions.kw["bind"]
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if engine.dialect.name == "postgresql":
            for table in (StudyHeader.__tablename__, Acquisition.__tablename__, ReportText.__tablename__):
                connection.execute(text(f"VACUUM {table}"))
            return
    raw = engine.raw_connection()  # outside any transaction, which our engine would begin
    try:
        busy = raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    finally:
        raw.close()
    if busy:
        log.warning("journal_not_emptied", remedy="a reader was busy; the journal is overwritten in time")


# --- files ----------------------------------------------------------------------------------------------------------


def _changed_at(path: Path) -> float:
    """Seconds since the epoch; a file that is gone is old."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_filed(spool: Spool, study_uid: str, filed: Sequence[str]) -> int:
    """Every instance of the study, and what else the rows name; how many files."""
    paths = {spool.path / path for path in filed} | set(spool.instances(study_uid)) | set(spool.set_aside_of(study_uid))
    present = [path for path in paths if path.exists()]
    for path in paths:
        remove_instance(path)
    spool.remove_study(study_uid)
    spool.sync_removals()
    return len(present)


def _remove_outputs(data: Path, analyses: Iterable[int], results: Iterable[str]) -> tuple[int, int]:
    """Stored results and the folders of outputs; how many of each were there."""
    stored = [data / path for path in results]
    present = [path for path in stored if path.exists()]
    for path in present:
        path.unlink(missing_ok=True)
    folders = [data / "outputs" / str(one) for one in analyses if (data / "outputs" / str(one)).is_dir()]
    for folder in folders:
        shutil.rmtree(folder)
    return len(present), len(folders)
