"""DICOM over TLS: openssl's certificates, dcmtk's and pynetdicom's clients, and those who come without."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydicom.filewriter import dcmwrite
from pydicom.uid import CTImageStorage
from structlog.testing import capture_logs

from service.certificates import CertificateError, client_context
from service.refusals import recent
from tests.bench.receive import Sample, with_meta
from tests.certificates import Pair, authority, issue
from tests.receiving import (
    SENDER,
    Running,
    associate,
    association_request,
    data_set_bytes,
    encode,
    instance,
    place,
    receipts,
    running,
    send_instance,
    wait_until,
)
from tests.servers import free_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ca(folder: Path) -> Pair:
    return authority(folder)


@pytest.fixture(scope="module")
def own(ca: Pair, folder: Path) -> Pair:
    return issue(ca, folder, "server")


@pytest.fixture(scope="module")
def client(ca: Pair, folder: Path) -> Pair:
    return issue(ca, folder, "CT01")


@pytest.fixture
def receiver(tmp_path: Path, ca: Pair, own: Pair) -> Iterator[Running]:
    """With TLS alone; a client must show a certificate of ours."""
    with running(
        tmp_path / "spool",
        tls_port=free_port(),
        tls_certificate=own.certificate,
        tls_key=own.key,
        tls_ca=ca.certificate,
        pdu_timeout_s=2.0,
    ) as receiver:
        yield receiver


def send_over_tls(port: int, context: ssl.SSLContext, number: int = 1) -> int | None:
    """C-STORE by pynetdicom; None where no association came about."""
    association = associate(port, tls=context)
    if not association.is_established:
        return None
    status = send_instance(association, instance(number))
    association.release()
    return status


def test_pynetdicom_stores_over_tls(receiver: Running, ca: Pair, client: Pair) -> None:
    """Bit for bit, and the log names the certificate that was shown."""
    context = client_context(ca=ca.certificate, certificate=client.certificate, key=client.key)
    with capture_logs() as lines:
        assert send_over_tls(receiver.port, context) == 0x0000

    (receipt,) = place(receiver.spool)
    assert data_set_bytes(receiver.spool.path / receipt.path) == encode(instance(1))
    (opened,) = [line for line in lines if line["event"] == "association_opened"]
    assert (opened["tls"], opened["certificate_name"]) == (True, "CT01")


def test_dcmtk_stores_over_tls(receiver: Running, ca: Pair, client: Pair, tmp_path: Path) -> None:
    """Debian's storescu with +tls, in its default profile."""
    sample = instance(1)
    dcmwrite(
        tmp_path / "1.dcm", with_meta(Sample(CTImageStorage, sample.SOPInstanceUID, sample)), enforce_file_format=True
    )
    command = [shutil.which("storescu", path="/usr/bin") or "storescu", "-aet", SENDER, "-aec", "MEDPRUNER"]
    tls = ["+tls", str(client.key), str(client.certificate), "+cf", str(ca.certificate)]
    sent = subprocess.run(
        [*command, *tls, "127.0.0.1", str(receiver.port), str(tmp_path / "1.dcm")], capture_output=True, text=True
    )

    assert sent.returncode == 0, sent.stderr
    assert len(receipts(receiver.spool)) == 1


@pytest.mark.parametrize("shown", ["none", "of another authority"])
def test_client_without_our_certificate_is_refused(
    receiver: Running, ca: Pair, client: Pair, tmp_path: Path, shown: str
) -> None:
    """One line says why and what would let it in, the file of refusals keeps it, and the next client is served."""
    stranger = issue(authority(tmp_path, "elsewhere"), tmp_path, "stranger")
    files = {} if shown == "none" else {"certificate": stranger.certificate, "key": stranger.key}
    assert send_over_tls(receiver.port, client_context(ca=ca.certificate, **files)) is None

    wait_until(lambda: bool(refused_lately(receiver)))
    (refused,) = refused_lately(receiver)
    assert "TLS handshake failed" in refused.reason
    assert "tls_ca" in refused.remedy
    assert refused.address == "127.0.0.1"
    good = client_context(ca=ca.certificate, certificate=client.certificate, key=client.key)
    assert send_over_tls(receiver.port, good) == 0x0000


