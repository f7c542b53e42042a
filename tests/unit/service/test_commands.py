"""What a person may tell the service: requeue, run again, cancel; each with the user on record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service import commands
from service.shared import delivery_transitions, transitions
from service.shared.db import Analysis, AnalysisState, Delivery, DeliveryState, Study, StudyState
from service.shared.settings import Settings
from tests.rows import (
    NOW,
    add_analysis,
    add_deliveries,
    add_study,
    after,
    claimed,
    event,
    get,
    kinds,
    open_database,
    read,
)

USER = "cli/somebody"
TWO_ROUTES = {"route": [{"name": "default"}, {"name": "other"}]}


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        yield opened


def requeue(sessions: sessionmaker[Session], study_id: int, *, again: bool = False, **settings: Any) -> list[str]:
    with sessions.begin() as session:
        study = session.get_one(Study, study_id)
        return commands.requeue(
            session, study, Settings.model_validate(settings), again=again, now=after(500), actor=USER
        )


def fail(sessions: sessionmaker[Session], analysis_id: int) -> int:
    held = claimed(sessions, analysis_id)
    with sessions.begin() as session:
        transitions.close_fault(session, held, code="Boom", reason="", max_attempts=1, now=NOW, actor="worker")
    return analysis_id


def refuse(sessions: sessionmaker[Session], analysis_id: int) -> int:
    held = claimed(sessions, analysis_id)
    with sessions.begin() as session:
        transitions.close_refused(session, held, code="x", reason="", now=NOW, actor="worker")
    return analysis_id


def states(sessions: sessionmaker[Session]) -> list[tuple[str, int, str]]:
    with sessions() as session:
        rows = session.scalars(select(Analysis).order_by(Analysis.id))
        return [(one.route, one.run_number, one.state.value) for one in rows]


def test_held_study_is_released(sessions: sessionmaker[Session]) -> None:
    """The sweep may then queue it; nothing is queued here."""
    study_id = add_study(sessions, held=True, dispatched_revision=0)

    assert requeue(sessions, study_id) == ["study released"]
    assert not get(sessions, Study, study_id).held
    assert event(sessions, "study-released").actor == USER
    assert states(sessions) == []


def test_failed_analyses_and_rejected_deliveries_are_resumed(sessions: sessionmaker[Session]) -> None:
    """Both by one command, and each is said."""
    study_id = add_study(sessions)
    rejected, delivered = add_deliveries(sessions, study_id, "a", "b")
    with sessions.begin() as session:
        delivery_transitions.reject_delivery(
            session, session.get_one(Delivery, rejected), status=0xC000, reason="", now=NOW, actor="x"
        )
        delivery_transitions.close_delivered(
            session, session.get_one(Delivery, delivered), status=0, note=None, now=NOW, actor="x"
        )
    failed = fail(sessions, add_analysis(sessions, study_id, route="other"))

    done = requeue(sessions, study_id)

    assert done == [f"analysis {failed} queued again", f"delivery {rejected} pending again"]
    assert get(sessions, Analysis, failed).state is AnalysisState.QUEUED
    assert get(sessions, Delivery, rejected).state is DeliveryState.PENDING
    assert get(sessions, Delivery, delivered).state is DeliveryState.DELIVERED
    assert kinds(sessions, actor=USER) == ["analysis-requeued", "delivery-requeued"]


@pytest.mark.parametrize("end", ["queued", "running", "read", "refused", "cancelled"])
def test_nothing_else_is_resumed(sessions: sessionmaker[Session], end: str) -> None:
    """What waits, runs, or is final stays as it is without --again."""
    analysis_id = add_analysis(sessions, study_id := add_study(sessions))
    if end == "running":
        claimed(sessions, analysis_id)
    elif end == "read":
        read(sessions, analysis_id)
    elif end == "refused":
        refuse(sessions, analysis_id)
    elif end == "cancelled":
        cancel(sessions, study_id)

    assert requeue(sessions, study_id) == []
    assert get(sessions, Analysis, analysis_id).state.value == end


def test_other_studies_are_not_touched(sessions: sessionmaker[Session]) -> None:
    """The command names one study."""
    failed = fail(sessions, add_analysis(sessions, add_study(sessions, "2.25.1")))

    assert requeue(sessions, add_study(sessions, "2.25.2")) == []
    assert get(sessions, Analysis, failed).state is AnalysisState.FAILED


def test_failed_analysis_of_an_older_revision_stays_failed(sessions: sessionmaker[Session]) -> None:
    """It would read what is out of date, beside the new revision's own analysis."""
    study_id = add_study(sessions, revision=2)
    fail(sessions, add_analysis(sessions, study_id, revision=1))
    new = fail(sessions, add_analysis(sessions, study_id, revision=2))

    assert requeue(sessions, study_id) == [f"analysis {new} queued again"]


@pytest.mark.parametrize("end", [read, refuse])
def test_again_queues_a_new_run_of_what_ran(sessions: sessionmaker[Session], end: Any) -> None:
    """The next run number of the same revision; the earlier run stays as it is."""
    study_id = add_study(sessions)
    first = add_analysis(sessions, study_id)
    end(sessions, first)

    assert requeue(sessions, study_id, again=True) == ["route default queued as run 2"]

    assert states(sessions)[1] == ("default", 2, "queued")
    with sessions() as session:
        second = session.scalars(select(Analysis).order_by(Analysis.id.desc())).first()
    assert second is not None
    assert second.predecessor_id == (first if end is read else None)


