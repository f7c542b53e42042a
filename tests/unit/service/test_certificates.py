"""Certificates: what is loaded, what is refused with which words, and when one ends."""

from __future__ import annotations

import socket
import ssl
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread

import pytest

from service.certificates import (
    CertificateError,
    TlsMinimum,
    client_context,
    common_name,
    expiry,
    fit_together,
    server_context,
)
from tests.certificates import Pair, authority, issue


@pytest.fixture
def ca(tmp_path: Path) -> Pair:
    return authority(tmp_path)


@pytest.fixture
def server(ca: Pair, tmp_path: Path) -> Pair:
    return issue(ca, tmp_path, "server")


def shake_hands(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext, name: str = "127.0.0.1"
) -> tuple[str, str, str]:
    """The protocol, the cipher and the client's common name as the server sees it; raises what the client raises."""
    left, right = socket.socketpair()
    seen: list[str] = []

    def serve() -> None:
        try:
            with server_side.wrap_socket(left, server_side=True) as connection:
                seen.append(common_name(connection.getpeercert()))
                connection.sendall(b"x")
        except OSError:
            left.close()

    thread = Thread(target=serve)
    thread.start()
    try:
        with client_side.wrap_socket(right, server_hostname=name) as connection:
            if not connection.recv(1):
                raise ssl.SSLError("refused")
            cipher = connection.cipher()
            assert cipher is not None
            return str(connection.version()), cipher[0], seen[0]
    finally:
        right.close()
        thread.join()


def test_both_sides_agree_and_know_each_other(ca: Pair, server: Pair, tmp_path: Path) -> None:
    """With certificates on both sides, TLS 1.3 is agreed upon and the server sees the client's common name."""
    client = issue(ca, tmp_path, "CT01")
    ours = server_context(server.certificate, server.key, ca=ca.certificate)
    theirs = client_context(ca=ca.certificate, certificate=client.certificate, key=client.key)

    version, _, name = shake_hands(ours, theirs)

    assert (version, name) == ("TLSv1.3", "CT01")


def test_tls_1_2_has_forward_secrecy(ca: Pair, server: Pair) -> None:
    """A peer of TLS 1.2 gets an ephemeral key and authenticated encryption (RFC 9325 4.2)."""
    theirs = client_context(ca=ca.certificate)
    theirs.maximum_version = ssl.TLSVersion.TLSv1_2

    version, cipher, _ = shake_hands(server_context(server.certificate, server.key), theirs)

    assert version == "TLSv1.2"
    assert cipher.startswith("ECDHE")
    assert "GCM" in cipher or "CHACHA20" in cipher


def test_minimum_version_is_kept(ca: Pair, server: Pair) -> None:
    """With tls_minimum 1.3, a peer that knows 1.2 alone is refused."""
    theirs = client_context(ca=ca.certificate)
    theirs.maximum_version = ssl.TLSVersion.TLSv1_2

    with pytest.raises(OSError, match=r".*"):
        shake_hands(server_context(server.certificate, server.key, minimum="1.3"), theirs)


@pytest.mark.parametrize("shown", ["none", "of another authority"])
def test_client_without_a_known_certificate_is_refused(ca: Pair, server: Pair, tmp_path: Path, shown: str) -> None:
    """Where tls_ca is given, a client must show a certificate of it."""
    other = issue(authority(tmp_path, "elsewhere"), tmp_path, "stranger")
    ours = server_context(server.certificate, server.key, ca=ca.certificate)
    own = {} if shown == "none" else {"certificate": other.certificate, "key": other.key}

    with pytest.raises(OSError, match=r".*"):
        shake_hands(ours, client_context(ca=ca.certificate, **own))


def test_server_of_another_authority_is_not_trusted(ca: Pair, tmp_path: Path) -> None:
    """A client sends nothing to a server that its authority did not sign."""
    stranger = issue(authority(tmp_path, "elsewhere"), tmp_path, "stranger")

    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server_context(stranger.certificate, stranger.key), client_context(ca=ca.certificate))


def test_server_of_another_name_is_trusted_only_on_request(ca: Pair, server: Pair) -> None:
    """The name is checked, unless the configuration says that this certificate holds none that fits."""
    ours = server_context(server.certificate, server.key)

    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(ours, client_context(ca=ca.certificate), "pacs.example")

    assert shake_hands(ours, client_context(ca=ca.certificate, check_name=False), "pacs.example")[0] == "TLSv1.3"


def test_key_that_others_may_read_is_refused(server: Pair) -> None:
    """The message names the key and the command that helps."""
    server.key.chmod(0o644)

    with pytest.raises(CertificateError, match=r"server\.key.*chmod 600"):
        server_context(server.certificate, server.key)


def test_encrypted_key_is_refused_without_a_question(server: Pair, tmp_path: Path) -> None:
    """Nobody is at the terminal of a service: an encrypted key is an error, not a prompt."""
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-in", str(server.key), "-aes256", "-passout", "pass:x", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    locked.chmod(0o600)

    with pytest.raises(CertificateError, match=r"locked\.key.*unencrypted"):
        server_context(server.certificate, locked)


@pytest.mark.parametrize("broken", ["certificate", "key", "ca"])
@pytest.mark.parametrize("fault", ["missing", "no PEM"])
def test_unusable_file_is_named(ca: Pair, server: Pair, broken: str, fault: str) -> None:
    """Each of the files, missing or not PEM, is named in the error."""
    path = {"certificate": server.certificate, "key": server.key, "ca": ca.certificate}[broken]
    path.unlink()
    if fault == "no PEM":
        path.write_text("nothing of the kind")
        path.chmod(0o600)

    with pytest.raises(CertificateError, match=path.name.replace(".", r"\.")):
        server_context(server.certificate, server.key, ca=ca.certificate)


@pytest.mark.parametrize("minimum", ["1.2", "1.3"])
def test_handshake_is_tried_in_memory(ca: Pair, server: Pair, tmp_path: Path, minimum: TlsMinimum) -> None:
    """A certificate of a device itself is an authority enough, for it alone; who shows none may not be let in."""
    other = issue(ca, tmp_path, "other")
    open_to_all = server_context(server.certificate, server.key, minimum=minimum)
    strict = server_context(server.certificate, server.key, ca=ca.certificate, minimum=minimum)
    trusting = client_context(ca=server.certificate, check_name=False)
    known = client_context(ca=server.certificate, certificate=other.certificate, key=other.key, check_name=False)

    assert fit_together(open_to_all, trusting)
    assert not fit_together(open_to_all, client_context(ca=other.certificate, check_name=False))
    assert not fit_together(strict, trusting)
    assert fit_together(strict, known)


def test_expiry_counts_days(ca: Pair, tmp_path: Path) -> None:
    """The days left are those it was made for; a file that is no certificate is named."""
    pair = issue(ca, tmp_path, "short", days=3)

    assert 2.9 < expiry(pair.certificate).days_left(datetime.now(UTC)) < 3.1
    with pytest.raises(CertificateError, match=r"short\.key"):
        expiry(pair.key)
