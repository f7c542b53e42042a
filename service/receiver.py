"""Association -> C-ECHO, C-STORE -> DIMSE status. Who may send, what a status means, and when it may be Success.

Decides and writes files through the spool; the transport is the acceptor's. No database, no queue.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from functools import lru_cache
from io import BytesIO
from threading import Event, Lock, Thread

import structlog
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import ALL_TRANSFER_SYNTAXES
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from service import commitment_answers, commitment_requests
from service.acceptor import (
    Acceptor,
    ActionRequest,
    EventReport,
    Interrupted,
    Limits,
    Listener,
    Peer,
    Refusal,
    StoreRequest,
)
from service.certificates import server_context
from service.commitment_answers import PUSH_MODEL, PUSH_MODEL_INSTANCE
from service.crowd import Crowd
from service.instance_header import PREFIX_BYTES, Header, Unreadable, read_header, walk_header
from service.refusals import Refusals, Refused
from service.shared.log import explain_exception
from service.shared.settings import ScpSettings, SourceSettings
from service.spool import (
    HEARTBEAT_STALE_S,
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    Arrival,
    Draft,
    NoSpace,
    OpenAssociation,
    Spool,
    key,
)

HEARTBEAT_S = HEARTBEAT_STALE_S / 3
CLAIM_PATIENCE_S = 2.0

# Their pixel data lies on another server or in another stream: what is stored would not be the instance.
_NOT_IN_THE_OBJECT = re.compile(r"1\.2\.840\.10008\.1\.2\.(4\.(94|95|204|205)|7\..*)")
TRANSFER_SYNTAXES = frozenset(uid for uid in ALL_TRANSFER_SYNTAXES if not _NOT_IN_THE_OBJECT.fullmatch(uid))

# Of the information of an N-ACTION or N-EVENT-REPORT, which is read here and not stored.
READABLE_WHOLE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)

# Components with leading zeros occur in the field and do no harm; anything else that is no UID is refused.
_UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*")

log = structlog.get_logger(__name__)


class Status(IntEnum):
    """The statuses of our C-STORE answers (PS3.4 table B.2-1)."""

    SUCCESS = 0x0000  # instance and receipt are durable
    OUT_OF_RESOURCES = 0xA700  # no space, or the disk failed; send again later
    DOES_NOT_MATCH = 0xA900  # the data set is not what the command announced
    NOT_HERE = 0x0122  # it came in a presentation context of another service (PS3.7 9.1.1.1.9)
    CANNOT_UNDERSTAND = 0xC000  # a UID is missing or malformed
    UNREADABLE = 0xC210  # nothing in it can be read as a data set


@dataclass(frozen=True, slots=True)
class Verdict:
    status: Status
    reason: str = ""  # for the log: names attributes, never values


def judge(affected_sop_class_uid: str | None, affected_sop_instance_uid: str | None, header: Header) -> Verdict:
    """Whether the data set is what the command announced, and can be told from every other instance."""
    if not affected_sop_class_uid or not affected_sop_instance_uid:
        return Verdict(Status.CANNOT_UNDERSTAND, "the command lacks an Affected SOP Class or Instance UID")
    for name in ("sop_class_uid", "sop_instance_uid", "study_uid", "series_uid"):
        uid = getattr(header, name)
        if not uid:
            return Verdict(Status.CANNOT_UNDERSTAND, f"the data set has no {name}")
        if not _UID.fullmatch(uid):
            return Verdict(Status.CANNOT_UNDERSTAND, f"the {name} of the data set is not a UID")
    if affected_sop_class_uid.strip(" \0") != header.sop_class_uid:
        return Verdict(Status.DOES_NOT_MATCH, "Affected SOP Class UID and data set differ")
    if affected_sop_instance_uid.strip(" \0") != header.sop_instance_uid:
        return Verdict(Status.DOES_NOT_MATCH, "Affected SOP Instance UID and data set differ")
    return Verdict(Status.SUCCESS)


@lru_cache(1024)
def is_storage(abstract_syntax: UID) -> bool:
    """Every storage class, current, retired, private or newer than our dictionary; no other service."""
    if abstract_syntax.name == abstract_syntax:  # not in the dictionary
        return True
    return (
        abstract_syntax.type == "SOP Class"
        and "Storage" in abstract_syntax.name
        and "Commitment" not in abstract_syntax.name
        and "Directory" not in abstract_syntax.name
    )


def acceptable(proposed: Iterable[UID]) -> list[UID]:
    """Of the proposed transfer syntaxes, those we store as they are, best first.

    Explicit VR Little Endian, so that nobody compresses with loss for us; then what the sender has, in its
    order, so that it need not transcode; Implicit VR last, because it loses the VRs of private elements.
    """
    offered = [uid for uid in dict.fromkeys(proposed) if uid in TRANSFER_SYNTAXES]
    rank = {
        ExplicitVRLittleEndian: 0,
        DeflatedExplicitVRLittleEndian: 2,
        ExplicitVRBigEndian: 3,
        ImplicitVRLittleEndian: 4,
    }
    return sorted(offered, key=lambda uid: rank.get(uid, 1))


@dataclass(frozen=True, slots=True)
class Denial:
    """Why an association is refused, and the configuration that would let it in."""

    refusal: Refusal
    reason: str
    remedy: str


def deny(
    peer: Peer,
    scp: ScpSettings,
    sources: Sequence[SourceSettings],
    addresses_of: Callable[[str], frozenset[str]],
) -> Denial | None:
    """Why this peer may not associate; None when it may (PS3.8 9.3.4).

    addresses_of gives the addresses of a host name as text, none when it cannot be resolved.
    """
    if peer.called_ae != scp.ae_title:
        remedy = f'[scp] ae_title = "{peer.called_ae}" here, or call "{scp.ae_title}" there'
        return Denial(Refusal(1, 1, 7), "called AE title is not ours", remedy)
    known = [source for source in sources if source.ae_title == peer.calling_ae]
    if not known and not scp.accept_unknown_sources:
        remedy = f'[[source]] ae_title = "{peer.calling_ae}", or [scp] accept_unknown_sources = true'
        return Denial(Refusal(1, 1, 3), "calling AE title is not a source", remedy)
    if known and not any(_is_from(peer.address, source.host, addresses_of) for source in known):
        remedy = f'[[source]] ae_title = "{peer.calling_ae}", host = "{peer.address}"'
        return Denial(Refusal(1, 1, 3), "calling AE title comes from another host than its [[source]]", remedy)
    return None


def deny_crowd(scp: ScpSettings, open_associations: int, of_this_address: int = 0) -> Denial | None:
    """Why no further association is accepted right now; the sender may try again."""
    if open_associations >= scp.max_associations:
        remedy = f"[scp] max_associations above {scp.max_associations}"
        return Denial(Refusal(2, 3, 2), "as many associations as allowed are open", remedy)
    if of_this_address >= scp.max_associations_per_address:
        remedy = f"[scp] max_associations_per_address above {scp.max_associations_per_address}"
        return Denial(Refusal(2, 3, 2), "as many associations as allowed are open from this address", remedy)
    return None


def _is_from(address: str, host: str | None, addresses_of: Callable[[str], frozenset[str]]) -> bool:
    if host is None:
        return True
    caller = _plain(address)
    try:
        return ipaddress.ip_address(caller) in ipaddress.ip_network(host, strict=False)
    except ValueError:  # a name
        return caller in {_plain(resolved) for resolved in addresses_of(host)}


def _plain(address: str) -> str:
    """An IPv4 address that came through an IPv6 socket, as IPv4; no zone."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def resolve(host: str) -> frozenset[str]:
    """The addresses of a host name; none when it cannot be resolved."""
    try:
        return frozenset(str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except OSError:
        return frozenset()


def tls_context(scp: ScpSettings) -> ssl.SSLContext | None:
    """For the TLS port; None without one. CertificateError names the file and the remedy."""
    if scp.tls_port is None or scp.tls_certificate is None or scp.tls_key is None:
        return None
    return server_context(scp.tls_certificate, scp.tls_key, ca=scp.tls_ca, minimum=scp.tls_minimum)


def listeners(scp: ScpSettings, tls: ssl.SSLContext | None) -> list[Listener]:
    """What is listened on; OSError when a port cannot be bound."""
    opened = []
    try:
        if scp.port != 0 or tls is None:
            opened.append(Listener(scp.host, scp.port, None))
        if scp.tls_port is not None and tls is not None:
            opened.append(Listener(scp.host, scp.tls_port, tls))
    except OSError:
        for listener in opened:
            listener.transport.close()
        raise
    return opened


def _limits(scp: ScpSettings) -> Limits:
    return Limits(
        idle_timeout_s=scp.idle_timeout_s,
        pdu_timeout_s=scp.pdu_timeout_s or scp.idle_timeout_s,
        max_associate_bytes=scp.max_associate_bytes,
        max_pdu_bytes=scp.max_pdu_bytes,
        max_command_bytes=scp.max_command_bytes,
        max_data_set_bytes=int(scp.max_data_set_gb * 1e9),
        max_unassociated=-(-scp.max_unassociated // scp.processes),
    )


def _data_set(content: bytes, transfer_syntax_uid: str) -> Dataset:
    """What came whole: the information of an N-EVENT-REPORT or N-ACTION. Raises whatever the bytes lead pydicom to."""
    syntax = UID(transfer_syntax_uid)
    return read_dataset(BytesIO(content), syntax.is_implicit_VR, syntax.is_little_endian)


def _take(request: StoreRequest, draft: Draft) -> Header:
    """Write the data set as it comes, and say what it is."""
    prefix = b""
    for fragment in request.data_set:
        if len(prefix) < PREFIX_BYTES:
            prefix += fragment[: PREFIX_BYTES - len(prefix)]
        draft.write(fragment)
    header = walk_header(prefix, request.transfer_syntax_uid)
    if header is None:
        with draft.open_data_set() as written:
            header = read_header(written, request.transfer_syntax_uid)
    return header


@dataclass(slots=True)
class _Tally:
    """What an open association has brought so far. Touched by its own thread, read by the heartbeat's."""

    is_source: bool  # else it may answer to storage commitment, and do no more
    stored: int = 0
    refused: int = 0
    size_bytes: int = 0
    study_keys: list[str] = field(default_factory=list)


class Receiver:
    """The Storage, Verification and Storage Commitment SCP. Writes to the spool, and to nothing else."""

    def __init__(
        self,
        scp: ScpSettings,
        sources: tuple[SourceSettings, ...],
        spool: Spool,
        *,
        vouching: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        """vouching: of each destination that is asked for storage commitment, its AE title and ours as it knows us; it
        may call us to answer, also where it is no source."""
        self._scp = scp
        self._sources = sources
        self._spool = spool
        self._vouching = vouching
        self._refusals = Refusals(spool.path)
        self._crowd = Crowd(scp.max_associations)
        self._listeners: list[Listener] = []
        self._acceptor: Acceptor | None = None
        self._open: dict[str, _Tally] = {}  # by association id
        self._lock = Lock()
        self._stop_asked = False
        self._stopped = Event()
        self._heart = Thread(target=self._keep_heartbeats_fresh, name="heartbeats", daemon=True)

    @property
    def port(self) -> int:
        """The bound port without TLS; the one with TLS where there is no other."""
        return min(self._listeners, key=lambda listener: listener.tls is not None).port

    def listen(self) -> None:
        """Recover the spool, and take the ports; nothing is accepted, and no thread runs, before `start`.

        OSError when a port cannot be bound, SpoolInUse beside another receiver, CertificateError for TLS files.
        """
        tls = tls_context(self._scp)
        self._spool.claim(CLAIM_PATIENCE_S)
        try:
            found = self._spool.recover()
            self._listeners = listeners(self._scp, tls)
        except BaseException:
            self._spool.release()
            raise
        if found.unfinished or found.adopted:
            log.warning("spool_recovered", unfinished=found.unfinished, adopted=found.adopted)
        if not self._sources and not self._scp.accept_unknown_sources:
            log.warning(
                "every_sender_is_refused",
                reason="there is no [[source]]",
                remedy='[[source]] ae_title = "THE SENDER\'S AE TITLE", or [scp] accept_unknown_sources = true',
            )
        for listener in self._listeners:
            names = {"ae_title": self._scp.ae_title, "host": self._scp.host, "port": listener.port}
            log.info("receiver_listens", **names, tls=listener.tls is not None)

    def start(self) -> None:
        """Accept associations, beside the copies of this process that do the same; `listen` was before."""
        self._spool.make_ahead()
        self._acceptor = Acceptor(
            self._listeners,
            limits=_limits(self._scp),
            implementation=(IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME),
            service=self,
        )
        self._heart.start()
        self._acceptor.start()

    def stop(self, grace_s: float) -> None:
        """Take no new association, let open ones finish for `grace_s` seconds, abort what is left."""
        with self._lock:
            if self._acceptor is None or self._stop_asked:
                return
            self._stop_asked = True
        log.info("receiver_stops", open_associations=len(self._open), grace_s=grace_s)
        aborted = self._acceptor.stop(grace_s)
        self._stopped.set()
        self._heart.join()
        self._refusals.flush(datetime.now(UTC), at_least_s=0)
        self._spool.release()
        log.info("receiver_stopped", aborted=aborted)

    # --- what the acceptor asks ---

    def admit(self, peer: Peer) -> Refusal | None:
        denial = deny(peer, self._scp, self._sources, resolve)
        is_source = denial is None
        if (peer.calling_ae, peer.called_ae) in self._vouching:
            denial = None
        with self._crowd.counted(peer.address) as counted:
            denial = denial or deny_crowd(self._scp, counted.associations, counted.of_this_address)
            if denial is None:
                self._crowd.enter(peer.address)
                with self._lock:
                    self._open[peer.association_id] = _Tally(is_source)
        names = {"calling_ae": peer.calling_ae, "called_ae": peer.called_ae, "address": peer.address}
        if denial is not None:
            log.warning("association_refused", **names, reason=denial.reason, remedy=denial.remedy)
            self._record(peer.address, peer, denial.reason, denial.remedy)
            return denial.refusal
        if peer.secured:
            names["certificate_name"] = peer.certificate_name
        log.info("association_opened", **names, association_id=peer.association_id, tls=peer.secured)
        return None

    def transfer_syntaxes(self, abstract_syntax: UID, proposed: Sequence[UID]) -> list[UID]:
        if abstract_syntax == PUSH_MODEL:
            return [uid for uid in acceptable(proposed) if uid in READABLE_WHOLE] or [ExplicitVRLittleEndian]
        if abstract_syntax == Verification or is_storage(abstract_syntax):
            # where nothing fits, one that was not proposed: the answer then blames the syntaxes, not the class
            return acceptable(proposed) or [ExplicitVRLittleEndian]
        return []

    def may(self, peer: Peer, abstract_syntax: UID, as_provider: bool) -> bool:
        """Storage from sources, and where it is on storage commitment too; that also from whom we ask for it, which
        then calls as its provider."""
        is_source = self._open[peer.association_id].is_source
        if abstract_syntax == PUSH_MODEL:
            if as_provider:
                return (peer.calling_ae, peer.called_ae) in self._vouching
            return self._scp.storage_commitment and is_source
        return not as_provider and (abstract_syntax == Verification or is_source)

    def event_report(self, peer: Peer, report: EventReport) -> int:
        """Keep an answer to storage commitment for delivery.

        0x0000 only when it is durable · 0x0115 it is no such answer · 0x0213 it cannot be kept
        """
        names = {"calling_ae": peer.calling_ae, "association_id": peer.association_id}
        if report.affected_sop_class_uid != PUSH_MODEL:
            log.warning("event_report_refused", **names, reason="not of the Storage Commitment Push Model")
            return 0x0118  # no such SOP class
        try:
            dataset = _data_set(report.event_information, report.transfer_syntax_uid)
            answer = commitment_answers.decode(dataset, peer.calling_ae)
        except commitment_answers.BadAnswer as error:
            log.warning("event_report_refused", **names, reason=str(error))
            return 0x0115  # invalid argument value
        except Exception as error:  # noqa: BLE001  # what hostile bytes lead the library to, OSError among it
            log.warning("event_report_refused", **names, reason=explain_exception(error))
            return 0x0115
        try:
            commitment_answers.keep(self._spool.path, answer)
        except OSError as error:
            log.error("event_report_refused", **names, reason=f"it cannot be kept: {error.strerror}")
            return 0x0213  # resource limitation; the destination reports again
        log.info("commitment_answered", **names, committed=len(answer.committed), failed=len(answer.failed))
        return 0x0000

    def action(self, peer: Peer, request: ActionRequest) -> int:
        """Keep a request for storage commitment; what we vouch for is told on an association of our own.

        0x0000 only when it is durable · 0x0112, 0x0118, 0x0123 it asks for something else · 0x0115 it is malformed
        0x0124 nobody could be told · 0x0213 it cannot be kept
        """
        names = {"calling_ae": peer.calling_ae, "association_id": peer.association_id}
        if request.requested_sop_class_uid != PUSH_MODEL:
            log.warning("commitment_refused", **names, reason="not of the Storage Commitment Push Model")
            return 0x0118  # no such SOP class
        if request.requested_sop_instance_uid != PUSH_MODEL_INSTANCE:
            log.warning("commitment_refused", **names, reason="not of its well-known SOP Instance")
            return 0x0112  # no such SOP instance
        if request.action_type != commitment_requests.REQUEST_STORAGE_COMMITMENT:
            log.warning("commitment_refused", **names, reason="an unknown Action Type ID")
            return 0x0123  # no such action
        if not any(one.ae_title == peer.calling_ae and one.commitment_port for one in self._sources):
            reason = "storage commitment is asked for, and there is no address to answer to"
            remedy = f'[[source]] ae_title = "{peer.calling_ae}", commitment_port = the port that it listens on'
            log.warning("commitment_refused", **names, address=peer.address, reason=reason, remedy=remedy)
            self._record(peer.address, peer, reason, remedy)
            return 0x0124  # not authorised
        try:
            dataset = _data_set(request.action_information, request.transfer_syntax_uid)
            transaction_uid, references = commitment_requests.decode(dataset)
            kept = commitment_requests.Request(
                transaction_uid=transaction_uid,
                references=references,
                calling_ae=peer.calling_ae,
                called_ae=peer.called_ae,
                address=peer.address,
                association_id=peer.association_id,
                requested_at=datetime.now(UTC),
            )
        except commitment_requests.BadRequest as error:
            log.warning("commitment_refused", **names, reason=str(error))
            return 0x0115  # invalid argument value
        except Exception as error:  # noqa: BLE001  # what hostile bytes lead the library to, OSError among it
            log.warning("commitment_refused", **names, reason=explain_exception(error))
            return 0x0115
        try:
            commitment_requests.keep_request(self._spool.path, kept)
        except OSError as error:
            log.error("commitment_refused", **names, reason=f"it cannot be kept: {error.strerror}")
            return 0x0213  # resource limitation
        log.info("commitment_requested", **names, instances=len(references))
        return 0x0000

    def store(self, peer: Peer, request: StoreRequest) -> int:
        """Answer one C-STORE.

        0x0000 only when instance and receipt are durable · 0xA700 no space or a fault of the disk
        0xA900 not what the command announced · 0xC000 UIDs missing or malformed · 0xC210 cannot be read
        0x0122 in a presentation context of another service
        """
        tally = self._open[peer.association_id]
        try:
            verdict = self._store(peer, request, tally)
        except Interrupted:
            raise
        except Unreadable as error:
            verdict = Verdict(Status.UNREADABLE, f"cannot be read: {error}")
        except NoSpace:
            verdict = Verdict(Status.OUT_OF_RESOURCES, "no space: below [spool] min_free_gb, or the disk is full")
            remedy = "free space on the spool's disk, or [spool] min_free_gb below what it is"
            self._record(peer.address, peer, verdict.reason, remedy)
        except OSError as error:
            verdict = Verdict(Status.OUT_OF_RESOURCES, f"the spool cannot be written: {error.strerror}")
        except Exception as error:  # noqa: BLE001  whatever it was, it is not stored and must be answered
            verdict = Verdict(Status.OUT_OF_RESOURCES, explain_exception(error))
        if verdict.status is not Status.SUCCESS:
            tally.refused += 1
            log.warning(
                "instance_refused",
                calling_ae=peer.calling_ae,
                address=peer.address,
                association_id=peer.association_id,
                status=f"0x{verdict.status:04X}",
                reason=verdict.reason,
            )
        return int(verdict.status)

    def dropped(self, address: str, peer: Peer | None, reason: str, remedy: str) -> None:
        calling_ae = peer.calling_ae if peer else ""
        log.warning("connection_dropped", address=address, calling_ae=calling_ae, reason=reason, remedy=remedy)
        if remedy:  # a limit or the configuration; what breaks a rule is the sender's to mend
            self._record(address, peer, reason, remedy)

    def closed(self, peer: Peer, released: bool) -> None:
        with self._lock:
            tally = self._open.pop(peer.association_id)
        self._crowd.leave(peer.address)
        self._spool.close_association(peer.association_id)
        log.info(
            "association_closed",
            calling_ae=peer.calling_ae,
            association_id=peer.association_id,
            released=released,
            stored=tally.stored,
            refused=tally.refused,
            size_bytes=tally.size_bytes,
            studies=len(tally.study_keys),
        )

    # --- inside ---

    def _record(self, address: str, peer: Peer | None, reason: str, remedy: str) -> None:
        calling_ae, called_ae = (peer.calling_ae, peer.called_ae) if peer else ("", "")
        self._refusals.record(Refused(datetime.now(UTC), calling_ae, called_ae, address, reason, remedy))

    def _store(self, peer: Peer, request: StoreRequest, tally: _Tally) -> Verdict:
        if not is_storage(UID(request.abstract_syntax_uid)):  # nobody who may not store has a context of storage
            return Verdict(Status.NOT_HERE, "a C-STORE in a presentation context that is not one of storage")
        announced = request.affected_sop_class_uid or "", request.affected_sop_instance_uid or ""
        if not all(_UID.fullmatch(uid) for uid in announced):
            return Verdict(Status.CANNOT_UNDERSTAND, "an affected UID of the command is missing or is not a UID")
        draft = self._spool.begin(
            sop_class_uid=announced[0],
            sop_instance_uid=announced[1],
            transfer_syntax_uid=request.transfer_syntax_uid,
        )
        try:
            header = _take(request, draft)
            verdict = judge(*announced, header)
            if verdict.status is not Status.SUCCESS:
                return verdict
            study_key = key(header.study_uid)
            if study_key not in tally.study_keys:
                self._beat(peer, (*tally.study_keys, study_key))
                tally.study_keys.append(study_key)
            receipt = self._spool.keep(
                draft,
                Arrival(
                    study_uid=header.study_uid,
                    series_uid=header.series_uid,
                    sop_class_uid=header.sop_class_uid,
                    sop_instance_uid=header.sop_instance_uid,
                    transfer_syntax_uid=request.transfer_syntax_uid,
                    modality=header.modality,
                    calling_ae=peer.calling_ae,
                    called_ae=peer.called_ae,
                    peer_address=peer.address,
                    association_id=peer.association_id,
                ),
                datetime.now(UTC),
            )
        finally:
            draft.discard()
        tally.stored += 1
        tally.size_bytes += receipt.size_bytes
        log.debug(
            "instance_stored",
            calling_ae=peer.calling_ae,
            study_key=study_key,
            size_bytes=receipt.size_bytes,
        )
        return verdict

    def _beat(self, peer: Peer, study_keys: tuple[str, ...]) -> None:
        self._spool.beat(
            OpenAssociation(
                association_id=peer.association_id,
                calling_ae=peer.calling_ae,
                called_ae=peer.called_ae,
                peer_address=peer.address,
                opened_at=peer.opened_at,
                study_keys=study_keys,
            )
        )

    def _keep_heartbeats_fresh(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            self._refusals.flush(datetime.now(UTC))
            with self._lock:
                opened = list(self._open)
            for association_id in opened:
                try:
                    self._spool.touch_association(association_id)
                except OSError as error:
                    log.warning("heartbeat_failed", association_id=association_id, error=type(error).__name__)
