"""Storage commitment as SCP: what pynetdicom's and Orthanc's users ask, what we vouch for, and how they are told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, MRImageStorage
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import StorageCommitmentPushModel
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service import assembly, commitment_requests, custody, retention
from service.commitment_answers import PUSH_MODEL_INSTANCE
from service.commitment_requests import Reference, Request
from service.refusals import recent
from service.shared import audit
from service.shared.db import Study, StudyState
from service.shared.settings import Settings
from tests.receiving import SENDER, STUDY_UID, Running, accepting, associate, instance, running, send_instance
from tests.rows import kinds, open_database
from tests.servers import Modality, Orthanc, free_port, wait_for

# pynetdicom drops the socket of a refused connection without closing it; CPython closes it in the same moment
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRLittleEndian]
TRANSACTION = "2.25.88"


@dataclass
class Requester:
    """A modality that stores, asks for commitment, and takes reports on a port of its own."""

    port: int
    answer: int = 0x0000  # to our reports
    is_provider_allowed: bool = True
    reports: list[tuple[int, Dataset]] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)

    @contextmanager
    def listening(self) -> Iterator[None]:
        entity = AE(SENDER)
        entity.add_supported_context(
            StorageCommitmentPushModel, SYNTAXES, scu_role=False, scp_role=self.is_provider_allowed
        )
        handlers: list[Any] = [(evt.EVT_N_EVENT_REPORT, self._take)]
        with accepting(entity, ("127.0.0.1", self.port), handlers):
            yield

    def _take(self, event: evt.Event) -> tuple[int, None]:
        if self.answer == 0x0000:
            self.reports.append((event.event_type, event.event_information))
        self.callers.append(event.assoc.requestor.ae_title)
        return self.answer, None

    def report(self) -> tuple[int, list[tuple[str, str]], dict[str, int]]:
        """The one report that came: event type, what is committed, what failed and why."""
        ((event_type, content),) = self.reports
        assert content.TransactionUID == TRANSACTION
        committed = [
            (str(one.ReferencedSOPClassUID), str(one.ReferencedSOPInstanceUID))
            for one in content.get("ReferencedSOPSequence", [])
        ]
        failed = {str(one.ReferencedSOPInstanceUID): one.FailureReason for one in content.get("FailedSOPSequence", [])}
        return event_type, committed, failed


@dataclass
class Custodian:
    """A receiver, and what ingest and delivery do for storage commitment."""

    receiver: Running
    sessions: sessionmaker[Session]
    settings: Settings

    def __post_init__(self) -> None:
        self.reporter = custody.Reporter(self.settings, self.sessions, self.receiver.spool.path)

    def ingest(self) -> None:
        spool, now = self.receiver.spool, datetime.now(UTC)
        asked = list(commitment_requests.requests(spool.path))
        assembly.ingest(self.settings, self.sessions, spool, now)
        custody.decide(asked, self.sessions, spool, now)

    def report(self, *, later_s: float = 0) -> int:
        return self.reporter.report_due(datetime.now(UTC) + timedelta(seconds=later_s))

    def files(self, folder: str) -> list[str]:
        return sorted(path.suffix for path in (self.receiver.spool.path / folder).glob("*"))


@pytest.fixture
def requester() -> Requester:
    return Requester(free_port())


@pytest.fixture
def custodian(tmp_path: Path, sqlite_url: str, requester: Requester) -> Iterator[Custodian]:
    with custodian_of(tmp_path, sqlite_url, [{"ae_title": SENDER, "commitment_port": requester.port}]) as made:
        yield made


@contextmanager
def custodian_of(folder: Path, url: str, sources: list[dict[str, Any]]) -> Iterator[Custodian]:
    content = {"data": {"path": folder}, "scp": {"storage_commitment": True}, "source": sources}
    settings = Settings.model_validate(content)
    with (
        open_database(url) as sessions,
        running(folder / "spool", sources=settings.source, storage_commitment=True) as receiver,
    ):
        yield Custodian(receiver, sessions, settings)


def store(receiver: Running, *numbers: int) -> None:
    association = associate(receiver.port)
    assert [send_instance(association, instance(number)) for number in numbers] == [0x0000] * len(numbers)
    association.release()


def call(receiver: Running, **roles: bool) -> Association:
    proposed = [build_role(StorageCommitmentPushModel, **roles)] if roles else []
    return associate(receiver.port, {StorageCommitmentPushModel: SYNTAXES}, roles=proposed)


def ask(
    receiver: Running,
    *instances: tuple[str, str],
    action_type: int = 1,
    of: str = PUSH_MODEL_INSTANCE,
    transaction_uid: str = TRANSACTION,
    **roles: bool,
) -> int:
    """The status of an N-ACTION for these pairs of SOP class and instance."""
    association = call(receiver, **roles)
    assert association.is_established
    request = Dataset()
    request.TransactionUID = transaction_uid
    request.ReferencedSOPSequence = []
    for sop_class_uid, sop_instance_uid in instances:
        item = Dataset()
        item.ReferencedSOPClassUID = sop_class_uid
        item.ReferencedSOPInstanceUID = sop_instance_uid
        request.ReferencedSOPSequence.append(item)
    status, _ = association.send_n_action(request, action_type, StorageCommitmentPushModel, of)
    association.release()
    return int(status.Status)


def ct(number: int) -> tuple[str, str]:
    return CTImageStorage, f"{STUDY_UID}.1.{number}"


# --- asking ---------------------------------------------------------------------------------------------------------


def test_it_is_off_by_default(tmp_path: Path) -> None:
    """The context is refused, so that no modality deletes what it believes to be kept."""
    with running(tmp_path) as receiver:
        association = call(receiver)
        accepted = association.is_established
        association.abort()

    assert not accepted


def test_request_is_durable_before_it_is_answered(custodian: Custodian) -> None:
    """One file; the same request again is the same file, another one under the same UID is another."""
    statuses = [
        ask(custodian.receiver, ct(1)),
        ask(custodian.receiver, ct(1), scu_role=True, scp_role=True),
        ask(custodian.receiver, ct(2)),
    ]

    assert statuses == [0x0000, 0x0000, 0x0000]
    assert custodian.files(commitment_requests.REQUESTS) == [".json", ".json"]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"of": "2.25.1"}, 0x0112),
        ({"action_type": 2}, 0x0123),
        ({"transaction_uid": ""}, 0x0115),
    ],
    ids=["another-instance", "another-action", "no-transaction"],
)
def test_what_is_no_request_is_refused(custodian: Custodian, changes: dict[str, Any], status: int) -> None:
    """By the status that PS3.7 10.1.4 has for it; nothing is kept."""
    assert ask(custodian.receiver, ct(1), **changes) == status
    assert custodian.files(commitment_requests.REQUESTS) == []


def test_request_without_references_is_refused(custodian: Custodian) -> None:
    """0x0115: there is nothing to vouch for."""
    assert ask(custodian.receiver) == 0x0115


def test_who_could_not_be_told_is_refused_with_the_key_to_set(tmp_path: Path, sqlite_url: str) -> None:
    """0x0124, and the doctor's list names [[source]] commitment_port."""
    with custodian_of(tmp_path, sqlite_url, [{"ae_title": SENDER}]) as custodian:
        status = ask(custodian.receiver, ct(1))
        kept = custodian.files(commitment_requests.REQUESTS)
    (refused,) = recent(custodian.receiver.spool.path, datetime.now(UTC) - timedelta(hours=1))

    assert (status, kept) == (0x0124, [])
    assert refused.remedy.startswith(f'[[source]] ae_title = "{SENDER}", commitment_port = ')


