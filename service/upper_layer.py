"""The DICOM upper layer over one TCP connection: PDUs in, PDUs out, each bounded in size and in time (PS3.8 9.3).

P-DATA is parsed where it was received, in one buffer that is used again and again. Knows nothing of associations'
rules, of messages or of files; the bytes of A-ASSOCIATE PDUs are somebody else's.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

HEADER_BYTES = 6
PIECE_BYTES = 1 << 16  # how much of an A-ASSOCIATE-RQ is awaited at a time: a claimed length allocates nothing
SLOW_S = 1.0  # a PDU that takes longer has its deadline looked at more closely
LINGER_S = 2.0  # for a peer to read our last PDU and close
TLS_HANDSHAKE = 22  # the first byte of what a TLS client sends (RFC 8446 5.1); no PDU type


class PduType(IntEnum):
    """PS3.8 table 9-10 and following."""

    A_ASSOCIATE_RQ = 1
    A_ASSOCIATE_AC = 2
    A_ASSOCIATE_RJ = 3
    P_DATA_TF = 4
    A_RELEASE_RQ = 5
    A_RELEASE_RP = 6
    A_ABORT = 7


class AbortReason(IntEnum):
    """Why we, the service provider, abort (PS3.8 table 9-26)."""

    NOT_SPECIFIED = 0
    UNRECOGNIZED_PDU = 1
    UNEXPECTED_PDU = 2
    INVALID_PARAMETER_VALUE = 6


class Ended(Exception):
    """The connection is over, or has to be."""


class Disconnected(Ended):
    """The peer closed the connection, or it was lost."""


class Aborted(Ended):
    """The peer sent an A-ABORT."""


class Violation(Ended):
    """The peer broke a rule or a bound, which the message names; it is told by an A-ABORT with the reason.

    remedy: the configuration that would let it pass; empty where nothing would.
    """

    def __init__(
        self, message: str, reason: AbortReason = AbortReason.INVALID_PARAMETER_VALUE, *, remedy: str = ""
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.remedy = remedy


class NoTls(Violation):
    """The connection could not be secured: nothing more can be said on it."""


@dataclass(frozen=True, slots=True)
class Pdv:
    """One presentation data value. `fragment` is valid until the next one is asked for."""

    context_id: int
    is_command: bool
    is_last: bool
    fragment: memoryview


class Connection:
    """One TCP connection, used by one thread; `hang_up` and `stop_reading` may come from any."""

    def __init__(self, transport: socket.socket, *, idle_timeout_s: float, pdu_timeout_s: float) -> None:
        self._socket = transport
        self._idle_timeout_s = idle_timeout_s
        self._pdu_timeout_s = pdu_timeout_s
        self._max_pdu_bytes = 0
        self._buffer = memoryview(b"")
        self._start = self._end = 0  # of what was received and not yet taken
        transport.settimeout(idle_timeout_s)
        transport.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def secure(self, context: ssl.SSLContext) -> dict[str, Any]:
        """Shake hands over TLS, within the time that a PDU may take; the peer's certificate, empty without one."""
        try:
            first = self._socket.recv(1, socket.MSG_PEEK)
            if first and first[0] == PduType.A_ASSOCIATE_RQ:
                raise NoTls("a DICOM connection without TLS on the TLS port", remedy="[scp] port, or TLS at the sender")
            self._socket.settimeout(self._pdu_timeout_s)
            secured = context.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
            self._socket = secured
            secured.do_handshake()
            self._socket.settimeout(self._idle_timeout_s)
            return dict(secured.getpeercert() or {})
        except TimeoutError as error:
            raise NoTls("no TLS handshake within [scp] pdu_timeout_s") from error
        except ssl.SSLError as error:
            remedy = _TLS_REMEDIES.get(error.reason, "")
            raise NoTls(f"the TLS handshake failed: {error.reason or 'no reason given'}", remedy=remedy) from error
        except OSError as error:
            raise Disconnected from error

    def read_request(self, max_bytes: int) -> bytes:
        """The first PDU, whole, which must be an A-ASSOCIATE-RQ."""
        deadline = time.monotonic() + self._idle_timeout_s
        header = self._exactly(HEADER_BYTES, deadline)
        pdu_type, length = struct.unpack(">BxL", header)
        if pdu_type == TLS_HANDSHAKE and not isinstance(self._socket, ssl.SSLSocket):
            raise NoTls("a TLS connection on the port without TLS", remedy="[scp] tls_port, or no TLS at the sender")
        if pdu_type != PduType.A_ASSOCIATE_RQ:
            raise Violation("no association request", AbortReason.UNEXPECTED_PDU)
        if length > max_bytes:
            message = f"an A-ASSOCIATE-RQ of {length} bytes, [scp] max_associate_bytes is {max_bytes}"
            raise Violation(message, remedy=f"[scp] max_associate_bytes above {max_bytes}")
        return header + self._exactly(length, min(deadline, time.monotonic() + self._pdu_timeout_s))

    def begin_data(self, max_pdu_bytes: int) -> None:
        """From now on PDUs of at most that many bytes (after their header) are received into one buffer."""
        self._max_pdu_bytes = max_pdu_bytes
        self._buffer = memoryview(bytearray(2 * (max_pdu_bytes + HEADER_BYTES)))

    def pdvs(self) -> Iterator[Pdv]:
        """The presentation data values as they come; ends when the peer asks for the release."""
        while True:
            pdu_type, content = self._next_pdu()
            if pdu_type == PduType.P_DATA_TF:
                yield from _split(content)
            elif pdu_type == PduType.A_RELEASE_RQ:
                return
            elif pdu_type == PduType.A_ABORT:
                raise Aborted
            elif pdu_type in set(PduType):
                raise Violation("a PDU that has no place here", AbortReason.UNEXPECTED_PDU)
            else:
                raise Violation("not a DICOM PDU", AbortReason.UNRECOGNIZED_PDU)

    def send(self, *pdus: bytes) -> None:
        """All in one: with Nagle's algorithm at work, a second piece would wait for the first one's acknowledgement."""
        try:
            self._socket.sendall(b"".join(pdus))
        except TimeoutError as error:
            raise Violation("the peer does not read its answers") from error
        except OSError as error:
            raise Disconnected from error

    def abort(self, reason: AbortReason) -> None:
        """Tell the peer, as far as it listens."""
        with suppress(OSError):
            self._socket.settimeout(LINGER_S)
            self._socket.sendall(struct.pack(">BxLxxBB", PduType.A_ABORT, 4, 2, reason))

    def linger(self) -> None:
        """Wait a little for the peer to close: what it has not read yet would be lost with the connection."""
        deadline = time.monotonic() + LINGER_S
        if isinstance(self._socket, ssl.SSLSocket):
            with suppress(OSError, ValueError):  # ValueError: the handshake was never finished
                self._socket.settimeout(LINGER_S)
                self._socket = self._socket.unwrap()  # an end without close_notify looks like an attack (RFC 8446 6.1)
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_WR)
            while (remaining_s := deadline - time.monotonic()) > 0:
                self._socket.settimeout(remaining_s)
                if not self._socket.recv(PIECE_BYTES):
                    return

    def stop_reading(self) -> None:
        """Wake the thread that waits for the peer: it finds the connection at its end, and can still send.

        Over TLS the end without close_notify is an error, after which only its alert is sent: the peer sees a fault.
        """
        with suppress(OSError):  # the plain socket's: SSLSocket's own would make what is sent afterwards plain text
            socket.socket.shutdown(self._socket, socket.SHUT_RD)

    def hang_up(self) -> None:
        """End the connection whatever its state is; the thread that uses it goes on and ends."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self._socket.close()

    # --- inside ---

    def _exactly(self, size: int, deadline: float) -> bytes:
        content = bytearray()
        while len(content) < size:
            self._set_timeout(deadline)
            try:
                piece = self._socket.recv(min(size - len(content), PIECE_BYTES))
            except TimeoutError as error:
                raise Violation("no association was asked for within [scp] idle_timeout_s") from error
            except OSError as error:
                raise Disconnected from error
            if not piece:
                raise Disconnected
            self._acknowledge_at_once()
            content += piece
        self._socket.settimeout(self._idle_timeout_s)
        return bytes(content)

    def _next_pdu(self) -> tuple[int, memoryview]:
        """Type and content of the next PDU, once all of it is here."""
        if self._start == self._end:
            self._start = self._end = 0
            self._receive("nothing came for longer than [scp] idle_timeout_s")
        begun = time.monotonic()
        self._fill(HEADER_BYTES, begun)
        pdu_type, length = struct.unpack_from(">BxL", self._buffer, self._start)
        if length > self._max_pdu_bytes:
            message = f"a PDU of {length} bytes, [scp] max_pdu_bytes is {self._max_pdu_bytes}"
            raise Violation(message, remedy=f"[scp] max_pdu_bytes above {self._max_pdu_bytes}")
        self._fill(HEADER_BYTES + length, begun)
        first = self._start + HEADER_BYTES
        self._start = first + length
        return pdu_type, self._buffer[first : self._start]

    def _fill(self, size: int, begun: float) -> None:
        """Have at least `size` bytes from the start on, within the time that a PDU may take since it begun."""
        if self._end - self._start >= size:
            return
        if self._start + size > len(self._buffer):
            self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
        self._socket.settimeout(self._pdu_timeout_s)
        while self._end - self._start < size:
            if time.monotonic() - begun > min(SLOW_S, self._pdu_timeout_s / 2):
                self._set_timeout(begun + self._pdu_timeout_s)
            self._receive(
                "a PDU was begun and not finished within [scp] pdu_timeout_s", "[scp] pdu_timeout_s above what it is"
            )
        self._socket.settimeout(self._idle_timeout_s)

    def _receive(self, complaint: str, remedy: str = "") -> None:
        """Whatever has come, behind what is there."""
        try:
            count = self._socket.recv_into(self._buffer[self._end :])
        except TimeoutError as error:
            raise Violation(complaint, AbortReason.NOT_SPECIFIED, remedy=remedy) from error
        except OSError as error:
            raise Disconnected from error
        if count == 0:
            raise Disconnected
        self._end += count
        self._acknowledge_at_once()

    def _acknowledge_at_once(self) -> None:
        """Not armed again, TCP delays acknowledgements by 40 ms, and a peer with Nagle's algorithm waits for them."""
        with suppress(OSError):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _set_timeout(self, deadline: float) -> None:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))


