"""Every change of state, as a conditional UPDATE with its audit event in the caller's transaction.

A transition says whether it took place: False means that somebody else was first, never an error.
The states themselves: db.py; deliveries: delivery_transitions.py. Nothing else assigns a `state` column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Update, and_, or_, select, update
from sqlalchemy.orm import Session

from service.shared import audit
from service.shared.audit import AuditKind
from service.shared.db import (
    Acquisition,
    Analysis,
    AnalysisState,
    ReportText,
    Result,
    ResultState,
    Study,
    StudyState,
    took_place,
)
from service.shared.delivery_transitions import new_delivery
from service.shared.messages import AnalysisOutput


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run one analysis until `lease_until`, proved by `fence`."""

    analysis_id: int
    study_id: int
    fence: int
    attempt: int


# --- study ---------------------------------------------------------------------------------------------------------


def open_study(session: Session, study: Study, *, now: datetime, actor: str, vouches_sha256: str) -> bool:
    """An image instance came: complete -> receiving, revision + 1, and what is still queued is superseded.

    True when the study was opened or reopened, False when it was receiving already. The caller holds the row
    in its own transaction (ingest is the only writer of this one).
    """
    if study.state is StudyState.RECEIVING:
        return False
    reopened = study.revision > 0
    study.state = StudyState.RECEIVING
    study.revision += 1
    study.opened_at = now
    study.completed_at = None
    kind = AuditKind.STUDY_REOPENED if reopened else AuditKind.STUDY_OPENED
    audit.append(
        session,
        kind,
        now=now,
        actor=actor,
        study_id=study.id,
        vouches_sha256=vouches_sha256,
        revision=study.revision,
    )
    if reopened:
        supersede_queued(session, study.id, now=now, actor=actor)
    return True


def complete_study(
    session: Session,
    study_id: int,
    *,
    revision: int,
    last_image_at: datetime,
    now: datetime,
    actor: str,
    why: str,
) -> bool:
    """receiving -> complete, unless another image instance came since the decision was made."""
    changed = took_place(
        session,
        update(Study)
        .where(
            Study.id == study_id,
            Study.state == StudyState.RECEIVING,
            Study.revision == revision,
            Study.last_image_at == last_image_at,
        )
        .values(state=StudyState.COMPLETE, completed_at=now),
    )
    if changed:
        audit.append(
            session,
            AuditKind.STUDY_COMPLETE,
            now=now,
            actor=actor,
            study_id=study_id,
            revision=revision,
            why=why,
        )
    return changed


# --- analysis: from the queue to the worker's end ------------------------------------------------------------------


def queue_analysis(session: Session, analysis: Analysis, *, now: datetime, actor: str) -> None:
    """Add a new analysis as queued; its message is sent after this transaction is committed, never before."""
    analysis.state = AnalysisState.QUEUED
    analysis.queued_at = now
    session.add(analysis)
    session.flush()
    audit.append(
        session,
        AuditKind.ANALYSIS_QUEUED,
        now=now,
        actor=actor,
        study_id=analysis.study_id,
        analysis_id=analysis.id,
        route=analysis.route,
        revision=analysis.revision,
        run_number=analysis.run_number,
    )


def claim_analysis(
    session: Session,
    analysis_id: int,
    *,
    worker: str,
    now: datetime,
    lease_until: datetime,
    max_attempts: int,
) -> Claim | None:
    """queued (or running with an expired lease) -> running under a new fence; None when there is nothing to claim."""
    changed = took_place(
        session,
        update(Analysis)
        .where(
            Analysis.id == analysis_id,
            Analysis.attempts < max_attempts,
            or_(
                Analysis.state == AnalysisState.QUEUED,
                and_(Analysis.state == AnalysisState.RUNNING, Analysis.lease_until < now),
            ),
        )
        .values(
            state=AnalysisState.RUNNING,
            fence=Analysis.fence + 1,
            attempts=Analysis.attempts + 1,
            started_at=now,
            lease_until=lease_until,
            worker=worker,
        ),
    )
    if not changed:
        return None
    analysis = session.get_one(Analysis, analysis_id, populate_existing=True)
    audit.append(
        session,
        AuditKind.ANALYSIS_STARTED,
        now=now,
        actor=worker,
        study_id=analysis.study_id,
        analysis_id=analysis_id,
        attempt=analysis.attempts,
        fence=analysis.fence,
    )
    return Claim(analysis_id, analysis.study_id, analysis.fence, analysis.attempts)


