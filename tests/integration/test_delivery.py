"""Delivery to real Storage SCPs on loopback: pynetdicom answering what a test wants, and dcmtk's storescp."""

from __future__ import annotations

import gc
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import (
    BasicTextSRStorage,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    RLELossless,
)
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from sqlalchemy.orm import Session, sessionmaker

from service import certificates, delivery, requestor
from service.shared import delivery_transitions
from service.shared.db import Delivery, DeliveryState, Result
from service.shared.durable import digest
from service.shared.settings import DestinationSettings, ScpSettings, Settings
from service.spool import Arrival, file_header
from tests.certificates import Pair, authority, issue
from tests.receiving import accepting, data_set_bytes, encode
from tests.rows import (
    NOW,
    add_analysis,
    add_study,
    deliveries,
    finish,
    get,
    kinds,
    open_database,
    read,
    result,
)
from tests.servers import Server, echoscu, find_program, free_port

# pynetdicom drops the socket of a refused connection without closing it; CPython closes it in the same moment, after a
# handshake that failed only when it collects garbage: here, where that is allowed, and not in the tests that come after
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning"),
]
OTHER_LOOPBACK = "127.0.0.2"  # an address that the certificate of the PACS does not name

SR_CLASSES = (Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage)
SR_KINDS = {
    "comprehensive3d": Comprehensive3DSRStorage,
    "comprehensive": ComprehensiveSRStorage,
    "enhanced": EnhancedSRStorage,
    "basic_text": BasicTextSRStorage,
}


@dataclass
class Pacs:
    """A Storage SCP that answers as told and keeps the bytes that it was sent."""

    port: int = 0
    statuses: list[int] = field(default_factory=list)  # one after the other; then Success
    on_store: Callable[[evt.Event], None] | None = None
    received: list[tuple[str, bytes]] = field(default_factory=list)  # SOP Instance UID, data set
    calling: list[str] = field(default_factory=list)

    def note(self, event: evt.Event) -> None:
        self.calling.append(str(event.assoc.requestor.primitive.calling_ae_title))  # type: ignore[union-attr]

    def store(self, event: evt.Event) -> int:
        if self.on_store:
            self.on_store(event)
        self.received.append((str(event.request.AffectedSOPInstanceUID), event.request.DataSet.getvalue()))  # type: ignore[union-attr]
        return self.statuses.pop(0) if self.statuses else 0x0000


@contextmanager
def listening(
    pacs: Pacs,
    *,
    classes: tuple[str, ...] = SR_CLASSES,
    syntaxes: tuple[str, ...] = (ImplicitVRLittleEndian, ExplicitVRLittleEndian),
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
    **entity: Any,
) -> Iterator[Pacs]:
    """The SCP on its port, or on a free one."""
    application = AE("PACS")
    for name, value in entity.items():
        setattr(application, name, value)
    for uid in classes:
        application.add_supported_context(uid, list(syntaxes))
    handlers: list[Any] = [(evt.EVT_C_STORE, pacs.store), (evt.EVT_REQUESTED, pacs.note)]
    with accepting(application, (host, pacs.port), handlers, tls) as pacs.port:
        yield pacs
    if tls is not None:
        gc.collect()


