"""Outbox -> C-STORE SCU -> the answer on record. Sends stored bytes, never builds or runs anything again."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from threading import Event, Thread

import structlog
from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from pynetdicom import _config, build_context
from pynetdicom.association import Association
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from service import commitment, custody
from service.report.encoding import transcoded
from service.requestor import Absence, associate
from service.shared import delivery_transitions
from service.shared.backoff import try_again_at
from service.shared.db import Delivery, DeliveryState, Destination, Result, ResultState
from service.shared.durable import digest
from service.shared.log import explain_exception
from service.shared.settings import Compression, DestinationSettings, ScpSettings, Settings, spool_folder

ACTOR = "service/delivery"
BATCH = 64  # results per association
COMPRESSED = {Compression.JPEG2000: JPEG2000Lossless, Compression.RLE: RLELossless}
UNCOMPRESSED = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))  # every node takes the last (PS3.5 10.1)

_config.STORE_SEND_CHUNKED_DATASET = True  # a file's data set goes out as it lies there, never encoded again

log = structlog.get_logger(__name__)


class Verdict(StrEnum):
    STORED = "stored"  # the destination has it
    AGAIN = "again"  # not now; the same bytes later
    REFUSED = "refused"  # not these bytes, however often


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one attempt. `status` is the DIMSE status, None when there was none."""

    verdict: Verdict
    status: int | None
    reason: str | None
    sent: Result | None = None  # what was sent: the result, or one that stands in for it


@dataclass(frozen=True, slots=True)
class Consignment:
    """One delivery that is due, its result, and the same report in other classes, should its own not be taken."""

    delivery: Delivery
    result: Result
    instead: tuple[Result, ...] = ()


def judge(status: int) -> Answer:
    """What a C-STORE status means for the delivery (PS3.4 table B.2-1, PS3.7 annex C)."""
    if status == 0x0000:
        return Answer(Verdict.STORED, status, None)
    if status == 0x0001 or status in (0x0107, 0x0116) or 0xB000 <= status <= 0xBFFF:
        return Answer(Verdict.STORED, status, f"stored with warning 0x{status:04X}")
    if status == 0x0111:  # duplicate SOP Instance: one UID of ours never has other bytes, so it is this one
        return Answer(Verdict.STORED, status, "the destination has it already (0x0111)")
    if 0xA700 <= status <= 0xA7FF:
        return Answer(Verdict.AGAIN, status, f"out of resources at the destination (0x{status:04X})")
    return Answer(Verdict.REFUSED, status, f"refused by the destination (0x{status:04X})")


def next_attempt(destination: DestinationSettings, attempts: int, now: datetime, jitter: float) -> datetime:
    """When to try again after `attempts` tries: doubling up to the maximum, less up to a quarter (`jitter` 0 to 1)."""
    first_s, longest_s = destination.retry_delay_s, destination.retry_max_delay_s
    return try_again_at(now, attempts, first_s=first_s, longest_s=longest_s, jitter=jitter)


