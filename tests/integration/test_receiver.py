"""The receiver on a real socket, with pynetdicom and dcmtk as its peers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedSRStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
)
from pynetdicom import Association
from pynetdicom.sop_class import Verification
from structlog.testing import capture_logs

from service.certificates import client_context
from service.receiver import TRANSFER_SYNTAXES
from service.shared.settings import ScpSettings, SourceSettings
from service.spool import Spool, key
from tests.certificates import authority, issue
from tests.receiving import (
    SENDER,
    STUDY_UID,
    Running,
    associate,
    compressed,
    data_set_bytes,
    encode,
    instance,
    place,
    receipts,
    rejection,
    running,
    send,
    send_instance,
    wait_until,
)
from tests.servers import free_port

NATIVE = {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian}
PRIVATE_CLASS = "1.2.826.0.1.3680043.10.1.77"


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "spool") as started:
        yield started


def on_wire(number: int, syntax: str) -> bytes:
    """The bytes of an instance in this transfer syntax."""
    if syntax == DeflatedExplicitVRLittleEndian:
        compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        return compressor.compress(encode(instance(number))) + compressor.flush()
    return encode(instance(number) if syntax in NATIVE else compressed(number), syntax)


def dcmtk(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(argument) for argument in arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_echo_is_answered(receiver: Running) -> None:
    """C-ECHO gives Success, and writes nothing."""
    association = associate(receiver.port, {Verification: [ImplicitVRLittleEndian]})
    status = association.send_c_echo().Status
    association.release()

    assert status == 0x0000
    assert receipts(receiver.spool) == []


def test_stored_instance_and_its_receipt_tell_what_came_and_from_whom(receiver: Running) -> None:
    """Success means an instance on disk and a receipt with its identity, digest, sender and association."""
    association = associate(receiver.port)
    status = send_instance(association, instance())
    association.release()

    assert status == 0x0000
    (receipt,) = place(receiver.spool)
    assert data_set_bytes(receiver.spool.path / receipt.path) == encode(instance())
    assert receipt.sha256 == sha256(encode(instance())).hexdigest()
    assert (receipt.study_uid, receipt.sop_instance_uid) == (STUDY_UID, f"{STUDY_UID}.1.1")
    assert (receipt.calling_ae, receipt.called_ae, receipt.peer_address) == (SENDER, "MEDPRUNER", "127.0.0.1")
    assert (receipt.modality, receipt.transfer_syntax_uid) == ("CT", ExplicitVRLittleEndian)
    assert receipt.received_at.tzinfo is not None


def test_every_transfer_syntax_is_kept_bit_for_bit(receiver: Running) -> None:
    """All of them on one association, each in its own context: the bytes on disk are those that were sent."""
    syntaxes = sorted(TRANSFER_SYNTAXES)
    association = associate(receiver.port, [(CTImageStorage, [syntax]) for syntax in syntaxes])
    assert {context.transfer_syntax[0] for context in association.accepted_contexts} == set(syntaxes)
    statuses = [
        send(
            association,
            on_wire(number, syntax),
            sop_instance_uid=f"{STUDY_UID}.1.{number}",
            transfer_syntax_uid=syntax,
        )
        for number, syntax in enumerate(syntaxes)
    ]
    association.release()

    assert set(statuses) == {0x0000}
    for number, (syntax, receipt) in enumerate(zip(syntaxes, place(receiver.spool), strict=True)):
        path = receiver.spool.path / receipt.path
        assert data_set_bytes(path) == on_wire(number, syntax)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == receipt.transfer_syntax_uid == syntax


@pytest.mark.parametrize(
    "uid", ["1.2.840.10008.1.2.4.94", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.7.1", "1.2.3.4.5"]
)
def test_context_whose_pixels_lie_elsewhere_is_rejected_for_its_syntax(receiver: Running, uid: str) -> None:
    """JPIP, SMPTE and unknown syntaxes are refused with the reason "transfer syntaxes not supported"."""
    association = associate(receiver.port, [(CTImageStorage, [uid]), (CTImageStorage, [ExplicitVRLittleEndian])])
    rejected = association.rejected_contexts
    association.release()

    assert [context.result for context in rejected] == [0x04]


def test_context_of_another_service_is_rejected_for_its_class(receiver: Running) -> None:
    """A query is refused with the reason "abstract syntax not supported"; storage beside it is accepted."""
    find = "1.2.840.10008.5.1.4.1.2.1.1"
    association = associate(receiver.port, {find: [ImplicitVRLittleEndian], CTImageStorage: [ExplicitVRLittleEndian]})
    rejected = association.rejected_contexts
    association.release()

    assert [(context.abstract_syntax, context.result) for context in rejected] == [(find, 0x03)]


def test_sender_that_offers_everything_in_one_context_is_asked_for_explicit(receiver: Running) -> None:
    """Explicit VR Little Endian where it is offered; what is compressed before implicit where it is not."""
    association = associate(
        receiver.port,
        [
            (CTImageStorage, [ImplicitVRLittleEndian, JPEG2000Lossless, ExplicitVRLittleEndian]),
            (MRImageStorage, [ImplicitVRLittleEndian, JPEGLSLossless, JPEG2000Lossless]),
        ],
    )
    chosen = {context.abstract_syntax: context.transfer_syntax[0] for context in association.accepted_contexts}
    association.release()

    assert chosen == {CTImageStorage: ExplicitVRLittleEndian, MRImageStorage: JPEGLSLossless}


@pytest.mark.parametrize("uid", [PRIVATE_CLASS, EnhancedSRStorage, "1.2.840.10008.5.1.4.1.1.5"])
def test_private_retired_and_report_classes_are_stored(receiver: Running, uid: str) -> None:
    """Whatever a PACS forwards is acknowledged; what it means, ingest decides."""
    association = associate(receiver.port, {uid: [ExplicitVRLittleEndian]})
    status = send_instance(association, instance(sop_class_uid=uid))
    association.release()

    assert status == 0x0000
    assert receipts(receiver.spool)[0].sop_class_uid == uid


def test_store_in_a_context_of_another_service_is_refused(receiver: Running) -> None:
    """0x0122: who was granted Verification alone stores nothing."""
    association = associate(receiver.port, {Verification: [ExplicitVRLittleEndian]})
    status = send_instance(association, instance())
    echoed = association.send_c_echo()
    association.release()

    assert (status, echoed.Status) == (0x0122, 0x0000)
    assert receipts(receiver.spool) == []


def test_same_instance_again_is_success_without_a_second_copy(receiver: Running) -> None:
    """An identical re-send is acknowledged; ingest keeps one of both."""
    association = associate(receiver.port)
    statuses = [send_instance(association, instance()) for _ in range(2)]
    association.release()

    assert statuses == [0x0000, 0x0000]
    assert len(place(receiver.spool)) == 2
    assert len(receiver.spool.instances(STUDY_UID)) == 1


def test_other_bytes_under_the_same_uid_are_both_kept(receiver: Running) -> None:
    """Nothing that was acknowledged is ever overwritten."""
    changed = instance()
    changed.InstanceNumber = 99
    association = associate(receiver.port)
    statuses = [send_instance(association, dataset) for dataset in (instance(), changed)]
    association.release()

    assert statuses == [0x0000, 0x0000]
    place(receiver.spool)
    stored = {data_set_bytes(path) for path in receiver.spool.instances(STUDY_UID)}
    assert stored == {encode(instance()), encode(changed)}


@pytest.mark.parametrize(
    ("sop_class_uid", "sop_instance_uid", "status"),
    [
        (MRImageStorage, f"{STUDY_UID}.1.1", 0xA900),
        (CTImageStorage, f"{STUDY_UID}.1.2", 0xA900),
        (CTImageStorage, None, 0xC000),
        (None, f"{STUDY_UID}.1.1", 0xC000),
    ],
    ids=["class", "instance", "no-instance", "no-class"],
)
def test_data_set_that_is_not_what_was_announced_is_refused(
    receiver: Running, sop_class_uid: str | None, sop_instance_uid: str | None, status: int
) -> None:
    """A mismatch or a missing Affected UID has its own answer, nothing is kept, and the association goes on."""
    association = associate(receiver.port)
    answers = [
        send(association, encode(instance()), sop_class_uid=sop_class_uid, sop_instance_uid=sop_instance_uid),
        send_instance(association, instance(2)),
    ]
    association.release()

    assert answers == [status, 0x0000]
    assert [receipt.sop_instance_uid for receipt in receipts(receiver.spool)] == [f"{STUDY_UID}.1.2"]


def test_below_the_floor_the_sender_is_told_to_come_again(tmp_path: Path) -> None:
    """0xA700, nothing written, one log line that names the key."""
    with running(tmp_path / "spool", min_free_bytes=1 << 60) as receiver, capture_logs() as lines:
        association = associate(receiver.port)
        status = send_instance(association, instance())
        association.release()

        assert status == 0xA700
        assert receiver.spool.instances(STUDY_UID) == []
        assert receipts(receiver.spool) == []
    (line,) = [line for line in lines if line["event"] == "instance_refused"]
    assert line["status"] == "0xA700"
    assert "min_free_gb" in line["reason"]


@pytest.mark.parametrize(
    ("names", "answer", "remedy"),
    [
        ({"called_ae": "OTHER"}, (1, 1, 7), '[scp] ae_title = "OTHER" here, or call "MEDPRUNER" there'),
        (
            {"calling_ae": "STRANGER"},
            (1, 1, 3),
            '[[source]] ae_title = "STRANGER", or [scp] accept_unknown_sources = true',
        ),
        ({"calling_ae": "ELSEWHERE"}, (1, 1, 3), '[[source]] ae_title = "ELSEWHERE", host = "127.0.0.1"'),
    ],
    ids=["called", "calling", "host"],
)
def test_refused_association_says_why_and_what_would_allow_it(
    tmp_path: Path, names: dict[str, str], answer: tuple[int, int, int], remedy: str
) -> None:
    """The peer gets the reason of PS3.8; the log gets one line with both titles, the address and the remedy."""
    sources = (SourceSettings(ae_title=SENDER), SourceSettings(ae_title="ELSEWHERE", host="192.0.2.1"))
    with running(tmp_path / "spool", sources=sources) as receiver, capture_logs() as lines:
        assert rejection(associate(receiver.port, **names)) == answer
    (line,) = [line for line in lines if line["event"] == "association_refused"]
    assert line["remedy"] == remedy
    assert line["address"] == "127.0.0.1"
    assert line["calling_ae"] == names.get("calling_ae", SENDER)
    assert line["called_ae"] == names.get("called_ae", "MEDPRUNER")


def test_without_any_source_everybody_is_refused_and_the_start_says_so(tmp_path: Path) -> None:
    """A fresh installation lets nobody in until it is told whom."""
    with capture_logs() as lines, running(tmp_path / "spool", sources=()) as receiver:
        assert rejection(associate(receiver.port)) == (1, 1, 3)

    (line,) = [line for line in lines if line["event"] == "every_sender_is_refused"]
    assert "accept_unknown_sources" in line["remedy"]


def test_unknown_sources_are_accepted_when_configured(tmp_path: Path) -> None:
    """accept_unknown_sources lets any calling AE title in."""
    with running(tmp_path / "spool", sources=(), accept_unknown_sources=True) as receiver:
        association = associate(receiver.port, calling_ae="ANYBODY")
        status = send_instance(association, instance())
        association.release()

    assert status == 0x0000


def test_one_association_too_many_is_refused_for_now_only(tmp_path: Path) -> None:
    """At max_associations the next gets a transient refusal, and is let in when one has closed."""
    with running(tmp_path / "spool", max_associations=1) as receiver:
        first = associate(receiver.port)
        second = associate(receiver.port)
        assert rejection(second) == (2, 3, 2)
        first.release()

        attempts: list[Association] = []

        def is_let_in() -> bool:
            attempts.append(associate(receiver.port))
            return attempts[-1].is_established

        wait_until(is_let_in)
        attempts[-1].release()


def test_one_association_too_many_from_one_address_is_refused(tmp_path: Path) -> None:
    """One sender cannot take all the room; the log names the key."""
    with running(tmp_path / "spool", max_associations_per_address=1) as receiver, capture_logs() as lines:
        first, second = associate(receiver.port), associate(receiver.port)
        assert rejection(second) == (2, 3, 2)
        first.release()

        wait_until(lambda: associate(receiver.port).is_established)
    (line, *_) = [line for line in lines if line["event"] == "association_refused"]
    assert "max_associations_per_address" in line["remedy"]


def test_open_association_is_seen_by_its_studies_until_it_closes(receiver: Running) -> None:
    """Ingest can tell that a study is still being sent."""
    association = associate(receiver.port)
    assert receiver.spool.open_associations(datetime.now(UTC)) == []
    send_instance(association, instance(1))
    send_instance(association, instance(1, study_uid="1.2.3.4"))

    (opened,) = receiver.spool.open_associations(datetime.now(UTC))
    assert opened.study_keys == (key(STUDY_UID), key("1.2.3.4"))
    assert opened.calling_ae == SENDER
    association.release()
    wait_until(lambda: receiver.spool.open_associations(datetime.now(UTC)) == [])


def test_lost_connection_closes_the_association(receiver: Running) -> None:
    """A sender that vanishes holds its study no longer than the connection."""
    association = associate(receiver.port)
    send_instance(association, instance(1))
    association.abort()

    wait_until(lambda: receiver.spool.open_associations(datetime.now(UTC)) == [])
    assert len(receipts(receiver.spool)) == 1


def test_stopping_receiver_lets_an_open_association_finish(tmp_path: Path) -> None:
    """On SIGTERM nobody new is let in, and who is sending may end."""
    with running(tmp_path / "spool", grace_s=30) as receiver:
        association = associate(receiver.port)
        send_instance(association, instance(1))
        stopping = Thread(target=receiver.receiver.stop, args=(30,))
        stopping.start()
        wait_until(lambda: not takes_connections(receiver.port))
        status = send_instance(association, instance(2))
        association.release()
        stopping.join()

    assert status == 0x0000
    assert len(receipts(receiver.spool)) == 2


def takes_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except (ConnectionRefusedError, ConnectionResetError):  # reset: it waited in the backlog of a socket that closed
        return False
    return True


def test_stopping_receiver_aborts_what_does_not_finish(tmp_path: Path) -> None:
    """After the grace the association is aborted, and what it had stored stays."""
    with running(tmp_path / "spool") as receiver:
        association = associate(receiver.port)
        send_instance(association, instance(1))
        receiver.receiver.stop(0)

        wait_until(lambda: association.is_aborted)
        assert len(receipts(receiver.spool)) == 1


def test_receivers_share_no_spool(tmp_path: Path) -> None:
    """A second receiver on the same folder refuses to start, and starts once the first has stopped."""
    with running(tmp_path / "spool"), pytest.raises(Exception, match=r"\[spool\] path"), running(tmp_path / "spool"):
        pass
    with running(tmp_path / "spool") as receiver:
        assert receiver.port > 0


def test_no_patient_and_no_uid_reaches_the_log(tmp_path: Path) -> None:
    """Neither an honest instance nor a refused one leaves its names, ids or UIDs in a line."""
    with capture_logs() as lines, running(tmp_path / "spool") as receiver:
        association = associate(receiver.port)
        send_instance(association, instance())
        send(association, encode(instance(2)), sop_instance_uid="1.2.3")
        send(association, b"Planted^Patient" * 40)
        association.release()

    assert {"instance_stored", "instance_refused"} <= {line["event"] for line in lines}
    text = str(lines)
    assert [planted for planted in ("Planted", "PLANTED-1", STUDY_UID) if planted in text] == []


# --- dcmtk ---


@pytest.fixture
def dcmtk_receiver(tmp_path: Path) -> Iterator[Running]:
    sources = (SourceSettings(ae_title="ECHOSCU"), SourceSettings(ae_title="STORESCU"))
    with running(tmp_path / "spool", sources=sources) as started:
        yield started


def part_10(folder: Path, number: int = 1, syntax: str = ExplicitVRLittleEndian) -> Path:
    """A file of `instance`, encoded by the codec of pydicom for this syntax."""
    dataset = instance(number)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)
    path = folder / f"{number}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_echoscu_is_answered(dcmtk_receiver: Running) -> None:
    """dcmtk's echoscu ends with success."""
    done = dcmtk("echoscu", "-aec", "MEDPRUNER", "127.0.0.1", dcmtk_receiver.port)

    assert (done.returncode, done.stderr) == (0, "")