@dataclass
class Outbox:
    """Results on disk and on record, and a destination that they wait for."""

    data: Path
    sessions: sessionmaker[Session]
    study_id: int
    count: int = 0

    def add_report(self, *kinds: str) -> list[int]:
        """One analysis with the same report in several classes, of which the first is to be delivered."""
        self.count += 1
        analysis_id = add_analysis(self.sessions, self.study_id, run_number=self.count)
        read(self.sessions, analysis_id)
        results = []
        for kind in kinds:
            uid = f"2.25.4000.{analysis_id}.{kind}"
            sop_class_uid = SR_KINDS[kind]
            whole = part_10(peculiar(), sop_class_uid, uid)
            path = self.data / "outbox" / f"{analysis_id}-{kind}.dcm"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(whole)
            row = result(
                analysis_id,
                kind=f"sr-{kind}",
                sop_class_uid=sop_class_uid,
                sop_instance_uid=uid,
                path=str(path.relative_to(self.data)),
                sha256=digest(whole),
            )
            results.append((row, ["pacs"] if kind == kinds[0] else []))
        assert finish(self.sessions, analysis_id, *results)
        return deliveries(self.sessions, analysis_id)

    def add(self, *contents: bytes, sop_class_uid: str = Comprehensive3DSRStorage) -> list[int]:
        """Pending deliveries of one analysis with one result for each data set."""
        uids = [f"2.25.4000.{self.count + 1}.{number}" for number in range(len(contents))]
        wholes = [part_10(content, sop_class_uid, uid) for content, uid in zip(contents, uids, strict=True)]
        return self.add_whole(*wholes, sop_class_uid=sop_class_uid)

    def add_whole(self, *wholes: bytes, sop_class_uid: str) -> list[int]:
        """The same for whole files."""
        self.count += 1
        analysis_id = add_analysis(self.sessions, self.study_id, run_number=self.count)
        read(self.sessions, analysis_id)
        results = []
        for number, whole in enumerate(wholes):
            uid = f"2.25.4000.{analysis_id}.{number}"
            path = self.data / "outbox" / f"{analysis_id}-{number}.dcm"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(whole)
            row = result(
                analysis_id,
                sop_class_uid=sop_class_uid,
                sop_instance_uid=uid,
                path=str(path.relative_to(self.data)),
                sha256=digest(whole),
                size_bytes=len(whole),
            )
            results.append((row, ["pacs"]))
        assert finish(self.sessions, analysis_id, *results)
        return deliveries(self.sessions, analysis_id)

    def deliver(self, port: int, *, later: bool = False, share: int = 0, **changes: Any) -> int:
        """Send what is due; `later`: after every back-off."""
        fields = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": port, "timeout_s": 5}
        destination = DestinationSettings.model_validate(fields | changes)
        settings = Settings.model_validate({"data": {"path": self.data}})
        now = datetime.now(UTC) + timedelta(days=1) if later else NOW
        return delivery.deliver_due(settings, destination, self.sessions, now, share=share)

    def row(self, delivery_id: int) -> Delivery:
        found: Delivery = get(self.sessions, Delivery, delivery_id)
        return found

    def file(self, delivery_id: int) -> Path:
        return self.data / get(self.sessions, Result, self.row(delivery_id).result_id).path


@pytest.fixture
def outbox(tmp_path: Path, sqlite_url: str) -> Iterator[Outbox]:
    with open_database(sqlite_url) as sessions:
        yield Outbox(tmp_path, sessions, add_study(sessions))


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    with listening(Pacs()) as listener:
        yield listener


def part_10(data_set: bytes, sop_class_uid: str, sop_instance_uid: str) -> bytes:
    arrival = Arrival(
        study_uid="2.25.1",
        series_uid="2.25.2",
        sop_class_uid=sop_class_uid,
        sop_instance_uid=sop_instance_uid,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        modality="SR",
        calling_ae="",
        called_ae="",
        peer_address="",
        association_id="",
    )
    return file_header(arrival.sop_class_uid, arrival.sop_instance_uid, arrival.transfer_syntax_uid) + data_set


def peculiar(number: int = 0) -> bytes:
    """A data set that any decoding and encoding again would change: padding, undefined lengths, a private element."""
    modality = struct.pack("<HH2sH", 0x0008, 0x0060, b"CS", 4) + b"SR  "
    private = struct.pack("<HH2sH", 0x0009, 0x0010, b"LO", 6) + b"OURS \0"
    name = struct.pack("<HH2sH", 0x0010, 0x0010, b"PN", 16) + b"Planted^Patient "
    number_text = struct.pack("<HH2sH", 0x0020, 0x0013, b"IS", 6) + f"{number:05d} ".encode()
    content = struct.pack("<HH2sHL", 0x0040, 0xA730, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF) + struct.pack("<HH2sH", 0x0040, 0xA040, b"CS", 6) + b"TEXT  "
    ends = struct.pack("<HHL", 0xFFFE, 0xE00D, 0) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    return modality + private + name + number_text + content + item + ends


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (0x0000, DeliveryState.DELIVERED),
        (0xB000, DeliveryState.DELIVERED),
        (0xA700, DeliveryState.PENDING),
        (0xA900, DeliveryState.REJECTED),
        (0xC000, DeliveryState.REJECTED),
        (0x0110, DeliveryState.REJECTED),
    ],
    ids=lambda value: f"0x{value:04X}" if isinstance(value, int) else value,
)
def test_answer_of_the_pacs_is_on_record(outbox: Outbox, pacs: Pacs, status: int, state: DeliveryState) -> None:
    """Its status as it came over the wire, and the state that follows."""
    pacs.statuses = [status]
    (delivery_id,) = outbox.add(peculiar())

    assert outbox.deliver(pacs.port) == 1

    row = outbox.row(delivery_id)
    assert (row.state, row.status, row.attempts) == (state, status, 1)


