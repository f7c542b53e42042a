"""History on a terminal and as JSON: everything that matters is there, and nothing in it steers the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from sqlalchemy.orm import Session, sessionmaker

from service import history, printing
from service.shared import delivery_transitions, transitions
from service.shared.db import Delivery, ResultState, StudyHeader
from service.shared.settings import DestinationSettings
from tests.rows import (
    NOW,
    STUDY_UID,
    add_analysis,
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

# Markup that would be swallowed or raise, an emoji code, a terminal command, an override of the direction of writing
HOSTILE = "[/] [red]x[/red] :smile: \x1b[2J\x07 \u202egnp"
SHOWN = "[/] [red]x[/red] :smile: \ufffd[2J\ufffd \ufffdgnp"


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        yield opened


def printed(show: Callable[[Console], None], *, terminal: bool = False) -> str:
    """What comes out on a wide screen."""
    stream = StringIO()
    show(Console(file=stream, width=300, force_terminal=terminal, legacy_windows=False))
    return stream.getvalue()


def add_header(sessions: sessionmaker[Session], study_id: int, **changes: str) -> None:
    fields = {column.key: "" for column in StudyHeader.__mapper__.column_attrs}
    with sessions.begin() as session:
        session.add(StudyHeader(**(fields | {"study_id": study_id} | changes)))


def status(sessions: sessionmaker[Session], *names: str) -> dict[str, Any]:
    known = [DestinationSettings(name=name, ae_title=name.upper(), host="h", port=104) for name in names]
    with sessions() as session:
        return history.status(session, known, after(30))


def story(sessions: sessionmaker[Session], name: str = STUDY_UID) -> dict[str, Any]:
    with sessions() as session:
        return history.study_story(session, history.study_named(session, name))


def show(sessions: sessionmaker[Session], **how: Any) -> str:
    return printed(lambda console: printing.print_study(console, story(sessions)), **how)


@pytest.fixture
def delivered(sessions: sessionmaker[Session]) -> int:
    """A study that has gone the whole way; its row id."""
    study_id = add_study(sessions)
    add_header(sessions, study_id, patient_name="山田^太郎", patient_id="P1", accession_number="A1")
    add_instance(sessions, study_id)
    analysis_id = add_analysis(sessions, study_id)
    read(sessions, analysis_id)
    finish(sessions, analysis_id, (result(analysis_id), ["pacs"]))
    (delivery_id,) = deliveries(sessions, analysis_id)
    with sessions.begin() as session:
        row = session.get_one(Delivery, delivery_id)
        delivery_transitions.close_delivered(
            session, row, status=0xB000, note="coerced", now=NOW, actor="service/delivery"
        )
    return study_id


# --- status ---------------------------------------------------------------------------------------------------------


def test_status_says_counts_and_destinations(sessions: sessionmaker[Session]) -> None:
    """Only states that occur; each destination with what waits for it."""
    study_id = add_study(sessions, held=True)
    add_analysis(sessions, study_id)

    shown = printed(lambda console: printing.print_status(console, status(sessions, "pacs")))

    assert "1 complete, 1 held" in shown
    assert "1 queued" in shown
    assert "30 s" in shown
    assert "destination pacs: PACS at h:104, 0 waiting" in shown
    assert "running" not in shown


def test_status_says_when_results_go_nowhere(sessions: sessionmaker[Session]) -> None:
    """No [[destination]]; or one that is not configured any more."""
    assert "No [[destination]] is configured" in printed(lambda c: printing.print_status(c, status(sessions)))

    analysis_id = add_analysis(sessions, add_study(sessions))
    read(sessions, analysis_id)
    finish(sessions, analysis_id, (result(analysis_id), ["gone"]))
    shown = printed(lambda console: printing.print_status(console, status(sessions, "pacs")))
    assert "destination gone: not in the configuration, 1 waiting" in shown


# --- history --------------------------------------------------------------------------------------------------------


def history_of(sessions: sessionmaker[Session]) -> str:
    with sessions() as session:
        rows = history.recent(session, limit=5)
    return printed(lambda console: printing.print_history(console, rows))


def test_history_is_one_line_per_study(sessions: sessionmaker[Session], delivered: int) -> None:
    """With what was kept of slices and tokens, and what became of the result."""
    line = next(line for line in history_of(sessions).splitlines() if "A1" in line)

    for part in ("2026-03-01 12:00:00", "SENDER", "complete", "done", "12/20", "100/320", "1 delivered"):
        assert part in line


def test_empty_history_says_what_to_do_next(sessions: sessionmaker[Session]) -> None:
    """A first-time user sees more than an empty table."""
    assert "`./run send DIR`" in history_of(sessions)


# --- one study ------------------------------------------------------------------------------------------------------


def test_study_is_shown_with_everything_that_happened(sessions: sessionmaker[Session], delivered: int) -> None:
    """Patient, series, funnel, model, report, delivery with its status, events."""
    shown = show(sessions)

    for part in (
        STUDY_UID,
        "山田^太郎 (P1)",
        "CT, 1 instances, 0.0 MB",
        "20 in the series, 20 readable, 20 sampled, 20 model inputs, 12 kept",
        "320 in, 100 kept, 40 merged, 8 written",
        "method off",
        "tiny (Gemma3ForConditionalGeneration, float32 on cpu)",
        "headers 0.10 s, generate 1.50 s",
        "The lungs are clear.",
        "to pacs: delivered 0xB000, 1 attempts: coerced",
        "analysis-started",
        "delivery-delivered",
        "service/delivery",
    ):
        assert part in shown


def test_reason_is_shown_with_its_code(sessions: sessionmaker[Session]) -> None:
    """Why a study was not read is the first thing that people ask."""
    held = claimed(sessions, add_analysis(sessions, add_study(sessions)))
    with sessions.begin() as session:
        transitions.close_refused(
            session, held, code="no-suitable-series", reason="no axial series of 8 slices", now=NOW, actor="worker"
        )

    assert "no axial series of 8 slices [no-suitable-series]" in show(sessions)


def test_what_needs_a_person_is_said(sessions: sessionmaker[Session]) -> None:
    """Held, mixed patients, a quarantined result, erased text."""
    study_id = add_study(sessions, held=True, patient_mismatch=True)
    analysis_id = add_analysis(sessions, study_id)
    read(sessions, analysis_id)
    finish(sessions, analysis_id, (result(analysis_id, state=ResultState.QUARANTINED), []))

    shown = show(sessions)

    for part in ("rebuilt from the spool", "conflicting patient identifiers", "quarantined", "not on record"):
        assert part in shown


def test_what_others_wrote_is_shown_as_it_is(sessions: sessionmaker[Session]) -> None:
    """Neither markup nor emoji codes nor control characters of a header, a sender or a model take effect."""
    study_id = add_study(sessions, calling_ae="[/]:cat:")
    add_header(
        sessions,
        study_id,
        patient_name=HOSTILE,
        patient_id=HOSTILE,
        accession_number=HOSTILE,
        study_description=HOSTILE,
    )
    add_instance(sessions, study_id, modality="[/red]", series_uid=HOSTILE[:30])
    analysis_id = add_analysis(sessions, study_id, prompt=HOSTILE)
    read(sessions, analysis_id, findings=HOSTILE, impression=HOSTILE, series_reason=HOSTILE)
    finish(sessions, analysis_id, (result(analysis_id), ["pacs"]))
    (delivery_id,) = deliveries(sessions, analysis_id)
    with sessions.begin() as session:
        row = session.get_one(Delivery, delivery_id)
        delivery_transitions.reject_delivery(session, row, status=0xC000, reason=HOSTILE, now=NOW, actor=HOSTILE)

    shown = show(sessions)
    listed = history_of(sessions)

    assert shown.count(SHOWN) >= 8
    assert "[/red], 1 instances" in shown
    assert SHOWN in listed
    assert "[/]:cat:" in listed
    for steering in ("\x1b", "\x07", "\u202e"):
        assert steering not in shown + listed


def test_lines_of_a_report_stay_lines(sessions: sessionmaker[Session]) -> None:
    """A report is read as it was written."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    read(sessions, analysis_id, findings="Lungs: clear.\n\tHeart: normal.")

    lines = [line.strip("│ ").rstrip() for line in show(sessions).splitlines()]
    assert "Lungs: clear." in lines
    assert "Heart: normal." in lines


def test_states_are_coloured_on_a_terminal(sessions: sessionmaker[Session], delivered: int) -> None:
    """What went well can be told from what did not at a glance."""
    assert "\x1b[32mdone\x1b[0m" in show(sessions, terminal=True)


# --- JSON -----------------------------------------------------------------------------------------------------------


def test_json_is_what_was_given(sessions: sessionmaker[Session], capsys: pytest.CaptureFixture[str]) -> None:
    """Times in ISO 8601, states as words, long lines unbroken, and texts as they are."""
    study_id = add_study(sessions)
    add_header(sessions, study_id, patient_name=HOSTILE, study_description="long " * 200)

    printing.print_json(story(sessions))

    found = json.loads(capsys.readouterr().out)
    assert found["study"]["state"] == "complete"
    assert found["study"]["opened_at"] == "2026-03-01T12:00:00+00:00"
    assert found["header"]["patient_name"] == HOSTILE
    assert found["header"]["study_description"] == "long " * 200


def test_value_without_a_json_form_is_refused() -> None:
    """Better an error here than a representation that nobody can read."""
    with pytest.raises(TypeError, match="object has no JSON form"):
        printing.print_json({"x": object()})
