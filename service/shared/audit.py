"""One line of history, appended in the same transaction as the fact it records. No patient data."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy.orm import Session

from service.shared.db import AuditEvent


class AuditKind(StrEnum):
    SERVICE_STARTED = "service-started"
    SERVICE_STOPPED = "service-stopped"
    ASSOCIATION_REFUSED = "association-refused"  # or a connection or instance, by the receiver
    INSTANCES_RECEIVED = "instances-received"  # new instances of one study from one association
    INSTANCES_RECEIVED_AGAIN = "instances-received-again"  # identical bytes; nothing reopened
    INSTANCE_CONFLICT = "instance-conflict"  # other bytes under a known SOP Instance UID; both kept
    RECEIPT_UNUSABLE = "receipt-unusable"  # a receipt whose instance cannot be found or read
    RESULT_RETURNED = "result-returned"  # one of our own results came back; nothing reopened
    PATIENT_MISMATCH = "patient-mismatch"  # conflicting patient identifiers under one Study Instance UID
    STUDY_HEADER_FILLED = "study-header-filled"  # a later instance names the patient where the first did not
    STUDY_OPENED = "study-opened"  # the first image instance
    STUDY_REOPENED = "study-reopened"  # a late image instance: a new revision
    STUDY_COMPLETE = "study-complete"
    STUDY_UNROUTED = "study-unrouted"  # complete, and no route takes it
    STUDY_HELD = "study-held"  # rebuilt from the spool
    STUDY_RELEASED = "study-released"  # by a command
    ANALYSIS_QUEUED = "analysis-queued"
    ANALYSIS_STARTED = "analysis-started"  # claimed by a worker
    ANALYSIS_RETRIED = "analysis-retried"  # a fault; back in the queue
    ANALYSIS_READ = "analysis-read"
    ANALYSIS_REFUSED = "analysis-refused"
    ANALYSIS_FAILED = "analysis-failed"
    ANALYSIS_SUPERSEDED = "analysis-superseded"
    ANALYSIS_CANCELLED = "analysis-cancelled"
    ANALYSIS_REQUEUED = "analysis-requeued"  # by a command
    ANALYSIS_DONE = "analysis-done"
    RESULT_BUILT = "result-built"
    RESULT_QUARANTINED = "result-quarantined"
    DELIVERY_DELIVERED = "delivery-delivered"
    DELIVERY_POSTPONED = "delivery-postponed"
    DELIVERY_REJECTED = "delivery-rejected"
    DELIVERY_REQUEUED = "delivery-requeued"  # by a command
    DELIVERY_FELL_BACK = "delivery-fell-back"  # the destination takes another class of report
    INSTANCES_COMMITTED = "instances-committed"  # we vouch for them to who asked, and keep them
    COMMITMENT_FAILED = "commitment-failed"  # who asked for it is told which instances we do not have
    COMMITMENT_REPORTED = "commitment-reported"  # who asked for it was told
    COMMITMENT_ASKED = "commitment-asked"  # storage commitment, N-ACTION
    DELIVERY_COMMITTED = "delivery-committed"  # the destination vouches for it, or was seen to hold it
    DELIVERY_NOT_COMMITTED = "delivery-not-committed"  # the destination has it not; sent again
    DELIVERY_SOUGHT = "delivery-sought"  # C-FIND at the destination, as a proof
    DESTINATION_PAUSED = "destination-paused"  # by a command
    DESTINATION_RESUMED = "destination-resumed"  # by a command
    STUDY_VIEWED = "study-viewed"  # by a person or a program, in the web
    STUDIES_LISTED = "studies-listed"  # with identifiers; the search itself may name a patient and is not kept
    RESULT_READ = "result-read"  # its content, in the web
    USER_ADDED = "user-added"
    USER_CHANGED = "user-changed"  # password or role; ends the user's sessions
    USER_REMOVED = "user-removed"
    TOKEN_MADE = "token-made"  # for a program that acts as a user
    SIGNED_IN = "signed-in"
    SIGN_IN_FAILED = "sign-in-failed"
    SIGNED_OUT = "signed-out"
    AUDIT_EXPORTED = "audit-exported"  # by a command
    AUDIT_READ = "audit-read"  # by a person or a program, in the web
    SPOOL_REMOVED = "spool-removed"  # instances of a study, by age, after everything about it was delivered
    RESULTS_REMOVED = "results-removed"  # stored outputs and result objects of a study, by age
    STUDY_FORGOTTEN = "study-forgotten"  # by a command: whatever names or describes its patient was erased


def append(
    session: Session,
    kind: AuditKind,
    *,
    now: datetime,
    actor: str,
    study_id: int | None = None,
    analysis_id: int | None = None,
    result_id: int | None = None,
    delivery_id: int | None = None,
    vouches_sha256: str | None = None,
    **detail: Any,
) -> None:
    """Add one event to the caller's transaction: it is committed with the fact, or not at all."""
    session.add(
        AuditEvent(
            at=now,
            kind=kind.value,
            actor=actor,
            study_id=study_id,
            analysis_id=analysis_id,
            result_id=result_id,
            delivery_id=delivery_id,
            detail=detail,
            vouches_sha256=vouches_sha256,
        )
    )
