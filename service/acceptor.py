"""Associations over TCP, one thread each: negotiation, C-ECHO, and C-STORE handed on while it arrives.

It asks its `Service` who may associate and what status a C-STORE gets; it knows nothing of files or settings.
A-ASSOCIATE PDUs are pynetdicom's. Memory is bounded by the limits, whatever peers claim or send: a thread has
one buffer of two PDUs, a command set, and what the service keeps.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Event, Lock, Thread
from typing import Protocol, cast

import structlog
from pydicom.uid import UID
from pynetdicom import _config
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.presentation import PresentationContext

from service.certificates import common_name
from service.command_set import Command, CommandField, Malformed, decode_command, encode_answer
from service.shared.log import explain_exception
from service.upper_layer import RELEASE_REPLY, AbortReason, Connection, Ended, NoTls, Pdv, Violation, p_data

APPLICATION_CONTEXT_NAME = UID("1.2.840.10008.3.1.1.1")
BACKLOG = 128
CLOSING_S = 2.0  # for an aborted association to end by itself
NO_DESCRIPTORS_PAUSE_S = 0.1  # before the next connection is tried when none could be had
MAX_INFORMATION_BYTES = 1 << 21  # of an N-EVENT-REPORT or N-ACTION; ten thousand references
REMEMBERED_CONTEXTS = 4096  # proposals whose answer is known

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may claim, send, or make us wait for."""

    idle_timeout_s: float  # silence on an association, or before one is asked for
    pdu_timeout_s: float  # from the first byte of a PDU to its last
    max_associate_bytes: int
    max_pdu_bytes: int
    max_command_bytes: int
    max_data_set_bytes: int
    max_unassociated: int  # connections without an association; the oldest makes room for the next


@dataclass(frozen=True, slots=True)
class Peer:
    """One association, from the request on."""

    association_id: str
    calling_ae: str
    called_ae: str
    address: str
    opened_at: datetime
    secured: bool = False  # by TLS
    certificate_name: str = ""  # the CN that it showed, where it had to show one


@dataclass(frozen=True, slots=True)
class Refusal:
    """The three numbers of an A-ASSOCIATE-RJ (PS3.8 table 9-21)."""

    result: int  # 1 permanent, 2 transient
    source: int  # 1 service user, 2 ACSE, 3 presentation
    reason: int


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """One C-STORE-RQ. UIDs are None where the command had none.

    abstract_syntax_uid: of the presentation context that it came in.
    """

    abstract_syntax_uid: str
    affected_sop_class_uid: str | None
    affected_sop_instance_uid: str | None
    transfer_syntax_uid: str
    data_set: Iterator[memoryview]
    """As it arrives, encoded as received; a fragment is valid until the next one. May raise `Interrupted`."""


@dataclass(frozen=True, slots=True)
class EventReport:
    """One N-EVENT-REPORT-RQ of a provider that calls us, with its whole Event Information as it was encoded."""

    affected_sop_class_uid: str | None
    transfer_syntax_uid: str
    event_information: bytes


@dataclass(frozen=True, slots=True)
class ActionRequest:
    """One N-ACTION-RQ, with its whole Action Information as it was encoded."""

    requested_sop_class_uid: str | None
    requested_sop_instance_uid: str | None
    action_type: int | None
    transfer_syntax_uid: str
    action_information: bytes


class Interrupted(Exception):
    """The data set will not become whole: keep nothing of it, answer nothing, let this pass."""


class Service(Protocol):
    """What an acceptor asks of the part that decides. Called from the threads of the associations."""

    def admit(self, peer: Peer) -> Refusal | None:
        """Refuse the association, or let it be; every admitted peer is later reported `closed`."""
        ...

    def transfer_syntaxes(self, abstract_syntax: UID, proposed: Sequence[UID]) -> list[UID]:
        """What to accept of `proposed` for this class, best first; empty when the class is not served."""
        ...

    def may(self, peer: Peer, abstract_syntax: UID, as_provider: bool) -> bool:
        """Whether this peer is served this class. as_provider: it proposes to be the SCP of it (PS3.7 D.3.3.4)."""
        ...

    def event_report(self, peer: Peer, report: EventReport) -> int:
        """The status of an N-EVENT-REPORT; 0x0000 only for what is durable."""
        ...

    def action(self, peer: Peer, request: ActionRequest) -> int:
        """The status of an N-ACTION; 0x0000 only for what is durable."""
        ...

    def store(self, peer: Peer, request: StoreRequest) -> int:
        """The DIMSE status of the C-STORE; 0x0000 only for what is durable. What it leaves unread is dropped."""
        ...

    def dropped(self, address: str, peer: Peer | None, reason: str, remedy: str) -> None:
        """We ended a connection, before (peer is None) or after its association: who broke which rule or limit.

        remedy: the configuration that would have let it pass; empty where nothing would.
        """
        ...

    def closed(self, peer: Peer, released: bool) -> None:
        """The association is over; `released` is False when it was aborted or the connection was lost."""
        ...


