"""Delivered -> committed: does the destination vouch for what it took? Storage commitment as SCU, or a C-FIND.

Storage commitment (PS3.4 Annex J) is asked by N-ACTION; the answer is an N-EVENT-REPORT on the same association or on
one that the destination opens to our receiver. Sends no result and changes no bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event

import structlog
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import build_context, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
)
from sqlalchemy import Row, select
from sqlalchemy.orm import Session, sessionmaker

from service import commitment_answers
from service.commitment_answers import FAILURES, PUSH_MODEL, PUSH_MODEL_INSTANCE, UNUSABLE, Answer, BadAnswer
from service.requestor import Absence, associate, where
from service.shared import delivery_transitions
from service.shared.backoff import try_again_at
from service.shared.db import Analysis, Delivery, DeliveryState, Result, Study
from service.shared.settings import DestinationSettings, ScpSettings

ACTOR = "service/delivery"
REQUEST_STORAGE_COMMITMENT = 1  # Action Type ID, PS3.4 table J.3-1
BATCH = 64  # results per request
ANSWER_WAIT_S = 2.0  # on the same association; later the destination opens one of its own (PS3.4 J.3.3)
LONGEST_S = 86_400.0  # between two requests
NOT_FOUND_LIMIT = 5  # C-FINDs in a row that do not find a result before it is sent again

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Unproved:
    """A delivered result that the destination has not vouched for yet."""

    delivery: Delivery
    result: Result
    study_uid: str


# --- decisions ------------------------------------------------------------------------------------------------------


def ask_again_at(destination: DestinationSettings, attempts: int, now: datetime) -> datetime:
    """When to ask once more after `attempts` requests: doubling up to a day."""
    first_s = destination.commitment_timeout_s if destination.storage_commitment else destination.retry_delay_s
    return try_again_at(now, attempts, first_s=first_s, longest_s=LONGEST_S)


def send_again_at(destination: DestinationSettings, attempts: int, now: datetime, jitter: float) -> datetime | None:
    """When to send what the destination does not have; None once its attempts are spent. `jitter`: 0 to 1."""
    if attempts >= destination.retry_max_attempts:
        return None
    first_s, longest_s = destination.retry_delay_s, destination.retry_max_delay_s
    return try_again_at(now, attempts, first_s=first_s, longest_s=longest_s, jitter=jitter)


def failure(code: int) -> str:
    """A Failure Reason (0008,1197) in words."""
    return f"storage commitment failed at the destination (0x{code:04X} {FAILURES.get(code, 'unknown reason')})"


# --- asking ---------------------------------------------------------------------------------------------------------


def due(
    sessions: sessionmaker[Session], destination: DestinationSettings, now: datetime, share: int = 0
) -> list[Unproved]:
    """Deliveries whose proof is to be asked for; share: of the destination's parallel associations, which one."""
    with sessions() as session:
        return [Unproved(*row) for row in rows_due(session, destination, DeliveryState.DELIVERED, now, share, BATCH)]


def rows_due(
    session: Session,
    destination: DestinationSettings,
    state: DeliveryState,
    now: datetime,
    share: int,
    limit: int,
) -> Sequence[Row[Delivery, Result, str]]:
    """Deliveries to be sent (PENDING) or proved (DELIVERED), with result and Study Instance UID; oldest first."""
    due_at = Delivery.next_attempt_at if state is DeliveryState.PENDING else Delivery.proof_at
    return session.execute(
        select(Delivery, Result, Study.study_uid)
        .join(Result, Result.id == Delivery.result_id)
        .join(Analysis, Analysis.id == Result.analysis_id)
        .join(Study, Study.id == Analysis.study_id)
        .where(
            Delivery.destination == destination.name,
            Delivery.state == state,
            due_at <= now,
            Delivery.id % destination.concurrency == share,
        )
        .order_by(due_at, Delivery.id)
        .limit(limit)
    ).all()


def prove(
    destination: DestinationSettings,
    scp: ScpSettings,
    sessions: sessionmaker[Session],
    unproved: Sequence[Unproved],
    *,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    new_uid: Callable[[], str] = lambda: str(generate_uid(prefix=None)),
    answer_wait_s: float = ANSWER_WAIT_S,
) -> None:
    """Ask for proof of each; what the destination says is on record when this returns, or comes later."""
    if destination.storage_commitment:
        found = _ask_commitment(destination, scp, sessions, unproved, clock, new_uid(), answer_wait_s)
        if found is None:
            return
        if not (found.unsupported and destination.proof == "find"):
            remedy = (
                f'{where(destination)} offers no storage commitment; set storage_commitment = false or proof = "find"'
                if found.unsupported
                else found.reason
            )
            _postpone(destination, sessions, unproved, remedy, clock())
            return
    if destination.proof == "find":
        _find(destination, scp, sessions, unproved, clock)
    elif not destination.storage_commitment:  # wanted by a configuration that is gone
        with sessions.begin() as session:
            for one in unproved:
                delivery_transitions.want_no_proof(session, one.delivery)


