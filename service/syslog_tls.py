"""Syslog messages (RFC 5424) over TLS (RFC 5425) to an audit repository. Knows nothing of what they say."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from service.shared.settings import AuditSettings

# RFC 5424 6.2.1: facility 10 (security), severity 5 (notice); PS3.15 A.6.1 wants these of audit messages
PRIORITY = 10 * 8 + 5
APP_NAME = "medpruner-pacs"
MESSAGE_ID = "DICOM+RFC3881"  # PS3.15 A.6.1
HEAD_ID = "AUDITHEAD"
TIMEOUT_S = 10.0
BOM = b"\xef\xbb\xbf"  # RFC 5424 6.4: the text is UTF-8


class NotSent(Exception):
    """The repository may not have what was sent: send it again later. The message says why."""


@dataclass(frozen=True, slots=True)
class Message:
    """One syslog message before it has its header."""

    at: datetime
    message_id: str
    text: bytes  # UTF-8


def frame(message: Message, host: str) -> bytes:
    """Header and text with their length in front (RFC 5425 4.3: LEN SP SYSLOG-MSG)."""
    at = message.at.isoformat(timespec="microseconds")
    header = f"<{PRIORITY}>1 {at} {host} {APP_NAME} {os.getpid()} {message.message_id} - "
    content = header.encode("ascii", "replace") + BOM + message.text
    return str(len(content)).encode() + b" " + content


def context(settings: AuditSettings) -> ssl.SSLContext:
    """TLS 1.2 or newer, the repository's name checked against its certificate; ours shown where there is one.

    Raises OSError or ssl.SSLError when a file cannot be used.
    """
    made = ssl.create_default_context(cafile=None if settings.syslog_ca is None else str(settings.syslog_ca))
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.syslog_certificate is not None and settings.syslog_key is not None:
        made.load_cert_chain(settings.syslog_certificate, settings.syslog_key)
    return made


def send(settings: AuditSettings, messages: Sequence[Message]) -> None:
    """Send all over one connection, and return only when the repository has closed it in answer to our close.

    Syslog acknowledges nothing. That the peer answers our TLS close_notify, or closes in an orderly way after it,
    says that it read everything before: anything else is NotSent, and the messages go again. A repository may
    therefore see a message twice after a fault, and never misses one.
    """
    if settings.syslog_host is None:
        raise NotSent("no [audit] syslog_host")
    try:
        with (
            socket.create_connection((settings.syslog_host, settings.syslog_port), TIMEOUT_S) as plain,
            context(settings).wrap_socket(plain, server_hostname=settings.syslog_host) as connection,
        ):
            for message in messages:
                connection.sendall(frame(message, socket.gethostname()))
            _close(connection)
    except ssl.SSLCertVerificationError as error:
        raise NotSent(f"the repository's certificate is not trusted: {error.verify_message}") from error
    except OSError as error:  # ssl.SSLError is one
        raise NotSent(f"{type(error).__name__}: {error.strerror or 'the connection was lost'}") from error


def _close(connection: ssl.SSLSocket) -> None:
    """Our close_notify, then the peer's, or its orderly end without one; a reset is an OSError."""
    try:
        connection.unwrap()
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return
    except OSError as error:
        if error.errno != 0:  # OpenSSL's word for an end of the stream without close_notify
            raise
