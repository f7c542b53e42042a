"""Certificates and keys of TLS: contexts after BCP 195, and how long a certificate holds. Knows nothing of DICOM.

The same rules for the receiver and for sending: TLS 1.2 or newer, ephemeral keys and authenticated encryption only
(RFC 9325; PS3.15 B.12, the BCP 195 RFC 8996, 9325 TLS Secure Transport Connection Profile), no renegotiation, no
compression. Raises CertificateError, whose message names the file and the remedy.
"""

from __future__ import annotations

import os
import ssl
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

# TLS 1.2: forward secrecy and authenticated encryption (RFC 9325 4.2); those of TLS 1.3 are all of that kind.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:!aNULL:!eNULL:!MD5:!SHA1"
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

HANDSHAKE_TURNS = 4  # TLS 1.2 needs two of each side

TlsMinimum = Literal["1.2", "1.3"]


class CertificateError(Exception):
    """A certificate, key or authority that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class Expiry:
    """Until when a certificate holds."""

    path: Path
    not_after: datetime  # UTC

    def days_left(self, now: datetime) -> float:
        """Negative once it has expired."""
        return (self.not_after - now).total_seconds() / 86400


def server_context(
    certificate: Path, key: Path, *, ca: Path | None = None, minimum: TlsMinimum = "1.2"
) -> ssl.SSLContext:
    """For the side that is called. With `ca`, a client must show a certificate that one of these signed."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, minimum)
    _load_own(context, certificate, key)
    if ca is not None:
        _load_authorities(context, ca)
        context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0  # nobody resumes a session with us: a ticket would outlive its certificate
    return context


def client_context(
    *,
    ca: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
    minimum: TlsMinimum = "1.2",
    check_name: bool = True,
) -> ssl.SSLContext:
    """For the side that calls. Authorities are `ca`, else the system's; certificate and key are shown where given.

    check_name False takes any name in the server's certificate: many devices' hold none that can be resolved.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, minimum)
    context.check_hostname = check_name
    context.verify_mode = ssl.CERT_REQUIRED
    if ca is not None:
        _load_authorities(context, ca)
    else:
        context.load_default_certs()
    if certificate is not None and key is not None:
        _load_own(context, certificate, key)
    return context


def fit_together(server: ssl.SSLContext, client: ssl.SSLContext) -> bool:
    """Whether these two would shake hands, tried in memory: nobody is called, and nobody stands among the refused."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(HANDSHAKE_TURNS):
        for side in list(sides):
            try:
                side.do_handshake()
                sides.remove(side)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:
                return False
    return not sides


def expiry(certificate: Path) -> Expiry:
    """When the first certificate of a PEM file ends."""
    try:
        fields: dict[str, Any] = ssl._ssl._test_decode_cert(str(certificate))  # type: ignore[attr-defined]
        return Expiry(certificate, datetime.fromtimestamp(ssl.cert_time_to_seconds(fields["notAfter"]), UTC))
    except FileNotFoundError as error:
        raise CertificateError(f"{certificate}: no such file") from error
    except (OSError, ValueError, KeyError) as error:
        raise CertificateError(f"{certificate}: cannot be read as a PEM certificate") from error


def common_name(peer_certificate: dict[str, Any] | None) -> str:
    """The CN of what `getpeercert` gave; empty without one. For the log: nothing is decided by it."""
    subject = (peer_certificate or {}).get("subject", ())
    return next((str(value) for part in subject for name, value in part if name == "commonName"), "")


def _context(protocol: ssl._SSLMethod, minimum: TlsMinimum) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = VERSIONS[minimum]
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    return context


def _load_own(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    check_key(key)
    if not certificate.is_file():
        raise CertificateError(f"{certificate}: no such file")
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise CertificateError(
            f"{certificate} and {key} cannot be used together: {_why(error)}; both must be PEM, the key unencrypted"
        ) from error


def check_key(key: Path) -> None:
    """CertificateError unless the key is a file that only its owner (and group, never others) may read."""
    try:
        mode = os.stat(key).st_mode
    except OSError as error:
        raise CertificateError(f"{key}: {error.strerror}") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        raise CertificateError(f"{key}: others may read or write this key; `chmod 600 {key}`")


def _load_authorities(context: ssl.SSLContext, ca: Path) -> None:
    if not ca.is_file():
        raise CertificateError(f"{ca}: no such file")
    try:
        context.load_verify_locations(ca)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a certificate of a device itself may stand in the file
    except (OSError, ValueError) as error:
        raise CertificateError(f"{ca}: cannot be read as PEM certificates: {_why(error)}") from error


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _why(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error)