def test_request_that_cannot_be_kept_is_not_taken(custodian: Custodian) -> None:
    """0x0213: never Success for what is not durable."""
    (custodian.receiver.spool.path / commitment_requests.REQUESTS).write_text("in the way")

    assert ask(custodian.receiver, ct(1)) == 0x0213


# --- what we vouch for ----------------------------------------------------------------------------------------------


def test_what_is_durable_is_committed(custodian: Custodian, requester: Requester) -> None:
    """Asked at once after the last C-STORE, before ingest saw anything; told on an association that we open."""
    store(custodian.receiver, 1, 2)
    with requester.listening():
        assert ask(custodian.receiver, ct(1), ct(2)) == 0x0000
        custodian.ingest()
        assert custodian.report() == 1
        assert custodian.report(later_s=1e6) == 0

    assert requester.report() == (1, [ct(1), ct(2)], {})
    assert requester.callers == ["MEDPRUNER"]
    assert kinds(custodian.sessions)[-2:] == ["instances-committed", "commitment-reported"]
    assert custodian.files(commitment_requests.REQUESTS) == custodian.files(commitment_requests.REPORTS) == []


def test_what_we_do_not_have_fails_with_its_reason(custodian: Custodian, requester: Requester) -> None:
    """Never received, removed, of another class, and changed on the disk; the rest of the request is committed."""
    store(custodian.receiver, 1, 2, 3, 4)
    custodian.ingest()
    by_uid = {}
    for path in custodian.receiver.spool.instances(STUDY_UID):
        by_uid[custodian.receiver.spool.read(path).sop_instance_uid] = path
    by_uid[ct(3)[1]].unlink()
    with by_uid[ct(4)[1]].open("r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        stream.write(b"other")
    with requester.listening():
        ask(custodian.receiver, ct(1), (MRImageStorage, ct(2)[1]), ct(3), ct(4), ct(5))
        custodian.ingest()
        custodian.report()

    expected = {ct(2)[1]: 0x0119, ct(3)[1]: 0x0112, ct(4)[1]: 0x0110, ct(5)[1]: 0x0112}
    assert requester.report() == (2, [ct(1)], expected)


def test_nothing_committed_is_removed_by_age(custodian: Custodian) -> None:
    """However old and however finished the study is, while another one goes; `forget` removes it, promise and all."""
    association = associate(custodian.receiver.port)
    for dataset in (instance(1), instance(1, study_uid=f"{STUDY_UID}.2")):
        assert send_instance(association, dataset) == 0x0000
    association.release()
    ask(custodian.receiver, ct(1))
    custodian.ingest()
    spool, data, later = (
        custodian.receiver.spool,
        custodian.settings.data.path,
        datetime.now(UTC) + timedelta(days=4000),
    )
    with custodian.sessions.begin() as session:
        for study in session.scalars(select(Study)):
            study.state, study.dispatched_revision = StudyState.COMPLETE, study.revision

    removed = retention.remove_instances(custodian.sessions, spool, data, keep_days=0, now=later)

    (kept,) = spool.instances(STUDY_UID)
    assert (removed, spool.instances(f"{STUDY_UID}.2")) == (1, [])
    retention.forget(custodian.sessions, spool, data, 1, now=later, actor="test")
    assert not kept.parent.exists()


def test_decision_that_was_cut_short_is_made_again(
    custodian: Custodian, requester: Requester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the report was durable: the request still waits, and is reported once."""
    store(custodian.receiver, 1)
    ask(custodian.receiver, ct(1))
    with monkeypatch.context() as patched:
        patched.setattr(commitment_requests, "keep_report", lambda *_: 1 / 0)
        custodian.ingest()
    with requester.listening():
        custodian.ingest()
        custodian.report()

    assert requester.report() == (1, [ct(1)], {})


def test_unreadable_request_is_set_aside(custodian: Custodian) -> None:
    """It holds up no other."""
    store(custodian.receiver, 1)
    ask(custodian.receiver, ct(1))
    (custodian.receiver.spool.path / commitment_requests.REQUESTS / "0.json").write_text("{")
    custodian.ingest()

    assert custodian.files(commitment_requests.REQUESTS) == [".unusable"]
    assert custodian.files(commitment_requests.REPORTS) == [".json"]


def test_request_that_cannot_be_decided_holds_up_no_other(custodian: Custodian) -> None:
    """It is tried again, and decided once that is possible."""
    reports = custodian.receiver.spool.path / commitment_requests.REPORTS
    store(custodian.receiver, 1)
    for number in range(3):
        ask(custodian.receiver, ct(1), transaction_uid=f"2.25.{number}")
    first = min(path.name for path, _ in commitment_requests.requests(custodian.receiver.spool.path))
    obstacle = reports / f"{first}.part"  # its report cannot be written
    obstacle.mkdir(parents=True)

    custodian.ingest()
    assert custodian.files(commitment_requests.REQUESTS) == [".json"]
    assert custodian.files(commitment_requests.REPORTS) == [".json", ".json", ".part"]

    obstacle.rmdir()
    custodian.ingest()
    assert custodian.files(commitment_requests.REQUESTS) == []
    assert custodian.files(commitment_requests.REPORTS) == [".json"] * 3


def test_request_that_can_never_be_decided_is_given_up_after_a_week(custodian: Custodian) -> None:
    """Its file stays for a person."""
    spool = custodian.receiver.spool
    ask(custodian.receiver, ct(1))
    asked = list(commitment_requests.requests(spool.path))
    (spool.path / commitment_requests.REPORTS / f"{asked[0][0].name}.part").mkdir(parents=True)

    for days, kept in ((0, ".json"), (6, ".json"), (8, ".unusable")):
        custody.decide(asked, custodian.sessions, spool, datetime.now(UTC) + timedelta(days=days))
        assert custodian.files(commitment_requests.REQUESTS) == [kept]


def test_database_that_is_away_is_waited_for(custodian: Custodian, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of a request; the loop says it once."""
    ask(custodian.receiver, ct(1))

    def away(*_: Any, **__: Any) -> None:
        raise OperationalError("SELECT", {}, OSError())

    with monkeypatch.context() as patched:
        patched.setattr(audit, "append", away)
        with pytest.raises(OperationalError):
            custodian.ingest()

    assert custodian.files(commitment_requests.REQUESTS) == [".json"]


# --- telling --------------------------------------------------------------------------------------------------------


def test_requester_that_is_away_is_told_later(custodian: Custodian, requester: Requester) -> None:
    """With back-off; also where it refuses the report, or does not let us be the provider."""
    store(custodian.receiver, 1)
    ask(custodian.receiver, ct(1))
    custodian.ingest()
    assert custodian.report() == 0
    requester.answer = 0x0110
    with requester.listening():
        assert custodian.report() == 0
        assert requester.callers == []  # not due yet
        assert custodian.report(later_s=10) == 0
    requester.answer, requester.is_provider_allowed = 0x0000, False
    with requester.listening():
        assert custodian.report(later_s=100) == 0
    requester.is_provider_allowed = True
    with requester.listening():
        assert custodian.report(later_s=1000) == 1

    assert requester.report() == (1, [ct(1)], {})


def test_report_that_nobody_takes_is_given_up_after_a_week(custodian: Custodian) -> None:
    """Its file stays for a person."""
    ask(custodian.receiver, ct(1))
    custodian.ingest()
    custodian.report(later_s=8 * 86_400)

    assert custodian.files(commitment_requests.REPORTS) == [".unusable"]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([{"ae_title": "CT01"}], None),
        ([{"ae_title": "OTHER", "commitment_port": 104}], None),
        ([{"ae_title": "CT01", "commitment_port": 104}], ("192.0.2.7", 104, False)),
        ([{"ae_title": "CT01", "host": "192.0.2.0/24", "commitment_port": 104}], ("192.0.2.7", 104, False)),
        ([{"ae_title": "CT01", "host": "ct01", "commitment_port": 2762, "commitment_tls": True}], ("ct01", 2762, True)),
        (
            [
                {"ae_title": "CT01", "host": "192.0.2.6", "commitment_port": 104},
                {"ae_title": "CT01", "host": "192.0.2.7", "commitment_port": 105},
            ],
            ("192.0.2.7", 105, False),
        ),
    ],
    ids=["no-port", "another-title", "any-host", "network", "host-tls", "two-hosts"],
)
def test_where_a_report_goes(sources: list[dict[str, Any]], expected: tuple[str, int, bool] | None) -> None:
    """To commitment_port at the host of the [[source]], else at the address that it called from."""
    settings = Settings.model_validate({"source": sources})
    request = Request(
        transaction_uid=TRANSACTION,
        references=(Reference(sop_class_uid="1.2", sop_instance_uid="1.3"),),
        calling_ae="CT01",
        called_ae="MEDPRUNER",
        address="192.0.2.7",
        association_id="1",
        requested_at=datetime.now(UTC),
    )

    found = custody.address_of(request, settings.source, settings.scp)

    assert (None if found is None else (found.host, found.port, found.tls)) == expected


