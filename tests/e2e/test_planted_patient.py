"""A patient who can be recognised goes the whole way, and every wrong one: nothing of him is where nobody may look.

He may stand in the DICOM files, the outputs and the two erasable tables, and nowhere else.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from aiosmtpd.controller import Controller
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE, AllStoragePresentationContexts, Association, build_context, evt
from sqlalchemy import MetaData, select

from service.answers import keep_answers
from service.shared.db import Acquisition, Analysis, ReportText, StudyHeader
from service.spool import Spool
from tests.phantom_series import PhantomSeries
from tests.receiving import accepting
from tests.running import FINAL, SENDER, Pacs, Service, Storescp, deliveries, send
from tests.servers import free_port, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

LATIN_MARK = "zqx"  # in every planted value, in any case
JAPANESE_MARKS = ("植木", "患者", "うえき", "かんじゃ")
ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be", "euc-jp", "shift_jis", "iso2022_jp")
ERASABLE = (StudyHeader.__tablename__, Acquisition.__tablename__, ReportText.__tablename__)

ALERTS = """
[alerts]
interval_s = 0.5
webhook_url = "http://127.0.0.1:{webhook}/hook"
mail_to = ["pacs@hospital.example"]
smtp_host = "127.0.0.1"
smtp_port = {mail}
drift_min_analyses = 1
"""
TOLD = ("failed", "patient-mismatch", "rejected", "keep-ratio-drift")  # alerts that his studies give cause for

ROUTES = """
[[route]]
name = "healthy"
match = { SeriesNumber = "[12]" }

[[route]]
name = "without-a-model"
match = { SeriesNumber = "9" }
model = { path = "/nonexistent" }
"""


def marks_in(content: bytes | str) -> list[str]:
    """Every planted mark in `content`, in any encoding that it could have taken."""
    raw = content.encode() if isinstance(content, str) else content
    found = [LATIN_MARK] if re.search(rb"z\0?q\0?x", raw, re.IGNORECASE) else []
    for mark in JAPANESE_MARKS:
        forms = [mark.encode(encoding) for encoding in ENCODINGS]
        # without the escape sequences around it, which other text may share; and as JSON and Python write it
        forms += [mark.encode("iso2022_jp")[3:-3], json.dumps(mark)[1:-1].encode(), repr(mark.encode())[2:-1].encode()]
        found += [mark for form in forms if form in raw]
    return found


def planted(study: int, **more: Any) -> PhantomSeries:
    return PhantomSeries(
        study=study,
        patient_name="Zqxname^Planted=植木^患者=うえき^かんじゃ",
        patient_id=more.pop("patient_id", "ZQXID4711"),
        charset=r"\ISO 2022 IR 87",
        accession_number=f"ZQXACC{study}",
        study_description="zqxdescription 植木",
        series_description="Zqxseries",
        **more,
    )


def write(phantom: PhantomSeries, folder: Path, *, swap: tuple[bytes, bytes] = (b"", b"")) -> Path:
    """The series with more planted attributes; swap: bytes of the file replaced by others of the same length."""
    for path in phantom.write(folder):
        dataset = dcmread(path)
        dataset.ReferringPhysicianName = "Zqxreferrer^Planted=患者^植木"
        dataset.OperatorsName = "Zqxoperator"
        dataset.InstitutionName = "Zqxinstitution"
        dataset.PatientComments = "zqxcomment 患者"
        dataset.OtherPatientIDs = "ZQXOTHER"
        dataset.PatientAddress = "zqxaddress"
        dataset.ProtocolName = "Zqxprotocol 植木"  # typed by people, as these two are
        dataset.StationName = "ZQXSTATION"
        dataset.save_as(path)
        if swap[0]:
            assert swap[0] in path.read_bytes()
            path.write_bytes(path.read_bytes().replace(*swap))
    return folder


@contextmanager
def quoting_pacs() -> Iterator[int]:
    """A PACS that refuses every report and quotes the patient in its Error Comment, as some do; its port."""

    def refuse(event: evt.Event) -> Dataset:
        status = Dataset()
        status.Status = 0xC123
        status.ErrorComment = f"no such patient: {event.dataset.PatientID} Zqxname^Planted"
        return status

    application = AE(ae_title="QUOTES")
    for context in AllStoragePresentationContexts:
        application.add_supported_context(str(context.abstract_syntax))
    with accepting(application, ("127.0.0.1", 0), [(evt.EVT_C_STORE, refuse)]) as port:
        yield port


class Inbox:
    """A mail server's handler that keeps subjects and texts."""

    def __init__(self) -> None:
        self.mails: list[str] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # aiosmtpd's name
        mail = message_from_bytes(envelope.content, policy=policy.default)
        self.mails.append("\n".join([*map(str, mail.values()), str(mail.get_content())]))
        return "250 taken"