def deliver_for_ever(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> None:
    """Threads of its own for every destination, so that one that is slow or away never delays another."""
    threads = [
        Thread(target=_serve_destination, args=(settings, destination, sessions, stop, share), name=destination.name)
        for destination in settings.destination
        for share in range(destination.concurrency)
    ]
    threads.append(Thread(target=_report_for_ever, args=(settings, sessions, stop), name="commitment reports"))
    for thread in threads:
        thread.start()
    _take_answers(settings, sessions, stop)
    for thread in threads:
        thread.join()


def _serve_destination(
    settings: Settings, destination: DestinationSettings, sessions: sessionmaker[Session], stop: Event, share: int
) -> None:
    while not stop.is_set():
        sent = 0
        try:
            now = datetime.now(UTC)
            sent = deliver_due(settings, destination, sessions, now, share=share, stop=stop)
            prove_due(settings, destination, sessions, now, share=share)
        except DBAPIError as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        except Exception as error:  # noqa: BLE001  # this loop must live; what went wrong is logged and tried again
            log.error("delivery_fault", destination=destination.name, error=explain_exception(error))
        if sent < BATCH:
            stop.wait(settings.assembly.sweep_s)


def _take_answers(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> None:
    """Answers to storage commitment that came to our receiver, until `stop`."""
    destinations = {one.name: one for one in settings.destination}
    take = partial(commitment.take_answers, spool_folder(settings), sessions, destinations)
    _sweep(take, stop, settings.assembly.sweep_s)


def _report_for_ever(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> None:
    """What became of requests for storage commitment, told to who asked, until `stop`."""
    _sweep(custody.Reporter(settings, sessions, spool_folder(settings)).report_due, stop, settings.assembly.sweep_s)


def _sweep(commitments: Callable[[datetime], int], stop: Event, every_s: float) -> None:
    """Look again and again, as of now, until `stop`."""
    while not stop.is_set():
        try:
            commitments(datetime.now(UTC))
        except DBAPIError as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        except Exception as error:  # noqa: BLE001  # this loop must live; what went wrong is logged and tried again
            log.error("commitment_fault", error=explain_exception(error))
        stop.wait(every_s)


def deliver_due(
    settings: Settings,
    destination: DestinationSettings,
    sessions: sessionmaker[Session],
    now: datetime,
    *,
    share: int = 0,
    stop: Event | None = None,
) -> int:
    """Send what is due to one destination over one association and put every answer on record; how many were due.

    share: of the destination's parallel associations, which one this is: each has its own deliveries. Between two
    results it is seen whether the destination has been paused meanwhile, or `stop` was set.
    """
    with sessions() as session:
        if _is_paused(session, destination):
            return 0
        consignments = _due(session, destination, now, share)
    if not consignments:
        return 0
    with closing(send(destination, settings.scp, settings.data.path, consignments)) as answers:
        for one, answer in zip(consignments, answers, strict=True):
            with sessions.begin() as session:
                record(session, one.delivery, answer, destination, datetime.now(UTC))
                paused = _is_paused(session, destination)
            if paused or (stop is not None and stop.is_set()):
                break
    return len(consignments)


def prove_due(
    settings: Settings,
    destination: DestinationSettings,
    sessions: sessionmaker[Session],
    now: datetime,
    *,
    share: int = 0,
) -> int:
    """Ask the destination to vouch for what it took, where that is due; how many deliveries."""
    unproved = commitment.due(sessions, destination, now, share)
    if not unproved:
        return 0
    with sessions() as session:
        if _is_paused(session, destination):
            return 0
    commitment.prove(destination, settings.scp, sessions, unproved)
    return len(unproved)


def _is_paused(session: Session, destination: DestinationSettings) -> bool:
    standing = session.get(Destination, destination.name, populate_existing=True)
    return standing is not None and standing.paused


def _due(session: Session, destination: DestinationSettings, now: datetime, share: int) -> list[Consignment]:
    rows = commitment.rows_due(session, destination, DeliveryState.PENDING, now, share, BATCH)
    return [Consignment(delivery, result, _instead(session, destination, result)) for delivery, result, _ in rows]


def _instead(session: Session, destination: DestinationSettings, result: Result) -> tuple[Result, ...]:
    """The same report in the classes that the destination may be sent instead, best first."""
    kinds = [destination.kind_of_report(one) for one in destination.sr_sop_classes]
    if result.kind not in kinds[:-1]:
        return ()
    later = kinds[kinds.index(result.kind) + 1 :]
    taken = select(Delivery.result_id).where(Delivery.destination == destination.name)
    found = session.scalars(
        select(Result).where(
            Result.analysis_id == result.analysis_id,
            Result.kind.in_(later),
            Result.state == ResultState.BUILT,
            Result.id.not_in(taken),
        )
    )
    return tuple(sorted(found, key=lambda one: later.index(one.kind)))


def record(
    session: Session, delivery: Delivery, answer: Answer, destination: DestinationSettings, now: datetime
) -> None:
    """Turn one answer into the delivery's next state."""
    spent = delivery.attempts + 1 >= destination.retry_max_attempts
    if answer.sent is not None and answer.sent.id != delivery.result_id:
        if not delivery_transitions.fall_back_delivery(
            session, delivery, result_id=answer.sent.id, now=now, actor=ACTOR
        ):
            return
        delivery = session.get_one(Delivery, delivery.id, populate_existing=True)
    fields = {
        "delivery_id": delivery.id,
        "destination": destination.name,
        "status": None if answer.status is None else f"0x{answer.status:04X}",
        "reason": answer.reason,
    }
    if answer.verdict is Verdict.STORED:
        assert answer.status is not None
        delivery_transitions.close_delivered(
            session,
            delivery,
            status=answer.status,
            note=answer.reason,
            now=now,
            actor=ACTOR,
            proof_at=now if destination.wants_proof else None,
        )
        log.info("delivered", **fields)
    elif answer.verdict is Verdict.REFUSED or spent:
        reason = answer.reason or ""
        if answer.verdict is Verdict.AGAIN:
            reason = f"gave up after {delivery.attempts + 1} attempts: {reason}"
        delivery_transitions.reject_delivery(
            session, delivery, status=answer.status, reason=reason, now=now, actor=ACTOR
        )
        log.error("delivery_rejected", **fields)
    else:
        at = next_attempt(destination, delivery.attempts, now, random.random())
        delivery_transitions.postpone_delivery(
            session,
            delivery,
            status=answer.status,
            reason=answer.reason or "",
            next_attempt_at=at,
            now=now,
            actor=ACTOR,
        )
        log.warning("delivery_postponed", next_attempt_at=at.isoformat(timespec="seconds"), **fields)


def send(
    destination: DestinationSettings, scp: ScpSettings, data: Path, consignments: Sequence[Consignment]
) -> Generator[Answer]:
    """C-STORE each over one association; one answer per consignment, in order, each as soon as it is there.

    data: [data] path, below which the stored results lie.
    """
    offered = {
        (result.sop_class_uid, syntax)
        for one in consignments
        for result in (one.result, *one.instead)
        for syntax in encodings(_transfer_syntax(data / result.path), destination)
    }
    association = associate(destination, scp, [build_context(*pair) for pair in sorted(offered)])
    if isinstance(association, Absence):
        for one in consignments:
            if association.unsupported:
                yield _not_supported(destination, one)
            else:
                yield Answer(Verdict.AGAIN, None, association.reason)
        return
    try:
        for one in consignments:
            yield _store(association, destination, data, one)
    finally:
        if association.is_established:
            association.release()


def encodings(own: str, destination: DestinationSettings) -> list[str]:
    """In what a result may go there, best first; own: the transfer syntax of its stored bytes."""
    forbidden = {str(syntax) for name, syntax in COMPRESSED.items() if name not in destination.compression}
    smaller = [str(RLELossless)] if own == JPEG2000Lossless else []
    return [one for one in dict.fromkeys((own, *smaller, *UNCOMPRESSED)) if one not in forbidden]


def _transfer_syntax(file: Path) -> str:
    """Of a stored result; one that cannot be read is found out, and explained, when its turn comes."""
    try:
        return str(read_file_meta_info(file).TransferSyntaxUID)
    except (OSError, InvalidDicomError, AttributeError):
        return str(ExplicitVRLittleEndian)


def _not_supported(destination: DestinationSettings, consignment: Consignment) -> Answer:
    """PS3.7 annex C: 0x0122, SOP Class not supported. Only another configuration, here or there, changes that."""
    classes = [one.sop_class_uid for one in (consignment.result, *consignment.instead)]
    return Answer(
        Verdict.REFUSED,
        0x0122,
        f"{destination.ae_title} takes no SOP class {', '.join(classes)}; "
        f"try another sr_sop_class for [[destination]] {destination.name}, or leave the companion out of its routes",
    )


def choose(
    consignment: Consignment, offered: Sequence[Sequence[str]], accepted: Set[tuple[str, str]]
) -> tuple[Result, str] | None:
    """What the destination is sent and in which transfer syntax, of what it accepted; None where it takes nothing.

    offered: the encodings of the result and of those that may stand in for it, best first. accepted: pairs of SOP
    class and transfer syntax. The result itself goes before one that stands in, its own bytes before a new encoding.
    """
    for result, syntaxes in zip((consignment.result, *consignment.instead), offered, strict=True):
        for syntax in syntaxes:
            if (result.sop_class_uid, syntax) in accepted:
                return result, syntax
    return None


def _store(association: Association, destination: DestinationSettings, data: Path, consignment: Consignment) -> Answer:
    if not association.is_established:
        return Answer(Verdict.AGAIN, None, "the association ended before this result was sent")
    accepted = {(str(one.abstract_syntax), str(one.transfer_syntax[0])) for one in association.accepted_contexts}
    stored = {one.id: _transfer_syntax(data / one.path) for one in (consignment.result, *consignment.instead)}
    chosen = choose(consignment, [encodings(own, destination) for own in stored.values()], accepted)
    if chosen is None:
        return _not_supported(destination, consignment)
    result, syntax = chosen
    file = data / result.path
    try:
        intact = digest(file.read_bytes()) == result.sha256
    except OSError as error:
        return Answer(Verdict.AGAIN, None, f"stored result cannot be read: {error.strerror}")
    if not intact:
        return Answer(Verdict.REFUSED, None, "the stored result does not match its recorded SHA-256; not sent")
    misfit = _other_charset(file, destination)
    if misfit is not None:
        return Answer(Verdict.REFUSED, None, misfit)
    as_stored = syntax == stored[result.id]
    try:
        status = association.send_c_store(file if as_stored else transcoded(file, UID(syntax)))
    except (RuntimeError, ValueError, OSError) as error:
        return Answer(Verdict.AGAIN, None, f"the association broke while sending ({type(error).__name__})")
    if "Status" not in status:
        return Answer(Verdict.AGAIN, None, "no answer to C-STORE within the time limit")
    notes = [] if as_stored else [f"sent in {UID(syntax).name}, which the destination takes"]
    if result is not consignment.result:
        notes.append(f"sent as {UID(result.sop_class_uid).name}, which the destination takes")
    answer = judge(int(status.Status))
    return replace(answer, reason="; ".join(filter(None, (answer.reason, *notes))) or None, sent=result)


def _other_charset(file: Path, destination: DestinationSettings) -> str | None:
    """Why the destination does not get this result: it is in a character set that it does not take."""
    declared = dcmread(file, specific_tags=["SpecificCharacterSet"], stop_before_pixels=True).get(
        "SpecificCharacterSet"
    )
    written = declared if isinstance(declared, str) else "\\".join(declared or [])
    if written in ("", destination.charset):
        return None
    return (
        f"not sent: its text does not fit {destination.charset}, or [[destination]] {destination.name} charset "
        f"was another one when it was built; `show` names the attributes, `requeue --again` builds it anew"
    )
