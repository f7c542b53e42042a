"""Spool -> rows: which instances belong together, and when is a study complete?

The only writer of study and instance rows. It reads files and the database; it knows nothing of associations
beyond their heartbeats, and nothing of queues.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

import structlog
from pydicom import Dataset, dcmread
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian
from sqlalchemy import insert, select
from sqlalchemy.exc import DataError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service import commitment_requests, custody
from service.instance_header import PREFIX_BYTES, read_elements, walk_elements
from service.shared import audit, transitions
from service.shared.audit import AuditKind
from service.shared.db import Instance, Result, Study, StudyHeader, StudyState
from service.shared.durable import digest
from service.shared.log import explain_exception
from service.shared.settings import Settings, for_route, routes
from service.spool import Receipt, ReceiptError, Spool, first_bytes, key, open_data_set

ACTOR = "service/ingest"
BATCH = 100  # receipts per transaction
LOCK_WAIT_S = 0.2

HEADER = (
    "SpecificCharacterSet",
    "PatientID",
    "IssuerOfPatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyDate",
    "StudyDescription",
    "Modality",
    "Rows",
    "ContributingEquipmentSequence",
)

HEADER_TAGS = sorted(int(Tag(keyword)) for keyword in HEADER)

IDENTITY = ("patient_id", "issuer_of_patient_id", "patient_name", "patient_birth_date")  # columns of StudyHeader
MAX_DEVICES = 100  # contributing equipment that is compared with ours; more is no real object

log = structlog.get_logger(__name__)


# --- decisions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Patient:
    """What tells one patient from another in a header; empty where the header says nothing."""

    patient_id: str
    issuer: str
    name: str
    birth_date: str


def are_different(one: Patient, other: Patient) -> bool:
    """Whether two headers name two patients. Silence contradicts nothing; an equal Patient ID settles it.

    An identifier means something within its issuer only (PS3.3 C.2.2.1.1), so different issuers make two.
    """
    if one.patient_id and other.patient_id:
        if one.issuer and other.issuer and one.issuer != other.issuer:
            return True
        return one.patient_id != other.patient_id
    names, birth_dates = (one.name.upper(), other.name.upper()), (one.birth_date, other.birth_date)
    return any(a and b and a != b for a, b in (names, birth_dates))


def why_complete(
    *,
    opened_at: datetime,
    last_image_at: datetime,
    association_open: bool,
    now: datetime,
    quiet_period_s: float,
    max_open_s: float,
) -> str | None:
    """Why a receiving study counts as complete now, or None while it does not."""
    if (now - opened_at).total_seconds() >= max_open_s:
        return f"open for max_open_s = {max_open_s:g}"
    if association_open:
        return None
    if (now - last_image_at).total_seconds() >= quiet_period_s:
        return f"no image instance for quiet_period_s = {quiet_period_s:g}"
    return None


def routable_modalities(settings: Settings) -> frozenset[str]:
    """Modalities that some route would read: only their images open or reopen a study."""
    return frozenset(
        modality for route in routes(settings) for modality in for_route(settings, route.name).series.modality
    )


# --- the loop -------------------------------------------------------------------------------------------------------


def ingest_for_ever(settings: Settings, sessions: sessionmaker[Session], spool: Spool, stop: Event) -> None:
    """Turn receipts into rows and close quiet studies, until `stop`; survives a database that is away."""
    with _only_one(spool.path, stop):
        rebuilt = False
        while not stop.is_set():
            now, begun = datetime.now(UTC), time.monotonic()
            try:
                if not rebuilt:
                    rebuild(settings, sessions, spool, now)
                    rebuilt = True
                asked = list(commitment_requests.requests(spool.path))  # before: so what they name is in the rows after
                ingest(settings, sessions, spool, now)
                complete_quiet(settings, sessions, spool, now)
                custody.decide(asked, sessions, spool, now)
            except (OperationalError, InterfaceError) as error:
                log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
            except Exception as error:  # noqa: BLE001  # this loop must live; what went wrong is logged and tried again
                log.error("ingest_fault", error=explain_exception(error))
            # also while instances arrive: taking in many at a time leaves processors and disk to the receiver
            stop.wait(max(0.0, begun + min(settings.assembly.sweep_s, 1.0) - time.monotonic()))


def ingest(settings: Settings, sessions: sessionmaker[Session], spool: Spool, now: datetime) -> int:
    """Every receipt that waits now -> rows, in batches; how many. What comes meanwhile is for the next call.

    Studies may then be judged as of `now`: all that was acknowledged before is in the rows. Waiting until nothing
    is left instead would judge no study for as long as senders are busy.
    """
    done = 0
    for batch in _batches(spool.incoming()):
        taken = _take_batch(settings, sessions, spool, batch, now, held=False)
        for path, receipt in taken:  # after the commit: a receipt that waits still is ingested again, harmlessly
            spool.settle(path, receipt)
        done += len(taken)
    return done


def rebuild(settings: Settings, sessions: sessionmaker[Session], spool: Spool, now: datetime) -> int:
    """Rows for settled receipts that have none (a lost or restored database); how many. Their studies are held:
    whether they were analysed and delivered before is not known here, so nothing runs again without a command."""
    with sessions() as session:
        known = frozenset(session.scalars(select(Instance.path)))
    missing = list(spool.settled(known))
    done = sum(len(_take_batch(settings, sessions, spool, batch, now, held=True)) for batch in _batches(missing))
    if missing:
        log.warning("rows_rebuilt_from_spool", instances=done, remedy="`requeue STUDY` releases a held study")
    return done


def _take_batch(
    settings: Settings,
    sessions: sessionmaker[Session],
    spool: Spool,
    paths: Iterable[Path],
    now: datetime,
    *,
    held: bool,
) -> list[tuple[Path, Receipt]]:
    """Commit the rows of these receipts, and return those that were taken; what cannot be used is set aside."""
    receipts = [(path, receipt) for path in paths if (receipt := _readable(sessions, spool, path)) is not None]
    if not held:
        spool.place(receipts)
    try:
        with sessions.begin() as session:
            take(session, settings, spool, [receipt for _, receipt in receipts], now, held=held)
    except (DataError, IntegrityError) as error:
        # the database takes one of these values for impossible: it must not keep the others waiting for ever
        if len(receipts) > 1:
            alone = (_take_batch(settings, sessions, spool, [path], now, held=held) for path, _ in receipts)
            return [one for taken in alone for one in taken]
        _set_aside(sessions, spool, receipts[0][0], f"the database refuses it ({type(error).__name__})")
        return []
    return receipts


def complete_quiet(settings: Settings, sessions: sessionmaker[Session], spool: Spool, now: datetime) -> list[int]:
    """Close every study that is quiet for long enough; their row ids."""
    periods = {source.ae_title: source.quiet_period_s for source in settings.source if source.quiet_period_s}
    with sessions() as session:
        receiving = session.scalars(select(Study).where(Study.state == StudyState.RECEIVING)).all()
    if not receiving:
        return []
    open_studies = spool.open_studies(now)
    closed = []
    for study in receiving:
        if study.opened_at is None or study.last_image_at is None:
            continue
        why = why_complete(
            opened_at=study.opened_at,
            last_image_at=study.last_image_at,
            association_open=key(study.study_uid) in open_studies,
            now=now,
            quiet_period_s=periods.get(study.calling_ae, settings.assembly.quiet_period_s),
            max_open_s=settings.assembly.max_open_s,
        )
        if why is None:
            continue
        with sessions.begin() as session:
            if transitions.complete_study(
                session,
                study.id,
                revision=study.revision,
                last_image_at=study.last_image_at,
                now=now,
                actor=ACTOR,
                why=why,
            ):
                closed.append(study.id)
                log.info("study_complete", study_id=study.id, revision=study.revision, why=why)
    return closed


# --- receipts -> rows -----------------------------------------------------------------------------------------------


def take(
    session: Session,
    settings: Settings,
    spool: Spool,
    receipts: Sequence[Receipt],
    now: datetime,
    *,
    held: bool,
) -> None:
    """Add what the receipts acknowledge to the caller's transaction; one event per study and association."""
    modalities = routable_modalities(settings)
    known = _look_up(session, receipts)
    events: dict[tuple[int, str, AuditKind], list[Receipt]] = {}
    for receipt in receipts:
        study = _study(session, known, receipt, now, held=held)
        kind = _take_one(session, known, study, receipt, spool, modalities, now)
        events.setdefault((study.id, receipt.association_id, kind), []).append(receipt)
    if known.added:
        session.execute(insert(Instance), known.added)
    for (study_id, association_id, kind), group in events.items():
        audit.append(
            session,
            kind,
            now=now,
            actor=ACTOR,
            study_id=study_id,
            association_id=association_id,
            instances=len(group),
            calling_ae=group[0].calling_ae,
            called_ae=group[0].called_ae,
            peer_address=group[0].peer_address,
            instances_sha256=digest("\n".join(sorted(one.sha256 for one in group)).encode()),
        )