def test_echoscu_with_wrong_titles_is_told_which(dcmtk_receiver: Running) -> None:
    """dcmtk prints the reason that we sent."""
    called = dcmtk("echoscu", "-aec", "WRONG", "127.0.0.1", dcmtk_receiver.port)
    calling = dcmtk("echoscu", "-aet", "WRONG", "-aec", "MEDPRUNER", "127.0.0.1", dcmtk_receiver.port)

    assert "Called AE Title Not Recognized" in called.stderr
    assert "Calling AE Title Not Recognized" in calling.stderr


@pytest.mark.parametrize(
    ("of_file", "option", "stored_as"),
    [
        (ExplicitVRLittleEndian, "-xi", ImplicitVRLittleEndian),
        (ExplicitVRLittleEndian, "-xe", ExplicitVRLittleEndian),
        (ExplicitVRLittleEndian, "-xb", ExplicitVRLittleEndian),  # it offers little endian beside
        (JPEG2000Lossless, "-xv", JPEG2000Lossless),
        (JPEGLSLossless, "-xt", JPEGLSLossless),
        (RLELossless, "-xr", RLELossless),
    ],
)
def test_storescu_stores_what_it_has(
    dcmtk_receiver: Running, tmp_path: Path, of_file: str, option: str, stored_as: str
) -> None:
    """The pixels of a really encoded instance come back equal, in the syntax in which they were sent."""
    path = part_10(tmp_path, 3, of_file)
    done = dcmtk("storescu", option, "-aec", "MEDPRUNER", "127.0.0.1", dcmtk_receiver.port, path)

    assert (done.returncode, done.stderr) == (0, "")
    (receipt,) = place(dcmtk_receiver.spool)
    stored = pydicom.dcmread(dcmtk_receiver.spool.path / receipt.path)
    assert receipt.transfer_syntax_uid == stored.file_meta.TransferSyntaxUID == stored_as
    sent = pydicom.dcmread(path)
    assert (stored.pixel_array == sent.pixel_array).all()
    assert stored.PatientName == sent.PatientName


