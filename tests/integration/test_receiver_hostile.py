"""Peers that stall, lie about lengths, send rubbish or vanish: nobody is locked out, nothing wrong is kept."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from threading import enumerate as threads
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from structlog.testing import capture_logs

from service import commitment_requests
from service.acceptor import Acceptor, ActionRequest, EventReport, Limits, Listener, Peer, Refusal, StoreRequest
from service.commitment_answers import PUSH_MODEL, PUSH_MODEL_INSTANCE
from service.shared.settings import SourceSettings
from service.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from tests.prove.hostile import Crowd, asked_for_association, fuzz, hold
from tests.prove.mutation import action_information, association, converse
from tests.prove.mutation import encode as encode_tree
from tests.receiving import (
    SENDER,
    STUDY_UID,
    Running,
    arriving,
    associate,
    association_request,
    data_set_bytes,
    encode,
    instance,
    p_data,
    place,
    receipts,
    running,
    send,
    send_instance,
    store_command,
    wait_until,
)

pytestmark = pytest.mark.hostile

A_ASSOCIATE_AC, A_ASSOCIATE_RJ, P_DATA_TF, A_ABORT = 2, 3, 4, 7
FOUR_GIGABYTES = 0xFFFFFFFF
SHORT_S = 0.5  # the idle timeout where a test waits for it


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "spool") as started:
        yield started


@pytest.fixture
def fuzzed(tmp_path: Path) -> Iterator[Running]:
    """A receiver that takes requests for storage commitment too."""
    sources = (SourceSettings(ae_title=SENDER), SourceSettings(ae_title="FUZZ", commitment_port=104))
    with running(tmp_path / "spool", sources=sources, storage_commitment=True) as started:
        yield started


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Running]:
    """A receiver that waits half a second where a real one waits half a minute, and has room for two."""
    with running(tmp_path / "spool", idle_timeout_s=SHORT_S, max_associations=2) as started:
        yield started


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def connect_and_associate(port: int) -> socket.socket:
    """An association; asked for again as long as the one before it has not been closed at the other end."""
    while True:
        connection = connect(port)
        connection.sendall(association_request())
        answer = read_pdu(connection)
        if answer == A_ASSOCIATE_AC:
            return connection
        connection.close()
        assert answer == A_ASSOCIATE_RJ


def read_pdu(connection: socket.socket) -> int | None:
    """The type of the next PDU; None when the connection ends instead."""
    try:
        header = read(connection, 6)
        read(connection, struct.unpack(">L", header[2:])[0])
    except (ConnectionError, EOFError):
        return None
    return header[0]


def read(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise EOFError
        content += part
    return content


def is_dropped(connection: socket.socket) -> bool:
    """The receiver ends the connection, with an A-ABORT or without; the peer waits for it."""
    answer = read_pdu(connection)
    return answer is None or (answer == A_ABORT and read_pdu(connection) is None)


def stores(port: int, number: int = 1) -> bool:
    association = associate(port)
    if not association.is_established:
        return False
    status = send_instance(association, instance(number))
    association.release()
    return status == 0x0000


def test_stalls_inside_a_pdu_lock_nobody_out(hasty: Running) -> None:
    """More peers than there is room for stop in the middle of a P-DATA; each is dropped, and the next is served."""
    for _ in range(3):
        with connect_and_associate(hasty.port) as first, connect_and_associate(hasty.port) as second:
            for connection in (first, second):
                connection.sendall(struct.pack(">BxL", P_DATA_TF, 10_000) + bytes(100))

            assert is_dropped(first)
            assert is_dropped(second)
        wait_until(lambda: stores(hasty.port))


def test_drip_of_single_bytes_does_not_hold_an_association(hasty: Running) -> None:
    """A PDU has to be whole within the idle timeout, however often a byte of it comes."""
    with connect_and_associate(hasty.port) as connection:
        connection.settimeout(SHORT_S / 10)
        connection.sendall(struct.pack(">BxL", P_DATA_TF, 10_000))

        def drips_in_vain() -> bool:
            try:
                connection.sendall(b"\0")
                return connection.recv(1) in (b"", bytes([A_ABORT]))
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        wait_until(drips_in_vain)


def test_request_that_stops_after_four_bytes_is_dropped(hasty: Running) -> None:
    """A half-sent A-ASSOCIATE-RQ ends at the idle timeout."""
    with connect(hasty.port) as connection:
        connection.sendall(association_request()[:4])

        assert is_dropped(connection)


def test_connection_that_says_nothing_is_dropped(hasty: Running) -> None:
    """A bare TCP connection ends at the idle timeout."""
    with connect(hasty.port) as connection:
        assert is_dropped(connection)


def test_association_that_says_nothing_is_aborted(hasty: Running) -> None:
    """An idle association ends at the idle timeout, and makes room."""
    with connect_and_associate(hasty.port) as connection:
        assert read_pdu(connection) == A_ABORT


def test_silent_connections_take_no_room_from_senders(receiver: Running) -> None:
    """With 140 connections that never ask for an association, a sender is served at once."""
    with ExitStack() as stack:
        for _ in range(140):
            stack.enter_context(connect(receiver.port))

        assert stores(receiver.port)


def test_dead_connections_of_others_lock_nobody_out(receiver: Running) -> None:
    """200 that never ask for an association and 50 that stop inside a PDU, from other addresses: served at once."""
    with Crowd(receiver.port):
        assert stores(receiver.port)


@pytest.mark.parametrize("stop_after", [1, 4, 6, 70])
def test_half_requests_take_no_room_from_senders(receiver: Running, stop_after: int) -> None:
    """50 connections that stop in the middle of their A-ASSOCIATE-RQ are no associations."""
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(connect(receiver.port)).sendall(association_request()[:stop_after])

        assert stores(receiver.port)


@pytest.mark.parametrize("name", ["abstract syntax", "transfer syntax"])
def test_context_that_names_nothing_is_no_fault_of_ours(receiver: Running, name: str) -> None:
    """A presentation context without an abstract or a transfer syntax is refused with the whole request, in words."""
    request = association()
    context = request.children[1]
    context.children = [item for item in context.children if item.tag != (0x30 if name == "abstract syntax" else 0x40)]
    with capture_logs() as lines, connect(receiver.port) as connection:
        connection.sendall(encode_tree(request))

        assert is_dropped(connection)
    (line,) = [line for line in lines if line["event"] == "connection_dropped"]
    assert name in line["reason"]


def test_oldest_silent_connection_makes_room_for_the_next(tmp_path: Path) -> None:
    """Their number is bounded, long before any timeout."""
    with running(tmp_path / "spool", max_unassociated=3) as receiver, ExitStack() as stack:
        silent = [stack.enter_context(connect(receiver.port)) for _ in range(5)]

        assert is_dropped(silent[0])
        assert is_dropped(silent[1])
        assert stores(receiver.port)


def test_port_scans_leave_no_thread_behind(receiver: Running) -> None:
    """Connections that come and go at once are forgotten at once, not at the idle timeout."""
    before = len(threads())
    for _ in range(50):
        connect(receiver.port).close()

    wait_until(lambda: len(threads()) <= before)


def test_stopping_receiver_does_not_wait_for_silent_connections(receiver: Running) -> None:
    """Who has not asked for an association is dropped at once; who has one may finish."""
    association = associate(receiver.port)
    with connect(receiver.port) as silent:
        wait_until(lambda: len([thread for thread in threads() if "association:" in thread.name]) == 2)
        stopping = Thread(target=receiver.receiver.stop, args=(30,))
        stopping.start()

        assert is_dropped(silent)
    assert send_instance(association, instance()) == 0x0000
    association.release()
    stopping.join()


@pytest.mark.parametrize("pdu_type", range(1, 8))
def test_request_of_four_gigabytes_is_refused_before_it_is_read(receiver: Running, pdu_type: int) -> None:
    """The claimed length alone ends the connection; not a byte of it is awaited."""
    with connect(receiver.port) as connection:
        connection.sendall(struct.pack(">BxL", pdu_type, FOUR_GIGABYTES))

        assert is_dropped(connection)
    assert stores(receiver.port)


@pytest.mark.parametrize("length", [FOUR_GIGABYTES, 131_073])
def test_p_data_above_the_negotiated_maximum_is_refused_before_it_is_read(receiver: Running, length: int) -> None:
    """One byte more than max_pdu_bytes is as bad as four gigabytes."""
    with connect_and_associate(receiver.port) as connection:
        connection.sendall(struct.pack(">BxL", P_DATA_TF, length))

        assert is_dropped(connection)
    assert stores(receiver.port)


def test_p_data_of_just_the_maximum_is_taken(tmp_path: Path) -> None:
    """The bound is the one that was negotiated, not less."""
    with running(tmp_path / "spool", max_pdu_bytes=4096) as receiver:
        with connect_and_associate(receiver.port) as connection:
            data_set = encode(instance())
            connection.sendall(p_data(store_command(), command=True, last=True))
            for start in range(0, len(data_set), 4090):
                fragment = data_set[start : start + 4090]
                connection.sendall(p_data(fragment, command=False, last=start + 4090 >= len(data_set)))
            assert read_pdu(connection) == P_DATA_TF

        (receipt,) = place(receiver.spool)
        assert data_set_bytes(receiver.spool.path / receipt.path) == data_set


def test_data_set_that_never_ends_is_cut_off(tmp_path: Path) -> None:
    """A message is bounded while it grows; the association ends and nothing is kept."""
    with running(tmp_path / "spool", max_data_set_gb=0.001) as receiver:
        with connect_and_associate(receiver.port) as connection:
            connection.sendall(p_data(store_command(), command=True, last=True))
            for _ in range(11):
                connection.sendall(p_data(bytes(100_000), command=False, last=False))

            assert is_dropped(connection)
        assert receipts(receiver.spool) == []
        assert arriving(receiver.spool) == []
        assert stores(receiver.port)


def test_command_set_that_never_ends_is_cut_off(receiver: Running) -> None:
    """A command larger than 64 KiB is no command."""
    with connect_and_associate(receiver.port) as connection:
        connection.sendall(p_data(bytes(70_000), command=True, last=False))

        assert is_dropped(connection)
    assert stores(receiver.port)


@pytest.mark.parametrize(
    "content",
    [
        b"GET / HTTP/1.1\r\nHost: pacs\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        bytes(1000),
        b"\xff" * 1000,
        struct.pack(">BxL", 1, 68) + bytes(68),
        struct.pack(">BxL", 4, 6) + bytes(6),
        struct.pack(">BxL", 7, 4) + bytes(4),
    ],
    ids=["http", "tls", "zeros", "ones", "empty-request", "data-first", "abort-first"],
)
def test_what_is_no_association_request_is_dropped(receiver: Running, content: bytes) -> None:
    """Other protocols and rubbish end their own connection only."""
    with connect(receiver.port) as connection:
        connection.sendall(content)

        assert is_dropped(connection)
    assert stores(receiver.port)


@pytest.mark.parametrize(
    "content",
    [
        p_data(b"", command=True, last=True),
        p_data(b"\xff" * 100, command=True, last=True),
        p_data(store_command()[:40], command=True, last=True),
        p_data(store_command(), command=True, last=True, context_id=99) + p_data(b"x", command=False, last=True),
        p_data(store_command(sop_instance_uid="1" * 65), command=True, last=True)
        + p_data(b"", command=False, last=True),
        struct.pack(">BxL", 4, 4) + struct.pack(">L", 0),
        struct.pack(">BxL", 4, 4) + struct.pack(">L", 1_000_000),
        struct.pack(">BxL", 9, 4) + bytes(4),
        association_request(),
    ],
    ids=[
        "no-command", "rubbish-command", "cut-command", "unknown-context", "uid-of-65", "empty-pdv", "lying-pdv",
        "unknown-pdu", "second-request",
    ],
)  # fmt: skip
def test_broken_message_ends_its_association_only(receiver: Running, content: bytes) -> None:
    """The association is aborted, nothing is kept, the next one is served."""
    with connect_and_associate(receiver.port) as connection:
        connection.sendall(content)

        assert is_dropped(connection)
    assert receipts(receiver.spool) == []
    assert stores(receiver.port)


@pytest.mark.parametrize("data_set", [b"\xff" * 5000, b"GET / HTTP/1.1\r\n" * 50, os.urandom(5000)])
def test_rubbish_for_a_data_set_is_answered(receiver: Running, data_set: bytes) -> None:
    """0xC000 or 0xC210, and the association goes on."""
    association = associate(receiver.port)
    statuses = [send(association, data_set), send_instance(association, instance(2))]
    association.release()

    assert statuses[0] in (0xC000, 0xC210)
    assert statuses[1] == 0x0000
    assert len(receipts(receiver.spool)) == 1


def test_empty_data_set_is_answered(receiver: Running) -> None:
    """A C-STORE whose data set has no bytes gets a status too."""
    with connect_and_associate(receiver.port) as connection:
        connection.sendall(p_data(store_command(), command=True, last=True) + p_data(b"", command=False, last=True))

        assert read_pdu(connection) == P_DATA_TF
    assert receipts(receiver.spool) == []


def test_data_set_of_endlessly_nested_sequences_is_answered(receiver: Running) -> None:
    """Reading it ends at the depth that Python allows; the sender gets 0xC210 and the association goes on."""
    begin = struct.pack("<HH2sxxL", 0x0008, 0x1115, b"SQ", 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    association = associate(receiver.port)
    statuses = [send(association, begin * 20_000), send_instance(association, instance(2))]
    association.release()

    assert statuses == [0xC210, 0x0000]


@pytest.mark.parametrize("uid", ["../../x", "/tmp/owned", "..", "1.2/../../3"])
def test_uid_that_is_a_path_is_refused(receiver: Running, uid: str, tmp_path: Path) -> None:
    """It is no UID: 0xC000, and no file anywhere."""
    before = written(tmp_path)
    data_set = encode(instance()).replace(_ui(0x0008, 0x0018, f"{STUDY_UID}.1.1"), _ui(0x0008, 0x0018, uid))
    association = associate(receiver.port)
    status = send(association, data_set, sop_instance_uid=uid)
    association.release()

    assert status == 0xC000
    assert written(tmp_path) == before


def written(folder: Path) -> list[Path]:
    """All but the empty slots, which are made ahead whenever it suits."""
    return sorted(path for path in folder.rglob("*") if path.suffix != ".slot" or path.stat().st_size)


def _ui(group: int, element: int, text: str) -> bytes:
    value = text.encode() + b"\0" * (len(text) % 2)
    return struct.pack("<HH2sH", group, element, b"UI", len(value)) + value


@pytest.mark.parametrize("leave", ["abort", "close", "reset"])
def test_transfer_that_is_cut_leaves_nothing(receiver: Running, leave: str) -> None:
    """An A-ABORT, a closed connection or a reset in the middle of a data set: no file and no heartbeat remain."""
    connection = connect_and_associate(receiver.port)
    connection.sendall(p_data(store_command(), command=True, last=True))
    connection.sendall(p_data(encode(instance())[:2000], command=False, last=False))
    if leave == "abort":
        connection.sendall(struct.pack(">BxLBBBB", A_ABORT, 4, 0, 0, 0, 0))
    if leave == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()

    assert stores(receiver.port, 2)
    wait_until(lambda: receiver.spool.open_associations(datetime.now(UTC)) == [])
    assert [receipt.sop_instance_uid for receipt in receipts(receiver.spool)] == [f"{STUDY_UID}.1.2"]
    assert arriving(receiver.spool) == []


def test_messages_sent_ahead_are_all_answered_in_order(receiver: Running) -> None:
    """A peer that does not wait for answers gets every one of them."""
    with connect_and_associate(receiver.port) as connection:
        for number in range(30):
            uid = f"{STUDY_UID}.1.{number}"
            connection.sendall(p_data(store_command(sop_instance_uid=uid), command=True, last=True))
            connection.sendall(p_data(encode(instance(number)), command=False, last=True))
        answers = [read_pdu(connection) for _ in range(30)]

    assert answers == [P_DATA_TF] * 30
    uids = [receipt.sop_instance_uid for receipt in receipts(receiver.spool)]
    assert uids == [f"{STUDY_UID}.1.{number}" for number in range(30)]


class Blocked:
    """A service whose disk does not answer until `go` is set."""

    def __init__(self) -> None:
        self.go = Event()

    def admit(self, peer: Peer) -> Refusal | None:
        return None

    def transfer_syntaxes(self, abstract_syntax: Any, proposed: Any) -> list[Any]:
        return list(proposed)

    def may(self, peer: Peer, abstract_syntax: Any, as_provider: bool) -> bool:
        return True

    def event_report(self, peer: Peer, report: EventReport) -> int:
        return 0x0110

    def store(self, peer: Peer, request: StoreRequest) -> int:
        self.go.wait()
        return 0x0000

    def dropped(self, address: str, peer: Peer | None, reason: str, remedy: str) -> None:
        return None

    def closed(self, peer: Peer, released: bool) -> None:
        return None


def listen(service: Any, idle_timeout_s: float = 20) -> tuple[Acceptor, int]:
    listener = Listener("127.0.0.1", 0, None)
    listening = Acceptor(
        [listener],
        limits=Limits(
            idle_timeout_s=idle_timeout_s,
            pdu_timeout_s=idle_timeout_s,
            max_associate_bytes=1 << 20,
            max_pdu_bytes=131072,
            max_command_bytes=1 << 16,
            max_data_set_bytes=1 << 30,
            max_unassociated=128,
        ),
        implementation=(IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME),
        service=service,
    )
    listening.start()
    return listening, listener.port


def test_peer_that_does_not_wait_is_slowed_down_instead_of_filling_memory() -> None:
    """While the disk blocks, a few messages are read ahead and the rest stays with the peer."""
    service = Blocked()
    listening, port = listen(service)
    sent = 0
    with connect_and_associate(port) as connection:
        connection.settimeout(1)
        message = p_data(store_command(), command=True, last=True)
        message += p_data(bytes(120_000), command=False, last=False) * 7 + p_data(b"", command=False, last=True)
        with pytest.raises(TimeoutError):  # noqa: PT012  the message at which it stops is of no interest
            for _ in range(200):
                connection.sendall(message)
                sent += len(message)
        service.go.set()
    listening.stop(0)

    assert sent < 40 << 20


def test_disk_that_takes_longer_than_the_idle_timeout_aborts_nobody() -> None:
    """The peer waits for our answer; that is not idleness of the peer."""
    service = Blocked()
    listening, port = listen(service, idle_timeout_s=SHORT_S)
    association = associate(port)
    answers: list[int | None] = []
    storing = Thread(target=lambda: answers.append(send_instance(association, instance(1))))
    storing.start()
    service.go.wait(SHORT_S * 3)
    service.go.set()
    storing.join()
    answers.append(send_instance(association, instance(2)))
    association.release()
    listening.stop(0)

    assert answers == [0x0000, 0x0000]


class Broken(Blocked):
    """A service with a fault in it."""

    def admit(self, peer: Peer) -> Refusal | None:
        raise RuntimeError("Planted^Patient")


def test_fault_while_deciding_lets_nobody_in() -> None:
    """When the decision fails, the connection ends, and the log has the class of the fault without its text."""
    with capture_logs() as lines:
        listening, port = listen(Broken())
        with connect(port) as connection:
            connection.sendall(association_request())
            assert read_pdu(connection) in (None, A_ABORT)
        listening.stop(0)

    (line,) = [line for line in lines if line["event"] == "association_failed"]
    assert "RuntimeError" in line["error"]
    assert "Planted" not in str(lines)


def test_fault_of_the_disk_is_no_success(receiver: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the spool raises, the sender is told to come again, and the association goes on."""

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    association = associate(receiver.port)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fail)
        refused = send_instance(association, instance())
    stored = send_instance(association, instance())
    association.release()

    assert (refused, stored) == (0xA700, 0x0000)
    assert len(receipts(receiver.spool)) == 1


