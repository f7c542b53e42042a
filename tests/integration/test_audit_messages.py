"""DICOM audit messages: what they say, their grammar, and their way over TLS to a repository that comes and goes."""

from __future__ import annotations

import re
import socket
import ssl
import struct
import subprocess
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as Signal
from threading import Thread
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service import atna, audit_feed, chain, syslog_tls
from service.atna import Event, Node, Peer, StudyObject
from service.shared import audit
from service.shared.audit import AuditKind
from service.shared.db import StudyHeader
from service.shared.settings import Settings
from service.syslog_tls import NotSent
from tests.audit_schema import faults, faults_of_kind
from tests.receiving import wait_until
from tests.rows import ACTOR, NOW, add_study, open_database
from tests.servers import free_port

NODE = Node("MEDPRUNER", "medpruner-pacs/1", "node.example", "medpruner-pacs", "hospital")
STUDY = StudyObject("2.25.1000", "A-1", "P\x001", "Örtel^Jürgen & <Sohn>", (("1.2.840.10008.5.1.4.1.1.2", 20),))


def made(kind: str, **changes: Any) -> list[ET.Element]:
    fields: dict[str, Any] = {"detail": {}, "study": STUDY, "peer": Peer("CT01", "192.0.2.17")}
    content = atna.messages(Event(kind, NOW, "cli/\x1bme", **(fields | changes)), NODE)
    assert [fault for one in content for fault in faults(one)] == []
    return [ET.fromstring(one) for one in content]


def event_of(message: ET.Element) -> tuple[str, str, str]:
    identification = message.find("EventIdentification")
    assert identification is not None
    code = identification.find("EventID")
    assert code is not None
    return (
        code.attrib["csd-code"],
        identification.attrib["EventActionCode"],
        identification.attrib["EventOutcomeIndicator"],
    )


# --- what they say --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (AuditKind.SERVICE_STARTED, [("110100", "E", "0")]),
        (AuditKind.INSTANCES_RECEIVED, [("110104", "C", "0")]),
        (AuditKind.INSTANCES_RECEIVED_AGAIN, [("110104", "R", "0")]),
        (AuditKind.INSTANCE_CONFLICT, [("110104", "U", "0")]),
        (AuditKind.RESULT_QUARANTINED, [("110103", "C", "4")]),
        (AuditKind.RESULTS_REMOVED, [("110103", "D", "0")]),
        (AuditKind.DELIVERY_SOUGHT, [("110112", "E", "0")]),
        (AuditKind.AUDIT_READ, [("110101", "R", "0")]),
        (AuditKind.DELIVERY_FELL_BACK, []),
        (AuditKind.COMMITMENT_ASKED, []),
        (AuditKind.DELIVERY_DELIVERED, [("110102", "E", "0"), ("110104", "R", "0")]),
        (AuditKind.DELIVERY_POSTPONED, [("110102", "E", "0"), ("110104", "R", "4")]),
        (AuditKind.DELIVERY_REJECTED, [("110102", "E", "0"), ("110104", "R", "8")]),
        (AuditKind.RESULT_BUILT, [("110103", "C", "0")]),
        (AuditKind.STUDY_VIEWED, [("110103", "R", "0")]),
        (AuditKind.STUDIES_LISTED, [("110112", "E", "0")]),
        (AuditKind.STUDY_FORGOTTEN, [("110105", "D", "0")]),
        (AuditKind.SIGN_IN_FAILED, [("110114", "E", "4")]),
        (AuditKind.USER_ADDED, [("110113", "E", "0")]),
        (AuditKind.ASSOCIATION_REFUSED, [("110113", "E", "4")]),
        (AuditKind.AUDIT_EXPORTED, [("110101", "R", "0")]),
    ],
)
def test_event_has_its_message(kind: AuditKind, expected: list[tuple[str, str, str]]) -> None:
    """Identity, action and outcome."""
    assert [event_of(one) for one in made(kind)] == expected


@pytest.mark.parametrize("kind", list(AuditKind))
@pytest.mark.parametrize("changes", [{}, {"study": None, "peer": None}, {"study": StudyObject("2.25.1")}])
def test_every_message_follows_the_grammar(kind: AuditKind, changes: dict[str, Any]) -> None:
    """With all that is known, with nothing, and of a study whose patient was forgotten."""
    made(kind, **changes)


