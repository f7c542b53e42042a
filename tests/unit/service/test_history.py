"""What `status`, `history` and `show` know: counts, the newest studies, one study's whole story, and its names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session, sessionmaker

from service import history
from service.history import NotFound
from service.shared import delivery_transitions
from service.shared.db import Analysis, Delivery, Destination, ReportText, StudyHeader, StudyState
from service.shared.settings import DestinationSettings
from tests.rows import (
    NOW,
    STUDY_UID,
    add_analysis,
    add_deliveries,
    add_instance,
    add_study,
    after,
    claimed,
    deliveries,
    finish,
    open_database,
    read,
    result,
)


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        yield opened


def destination(name: str) -> DestinationSettings:
    return DestinationSettings(name=name, ae_title=name.upper(), host="pacs.example", port=104)


def add_header(sessions: sessionmaker[Session], study_id: int, **changes: str) -> None:
    fields = {column.key: "" for column in StudyHeader.__mapper__.column_attrs} | {"salt": "secret-salt"}
    with sessions.begin() as session:
        session.add(StudyHeader(**(fields | {"study_id": study_id} | changes)))


def status(sessions: sessionmaker[Session], *names: str) -> dict[str, Any]:
    with sessions() as session:
        return history.status(session, [destination(name) for name in names], after(100))


def recent(sessions: sessionmaker[Session], **how: Any) -> list[dict[str, Any]]:
    with sessions() as session:
        return history.recent(session, **({"limit": 20} | how))


def named(sessions: sessionmaker[Session], name: str) -> int:
    with sessions() as session:
        return history.study_named(session, name).id


# --- status ---------------------------------------------------------------------------------------------------------


def test_status_of_an_empty_database_is_all_zero(sessions: sessionmaker[Session]) -> None:
    """Every state is there with its zero, so that a program can rely on the keys."""
    found = status(sessions)

    assert found["studies"] == {"receiving": 0, "complete": 0}
    assert set(found["analyses"]) >= {"queued", "running", "read", "done", "refused", "failed"}
    assert set(found["deliveries"].values()) == {0}
    assert found["oldest_unfinished_s"] is None
    assert found["destinations"] == []


def test_status_counts_by_state(sessions: sessionmaker[Session]) -> None:
    """Studies, instances, analyses, deliveries, and what waits for each destination."""
    study_id = add_study(sessions)
    add_study(sessions, "2.25.2", state=StudyState.RECEIVING, held=True)
    add_instance(sessions, study_id)
    add_analysis(sessions, study_id, route="queued", now=after(40))
    claimed(sessions, add_analysis(sessions, study_id, route="running", now=after(60)))
    delivered, _, _ = add_deliveries(sessions, study_id, "a", "b", "gone")
    with sessions.begin() as session:
        row = session.get_one(Delivery, delivered)
        delivery_transitions.close_delivered(session, row, status=0, note=None, now=NOW, actor="test")
        session.add(Destination(name="b", paused=True, changed_at=NOW))

    found = status(sessions, "a", "b")

    assert (found["studies"], found["studies_held"]) == ({"receiving": 1, "complete": 1}, 1)
    assert found["instances"] == 1
    assert {state: n for state, n in found["analyses"].items() if n} == {"queued": 1, "running": 1, "done": 1}
    assert {state: n for state, n in found["deliveries"].items() if n} == {"pending": 2, "delivered": 1}
    assert found["oldest_unfinished_s"] == 60
    assert [(one["name"], one["waiting"], one["paused"]) for one in found["destinations"]] == [
        ("a", 0, False),
        ("b", 1, True),
    ]
    assert found["destinations"][0]["address"] == "pacs.example:104"


def test_status_leaves_out_what_ended_long_ago(sessions: sessionmaker[Session]) -> None:
    """What is open or failed counts whatever its age; what was done and delivered counts for a day."""
    old, long_ago = {"last_image_at": after(-90_000)}, after(-90_000)
    add_deliveries(sessions, add_study(sessions), "a")
    done = add_study(sessions, "2.25.2", **old)
    claimed(sessions, add_analysis(sessions, add_study(sessions, "2.25.3", state=StudyState.RECEIVING, **old)))
    add_deliveries(sessions, done, "a", "b")
    with sessions.begin() as session:
        session.execute(update(Analysis).where(Analysis.study_id == done).values(queued_at=long_ago))
        first, second, third = session.scalars(select(Delivery).order_by(Delivery.id))
        for row, at in ((first, NOW), (second, long_ago)):
            assert delivery_transitions.close_delivered(session, row, status=0, note=None, now=at, actor="test")
        assert third.state == "pending"

    found = status(sessions, "a", "b")

    assert found["studies"] == {"receiving": 1, "complete": 1}
    assert {state: n for state, n in found["analyses"].items() if n} == {"running": 1, "done": 1}
    assert {state: n for state, n in found["deliveries"].items() if n} == {"pending": 1, "delivered": 1}


def test_deliveries_to_a_destination_that_left_the_configuration_are_said(sessions: sessionmaker[Session]) -> None:
    """Nobody sends them; they must not be forgotten silently."""
    add_deliveries(sessions, add_study(sessions), "a", "gone")

    assert status(sessions, "a")["waiting_for_others"] == {"gone": 1}
    assert status(sessions, "a", "gone")["waiting_for_others"] == {}


# --- history --------------------------------------------------------------------------------------------------------


def test_history_shows_the_newest_studies_first(sessions: sessionmaker[Session]) -> None:
    """As many as asked for."""
    ids = [add_study(sessions, f"2.25.{number}", first_received_at=after(number)) for number in range(3)]

    assert [row["study_id"] for row in recent(sessions)] == ids[::-1]
    assert [row["study_id"] for row in recent(sessions, limit=1)] == ids[-1:]


def test_history_shows_the_newest_analysis_and_all_deliveries_of_a_study(sessions: sessionmaker[Session]) -> None:
    """One row per study, however many analyses it has."""
    study_id = add_study(sessions, revision=2)
    add_header(sessions, study_id, accession_number="A1", patient_id="P1")
    add_instance(sessions, study_id, 1)
    add_instance(sessions, study_id, 2)
    add_deliveries(sessions, study_id, "a", "b")
    newest = add_analysis(sessions, study_id, revision=2)

    (row,) = recent(sessions)

    assert (row["study_uid"], row["instances"], row["revision"]) == (STUDY_UID, 2, 2)
    assert (row["accession_number"], row["patient_id"], row["from"]) == ("A1", "P1", "SENDER")
    assert (row["analysis_state"], row["counts"], row["reason"]) == ("queued", None, None)
    assert row["deliveries"] == {"pending": 2}

    read(sessions, newest)
    assert recent(sessions)[0]["counts"]["inputs_kept"] == 12


def test_study_without_header_or_analysis_has_its_row(sessions: sessionmaker[Session]) -> None:
    """Nothing routable has arrived, or its header was erased."""
    add_study(sessions, revision=0, last_image_at=None)

    (row,) = recent(sessions)

    assert (row["accession_number"], row["analysis_state"], row["deliveries"]) == (None, None, {})


@pytest.mark.parametrize(
    ("state", "expected"),
    [("receiving", ["2.25.1"]), ("complete", ["2.25.2"]), ("queued", ["2.25.2"]), ("done", []), ("nonsense", [])],
)
def test_history_can_be_narrowed_to_a_state(sessions: sessionmaker[Session], state: str, expected: list[str]) -> None:
    """Of the study or of its newest analysis; a word that is no state finds nothing."""
    add_study(sessions, "2.25.1", state=StudyState.RECEIVING)
    add_analysis(sessions, add_study(sessions, "2.25.2"))

    assert [row["study_uid"] for row in recent(sessions, state=state)] == expected


# --- a study by its name --------------------------------------------------------------------------------------------


def test_study_is_found_by_uid_number_and_accession_number(sessions: sessionmaker[Session]) -> None:
    """Whatever the person has at hand."""
    add_study(sessions, "2.25.1")
    study_id = add_study(sessions, "2.25.2")
    add_header(sessions, study_id, accession_number="A-77")

    assert named(sessions, "2.25.2") == study_id
    assert named(sessions, str(study_id)) == study_id
    assert named(sessions, "A-77") == study_id


@pytest.mark.parametrize("name", ["", "2.25.9", "A1", "0", "4711", "²", "9" * 18, "9" * 19, "9" * 400, "-1"])
def test_name_that_nothing_has_is_not_found(sessions: sessionmaker[Session], name: str) -> None:
    """Also a number that no row id can be."""
    add_study(sessions)

    with pytest.raises(NotFound, match="no study with"):
        named(sessions, name)


def test_accession_number_of_several_studies_is_refused(sessions: sessionmaker[Session]) -> None:
    """One order may have several studies; the caller must say which."""
    for number in (1, 2):
        add_header(sessions, add_study(sessions, f"2.25.{number}"), accession_number="A1")

    with pytest.raises(NotFound, match="2 studies; give the Study Instance UID"):
        named(sessions, "A1")


def test_number_that_is_also_an_accession_number_is_refused(sessions: sessionmaker[Session]) -> None:
    """`requeue 2` must not reach one patient's study when another's was meant."""
    first, second = add_study(sessions, "2.25.1"), add_study(sessions, "2.25.2")
    add_header(sessions, first, accession_number=str(second))

    with pytest.raises(NotFound, match="2 studies; give the Study Instance UID"):
        named(sessions, str(second))


def test_number_that_is_its_own_accession_number_is_clear(sessions: sessionmaker[Session]) -> None:
    """Both mean the same study."""
    study_id = add_study(sessions)
    add_header(sessions, study_id, accession_number=str(study_id))

    assert named(sessions, str(study_id)) == study_id


# --- the story ------------------------------------------------------------------------------------------------------


def test_story_holds_everything_on_record(sessions: sessionmaker[Session]) -> None:
    """Header without its salt, series, analyses with text, results and deliveries, and every event in order."""
    study_id = add_study(sessions)
    other = add_study(sessions, "2.25.2")
    add_header(sessions, study_id, patient_name="Doe^John")
    for number in (1, 2):
        add_instance(sessions, study_id, number)
    add_instance(sessions, study_id, 3, series_uid="2.25.2001", modality="SR", is_image=False)
    add_analysis(sessions, other)
    analysis_id = add_analysis(sessions, study_id)
    read(sessions, analysis_id)
    finish(sessions, analysis_id, (result(analysis_id), ["pacs"]))
    (delivery_id,) = deliveries(sessions, analysis_id)
    with sessions.begin() as session:
        row = session.get_one(Delivery, delivery_id)
        delivery_transitions.close_delivered(session, row, status=0xB000, note="coerced", now=NOW, actor="test")

    with sessions() as session:
        story = history.study_story(session, history.study_named(session, STUDY_UID))

    assert story["study"]["study_uid"] == STUDY_UID
    assert story["header"]["patient_name"] == "Doe^John"
    assert "salt" not in story["header"]
    assert [(one["modality"], one["instances"], one["size_bytes"]) for one in story["series"]] == [
        ("CT", 2, 2000),
        ("SR", 1, 1000),
    ]
    (analysis,) = story["analyses"]
    assert analysis["report"] == {"findings": "The lungs are clear.", "impression": "No acute finding."}
    assert analysis["results"][0]["deliveries"][0]["status"] == 0xB000
    assert [one["kind"] for one in story["events"]] == [
        "analysis-queued",
        "analysis-started",
        "analysis-read",
        "result-built",
        "analysis-done",
        "delivery-delivered",
    ]


def test_story_of_a_study_whose_text_was_erased_still_stands(sessions: sessionmaker[Session]) -> None:
    """History outlives what names the patient."""
    study_id = add_study(sessions)
    add_header(sessions, study_id)
    analysis_id = add_analysis(sessions, study_id)
    read(sessions, analysis_id)
    with sessions.begin() as session:
        session.delete(session.get_one(StudyHeader, study_id))
        session.delete(session.get_one(ReportText, analysis_id))

    with sessions() as session:
        story = history.study_story(session, history.study_named(session, STUDY_UID))

    assert story["header"] is None
    assert story["analyses"][0]["report"] is None
    assert story["analyses"][0]["counts"]["inputs_kept"] == 12
