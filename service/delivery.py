"""Outbox -> C-STORE SCU -> the answer on record. Sends stored bytes, never builds or runs anything again."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import repeat
from pathlib import Path
from threading import Event, Thread

import structlog
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, _config, build_context, evt
from pynetdicom.association import Association
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from service.shared import transitions
from service.shared.db import Delivery, DeliveryState, Destination, Result
from service.shared.durable import digest
from service.shared.log import explain_exception
from service.shared.settings import DestinationSettings, ScpSettings, Settings

ACTOR = "service/delivery"
BATCH = 64  # results per association
MAX_CONTEXTS = 128  # PS3.8 9.3.2.2: odd ids 1 to 255
VERIFICATION = "1.2.840.10008.1.1"

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
    delay_s = min(destination.retry_max_delay_s, destination.retry_delay_s * 2.0 ** min(attempts, 16))
    return now + timedelta(seconds=delay_s * (1 - 0.25 * jitter))


def deliver_for_ever(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> None:
    """One thread per destination, so that one that is away never delays another."""
    threads = [
        Thread(target=_serve_destination, args=(settings, destination, sessions, stop), name=destination.name)
        for destination in settings.destination
    ]
    for thread in threads:
        thread.start()
    stop.wait()
    for thread in threads:
        thread.join()


def _serve_destination(
    settings: Settings, destination: DestinationSettings, sessions: sessionmaker[Session], stop: Event
) -> None:
    while not stop.is_set():
        try:
            deliver_due(settings, destination, sessions, datetime.now(UTC))
        except DBAPIError as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        except Exception as error:  # noqa: BLE001  # this loop must live; what went wrong is logged and tried again
            log.error("delivery_fault", destination=destination.name, error=explain_exception(error))
        stop.wait(settings.assembly.sweep_s)


def deliver_due(
    settings: Settings, destination: DestinationSettings, sessions: sessionmaker[Session], now: datetime
) -> int:
    """Send what is due to one destination over one association and put every answer on record; how many were due."""
    with sessions() as session:
        standing = session.get(Destination, destination.name)
        if standing is not None and standing.paused:
            return 0
        due = session.execute(
            select(Delivery, Result)
            .join(Result, Result.id == Delivery.result_id)
            .where(
                Delivery.destination == destination.name,
                Delivery.state == DeliveryState.PENDING,
                Delivery.next_attempt_at <= now,
            )
            .order_by(Delivery.next_attempt_at, Delivery.id)
            .limit(BATCH)
        ).all()
    if not due:
        return 0
    files = [settings.data.path / result.path for _, result in due]
    results = [result for _, result in due]
    with closing(send(destination, settings.scp, results, files)) as answers:
        for (delivery, _), answer in zip(due, answers, strict=True):
            with sessions.begin() as session:
                record(session, delivery, answer, destination, datetime.now(UTC))
    return len(due)


def record(
    session: Session, delivery: Delivery, answer: Answer, destination: DestinationSettings, now: datetime
) -> None:
    """Turn one answer into the delivery's next state."""
    spent = delivery.attempts + 1 >= destination.retry_max_attempts
    fields = {
        "delivery_id": delivery.id,
        "destination": destination.name,
        "status": None if answer.status is None else f"0x{answer.status:04X}",
        "reason": answer.reason,
    }
    if answer.verdict is Verdict.STORED:
        assert answer.status is not None
        transitions.close_delivered(session, delivery, status=answer.status, note=answer.reason, now=now, actor=ACTOR)
        log.info("delivered", **fields)
    elif answer.verdict is Verdict.REFUSED or spent:
        reason = answer.reason or ""
        if answer.verdict is Verdict.AGAIN:
            reason = f"gave up after {delivery.attempts + 1} attempts: {reason}"
        transitions.reject_delivery(session, delivery, status=answer.status, reason=reason, now=now, actor=ACTOR)
        log.error("delivery_rejected", **fields)
    else:
        at = next_attempt(destination, delivery.attempts, now, random.random())
        transitions.postpone_delivery(
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
    destination: DestinationSettings, scp: ScpSettings, results: Sequence[Result], files: Sequence[Path]
) -> Generator[Answer]:
    """C-STORE the files over one association; one answer per file, in order, each as soon as it is there."""
    syntaxes = [_transfer_syntax(file) for file in files]
    wanted = {
        (result.sop_class_uid, offered)
        for result, syntax in zip(results, syntaxes, strict=True)
        for offered in (syntax, str(ExplicitVRLittleEndian))  # every node must take uncompressed (PS3.5 10.1)
    }
    association = _associate(destination, scp, wanted)
    if isinstance(association, Answer):
        yield from repeat(association, len(results))
        return
    try:
        for result, syntax, file in zip(results, syntaxes, files, strict=True):
            yield _store(association, destination, result, syntax, file)
    finally:
        if association.is_established:
            association.release()