@pytest.mark.parametrize("kind", list(AuditKind))
def test_every_message_keeps_to_its_table(kind: AuditKind) -> None:
    """Action, type, roles, objects and addresses as A.5.3 asks of this message."""
    for content in atna.messages(
        Event(kind, NOW, "web/me", {"address": "192.0.2.5"}, STUDY, Peer("CT01", "ct01")), NODE
    ):
        assert faults_of_kind(content) == []


def test_tables_notice_faults() -> None:
    """A check that could not fail would prove nothing."""
    event = Event(AuditKind.INSTANCES_RECEIVED, NOW, "x", {}, STUDY, Peer("CT01", "192.0.2.17"))
    (content,) = atna.messages(event, NODE)

    for old, new in (
        (b'EventActionCode="C"', b'EventActionCode="D"'),
        (b'csd-code="110153"', b'csd-code="110152"'),
        (b'csd-code="110180"', b'csd-code="110181"'),
        (b'ParticipantObjectTypeCode="1"', b'ParticipantObjectTypeCode="2"'),
        (b"</EventIdentification>", b'<EventTypeCode csd-code="110122"/></EventIdentification>'),
        (b'"110104"', b'"110114"'),
    ):
        assert old in content
        assert faults_of_kind(content.replace(old, new, 1))


