"""What the tests of the receiver share: a receiver on a free port, instances to send, and a peer that sends bytes.

The pynetdicom peer goes below its own checks, so that it can send what no honest sender would.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, Association, build_context, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu import A_ASSOCIATE_RJ, A_ASSOCIATE_RQ, P_DATA_TF
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
)

from service.answers import keep_answers
from service.receiver import Receiver
from service.shared.settings import ScpSettings, SourceSettings
from service.spool import RECEIPT_BYTES, Receipt, Spool

SENDER = "SENDER"
STUDY_UID = "1.2.826.0.1.3680043.10.1.1"


_connections: list[socket.socket] = []  # of our peers: pynetdicom leaves some of its own open
_rejections: dict[Association, tuple[int, int, int]] = {}


@dataclass(frozen=True)
class Running:
    receiver: Receiver
    spool: Spool
    port: int


@contextmanager
def running(
    folder: Path,
    *,
    sources: tuple[SourceSettings, ...] = (SourceSettings(ae_title=SENDER),),
    min_free_bytes: int = 0,
    grace_s: float = 0.0,
    vouching: frozenset[tuple[str, str]] = frozenset(),
    **scp: Any,
) -> Iterator[Running]:
    """A receiver on a free port of the loopback; what is still open at the end is aborted after `grace_s`."""
    spool = Spool(folder, min_free_bytes)
    receiver = Receiver(ScpSettings(**{"port": 0, "processes": 1} | scp), sources, spool, vouching=vouching)
    receiver.listen()
    receiver.start()
    try:
        yield Running(receiver, spool, receiver.port)
    finally:
        receiver.stop(grace_s)
        while _connections:
            _connections.pop().close()
        _rejections.clear()


@contextmanager
def accepting(
    entity: AE, address: tuple[str, int], handlers: list[Any], tls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """pynetdicom's peer as it accepts associations; its port. A peer that is gone before its association begins leaves
    its own connection open: all are closed in the end.
    """
    connections: list[socket.socket] = []
    opened = (evt.EVT_CONN_OPEN, lambda event: connections.append(event.assoc.dul.socket.socket))
    server = entity.start_server(address, block=False, evt_handlers=[*handlers, opened], ssl_context=tls)
    assert server is not None
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        for connection in connections:
            connection.close()


def after_answer(association: Association, act: Callable[[], None]) -> None:
    """Run `act` on its own thread once the request that is being handled has its answer, of one PDU: a peer that began
    before would mix the fragments of two messages.
    """

    def sent(event: evt.Event) -> None:
        if isinstance(event.pdu, P_DATA_TF):
            association.unbind(evt.EVT_PDU_SENT, sent)
            threading.Thread(target=act, daemon=True).start()

    association.bind(evt.EVT_PDU_SENT, sent)


def instance(number: int = 1, *, study_uid: str = STUDY_UID, sop_class_uid: str = CTImageStorage) -> Dataset:
    """A small native CT instance, told from others by `number`."""
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = sop_class_uid
    dataset.SOPInstanceUID = f"{study_uid}.1.{number}"
    dataset.Modality = "CT"
    dataset.PatientName = "Planted^Patient"
    dataset.PatientID = "PLANTED-1"
    dataset.StudyInstanceUID = study_uid
    dataset.SeriesInstanceUID = f"{study_uid}.1"
    dataset.InstanceNumber = number
    dataset.Rows = dataset.Columns = 64
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 0
    dataset.PixelData = struct.pack("<H", number % 65536) * 1024 + bytes(range(256)) * 24
    dataset["PixelData"].VR = "OW"
    return dataset


def compressed(number: int = 1, **identity: Any) -> Dataset:
    """The same with two fragments of no meaning where a compressed frame would be."""
    dataset = instance(number, **identity)
    dataset.NumberOfFrames = 2
    dataset.PixelData = encapsulate([bytes(range(100)), bytes(range(50))])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return dataset


def encode(dataset: Dataset, transfer_syntax_uid: str = ExplicitVRLittleEndian) -> bytes:
    """The data set as it would go over the wire, less a deflation."""
    syntax = UID(transfer_syntax_uid)
    stream = DicomBytesIO()
    stream.is_little_endian = syntax.is_little_endian
    stream.is_implicit_VR = syntax.is_implicit_VR
    write_dataset(stream, dataset)
    return stream.getvalue()


def associate(
    port: int,
    contexts: dict[str, list[str]] | list[tuple[str, list[str]]] | None = None,
    *,
    calling_ae: str = SENDER,
    called_ae: str = "MEDPRUNER",
    max_pdu_bytes: int = 16382,
    tls: ssl.SSLContext | None = None,
    roles: Sequence[Any] = (),
) -> Association:
    """Ask for an association with the given (class, transfer syntaxes); look at `is_established` for the answer."""
    entity = AE(calling_ae)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 20
    wanted = contexts if contexts is not None else [(CTImageStorage, [ExplicitVRLittleEndian])]
    pairs = wanted.items() if isinstance(wanted, dict) else wanted
    association = entity.associate(
        "127.0.0.1",
        port,
        contexts=[build_context(abstract_syntax, syntaxes) for abstract_syntax, syntaxes in pairs],
        ae_title=called_ae,
        max_pdu=max_pdu_bytes,
        evt_handlers=[(evt.EVT_CONN_OPEN, _remember_connection), (evt.EVT_PDU_RECV, _remember_rejection)],
        ext_neg=list(roles),
        tls_args=None if tls is None else (tls, "127.0.0.1"),
    )
    return keep_answers(association)


def rejection(association: Association) -> tuple[int, int, int] | None:
    """Result, source and reason of the A-ASSOCIATE-RJ that came, if one did.

    Not from the association: where the end of the connection follows closely, it may say that it was aborted.
    """
    return _rejections.get(association)


def _remember_connection(event: evt.Event) -> None:
    _connections.append(event.assoc.dul.socket.socket)


def _remember_rejection(event: evt.Event) -> None:
    if isinstance(event.pdu, A_ASSOCIATE_RJ):
        _rejections[event.assoc] = event.pdu.result, event.pdu.source, event.pdu.reason_diagnostic


def send(
    association: Association,
    data_set: bytes,
    *,
    sop_class_uid: str | None = CTImageStorage,
    sop_instance_uid: str | None = f"{STUDY_UID}.1.1",
    transfer_syntax_uid: str = ExplicitVRLittleEndian,
) -> int | None:
    """C-STORE exactly these bytes under this command; the status, or None when no answer came."""
    context = next(
        context for context in association.accepted_contexts if context.transfer_syntax[0] == transfer_syntax_uid
    )
    request = C_STORE()
    request.MessageID = 7
    request.AffectedSOPClassUID = sop_class_uid
    request.AffectedSOPInstanceUID = sop_instance_uid
    request.Priority = 2
    request.DataSet = BytesIO(data_set)
    association._reactor_checkpoint.clear()
    while not association._is_paused:
        time.sleep(0.0001)
    try:
        association.dimse.send_msg(request, context.context_id)
        _, response = association.dimse.get_msg(block=True)
    finally:
        association._reactor_checkpoint.set()
    return response.Status if response is not None else None


def send_instance(association: Association, dataset: Dataset) -> int | None:
    """C-STORE the data set in Explicit VR Little Endian under the UIDs that it holds."""
    return send(
        association,
        encode(dataset),
        sop_class_uid=dataset.SOPClassUID,
        sop_instance_uid=dataset.SOPInstanceUID,
    )


def receipts(spool: Spool) -> list[Receipt]:
    """Of what waits for ingest, in order of arrival."""
    return [spool.read(path) for path in spool.incoming()]


def place(spool: Spool) -> list[Receipt]:
    """The same, after what waits has its names under studies/: the first thing that ingest does."""
    waiting = [(path, spool.read(path)) for path in spool.incoming()]
    spool.place(waiting)
    return [receipt for _, receipt in waiting]


def data_set_bytes(path: Path) -> bytes:
    """What follows the file meta information of a Part 10 file (PS3.10 7.1)."""
    content = path.read_bytes()
    assert content[128:132] == b"DICM"
    (length,) = struct.unpack("<L", content[140:144])
    return content[144 + length :]


def arriving(spool: Spool) -> list[Path]:
    """Slots in which something was written: nothing may be left of what was not acknowledged."""
    return [path for path in (spool.path / "incoming").glob("*.slot") if path.stat().st_size]


def rewrite_receipt(path: Path, change: Callable[[str], str]) -> None:
    """Change the receipt that an instance holds, and nothing else of it."""
    content = path.read_bytes()
    end = len(content) - len(data_set_bytes(path))
    receipt = content[end - RECEIPT_BYTES : end].decode().rstrip()
    path.write_bytes(content[: end - RECEIPT_BYTES] + change(receipt).encode().ljust(RECEIPT_BYTES) + content[end:])


def as_version_0_1(spool: Spool, waiting: Path) -> Path:
    """Turn an instance that waits into what version 0.1 left: the receipt in a file of its own, which is returned."""
    receipt, instance_path = spool.read(waiting), spool.path / spool.read(waiting).path
    content = waiting.read_bytes()
    end = len(content) - len(data_set_bytes(waiting))
    elements = content[144 : content.index(struct.pack("<HH2s", 0x0002, 0x0100, b"UI"))]
    instance_path.parent.mkdir(exist_ok=True)
    instance_path.write_bytes(content[:140] + struct.pack("<L", len(elements)) + elements + content[end:])
    beside = waiting.with_suffix(".json")
    beside.write_bytes(receipt.to_json().replace(b'{"version": 1,', b'{"version": 1, "duplicate": false,'))
    waiting.unlink()
    return beside


def wait_until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Return as soon as it holds; fail the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.005)


def association_request(*, calling_ae: str = SENDER, called_ae: str = "MEDPRUNER") -> bytes:
    """An A-ASSOCIATE-RQ for CT in Explicit and Implicit VR Little Endian, as bytes."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.calling_ae_title = calling_ae
    primitive.called_ae_title = called_ae
    context = build_context(CTImageStorage, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    context.context_id = 1
    primitive.presentation_context_definition_list = [context]
    length = MaximumLengthNotification()
    length.maximum_length_received = 16382
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = UID("1.2.826.0.1.3680043.10.9")
    primitive.user_information = [length, implementation]
    return bytes(A_ASSOCIATE_RQ(primitive).encode())


def p_data(fragment: bytes, *, command: bool, last: bool, context_id: int = 1) -> bytes:
    """One P-DATA-TF PDU that holds one fragment (PS3.8 9.3.5)."""
    value = bytes([context_id, command | last << 1]) + fragment
    return struct.pack(">BxLL", 4, len(value) + 4, len(value)) + value


def store_command(
    *, sop_class_uid: str = CTImageStorage, sop_instance_uid: str = f"{STUDY_UID}.1.1", message_id: int = 1
) -> bytes:
    """A C-STORE-RQ command set (PS3.7 9.3.1.1), in Implicit VR Little Endian as always."""
    command = Dataset()
    command.AffectedSOPClassUID = sop_class_uid
    command.CommandField = 0x0001
    command.MessageID = message_id
    command.Priority = 0
    command.CommandDataSetType = 0x0001
    command.AffectedSOPInstanceUID = sop_instance_uid
    body = encode(command, ImplicitVRLittleEndian)
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body