@dataclass(slots=True)
class _Known:
    """What the rows say about the receipts of one batch, asked at once: a question for each would be most of the work.

    Goes along with what is added: nothing in it needs to be written before the batch is.
    """

    studies: dict[str, Study]  # by Study Instance UID
    headers: dict[int, StudyHeader]  # by study
    digests: dict[tuple[int, str], list[str]]  # by study and SOP Instance UID
    results: frozenset[str]  # SOP Instance UIDs of ours
    headers_read: dict[tuple[object, ...], _Header] = field(default_factory=dict)  # by their encoded values
    added: list[dict[str, Any]] = field(default_factory=list)  # rows of instances, written at once in the end


def _look_up(session: Session, receipts: Sequence[Receipt]) -> _Known:
    uids = {receipt.sop_instance_uid for receipt in receipts}
    study_uids = {receipt.study_uid for receipt in receipts}
    studies = {
        study.study_uid: study for study in session.scalars(select(Study).where(Study.study_uid.in_(study_uids)))
    }
    ids = [study.id for study in studies.values()]
    digests: dict[tuple[int, str], list[str]] = {}
    instances = select(Instance.study_id, Instance.sop_instance_uid, Instance.sha256)
    for study_id, uid, sha256 in session.execute(instances.where(Instance.sop_instance_uid.in_(uids))):
        digests.setdefault((study_id, uid), []).append(sha256)
    return _Known(
        studies=studies,
        headers={
            one.study_id: one for one in session.scalars(select(StudyHeader).where(StudyHeader.study_id.in_(ids)))
        },
        digests=digests,
        results=frozenset(session.scalars(select(Result.sop_instance_uid).where(Result.sop_instance_uid.in_(uids)))),
    )


