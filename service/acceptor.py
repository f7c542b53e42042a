"""Associations over TCP: pynetdicom's server, cured of what lets a peer hold it or fill its memory.

It asks its `Service` who may associate and what status a C-STORE gets; it knows nothing of files or settings.
The cures reach into pynetdicom 3.0.4 (pinned in constraints.txt) and go with it when the transport is replaced:
stalls and endless messages end, every PDU is bounded before it is read, a C-STORE without UIDs is answered, and
contexts are built for what is proposed instead of copied for every class and syntax there is.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from threading import Lock, Thread
from typing import Any, Protocol, cast

import structlog
from pydicom.uid import UID
from pynetdicom import _config
from pynetdicom._globals import MODE_ACCEPTOR
from pynetdicom.acse import ACSE
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu import A_ABORT_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, P_DATA
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.transport import AddressInformation, AssociationServer, AssociationSocket, RequestHandler

from service.shared.log import explain_exception

MAX_ASSOCIATE_BYTES = 1 << 20  # one A-ASSOCIATE-RQ: 128 contexts with every transfer syntax take about 200 kB
MAX_COMMAND_BYTES = 1 << 16
MAX_DATA_SET_BYTES = 1 << 30  # held in memory until it is whole
MAX_QUEUED_MESSAGES = 2  # C-STOREs read ahead of their answers; beyond, the peer waits in TCP
MAX_UNASSOCIATED = 128  # connections that have not yet asked for an association; the oldest makes room
UNASSOCIATED_POLL_MS = 200
CLOSING_S = 2.0  # for an aborted association to end by itself

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """One association, from the request on."""

    association_id: str
    calling_ae: str
    called_ae: str
    address: str
    opened_at: datetime


@dataclass(frozen=True, slots=True)
class Refusal:
    """The three numbers of an A-ASSOCIATE-RJ (PS3.8 table 9-21)."""

    result: int  # 1 permanent, 2 transient
    source: int  # 1 service user, 2 ACSE, 3 presentation
    reason: int


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """One C-STORE-RQ, whole. UIDs are None where the command had none."""

    affected_sop_class_uid: str | None
    affected_sop_instance_uid: str | None
    transfer_syntax_uid: str
    data_set: BytesIO  # encoded as received, positioned anywhere


class Service(Protocol):
    """What an acceptor asks of the part that decides. Called from the threads of the associations."""

    def admit(self, peer: Peer) -> Refusal | None:
        """Refuse the association, or let it be; every admitted peer is later reported `closed`."""
        ...

    def transfer_syntaxes(self, abstract_syntax: UID, proposed: Sequence[UID]) -> list[UID]:
        """What to accept of `proposed` for this class, best first; empty when the class is not served."""
        ...

    def store(self, peer: Peer, request: StoreRequest) -> int:
        """The DIMSE status of the C-STORE; 0x0000 only for what is durable."""
        ...

    def closed(self, peer: Peer, released: bool) -> None:
        """The association is over; `released` is False when it was aborted or the connection was lost."""
        ...


class Acceptor:
    """Listens, and runs every association in its own threads."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        ae_title: str,
        max_pdu_bytes: int,
        idle_timeout_s: float,
        implementation: tuple[str, str],
        service: Service,
    ) -> None:
        # the log handlers of pynetdicom format every message, and quote data sets
        _config.LOG_HANDLER_LEVEL = "none"
        entity = ApplicationEntity(ae_title)
        entity.maximum_pdu_size = max_pdu_bytes
        entity.maximum_associations = 1 << 20  # the service decides
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = idle_timeout_s
        entity.implementation_class_uid, entity.implementation_version_name = UID(implementation[0]), implementation[1]
        self._server = _Server(entity, (host, port), service)
        entity._servers.append(cast(Any, self._server))  # it takes itself out when it shuts down
        self._thread = Thread(target=self._server.serve_forever, args=(0.1,), name="acceptor", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self, grace_s: float) -> int:
        """Stop listening, let associations finish for `grace_s`, abort the rest and return how many those were."""
        self._server.shutdown()
        self._thread.join()
        self._server.drop_unassociated()
        deadline = time.monotonic() + grace_s
        for association in self._server.associations():
            association.join(max(0.0, deadline - time.monotonic()))
        late = [association for association in self._server.associations() if association.is_alive()]
        for association in late:
            association.abort(block=False)
        deadline = time.monotonic() + CLOSING_S
        for association in late:
            association.join(max(0.0, deadline - time.monotonic()))
            association.hang_up()
        for association in late:
            association.join(CLOSING_S)
        return len(late)


