"""Answers to storage commitment on associations that destinations open to our receiver, with pynetdicom and Orthanc."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, build_context, build_role
from pynetdicom.association import Association
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification

from service import commitment_answers
from service.commitment_answers import PUSH_MODEL_INSTANCE, Answer
from tests.receiving import Running, running

PACS = "PACS"


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "spool", vouching=frozenset({(PACS, "MEDPRUNER")})) as started:
        yield started


def call(port: int, calling_ae: str = PACS, *, provider: bool = True) -> Association:
    """An association as a PACS opens it to report; with storage and verification proposed beside."""
    entity = AE(calling_ae)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 20
    contexts = [
        build_context(StorageCommitmentPushModel, [ImplicitVRLittleEndian, ExplicitVRLittleEndian]),
        build_context(CTImageStorage, ExplicitVRLittleEndian),
        build_context(Verification, ImplicitVRLittleEndian),
    ]
    roles = [build_role(StorageCommitmentPushModel, scp_role=True)] if provider else []
    return entity.associate("127.0.0.1", port, contexts=contexts, ae_title="MEDPRUNER", ext_neg=list(roles))


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


def kept(receiver: Running) -> list[Answer | None]:
    return [answer for _, answer in commitment_answers.waiting(receiver.spool.path)]


def test_answer_of_a_destination_is_durable_before_it_is_acknowledged(receiver: Running) -> None:
    """One file with the Transaction UID, what is committed and what failed; the same report again is the same file."""
    association = call(receiver.port)
    statuses = [report(association), report(association)]
    association.release()

    assert statuses == [0x0000, 0x0000]
    assert kept(receiver) == [
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
    assert len(kept(receiver)) == 1


def test_report_that_cannot_be_kept_is_to_be_sent_again(receiver: Running) -> None:
    """0x0213: never Success for what is not durable."""
    (receiver.spool.path / commitment_answers.FOLDER).write_text("in the way")
    association = call(receiver.port)
    status = report(association)
    association.release()

    assert status == 0x0213