def renew_lease(session: Session, claim: Claim, *, lease_until: datetime) -> bool:
    """False: the analysis was taken away (lease expired, cancelled); its result will not be accepted."""
    return took_place(session, _held_by(claim).values(lease_until=lease_until))


def close_read(
    session: Session,
    claim: Claim,
    output: AnalysisOutput,
    *,
    output_path: str,
    output_sha256: str,
    now: datetime,
    actor: str,
) -> bool:
    """running -> read, with everything the history keeps about how it was read."""
    changed = took_place(
        session,
        _held_by(claim).values(
            state=AnalysisState.READ,
            lease_until=None,
            finished_at=now,
            reason_code=None,
            reason=None,
            pruning=output.pruning,
            model=output.model.model_dump(mode="json"),
            prompt=output.prompt,
            series_uid=output.series_uid,
            series_reason=output.series_reason,
            flags=[flag.value for flag in output.flags],
            counts=output.counts.model_dump(mode="json"),
            per_input=[list(one) for one in output.per_input],
            timings_s=output.timings_s,
            memory_peak_bytes=output.memory_peak_bytes,
            software_version=output.software_version,
            software=output.software,
            output_path=output_path,
            output_sha256=output_sha256,
        ),
    )
    if changed:
        session.merge(
            ReportText(
                analysis_id=claim.analysis_id,
                findings=output.findings,
                impression=output.impression,
                raw_text=output.raw_text,
            )
        )
        session.merge(_acquisition(claim.analysis_id, output, now))
        _append(session, AuditKind.ANALYSIS_READ, claim, now, actor, output_sha256=output_sha256)
    return changed


def close_refused(
    session: Session,
    claim: Claim,
    *,
    code: str,
    reason: str,
    now: datetime,
    actor: str,
    timings_s: dict[str, float] | None = None,
) -> bool:
    """running -> refused: the study cannot be analysed, which is an outcome and not a fault."""
    changed = took_place(
        session,
        _held_by(claim).values(
            state=AnalysisState.REFUSED,
            lease_until=None,
            finished_at=now,
            reason_code=code,
            reason=reason,
            timings_s=timings_s,
        ),
    )
    if changed:
        _append(session, AuditKind.ANALYSIS_REFUSED, claim, now, actor, code=code)
    return changed


def close_fault(
    session: Session, claim: Claim, *, code: str, reason: str, max_attempts: int, now: datetime, actor: str
) -> AnalysisState | None:
    """running -> queued, or -> failed when attempts are spent; the new state, or None when the fence was lost."""
    state = AnalysisState.FAILED if claim.attempt >= max_attempts else AnalysisState.QUEUED
    changed = took_place(
        session,
        _held_by(claim).values(
            state=state,
            lease_until=None,
            rung_at=None,
            finished_at=now if state is AnalysisState.FAILED else None,
            reason_code=code,
            reason=reason,
        ),
    )
    if not changed:
        return None
    kind = AuditKind.ANALYSIS_FAILED if state is AnalysisState.FAILED else AuditKind.ANALYSIS_RETRIED
    _append(session, kind, claim, now, actor, code=code, attempt=claim.attempt)
    return state


def hand_back(session: Session, analysis: Analysis, *, now: datetime, actor: str) -> bool:
    """running -> queued without counting the attempt: its worker was ended by a planned stop, not by the study."""
    changed = took_place(
        session,
        _running_under(analysis.id, analysis.fence).values(
            state=AnalysisState.QUEUED, attempts=Analysis.attempts - 1, lease_until=None, rung_at=None
        ),
    )
    if changed:
        audit.append(
            session,
            AuditKind.ANALYSIS_RETRIED,
            now=now,
            actor=actor,
            study_id=analysis.study_id,
            analysis_id=analysis.id,
            code="service-stopped",
        )
    return changed


