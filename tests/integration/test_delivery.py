"""Delivery to real Storage SCPs on loopback: pynetdicom answering what a test wants, and dcmtk's storescp."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import (
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from sqlalchemy.orm import Session, sessionmaker

from service import delivery
from service.shared import transitions
from service.shared.db import Delivery, DeliveryState, Result
from service.shared.durable import digest
from service.shared.settings import DestinationSettings, ScpSettings, Settings
from service.spool import Arrival, file_header
from tests.receiving import data_set_bytes
from tests.rows import (
    NOW,
    add_analysis,
    add_study,
    deliveries,
    finish,
    get,
    open_database,
    read,
    result,
)
from tests.servers import Server, echoscu, find_program, free_port

# pynetdicom drops the socket of a refused connection without closing it; CPython closes it in the same moment
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

SR_CLASSES = (Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage)


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
def listening(pacs: Pacs, *, classes: tuple[str, ...] = SR_CLASSES, **entity: Any) -> Iterator[Pacs]:
    """The SCP on its port, or on a free one."""
    application = AE("PACS")
    for name, value in entity.items():
        setattr(application, name, value)
    for uid in classes:
        application.add_supported_context(uid, [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
    handlers: list[Any] = [(evt.EVT_C_STORE, pacs.store), (evt.EVT_REQUESTED, pacs.note)]
    server = application.start_server(("127.0.0.1", pacs.port), block=False, evt_handlers=handlers)
    assert server is not None
    pacs.port = server.server_address[1]
    try:
        yield pacs
    finally:
        server.shutdown()


@dataclass
class Outbox:
    """Results on disk and on record, and a destination that they wait for."""

    data: Path
    sessions: sessionmaker[Session]
    study_id: int
    count: int = 0

    def add(self, *contents: bytes, sop_class_uid: str = Comprehensive3DSRStorage) -> list[int]:
        """Pending deliveries of one analysis with one result for each data set."""
        self.count += 1
        analysis_id = add_analysis(self.sessions, self.study_id, run_number=self.count)
        read(self.sessions, analysis_id)
        results = []
        for number, content in enumerate(contents):
            uid = f"2.25.4000.{analysis_id}.{number}"
            whole = part_10(content, sop_class_uid, uid)
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

    def deliver(self, port: int, *, later: bool = False, **changes: Any) -> int:
        """Send what is due; `later`: after every back-off."""
        fields = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": port, "timeout_s": 5}
        destination = DestinationSettings.model_validate(fields | changes)
        settings = Settings.model_validate({"data": {"path": self.data}})
        now = datetime.now(UTC) + timedelta(days=1) if later else NOW
        return delivery.deliver_due(settings, destination, self.sessions, now)

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


def test_requeued_result_goes_out_as_it_is(outbox: Outbox, pacs: Pacs) -> None:
    """After a rejection a person asks for another attempt: the same bytes under the same UID."""
    pacs.statuses = [0xC000]
    (delivery_id,) = outbox.add(peculiar())
    outbox.deliver(pacs.port)

    with outbox.sessions.begin() as session:
        assert transitions.requeue_delivery(session, delivery_id, now=NOW, actor="cli/somebody")
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


# --- C-ECHO ---------------------------------------------------------------------------------------------------------


def test_echo_tells_what_the_pacs_answers() -> None:
    """Success, another title, no Verification, nobody there."""

    def echo(port: int, ae_title: str = "PACS") -> tuple[bool, str]:
        fields = {"name": "pacs", "ae_title": ae_title, "host": "127.0.0.1", "port": port, "timeout_s": 5}
        return delivery.echo(DestinationSettings.model_validate(fields), ScpSettings())

    with listening(Pacs(), classes=(Verification,), require_called_aet=True) as pacs:
        assert echo(pacs.port) == (True, f"PACS at 127.0.0.1:{pacs.port} answers C-ECHO with Success")
        assert echo(pacs.port, "ELSE")[0] is False
        assert "check the AE titles" in echo(pacs.port, "ELSE")[1]
    with listening(Pacs()) as pacs:
        assert echo(pacs.port)[0] is False
        assert "1.2.840.10008.1.1" in echo(pacs.port)[1]
    assert "cannot be reached" in echo(free_port())[1]
