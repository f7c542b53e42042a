"""Changes of state: which take place, what they write, and that each is audited in the same transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import select
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import Session, sessionmaker

from service.shared import delivery_transitions, transitions
from service.shared.db import (
    Analysis,
    AnalysisState,
    AuditEvent,
    Delivery,
    DeliveryState,
    Destination,
    ReportText,
    Result,
    ResultState,
    Study,
    StudyState,
)
from service.shared.messages import Flag
from tests.rows import (
    ACTOR,
    NOW,
    add_analysis,
    add_deliveries,
    add_study,
    after,
    claim,
    claimed,
    deliveries,
    event,
    finish,
    get,
    kinds,
    open_database,
    output,
    read,
    result,
)


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        yield opened


@pytest.fixture
def study_id(sessions: sessionmaker[Session]) -> int:
    return add_study(sessions)


@pytest.fixture
def analysis_id(sessions: sessionmaker[Session], study_id: int) -> int:
    return add_analysis(sessions, study_id)


def open_again(sessions: sessionmaker[Session], study_id: int, now: datetime = NOW) -> bool:
    with sessions.begin() as session:
        return transitions.open_study(
            session, session.get_one(Study, study_id), now=now, actor=ACTOR, vouches_sha256="f" * 64
        )


def fault(sessions: sessionmaker[Session], held: transitions.Claim, *, max_attempts: int = 3) -> AnalysisState | None:
    with sessions.begin() as session:
        return transitions.close_fault(
            session, held, code="Boom", reason="a fault", max_attempts=max_attempts, now=NOW, actor=ACTOR
        )


def refuse(sessions: sessionmaker[Session], held: transitions.Claim) -> bool:
    with sessions.begin() as session:
        return transitions.close_refused(
            session, held, code="no-suitable-series", reason="no axial series", now=NOW, actor=ACTOR
        )


def close_read(sessions: sessionmaker[Session], held: transitions.Claim, **changes: Any) -> bool:
    with sessions.begin() as session:
        return transitions.close_read(
            session,
            held,
            output(analysis_id=held.analysis_id, **changes),
            output_path="outputs/1/1.json",
            output_sha256="a" * 64,
            now=after(9),
            actor=ACTOR,
        )


# --- study ----------------------------------------------------------------------------------------------------------


def test_first_image_opens_the_study(sessions: sessionmaker[Session]) -> None:
    """Revision 0 becomes 1, and the event vouches for the header by its salted digest."""
    study_id = add_study(sessions, revision=0, opened_at=None, completed_at=None)

    assert open_again(sessions, study_id)

    study = get(sessions, Study, study_id)
    assert (study.state, study.revision, study.opened_at) == (StudyState.RECEIVING, 1, NOW)
    assert event(sessions, "study-opened").vouches_sha256 == "f" * 64


def test_image_of_a_receiving_study_opens_nothing(sessions: sessionmaker[Session]) -> None:
    """The revision counts openings, not instances."""
    study_id = add_study(sessions, state=StudyState.RECEIVING)

    assert not open_again(sessions, study_id)
    assert get(sessions, Study, study_id).revision == 1
    assert kinds(sessions) == []


def test_late_image_starts_a_new_revision_and_supersedes_what_is_queued(
    sessions: sessionmaker[Session], study_id: int
) -> None:
    """What runs already is finished; what waits would be out of date."""
    queued = add_analysis(sessions, study_id)
    running = add_analysis(sessions, study_id, route="running")
    claimed(sessions, running)
    other = add_analysis(sessions, add_study(sessions, "2.25.1001"))

    assert open_again(sessions, study_id, after(5))

    assert get(sessions, Study, study_id).revision == 2
    superseded = get(sessions, Analysis, queued)
    assert (superseded.state, superseded.reason_code) == (AnalysisState.SUPERSEDED, "superseded")
    assert superseded.finished_at == after(5)
    assert get(sessions, Analysis, running).state is AnalysisState.RUNNING
    assert get(sessions, Analysis, other).state is AnalysisState.QUEUED
    assert kinds(sessions, study_id=study_id)[-2:] == ["study-reopened", "analysis-superseded"]


def complete(sessions: sessionmaker[Session], study_id: int, **changes: Any) -> bool:
    decided: dict[str, Any] = {"revision": 1, "last_image_at": NOW}
    with sessions.begin() as session:
        return transitions.complete_study(
            session, study_id, **(decided | changes), now=after(60), actor=ACTOR, why="quiet"
        )


def test_quiet_study_is_complete(sessions: sessionmaker[Session]) -> None:
    """receiving -> complete, with the reason in the audit."""
    study_id = add_study(sessions, state=StudyState.RECEIVING, completed_at=None)

    assert complete(sessions, study_id)

    study = get(sessions, Study, study_id)
    assert (study.state, study.completed_at) == (StudyState.COMPLETE, after(60))
    assert event(sessions, "study-complete").detail == {"revision": 1, "why": "quiet"}


@pytest.mark.parametrize("changes", [{"revision": 2}, {"last_image_at": after(-1)}])
def test_study_that_got_an_image_since_the_decision_stays_open(
    sessions: sessionmaker[Session], changes: dict[str, Any]
) -> None:
    """The decision was made on what is no longer so."""
    study_id = add_study(sessions, state=StudyState.RECEIVING)

    assert not complete(sessions, study_id, **changes)
    assert get(sessions, Study, study_id).state is StudyState.RECEIVING
    assert kinds(sessions) == []


def test_complete_study_is_completed_once(sessions: sessionmaker[Session]) -> None:
    """The second writer finds nothing to do and writes no second event."""
    study_id = add_study(sessions, state=StudyState.RECEIVING)

    assert [complete(sessions, study_id), complete(sessions, study_id)] == [True, False]
    assert kinds(sessions) == ["study-complete"]


# --- analysis: queue and claim --------------------------------------------------------------------------------------


def test_claim_runs_a_queued_analysis(sessions: sessionmaker[Session], analysis_id: int, study_id: int) -> None:
    """One attempt more, a new fence, a lease, the worker's name; and an event."""
    held = claimed(sessions, analysis_id, now=after(1), lease_s=20)

    assert held == transitions.Claim(analysis_id, study_id, fence=1, attempt=1)
    analysis = get(sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.attempts, analysis.fence) == (AnalysisState.RUNNING, 1, 1)
    assert (analysis.started_at, analysis.lease_until, analysis.worker) == (after(1), after(21), "worker/1")
    assert kinds(sessions, analysis_id=analysis_id) == ["analysis-queued", "analysis-started"]


