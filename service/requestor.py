"""A destination -> an established association, plain or over TLS, or the reason why there is none.

Knows nothing of what is said over it, of results or of the database.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom import AE, build_context, evt
from pynetdicom.association import Association
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext

from service.answers import keep_answers
from service.certificates import CertificateError, client_context
from service.shared.settings import DestinationSettings, ScpSettings

MAX_CONTEXTS = 128  # PS3.8 9.3.2.2: odd ids 1 to 255
VERIFICATION = "1.2.840.10008.1.1"
ALERT_WAIT_S = 1.0  # a server that wants our certificate says so after the handshake (RFC 8446 4.4.2.4)


@dataclass(frozen=True, slots=True)
class Absence:
    """Why there is no association. `unsupported`: there was one, and none of the proposed contexts was accepted."""

    reason: str
    unsupported: bool = False


def where(destination: DestinationSettings) -> str:
    """Whom we call, for people."""
    return f"{destination.ae_title} at {destination.host}:{destination.port}"


def associate(
    destination: DestinationSettings,
    scp: ScpSettings,
    contexts: Sequence[PresentationContext],
    handlers: Sequence[Any] = (),
    *,
    roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
    section: str = "[[destination]]",
) -> Association | Absence:
    """An established association, or what its absence means. The caller releases it.

    roles: proposed where we are not the user of a class. section: of the configuration, where the address stands.
    """
    application = AE(ae_title=destination.calling_ae_title or scp.ae_title)
    application.connection_timeout = destination.timeout_s
    application.acse_timeout = destination.timeout_s
    application.dimse_timeout = destination.timeout_s
    application.network_timeout = destination.timeout_s
    connections: list[evt.Event] = []
    received: list[evt.Event] = []
    try:
        tls = (tls_context(destination), destination.host) if destination.tls else None
        association = application.associate(
            destination.host,
            destination.port,
            contexts=list(contexts)[:MAX_CONTEXTS],
            ae_title=destination.ae_title,
            tls_args=tls,
            evt_handlers=[(evt.EVT_CONN_OPEN, connections.append), (evt.EVT_PDU_RECV, received.append), *handlers],
            ext_neg=list(roles),
        )
    except CertificateError as error:
        return Absence(f"TLS for {section} {destination.name}: {error}")
    except (OSError, UnicodeError):  # from the resolver
        return Absence(f"{where(destination)}: no such host; check {section} host")
    if association.is_established:
        return keep_answers(association)
    if association.rejected_contexts:  # and none accepted: then pynetdicom aborts by itself
        return Absence(f"{where(destination)} takes none of the proposed SOP classes", unsupported=True)
    # pynetdicom takes a rejection that is followed closely by its connection's end for an abort
    rejections = [event.pdu for event in received if isinstance(event.pdu, A_ASSOCIATE_RJ)]
    return Absence(_why_not(destination, rejections, connected=bool(connections), section=section))


def tls_context(destination: DestinationSettings) -> ssl.SSLContext:
    """TLS as configured for this destination; CertificateError names the file that cannot be used."""
    return client_context(
        ca=destination.tls_ca,
        certificate=destination.tls_certificate,
        key=destination.tls_key,
        minimum=destination.tls_minimum,
        check_name=destination.tls_verify_host,
    )


def tls_fault(destination: DestinationSettings, section: str = "[[destination]]") -> str | None:
    """Why no TLS connection comes about, in words; None when the handshake is well. Connects, and hangs up.

    Asked after a failure only: pynetdicom keeps the reason to itself.
    """
    remedy = f"see tls_* of {section}"
    try:
        with (
            socket.create_connection((destination.host, destination.port), destination.timeout_s) as plain,
            tls_context(destination).wrap_socket(plain, server_hostname=destination.host) as connection,
        ):
            connection.settimeout(ALERT_WAIT_S)
            connection.recv(1)
    except CertificateError as error:
        return str(error)
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not trusted: {error.verify_message.rstrip('.')}; {remedy}"
    except TimeoutError:
        return None  # nothing to read, and nothing to complain of
    except ssl.SSLError as error:
        word = (error.reason or "no TLS is spoken there").replace("_", " ").lower()
        return f"TLS fails: {word}; {remedy}"
    except OSError as error:
        return f"the connection was lost in the TLS handshake ({error.strerror or type(error).__name__}); {remedy}"
    return None


def echo(destination: DestinationSettings, scp: ScpSettings, section: str = "[[destination]]") -> tuple[bool, str]:
    """C-ECHO the destination: whether it answered, and a sentence for people."""
    contexts = [build_context(VERIFICATION, ImplicitVRLittleEndian)]
    association = associate(destination, scp, contexts, section=section)
    if isinstance(association, Absence):
        if association.unsupported:
            return False, f"{where(destination)} takes no Verification ({VERIFICATION})"
        return False, association.reason
    try:
        code = association.send_c_echo().get("Status")
    except (RuntimeError, ValueError):  # it ended meanwhile
        code = None
    if association.is_established:
        association.release()
    if code is None:
        return False, f"{where(destination)} did not answer C-ECHO"
    if code != 0x0000:
        return False, f"{where(destination)} answered C-ECHO with 0x{code:04X}"
    return True, f"{where(destination)} answers C-ECHO with Success{' over TLS' if destination.tls else ''}"


def _why_not(
    destination: DestinationSettings, rejections: Sequence[A_ASSOCIATE_RJ], *, connected: bool, section: str
) -> str:
    for rejection in rejections:
        why = f"{rejection.result_str}: {rejection.reason_str}"
        return f"{where(destination)} rejects the association ({why}); check the AE titles on both sides"
    if destination.tls and _listens(destination):
        fault = tls_fault(destination, section)
        if fault is not None:
            return f"{where(destination)}: {fault}"
    if connected:
        return f"{where(destination)} aborted the association"
    return f"{where(destination)} cannot be reached; check {section} host and port, and that the PACS is up"


def _listens(destination: DestinationSettings) -> bool:
    try:
        socket.create_connection((destination.host, destination.port), destination.timeout_s).close()
    except OSError:
        return False
    return True