@pytest.mark.parametrize(("program", "option"), [("dcmcjpeg", "-xs"), ("dcmcjpls", "-xt")])
def test_storescu_stores_what_dcmtk_compressed(
    dcmtk_receiver: Running, tmp_path: Path, program: str, option: str
) -> None:
    """JPEG lossless and JPEG-LS of another codec than ours."""
    plain, small = part_10(tmp_path), tmp_path / "compressed.dcm"
    assert dcmtk(program, plain, small).returncode == 0
    done = dcmtk("storescu", option, "-aec", "MEDPRUNER", "127.0.0.1", dcmtk_receiver.port, small)

    assert (done.returncode, done.stderr) == (0, "")
    (receipt,) = place(dcmtk_receiver.spool)
    stored = pydicom.dcmread(dcmtk_receiver.spool.path / receipt.path)
    assert stored.PixelData == pydicom.dcmread(small).PixelData


def test_dcmsend_sends_a_mixed_folder(dcmtk_receiver: Running, tmp_path: Path) -> None:
    """CT, MR, a report, a dose and JPEG 2000 among pydicom's own samples, many contexts on one association."""
    names = ["CT_small.dcm", "MR_small_RLE.dcm", "reportsi.dcm", "rtdose.dcm", "JPEG2000.dcm", "SC_rgb_jpeg_dcmtk.dcm"]
    for name in names:
        shutil.copy(str(get_testdata_file(name)), tmp_path / name)
    done = dcmtk(
        "dcmsend", "-aet", "STORESCU", "-aec", "MEDPRUNER", "--decompress-never",
        "127.0.0.1", dcmtk_receiver.port, *(tmp_path / name for name in names),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    stored = {receipt.sop_instance_uid: receipt for receipt in place(dcmtk_receiver.spool)}
    for name in names:
        sent = pydicom.dcmread(tmp_path / name)
        receipt = stored[sent.SOPInstanceUID]
        syntax = sent.file_meta.TransferSyntaxUID
        assert receipt.transfer_syntax_uid == (syntax if syntax.is_encapsulated else ExplicitVRLittleEndian)
        assert receipt.sop_class_uid == sent.SOPClassUID


# --- kills ---

RECEIVER_PROGRAM = """
import signal, sys
from pathlib import Path
from service.receive import ENDS, run
from service.receiver import Receiver
from service.shared.log import set_up_logging
from service.shared.settings import LogSettings, ScpSettings, SourceSettings
from service.spool import Spool
set_up_logging(LogSettings(level="ERROR"), role="receive")
scp = ScpSettings.model_validate_json(sys.argv[2])
receiver = Receiver(scp, (SourceSettings(ae_title="SENDER"),), Spool(Path(sys.argv[1]), 0))
receiver.listen()
print(receiver.port, flush=True)
signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
run(receiver, scp.processes, lambda timeout_s: signal.sigtimedwait(ENDS, timeout_s) is not None)
"""


def start_receiver(folder: Path, **scp: Any) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", RECEIVER_PROGRAM, str(folder), ScpSettings(**{"port": 0} | scp).model_dump_json()],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def send_until_cut(
    port: int, numbers: Iterator[int], acknowledged: list[int], tls: ssl.SSLContext | None = None
) -> None:
    """Send instances until the receiver dies; note every one that it answered with Success."""
    association = associate(port, tls=tls)
    while association.is_established:
        number = next(numbers)
        try:
            status = send_instance(association, instance(number))
        except (RuntimeError, OSError):
            break
        if status != 0x0000:
            break
        acknowledged.append(number)
    association.abort()