def _ask_commitment(
    destination: DestinationSettings,
    scp: ScpSettings,
    sessions: sessionmaker[Session],
    unproved: Sequence[Unproved],
    clock: Callable[[], datetime],
    transaction_uid: str,
    answer_wait_s: float,
) -> Absence | None:
    """N-ACTION for all of them; None once the destination has taken the request, and else why it has not."""
    answered = Event()

    def on_report(event: evt.Event) -> tuple[int, Dataset | None]:
        """The answer on the same association: Success once it is on record (PS3.7 10.1.1.1.8)."""
        try:
            answer = commitment_answers.decode(event.event_information)
            with sessions.begin() as session:
                record(session, answer, {destination.name: destination}, clock(), random.random())
        except BadAnswer as error:
            log.warning("commitment_answer_unusable", destination=destination.name, reason=str(error))
            return 0x0115, None  # invalid argument value
        except Exception as error:  # noqa: BLE001  # in a thread of the library's; the destination may send it again
            log.error("commitment_fault", destination=destination.name, error=type(error).__name__)
            return 0x0110, None  # processing failure
        answered.set()
        return 0x0000, None

    association = associate(
        destination,
        scp,
        [build_context(PUSH_MODEL, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])],
        [(evt.EVT_N_EVENT_REPORT, on_report)],
    )
    if isinstance(association, Absence):
        return association
    try:
        now = clock()
        with sessions.begin() as session:
            asked = [
                one
                for one in unproved
                if delivery_transitions.ask_commitment(
                    session,
                    one.delivery,
                    transaction_uid=transaction_uid,
                    ask_again_at=ask_again_at(destination, one.delivery.proof_attempts, now),
                    now=now,
                    actor=ACTOR,
                )
            ]
        if not asked:
            return None
        status = _n_action(association, transaction_uid, asked)
        if status == 0x0000:
            log.info("commitment_asked", destination=destination.name, results=len(asked))
            answered.wait(answer_wait_s)
        else:
            said = "gave no answer" if status is None else f"answered 0x{status:04X}"
            log.warning("commitment_refused", destination=destination.name, reason=said)
            with sessions.begin() as session:
                for one in asked:
                    reason = f"{where(destination)} {said} to the request for storage commitment"
                    delivery_transitions.note_unproved(session, one.delivery.id, transaction_uid, reason=reason)
        return None
    finally:
        if association.is_established:
            association.release()


def _n_action(association: Association, transaction_uid: str, asked: Sequence[Unproved]) -> int | None:
    request = Dataset()
    request.TransactionUID = transaction_uid
    request.ReferencedSOPSequence = []
    for one in asked:
        item = Dataset()
        item.ReferencedSOPClassUID = one.result.sop_class_uid
        item.ReferencedSOPInstanceUID = one.result.sop_instance_uid
        request.ReferencedSOPSequence.append(item)
    try:
        status, _ = association.send_n_action(request, REQUEST_STORAGE_COMMITMENT, PUSH_MODEL, PUSH_MODEL_INSTANCE)
    except (RuntimeError, ValueError):  # it ended meanwhile
        return None
    code: int | None = status.get("Status")
    return code


# --- answers --------------------------------------------------------------------------------------------------------


def take_answers(
    spool: Path, sessions: sessionmaker[Session], destinations: Mapping[str, DestinationSettings], now: datetime
) -> int:
    """Turn the answers that the receiver kept into rows; how many files."""
    taken = 0
    for path, answer in commitment_answers.waiting(spool):
        taken += 1
        if answer is None:
            log.error("commitment_answer_unusable", file=path.name, remedy=f"kept as *{UNUSABLE}; asked again")
            commitment_answers.set_aside(path)
            continue
        with sessions.begin() as session:
            record(session, answer, destinations, now, random.random())
        path.unlink(missing_ok=True)  # after the commit: taken twice, it changes nothing
    return taken