class _Server(AssociationServer):
    request_queue_size = 128

    def __init__(self, entity: ApplicationEntity, address: tuple[str, int], service: Service) -> None:
        self.service = service
        self._lock = Lock()
        self._counter = itertools.count()
        self._open: dict[str, _Association] = {}  # by association id, in order of connection
        self._unassociated: dict[str, _Association] = {}
        super().__init__(entity, address, entity.ae_title, [], request_handler=_RequestHandler)

    def next_association_id(self) -> str:
        return f"{time.time_ns():020d}-{os.getpid()}-{next(self._counter):06d}"

    def associations(self) -> list[_Association]:
        with self._lock:
            return list(self._open.values())

    def connected(self, association: _Association) -> None:
        with self._lock:
            self._open[association.association_id] = association
            self._unassociated[association.association_id] = association
            crowd = list(self._unassociated.values())[:-MAX_UNASSOCIATED]
        for oldest in crowd:
            log.warning("connection_dropped", address=oldest.address, reason="too many without an association")
            oldest.hang_up()

    def associated(self, association: _Association) -> None:
        with self._lock:
            self._unassociated.pop(association.association_id, None)

    def disconnected(self, association: _Association) -> None:
        with self._lock:
            self._unassociated.pop(association.association_id, None)
            self._open.pop(association.association_id, None)

    def drop_unassociated(self) -> None:
        with self._lock:
            waiting = list(self._unassociated.values())
        for association in waiting:
            association.hang_up()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Replaces a traceback on stderr that quotes what a peer sent."""
        log.error("connection_failed", address=str(client_address[0]), exc_info=True)


class _RequestHandler(RequestHandler):
    server: _Server

    def handle(self) -> None:
        association = cast(_Association, self._create_association())
        self.server.connected(association)
        try:
            association.start()
        except RuntimeError:  # no thread to be had
            self.server.disconnected(association)
            raise

    def _create_association(self) -> Association:
        """As in pynetdicom, less the copy of every context: 60 ms for each connection with all syntaxes."""
        entity = self.server.ae
        connection = cast(socket.socket, self.request)
        connection.settimeout(entity.network_timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        association = _Association(entity, self.server, str(self.client_address[0]))
        association.set_socket(AssociationSocket(association, client_socket=connection))
        association.acceptor.maximum_length = entity.maximum_pdu_size
        association.acceptor.ae_title = entity.ae_title
        association.acceptor.address_info = self.local
        association.acceptor.implementation_class_uid = entity.implementation_class_uid
        association.acceptor.implementation_version_name = entity.implementation_version_name
        association.requestor.address_info = AddressInformation.from_tuple(self.client_address)
        return association


class _Association(Association):
    """An acceptor's association: its thread runs from the connection to its end."""

    def __init__(self, entity: ApplicationEntity, server: _Server, address: str) -> None:
        super().__init__(entity, MODE_ACCEPTOR)
        self.association_id = server.next_association_id()
        self.address = address
        self.peer: Peer | None = None  # once admitted
        self.server = server
        self._server = server
        self.name = f"AcceptorThread@{self.association_id}"
        self.acse = _Acse(self)
        self.dimse = _Dimse(self)
        self.dul = _Dul(self)
        # the timers belong to the provider that was just replaced
        self.acse_timeout = entity.acse_timeout
        self.network_timeout = entity.network_timeout

    def run_reactor(self) -> None:
        try:
            super().run_reactor()
        except Exception as error:  # noqa: BLE001  the top of an association's thread
            log.error("association_failed", address=self.address, error=explain_exception(error))
        finally:
            self._close()
            self.server.disconnected(self)
            if self.peer is not None:
                self.server.service.closed(self.peer, self.is_released)

    def hang_up(self) -> None:
        """Close the connection whatever its state is; a thread that waits for data goes on and ends."""
        transport = self.dul.socket
        connection = transport.socket if transport is not None else None
        if connection is not None:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed already
                return

    def _close(self) -> None:
        """End the connection and give its descriptor back; pynetdicom leaves that to the garbage collector."""
        transport = self.dul.socket
        connection = transport.socket if transport is not None else None
        self.hang_up()
        if self.dul.is_alive():
            self.dul.join(CLOSING_S)
        if connection is not None:
            connection.close()

    def _serve_request(self, msg: Any, context_id: int) -> None:
        """Every C-STORE-RQ is answered here, whatever it lacks; the rest is pynetdicom's."""
        context = self._accepted_cx.get(context_id)
        if not isinstance(msg, C_STORE) or msg.MessageIDBeingRespondedTo is not None or context is None:
            super()._serve_request(msg, context_id)
        elif msg.MessageID is None or self.peer is None:
            self.abort(block=False)  # there is no id to answer to
        else:
            self._answer_store(self.peer, msg, context)
        self.dul._idle_timer.restart()  # a slow disk of ours is no idleness of the peer

    def _answer_store(self, peer: Peer, request: C_STORE, context: PresentationContext) -> None:
        response = C_STORE()
        response.MessageID = request.MessageID
        response.MessageIDBeingRespondedTo = request.MessageID
        response.AffectedSOPClassUID = request.AffectedSOPClassUID
        response.AffectedSOPInstanceUID = request.AffectedSOPInstanceUID
        response.Status = self.server.service.store(
            peer,
            StoreRequest(
                affected_sop_class_uid=request.AffectedSOPClassUID,
                affected_sop_instance_uid=request.AffectedSOPInstanceUID,
                transfer_syntax_uid=context.transfer_syntax[0],
                data_set=request.DataSet or BytesIO(),
            ),
        )
        if self.is_established:
            self.dimse.send_msg(response, cast(int, context.context_id))


