"""Each transfer syntax with dcmtk, Orthanc and pynetdicom as sender and as receiver: the bytes on disk are the same."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AE, evt

from service import sender
from service.receiver import TRANSFER_SYNTAXES
from service.shared.settings import SourceSettings
from service.spool import file_header
from tests.receiving import SENDER, Running, accepting, compressed, data_set_bytes, encode, instance, place, running
from tests.running import listens
from tests.servers import Modality, Orthanc, Server, dcmsend, find_program, free_port, storescu

NATIVE = {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian}
STUDY_UID = "2.25.880"
# storescu's options; it offers Little Endian beside Big Endian, and sends that where it is taken
OPTIONS = {
    ImplicitVRLittleEndian: "-xi",
    ExplicitVRLittleEndian: "-xe",
    DeflatedExplicitVRLittleEndian: "-xd",
    "1.2.840.10008.1.2.4.50": "-xy",
    "1.2.840.10008.1.2.4.51": "-xx",
    "1.2.840.10008.1.2.4.70": "-xs",
    "1.2.840.10008.1.2.4.80": "-xt",
    "1.2.840.10008.1.2.4.81": "-xu",
    "1.2.840.10008.1.2.4.90": "-xv",
    "1.2.840.10008.1.2.4.91": "-xw",
    "1.2.840.10008.1.2.4.100": "-xm",
    "1.2.840.10008.1.2.4.101": "-xh",
    "1.2.840.10008.1.2.4.102": "-xn",
    "1.2.840.10008.1.2.4.103": "-xl",
    "1.2.840.10008.1.2.4.104": "-x2",
    "1.2.840.10008.1.2.4.105": "-x3",
    "1.2.840.10008.1.2.4.106": "-xo",
    "1.2.840.10008.1.2.4.107": "-x4",
    "1.2.840.10008.1.2.4.108": "-x5",
    "1.2.840.10008.1.2.5": "-xr",
}
ENCAPSULATED = [uid for uid in OPTIONS if uid not in NATIVE]
EVERY = sorted(TRANSFER_SYNTAXES)


def uid(syntax: str) -> str:
    return f"{STUDY_UID}.{EVERY.index(syntax) + 1}"


def data_set(syntax: str) -> bytes:
    """A small CT instance as it is encoded in this syntax; compressed frames hold bytes without a meaning."""
    made = instance if syntax in NATIVE else compressed
    dataset = made(EVERY.index(syntax), study_uid=STUDY_UID)
    dataset.SOPInstanceUID = uid(syntax)
    content = encode(dataset, syntax)
    if syntax == DeflatedExplicitVRLittleEndian:
        compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        content = compressor.compress(content) + compressor.flush()
        content += b"\0" * (len(content) % 2)
    return content


def file_of(folder: Path, syntax: str) -> Path:
    path = folder / f"{EVERY.index(syntax):02d}.dcm"
    path.write_bytes(file_header(CTImageStorage, uid(syntax), syntax) + data_set(syntax))
    return path


def plain(content: bytes, syntax: str) -> bytes:
    """What is inside of a deflated data set; two programs deflate the same bytes differently."""
    if syntax != DeflatedExplicitVRLittleEndian:
        return content
    return zlib.decompressobj(wbits=-zlib.MAX_WBITS).decompress(content)


def stored(receiver: Running) -> dict[tuple[str, str], bytes]:
    """By SOP Instance UID and transfer syntax, what lies in the spool."""
    return {
        (receipt.sop_instance_uid, receipt.transfer_syntax_uid): data_set_bytes(receiver.spool.path / receipt.path)
        for receipt in place(receiver.spool)
    }


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Running]:
    sources = tuple(SourceSettings(ae_title=title) for title in (SENDER, "PACS"))
    with running(tmp_path / "spool", sources=sources) as started:
        yield started


# --- they send ------------------------------------------------------------------------------------------------------


def test_storescu_sends_each_syntax_that_it_knows(receiver: Running, tmp_path: Path) -> None:
    """One call for each, with the option that proposes it."""
    for syntax, option in OPTIONS.items():
        sent = storescu([file_of(tmp_path, syntax)], receiver.port, called="MEDPRUNER", options=[option])
        assert sent.returncode == 0, f"{UID(syntax).name}: {sent.stdout}{sent.stderr}"

    kept = stored(receiver)
    assert {key: plain(content, key[1]) for key, content in kept.items()} == {
        (uid(syntax), syntax): plain(data_set(syntax), syntax) for syntax in OPTIONS
    }


def test_dcmsend_sends_every_compressed_syntax_over_one_association(receiver: Running, tmp_path: Path) -> None:
    """A mixed folder, nothing decompressed on the way."""
    files = [file_of(tmp_path, syntax) for syntax in ENCAPSULATED]

    sent = dcmsend(files, receiver.port, called="MEDPRUNER")

    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert stored(receiver) == {(uid(syntax), syntax): data_set(syntax) for syntax in ENCAPSULATED}


def test_orthanc_sends_compressed_originals_as_it_holds_them(receiver: Running, tmp_path: Path) -> None:
    """Its own copy, by the REST API, is what lies in the spool."""
    modalities = {"us": Modality("MEDPRUNER", receiver.port)}
    with Orthanc(tmp_path / "orthanc", modalities=modalities) as orthanc:
        for syntax in ENCAPSULATED:
            orthanc.upload(file_of(tmp_path, syntax))
        orthanc.send_study(STUDY_UID, to="us")

    assert stored(receiver) == {(uid(syntax), syntax): data_set(syntax) for syntax in ENCAPSULATED}


def test_our_sender_and_receiver_keep_every_syntax(receiver: Running, tmp_path: Path) -> None:
    """pynetdicom as the sender: `send` of a folder with all of them, also those that no other tool here knows."""
    folder = tmp_path / "files"
    folder.mkdir()
    for syntax in EVERY:
        file_of(folder, syntax)

    sent = sender.send_study(folder, host="127.0.0.1", port=receiver.port, called_ae="MEDPRUNER", calling_ae=SENDER)

    assert {one.status for one in sent} == {0x0000}
    assert stored(receiver) == {(uid(syntax), syntax): data_set(syntax) for syntax in EVERY}


# --- they receive ---------------------------------------------------------------------------------------------------


def send(folder: Path, port: int, syntaxes: list[str]) -> set[int | None]:
    """Send a file of each syntax to a PACS; the statuses."""
    files = folder / "files"
    files.mkdir()
    for syntax in syntaxes:
        file_of(files, syntax)
    sent = sender.send_study(files, host="127.0.0.1", port=port, called_ae="PACS", calling_ae="MEDPRUNER")
    return {one.status for one in sent}


class AcceptsAll(Server):
    """dcmtk's storescp that takes every syntax it knows and keeps the bytes."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.kept = folder / "kept"
        self.kept.mkdir(parents=True)
        options = ["-aet", "PACS", "--accept-all", "--bit-preserving", "-od", str(self.kept), str(self.port)]
        super().__init__(folder, [find_program("storescp"), *options])

    def is_ready(self) -> bool:
        return listens(self.port)