def _take_one(
    session: Session,
    known: _Known,
    study: Study,
    receipt: Receipt,
    spool: Spool,
    modalities: frozenset[str],
    now: datetime,
) -> AuditKind:
    """Add one instance unless its bytes are known; says what the arrival was."""
    digests = known.digests.setdefault((study.id, receipt.sop_instance_uid), [])
    if receipt.sha256 in digests:
        return AuditKind.INSTANCES_RECEIVED_AGAIN
    is_conflicting = bool(digests)
    digests.append(receipt.sha256)
    header = _header(spool.path / receipt.path, receipt.transfer_syntax_uid, known.headers_read)
    own = receipt.sop_instance_uid in known.results or _is_from_own_device(session, header.devices)
    is_image = receipt.modality in modalities and header.has_rows and not own
    if is_image:
        _open(session, known, study, header, receipt, now)
    known.added.append(
        {
            "study_id": study.id,
            "series_uid": receipt.series_uid,
            "sop_instance_uid": receipt.sop_instance_uid,
            "sop_class_uid": receipt.sop_class_uid,
            "transfer_syntax_uid": receipt.transfer_syntax_uid,
            "modality": receipt.modality[:16],
            "sha256": receipt.sha256,
            "size_bytes": receipt.size_bytes,
            "path": receipt.path,
            "received_at": receipt.received_at,
            "revision": study.revision,
            "is_image": is_image,
            "is_conflicting": is_conflicting,
            "calling_ae": receipt.calling_ae,
            "called_ae": receipt.called_ae,
            "peer_address": receipt.peer_address,
        }
    )
    study.instances += 1
    study.size_bytes += receipt.size_bytes
    if own:
        return AuditKind.RESULT_RETURNED
    if is_conflicting:
        log.warning("instance_conflict", study_id=study.id, sha256=receipt.sha256)
        return AuditKind.INSTANCE_CONFLICT
    return AuditKind.INSTANCES_RECEIVED