def test_message_delivered_again_finds_nothing_to_claim(sessions: sessionmaker[Session], analysis_id: int) -> None:
    """Neither while the first runs nor when it is over."""
    held = claimed(sessions, analysis_id)
    assert claim(sessions, analysis_id, now=after(20)) is None

    close_read(sessions, held)
    assert claim(sessions, analysis_id, now=after(1000)) is None
    assert get(sessions, Analysis, analysis_id).attempts == 1


def test_unknown_analysis_cannot_be_claimed(sessions: sessionmaker[Session]) -> None:
    """A stray message is no fault."""
    assert claim(sessions, 12345) is None


def test_expired_lease_can_be_claimed_under_a_new_fence(sessions: sessionmaker[Session], analysis_id: int) -> None:
    """Its worker is taken for dead; should it live, its fence no longer counts."""
    first = claimed(sessions, analysis_id, lease_s=20)

    second = claimed(sessions, analysis_id, now=after(20.001))

    assert (second.fence, second.attempt) == (first.fence + 1, 2)


def test_spent_attempts_cannot_be_claimed(sessions: sessionmaker[Session], analysis_id: int) -> None:
    """A study that kills every worker is not tried for ever."""
    for number in range(3):
        claimed(sessions, analysis_id, now=after(100 * number))

    assert claim(sessions, analysis_id, now=after(300)) is None


def test_lease_is_renewed_by_its_holder_only(sessions: sessionmaker[Session], analysis_id: int) -> None:
    """A worker that lost the analysis hears so."""
    first = claimed(sessions, analysis_id)
    second = claimed(sessions, analysis_id, now=after(30))

    with sessions.begin() as session:
        assert not transitions.renew_lease(session, first, lease_until=after(500))
        assert transitions.renew_lease(session, second, lease_until=after(60))
    assert get(sessions, Analysis, analysis_id).lease_until == after(60)


@pytest.mark.parametrize("close", [close_read, refuse, fault], ids=["read", "refused", "fault"])
def test_lost_fence_closes_nothing(
    sessions: sessionmaker[Session], analysis_id: int, close: Callable[..., object]
) -> None:
    """Whatever a worker ends with after it lost the analysis: no change, no text, no event."""
    lost = claimed(sessions, analysis_id)
    claimed(sessions, analysis_id, now=after(30), worker="worker/2")
    before = kinds(sessions)

    assert not close(sessions, lost)

    analysis = get(sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.worker, analysis.output_sha256) == (AnalysisState.RUNNING, "worker/2", None)
    assert kinds(sessions) == before
    with sessions() as session:
        assert session.get(ReportText, analysis_id) is None