class _Acse(ACSE):
    def _negotiate_as_acceptor(self) -> None:
        """Ask the service before anything is accepted, then offer it what was proposed."""
        association = cast(_Association, self.assoc)
        association.server.associated(association)
        request = cast(A_ASSOCIATE, self.requestor.primitive)
        peer = Peer(
            association_id=association.association_id,
            calling_ae=request.calling_ae_title.strip(),
            called_ae=request.called_ae_title.strip(),
            address=association.address,
            opened_at=datetime.now(UTC),
        )
        refusal = association.server.service.admit(peer)
        if refusal is not None:
            self.send_reject(refusal.result, refusal.source, refusal.reason)
            association.kill()
            return
        association.peer = peer
        self.acceptor.supported_contexts = _contexts(
            request.presentation_context_definition_list, association.server.service.transfer_syntaxes
        )
        super()._negotiate_as_acceptor()


def _contexts(
    proposed: list[PresentationContext], transfer_syntaxes: Callable[[UID, Sequence[UID]], list[UID]]
) -> list[PresentationContext]:
    """One supported context for every proposed class; a class may be proposed several times."""
    syntaxes: dict[UID, list[UID]] = {}
    for context in proposed:
        syntaxes.setdefault(cast(UID, context.abstract_syntax), []).extend(context.transfer_syntax)
    accepted = {
        abstract_syntax: transfer_syntaxes(abstract_syntax, offered) for abstract_syntax, offered in syntaxes.items()
    }
    return [build_context(abstract_syntax, list(chosen)) for abstract_syntax, chosen in accepted.items() if chosen]


class _Dimse(DIMSEServiceProvider):
    def receive_primitive(self, primitive: P_DATA) -> None:
        """Bound a message while it grows; abort instead of dying on one that cannot be decoded."""
        try:
            if self._is_too_large(primitive):
                log.warning("message_refused", address=self._address, reason="command or data set too large")
            else:
                super().receive_primitive(primitive)
                return
        except Exception as error:  # noqa: BLE001  a peer's bytes end its association, never our thread
            log.warning("message_refused", address=self._address, error=explain_exception(error))
        self.message = None
        self.dul.event_queue.put("Evt19")  # invalid PDU: A-ABORT

    @property
    def _address(self) -> str:
        return cast(_Association, self.assoc).address

    def _is_too_large(self, primitive: P_DATA) -> bool:
        command_bytes = data_set_bytes = 0
        if self.message is not None:
            command_bytes = self.message.encoded_command_set.tell()
            data_set_bytes = self.message.data_set.tell() if self.message.data_set else 0
        for _, fragment in primitive.presentation_data_value_list:
            if fragment[0] & 1:
                command_bytes += len(fragment) - 1
            else:
                data_set_bytes += len(fragment) - 1
        return command_bytes > MAX_COMMAND_BYTES or data_set_bytes > MAX_DATA_SET_BYTES


