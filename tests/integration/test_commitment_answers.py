"""Answers to storage commitment on associations that destinations open to our receiver, with pynetdicom and Orthanc."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_role
from pynetdicom.association import Association
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification
from sqlalchemy.orm import Session, sessionmaker

from service import commitment, commitment_answers, delivery
from service.commitment_answers import PUSH_MODEL_INSTANCE, Answer
from service.shared.db import Delivery
from service.shared.durable import digest
from service.shared.settings import DestinationSettings, Settings
from service.spool import file_header
from tests.receiving import Running, associate, encode, instance, running, wait_until
from tests.rows import NOW, add_deliveries, add_study, get, open_database
from tests.servers import Modality, Orthanc

PACS = "PACS"


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "spool", vouching=frozenset({(PACS, "MEDPRUNER")})) as started:
        yield started


def call(port: int, calling_ae: str = PACS, *, provider: bool = True) -> Association:
    """An association as a PACS opens it to report; with storage and verification proposed beside."""
    contexts = {
        StorageCommitmentPushModel: [ImplicitVRLittleEndian, ExplicitVRLittleEndian],
        CTImageStorage: [ExplicitVRLittleEndian],
        Verification: [ImplicitVRLittleEndian],
    }
    roles = [build_role(StorageCommitmentPushModel, scp_role=True)] if provider else []
    return associate(port, contexts, calling_ae=calling_ae, roles=roles)


def report(association: Association, **changes: Any) -> int:
    content = Dataset()
    content.TransactionUID = "2.25.77"
    content.ReferencedSOPSequence = [reference("2.25.1")]
    content.FailedSOPSequence = [reference("2.25.2", FailureReason=0x0112)]
    for name, value in changes.items():
        setattr(content, name, value)
    status, _ = association.send_n_event_report(content, 2, StorageCommitmentPushModel, PUSH_MODEL_INSTANCE)
    return int(status.Status)


def reference(uid: str, **attributes: Any) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = CTImageStorage
    item.ReferencedSOPInstanceUID = uid
    for name, value in attributes.items():
        setattr(item, name, value)
    return item


def answers(receiver: Running) -> list[Answer | None]:
    return [answer for _, answer in commitment_answers.waiting(receiver.spool.path)]


def test_answer_of_a_destination_is_durable_before_it_is_acknowledged(receiver: Running) -> None:
    """One file with the Transaction UID, what is committed and what failed; the same report again is the same file."""
    association = call(receiver.port)
    statuses = [report(association), report(association)]
    association.release()

    assert statuses == [0x0000, 0x0000]
    assert answers(receiver) == [
        Answer(transaction_uid="2.25.77", committed=("2.25.1",), failed={"2.25.2": 0x0112}, calling_ae=PACS)
    ]


def test_destination_that_is_no_source_may_report_and_do_no_more(receiver: Running) -> None:
    """Neither may it store; Verification is answered to everybody who is let in."""
    association = call(receiver.port)
    accepted = {context.abstract_syntax for context in association.accepted_contexts}
    association.release()

    assert accepted == {StorageCommitmentPushModel, Verification}


@pytest.mark.parametrize(("calling_ae", "provider"), [("SENDER", True), (PACS, False)], ids=["source", "as-user"])
def test_nobody_else_may_report(receiver: Running, calling_ae: str, provider: bool) -> None:
    """A source that is no destination, or a caller that does not propose to be the provider."""
    association = call(receiver.port, calling_ae, provider=provider)
    accepted = {context.abstract_syntax for context in association.accepted_contexts}
    association.release()

    assert StorageCommitmentPushModel not in accepted


@pytest.mark.parametrize(
    "changes",
    [{"TransactionUID": ""}, {"ReferencedSOPSequence": [Dataset()]}, {"TransactionUID": "1" * 65}],
    ids=["no-transaction", "no-instance", "too-long"],
)
def test_report_that_is_no_answer_is_refused(receiver: Running, changes: dict[str, Any]) -> None:
    """0x0115, nothing is kept, and the association goes on."""
    association = call(receiver.port)
    statuses = [report(association, **changes), report(association)]
    association.release()

    assert statuses == [0x0115, 0x0000]
    assert len(answers(receiver)) == 1


def test_report_that_cannot_be_kept_is_to_be_sent_again(receiver: Running) -> None:
    """0x0213: never Success for what is not durable."""
    (receiver.spool.path / commitment_answers.FOLDER).write_text("in the way")
    association = call(receiver.port)
    status = report(association)
    association.release()

    assert status == 0x0213


# --- Orthanc --------------------------------------------------------------------------------------------------------


def test_orthanc_vouches_for_what_it_has_and_tells_what_it_lost(tmp_path: Path, sqlite_url: str) -> None:
    """C-STORE, N-ACTION, its report on an association of its own to our receiver, and the states that follow."""
    pacs = frozenset({("ORTHANC", "MEDPRUNER")})
    with open_database(sqlite_url) as sessions, running(tmp_path / "spool", vouching=pacs) as receiver:
        modalities = {"us": Modality("MEDPRUNER", receiver.port)}
        with Orthanc(tmp_path / "orthanc", ae_title="ORTHANC", modalities=modalities) as orthanc:
            kept, lost = stored_results(sessions, tmp_path)
            destination = DestinationSettings(
                name="pacs", ae_title="ORTHANC", host="127.0.0.1", port=orthanc.port, storage_commitment=True
            )
            settings = Settings.model_validate({"data": {"path": tmp_path}, "spool": {"path": receiver.spool.path}})
            assert delivery.deliver_due(settings, destination, sessions, NOW) == 2
            assert state(sessions, kept) == state(sessions, lost) == "delivered"
            (instance,) = orthanc.find("Instance", SOPInstanceUID=uid(2))
            orthanc.ask("DELETE", f"/instances/{instance}")

            assert delivery.prove_due(settings, destination, sessions, datetime.now(UTC)) == 2
            wait_until(lambda: bool(answers(receiver)))
            commitment.take_answers(receiver.spool.path, sessions, {"pacs": destination}, datetime.now(UTC))

    assert (state(sessions, kept), state(sessions, lost)) == ("committed", "pending")
    assert "0x0112 no such object instance" in str(get(sessions, Delivery, lost).reason)


def test_result_is_proved_by_a_find_at_orthanc(tmp_path: Path, sqlite_url: str) -> None:
    """IMAGE level, by the SOP Instance UID."""
    with open_database(sqlite_url) as sessions:
        modalities = {"us": Modality("MEDPRUNER", 1)}
        with Orthanc(tmp_path / "orthanc", ae_title="ORTHANC", modalities=modalities) as orthanc:
            kept, _ = stored_results(sessions, tmp_path)
            destination = DestinationSettings(
                name="pacs", ae_title="ORTHANC", host="127.0.0.1", port=orthanc.port, proof="find"
            )
            settings = Settings.model_validate({"data": {"path": tmp_path}})
            delivery.deliver_due(settings, destination, sessions, NOW)

            delivery.prove_due(settings, destination, sessions, datetime.now(UTC))

    assert (state(sessions, kept), get(sessions, Delivery, kept).reason) == ("committed", "found by C-FIND")


def uid(number: int) -> str:
    return f"2.25.4000.{number}"


def state(sessions: sessionmaker[Session], delivery_id: int) -> str:
    return str(get(sessions, Delivery, delivery_id).state.value)


def stored_results(sessions: sessionmaker[Session], data: Path) -> list[int]:
    """Two results on disk and on record that are due for the destination `pacs`; their deliveries."""
    ids = []
    (data / "outbox").mkdir()
    for number in (1, 2):
        dataset = instance(number, study_uid=f"2.25.1000.{number}")
        dataset.SOPInstanceUID = uid(number)
        whole = file_header(CTImageStorage, uid(number), ExplicitVRLittleEndian) + encode(dataset)
        path = data / "outbox" / f"{number}.dcm"
        path.write_bytes(whole)
        study_id = add_study(sessions, f"2.25.1000.{number}")
        ids += add_deliveries(
            sessions,
            study_id,
            "pacs",
            sop_class_uid=CTImageStorage,
            sop_instance_uid=uid(number),
            series_uid=dataset.SeriesInstanceUID,
            path=f"outbox/{number}.dcm",
            sha256=digest(whole),
        )
    return ids