# --- analysis: how it ends ------------------------------------------------------------------------------------------


def test_read_analysis_keeps_how_it_was_read(sessions: sessionmaker[Session], analysis_id: int) -> None:
    """Settings as applied, model, counts, timings, flags, the output's digest; the text goes to the erasable table."""
    said = output(analysis_id=analysis_id, flags=(Flag.TRUNCATED, Flag.RANDOM_WEIGHTS), pruning={"method": "off"})

    assert close_read(sessions, claimed(sessions, analysis_id), flags=said.flags, pruning=said.pruning)

    analysis = get(sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.lease_until, analysis.finished_at) == (AnalysisState.READ, None, after(9))
    assert analysis.flags == ["truncated", "random-weights"]
    assert analysis.pruning == said.pruning
    assert analysis.model == said.model.model_dump()
    assert analysis.counts == said.counts.model_dump()
    assert analysis.timings_s == said.timings_s
    assert analysis.memory_peak_bytes == 10**10
    assert (analysis.output_path, analysis.output_sha256) == ("outputs/1/1.json", "a" * 64)
    text = get(sessions, ReportText, analysis_id)
    assert (text.findings, text.impression, text.raw_text) == (said.findings, said.impression, said.raw_text)
    assert event(sessions, "analysis-read").detail == {"fence": 1, "output_sha256": "a" * 64}


def test_text_of_the_report_never_stands_in_history(sessions: sessionmaker[Session], analysis_id: int) -> None:
    """The model may repeat what it was shown; only the erasable table may hold that."""
    close_read(sessions, claimed(sessions, analysis_id), findings="Planted", impression="Planted", raw_text="Planted")

    with sessions() as session:
        events = str([one.detail for one in session.scalars(select(AuditEvent))])
        analysis = session.get_one(Analysis, analysis_id)
        columns = str({key: value for key, value in vars(analysis).items() if not key.startswith("_")})
    assert "Planted" not in events
    assert "Planted" not in columns


def test_refusal_is_final(sessions: sessionmaker[Session], analysis_id: int) -> None:
    """With its code and its sentence; no attempt follows."""
    assert refuse(sessions, claimed(sessions, analysis_id))

    analysis = get(sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.reason_code) == (AnalysisState.REFUSED, "no-suitable-series")
    assert (analysis.reason, analysis.lease_until) == ("no axial series", None)
    assert claim(sessions, analysis_id, now=after(1000)) is None
    assert kinds(sessions)[-1] == "analysis-refused"


def test_fault_goes_back_to_the_queue_until_attempts_are_spent(
    sessions: sessionmaker[Session], analysis_id: int
) -> None:
    """Three attempts, then failed; the code of the last fault stays on record."""
    ends = [fault(sessions, claimed(sessions, analysis_id)) for _ in range(3)]

    assert ends == [AnalysisState.QUEUED, AnalysisState.QUEUED, AnalysisState.FAILED]
    analysis = get(sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.attempts, analysis.reason_code) == (AnalysisState.FAILED, 3, "Boom")
    assert (analysis.rung_at, analysis.lease_until, analysis.finished_at) == (None, None, NOW)
    assert kinds(sessions).count("analysis-retried") == 2
    assert kinds(sessions)[-1] == "analysis-failed"


def test_analysis_whose_workers_were_all_lost_fails(sessions: sessionmaker[Session], study_id: int) -> None:
    """Only with an expired lease and spent attempts; nobody else is touched."""
    lost, alive, once = (add_analysis(sessions, study_id, route=name) for name in ("lost", "alive", "once"))
    for number in range(3):
        claimed(sessions, lost, now=after(100 * number))
        claimed(sessions, alive, now=after(100 * number), lease_s=1000 if number == 2 else 20)
    claimed(sessions, once)

    with sessions.begin() as session:
        assert transitions.fail_exhausted(session, max_attempts=3, now=after(500), actor=ACTOR) == 1
        assert transitions.fail_exhausted(session, max_attempts=3, now=after(500), actor=ACTOR) == 0

    assert get(sessions, Analysis, lost).state is AnalysisState.FAILED
    assert get(sessions, Analysis, lost).reason_code == "worker-lost"
    assert get(sessions, Analysis, alive).state is AnalysisState.RUNNING
    assert get(sessions, Analysis, once).state is AnalysisState.RUNNING
    assert event(sessions, "analysis-failed").analysis_id == lost