class _Violation(Exception):
    """The peer broke a bound; the message says which."""


class _Dul(DULServiceProvider):
    """Reads PDUs with a bound on their size and on the time that one may take."""

    def run_reactor(self) -> None:
        try:
            super().run_reactor()
        except Exception as error:  # noqa: BLE001  the top of a thread
            log.warning("connection_failed", address=self._address, error=explain_exception(error))
        finally:
            cast(_Association, self.assoc).hang_up()
            # wakes an association that still waits for its request; pynetdicom takes None for a timeout
            self.to_user_queue.put(cast(Any, None))

    @property
    def _address(self) -> str:
        return cast(_Association, self.assoc).address

    @property
    def _state(self) -> str:
        return self.state_machine.current_state

    def _is_transport_event(self) -> bool:
        if self._state == "Sta1":  # the connection has yet to be noticed: its event is queued
            return False
        if self._state == "Sta6" and self.assoc.dimse.msg_queue.qsize() >= MAX_QUEUED_MESSAGES:
            return False
        connection = self._connection()
        if self._state == "Sta2" and connection is not None:
            # nothing but the peer can move this state: wait instead of looking a thousand times a second
            poll = select.poll()
            poll.register(connection, select.POLLIN)
            poll.poll(UNASSOCIATED_POLL_MS)
        return super()._is_transport_event()

    def _connection(self) -> socket.socket | None:
        return self.socket.socket if self.socket is not None else None

    def _read_pdu_data(self) -> None:
        """One PDU, or the event that ends the connection. All of it has to arrive within the idle timeout."""
        closing = self._state == "Sta13"
        try:
            content = self._receive_pdu()
        except _Violation as violation:
            log.warning("connection_dropped", address=self._address, reason=str(violation))
            if not closing:
                self._say_abort()
            self.event_queue.put("Evt17")  # connection closed
            return
        except OSError:
            self.event_queue.put("Evt17")
            return
        try:
            pdu, event = self._decode_pdu(content)
        except Exception as error:  # noqa: BLE001  a peer's bytes end its association, never our thread
            log.warning("pdu_refused", address=self._address, error=explain_exception(error))
            self.event_queue.put("Evt17" if closing else "Evt19")
            return
        self.event_queue.put(event)
        self._recv_pdu.put(pdu)

    def _receive_pdu(self) -> bytearray:
        deadline = time.monotonic() + cast(float, self.network_timeout)
        header = self._receive(6, deadline)
        pdu_type, length = struct.unpack(">BxL", header)
        if not 1 <= pdu_type <= 7:
            raise _Violation("not a DICOM PDU")
        limit = MAX_ASSOCIATE_BYTES if self._state == "Sta2" else self.assoc.acceptor.maximum_length
        if length > limit:
            raise _Violation(f"a PDU of {length} bytes where {limit} are the most")
        return header + self._receive(length, deadline)

    def _receive(self, size: int, deadline: float) -> bytearray:
        """Exactly `size` bytes; OSError when the connection ends first, _Violation when the time is over."""
        connection = self._connection()
        if connection is None:
            raise ConnectionError
        content = bytearray(size)
        view = memoryview(content)
        try:
            while view:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                count = connection.recv_into(view)
                if count == 0:
                    raise ConnectionError
                # unless armed again, acknowledgements are delayed by 40 ms and a peer with Nagle's algorithm waits
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                view = view[count:]
        except TimeoutError as error:
            raise _Violation("a PDU was begun and not finished in time") from error
        finally:
            connection.settimeout(self.network_timeout)
        return content

    def _say_abort(self) -> None:
        """Tell the peer, as far as it listens; the connection closes either way."""
        abort = A_ABORT_RQ()
        abort.source = 0x02  # service provider
        abort.reason_diagnostic = 0x06  # invalid PDU parameter value
        connection = self._connection()
        if connection is not None:
            try:
                connection.send(abort.encode(), socket.MSG_DONTWAIT)
            except OSError:
                return