def test_commitment_information_that_breaks_off_is_malformed(fuzzed: Running) -> None:
    """pydicom calls that an OSError, and it is no fault of our disk: 0x0115, for report and request."""
    peer = Peer("1", "FUZZ", "MEDPRUNER", "127.0.0.1", datetime.now(UTC))
    content = b"".join(encode_tree(node) for node in action_information("implicit", "2.25.1", ["2.25.2"]))
    broken = content[:22] + b"\xfe\xff\0"  # the sequence ends in the tag of its first item

    request = ActionRequest(PUSH_MODEL, PUSH_MODEL_INSTANCE, 1, ImplicitVRLittleEndian, broken)
    report = EventReport(PUSH_MODEL, ImplicitVRLittleEndian, broken)

    assert fuzzed.receiver.action(peer, request) == 0x0115
    assert fuzzed.receiver.event_report(peer, report) == 0x0115
    assert fuzzed.receiver.action(peer, replace(request, action_information=content)) == 0x0000


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chance=st.randoms(use_true_random=False), number=st.integers(0, 10**6))
def test_no_conversation_brings_the_receiver_down(fuzzed: Running, chance: random.Random, number: int) -> None:
    """PDUs, command sets and data sets with wrong lengths, types, nesting, UIDs, fragments and order: the receiver ends
    the conversation, meets no fault of its own, keeps what it acknowledged, and serves the next sender."""
    conversation = converse(number, chance)
    with capture_logs() as lines:
        answers = hold(fuzzed.port, conversation)

    assert answers.is_over
    assert [line for line in lines if line["event"] == "association_failed"] == []
    assert [status for status, _ in answers.stored if status not in (0x0000, 0xA900, 0xC000, 0xC210)] == []
    kept = {receipt.sop_instance_uid for receipt in receipts(fuzzed.spool)}
    assert {uid for status, uid in answers.stored if status == 0x0000} <= kept
    assert [
        status for status in answers.actions if status not in (0x0000, 0x0112, 0x0115, 0x0118, 0x0123, 0x0124)
    ] == []
    assert None not in [request for _, request in commitment_requests.requests(fuzzed.spool.path)]
    assert asked_for_association(fuzzed.port)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fuzzer_amid_dead_connections(tmp_path: Path) -> None:
    """The first cases of `./run prove hostile`: 200 idle and 50 stalled connections stand around all the time."""
    state = fuzz(tmp_path / "fuzz", 5, 1500, within_s=30, tell=lambda *_: None)

    assert state.broken == []
    assert state.done == 1500
    assert state.probes > 0
    assert state.acknowledged > 300
    assert state.requested > 50


def test_receiver_is_quiet_about_contents(receiver: Running) -> None:
    """Hostile bytes leave lines that name the address and the reason, never the bytes."""
    with capture_logs() as lines:
        rubbish = p_data(b"Planted^" * 50, command=True, last=True)
        for content in (b"Planted^Patient" * 100, association_request() + rubbish):
            with connect(receiver.port) as connection:
                connection.sendall(content)
                while read_pdu(connection) is not None:
                    pass
        wait_until(lambda: len([line for line in lines if line["event"] == "association_closed"]) == 1)

    assert [line for line in lines if line.get("address") == "127.0.0.1"] != []
    assert "Planted" not in str(lines)
    assert {CTImageStorage, ExplicitVRLittleEndian}.isdisjoint(str(lines).split())
