"""Proof of delivery: storage commitment and C-FIND, with a PACS of pynetdicom that answers what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import Comprehensive3DSRStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    StorageCommitmentPushModel,
    StudyRootQueryRetrieveInformationModelFind,
)
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service import commitment, commitment_answers
from service.answers import keep_answers
from service.commitment_answers import Answer
from service.shared import delivery_transitions
from service.shared.db import AuditEvent, Delivery, DeliveryState
from service.shared.settings import DestinationSettings, ScpSettings
from tests.receiving import accepting, after_answer
from tests.rows import NOW, add_deliveries, add_study, after, get, kinds, open_database
from tests.servers import free_port

# pynetdicom drops the socket of a refused connection without closing it; CPython closes it in the same moment
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

COMMITMENT = (StorageCommitmentPushModel,)
FIND = (StudyRootQueryRetrieveInformationModelFind,)


@dataclass
class Vouching:
    """A PACS that is asked to vouch: by N-ACTION, answered on the same association if at all, and by C-FIND."""

    port: int = 0
    action_status: int = 0x0000
    failed: dict[str, int] = field(default_factory=dict)  # SOP Instance UID -> Failure Reason
    answers: bool = True  # on the same association
    holds: set[str] = field(default_factory=set)  # what a C-FIND finds
    requests: list[Dataset] = field(default_factory=list)
    event_statuses: list[int] = field(default_factory=list)  # what we answered to its reports

    def action(self, event: evt.Event) -> tuple[int, None]:
        request = event.action_information
        self.requests.append(request)
        if self.answers and self.action_status == 0x0000:
            after_answer(event.assoc, lambda: self._report(keep_answers(event.assoc), request))
        return self.action_status, None

    def _report(self, association: Any, request: Dataset) -> None:
        status, _ = association.send_n_event_report(
            report(request, self.failed),
            2 if self.failed else 1,
            StorageCommitmentPushModel,
            commitment_answers.PUSH_MODEL_INSTANCE,
        )
        self.event_statuses.append(status.get("Status"))

    def find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        uid = event.identifier.SOPInstanceUID
        if uid in self.holds:
            answer = Dataset()
            answer.QueryRetrieveLevel = "IMAGE"
            answer.SOPInstanceUID = uid
            yield 0xFF00, answer
        yield 0x0000, None


def report(request: Dataset, failed: dict[str, int]) -> Dataset:
    """The Event Information of PS3.4 table J.3-2 for a request."""
    answer = Dataset()
    answer.TransactionUID = request.TransactionUID
    answer.ReferencedSOPSequence = [
        one for one in request.ReferencedSOPSequence if one.ReferencedSOPInstanceUID not in failed
    ]
    answer.FailedSOPSequence = []
    for one in request.ReferencedSOPSequence:
        if one.ReferencedSOPInstanceUID in failed:
            one.FailureReason = failed[one.ReferencedSOPInstanceUID]
            answer.FailedSOPSequence.append(one)
    return answer


@contextmanager
def listening(pacs: Vouching, classes: tuple[Any, ...] = COMMITMENT + FIND) -> Iterator[Vouching]:
    application = AE("PACS")
    for uid in classes:
        application.add_supported_context(uid, [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
    handlers: list[Any] = [(evt.EVT_N_ACTION, pacs.action), (evt.EVT_C_FIND, pacs.find)]
    with accepting(application, ("127.0.0.1", pacs.port), handlers) as pacs.port:
        yield pacs


@dataclass
class Delivered:
    """Two results that a destination took, and what is asked about them."""

    sessions: sessionmaker[Session]
    ids: list[int]
    spool: Path

    def destination(self, port: int, **changes: Any) -> DestinationSettings:
        fields = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": port, "timeout_s": 5}
        return DestinationSettings.model_validate(fields | {"storage_commitment": True} | changes)

    def prove(self, port: int, *, seconds: float = 0, answer_wait_s: float = 20, **changes: Any) -> int:
        """Ask for what is due; how many that were."""
        destination = self.destination(port, **changes)
        due = commitment.due(self.sessions, destination, after(seconds))
        if due:
            commitment.prove(
                destination,
                ScpSettings(),
                self.sessions,
                due,
                clock=lambda: after(seconds),
                answer_wait_s=answer_wait_s,
            )
        return len(due)

    def rows(self) -> list[Delivery]:
        return [get(self.sessions, Delivery, one) for one in self.ids]

    def states(self) -> list[str]:
        return [row.state.value for row in self.rows()]

    def uid(self, number: int) -> str:
        return f"2.25.4000.{number}"

    def answer(self, failed: dict[str, int] | None = None, **changes: Any) -> Answer:
        """What the PACS says on an association of its own."""
        (transaction_uid,) = {str(row.transaction_uid) for row in self.rows()}
        failed = failed or {}
        committed = tuple(uid for uid in (self.uid(1), self.uid(2)) if uid not in failed)
        fields = {"transaction_uid": transaction_uid, "committed": committed, "failed": failed}
        return Answer.model_validate(fields | changes)

    def take(self, seconds: float = 1) -> int:
        destinations = {"pacs": self.destination(104)}
        return commitment.take_answers(self.spool, self.sessions, destinations, after(seconds))


@pytest.fixture
def delivered(tmp_path: Path, sqlite_url: str) -> Iterator[Delivered]:
    with open_database(sqlite_url) as sessions:
        ids = []
        for number in (1, 2):
            study_id = add_study(sessions, f"2.25.1000.{number}")
            (delivery_id,) = add_deliveries(sessions, study_id, "pacs", sop_instance_uid=f"2.25.4000.{number}")
            ids.append(delivery_id)
            with sessions.begin() as session:
                row = session.get_one(Delivery, delivery_id)
                delivery_transitions.close_delivered(
                    session, row, status=0, note=None, now=NOW, actor="x", proof_at=NOW
                )
        yield Delivered(sessions, ids, tmp_path / "spool")


# --- storage commitment on one association --------------------------------------------------------------------------


def test_delivered_results_become_committed(delivered: Delivered) -> None:
    """One request names both; the answer on the same association commits both, and is answered with Success."""
    with listening(Vouching()) as pacs:
        assert delivered.prove(pacs.port) == 2

    (request,) = pacs.requests
    named = [(one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) for one in request.ReferencedSOPSequence]
    assert named == [(Comprehensive3DSRStorage, delivered.uid(1)), (Comprehensive3DSRStorage, delivered.uid(2))]
    assert delivered.states() == ["committed", "committed"]
    assert all((row.committed_at, row.proof_at) == (NOW, None) for row in delivered.rows())
    assert kinds(delivered.sessions, delivery_id=delivered.ids[0])[-2:] == ["commitment-asked", "delivery-committed"]


def test_what_the_pacs_lost_is_sent_again_and_the_rest_is_committed(delivered: Delivered) -> None:
    """Each instance has its own answer; the reason is kept in words, and the attempts go on counting."""
    with listening(Vouching(failed={delivered.uid(2): 0x0112})) as pacs:
        delivered.prove(pacs.port)

    kept, lost = delivered.rows()
    assert (kept.state, lost.state) == (DeliveryState.COMMITTED, DeliveryState.PENDING)
    assert lost.reason == "storage commitment failed at the destination (0x0112 no such object instance)"
    assert (lost.attempts, lost.transaction_uid) == (1, None)
    assert lost.next_attempt_at is not None
    assert NOW < lost.next_attempt_at <= after(60)
    assert kinds(delivered.sessions, delivery_id=lost.id)[-1] == "delivery-not-committed"


def test_pacs_that_keeps_nothing_is_given_up(delivered: Delivered) -> None:
    """Attempts are spent by losing it as by refusing it."""
    with listening(Vouching(failed={delivered.uid(1): 0x0110, delivered.uid(2): 0x0110})) as pacs:
        delivered.prove(pacs.port, retry_max_attempts=1)

    assert delivered.states() == ["rejected", "rejected"]
    assert str(delivered.rows()[0].reason).startswith("gave up after 1 attempts: storage commitment failed")


def test_silence_is_asked_again_after_its_time(delivered: Delivered) -> None:
    """Not before commitment_timeout_s, then under another Transaction UID, and later each time."""
    with listening(Vouching(answers=False)) as pacs:
        assert delivered.prove(pacs.port, answer_wait_s=0) == 2
        assert delivered.prove(pacs.port, seconds=299, answer_wait_s=0) == 0
        assert delivered.prove(pacs.port, seconds=300, answer_wait_s=0) == 2
        assert delivered.prove(pacs.port, seconds=899, answer_wait_s=0) == 0
        pacs.answers = True
        assert delivered.prove(pacs.port, seconds=900) == 2

    assert len({request.TransactionUID for request in pacs.requests}) == 3
    assert delivered.states() == ["committed", "committed"]


def test_refused_request_is_asked_again_with_its_status_as_the_reason(delivered: Delivered) -> None:
    """The result stays delivered: what was refused is the question."""
    with listening(Vouching(action_status=0x0213)) as pacs:
        delivered.prove(pacs.port)

        assert delivered.states() == ["delivered", "delivered"]
        assert "answered 0x0213 to the request for storage commitment" in str(delivered.rows()[0].reason)
        assert delivered.prove(pacs.port, seconds=1) == 0


def test_pacs_without_the_service_says_what_to_configure(delivered: Delivered) -> None:
    """Neither lost nor proved; the reason names the key."""
    with listening(Vouching(), FIND) as pacs:
        delivered.prove(pacs.port)

    row = delivered.rows()[0]
    assert row.state is DeliveryState.DELIVERED
    assert 'offers no storage commitment; set storage_commitment = false or proof = "find"' in str(row.reason)


def test_pacs_that_is_away_is_asked_later(delivered: Delivered) -> None:
    """Nothing is lost by waiting."""
    assert delivered.prove(free_port()) == 2

    assert delivered.states() == ["delivered", "delivered"]
    assert "cannot be reached" in str(delivered.rows()[0].reason)
    assert all(row.proof_at == after(300) for row in delivered.rows())


def test_answer_that_is_none_is_refused(delivered: Delivered) -> None:
    """0x0115, and the state is as before; a broken answer commits nothing."""
    with listening(Vouching()) as pacs:
        pacs._report = _broken_report(pacs)  # type: ignore[method-assign]
        delivered.prove(pacs.port, answer_wait_s=1)

    assert pacs.event_statuses == [0x0115]
    assert delivered.states() == ["delivered", "delivered"]


def _broken_report(pacs: Vouching) -> Callable[[Any, Dataset], None]:
    def send(association: Any, request: Dataset) -> None:
        nothing = Dataset()
        nothing.ReferencedSOPSequence = []
        status, _ = association.send_n_event_report(
            nothing, 1, StorageCommitmentPushModel, commitment_answers.PUSH_MODEL_INSTANCE
        )
        pacs.event_statuses.append(status.get("Status"))

    return send


# --- an answer on another association -------------------------------------------------------------------------------


def test_answer_that_the_receiver_kept_commits(delivered: Delivered) -> None:
    """The file is gone once it is in the rows; the same answer again changes nothing."""
    with listening(Vouching(answers=False)) as pacs:
        delivered.prove(pacs.port, answer_wait_s=0)
    answer = delivered.answer(failed={delivered.uid(1): 0x0213})
    commitment_answers.keep(delivered.spool, answer)
    commitment_answers.keep(delivered.spool, answer)

    assert delivered.take() == 1
    assert delivered.states() == ["pending", "committed"]
    commitment_answers.keep(delivered.spool, answer)
    assert delivered.take() == 1
    assert delivered.take() == 0
    assert delivered.states() == ["pending", "committed"]


@pytest.mark.parametrize("changes", [{"transaction_uid": "2.25.9"}, {"committed": ("2.25.9",)}], ids=str)
def test_answer_about_something_else_changes_nothing(delivered: Delivered, changes: dict[str, Any]) -> None:
    """Another Transaction UID, or an instance that was not asked about: asked again in its time."""
    with listening(Vouching(answers=False)) as pacs:
        delivered.prove(pacs.port, answer_wait_s=0)
    commitment_answers.keep(delivered.spool, delivered.answer(**changes))

    delivered.take()

    assert delivered.states() == ["delivered", "delivered"]
    assert all(row.proof_at == after(300) for row in delivered.rows())


def test_kept_answer_that_cannot_be_read_is_set_aside(delivered: Delivered) -> None:
    """It stops nothing, and is not looked at for ever."""
    folder = delivered.spool / commitment_answers.FOLDER
    folder.mkdir(parents=True)
    (folder / "torn.json").write_text('{"transaction_uid": "1.2"')

    assert delivered.take() == 1
    assert delivered.take() == 0
    assert [path.name for path in folder.iterdir()] == ["torn.unusable"]


def test_late_answer_to_a_result_that_was_sent_again_meanwhile_does_not_count(delivered: Delivered) -> None:
    """It speaks of what the PACS had before."""
    with listening(Vouching(answers=False)) as pacs:
        delivered.prove(pacs.port, answer_wait_s=0)
    answer = delivered.answer()
    with delivered.sessions.begin() as session:
        delivery_transitions.resend_delivery(session, delivered.ids[0], now=after(1), actor="cli/somebody")
    commitment_answers.keep(delivered.spool, answer)

    delivered.take()

    assert delivered.states() == ["pending", "committed"]


# --- C-FIND ---------------------------------------------------------------------------------------------------------


def find(delivered: Delivered, port: int, **changes: Any) -> int:
    return delivered.prove(port, **({"storage_commitment": False, "proof": "find"} | changes))


def test_result_that_a_find_finds_counts_as_committed(delivered: Delivered) -> None:
    """With a note that says how it is known; the other one is asked for again."""
    with listening(Vouching(holds={delivered.uid(1)}), FIND) as pacs:
        find(delivered, pacs.port)

    found, missing = delivered.rows()
    assert (found.state, found.reason) == (DeliveryState.COMMITTED, "found by C-FIND")
    assert (missing.state, missing.reason) == (DeliveryState.DELIVERED, "not found by C-FIND yet")
    assert missing.proof_at == after(30)
    with delivered.sessions() as session:
        sought = select(AuditEvent.detail).where(AuditEvent.kind == "delivery-sought").order_by(AuditEvent.id)
        assert [one["found"] for one in session.scalars(sought)] == [True, False]


def test_result_that_is_not_found_several_times_is_sent_again(delivered: Delivered) -> None:
    """A PACS may take its time to index, not for ever."""
    seconds = 0.0
    with listening(Vouching(), FIND) as pacs:
        for attempt in range(commitment.NOT_FOUND_LIMIT):
            assert delivered.states() == ["delivered", "delivered"]
            find(delivered, pacs.port, seconds=seconds)
            seconds += timedelta(seconds=30 * 2**attempt).total_seconds()

    assert delivered.states() == ["pending", "pending"]
    assert delivered.rows()[0].reason == "not found at the destination by 5 C-FINDs"


def test_find_stands_in_where_the_pacs_has_no_commitment(delivered: Delivered) -> None:
    """Both configured: the stronger proof first."""
    with listening(Vouching(holds={delivered.uid(1), delivered.uid(2)}), FIND) as pacs:
        delivered.prove(pacs.port, proof="find")

    assert delivered.states() == ["committed", "committed"]
    assert delivered.rows()[0].reason == "found by C-FIND"


def test_pacs_that_answers_no_find_is_told_from_one_that_has_nothing(delivered: Delivered) -> None:
    """It is never a reason to send again."""
    with listening(Vouching(), COMMITMENT) as pacs:
        for attempt in range(commitment.NOT_FOUND_LIMIT + 1):
            find(delivered, pacs.port, seconds=30.0 * 2 ** (attempt + 1))

    assert delivered.states() == ["delivered", "delivered"]
    assert "answers no C-FIND (Study Root)" in str(delivered.rows()[0].reason)


def test_proof_that_is_no_longer_wanted_is_not_asked_for(delivered: Delivered) -> None:
    """The configuration changed after the delivery."""
    with listening(Vouching()) as pacs:
        find(delivered, pacs.port, proof="none")
        assert find(delivered, pacs.port, proof="none") == 0

    assert delivered.states() == ["delivered", "delivered"]
    assert pacs.requests == []