def refused_lately(receiver: Running) -> list[object]:
    return list(recent(receiver.spool.path, datetime.now(UTC) - timedelta(minutes=5)))


def test_plain_client_on_the_tls_port_is_told_apart(receiver: Running, ca: Pair, client: Pair) -> None:
    """It is dropped at once with words that say so; nobody is locked out."""
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", receiver.port), timeout=20) as connection:
            connection.sendall(association_request())
            assert connection.recv(1) == b""

    wait_until(lambda: bool(refused_lately(receiver)))
    (refused,) = refused_lately(receiver)
    assert refused.reason == "a DICOM connection without TLS on the TLS port"
    context = client_context(ca=ca.certificate, certificate=client.certificate, key=client.key)
    assert send_over_tls(receiver.port, context) == 0x0000


def test_handshake_is_bounded_in_time(receiver: Running, ca: Pair, client: Pair) -> None:
    """Clients that begin a handshake and fall silent are dropped after pdu_timeout_s, and lock nobody out."""
    silent = [socket.create_connection(("127.0.0.1", receiver.port), timeout=20) for _ in range(20)]
    for connection in silent:
        connection.sendall(b"\x16\x03\x01\x02\x00")
    context = client_context(ca=ca.certificate, certificate=client.certificate, key=client.key)
    assert send_over_tls(receiver.port, context) == 0x0000

    for connection in silent:
        while connection.recv(100):
            pass
        connection.close()


def test_tls_client_on_the_plain_port_is_told_apart(tmp_path: Path, ca: Pair) -> None:
    """The other way round: the line names [scp] tls_port."""
    with running(tmp_path / "spool") as receiver:
        assert send_over_tls(receiver.port, client_context(ca=ca.certificate)) is None
        wait_until(lambda: bool(refused_lately(receiver)))
        (refused,) = refused_lately(receiver)

    assert refused.reason == "a TLS connection on the port without TLS"
    assert "[scp] tls_port" in refused.remedy


def test_both_ports_serve_side_by_side(tmp_path: Path, ca: Pair, own: Pair) -> None:
    """TLS beside the plain port; without tls_ca no client certificate is asked for."""
    port, tls_port = free_port(), free_port()
    tls = {"tls_port": tls_port, "tls_certificate": own.certificate, "tls_key": own.key}
    with running(tmp_path / "spool", port=port, **tls) as receiver:
        association = associate(port)
        assert send_instance(association, instance(1)) == 0x0000
        association.release()
        assert send_over_tls(tls_port, client_context(ca=ca.certificate), 2) == 0x0000

        assert len(receipts(receiver.spool)) == 2


def test_stopping_receiver_says_nothing_in_the_clear(tmp_path: Path, ca: Pair, own: Pair) -> None:
    """An open association ends within TLS: by its alert, or by an A-ABORT inside; never by one outside of it."""
    tls = {"tls_port": free_port(), "tls_certificate": own.certificate, "tls_key": own.key}
    with (
        running(tmp_path / "spool", **tls) as receiver,
        socket.create_connection(("127.0.0.1", receiver.port), timeout=20) as plain,
        client_context(ca=ca.certificate).wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(association_request())
        assert connection.recv(1) == b"\x02"
        connection.recv(1 << 16)
        receiver.receiver.stop(0.0)

        try:
            end = connection.recv(1)
        except ssl.SSLError as error:  # plain text would be a record of a wrong version
            assert "ALERT" in str(error)  # noqa: PT017  either end is right
        else:
            assert end in (b"", b"\x07")


def test_key_that_others_may_read_is_refused_at_start(tmp_path: Path, ca: Pair) -> None:
    """Before anything listens."""
    pair = issue(ca, tmp_path, "open")
    pair.key.chmod(0o644)
    tls = {"tls_port": free_port(), "tls_certificate": pair.certificate, "tls_key": pair.key}

    with pytest.raises(CertificateError, match="chmod 600"), running(tmp_path / "spool", **tls):
        pass