@pytest.mark.kills
def test_receiver_ends_with_any_of_its_processes_and_begins_again(tmp_path: Path) -> None:
    """What a killed copy had open is recovered by a start alone, nobody goes on half deaf; a planned end is clean."""
    process, port = start_receiver(tmp_path / "spool", processes=3)
    associations = [associate(port) for _ in range(6)]
    assert [send_instance(one, instance(number)) for number, one in enumerate(associations)] == [0x0000] * 6
    copies = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(copies) == 2

    os.kill(int(copies[0]), signal.SIGKILL)
    process.wait(20)

    wait_until(lambda: not any(Path(f"/proc/{copy}").exists() for copy in copies))
    again, port = start_receiver(tmp_path / "spool", processes=3)
    assert send_instance(associate(port), instance(6)) == 0x0000
    again.send_signal(signal.SIGTERM)
    assert again.wait(40) == 0
    assert list((tmp_path / "spool" / "incoming").glob("*.slot")) == []
    assert [receipt.sop_instance_uid for receipt in receipts(Spool(tmp_path / "spool", 0))] == [
        f"{STUDY_UID}.1.{number}" for number in range(7)
    ]
    for ended in (process, again):
        assert ended.stdout is not None
        ended.stdout.close()


@pytest.mark.parametrize("limit", ["max_associations", "max_associations_per_address"])
def test_processes_of_a_receiver_share_its_limits(tmp_path: Path, limit: str) -> None:
    """Whichever of them takes the connection."""
    process, port = start_receiver(tmp_path / "spool", processes=3, **{limit: 4})
    try:
        associations = [associate(port) for _ in range(7)]
        assert [one.is_established for one in associations] == [True] * 4 + [False] * 3
        assert {rejection(one) for one in associations[4:]} == {(2, 3, 2)}
        associations[0].release()
        wait_until(lambda: associate(port).is_established)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.kills