def test_storescp_keeps_what_we_send_in_each_syntax(tmp_path: Path) -> None:
    """Byte for byte, on one association."""
    with AcceptsAll(tmp_path / "storescp") as scp:
        assert send(tmp_path, scp.port, list(OPTIONS)) == {0x0000}
        kept = {}
        for path in scp.kept.iterdir():
            meta = pydicom.filereader.read_file_meta_info(path)
            kept[str(meta.MediaStorageSOPInstanceUID), str(meta.TransferSyntaxUID)] = data_set_bytes(path)

    assert kept == {(uid(syntax), syntax): data_set(syntax) for syntax in OPTIONS}


def test_orthanc_keeps_what_we_send_in_each_syntax(tmp_path: Path) -> None:
    """Byte for byte."""
    with Orthanc(tmp_path / "orthanc") as orthanc:
        assert send(tmp_path, orthanc.port, ENCAPSULATED) == {0x0000}
        kept = {}
        for one in orthanc.find("Instance", StudyInstanceUID=STUDY_UID):
            path = tmp_path / "fetched.dcm"
            path.write_bytes(orthanc.file(one))
            meta = pydicom.filereader.read_file_meta_info(path)
            kept[str(meta.MediaStorageSOPInstanceUID), str(meta.TransferSyntaxUID)] = data_set_bytes(path)

    assert kept == {(uid(syntax), syntax): data_set(syntax) for syntax in ENCAPSULATED}


def test_pynetdicom_receives_what_we_send_in_every_syntax(tmp_path: Path) -> None:
    """Also HTJ2K, Big Endian and what is newer than dcmtk."""
    kept: dict[tuple[str, str], bytes] = {}

    def store(event: evt.Event) -> int:
        request: Any = event.request
        kept[str(request.AffectedSOPInstanceUID), str(event.context.transfer_syntax)] = request.DataSet.getvalue()
        return 0x0000

    entity = AE("PACS")
    entity.add_supported_context(CTImageStorage, EVERY)
    with accepting(entity, ("127.0.0.1", 0), [(evt.EVT_C_STORE, store)]) as port:
        assert send(tmp_path, port, EVERY) == {0x0000}

    assert kept == {(uid(syntax), syntax): data_set(syntax) for syntax in EVERY}