def test_failed_analysis_starts_afresh_when_it_is_requeued(sessions: sessionmaker[Session], analysis_id: int) -> None:
    """Attempts begin at 0, the fence goes on growing, and the bell is rung at once."""
    for _ in range(3):
        fault(sessions, claimed(sessions, analysis_id))

    with sessions.begin() as session:
        assert transitions.requeue_failed(session, analysis_id, now=NOW, actor="cli/somebody")
        assert not transitions.requeue_failed(session, analysis_id, now=NOW, actor="cli/somebody")

    analysis = get(sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.attempts, analysis.rung_at) == (AnalysisState.QUEUED, 0, None)
    assert (analysis.reason, analysis.finished_at) == (None, None)
    assert claimed(sessions, analysis_id).fence == 4
    assert event(sessions, "analysis-requeued").actor == "cli/somebody"


def test_only_a_queued_analysis_can_be_cancelled(sessions: sessionmaker[Session], study_id: int) -> None:
    """What runs is finished."""
    queued, running = (add_analysis(sessions, study_id, route=name) for name in ("queued", "running"))
    claimed(sessions, running)

    with sessions.begin() as session:
        assert transitions.cancel_queued(session, queued, now=after(1), actor=ACTOR)
        assert not transitions.cancel_queued(session, running, now=after(1), actor=ACTOR)

    assert get(sessions, Analysis, queued).state is AnalysisState.CANCELLED
    assert get(sessions, Analysis, running).state is AnalysisState.RUNNING
    assert claim(sessions, queued) is None


# --- results --------------------------------------------------------------------------------------------------------


def test_results_and_deliveries_are_named_with_the_end_of_the_analysis(
    sessions: sessionmaker[Session], analysis_id: int
) -> None:
    """read -> done, one event per result, and deliveries due at once."""
    read(sessions, analysis_id)

    assert finish(sessions, analysis_id, (result(analysis_id, 1), ["a", "b"]), (result(analysis_id, 2), []))

    assert get(sessions, Analysis, analysis_id).state is AnalysisState.DONE
    pending = [get(sessions, Delivery, one) for one in deliveries(sessions, analysis_id)]
    assert [(one.destination, one.state, one.attempts) for one in pending] == [
        ("a", DeliveryState.PENDING, 0),
        ("b", DeliveryState.PENDING, 0),
    ]
    assert all(one.next_attempt_at == NOW for one in pending)
    assert kinds(sessions)[-3:] == ["result-built", "result-built", "analysis-done"]
    assert event(sessions, "analysis-done").detail == {"results": 2, "deliveries": 2}


def test_quarantined_result_keeps_the_analysis_and_its_other_results_back(
    sessions: sessionmaker[Session], analysis_id: int
) -> None:
    """The analysis stays `read`, nothing of it is sent, and it is not built again."""
    read(sessions, analysis_id)
    bad = result(analysis_id, 1, state=ResultState.QUARANTINED, gate=["error: dciodvfy: missing attribute"])

    assert finish(sessions, analysis_id, (bad, ["a"]), (result(analysis_id, 2), ["b"]))

    assert get(sessions, Analysis, analysis_id).state is AnalysisState.READ
    assert deliveries(sessions, analysis_id) == []
    assert kinds(sessions)[-2:] == ["result-quarantined", "result-built"]
    assert not finish(sessions, analysis_id, (result(analysis_id, 3), ["a"]))


def test_analysis_is_finished_once(sessions: sessionmaker[Session], analysis_id: int) -> None:
    """A second builder adds no result and no delivery."""
    read(sessions, analysis_id)

    assert finish(sessions, analysis_id, (result(analysis_id, 1), ["a"]))
    assert not finish(sessions, analysis_id, (result(analysis_id, 2), ["a"]))

    with sessions() as session:
        assert len(session.scalars(select(Result)).all()) == 1


def test_results_of_an_older_run_are_not_named(sessions: sessionmaker[Session], analysis_id: int) -> None:
    """What was built from the output of another fence is not what is on record."""
    read(sessions, analysis_id)
    with sessions() as session:
        stale = session.get_one(Analysis, analysis_id)
    stale.fence -= 1

    with sessions.begin() as session:
        assert not transitions.finish_analysis(session, stale, [(result(analysis_id), [])], now=NOW, actor=ACTOR)