@contextmanager
def people_to_tell() -> Iterator[tuple[str, list[str], list[str]]]:
    """A webhook and a mail server: the configuration that names them, what was posted, what was mailed."""
    posted: list[str] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the standard library's name
            posted.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    inbox = Inbox()
    mail = Controller(inbox, hostname="127.0.0.1", port=free_port())
    hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    thread = Thread(target=hook.serve_forever)
    thread.start()
    try:
        mail.start()
        try:
            yield ALERTS.format(webhook=hook.server_port, mail=mail.port), posted, inbox.mails
        finally:
            mail.stop()
    finally:
        hook.shutdown()
        thread.join()
        hook.server_close()


@contextmanager
def association_to(service: Service) -> Iterator[Association]:
    sockets: list[Any] = []
    application = AE(ae_title=SENDER)
    association = application.associate(
        "127.0.0.1",
        service.port,
        contexts=[build_context(CTImageStorage, ExplicitVRLittleEndian)],
        ae_title="MEDPRUNER",
        evt_handlers=[(evt.EVT_CONN_OPEN, lambda event: sockets.append(event.assoc.dul.socket.socket))],
    )
    assert association.is_established
    keep_answers(association)
    try:
        yield association
    finally:
        association.release()
        for one in sockets:  # pynetdicom leaves it open
            one.close()


@dataclass(frozen=True)
class Aftermath:
    """The service at rest, after everything that could happen to the patient happened."""

    service: Service
    heartbeats: list[bytes]
    states: dict[str, str]  # what was planted -> the state it ended in
    reasons: list[str]
    posted: list[str]  # alerts by webhook
    mailed: list[str]  # alerts by mail
    metrics: str
    error_pages: list[str]  # and what programs got instead


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory, random_model: Path, storescp: Storescp) -> Iterator[Aftermath]:
    folder = tmp_path_factory.mktemp("planted")
    series = {
        "read": planted(51),
        "localizer": planted(52, slices=1, localizer=True),
        "broken pixels": planted(53),
        "no model": planted(54, series=9),
        "mixed patients": planted(55),
        "broken numbers": planted(56),
        "broken dates": planted(57),
    }
    for name, phantom in series.items():
        swap = {
            "broken numbers": (b"5.0\\5.0 ", b"zqxbad\\1"),
            "broken dates": (b"20260102", b"zqxdate1"),
        }.get(name, (b"", b""))
        write(phantom, folder / name, swap=swap)
    write(planted(55, series=2, patient_id="ZQXANOTHER"), folder / "mixed patients" / "another")
    for path in (folder / "broken pixels").iterdir():
        dataset = dcmread(path)
        dataset.PixelData = b"zqxpixels "  # shorter than Rows and Columns say
        dataset.save_as(path)

    with quoting_pacs() as quoting_port, people_to_tell() as (channels, posted, mailed):
        web_port = free_port()
        pacs = [Pacs(storescp.port), Pacs(quoting_port, "quotes", "QUOTES"), Pacs(free_port(), "away", "AWAY")]
        with Service(
            folder / "service", random_model, pacs=pacs, more=ROUTES + channels, level="DEBUG", web_port=web_port
        ) as service:
            heartbeats = send_and_look_at_heartbeats(service, sorted((folder / "read").iterdir()))
            send(service, *(folder / name for name in series if name != "read"))
            states, reasons = {}, []
            for name, phantom in series.items():
                story = service.wait_for(phantom.study_uid, is_at_rest, f"{name}: an end", 150)
                (analysis,) = story["analyses"]
                states[name] = analysis["state"]
                reasons += [str(analysis["reason"]), *(str(one["reason"]) for one in deliveries(story))]
            keep_less_than_before(service)
            for told in (posted, mailed):
                wait_for(lambda told=told: all(kind in "".join(told) for kind in TOLD), "alerts by both channels", 60)
            metrics = wait_for(lambda: metrics_once_counted(web_port), "metrics that count everything", 60)
            error_pages = list(provoke_faults(service, web_port))
            yield Aftermath(service, heartbeats, states, reasons, posted, mailed, metrics, error_pages)