def p_data(context_id: int, command: bytes, max_pdu_bytes: int) -> bytes:
    """A command set as P-DATA-TF PDUs of at most that many bytes each, 0 for no limit (PS3.8 9.3.5, annex E)."""
    size = max(max_pdu_bytes - HEADER_BYTES, HEADER_BYTES) if max_pdu_bytes else len(command)
    fragments = [command[start : start + size] for start in range(0, len(command), size)]
    return b"".join(
        struct.pack(
            ">BxLLBB",
            PduType.P_DATA_TF,
            len(fragment) + HEADER_BYTES,
            len(fragment) + 2,
            context_id,
            3 if number == len(fragments) else 1,
        )
        + fragment
        for number, fragment in enumerate(fragments, 1)
    )


_TLS_REMEDIES = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "a certificate of [scp] tls_ca at the sender, or no tls_ca here",
    "CERTIFICATE_VERIFY_FAILED": "the sender's authority in [scp] tls_ca",
    "UNSUPPORTED_PROTOCOL": "[scp] tls_minimum, or a newer TLS at the sender",
    "TLSV1_ALERT_UNKNOWN_CA": "our certificate's authority at the sender",
    "NO_SHARED_CIPHER": "ECDHE with AES-GCM or ChaCha20 at the sender (BCP 195)",
}

RELEASE_REPLY = struct.pack(">BxLxxxx", PduType.A_RELEASE_RP, 4)


def _split(content: memoryview) -> Iterator[Pdv]:
    """The presentation data values of one P-DATA-TF, in place."""
    place, size = 0, len(content)
    if size == 0:
        raise Violation("a P-DATA-TF without a presentation data value")
    while place < size:
        if size - place < HEADER_BYTES:
            raise Violation("a presentation data value without its header")
        length, context_id, control = struct.unpack_from(">LBB", content, place)
        if not 2 <= length <= size - place - 4:
            raise Violation("a presentation data value longer than its PDU, or empty of its header")
        yield Pdv(context_id, bool(control & 1), bool(control & 2), content[place + HEADER_BYTES : place + 4 + length])
        place += 4 + length