class Acceptor:
    """Takes connections from its listeners, and runs every association in its own thread."""

    def __init__(
        self,
        listeners: Sequence[Listener],
        *,
        limits: Limits,
        implementation: tuple[str, str],
        service: Service,
    ) -> None:
        # the log handlers of pynetdicom format every PDU, and quote what is in it
        _config.LOG_HANDLER_LEVEL = "none"
        self.limits = limits
        self.implementation = implementation
        self.service = service
        self._stopping = Event()
        self._lock = Lock()
        self._counter = itertools.count()
        self._open: dict[str, _Association] = {}  # by association id, in order of connection
        self._unassociated: dict[str, _Association] = {}
        self._contexts: dict[tuple[str, ...], UID | int] = {}
        self._listeners = listeners
        self._threads = [
            Thread(target=self._accept, args=(listener,), name=f"acceptor:{listener.port}", daemon=True)
            for listener in self._listeners
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, grace_s: float) -> int:
        """Stop listening, let associations finish for `grace_s`, abort the rest and return how many those were."""
        self._stopping.set()
        for listener in self._listeners:
            with suppress(OSError):  # a copy of this process was first
                listener.transport.shutdown(socket.SHUT_RDWR)  # wakes accept()
        for thread in self._threads:
            thread.join()
        for listener in self._listeners:
            listener.transport.close()
        with self._lock:
            waiting = list(self._unassociated.values())
        for association in waiting:
            association.connection.hang_up()
        deadline = time.monotonic() + grace_s
        for association in self._associations():
            association.thread.join(max(0.0, deadline - time.monotonic()))
        late = [association for association in self._associations() if association.thread.is_alive()]
        for association in late:
            association.stop()
        deadline = time.monotonic() + CLOSING_S
        for association in late:
            association.thread.join(max(0.0, deadline - time.monotonic()))
            association.connection.hang_up()
        for association in late:
            association.thread.join(CLOSING_S)
        return len(late)

    # --- what its associations tell and ask ---

    def unassociated(self, association: _Association) -> None:
        """It holds a connection without an association; beyond the limit the oldest of these makes room."""
        with self._lock:
            self._unassociated[association.association_id] = association
            crowd = list(self._unassociated.values())[: -self.limits.max_unassociated]
        for oldest in crowd:
            limit = self.limits.max_unassociated
            reason = "another connection without an association took its place"
            self.service.dropped(oldest.address, None, reason, f"[scp] max_unassociated above {limit}")
            oldest.connection.hang_up()

    def associated(self, association: _Association) -> None:
        with self._lock:
            self._unassociated.pop(association.association_id, None)

    def disconnected(self, association: _Association) -> None:
        with self._lock:
            self._unassociated.pop(association.association_id, None)
            self._open.pop(association.association_id, None)

    def negotiate(self, proposed: PresentationContext) -> PresentationContext:
        """The answer to one proposed context (PS3.8 table 9-18), from memory where it was given before."""
        abstract_syntax, offered = cast(UID, proposed.abstract_syntax), proposed.transfer_syntax
        question = (abstract_syntax, *offered)
        chosen = self._contexts.get(question)
        if chosen is None:
            served = self.service.transfer_syntaxes(abstract_syntax, offered)
            fitting = [syntax for syntax in served if syntax in offered]
            chosen = fitting[0] if fitting else (4 if served else 3)  # transfer syntaxes, abstract syntax refused
            if len(self._contexts) < REMEMBERED_CONTEXTS:
                self._contexts[question] = chosen
        answer = PresentationContext()
        answer.context_id = proposed.context_id
        answer.abstract_syntax = abstract_syntax
        answer.transfer_syntax = [offered[0] if isinstance(chosen, int) else chosen]
        answer.result = chosen if isinstance(chosen, int) else 0
        return answer

    # --- inside ---

    def _accept(self, listener: Listener) -> None:
        while not self._stopping.is_set():
            try:
                transport, address = listener.transport.accept()
            except OSError as error:
                if error.errno == errno.EINVAL:  # it listens no longer, here or in a copy of this process
                    return
                if not self._stopping.is_set():
                    log.error("no_connection_taken", error=error.strerror)
                    self._stopping.wait(NO_DESCRIPTORS_PAUSE_S)
                continue
            try:
                self._begin(transport, str(address[0]), listener.tls)
            except (OSError, RuntimeError) as error:  # gone already, or no thread to be had
                log.error("connection_failed", address=str(address[0]), error=explain_exception(error))
                transport.close()

    def _begin(self, transport: socket.socket, address: str, tls: ssl.SSLContext | None) -> None:
        association_id = f"{time.time_ns():020d}-{os.getpid()}-{next(self._counter):06d}"
        association = _Association(self, transport, association_id, address, tls)
        with self._lock:
            self._open[association_id] = association
        self.unassociated(association)
        try:
            association.thread.start()
        except RuntimeError:
            self.disconnected(association)
            raise

    def _associations(self) -> list[_Association]:
        with self._lock:
            return list(self._open.values())