def keep_less_than_before(service: Service) -> None:
    """His scanner and protocol, as they were read: ten days ago twice as much of the tokens was kept."""
    with service.sessions.begin() as session:
        read = session.scalars(select(Acquisition).limit(1)).one()
        without = Analysis.id.not_in(select(Acquisition.analysis_id))
        other = session.scalars(select(Analysis.id).where(without).limit(1)).one()
        columns = {column.key: getattr(read, column.key) for column in Acquisition.__mapper__.column_attrs}
        columns |= {"analysis_id": other, "at": read.at - timedelta(days=10), "tokens_kept": 2 * read.tokens_kept}
        session.add(Acquisition(**columns))


def provoke_faults(service: Service, port: int) -> Iterator[str]:
    """What the web answers where it breaks on a value that holds him, and where it is asked for him."""
    with service.sessions.begin() as session:
        read = select(Acquisition.analysis_id).limit(1)
        broken = session.get_one(Analysis, session.scalars(read).one())
        study_id, counts = broken.study_id, broken.counts
        broken.counts = "Zqxname^Planted=植木"  # type: ignore[assignment]  # what no shape allows
    for address, status in (
        (f"studies/{study_id}", 500),
        (f"api/v1/studies/{study_id}", 500),
        ("studies?state=zqxname-that-is-too-long", 422),
        ("api/v1/studies?limit=zqxname", 422),
        ("zqxname", 404),
        ("api/v1/zqxname", 404),
    ):
        with pytest.raises(HTTPError) as told:
            urlopen(f"http://127.0.0.1:{port}/{address}", timeout=30)
        assert told.value.code == status
        yield f"{told.value.headers}\n{told.value.read().decode()}"
    with service.sessions.begin() as session:
        session.get_one(Analysis, broken.id).counts = counts