@pytest.mark.parametrize("secured", [False, True], ids=["plain", "tls"])
def test_killed_receiver_loses_nothing_that_it_acknowledged(tmp_path: Path, secured: bool) -> None:
    """SIGKILL at random moments while two senders store: every Success is on disk, bit for bit, with its receipt."""
    folder, chance = tmp_path / "spool", random.Random(2)
    acknowledged: list[int] = []
    scp: dict[str, Any] = {}
    tls = None
    if secured:
        ca = authority(tmp_path)
        own = issue(ca, tmp_path, "server")
        tls = client_context(ca=ca.certificate)
        scp = {"tls_port": free_port(), "tls_certificate": own.certificate, "tls_key": own.key}
    for round_number in range(6):
        process, port = start_receiver(folder, **scp)
        senders = []
        for sender in range(2):
            numbers = iter(range(20_000 * sender + 3000 * round_number, 100_000))
            senders.append(Thread(target=send_until_cut, args=(port, numbers, acknowledged, tls)))
        for thread in senders:
            thread.start()
        enough = len(acknowledged) + 1 + chance.randrange(20)
        wait_until(lambda enough=enough: len(acknowledged) >= enough)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        for thread in senders:
            thread.join()

    spool = Spool(folder, 0)
    spool.claim(2.0)
    spool.recover()
    spool.release()
    named = {receipt.sop_instance_uid: receipt for receipt in place(spool)}
    assert len(acknowledged) >= 6
    assert list((folder / "incoming").glob("*.slot")) == []
    for number in acknowledged:
        receipt = named[f"{STUDY_UID}.1.{number}"]
        assert data_set_bytes(folder / receipt.path) == encode(instance(number))
        assert receipt.sha256 == sha256(encode(instance(number))).hexdigest()
    for receipt in named.values():
        assert sha256(data_set_bytes(folder / receipt.path)).hexdigest() == receipt.sha256
