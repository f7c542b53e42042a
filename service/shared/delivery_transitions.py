"""Every change of a delivery's state, as a conditional UPDATE with its audit event in the caller's transaction.

A transition says whether it took place: False means that somebody else was first, never an error.
Studies and analyses: transitions.py.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Update, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.shared import audit
from service.shared.audit import AuditKind
from service.shared.db import Analysis, Delivery, DeliveryState, Destination, Result, ResultState, took_place


def new_delivery(result_id: int, destination: str, now: datetime) -> Delivery:
    """Due at once."""
    return Delivery(
        result_id=result_id,
        destination=destination,
        state=DeliveryState.PENDING,
        attempts=0,
        next_attempt_at=now,
        created_at=now,
    )


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
    changed = took_place(
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
    changed = took_place(
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
    return took_place(
        session,
        _unproved(delivery).values(
            reason=reason, proof_at=ask_again_at, proof_attempts=delivery.proof_attempts + 1, transaction_uid=None
        ),
    )


def note_unproved(session: Session, delivery_id: int, transaction_uid: str, *, reason: str) -> bool:
    """delivered -> delivered: the request under this Transaction UID was not taken; it is asked again in its time."""
    return took_place(
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
    return took_place(session, _unproved(delivery).values(proof_at=None))


def commit_delivery(session: Session, delivery_id: int, *, note: str | None, now: datetime, actor: str) -> bool:
    """delivered -> committed: the destination vouches for it (PS3.4 Annex J), or was seen to hold it (`note`)."""
    changed = took_place(
        session,
        update(Delivery)
        .where(Delivery.id == delivery_id, Delivery.state == DeliveryState.DELIVERED)
        .values(state=DeliveryState.COMMITTED, committed_at=now, proof_at=None, reason=note),
    )
    if changed:
        _note_delivery(session, AuditKind.DELIVERY_COMMITTED, delivery_id, now, actor, note=note)
    return changed


def note_sought(session: Session, delivery_id: int, *, found: bool | None, now: datetime, actor: str) -> None:
    """The destination was asked by C-FIND whether it holds the result; found: None, where it did not say."""
    _note_delivery(session, AuditKind.DELIVERY_SOUGHT, delivery_id, now, actor, found=found)


def uncommit_delivery(
    session: Session, delivery_id: int, *, reason: str, next_attempt_at: datetime | None, now: datetime, actor: str
) -> bool:
    """delivered -> pending: the destination has it not; -> rejected where there is no next attempt.

    Attempts are kept: a destination that takes everything and keeps nothing is given up in the end.
    """
    state = DeliveryState.REJECTED if next_attempt_at is None else DeliveryState.PENDING
    changed = took_place(
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
    delivery = new_delivery(result_id, destination, now)
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


# --- inside ---------------------------------------------------------------------------------------------------------


def _send_again(
    session: Session, delivery_id: int, closed: tuple[DeliveryState, ...], *, now: datetime, actor: str
) -> bool:
    changed = took_place(
        session,
        update(Delivery)
        .where(Delivery.id == delivery_id, Delivery.state.in_(closed))
        .values(state=DeliveryState.PENDING, attempts=0, next_attempt_at=now, delivered_at=None, **_UNPROVED),
    )
    if changed:
        _note_delivery(session, AuditKind.DELIVERY_REQUEUED, delivery_id, now, actor)
    return changed


def _close_delivery(
    session: Session, delivery: Delivery, kind: AuditKind, now: datetime, actor: str, **values: Any
) -> bool:
    changed = took_place(
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
        _note_delivery(session, kind, delivery.id, now, actor, status=values["status"], attempt=delivery.attempts + 1)
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