def metrics_once_counted(port: int) -> str:
    """What Prometheus would get; empty while the totals are behind the audit."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        content: str = answer.read().decode()
    return content if re.search(r"^medpruner_tally_lag_events 0(\.0)?$", content, re.MULTILINE) else ""


def send_and_look_at_heartbeats(service: Service, paths: list[Path]) -> list[bytes]:
    """Send one study over pynetdicom, an instance without a Study Instance UID as well; the open heartbeats."""
    with association_to(service) as association:
        for path in paths:
            assert association.send_c_store(path).Status == 0x0000
        nameless = dcmread(paths[0])
        del nameless.StudyInstanceUID
        assert association.send_c_store(nameless).Status == 0xC000
        folder = service.settings.data.path / "spool" / "associations"
        return wait_for(lambda: [path.read_bytes() for path in folder.iterdir()], "a heartbeat")


def is_at_rest(story: dict[str, Any]) -> bool:
    """Read (or given up), and every destination has been tried."""
    states = [one["state"] for one in story["analyses"]]
    if not states or not all(state in FINAL or state == "read" for state in states):
        return False
    if "read" in states and not any(one["results"] for one in story["analyses"]):
        return False
    return all(one["attempts"] for one in deliveries(story))


def test_everything_happened_to_the_patient(aftermath: Aftermath) -> None:
    """He was read, refused for four reasons, failed, delivered, rejected and postponed; else the rest proves little."""
    assert aftermath.states["read"] == "done"
    assert aftermath.states["localizer"] == "refused"
    assert aftermath.states["broken pixels"] == "refused"
    assert aftermath.states["no model"] == "failed"
    assert aftermath.states["mixed patients"] == "refused"
    assert aftermath.states["broken numbers"] == "refused"
    told = "\n".join(aftermath.reasons)
    assert "refused by the destination (0xC123)" in told
    assert "cannot be reached" in told


def test_the_search_finds_him_where_he_may_be(aftermath: Aftermath) -> None:
    """In the stored instances and the built reports, in every form: else finding nothing elsewhere proves nothing."""
    data = aftermath.service.settings.data.path
    stored = {mark for path in (data / "spool").rglob("*.dcm") for mark in marks_in(path.read_bytes())}
    built = {mark for path in (data / "outbox").rglob("*.dcm") for mark in marks_in(path.read_bytes())}

    assert stored == {LATIN_MARK, *JAPANESE_MARKS}
    assert built == {LATIN_MARK, *JAPANESE_MARKS}
    assert set(marks_in(json.dumps({"name": "植木"}) + repr("患者".encode()))) == {"植木", "患者"}


def test_he_is_in_no_log(aftermath: Aftermath) -> None:
    """Neither the service nor the worker names him at DEBUG, not even by quoting a value that broke a rule."""
    text = aftermath.service.log_text()

    assert "analysis_refused" in text
    assert "analysis_fault" in text
    assert "instance_refused" in text
    assert [line for line in text.splitlines() if marks_in(line)] == []


def test_he_is_not_in_redis(aftermath: Aftermath) -> None:
    """No key, no value, no command of the append-only file and no message in it holds a mark."""
    with aftermath.service.redis() as client:
        for key in client.scan_iter("*"):
            assert marks_in(key) == []
            assert marks_in(client.dump(key) or b"") == []
    files = [path for path in (aftermath.service.settings.data.path / "redis").rglob("*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    messages = [base64.b64decode(body) for body in re.findall(rb'"body": ?"([A-Za-z0-9+/=]+)"', content)]
    assert len(messages) >= 4
    assert marks_in(content) == []
    assert marks_in(b"\n".join(messages)) == []
    assert all(re.fullmatch(r"\[\[\d+\], \{\}, \{.*\}\]", message.decode()) for message in messages)  # one id


def test_he_is_in_no_alert_and_no_metric(aftermath: Aftermath) -> None:
    """Nobody who is told by webhook or mail, and no scrape, learns his name or what the scanner's user typed."""
    assert "medpruner_analyses_total" in aftermath.metrics
    assert marks_in(aftermath.metrics) == []
    told = (*aftermath.posted, *aftermath.mailed)
    assert any("of one scanner and protocol" in one for one in told)
    assert [one for one in told if marks_in(one)] == []


def test_he_is_on_no_error_page(aftermath: Aftermath) -> None:
    """A page or a problem that breaks on his data, or is asked for him by name, says neither; the log names it."""
    references = re.findall(r"under the reference ([0-9a-f]{8})", "\n".join(aftermath.error_pages))

    assert len(aftermath.error_pages) == 6
    assert len(set(references)) == 2
    assert all(reference in aftermath.service.log_text() for reference in references)
    assert [one for one in aftermath.error_pages if marks_in(one) or "Traceback" in one] == []


def test_he_is_in_no_receipt_and_no_heartbeat(aftermath: Aftermath) -> None:
    """What the receiver adds to the instances says where they came from, not whose they are."""
    spool = aftermath.service.settings.data.path / "spool"
    others = [path for path in spool.rglob("*") if path.is_file() and path.suffix != ".dcm"]
    receipts = [Spool(spool, 0).read(path).to_json() for path in spool.glob("studies/*/*.dcm")]

    assert len(receipts) > 50
    assert [path for path in others if marks_in(path.read_bytes())] == []
    assert marks_in(b"\n".join(receipts)) == []
    assert aftermath.heartbeats
    assert marks_in(b"\n".join(aftermath.heartbeats)) == []
    names = "\n".join(str(path.relative_to(spool.parent)) for path in spool.parent.rglob("*"))
    assert marks_in(names) == []


def test_he_is_in_no_table_but_the_erasable_ones(aftermath: Aftermath) -> None:
    """Audit events, reasons, gate findings and every other column are free of him; study_header holds him."""
    holding = set()
    with aftermath.service.sessions() as session:
        there = MetaData()  # what the database holds, whatever the models know
        there.reflect(session.connection())
        for table in there.sorted_tables:
            for row in session.execute(select(table)):
                if marks_in(json.dumps([str(value) for value in row], ensure_ascii=False)):
                    holding.add(table.name)

    assert "audit_event" in there.tables
    assert {StudyHeader.__tablename__, Acquisition.__tablename__} <= holding
    assert holding - set(ERASABLE) == set()