def record(
    session: Session,
    answer: Answer,
    destinations: Mapping[str, DestinationSettings],
    now: datetime,
    jitter: float,
) -> int:
    """One answer into the states of its deliveries; how many it spoke of. Its Transaction UID says which they are."""
    rows = session.execute(
        select(Delivery, Result.sop_instance_uid)
        .join(Result, Result.id == Delivery.result_id)
        .where(Delivery.transaction_uid == answer.transaction_uid, Delivery.state == DeliveryState.DELIVERED)
    ).all()
    if not rows:
        log.warning(
            "commitment_answer_to_nobody", calling_ae=answer.calling_ae, reason="asked again meanwhile, or known"
        )
    for delivery, uid in rows:
        if uid in answer.failed:
            reason = failure(answer.failed[uid])
            _lost(session, delivery, destinations.get(delivery.destination), reason, now, jitter)
        elif uid in answer.committed:
            delivery_transitions.commit_delivery(session, delivery.id, note=None, now=now, actor=ACTOR)
            log.info("committed", delivery_id=delivery.id, destination=delivery.destination)
    return len(rows)


def _lost(
    session: Session,
    delivery: Delivery,
    destination: DestinationSettings | None,
    reason: str,
    now: datetime,
    jitter: float,
) -> None:
    """The destination took it and does not have it: it is sent again, as often as attempts allow."""
    at = now if destination is None else send_again_at(destination, delivery.attempts, now, jitter)
    if at is None:
        reason = f"gave up after {delivery.attempts} attempts: {reason}"
    delivery_transitions.uncommit_delivery(
        session, delivery.id, reason=reason, next_attempt_at=at, now=now, actor=ACTOR
    )
    log.error("not_committed", delivery_id=delivery.id, destination=delivery.destination, reason=reason)


# --- C-FIND ---------------------------------------------------------------------------------------------------------


def _find(
    destination: DestinationSettings,
    scp: ScpSettings,
    sessions: sessionmaker[Session],
    unproved: Sequence[Unproved],
    clock: Callable[[], datetime],
) -> None:
    """Look for each at IMAGE level; what is found counts as committed, with a note that says how that is known."""
    contexts = [
        build_context(StudyRootQueryRetrieveInformationModelFind, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    ]
    association = associate(destination, scp, contexts)
    if isinstance(association, Absence):
        reason = (
            f'{where(destination)} answers no C-FIND (Study Root); allow it there, or set proof = "none"'
            if association.unsupported
            else association.reason
        )
        _postpone(destination, sessions, unproved, reason, clock())
        return
    try:
        for one in unproved:
            found, said = _is_there(association, one)
            now = clock()
            with sessions.begin() as session:
                delivery_transitions.note_sought(session, one.delivery.id, found=found, now=now, actor=ACTOR)
                if found:
                    note = "found by C-FIND"
                    delivery_transitions.commit_delivery(session, one.delivery.id, note=note, now=now, actor=ACTOR)
                    log.info("committed", delivery_id=one.delivery.id, destination=destination.name, by="C-FIND")
                elif found is False and one.delivery.proof_attempts + 1 >= NOT_FOUND_LIMIT:
                    reason = f"not found at the destination by {one.delivery.proof_attempts + 1} C-FINDs"
                    _lost(session, one.delivery, destination, reason, now, random.random())
                else:
                    at = ask_again_at(destination, one.delivery.proof_attempts, now)
                    delivery_transitions.postpone_proof(session, one.delivery, reason=said, ask_again_at=at)
    finally:
        if association.is_established:
            association.release()


def _is_there(association: Association, one: Unproved) -> tuple[bool | None, str]:
    """Whether the destination knows this instance, None where it did not say, and a sentence (PS3.4 C.4.1)."""
    query = Dataset()
    query.QueryRetrieveLevel = "IMAGE"
    query.StudyInstanceUID = one.study_uid
    query.SeriesInstanceUID = one.result.series_uid
    query.SOPInstanceUID = one.result.sop_instance_uid
    found, status = False, None
    try:
        for answer, identifier in association.send_c_find(query, StudyRootQueryRetrieveInformationModelFind):
            status = answer.get("Status")
            if identifier is not None and identifier.get("SOPInstanceUID") == one.result.sop_instance_uid:
                found = True
    except (RuntimeError, ValueError):  # it ended meanwhile
        status = None
    if found:
        return True, ""
    if status == 0x0000:
        return False, "not found by C-FIND yet"
    return None, "no answer to C-FIND" if status is None else f"C-FIND was answered 0x{status:04X}"


def _postpone(
    destination: DestinationSettings,
    sessions: sessionmaker[Session],
    unproved: Sequence[Unproved],
    reason: str,
    now: datetime,
) -> None:
    log.warning("proof_postponed", destination=destination.name, results=len(unproved), reason=reason)
    with sessions.begin() as session:
        for one in unproved:
            at = ask_again_at(destination, one.delivery.proof_attempts, now)
            delivery_transitions.postpone_proof(session, one.delivery, reason=reason, ask_again_at=at)
