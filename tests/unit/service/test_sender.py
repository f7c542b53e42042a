"""A folder of DICOM files to a receiver, as `send` and the demo do it: our own receiver, and one that is choosy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage
from pynetdicom import AE, evt

from service.sender import CannotSend, Sent, dicom_files, send_study
from service.spool import file_header
from tests.receiving import accepting, encode, instance, receipts, running
from tests.servers import free_port

# pynetdicom drops the socket of a refused connection without closing it; CPython closes it in the same moment
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


def write(path: Path, dataset: Dataset) -> Path:
    """The instance as a Part 10 file."""
    header = file_header(str(dataset.SOPClassUID), str(dataset.SOPInstanceUID), str(ExplicitVRLittleEndian))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + encode(dataset))
    return path


def send(
    folder: Path, port: int, host: str = "127.0.0.1", on_sent: Callable[[Sent], None] = lambda sent: None
) -> list[Sent]:
    return send_study(folder, host=host, port=port, called_ae="MEDPRUNER", calling_ae="SENDER", on_sent=on_sent)


def test_every_dicom_file_below_the_folder_is_sent(tmp_path: Path) -> None:
    """In order of name, whatever it is called; what is no DICOM file is passed over."""
    folder = tmp_path / "study"
    for name, number in (("b/IM1", 2), ("a.dcm", 1), ("c", 3)):
        write(folder / name, instance(number))
    (folder / "readme.txt").write_text("no DICOM")
    (folder / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 50)
    (folder / "empty").touch()
    told: list[Path] = []

    with running(tmp_path / "spool") as receiver:
        sent = send(folder, receiver.port, on_sent=lambda one: told.append(one.file))

        assert len(receipts(receiver.spool)) == 3
    assert all(one.stored for one in sent)
    assert [one.file.name for one in sent] == ["a.dcm", "IM1", "c"]
    assert told == [one.file for one in sent]


def test_files_keep_their_class_and_transfer_syntax(tmp_path: Path) -> None:
    """What a presentation context is asked for."""
    path = write(tmp_path / "one", instance(1))

    assert dicom_files(tmp_path) == [(path, CTImageStorage, ExplicitVRLittleEndian)]


def test_folder_without_dicom_files_is_refused(tmp_path: Path) -> None:
    """Before anybody is called."""
    with pytest.raises(CannotSend, match="no DICOM files"):
        send(tmp_path, free_port())


def test_receiver_that_does_not_know_the_sender_is_explained(tmp_path: Path) -> None:
    """With the key that would allow it."""
    write(tmp_path / "study" / "one", instance(1))

    with (
        running(tmp_path / "spool", sources=()) as receiver,
        pytest.raises(CannotSend, match=r"\[\[source\]\] ae_title"),
    ):
        send(tmp_path / "study", receiver.port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b"])
def test_host_that_has_no_address_is_explained(tmp_path: Path, host: str) -> None:
    """No traceback of the resolver."""
    write(tmp_path / "one", instance(1))

    with pytest.raises(CannotSend, match="no such host"):
        send(tmp_path, 104, host=host)


def test_file_that_is_not_taken_does_not_keep_the_others(tmp_path: Path) -> None:
    """A receiver that accepts one class of two, and refuses one instance of it."""
    write(tmp_path / "1", instance(1))
    write(tmp_path / "2", instance(2, sop_class_uid=MRImageStorage))
    write(tmp_path / "3", instance(3))
    write(tmp_path / "4", instance(4))
    statuses = iter([0x0000, 0xA700, 0xB007])
    application = AE("MEDPRUNER")
    application.add_supported_context(CTImageStorage)

    with accepting(application, ("127.0.0.1", 0), [(evt.EVT_C_STORE, lambda event: next(statuses))]) as port:
        sent = send(tmp_path, port)

    assert [one.status for one in sent] == [0x0000, None, 0xA700, 0xB007]
    assert [one.stored for one in sent] == [True, False, False, True]