def end_lease(session: Session, analysis: Analysis, *, now: datetime) -> bool:
    """Whoever runs it has died: what it holds may be claimed at once, and counts as an attempt as ever."""
    return took_place(
        session,
        _running_under(analysis.id, analysis.fence).where(Analysis.lease_until > now).values(lease_until=now),
    )


def fail_exhausted(session: Session, *, max_attempts: int, now: datetime, actor: str) -> int:
    """running, lease expired, attempts spent -> failed; how many. Nobody is left who could close these."""
    spent = and_(
        Analysis.state == AnalysisState.RUNNING, Analysis.lease_until <= now, Analysis.attempts >= max_attempts
    )
    failed = 0
    for analysis in session.scalars(select(Analysis).where(spent)).all():
        changed = took_place(
            session,
            update(Analysis)
            .where(Analysis.id == analysis.id, Analysis.fence == analysis.fence, spent)
            .values(
                state=AnalysisState.FAILED,
                lease_until=None,
                finished_at=now,
                reason_code="worker-lost",
                reason=f"the worker was lost {analysis.attempts} times while it ran; `requeue` tries again",
            ),
        )
        if changed:
            failed += 1
            audit.append(
                session,
                AuditKind.ANALYSIS_FAILED,
                now=now,
                actor=actor,
                study_id=analysis.study_id,
                analysis_id=analysis.id,
                code="worker-lost",
                attempt=analysis.attempts,
            )
    return failed


def refuse_unqueued(session: Session, analysis: Analysis, *, code: str, reason: str, now: datetime, actor: str) -> None:
    """Add an analysis that is refused before any worker sees it (patients mixed)."""
    analysis.state = AnalysisState.REFUSED
    analysis.queued_at = now
    analysis.finished_at = now
    analysis.reason_code = code
    analysis.reason = reason
    session.add(analysis)
    session.flush()
    audit.append(
        session,
        AuditKind.ANALYSIS_REFUSED,
        now=now,
        actor=actor,
        study_id=analysis.study_id,
        analysis_id=analysis.id,
        code=code,
        route=analysis.route,
        revision=analysis.revision,
    )


def supersede_queued(session: Session, study_id: int, *, now: datetime, actor: str) -> int:
    """queued -> superseded for every analysis of the study: a late instance makes them out of date."""
    return _leave_queue(
        session,
        Analysis.study_id == study_id,
        AnalysisState.SUPERSEDED,
        AuditKind.ANALYSIS_SUPERSEDED,
        "superseded",
        "a late image instance made a new revision before this one ran",
        now,
        actor,
    )


def cancel_queued(session: Session, analysis_id: int, *, now: datetime, actor: str) -> bool:
    """queued -> cancelled, by a command."""
    return bool(
        _leave_queue(
            session,
            Analysis.id == analysis_id,
            AnalysisState.CANCELLED,
            AuditKind.ANALYSIS_CANCELLED,
            "cancelled",
            "cancelled by a command before it ran",
            now,
            actor,
        )
    )


def requeue_failed(session: Session, analysis_id: int, *, now: datetime, actor: str) -> bool:
    """failed -> queued with fresh attempts, by a command."""
    changed = took_place(
        session,
        update(Analysis)
        .where(Analysis.id == analysis_id, Analysis.state == AnalysisState.FAILED)
        .values(
            state=AnalysisState.QUEUED,
            attempts=0,
            rung_at=None,
            finished_at=None,
            reason_code=None,
            reason=None,
        ),
    )
    if changed:
        analysis = session.get_one(Analysis, analysis_id, populate_existing=True)
        audit.append(
            session,
            AuditKind.ANALYSIS_REQUEUED,
            now=now,
            actor=actor,
            study_id=analysis.study_id,
            analysis_id=analysis_id,
        )
    return changed


# --- analysis: from the worker's output to its results --------------------------------------------------------------