def _study(session: Session, known: _Known, receipt: Receipt, now: datetime, *, held: bool) -> Study:
    study = known.studies.get(receipt.study_uid)
    if study is None:
        study = Study(
            study_uid=receipt.study_uid,
            state=StudyState.COMPLETE,
            revision=0,
            dispatched_revision=0,
            first_received_at=receipt.received_at,
            calling_ae=receipt.calling_ae,
            held=False,
            patient_mismatch=False,
            instances=0,
            size_bytes=0,
        )
        session.add(study)
        session.flush()  # for its number
        known.studies[study.study_uid] = study
    if held and not study.held:
        study.held = True
        audit.append(session, AuditKind.STUDY_HELD, now=now, actor=ACTOR, study_id=study.id, why="rebuilt from spool")
    return study


def _open(session: Session, known: _Known, study: Study, header: _Header, receipt: Receipt, now: datetime) -> None:
    """An image instance: compare its patient with the study's, open the study, move its clock."""
    present = known.headers.get(study.id)
    if present is None:
        present = known.headers[study.id] = _study_header(study.id, header.content, salt=secrets.token_hex(16))
        session.add(present)
    elif are_different(_patient(present), arrived := header.patient):
        if not study.patient_mismatch:
            study.patient_mismatch = True
            audit.append(session, AuditKind.PATIENT_MISMATCH, now=now, actor=ACTOR, study_id=study.id)
            log.error("patient_mismatch", study_id=study.id, remedy="correct the study at its source and send it again")
    elif _fill_in(present, arrived):
        audit.append(
            session,
            AuditKind.STUDY_HEADER_FILLED,
            now=now,
            actor=ACTOR,
            study_id=study.id,
            vouches_sha256=vouch_for_header(present),
        )
    if study.state is not StudyState.RECEIVING:
        transitions.open_study(session, study, now=now, actor=ACTOR, vouches_sha256=vouch_for_header(present))
        log.info("study_opened", study_id=study.id, revision=study.revision, calling_ae=receipt.calling_ae)
    if study.last_image_at is None or receipt.received_at > study.last_image_at:
        study.last_image_at = receipt.received_at
        study.calling_ae = receipt.calling_ae


def _fill_in(present: StudyHeader, arrived: Patient) -> bool:
    """Let a later instance say who the patient is where earlier ones were silent; whether anything was filled in.

    Else two instances that each contradict only the other would both agree with the silent first one.
    """
    filled = False
    for column, value in zip(
        IDENTITY, (arrived.patient_id, arrived.issuer, arrived.name, arrived.birth_date), strict=True
    ):
        if value and not getattr(present, column):
            setattr(present, column, value)
            filled = True
    return filled


def vouch_for_header(header: StudyHeader) -> str:
    """The salted digest an audit event keeps of an erasable header; erase the salt and it says nothing."""
    content = {
        column.key: getattr(header, column.key) for column in header.__mapper__.column_attrs if column.key != "salt"
    }
    return digest(f"{header.salt}\n{json.dumps(content, sort_keys=True, ensure_ascii=True)}".encode())


def _study_header(study_id: int, header: Dataset, *, salt: str) -> StudyHeader:
    return StudyHeader(
        study_id=study_id,
        salt=salt,
        patient_id=_text(header, "PatientID"),
        issuer_of_patient_id=_text(header, "IssuerOfPatientID"),
        patient_name=_text(header, "PatientName"),
        patient_birth_date=_text(header, "PatientBirthDate"),
        patient_sex=_text(header, "PatientSex"),
        accession_number=_text(header, "AccessionNumber"),
        study_date=_text(header, "StudyDate"),
        study_description=_text(header, "StudyDescription"),
    )


def _patient(header: StudyHeader) -> Patient:
    return Patient(header.patient_id, header.issuer_of_patient_id, header.patient_name, header.patient_birth_date)


def _patient_of(header: Dataset) -> Patient:
    return Patient(
        _text(header, "PatientID"),
        _text(header, "IssuerOfPatientID"),
        _text(header, "PatientName"),
        _text(header, "PatientBirthDate"),
    )