def test_bytes_are_the_stored_ones_every_time(outbox: Outbox, pacs: Pacs) -> None:
    """Not decoded and encoded again, neither at the first attempt nor at a later one."""
    pacs.statuses = [0xA700]
    (delivery_id,) = outbox.add(peculiar())

    outbox.deliver(pacs.port)
    outbox.deliver(pacs.port, later=True)

    assert outbox.row(delivery_id).state is DeliveryState.DELIVERED
    assert [content for _, content in pacs.received] == [peculiar()] * 2
    assert data_set_bytes(outbox.file(delivery_id)) == peculiar()


@pytest.mark.parametrize(("taken", "state"), [("ISO_IR 192", "delivered"), ("ISO_IR 100", "rejected")])
def test_result_in_a_character_set_that_the_pacs_does_not_take_is_not_sent(
    pacs: Pacs, outbox: Outbox, taken: str, state: str
) -> None:
    """Not even by a requeue; the reason says what can be done."""
    (one,) = outbox.add(bytes.fromhex("08000500") + b"CS" + bytes([10, 0]) + b"ISO_IR 192")

    outbox.deliver(pacs.port, charset=taken)

    assert outbox.row(one).state.value == state
    assert len(pacs.received) == (state == "delivered")
    assert (outbox.row(one).reason or "").startswith("not sent: its text does not fit") is (state == "rejected")


def test_requeued_result_goes_out_as_it_is(outbox: Outbox, pacs: Pacs) -> None:
    """After a rejection a person asks for another attempt: the same bytes under the same UID."""
    pacs.statuses = [0xC000]
    (delivery_id,) = outbox.add(peculiar())
    outbox.deliver(pacs.port)

    with outbox.sessions.begin() as session:
        assert delivery_transitions.requeue_delivery(session, delivery_id, now=NOW, actor="cli/somebody")
    outbox.deliver(pacs.port)

    assert outbox.row(delivery_id).state is DeliveryState.DELIVERED
    assert pacs.received[0] == pacs.received[1]


def test_results_that_are_due_share_an_association(outbox: Outbox, pacs: Pacs) -> None:
    """In the order in which they were made, each with its own answer."""
    pacs.statuses = [0x0000, 0xC000, 0xA700]
    ids = outbox.add(peculiar(1), peculiar(2), peculiar(3), peculiar(4))

    assert outbox.deliver(pacs.port) == 4

    assert len(pacs.calling) == 1
    assert [content for _, content in pacs.received] == [peculiar(number) for number in (1, 2, 3, 4)]
    assert [outbox.row(one).state for one in ids] == [
        DeliveryState.DELIVERED,
        DeliveryState.REJECTED,
        DeliveryState.PENDING,
        DeliveryState.DELIVERED,
    ]


def test_answer_is_on_record_before_the_next_result_is_sent(outbox: Outbox, pacs: Pacs) -> None:
    """Who is killed between two results has lost nothing of the first."""
    seen: list[DeliveryState] = []
    ids = outbox.add(peculiar(1), peculiar(2))
    pacs.on_store = lambda event: seen.append(outbox.row(ids[0]).state)

    outbox.deliver(pacs.port)

    assert seen == [DeliveryState.PENDING, DeliveryState.DELIVERED]


