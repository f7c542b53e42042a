"""Export, statistics, filters and explanations, from rows as the product makes them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service import chain, explain, export, history, stats
from service.export import Format, Selection
from service.shared import audit, delivery_transitions, transitions
from service.shared.audit import AuditKind
from service.shared.db import Delivery, Study, StudyHeader, StudyState
from service.shared.settings import Settings
from tests.rows import ACTOR, NOW, add_analysis, add_deliveries, add_instance, add_study, after, claimed, open_database


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        yield opened


def selected(sessions: sessionmaker[Session], **selection: object) -> list[dict[str, object]]:
    with sessions() as session:
        return list(export.events(session, Selection(**selection)))  # type: ignore[arg-type]


def explained(sessions: sessionmaker[Session], study_id: int, seconds: float = 0) -> str:
    with sessions() as session:
        story = history.study_story(session, session.get_one(Study, study_id))
    return "\n".join(explain.explain(story, Settings(), after(seconds)))


# --- export ---------------------------------------------------------------------------------------------------------


def test_export_takes_every_event_with_its_place_in_the_chain(sessions: sessionmaker[Session]) -> None:
    """More than one page; what is not chained yet has no place."""
    with sessions.begin() as session:
        for number in range(export.PAGE + 3):
            audit.append(session, AuditKind.STUDY_COMPLETE, now=after(number), actor=ACTOR)
    with sessions.begin() as session:
        chain.append_batch(session)

    rows = selected(sessions)

    assert len(rows) == export.PAGE + 3
    assert [rows[0]["seq"], rows[chain.BATCH - 1]["seq"], rows[chain.BATCH]["seq"]] == [1, chain.BATCH, None]
    assert rows[0]["at"] == NOW.isoformat()


def test_export_by_time_study_sender_and_destination(sessions: sessionmaker[Session]) -> None:
    """Each restricts alone; time includes its beginning and not its end."""
    one, other = add_study(sessions, "2.25.1"), add_study(sessions, "2.25.2")
    add_instance(sessions, one, calling_ae="CT01")
    add_instance(sessions, other, calling_ae="MR01")
    (delivery_id,) = add_deliveries(sessions, one, "pacs")
    with sessions.begin() as session:
        delivery = session.get_one(Delivery, delivery_id)
        delivery_transitions.close_delivered(session, delivery, status=0, note=None, now=after(100), actor=ACTOR)
    add_analysis(sessions, other, now=after(50))

    assert {row["study_id"] for row in selected(sessions, study_id=one)} == {one}
    assert {row["study_id"] for row in selected(sessions, sender="MR01")} == {other}
    assert [row["kind"] for row in selected(sessions, destination="pacs")] == ["delivery-delivered"]
    assert [row["study_uid"] for row in selected(sessions, since=after(50), until=after(100))] == ["2.25.2"]
    assert selected(sessions, sender="NOBODY") == []


def test_both_forms_say_the_same(sessions: sessionmaker[Session]) -> None:
    """A CSV reader and a JSON reader get equal values; no cell begins as a formula."""
    with sessions.begin() as session:
        audit.append(session, AuditKind.SERVICE_STARTED, now=NOW, actor='=cmd|"x"', version="1,2\n")
    rows = selected(sessions)

    lines, table = io.StringIO(), io.StringIO(newline="")
    assert export.write(rows, Format.JSONL, lines) == export.write(rows, Format.CSV, table) == 1

    read = json.loads(lines.getvalue())
    (cells,) = csv.DictReader(io.StringIO(table.getvalue()))
    assert read["actor"] == '=cmd|"x"'
    assert cells["actor"] == '\'=cmd|"x"'
    assert json.loads(cells["detail"]) == read["detail"] == {"version": "1,2\n"}


# --- history and stats ----------------------------------------------------------------------------------------------


def test_history_is_filtered(sessions: sessionmaker[Session]) -> None:
    """By time, sender, accession number, patient ID, route, destination and the state of any step."""
    old = add_study(sessions, "2.25.1", first_received_at=NOW - timedelta(days=2), calling_ae="CT01")
    new = add_study(sessions, "2.25.2", state=StudyState.RECEIVING, calling_ae="MR01")
    add_deliveries(sessions, old, "pacs")
    add_analysis(sessions, new, route="head")
    with sessions.begin() as session:
        session.add(_header(new, accession_number="A1", patient_id="P1"))

    def found(**which: object) -> list[int]:
        with sessions() as session:
            return [row["study_id"] for row in history.recent(session, limit=9, **which)]  # type: ignore[arg-type]

    assert found() == [new, old]
    assert found(since=NOW) == [new]
    assert found(sender="CT01") == [old]
    assert found(until=NOW) == [old]
    assert found(since=NOW - timedelta(days=2), until=NOW - timedelta(days=2)) == []
    assert found(accession="A1") == [new]
    assert (found(patient_id="P1"), found(patient_id="P")) == ([new], [])
    assert (found(route="head"), found(route="default"), found(route="none")) == ([new], [old], [])
    assert (found(destination="pacs"), found(destination="none")) == ([old], [])
    assert found(route="head", destination="pacs") == []
    assert found(state="pending") == [old]
    assert found(state="receiving") == [new]


def test_stats_count_and_spread(sessions: sessionmaker[Session]) -> None:
    """Of one delivered study: everything once, with its ratios."""
    study_id = add_study(sessions, calling_ae="CT01")
    add_instance(sessions, study_id)
    (delivery_id,) = add_deliveries(sessions, study_id, "pacs")
    with sessions.begin() as session:
        delivery = session.get_one(Delivery, delivery_id)
        delivery_transitions.close_delivered(session, delivery, status=0, note=None, now=after(30), actor=ACTOR)

    with sessions() as session:
        found = stats.stats(session, since=NOW, sender="CT01")
        nothing = stats.stats(session, since=after(1))

    assert (found["studies"], found["instances"], found["analyses"]) == (1, 1, {"done": 1})
    assert found["deliveries"] == {"pacs": {"delivered": 1}}
    assert found["tokens_kept"]["median"] == round(100 / 320, 4)
    assert found["complete_to_delivered_s"]["max"] == 30
    assert found["steps_s"]["generate"]["p95"] == 1.5
    assert (nothing["studies"], nothing["tokens_kept"]) == (0, None)


# --- explain --------------------------------------------------------------------------------------------------------


def test_explanation_follows_the_study(sessions: sessionmaker[Session]) -> None:
    """What it waits for, at every step."""
    study_id = add_study(sessions, state=StudyState.RECEIVING, completed_at=None)
    assert "last image came 7 s ago. Next: it is complete after 60 s" in explained(sessions, study_id, 7)

    other = add_study(sessions, "2.25.2")
    assert "Next: dispatch queues one per route" in explained(sessions, other)
    analysis_id = add_analysis(sessions, other)
    assert "waits for a worker since 5 s" in explained(sessions, other, 5)
    claimed(sessions, analysis_id, lease_s=20)
    assert "is running on worker/1, attempt 1" in explained(sessions, other, 5)
    assert "whose lease has run out" in explained(sessions, other, 60)


def test_explanation_of_what_was_read_and_sent(sessions: sessionmaker[Session]) -> None:
    """Why this series, how much was shown, and where the report is."""
    study_id = add_study(sessions)
    add_deliveries(sessions, study_id, "pacs")

    said = explained(sessions, study_id)

    assert "It read series 2.25.2000: the only one." in said
    assert "12 of 20 inputs and 100 of 320 visual tokens" in said
    assert "Its delivery to pacs waits. Next: the stored bytes are sent at 2026-03-01 12:00:00 UTC." in said


def test_explanation_of_ends(sessions: sessionmaker[Session]) -> None:
    """Refused is an outcome, failed has a remedy, mixed patients and held studies say so."""
    refused = add_study(sessions, "2.25.1")
    claim = claimed(sessions, add_analysis(sessions, refused))
    with sessions.begin() as session:
        transitions.close_refused(session, claim, code="no-series", reason="no axial series", now=NOW, actor=ACTOR)
    mixed = add_study(sessions, "2.25.2", patient_mismatch=True, held=True)

    assert "was refused (no axial series [no-series]). That is an outcome" in explained(sessions, refused)
    assert "different patients" in explained(sessions, mixed)
    assert "`requeue` releases it" in explained(sessions, mixed)


def _header(study_id: int, **changes: str) -> StudyHeader:
    names = ("patient_id", "issuer_of_patient_id", "patient_name", "patient_birth_date", "patient_sex")
    names += ("accession_number", "study_date", "study_description")
    return StudyHeader(study_id=study_id, salt="0" * 32, **(dict.fromkeys(names, "") | changes))