def test_again_runs_only_routes_that_ran_and_still_exist(sessions: sessionmaker[Session]) -> None:
    """A route that never took the study is not started by hand; one that is gone cannot be."""
    study_id = add_study(sessions)
    for route in ("default", "gone"):
        read(sessions, add_analysis(sessions, study_id, route=route))

    assert requeue(sessions, study_id, again=True, **TWO_ROUTES) == ["route default queued as run 2"]


def test_again_does_not_double_what_is_under_way(sessions: sessionmaker[Session]) -> None:
    """Neither what waits, nor what runs, nor a failed run that the same command has just resumed."""
    study_id = add_study(sessions)
    queued = add_analysis(sessions, study_id, route="queued")
    running = add_analysis(sessions, study_id, route="running")
    claimed(sessions, running)
    failed = fail(sessions, add_analysis(sessions, study_id, route="failed"))
    routes = [{"name": name} for name in ("queued", "running", "failed")]

    assert requeue(sessions, study_id, again=True, route=routes) == [f"analysis {failed} queued again"]
    assert len(states(sessions)) == 3
    assert get(sessions, Analysis, queued).run_number == 1


@pytest.mark.parametrize("changes", [{"patient_mismatch": True}, {"state": StudyState.RECEIVING}], ids=str)
def test_again_runs_no_mixed_or_unfinished_study(sessions: sessionmaker[Session], changes: dict[str, Any]) -> None:
    """A command is no way round the rules."""
    study_id = add_study(sessions, **changes)
    refuse(sessions, add_analysis(sessions, study_id))

    assert requeue(sessions, study_id, again=True) == []


def cancel(sessions: sessionmaker[Session], study_id: int) -> int:
    with sessions.begin() as session:
        return commands.cancel(session, session.get_one(Study, study_id), now=after(500), actor=USER)


def test_cancel_ends_what_waits_and_lets_the_rest_finish(sessions: sessionmaker[Session]) -> None:
    """How many is said, and the user is on record."""
    study_id = add_study(sessions)
    for route in ("a", "b"):
        add_analysis(sessions, study_id, route=route)
    claimed(sessions, add_analysis(sessions, study_id, route="running"))
    add_analysis(sessions, add_study(sessions, "2.25.2"))

    assert cancel(sessions, study_id) == 2
    assert cancel(sessions, study_id) == 0

    assert [state for _, _, state in states(sessions)] == ["cancelled", "cancelled", "running", "queued"]
    assert kinds(sessions, actor=USER) == ["analysis-cancelled"] * 2


def resend(sessions: sessionmaker[Session], study_id: int, folder: Path, to: str | None = None) -> list[str]:
    destinations = [{"name": name, "ae_title": "PACS", "host": "pacs", "port": 104} for name in ("a", "b")]
    settings = Settings.model_validate({"data": {"path": folder}, "destination": destinations})
    with sessions.begin() as session:
        return commands.resend(session, session.get_one(Study, study_id), settings, to=to, now=after(500), actor=USER)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A data folder with the bytes of a result in it."""
    (tmp_path / "outbox").mkdir()
    (tmp_path / "outbox" / "1.dcm").write_bytes(b"result")
    return tmp_path


def test_results_are_sent_again_to_where_they_went(sessions: sessionmaker[Session], stored: Path) -> None:
    """Of the destinations that are still configured."""
    study_id = add_study(sessions)
    first, gone = add_deliveries(sessions, study_id, "a", "no-more")
    for one in (first, gone):
        with sessions.begin() as session:
            row = session.get_one(Delivery, one)
            delivery_transitions.close_delivered(session, row, status=0, note=None, now=NOW, actor="x")

    assert resend(sessions, study_id, stored) == ["sr-comprehensive3d is on its way to a"]

    assert get(sessions, Delivery, first).state is DeliveryState.PENDING
    assert get(sessions, Delivery, gone).state is DeliveryState.DELIVERED
    assert kinds(sessions, actor=USER) == ["delivery-requeued"]


def test_results_are_sent_to_a_destination_that_is_named(sessions: sessionmaker[Session], stored: Path) -> None:
    """Also where they never went."""
    study_id = add_study(sessions)
    add_deliveries(sessions, study_id, "a")

    assert resend(sessions, study_id, stored, "b") == ["sr-comprehensive3d is on its way to b"]


def test_resend_says_why_nothing_can_be_sent(sessions: sessionmaker[Session], stored: Path, tmp_path: Path) -> None:
    """An unknown destination, no result yet, results removed by age."""
    study_id = add_study(sessions)
    with pytest.raises(commands.CannotResend, match="no result that was built"):
        resend(sessions, study_id, stored)
    add_deliveries(sessions, study_id, "a")
    with pytest.raises(commands.CannotResend, match=r"no \[\[destination\]\] is called 'c'; known: a, b"):
        resend(sessions, study_id, stored, "c")
    (stored / "outbox" / "1.dcm").unlink()
    with pytest.raises(commands.CannotResend, match="have been removed"):
        resend(sessions, study_id, stored)