class Listener:
    """One port that is listened on, with TLS where `tls` is given. OSError when it cannot be bound."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self.tls = tls
        family, *_, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )[0]
        self.transport = socket.create_server(cast(tuple[str, int], address)[:2], family=family, backlog=BACKLOG)
        self.port = int(self.transport.getsockname()[1])


class _Association:
    """From the connection to its end, in a thread of its own."""

    def __init__(
        self,
        acceptor: Acceptor,
        transport: socket.socket,
        association_id: str,
        address: str,
        tls: ssl.SSLContext | None,
    ) -> None:
        limits = acceptor.limits
        self.association_id = association_id
        self.address = address
        self.connection = Connection(
            transport, idle_timeout_s=limits.idle_timeout_s, pdu_timeout_s=limits.pdu_timeout_s
        )
        self.thread = Thread(target=self._run, name=f"association:{association_id}", daemon=True)
        self._acceptor = acceptor
        self._service = acceptor.service
        self._limits = limits
        self._stopped = False
        self._tls = tls
        self._peer: Peer | None = None
        self._accepted: dict[int, tuple[str, str]] = {}  # presentation context id -> abstract, transfer syntax
        self._provided: set[int] = set()  # of these, where the peer is the provider alone
        self._peer_max_pdu_bytes = 0

    def stop(self) -> None:
        """Abort as soon as what is being stored has its answer."""
        self._stopped = True
        self.connection.stop_reading()

    def _run(self) -> None:
        try:
            self._associate()
        except NoTls as failure:
            self._service.dropped(self.address, None, str(failure), failure.remedy)
            self.connection.linger()
        except Violation as violation:
            self._service.dropped(self.address, self._peer, str(violation), violation.remedy)
            self._last_words(violation.reason)
        except Ended:
            if self._stopped:
                self._last_words(AbortReason.NOT_SPECIFIED)
        except Exception as error:  # noqa: BLE001  the top of an association's thread
            log.error("association_failed", address=self.address, error=explain_exception(error))
            self._last_words(AbortReason.NOT_SPECIFIED)
        finally:
            self.connection.close()
            self._acceptor.disconnected(self)

    def _last_words(self, reason: AbortReason) -> None:
        self._acceptor.unassociated(self)
        self.connection.abort(reason)
        self.connection.linger()

    def _associate(self) -> None:
        certificate = self.connection.secure(self._tls) if self._tls is not None else None
        request = _decoded(self.connection.read_request(self._limits.max_associate_bytes))
        self._acceptor.associated(self)
        peer = self._peer = Peer(
            association_id=self.association_id,
            calling_ae=request.calling_ae_title.strip(),
            called_ae=request.called_ae_title.strip(),
            address=self.address,
            opened_at=datetime.now(UTC),
            secured=self._tls is not None,
            certificate_name=common_name(certificate),
        )
        refusal = self._service.admit(peer)
        if refusal is not None:
            self._acceptor.unassociated(self)
            self.connection.send(_rejection(refusal))
            self.connection.linger()
            return
        released = False
        try:
            self.connection.send(self._acceptance(request, peer))
            self.connection.begin_data(self._limits.max_pdu_bytes)
            self._serve(peer)
            released = True
        finally:
            self._service.closed(peer, released)
        self._acceptor.unassociated(self)
        self.connection.send(RELEASE_REPLY)
        self.connection.linger()

    def _acceptance(self, request: A_ASSOCIATE, peer: Peer) -> bytes:
        answers = [self._acceptor.negotiate(context) for context in request.presentation_context_definition_list]
        proposed_roles, roles = _roles(request), {}
        for answer in answers:
            abstract_syntax, context_id = cast(UID, answer.abstract_syntax), cast(int, answer.context_id)
            as_user, as_provider = proposed_roles.get(abstract_syntax, (True, False))
            role = (
                as_user and self._service.may(peer, abstract_syntax, False),
                as_provider and self._service.may(peer, abstract_syntax, True),
            )
            if answer.result == 0 and not any(role):
                answer.result = 3  # abstract syntax not supported
            if answer.result == 0:
                self._accepted[context_id] = str(abstract_syntax), str(answer.transfer_syntax[0])
                if not role[0]:
                    self._provided.add(context_id)
                if as_provider:  # of who is a user only, nothing needs to be said
                    roles[abstract_syntax] = role
        self._peer_max_pdu_bytes = request.maximum_length_received or 0
        length = MaximumLengthNotification()
        length.maximum_length_received = self._limits.max_pdu_bytes
        implementation_class = ImplementationClassUIDNotification()
        implementation_class.implementation_class_uid = UID(self._acceptor.implementation[0])
        implementation_version = ImplementationVersionNameNotification()
        implementation_version.implementation_version_name = self._acceptor.implementation[1]
        primitive = A_ASSOCIATE()
        primitive.application_context_name = APPLICATION_CONTEXT_NAME
        primitive.calling_ae_title = request.calling_ae_title
        primitive.called_ae_title = request.called_ae_title
        primitive.result = 0x00
        primitive.result_source = 0x01
        primitive.presentation_context_definition_results_list = answers
        primitive.user_information = [
            length,
            implementation_class,
            implementation_version,
            *(_selected(uid, role) for uid, role in roles.items()),
        ]
        return bytes(A_ASSOCIATE_AC(primitive).encode())

    # --- messages ---

    def _serve(self, peer: Peer) -> None:
        """Answer requests one after the other, until the peer asks for the release."""
        pdvs = self.connection.pdvs()
        for first in pdvs:
            if self._stopped:
                raise Ended
            context_id = first.context_id
            if context_id not in self._accepted:
                raise Violation("a message in a presentation context that was not accepted")
            command = self._read_command(first, pdvs)
            if command.field == CommandField.C_STORE_RQ and command.has_data_set:
                status = self._store(peer, command, context_id, pdvs)
            elif command.field == CommandField.C_ECHO_RQ and not command.has_data_set:
                status = 0x0000
            elif command.field == CommandField.N_EVENT_REPORT_RQ and command.has_data_set:
                status = self._event_report(peer, command, context_id, pdvs)
            elif command.field == CommandField.N_ACTION_RQ and command.has_data_set:
                status = self._action(peer, command, context_id, pdvs)
            elif command.field == CommandField.C_CANCEL_RQ:
                continue
            else:
                raise Violation(f"a request that is not served here: command field 0x{command.field:04X}")
            self.connection.send(p_data(context_id, encode_answer(command, status), self._peer_max_pdu_bytes))

    def _read_command(self, first: Pdv, pdvs: Iterator[Pdv]) -> Command:
        content = b""
        for pdv in itertools.chain((first,), pdvs):
            if not pdv.is_command or pdv.context_id != first.context_id:
                raise Violation("a data set where a command was due")
            if len(content) + len(pdv.fragment) > self._limits.max_command_bytes:
                limit = self._limits.max_command_bytes
                message = f"a command set above [scp] max_command_bytes, {limit}"
                raise Violation(message, remedy=f"[scp] max_command_bytes above {limit}")
            content += pdv.fragment
            if pdv.is_last:
                try:
                    return decode_command(content)
                except Malformed as error:
                    raise Violation(f"a command set that cannot be answered: {error}") from error
        raise Violation("a release inside a message", AbortReason.UNEXPECTED_PDU)

    def _store(self, peer: Peer, command: Command, context_id: int, pdvs: Iterator[Pdv]) -> int:
        fragments = self._read_data_set(context_id, pdvs)
        abstract_syntax_uid, transfer_syntax_uid = self._accepted[context_id]
        request = StoreRequest(
            abstract_syntax_uid=abstract_syntax_uid,
            affected_sop_class_uid=command.affected_sop_class_uid,
            affected_sop_instance_uid=command.affected_sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
            data_set=fragments,
        )
        try:
            status = self._service.store(peer, request)
            for _ in fragments:  # what the service did not want
                pass
        except Interrupted as interrupted:
            raise cast(Ended, interrupted.__cause__) from None
        return status

    def _event_report(self, peer: Peer, command: Command, context_id: int, pdvs: Iterator[Pdv]) -> int:
        content = self._read_information(context_id, pdvs)
        report = EventReport(command.affected_sop_class_uid, self._accepted[context_id][1], content)
        return self._service.event_report(peer, report)

    def _action(self, peer: Peer, command: Command, context_id: int, pdvs: Iterator[Pdv]) -> int:
        request = ActionRequest(
            requested_sop_class_uid=command.affected_sop_class_uid,
            requested_sop_instance_uid=command.affected_sop_instance_uid,
            action_type=command.action_type,
            transfer_syntax_uid=self._accepted[context_id][1],
            action_information=self._read_information(context_id, pdvs),
        )
        if context_id in self._provided:
            return 0x0124  # not authorised: in this context it is the provider
        return self._service.action(peer, request)

    def _read_information(self, context_id: int, pdvs: Iterator[Pdv]) -> bytes:
        content = bytearray()
        try:
            for fragment in self._read_data_set(context_id, pdvs):
                if len(content) + len(fragment) > MAX_INFORMATION_BYTES:
                    raise Violation(f"event or action information above {MAX_INFORMATION_BYTES} bytes")
                content += fragment
        except Interrupted as interrupted:
            raise cast(Ended, interrupted.__cause__) from None
        return bytes(content)

    def _read_data_set(self, context_id: int, pdvs: Iterator[Pdv]) -> Iterator[memoryview]:
        try:
            size_bytes = 0
            for pdv in pdvs:
                if pdv.is_command or pdv.context_id != context_id:
                    raise Violation("a command where a data set was due")
                size_bytes += len(pdv.fragment)
                if size_bytes > self._limits.max_data_set_bytes:
                    limit = self._limits.max_data_set_bytes
                    message = f"a data set above [scp] max_data_set_gb, {limit} bytes"
                    raise Violation(message, remedy=f"[scp] max_data_set_gb above {limit / 1e9:g}")
                yield pdv.fragment
                if pdv.is_last:
                    return
            raise Violation("a release inside a message", AbortReason.UNEXPECTED_PDU)
        except Ended as ended:
            raise Interrupted from ended


def _decoded(content: bytes) -> A_ASSOCIATE:
    """The request; Violation for bytes that the library cannot read."""
    pdu = A_ASSOCIATE_RQ()
    try:
        pdu.decode(content)
        request = pdu.to_primitive()
        contexts = request.presentation_context_definition_list
        understood = bool(contexts) and pdu.protocol_version & 1
        whole = all(context.abstract_syntax and context.transfer_syntax for context in contexts)
    except Exception as error:  # noqa: BLE001  the library raises whatever the bytes lead it to
        raise Violation(f"an A-ASSOCIATE-RQ that cannot be read: {explain_exception(error)}") from None
    if not understood:
        raise Violation("an A-ASSOCIATE-RQ without a context, or of another version of the protocol")
    if not whole:
        raise Violation("a presentation context without an abstract syntax or without a transfer syntax")
    return request


def _roles(request: A_ASSOCIATE) -> dict[UID, tuple[bool, bool]]:
    """The classes of which the peer proposes to be user, provider or both; without a word it is the user."""
    return {
        cast(UID, item.sop_class_uid): (bool(item.scu_role or not item.scp_role), bool(item.scp_role))
        for item in request.user_information
        if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
    }


def _selected(uid: UID, role: tuple[bool, bool]) -> SCP_SCU_RoleSelectionNegotiation:
    item = SCP_SCU_RoleSelectionNegotiation()
    item.sop_class_uid = uid
    item.scu_role, item.scp_role = role
    return item


def _rejection(refusal: Refusal) -> bytes:
    primitive = A_ASSOCIATE()
    primitive.result = refusal.result
    primitive.result_source = refusal.source
    primitive.diagnostic = refusal.reason
    return bytes(A_ASSOCIATE_RJ(primitive).encode())