def test_failing_transaction_leaves_neither_results_nor_state(
    sessions: sessionmaker[Session], analysis_id: int
) -> None:
    """The audit event and the fact it records are committed together or not at all."""
    read(sessions, analysis_id)
    before = kinds(sessions)

    with sessions() as session:
        analysis = session.get_one(Analysis, analysis_id)
        assert transitions.finish_analysis(session, analysis, [(result(analysis_id), ["a"])], now=NOW, actor=ACTOR)
        session.rollback()

    assert get(sessions, Analysis, analysis_id).state is AnalysisState.READ
    assert deliveries(sessions, analysis_id) == []
    assert kinds(sessions) == before


# --- delivery -------------------------------------------------------------------------------------------------------


@pytest.fixture
def delivery(sessions: sessionmaker[Session], study_id: int) -> Delivery:
    (delivery_id,) = add_deliveries(sessions, study_id, "pacs")
    return get(sessions, Delivery, delivery_id)


def deliver(sessions: sessionmaker[Session], delivery: Delivery, status: int = 0, note: str | None = None) -> bool:
    with sessions.begin() as session:
        return delivery_transitions.close_delivered(
            session, delivery, status=status, note=note, now=after(3), actor=ACTOR
        )


def postpone(sessions: sessionmaker[Session], delivery: Delivery) -> bool:
    with sessions.begin() as session:
        return delivery_transitions.postpone_delivery(
            session, delivery, status=0xA700, reason="full", next_attempt_at=after(30), now=NOW, actor=ACTOR
        )


def reject(sessions: sessionmaker[Session], delivery: Delivery) -> bool:
    with sessions.begin() as session:
        return delivery_transitions.reject_delivery(
            session, delivery, status=0xC000, reason="not understood", now=NOW, actor=ACTOR
        )


def test_delivered_result_has_its_status_and_time(sessions: sessionmaker[Session], delivery: Delivery) -> None:
    """A warning is kept with its note."""
    assert deliver(sessions, delivery, 0xB000, "coerced")

    row = get(sessions, Delivery, delivery.id)
    assert (row.state, row.status, row.reason) == (DeliveryState.DELIVERED, 0xB000, "coerced")
    assert (row.delivered_at, row.next_attempt_at, row.attempts) == (after(3), None, 1)


def test_postponed_delivery_is_pending_and_one_attempt_older(
    sessions: sessionmaker[Session], delivery: Delivery
) -> None:
    """With the status, the reason and the time of the next attempt."""
    assert postpone(sessions, delivery)

    row = get(sessions, Delivery, delivery.id)
    assert (row.state, row.attempts, row.status, row.reason) == (DeliveryState.PENDING, 1, 0xA700, "full")
    assert row.next_attempt_at == after(30)


def test_rejected_delivery_is_resumed_by_a_command(sessions: sessionmaker[Session], delivery: Delivery) -> None:
    """pending -> rejected -> pending with fresh attempts, due at once."""
    assert reject(sessions, delivery)
    assert get(sessions, Delivery, delivery.id).state is DeliveryState.REJECTED

    with sessions.begin() as session:
        assert delivery_transitions.requeue_delivery(session, delivery.id, now=after(9), actor="cli/somebody")
        assert not delivery_transitions.requeue_delivery(session, delivery.id, now=after(9), actor="cli/somebody")

    row = get(sessions, Delivery, delivery.id)
    assert (row.state, row.attempts, row.next_attempt_at) == (DeliveryState.PENDING, 0, after(9))


@pytest.mark.parametrize("before", [postpone, reject, deliver])
def test_result_is_sent_again_by_a_command_whatever_became_of_it(
    sessions: sessionmaker[Session], delivery: Delivery, before: Callable[..., bool]
) -> None:
    """Due at once with fresh attempts, also where it waited for its next one."""
    assert before(sessions, delivery)

    with sessions.begin() as session:
        again = delivery_transitions.resend_result(
            session, delivery.result_id, "pacs", now=after(9), actor="cli/somebody"
        )

    row = get(sessions, Delivery, delivery.id)
    assert again == delivery.id
    assert (row.state, row.attempts, row.next_attempt_at) == (DeliveryState.PENDING, 0, after(9))
    assert event(sessions, "delivery-requeued").actor == "cli/somebody"