def finish_analysis(
    session: Session,
    analysis: Analysis,
    results: list[tuple[Result, list[str]]],
    *,
    header_faults: Sequence[str] = (),
    now: datetime,
    actor: str,
) -> bool:
    """read -> done with all result rows and deliveries; stays read, with an alert, when a result is quarantined.

    A refused analysis stays refused: a report that tells of it hangs on it as results hang on others.

    results: each with the names of the destinations it goes to. header_faults: of the source, which were not copied.
    One transaction: either every result and delivery is there, or none. False when another process was first.
    """
    quarantined = any(result.state is ResultState.QUARANTINED for result, _ in results)
    refused = analysis.state is AnalysisState.REFUSED
    before = AnalysisState.REFUSED if refused else AnalysisState.READ
    after = before if refused or quarantined else AnalysisState.DONE
    changed = took_place(
        session,
        update(Analysis)
        .where(
            Analysis.id == analysis.id,
            Analysis.state == before,
            Analysis.fence == analysis.fence,
            ~select(Result.id).where(Result.analysis_id == analysis.id).exists(),
        )
        .values(state=after),
    )
    if not changed:
        return False
    for result, destinations in results:
        _add_result(session, analysis, result, [] if quarantined else destinations, header_faults, now, actor)
    if after is AnalysisState.DONE:
        audit.append(
            session,
            AuditKind.ANALYSIS_DONE,
            now=now,
            actor=actor,
            study_id=analysis.study_id,
            analysis_id=analysis.id,
            results=len(results),
            deliveries=sum(len(destinations) for _, destinations in results),
        )
    return True


def _add_result(
    session: Session,
    analysis: Analysis,
    result: Result,
    destinations: list[str],
    header_faults: Sequence[str],
    now: datetime,
    actor: str,
) -> None:
    session.add(result)
    session.flush()
    built = result.state is ResultState.BUILT
    faults: dict[str, Any] = {"header_faults": list(header_faults)} if header_faults else {}
    audit.append(
        session,
        AuditKind.RESULT_BUILT if built else AuditKind.RESULT_QUARANTINED,
        now=now,
        actor=actor,
        study_id=analysis.study_id,
        analysis_id=analysis.id,
        result_id=result.id,
        kind_of_result=result.kind,
        sop_instance_uid=result.sop_instance_uid,
        sha256=result.sha256,
        **faults,
    )
    session.add_all(new_delivery(result.id, name, now) for name in destinations)


def _acquisition(analysis_id: int, output: AnalysisOutput, now: datetime) -> Acquisition:
    return Acquisition(
        analysis_id=analysis_id,
        at=now,
        scanner=output.scanner,
        protocol=output.protocol,
        method=str(output.pruning.get("method", "")),
        inputs=output.counts.inputs,
        inputs_kept=output.counts.inputs_kept,
        tokens_in=output.counts.tokens_in,
        tokens_kept=output.counts.tokens_kept,
    )


# --- inside ---------------------------------------------------------------------------------------------------------


def _held_by(claim: Claim) -> Update:
    return _running_under(claim.analysis_id, claim.fence)


def _running_under(analysis_id: int, fence: int) -> Update:
    """While it runs, and nobody else has claimed it since."""
    return update(Analysis).where(
        Analysis.id == analysis_id, Analysis.state == AnalysisState.RUNNING, Analysis.fence == fence
    )


def _append(session: Session, kind: AuditKind, claim: Claim, now: datetime, actor: str, **detail: Any) -> None:
    audit.append(
        session,
        kind,
        now=now,
        actor=actor,
        study_id=claim.study_id,
        analysis_id=claim.analysis_id,
        fence=claim.fence,
        **detail,
    )


def _leave_queue(
    session: Session,
    which: Any,
    state: AnalysisState,
    kind: AuditKind,
    code: str,
    reason: str,
    now: datetime,
    actor: str,
) -> int:
    left = 0
    for analysis in session.scalars(select(Analysis).where(which, Analysis.state == AnalysisState.QUEUED)).all():
        changed = took_place(
            session,
            update(Analysis)
            .where(Analysis.id == analysis.id, Analysis.state == AnalysisState.QUEUED)
            .values(state=state, finished_at=now, reason_code=code, reason=reason),
        )
        if changed:
            left += 1
            audit.append(
                session,
                kind,
                now=now,
                actor=actor,
                study_id=analysis.study_id,
                analysis_id=analysis.id,
                revision=analysis.revision,
                route=analysis.route,
            )
    return left