def echo(destination: DestinationSettings, scp: ScpSettings) -> tuple[bool, str]:
    """C-ECHO the destination: whether it answered, and a sentence for people."""
    association = _associate(destination, scp, {(VERIFICATION, ImplicitVRLittleEndian)})
    if isinstance(association, Answer):
        return False, association.reason or ""
    try:
        code = association.send_c_echo().get("Status")
    except (RuntimeError, ValueError):  # it ended meanwhile
        code = None
    if association.is_established:
        association.release()
    where = _where(destination)
    if code is None:
        return False, f"{where} did not answer C-ECHO"
    if code != 0x0000:
        return False, f"{where} answered C-ECHO with 0x{code:04X}"
    return True, f"{where} answers C-ECHO with Success"


def _associate(
    destination: DestinationSettings, scp: ScpSettings, wanted: set[tuple[str, str]]
) -> Association | Answer:
    """An established association, or what its absence means. wanted: pairs of SOP class and transfer syntax."""
    application = AE(ae_title=destination.calling_ae_title or scp.ae_title)
    application.connection_timeout = destination.timeout_s
    application.acse_timeout = destination.timeout_s
    application.dimse_timeout = destination.timeout_s
    application.network_timeout = destination.timeout_s
    contexts = [build_context(*pair) for pair in sorted(wanted)[:MAX_CONTEXTS]]
    connections: list[evt.Event] = []
    try:
        association = application.associate(
            destination.host,
            destination.port,
            contexts=contexts,
            ae_title=destination.ae_title,
            evt_handlers=[(evt.EVT_CONN_OPEN, connections.append)],
        )
    except (OSError, UnicodeError):  # from the resolver
        return Answer(Verdict.AGAIN, None, f"{_where(destination)}: no such host; check [[destination]] host")
    if association.is_established:
        return association
    if association.rejected_contexts:  # and none accepted: then pynetdicom aborts by itself
        return _not_supported(destination, {sop_class for sop_class, _ in wanted})
    return Answer(Verdict.AGAIN, None, _why_not(association, destination, connected=bool(connections)))


def _transfer_syntax(file: Path) -> str:
    """Of a stored result; one that cannot be read is found out, and explained, when its turn comes."""
    try:
        return str(read_file_meta_info(file).TransferSyntaxUID)
    except (OSError, InvalidDicomError, AttributeError):
        return str(ExplicitVRLittleEndian)


def _where(destination: DestinationSettings) -> str:
    return f"{destination.ae_title} at {destination.host}:{destination.port}"


def _not_supported(destination: DestinationSettings, sop_classes: Iterable[str]) -> Answer:
    """PS3.7 annex C: 0x0122, SOP Class not supported. Only another configuration, here or there, changes that."""
    return Answer(
        Verdict.REFUSED,
        0x0122,
        f"{destination.ae_title} takes no SOP class {', '.join(sorted(sop_classes))}; "
        f"try another sr_sop_class for [[destination]] {destination.name}, or leave the companion out of its routes",
    )


def _why_not(association: Association, destination: DestinationSettings, *, connected: bool) -> str:
    where = _where(destination)
    if association.is_rejected:
        primitive = association.acceptor.primitive
        why = f"{primitive.result_str}: {primitive.reason_str}" if primitive else "no reason given"
        return f"{where} rejects the association ({why}); check the AE titles on both sides"
    if connected:
        return f"{where} aborted the association"
    return f"{where} cannot be reached; check [[destination]] host and port, and that the PACS is up"


def _store(
    association: Association, destination: DestinationSettings, result: Result, syntax: str, file: Path
) -> Answer:
    if not association.is_established:
        return Answer(Verdict.AGAIN, None, "the association ended before this result was sent")
    accepted = {(one.abstract_syntax, one.transfer_syntax[0]) for one in association.accepted_contexts}
    transcoded = (result.sop_class_uid, syntax) not in accepted
    if transcoded and (result.sop_class_uid, str(ExplicitVRLittleEndian)) not in accepted:
        return _not_supported(destination, [result.sop_class_uid])
    try:
        intact = digest(file.read_bytes()) == result.sha256
    except OSError as error:
        return Answer(Verdict.AGAIN, None, f"stored result cannot be read: {error.strerror}")
    if not intact:
        return Answer(Verdict.REFUSED, None, "the stored result does not match its recorded SHA-256; not sent")
    try:
        status = association.send_c_store(_uncompressed(file) if transcoded else file)
    except (RuntimeError, ValueError, OSError) as error:
        return Answer(Verdict.AGAIN, None, f"the association broke while sending ({type(error).__name__})")
    if "Status" not in status:
        return Answer(Verdict.AGAIN, None, "no answer to C-STORE within the time limit")
    answer = judge(int(status.Status))
    return replace(answer, reason=answer.reason or "sent uncompressed") if transcoded else answer


def _uncompressed(file: Path) -> Dataset:
    """The same pixels under the same UID (RLE is lossless) for a destination that takes no compression."""
    dataset = dcmread(file)
    dataset.decompress(generate_instance_uid=False)
    return dataset