def test_orthanc_asks_and_is_told(tmp_path: Path, sqlite_url: str) -> None:
    """It stores one of its two instances here, asks for both, and reads both answers."""
    orthanc_port = free_port()
    sources = [{"ae_title": "ORTHANC", "commitment_port": orthanc_port}]
    with custodian_of(tmp_path, sqlite_url, sources) as custodian:
        modalities = {"us": Modality("MEDPRUNER", custodian.receiver.port)}
        options = {"DicomPort": orthanc_port}
        with Orthanc(tmp_path / "orthanc", ae_title="ORTHANC", modalities=modalities, options=options) as orthanc:
            association = associate(orthanc_port, calling_ae="MEDPRUNER", called_ae="ORTHANC")
            assert [send_instance(association, instance(number)) for number in (1, 2)] == [0x0000] * 2
            association.release()
            (stored,) = orthanc.find("Instance", SOPInstanceUID=ct(1)[1])
            orthanc.ask("POST", "/modalities/us/store", {"Resources": [stored], "Synchronous": True})
            asked = {"DicomInstances": [list(ct(1)), list(ct(2))]}
            transaction = orthanc.ask("POST", "/modalities/us/storage-commitment", asked)["ID"]
            custodian.ingest()
            assert custodian.report() == 1
            answer = wait_for(
                lambda: _settled(orthanc.ask("GET", f"/storage-commitment/{transaction}")), "Orthanc has our report"
            )

    assert [one["SOPInstanceUID"] for one in answer["Success"]] == [ct(1)[1]]
    assert [(one["SOPInstanceUID"], one["FailureReason"]) for one in answer["Failures"]] == [(ct(2)[1], 0x0112)]


def _settled(answer: dict[str, Any]) -> dict[str, Any]:
    return answer if answer["Status"] != "Pending" else {}