def test_table_for_operators_is_what_is_sent() -> None:
    """Every kind of event stands in docs/operations.md with its messages, or with the reason why there is none."""
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+(?:`, `[a-z-]+)*)` \| (.*?) \| (.+) \|$", text, re.MULTILINE)
    told = {
        kind: re.findall(r"(\d{6}) (?:.*?) \(([CRUDE])\)", sent)
        for kinds, sent, _ in rows
        for kind in kinds.split("`, `")
    }
    sent = {kind: [event_of(one)[:2] for one in made(kind)] for kind in AuditKind}

    assert {kind: told.get(kind) for kind in sent} == dict(sent.items())


def test_find_is_sent_as_it_was_asked() -> None:
    """The Identifier in the Native DICOM Model, in base64, under its SOP Class."""
    (message,) = made(AuditKind.DELIVERY_SOUGHT, series_uid="2.25.7", sop_instance_uid="2.25.8")

    (asked,) = message.findall("ParticipantObjectIdentification")
    query = ET.fromstring(b64decode(asked.findtext("ParticipantObjectQuery") or ""))
    assert asked.attrib["ParticipantObjectID"] == "1.2.840.10008.5.1.4.1.2.2.1"
    assert {one.attrib["keyword"]: one.findtext("Value") for one in query} == {
        "QueryRetrieveLevel": "IMAGE",
        "StudyInstanceUID": STUDY.study_uid,
        "SeriesInstanceUID": "2.25.7",
        "SOPInstanceUID": "2.25.8",
    }


@pytest.mark.parametrize(
    ("address", "kind"), [("192.0.2.17", "2"), ("fd00::1", "2"), ("ct.hospital", "1"), ("ct01", "1")]
)
def test_address_is_marked_as_what_it_is(address: str, kind: str) -> None:
    """A name of letters and dots is no IP address."""
    (message,) = made(AuditKind.INSTANCES_RECEIVED, peer=Peer("CT01", address))

    sender, _ = message.findall("ActiveParticipant")
    assert (sender.attrib["NetworkAccessPointID"], sender.attrib["NetworkAccessPointTypeCode"]) == (address, kind)


def test_grammar_notices_faults() -> None:
    """A check that could not fail would prove nothing."""
    (content,) = atna.messages(Event(AuditKind.SERVICE_STARTED, NOW, "x", {}), NODE)

    for old, new in (
        (b'EventOutcomeIndicator="0"', b'EventOutcomeIndicator="1"'),
        (b'UserIsRequestor="false"', b""),
        (b"<EventTypeCode", b"<EventID"),
        (b"AuditSourceID=", b"SourceID="),
    ):
        assert old in content
        assert faults(content.replace(old, new, 1).replace(b"</EventTypeCode", b"</EventID"))


def test_transfer_names_both_ends_the_study_and_the_patient() -> None:
    """The sender asked for it; what XML cannot hold is replaced, what it must escape is escaped."""
    (message,) = made(AuditKind.INSTANCES_RECEIVED)

    sender, us = message.findall("ActiveParticipant")
    assert (sender.attrib["UserID"], sender.attrib["UserIsRequestor"]) == ("CT01", "true")
    assert sender.attrib["NetworkAccessPointID"] == "192.0.2.17"
    assert us.attrib["AlternativeUserID"] == "AETITLES=MEDPRUNER"
    study, patient = message.findall("ParticipantObjectIdentification")
    assert study.attrib["ParticipantObjectID"] == "2.25.1000"
    assert study.find("ParticipantObjectDescription/Accession").attrib == {"Number": "A-1"}  # type: ignore[union-attr]
    assert patient.attrib["ParticipantObjectID"] == "P?1"
    assert patient.findtext("ParticipantObjectName") == "Örtel^Jürgen & <Sohn>"


# --- their way ------------------------------------------------------------------------------------------------------


@dataclass
class Repository:
    """A syslog listener over TLS on loopback: octet-counted frames in, nothing out."""

    certificate: Path
    key: Path
    port: int = field(default_factory=free_port)
    received: list[bytes] = field(default_factory=list)
    reset_after: int | None = None  # bytes, then the connection is torn down
    says_goodbye: bool = True

    @contextmanager
    def up(self) -> Iterator[None]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        stop = Signal()
        with socket.create_server(("127.0.0.1", self.port)) as listener:
            listener.settimeout(0.05)
            thread = Thread(target=self._serve, args=(listener, context, stop))
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()

    def _serve(self, listener: socket.socket, context: ssl.SSLContext, stop: Signal) -> None:
        while not stop.is_set():
            try:
                plain, _ = listener.accept()
            except TimeoutError:
                continue
            plain.settimeout(5)
            try:
                with context.wrap_socket(plain, server_side=True) as connection:
                    self._take(connection)
            except OSError:
                continue

    def _take(self, connection: ssl.SSLSocket) -> None:
        content = b""
        while chunk := connection.recv(65536):
            content += chunk
            if self.reset_after is not None and len(content) >= self.reset_after:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
        while content:
            length, _, content = content.partition(b" ")
            self.received.append(content[: int(length)])
            content = content[int(length) :]
        if self.says_goodbye:
            connection.unwrap()

    def bodies(self) -> list[bytes]:
        """The XML of the audit messages."""
        return [one.partition(syslog_tls.BOM)[2] for one in self.received if b" DICOM+RFC3881 - " in one]

    def kinds(self) -> list[str]:
        return [event_of(ET.fromstring(one))[0] for one in self.bodies()]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Self-signed, for localhost."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "certificate.pem", folder / "key.pem"


@pytest.fixture
def repository(certificate: tuple[Path, Path]) -> Repository:
    return Repository(*certificate)


@pytest.fixture
def settings(tmp_path: Path, repository: Repository) -> Settings:
    return Settings.model_validate(
        {
            "data": {"path": tmp_path / "data"},
            "audit": {
                "syslog_host": "localhost",
                "syslog_port": repository.port,
                "syslog_ca": repository.certificate,
                "syslog_interval_s": 0.05,
            },
        }
    )


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        yield opened


def add_events(sessions: sessionmaker[Session], *kinds: AuditKind, **fields: Any) -> None:
    with sessions.begin() as session:
        for kind in kinds:
            audit.append(session, kind, now=NOW, actor=ACTOR, **fields)
    with sessions.begin() as session:
        chain.append_batch(session)


def test_messages_arrive_in_order_with_the_head_of_the_chain(
    sessions: sessionmaker[Session], settings: Settings, repository: Repository
) -> None:
    """RFC 5424 header, UTF-8 with its mark, and each event once; what has no message is passed over."""
    add_events(sessions, AuditKind.SERVICE_STARTED, AuditKind.STUDY_COMPLETE, AuditKind.SIGNED_IN)

    with repository.up():
        assert audit_feed.feed(settings, sessions, NODE) == 3
        assert audit_feed.feed(settings, sessions, NODE) == 0

    assert repository.kinds() == ["110100", "110114"]
    assert repository.received[0].startswith(b"<85>1 2026-03-01T12:00:00.000000+00:00 ")
    assert all(faults(one) == [] for one in repository.bodies())
    assert b'"seq": 3' in repository.received[-1]
    assert b" AUDITHEAD - " in repository.received[-1]


def test_outage_keeps_everything_back_and_loses_nothing(
    sessions: sessionmaker[Session], settings: Settings, repository: Repository
) -> None:
    """Down, up, down, up, over a restart of ours: every message once, in order."""
    add_events(sessions, AuditKind.SERVICE_STARTED)
    with pytest.raises(NotSent, match="ConnectionRefusedError"):
        audit_feed.feed(settings, sessions, NODE)
    with repository.up():
        audit_feed.feed(settings, sessions, NODE)
    add_events(sessions, AuditKind.SIGNED_IN, AuditKind.SIGNED_OUT)
    with pytest.raises(NotSent):
        audit_feed.feed(settings, sessions, NODE)
    add_events(sessions, AuditKind.SERVICE_STOPPED)
    with repository.up():
        audit_feed.feed(settings, sessions, NODE)

    assert repository.kinds() == ["110100", "110114", "110114", "110100"]


def test_connection_that_breaks_sends_all_of_it_again(
    sessions: sessionmaker[Session], settings: Settings, repository: Repository
) -> None:
    """What a torn connection had taken in counts for nothing."""
    add_events(sessions, *[AuditKind.SIGNED_IN] * 50)
    repository.reset_after = 2000
    with repository.up(), pytest.raises(NotSent):
        audit_feed.feed(settings, sessions, NODE)
    repository.reset_after = None

    with repository.up():
        assert audit_feed.feed(settings, sessions, NODE) == 50

    assert repository.kinds() == ["110114"] * 50


def test_repository_that_ends_without_goodbye_has_taken_all(
    sessions: sessionmaker[Session], settings: Settings, repository: Repository
) -> None:
    """Some only close the connection; that is no reason to send everything for ever."""
    add_events(sessions, AuditKind.SIGNED_IN)
    repository.says_goodbye = False

    with repository.up():
        assert audit_feed.feed(settings, sessions, NODE) == 1

    assert repository.kinds() == ["110114"]


def test_repository_that_nobody_vouches_for_gets_nothing(
    sessions: sessionmaker[Session], settings: Settings, repository: Repository
) -> None:
    """A certificate that no CA of ours signed, and one of another name."""
    add_events(sessions, AuditKind.SIGNED_IN)
    for changes in ({"syslog_ca": None}, {"syslog_host": "127.0.0.1"}):
        wrong = settings.model_copy(update={"audit": settings.audit.model_copy(update=changes)})

        with repository.up(), pytest.raises(NotSent, match="not trusted"):
            audit_feed.feed(wrong, sessions, NODE)

    assert repository.received == []


def test_loop_catches_up_when_the_repository_comes_back(
    sessions: sessionmaker[Session], settings: Settings, repository: Repository
) -> None:
    """By itself, and what comes meanwhile too."""
    add_events(sessions, AuditKind.SERVICE_STARTED)
    stop = Signal()
    thread = Thread(target=audit_feed.feed_for_ever, args=(settings, sessions, NODE, stop))
    thread.start()
    try:
        add_events(sessions, AuditKind.SIGNED_IN)
        with repository.up():
            wait_until(lambda: len(repository.kinds()) == 2)
    finally:
        stop.set()
        thread.join()

    assert repository.kinds() == ["110100", "110114"]


def test_forgotten_patient_is_not_sent_afterwards(
    sessions: sessionmaker[Session], settings: Settings, repository: Repository
) -> None:
    """What an outage kept back holds the patient only for as long as we do."""
    study_id = add_study(sessions)
    names = ("issuer_of_patient_id", "patient_birth_date", "patient_sex", "study_date", "study_description")
    with sessions.begin() as session:
        header = {"salt": "", "patient_id": "P1", "patient_name": "X^Y", "accession_number": "A1"}
        session.add(StudyHeader(study_id=study_id, **header, **dict.fromkeys(names, "")))
    add_events(sessions, AuditKind.RESULT_BUILT, study_id=study_id)
    with repository.up():
        audit_feed.feed(settings, sessions, NODE)
    audit_feed.cursor_file(settings).unlink()
    with sessions.begin() as session:
        session.delete(session.get_one(StudyHeader, study_id))
    with repository.up():
        audit_feed.feed(settings, sessions, NODE)

    before, after = repository.bodies()
    assert b"X^Y" in before
    assert b"X^Y" not in after
    assert b"2.25.1000" in after