def test_more_results_than_fit_into_one_round_are_sent_in_the_next(
    outbox: Outbox, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent twice."""
    monkeypatch.setattr(delivery, "BATCH", 2)
    outbox.add(*[peculiar(number) for number in range(3)])

    assert [outbox.deliver(pacs.port) for _ in range(3)] == [2, 1, 0]
    assert [content for _, content in pacs.received] == [peculiar(number) for number in range(3)]


# --- no association -------------------------------------------------------------------------------------------------


def test_pacs_that_does_not_know_us_is_asked_again(outbox: Outbox) -> None:
    """Its reason stands in the delivery, with the remedy; the title that we call ourselves is configured."""
    with listening(Pacs(), require_calling_aet=["KNOWN"]) as pacs:
        (delivery_id,) = outbox.add(peculiar())

        outbox.deliver(pacs.port)
        row = outbox.row(delivery_id)
        assert (row.state, row.status) == (DeliveryState.PENDING, None)
        assert "rejects the association" in str(row.reason)
        assert "check the AE titles on both sides" in str(row.reason)

        outbox.deliver(pacs.port, later=True, calling_ae_title="KNOWN")
        assert outbox.row(delivery_id).state is DeliveryState.DELIVERED
        assert pacs.calling == ["MEDPRUNER", "KNOWN"]


def test_pacs_of_another_name_is_asked_again(outbox: Outbox) -> None:
    """A wrong [[destination]] ae_title."""
    with listening(Pacs(), require_called_aet=True) as pacs:
        (delivery_id,) = outbox.add(peculiar())

        outbox.deliver(pacs.port, ae_title="ELSE")

        assert "Called AE title not recognised" in str(outbox.row(delivery_id).reason)


def test_pacs_that_takes_no_such_class_refuses_for_good(outbox: Outbox) -> None:
    """Only another sr_sop_class changes that; the message says so, and nobody tries a hundred times."""
    with listening(Pacs(), classes=(Verification,)) as pacs:
        (delivery_id,) = outbox.add(peculiar())

        outbox.deliver(pacs.port)

        row = outbox.row(delivery_id)
        assert (row.state, row.status) == (DeliveryState.REJECTED, 0x0122)
        assert f"takes no SOP class {Comprehensive3DSRStorage}; try another sr_sop_class" in str(row.reason)


def test_class_that_is_taken_goes_out_beside_one_that_is_not(outbox: Outbox) -> None:
    """Each result is judged by its own presentation context."""
    with listening(Pacs(), classes=(EnhancedSRStorage,)) as pacs:
        (refused,) = outbox.add(peculiar(1))
        (taken,) = outbox.add(peculiar(2), sop_class_uid=EnhancedSRStorage)

        outbox.deliver(pacs.port)

        assert (outbox.row(refused).state, outbox.row(refused).status) == (DeliveryState.REJECTED, 0x0122)
        assert outbox.row(taken).state is DeliveryState.DELIVERED


def test_report_falls_back_to_a_class_that_is_taken(outbox: Outbox) -> None:
    """The delivery goes on with another object of its own UID; why stands in its reason, and in the audit."""
    with listening(Pacs(), classes=(EnhancedSRStorage, BasicTextSRStorage)) as pacs:
        (delivery_id,) = outbox.add_report("comprehensive3d", "comprehensive", "enhanced", "basic_text")

        outbox.deliver(pacs.port, sr_sop_class="auto")

    row = outbox.row(delivery_id)
    sent: Result = get(outbox.sessions, Result, row.result_id)
    assert (row.state, row.attempts, sent.kind) == (DeliveryState.DELIVERED, 1, "sr-enhanced")
    assert row.reason == "sent as Enhanced SR Storage, which the destination takes"
    assert [uid for uid, _ in pacs.received] == [sent.sop_instance_uid]
    assert kinds(outbox.sessions, delivery_id=delivery_id) == ["delivery-fell-back", "delivery-delivered"]


def test_report_goes_out_in_its_best_class_where_that_is_taken(outbox: Outbox, pacs: Pacs) -> None:
    """Others are offered in the negotiation, and not sent."""
    (delivery_id,) = outbox.add_report("comprehensive3d", "comprehensive")

    outbox.deliver(pacs.port, sr_sop_class="auto")

    assert [uid for uid, _ in pacs.received] == [outbox_uid(outbox, delivery_id)]
    assert outbox.row(delivery_id).reason is None


@pytest.mark.parametrize("configured", ["comprehensive3d", ["comprehensive3d", "comprehensive"]], ids=str)
def test_report_falls_back_only_as_configured(outbox: Outbox, configured: Any) -> None:
    """One class alone, or a list that ends before the one that is taken: refused for good."""
    with listening(Pacs(), classes=(EnhancedSRStorage,)) as pacs:
        (delivery_id,) = outbox.add_report("comprehensive3d", "comprehensive", "enhanced")

        outbox.deliver(pacs.port, sr_sop_class=configured)

    assert (outbox.row(delivery_id).state, outbox.row(delivery_id).status) == (DeliveryState.REJECTED, 0x0122)
    assert pacs.received == []


def outbox_uid(outbox: Outbox, delivery_id: int) -> str:
    found: Result = get(outbox.sessions, Result, outbox.row(delivery_id).result_id)
    return found.sop_instance_uid


def test_pacs_that_takes_implicit_alone_gets_the_same_content(outbox: Outbox) -> None:
    """The default transfer syntax that every node must take (PS3.5 10.1); a note says so."""
    with listening(Pacs(), syntaxes=(ImplicitVRLittleEndian,)) as pacs:
        uid = "2.25.4000.1.0"
        (delivery_id,) = outbox.add(identity(Comprehensive3DSRStorage, uid) + peculiar())

        outbox.deliver(pacs.port)

    row = outbox.row(delivery_id)
    assert row.state is DeliveryState.DELIVERED
    assert row.reason == "sent in Implicit VR Little Endian, which the destination takes"
    ((_, content),) = pacs.received
    received = dcmread(BytesIO(content), force=True)
    stored = dcmread(outbox.file(delivery_id))
    assert [element.tag for element in received] == [element.tag for element in stored]
    assert (received.SOPInstanceUID, received.PatientName) == (uid, "Planted^Patient")


@pytest.mark.parametrize(
    ("taken", "compression", "sent"),
    [
        ((ImplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless), None, JPEG2000Lossless),
        ((ImplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless), None, RLELossless),
        ((ImplicitVRLittleEndian, ExplicitVRLittleEndian), None, ExplicitVRLittleEndian),
        ((ImplicitVRLittleEndian,), None, ImplicitVRLittleEndian),
        ((ImplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless), ("rle",), RLELossless),
        ((ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless), (), ImplicitVRLittleEndian),
    ],
)
def test_a_map_arrives_with_the_same_pixels_in_what_the_destination_takes(
    outbox: Outbox, taken: tuple[str, ...], compression: tuple[str, ...] | None, sent: str
) -> None:
    """Stored in JPEG 2000; the smallest lossless encoding that both sides allow."""
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    stored = Dataset()
    stored.SOPClassUID = MultiFrameTrueColorSecondaryCaptureImageStorage
    stored.SOPInstanceUID = "2.25.4000.1.0"
    stored.Rows, stored.Columns, stored.NumberOfFrames, stored.SamplesPerPixel = 32, 32, 1, 3
    stored.PhotometricInterpretation, stored.PlanarConfiguration, stored.PixelRepresentation = "YBR_RCT", 0, 0
    stored.BitsAllocated, stored.BitsStored, stored.HighBit = 8, 8, 7
    stored.compress(JPEG2000Lossless, pixels, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    whole = BytesIO()
    stored.save_as(whole, enforce_file_format=True)
    (delivery_id,) = outbox.add_whole(whole.getvalue(), sop_class_uid=stored.SOPClassUID)
    changes = {} if compression is None else {"compression": compression}

    with listening(Pacs(), classes=(MultiFrameTrueColorSecondaryCaptureImageStorage,), syntaxes=taken) as pacs:
        outbox.deliver(pacs.port, **changes)

    assert outbox.row(delivery_id).state is DeliveryState.DELIVERED
    ((uid, content),) = pacs.received
    received = dcmread(BytesIO(file_header(stored.SOPClassUID, uid, sent) + content))
    assert uid == "2.25.4000.1.0"
    np.testing.assert_array_equal(received.pixel_array, pixels)


def identity(sop_class_uid: str, sop_instance_uid: str) -> bytes:
    """(0008,0016) and (0008,0018) in Explicit VR Little Endian."""
    dataset = Dataset()
    dataset.SOPClassUID = sop_class_uid
    dataset.SOPInstanceUID = sop_instance_uid
    return encode(dataset)


def test_pause_stops_between_two_results(outbox: Outbox, pacs: Pacs) -> None:
    """A slow destination is not sent all of a round before it heeds the pause; the rest waits without an attempt."""

    def pause(event: evt.Event) -> None:
        with outbox.sessions.begin() as session:
            delivery_transitions.pause_destination(session, "pacs", now=NOW, actor="cli/somebody")

    pacs.on_store = pause
    first, second = outbox.add(peculiar(1), peculiar(2))

    outbox.deliver(pacs.port)

    assert outbox.row(first).state is DeliveryState.DELIVERED
    assert (outbox.row(second).state, outbox.row(second).attempts) == (DeliveryState.PENDING, 0)
    assert outbox.deliver(pacs.port) == 0


def test_parallel_associations_have_deliveries_of_their_own(outbox: Outbox, pacs: Pacs) -> None:
    """[[destination]] concurrency: each result belongs to one of them."""
    outbox.add(*[peculiar(number) for number in range(5)])

    shares = [outbox.deliver(pacs.port, share=share, concurrency=2) for share in (0, 1)]

    assert sorted(shares) == [2, 3]
    assert sorted(content for _, content in pacs.received) == [peculiar(number) for number in range(5)]


def test_delivered_result_waits_for_its_proof_where_that_is_configured(outbox: Outbox, pacs: Pacs) -> None:
    """Due at once; elsewhere nobody asks."""
    (asked,) = outbox.add(peculiar(1))
    outbox.deliver(pacs.port, storage_commitment=True)
    (unasked,) = outbox.add(peculiar(2))
    outbox.deliver(pacs.port)

    assert outbox.row(asked).proof_at is not None
    assert outbox.row(unasked).proof_at is None


def test_pacs_that_was_away_gets_everything_when_it_is_back(outbox: Outbox) -> None:
    """First attempt against a closed port, second after the back-off."""
    pacs = Pacs(port=free_port())
    (delivery_id,) = outbox.add(peculiar())

    assert outbox.deliver(pacs.port) == 1
    row = outbox.row(delivery_id)
    assert row.next_attempt_at is not None
    assert "cannot be reached" in str(row.reason)

    with listening(pacs):
        assert outbox.deliver(pacs.port) == 0  # not due yet
        assert outbox.deliver(pacs.port, later=True) == 1
    assert outbox.row(delivery_id).state is DeliveryState.DELIVERED
    assert len(pacs.received) == 1


# --- an association that breaks -------------------------------------------------------------------------------------


def test_aborted_association_postpones_what_was_not_answered(outbox: Outbox, pacs: Pacs) -> None:
    """What was stored before stays delivered; the rest is sent again."""

    def abort_at_the_second(event: evt.Event) -> None:
        if len(pacs.received) == 1:
            event.assoc.abort()

    pacs.on_store = abort_at_the_second
    first, second, third = outbox.add(peculiar(1), peculiar(2), peculiar(3))

    outbox.deliver(pacs.port)

    assert outbox.row(first).state is DeliveryState.DELIVERED
    for broken in (second, third):
        row = outbox.row(broken)
        assert (row.state, row.status, row.attempts) == (DeliveryState.PENDING, None, 1)

    pacs.on_store = None
    outbox.deliver(pacs.port, later=True)
    assert all(outbox.row(one).state is DeliveryState.DELIVERED for one in (second, third))


def test_pacs_that_never_answers_is_given_up_after_its_time_limit(outbox: Outbox, pacs: Pacs) -> None:
    """[[destination]] timeout_s; whether it stored the result is unknown, so it is sent again."""
    let_go = threading.Event()
    pacs.on_store = lambda event: let_go.wait(20) and None
    (delivery_id,) = outbox.add(peculiar())

    outbox.deliver(pacs.port, timeout_s=0.5)
    let_go.set()

    row = outbox.row(delivery_id)
    assert (row.state, row.status) == (DeliveryState.PENDING, None)
    assert "no answer to C-STORE" in str(row.reason)


# --- what lies in the outbox ----------------------------------------------------------------------------------------


def test_result_with_changed_bytes_is_never_sent(outbox: Outbox, pacs: Pacs) -> None:
    """Different bytes must not go out under a UID that promises others."""
    (delivery_id,) = outbox.add(peculiar())
    path = outbox.file(delivery_id)
    path.write_bytes(path.read_bytes().replace(b"Planted", b"Changed"))

    outbox.deliver(pacs.port)

    assert pacs.received == []
    row = outbox.row(delivery_id)
    assert row.state is DeliveryState.REJECTED
    assert "does not match its recorded SHA-256" in str(row.reason)


def test_result_that_cannot_be_read_waits(outbox: Outbox, pacs: Pacs) -> None:
    """A disk that is away comes back; nothing is lost by waiting."""
    (delivery_id,) = outbox.add(peculiar())
    outbox.file(delivery_id).rename(outbox.data / "elsewhere")

    outbox.deliver(pacs.port)

    row = outbox.row(delivery_id)
    assert (row.state, row.attempts) == (DeliveryState.PENDING, 1)
    assert "cannot be read" in str(row.reason)


# --- dcmtk ----------------------------------------------------------------------------------------------------------


class StoreScp(Server):
    """dcmtk's storescp: keeps what it gets, bit for bit, or refuses every association."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.kept = folder / "kept"
        self.kept.mkdir(parents=True)
        command = [find_program("storescp"), "-v", "--bit-preserving", "-aet", "PACS", "-od", str(self.kept)]
        super().__init__(folder, [*command, *options, str(self.port)])

    def is_ready(self) -> bool:
        answer = echoscu(self.port, called="PACS")
        return answer.returncode == 0 or "Association Rejected" in answer.stdout + answer.stderr


class TlsStoreScp(StoreScp):
    """The same over TLS: ready when it listens."""

    def is_ready(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def test_storescp_keeps_the_bytes_of_the_outbox(outbox: Outbox, tmp_path: Path) -> None:
    """Another implementation reads what we send and stores the same data set."""
    with StoreScp(tmp_path / "storescp") as scp:
        ids = outbox.add(peculiar(1), peculiar(2))

        assert outbox.deliver(scp.port) == 2

        assert all(outbox.row(one).state is DeliveryState.DELIVERED for one in ids)
        kept = sorted(scp.kept.iterdir())
        assert [data_set_bytes(path) for path in kept] == [peculiar(1), peculiar(2)]


def test_storescp_that_refuses_associations_is_asked_again(outbox: Outbox, tmp_path: Path) -> None:
    """As a PACS does that is full or in maintenance."""
    with StoreScp(tmp_path / "storescp", "--refuse") as scp:
        (delivery_id,) = outbox.add(peculiar())

        outbox.deliver(scp.port)

    row = outbox.row(delivery_id)
    assert (row.state, row.status) == (DeliveryState.PENDING, None)
    # storescp hangs up behind its refusal; whichever is read first is told
    assert "the association" in str(row.reason)


# --- TLS ------------------------------------------------------------------------------------------------------------


@dataclass
class Keys:
    """Two authorities; a certificate of the PACS by the one, and of us."""

    ca: Pair
    other_ca: Pair
    pacs: Pair
    us: Pair

    def server(self, *, mutual: bool = False, minimum: Literal["1.2", "1.3"] = "1.2") -> ssl.SSLContext:
        ca = self.ca.certificate if mutual else None
        return certificates.server_context(self.pacs.certificate, self.pacs.key, ca=ca, minimum=minimum)

    def client(self, **changes: Any) -> dict[str, Any]:
        """[[destination]] keys."""
        return {"tls": True, "tls_ca": self.ca.certificate} | changes


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    ca, other = authority(folder), authority(folder, "other")
    return Keys(ca, other, issue(ca, folder, "pacs"), issue(ca, folder, "us"))


def test_results_go_out_over_tls(outbox: Outbox, keys: Keys) -> None:
    """Byte for byte as without; C-ECHO too."""
    with listening(Pacs(), classes=(*SR_CLASSES, Verification), tls=keys.server()) as pacs:
        (delivery_id,) = outbox.add(peculiar())

        outbox.deliver(pacs.port, **keys.client())
        echoed = requestor.echo(encrypted(pacs.port, keys), ScpSettings())

    assert outbox.row(delivery_id).state is DeliveryState.DELIVERED
    assert [content for _, content in pacs.received] == [peculiar()]
    assert echoed == (True, f"PACS at 127.0.0.1:{pacs.port} answers C-ECHO with Success over TLS")


def encrypted(port: int, keys: Keys, **changes: Any) -> DestinationSettings:
    fields = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": port, "timeout_s": 5}
    return DestinationSettings.model_validate(fields | keys.client(**changes))


def test_pacs_that_wants_our_certificate_gets_it(outbox: Outbox, keys: Keys) -> None:
    """Mutual TLS."""
    with listening(Pacs(), tls=keys.server(mutual=True, minimum="1.3")) as pacs:
        (delivery_id,) = outbox.add(peculiar())

        outbox.deliver(pacs.port, **keys.client(tls_certificate=keys.us.certificate, tls_key=keys.us.key))

    assert outbox.row(delivery_id).state is DeliveryState.DELIVERED


@pytest.mark.parametrize(
    ("server", "client", "reason"),
    [
        ({}, {"tls_ca": "other"}, "its certificate is not trusted: unable to get local issuer certificate"),
        ({}, {"host": OTHER_LOOPBACK}, "its certificate is not trusted: IP address mismatch"),
        ({"mutual": True, "minimum": "1.3"}, {}, "TLS fails: tlsv13 alert certificate required"),
        ({"mutual": True}, {"tls_certificate": "other", "tls_key": "other"}, "TLS fails: tlsv1 alert unknown ca"),
        (None, {}, "TLS"),
        ({}, {"tls_ca": "missing"}, "missing.pem: no such file"),
    ],
    ids=["other-authority", "other-name", "no-certificate-of-ours", "certificate-of-others", "plain-pacs", "no-file"],
)
def test_fault_of_tls_is_told_and_tried_again(
    outbox: Outbox, keys: Keys, server: dict[str, Any] | None, client: dict[str, Any], reason: str
) -> None:
    """A fault of configuration, here or there: the result waits, and its delivery says what to look at."""
    files = {
        "other": keys.other_ca.certificate,
        "missing": outbox.data / "missing.pem",
    }
    named = {
        name: keys.other_ca.key if name == "tls_key" else files.get(value, value) for name, value in client.items()
    }
    context = None if server is None else keys.server(**server)
    with listening(Pacs(), tls=context, host=client.get("host", "127.0.0.1")) as pacs:
        (delivery_id,) = outbox.add(peculiar())

        outbox.deliver(pacs.port, **keys.client(**named))

    row = outbox.row(delivery_id)
    assert (row.state, row.status, row.attempts) == (DeliveryState.PENDING, None, 1)
    assert reason in str(row.reason)
    assert pacs.received == []


def test_name_in_the_certificate_is_not_checked_where_that_is_configured(outbox: Outbox, keys: Keys) -> None:
    """Many devices' certificates hold no name that can be resolved; the authority is checked all the same."""
    with listening(Pacs(), tls=keys.server(), host=OTHER_LOOPBACK) as pacs:
        (delivery_id,) = outbox.add(peculiar())

        outbox.deliver(pacs.port, **keys.client(host=OTHER_LOOPBACK, tls_verify_host=False))

    assert outbox.row(delivery_id).state is DeliveryState.DELIVERED


def test_storescp_takes_results_over_tls(outbox: Outbox, keys: Keys, tmp_path: Path) -> None:
    """dcmtk's storescp with +tls and BCP 195, and our certificate demanded."""
    own = [
        "+tls",
        str(keys.pacs.key),
        str(keys.pacs.certificate),
        "+cf",
        str(keys.ca.certificate),
    ]
    with TlsStoreScp(tmp_path / "storescp", *own, "--require-peer-cert") as scp:
        (delivery_id,) = outbox.add(peculiar())

        outbox.deliver(scp.port, **keys.client(tls_certificate=keys.us.certificate, tls_key=keys.us.key))

        assert outbox.row(delivery_id).state is DeliveryState.DELIVERED, outbox.row(delivery_id).reason
        assert [data_set_bytes(path) for path in scp.kept.iterdir()] == [peculiar()]


# --- C-ECHO ---------------------------------------------------------------------------------------------------------


def test_echo_tells_what_the_pacs_answers() -> None:
    """Success, another title, no Verification, nobody there."""

    def echo(port: int, ae_title: str = "PACS") -> tuple[bool, str]:
        fields = {"name": "pacs", "ae_title": ae_title, "host": "127.0.0.1", "port": port, "timeout_s": 5}
        return requestor.echo(DestinationSettings.model_validate(fields), ScpSettings())

    with listening(Pacs(), classes=(Verification,), require_called_aet=True) as pacs:
        assert echo(pacs.port) == (True, f"PACS at 127.0.0.1:{pacs.port} answers C-ECHO with Success")
        assert echo(pacs.port, "ELSE")[0] is False
        assert "check the AE titles" in echo(pacs.port, "ELSE")[1]
    with listening(Pacs()) as pacs:
        assert echo(pacs.port)[0] is False
        assert "1.2.840.10008.1.1" in echo(pacs.port)[1]
    assert "cannot be reached" in echo(free_port())[1]
