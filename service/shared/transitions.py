"""Every change of state, as a conditional UPDATE with its audit event in the caller's transaction.

A transition says whether it took place: False means that somebody else was first, never an error.
The states themselves: db.py. Nothing else in the product assigns a `state` column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from sqlalchemy import CursorResult, Update, and_, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.shared import audit
from service.shared.audit import AuditKind
from service.shared.db import (
    Acquisition,
    Analysis,
    AnalysisState,
    Delivery,
    DeliveryState,
    Destination,
    ReportText,
    Result,
    ResultState,
    Study,
    StudyState,
)
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
    changed = _changed(
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
    changed = _changed(
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
    return _changed(session, _held_by(claim).values(lease_until=lease_until))


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
    changed = _changed(
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
    changed = _changed(
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
    changed = _changed(
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
    changed = _changed(
        session,
        update(Analysis)
        .where(
            Analysis.id == analysis.id,
            Analysis.state == AnalysisState.RUNNING,
            Analysis.fence == analysis.fence,
        )
        .values(state=AnalysisState.QUEUED, attempts=Analysis.attempts - 1, lease_until=None, rung_at=None),
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


def fail_exhausted(session: Session, *, max_attempts: int, now: datetime, actor: str) -> int:
    """running, lease expired, attempts spent -> failed; how many. Nobody is left who could close these."""
    spent = and_(Analysis.state == AnalysisState.RUNNING, Analysis.lease_until < now, Analysis.attempts >= max_attempts)
    failed = 0
    for analysis in session.scalars(select(Analysis).where(spent)).all():
        changed = _changed(
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
    changed = _changed(
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
    changed = _changed(
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
    session.add_all(_pending(result.id, name, now) for name in destinations)


def _pending(result_id: int, destination: str, now: datetime) -> Delivery:
    return Delivery(
        result_id=result_id,
        destination=destination,
        state=DeliveryState.PENDING,
        attempts=0,
        next_attempt_at=now,
        created_at=now,
    )


# --- delivery -------------------------------------------------------------------------------------------------------


def close_delivered(
    session: Session,
    delivery: Delivery,
    *,
    status: int,
    note: str | None,
    now: datetime,
    actor: str,
    proof_at: datetime | None = None,
) -> bool:
    """pending -> delivered: the destination answered Success or a warning (PS3.4 Annex B, table B.2-1).

    proof_at: when to ask the destination to vouch for it; None where nobody wants that.
    """
    return _close_delivery(
        session,
        delivery,
        AuditKind.DELIVERY_DELIVERED,
        now,
        actor,
        state=DeliveryState.DELIVERED,
        status=status,
        reason=note,
        next_attempt_at=None,
        delivered_at=now,
        **_UNPROVED | {"proof_at": proof_at},
    )


def postpone_delivery(
    session: Session,
    delivery: Delivery,
    *,
    status: int | None,
    reason: str,
    next_attempt_at: datetime,
    now: datetime,
    actor: str,
) -> bool:
    """pending -> pending, one attempt older."""
    return _close_delivery(
        session,
        delivery,
        AuditKind.DELIVERY_POSTPONED,
        now,
        actor,
        state=DeliveryState.PENDING,
        status=status,
        reason=reason,
        next_attempt_at=next_attempt_at,
    )


def reject_delivery(
    session: Session, delivery: Delivery, *, status: int | None, reason: str, now: datetime, actor: str
) -> bool:
    """pending -> rejected: refused for good, or out of attempts; `requeue` tries again."""
    return _close_delivery(
        session,
        delivery,
        AuditKind.DELIVERY_REJECTED,
        now,
        actor,
        state=DeliveryState.REJECTED,
        status=status,
        reason=reason,
        next_attempt_at=None,
    )


def fall_back_delivery(session: Session, delivery: Delivery, *, result_id: int, now: datetime, actor: str) -> bool:
    """pending, of one class of report -> pending, of another: the destination takes that one only.

    The caller has seen that the other result has no delivery of its own there.
    """
    changed = _changed(
        session,
        update(Delivery)
        .where(
            Delivery.id == delivery.id,
            Delivery.state == DeliveryState.PENDING,
            Delivery.attempts == delivery.attempts,
            Delivery.result_id == delivery.result_id,
        )
        .values(result_id=result_id),
    )
    if changed:
        _note_delivery(session, AuditKind.DELIVERY_FELL_BACK, delivery.id, now, actor, from_result=delivery.result_id)
    return changed


def ask_commitment(
    session: Session, delivery: Delivery, *, transaction_uid: str, ask_again_at: datetime, now: datetime, actor: str
) -> bool:
    """delivered -> delivered, asked under this Transaction UID: noted before the request leaves, for its answer may
    come on another association before this one is told that the request arrived."""
    changed = _changed(
        session,
        _unproved(delivery).values(
            transaction_uid=transaction_uid, proof_at=ask_again_at, proof_attempts=delivery.proof_attempts + 1
        ),
    )
    if changed:
        _note_delivery(
            session, AuditKind.COMMITMENT_ASKED, delivery.id, now, actor, attempt=delivery.proof_attempts + 1
        )
    return changed


def postpone_proof(session: Session, delivery: Delivery, *, reason: str, ask_again_at: datetime) -> bool:
    """delivered -> delivered: no proof yet, for this reason. Not audited: nothing is different from before."""
    return _changed(
        session,
        _unproved(delivery).values(
            reason=reason, proof_at=ask_again_at, proof_attempts=delivery.proof_attempts + 1, transaction_uid=None
        ),
    )


def note_unproved(session: Session, delivery_id: int, transaction_uid: str, *, reason: str) -> bool:
    """delivered -> delivered: the request under this Transaction UID was not taken; it is asked again in its time."""
    return _changed(
        session,
        update(Delivery)
        .where(
            Delivery.id == delivery_id,
            Delivery.state == DeliveryState.DELIVERED,
            Delivery.transaction_uid == transaction_uid,
        )
        .values(reason=reason),
    )


def want_no_proof(session: Session, delivery: Delivery) -> bool:
    """delivered -> delivered, and that is its end: the destination is no longer configured to be asked."""
    return _changed(session, _unproved(delivery).values(proof_at=None))


def commit_delivery(session: Session, delivery_id: int, *, note: str | None, now: datetime, actor: str) -> bool:
    """delivered -> committed: the destination vouches for it (PS3.4 Annex J), or was seen to hold it (`note`)."""
    changed = _changed(
        session,
        update(Delivery)
        .where(Delivery.id == delivery_id, Delivery.state == DeliveryState.DELIVERED)
        .values(state=DeliveryState.COMMITTED, committed_at=now, proof_at=None, reason=note),
    )
    if changed:
        _note_delivery(session, AuditKind.DELIVERY_COMMITTED, delivery_id, now, actor, note=note)
    return changed


def uncommit_delivery(
    session: Session, delivery_id: int, *, reason: str, next_attempt_at: datetime | None, now: datetime, actor: str
) -> bool:
    """delivered -> pending: the destination has it not; -> rejected where there is no next attempt.

    Attempts are kept: a destination that takes everything and keeps nothing is given up in the end.
    """
    state = DeliveryState.REJECTED if next_attempt_at is None else DeliveryState.PENDING
    changed = _changed(
        session,
        update(Delivery)
        .where(Delivery.id == delivery_id, Delivery.state == DeliveryState.DELIVERED)
        .values(state=state, reason=reason, next_attempt_at=next_attempt_at, delivered_at=None, **_UNPROVED),
    )
    if changed:
        _note_delivery(session, AuditKind.DELIVERY_NOT_COMMITTED, delivery_id, now, actor, state=state.value)
    return changed


def requeue_delivery(session: Session, delivery_id: int, *, now: datetime, actor: str) -> bool:
    """rejected -> pending with fresh attempts, by a command; the stored bytes are sent again as they are."""
    return _send_again(session, delivery_id, (DeliveryState.REJECTED,), now=now, actor=actor)


def resend_delivery(session: Session, delivery_id: int, *, now: datetime, actor: str) -> bool:
    """rejected, delivered or committed -> pending, by a command that means this delivery and no other."""
    closed = (DeliveryState.REJECTED, DeliveryState.DELIVERED, DeliveryState.COMMITTED)
    return _send_again(session, delivery_id, closed, now=now, actor=actor)


def resend_result(session: Session, result_id: int, destination: str, *, now: datetime, actor: str) -> int | None:
    """A built result to a destination, by a command: its delivery there is due at once, again or for the first time.

    The delivery's row id; None for a result that is quarantined and never sent. The caller sees to it that the
    destination is configured and the stored bytes are still there.
    """
    built = session.scalars(select(Result).where(Result.id == result_id, Result.state == ResultState.BUILT)).first()
    if built is None:
        return None
    here = select(Delivery.id).where(Delivery.result_id == result_id, Delivery.destination == destination)
    known = session.scalars(here).first()
    if known is not None:  # whatever its state: one that waits for its next attempt need not wait
        return known if _send_again(session, known, tuple(DeliveryState), now=now, actor=actor) else None
    delivery = _pending(result_id, destination, now)
    try:
        with session.begin_nested():
            session.add(delivery)
    except IntegrityError:  # somebody else was first
        return None
    _note_delivery(session, AuditKind.DELIVERY_REQUEUED, delivery.id, now, actor)
    return delivery.id


def pause_destination(session: Session, name: str, *, now: datetime, actor: str) -> bool:
    """Stop sending to a destination, by a command; its deliveries wait. False when it is paused already."""
    return _set_paused(session, name, True, AuditKind.DESTINATION_PAUSED, now, actor)


def resume_destination(session: Session, name: str, *, now: datetime, actor: str) -> bool:
    """Take up sending to a destination, by a command. False when it was not paused."""
    return _set_paused(session, name, False, AuditKind.DESTINATION_RESUMED, now, actor)


def _set_paused(session: Session, name: str, paused: bool, kind: AuditKind, now: datetime, actor: str) -> bool:
    standing = session.get(Destination, name)
    if (standing is not None and standing.paused) is paused:
        return False
    session.merge(Destination(name=name, paused=paused, changed_at=now))
    audit.append(session, kind, now=now, actor=actor, destination=name)
    return True


def _send_again(
    session: Session, delivery_id: int, closed: tuple[DeliveryState, ...], *, now: datetime, actor: str
) -> bool:
    changed = _changed(
        session,
        update(Delivery)
        .where(Delivery.id == delivery_id, Delivery.state.in_(closed))
        .values(state=DeliveryState.PENDING, attempts=0, next_attempt_at=now, delivered_at=None, **_UNPROVED),
    )
    if changed:
        _note_delivery(session, AuditKind.DELIVERY_REQUEUED, delivery_id, now, actor)
    return changed


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


def _changed(session: Session, statement: Update) -> bool:
    result = session.execute(statement.execution_options(synchronize_session=False))
    return cast("CursorResult[Any]", result).rowcount == 1


def _held_by(claim: Claim) -> Update:
    return update(Analysis).where(
        Analysis.id == claim.analysis_id,
        Analysis.state == AnalysisState.RUNNING,
        Analysis.fence == claim.fence,
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
        changed = _changed(
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


def _close_delivery(
    session: Session, delivery: Delivery, kind: AuditKind, now: datetime, actor: str, **values: Any
) -> bool:
    changed = _changed(
        session,
        update(Delivery)
        .where(
            Delivery.id == delivery.id,
            Delivery.state == DeliveryState.PENDING,
            Delivery.attempts == delivery.attempts,
        )
        .values(attempts=delivery.attempts + 1, **values),
    )
    if changed:
        study_id, analysis_id = _analysed(session, delivery.result_id)
        audit.append(
            session,
            kind,
            now=now,
            actor=actor,
            study_id=study_id,
            analysis_id=analysis_id,
            result_id=delivery.result_id,
            delivery_id=delivery.id,
            destination=delivery.destination,
            status=values["status"],
            attempt=delivery.attempts + 1,
        )
    return changed


def _note_delivery(
    session: Session, kind: AuditKind, delivery_id: int, now: datetime, actor: str, **detail: Any
) -> None:
    delivery = session.get_one(Delivery, delivery_id, populate_existing=True)
    study_id, analysis_id = _analysed(session, delivery.result_id)
    audit.append(
        session,
        kind,
        now=now,
        actor=actor,
        study_id=study_id,
        analysis_id=analysis_id,
        result_id=delivery.result_id,
        delivery_id=delivery_id,
        destination=delivery.destination,
        **detail,
    )


_UNPROVED: dict[str, Any] = {"proof_at": None, "proof_attempts": 0, "transaction_uid": None, "committed_at": None}


def _unproved(delivery: Delivery) -> Update:
    return update(Delivery).where(
        Delivery.id == delivery.id,
        Delivery.state == DeliveryState.DELIVERED,
        Delivery.proof_attempts == delivery.proof_attempts,
        Delivery.delivered_at == delivery.delivered_at,
    )


def _analysed(session: Session, result_id: int) -> tuple[int, int]:
    """The study and the analysis of a result, so that a study's history holds its deliveries."""
    row = session.execute(
        select(Analysis.study_id, Analysis.id)
        .join(Result, Result.analysis_id == Analysis.id)
        .where(Result.id == result_id)
    ).one()
    return row.study_id, row.id