def test_result_is_sent_to_another_destination_by_a_command(
    sessions: sessionmaker[Session], delivery: Delivery
) -> None:
    """A delivery of its own; the first one stays as it was."""
    with sessions.begin() as session:
        made = delivery_transitions.resend_result(
            session, delivery.result_id, "archive", now=after(9), actor="cli/somebody"
        )

    row = get(sessions, Delivery, made)
    assert (row.destination, row.state, row.next_attempt_at) == ("archive", DeliveryState.PENDING, after(9))
    assert get(sessions, Delivery, delivery.id).attempts == 0
    assert event(sessions, "delivery-requeued").detail == {"destination": "archive"}


def test_quarantined_result_is_never_sent_by_a_command(sessions: sessionmaker[Session], study_id: int) -> None:
    """The gate stands above commands."""
    analysis_id = add_analysis(sessions, study_id, run_number=9)
    read(sessions, analysis_id)
    assert finish(sessions, analysis_id, (result(analysis_id, state=ResultState.QUARANTINED), ["pacs"]))
    with sessions.begin() as session:
        (result_id,) = session.scalars(select(Result.id).where(Result.analysis_id == analysis_id))
        assert delivery_transitions.resend_result(session, result_id, "pacs", now=NOW, actor=ACTOR) is None


def test_destination_is_paused_and_resumed_once(sessions: sessionmaker[Session]) -> None:
    """Who did it is on record; a second time changes nothing and adds no event."""
    with sessions.begin() as session:
        assert not delivery_transitions.resume_destination(session, "pacs", now=NOW, actor=ACTOR)
        assert delivery_transitions.pause_destination(session, "pacs", now=NOW, actor="cli/somebody")
        assert not delivery_transitions.pause_destination(session, "pacs", now=NOW, actor="cli/other")
    assert get(sessions, Destination, "pacs").paused

    with sessions.begin() as session:
        assert delivery_transitions.resume_destination(session, "pacs", now=after(9), actor="cli/other")
    assert not get(sessions, Destination, "pacs").paused
    assert event(sessions, "destination-paused").actor == "cli/somebody"
    assert event(sessions, "destination-resumed").actor == "cli/other"


@pytest.mark.parametrize("close", [deliver, postpone, reject])
def test_answer_to_a_delivery_counts_once(
    sessions: sessionmaker[Session], delivery: Delivery, close: Callable[..., bool]
) -> None:
    """Two processes that sent the same delivery: the first answer is kept, the second changes nothing."""
    assert postpone(sessions, delivery)
    before = kinds(sessions)

    assert not close(sessions, delivery)

    assert get(sessions, Delivery, delivery.id).attempts == 1
    assert kinds(sessions) == before


def test_every_event_of_a_delivery_names_its_study_and_analysis(
    sessions: sessionmaker[Session], delivery: Delivery, study_id: int
) -> None:
    """The history of a study is found by its row id."""
    postpone(sessions, delivery)
    reject(sessions, get(sessions, Delivery, delivery.id))
    with sessions.begin() as session:
        delivery_transitions.requeue_delivery(session, delivery.id, now=NOW, actor=ACTOR)
    deliver(sessions, get(sessions, Delivery, delivery.id))

    assert kinds(sessions, study_id=study_id, delivery_id=delivery.id, result_id=delivery.result_id) == [
        "delivery-postponed",
        "delivery-rejected",
        "delivery-requeued",
        "delivery-delivered",
    ]
    assert all(one is not None for one in _analyses_of_delivery_events(sessions))


def _analyses_of_delivery_events(sessions: sessionmaker[Session]) -> list[int | None]:
    with sessions() as session:
        return list(session.scalars(select(AuditEvent.analysis_id).where(AuditEvent.delivery_id.is_not(None))))


# --- times ----------------------------------------------------------------------------------------------------------


def test_times_come_back_aware_and_in_utc(sessions: sessionmaker[Session]) -> None:
    """Whatever zone they were given in, and on both databases."""
    study_id = add_study(sessions, first_received_at=NOW.astimezone(ZoneInfo("Asia/Tokyo")))

    at = get(sessions, Study, study_id).first_received_at
    assert at == NOW
    assert at.utcoffset() == timedelta(0)


def test_time_without_a_zone_is_refused(sessions: sessionmaker[Session]) -> None:
    """A naive time would mean another moment on every machine."""
    with pytest.raises(StatementError, match="must carry its time zone"):
        add_study(sessions, first_received_at=NOW.replace(tzinfo=None))