def _is_from_own_device(session: Session, devices: Sequence[str]) -> bool:
    """One of our results came back under another UID: the device that says it contributed is one of ours."""
    if not devices:
        return False
    return session.scalar(select(Result.id).where(Result.device_uid.in_(devices)).limit(1)) is not None


def _devices(header: Dataset) -> list[str]:
    """The Device UIDs of the contributing equipment; none where that cannot be read."""
    try:
        found = [str(item.get("DeviceUID", "")) for item in header.get("ContributingEquipmentSequence") or ()]
    except Exception as error:  # noqa: BLE001  # a sender may write anything under this tag
        log.warning("attribute_unreadable", keyword="ContributingEquipmentSequence", error=type(error).__name__)
        return []
    return [uid for uid in found if uid][:MAX_DEVICES]


@dataclass(frozen=True, slots=True)
class _Header:
    """What ingest looks at of an instance."""

    content: Dataset
    patient: Patient
    devices: Sequence[str]  # UIDs of those that say they contributed
    has_rows: bool


def _header(path: Path, transfer_syntax_uid: str, read: dict[tuple[object, ...], _Header]) -> _Header:
    """Decoded once for all instances in which the same bytes stand, most of a series; goes into `read` for that."""
    walked = walk_elements(first_bytes(path, PREFIX_BYTES), transfer_syntax_uid, HEADER_TAGS)
    encoded = None if walked is None else (transfer_syntax_uid, *walked.items())
    if encoded in read:
        return read[encoded]
    content = _read(path, transfer_syntax_uid)
    header = _Header(content, _patient_of(content), _devices(content), "Rows" in content)
    if encoded is not None:
        read[encoded] = header
    return header


def _read(path: Path, transfer_syntax_uid: str) -> Dataset:
    """The attributes of HEADER; empty when unreadable, for the instance was acknowledged all the same."""
    try:
        if transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
            return dcmread(path, specific_tags=list(HEADER), stop_before_pixels=True, force=True)
        with open_data_set(path) as stream:  # what its file meta information says, the receipt says too
            return read_elements(stream, transfer_syntax_uid, HEADER_TAGS)
    except Exception as error:  # noqa: BLE001  # pydicom raises whatever a broken header makes it raise
        log.warning("header_unreadable", file=path.name, error=explain_exception(error))
        return Dataset()


def _text(header: Dataset, keyword: str) -> str:
    """The value as a database can keep it: without NUL, and what no encoding can write as a question mark."""
    try:
        value = header.get(keyword)
        text = "" if value is None else str(value)
    except Exception as error:  # noqa: BLE001  # a value that breaks its VR; the text would quote it
        log.warning("attribute_unreadable", keyword=keyword, error=type(error).__name__)
        return ""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "").strip()


def _readable(sessions: sessionmaker[Session], spool: Spool, path: Path) -> Receipt | None:
    """The receipt, or None when it cannot be used: then it is set aside, logged and audited."""
    try:
        receipt = spool.read(path)
        if path.suffix == ".json" and not (spool.path / receipt.path).is_file():
            raise ReceiptError(f"{path.name}: the instance it names is not in the spool")
    except ReceiptError as error:
        _set_aside(sessions, spool, path, str(error))
        return None
    return receipt


def _set_aside(sessions: sessionmaker[Session], spool: Spool, path: Path, reason: str) -> None:
    with sessions.begin() as session:  # first, so that a database that is away loses no event
        audit.append(session, AuditKind.RECEIPT_UNUSABLE, now=datetime.now(UTC), actor=ACTOR, file=path.name)
    aside = spool.set_aside(path)
    log.error("receipt_unusable", file=str(aside), reason=reason)


@contextmanager
def _only_one(spool: Path, stop: Event) -> Iterator[None]:
    """Wait until no other ingest works on this spool, or until `stop`: two would judge studies on half of what came."""
    descriptor = os.open(spool / "ingest.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while not stop.is_set():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                stop.wait(LOCK_WAIT_S)
        yield
    finally:
        os.close(descriptor)


def _batches(paths: Iterable[Path]) -> Iterator[list[Path]]:
    remaining = iter(paths)
    while batch := list(islice(remaining, BATCH)):
        yield batch
