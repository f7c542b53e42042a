"""The commands of the audit as a person types them: verify, export, explain, stats, forget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

from service import chain
from service.__main__ import app
from service.shared import audit
from service.shared.audit import AuditKind
from service.shared.db import StudyHeader, open_engine, open_sessions
from service.shared.settings import database_url, heads_file, load
from tests.rows import ACTOR, NOW, STUDY_UID, add_deliveries, add_study, kinds, open_database


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(f'[data]\npath = "{tmp_path / "data"}"\n', encoding="utf-8")
    (tmp_path / "data").mkdir()
    with open_database(database_url(load(path, {}))) as sessions:
        study_id = add_study(sessions)
        add_deliveries(sessions, study_id, "pacs")
        with sessions.begin() as session:
            empty = {column.key: "" for column in StudyHeader.__mapper__.column_attrs}
            session.add(StudyHeader(**(empty | {"study_id": study_id, "patient_id": "P1"})))
            chain.append_batch(session)
        chain.export_head(sessions, heads_file(load(path, {})), NOW)
        with sessions.begin() as session:
            audit.append(session, AuditKind.SERVICE_STARTED, now=NOW, actor=ACTOR)
    return path


def run(config: Path, *words: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, [*words, "--config", str(config)], input=answer)


def test_verify_says_whole_and_counts_what_waits(config: Path) -> None:
    """Exit 0; JSON for programs."""
    result = run(config, "audit", "verify")

    assert result.exit_code == 0, result.output
    assert "1 exported heads" in result.output
    assert "1 events not chained yet" in result.output
    assert "the chain is whole" in result.output
    assert json.loads(run(config, "audit", "verify", "--json").output)["fault"] is None


def test_verify_names_the_fault_and_fails(config: Path) -> None:
    """Exit 1, for a job that runs every night."""
    engine = open_engine(database_url(load(config, {})))
    with engine.begin() as connection:
        connection.execute(text("DROP TRIGGER audit_event_no_update"))
        connection.execute(text("UPDATE audit_event SET actor = 'nobody' WHERE id = 2"))
    engine.dispose()

    result = run(config, "audit", "verify")

    assert result.exit_code == 1
    assert "FAULT: event 2 was altered" in result.output


def test_export_goes_to_a_file_and_is_audited_itself(config: Path, tmp_path: Path) -> None:
    """With who did it and how much it was; the export before it does not hold it."""
    output = tmp_path / "audit.jsonl"

    result = run(config, "audit", "export", "--study", STUDY_UID, "--since", "2026-03-01", "--output", str(output))

    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert {row["study_uid"] for row in rows} == {STUDY_UID}
    sessions = open_sessions(open_engine(database_url(load(config, {}))))
    assert kinds(sessions)[-1] == "audit-exported"
    sessions.kw["bind"].dispose()


def test_explain_and_stats_answer(config: Path) -> None:
    """Sentences, and numbers as a table or JSON."""
    assert "Its delivery to pacs waits" in run(config, "explain", STUDY_UID).output
    ever = ("stats", "--since", "2026-01-01")  # the study of this test does not stay within the last week
    assert "share of tokens kept" in run(config, *ever).output
    assert json.loads(run(config, *ever, "--json").output)["studies"] == 1
    assert run(config, "history", "--csv").output.startswith("study_id,study_uid,")


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        (("--until", "2027-01-01"), True),
        (("--until", "2026-03-01"), False),
        (("--patient", "P1"), True),
        (("--patient", "P2"), False),
        (("--route", "default"), True),
        (("--route", "none"), False),
        (("--destination", "pacs"), True),
        (("--destination", "none"), False),
    ],
)
def test_history_is_narrowed_in_every_form(config: Path, words: tuple[str, ...], fits: bool) -> None:
    """By end, patient, route and destination: as a table, as JSON and as CSV."""
    table, lines = run(config, "history", *words).output, run(config, "history", *words, "--csv").output.splitlines()

    assert ("No study fits." not in table) is fits
    assert len(json.loads(run(config, "history", *words, "--json").output)) == fits
    assert len(lines) == 1 + fits


def test_forget_asks_first(config: Path) -> None:
    """No is no; --yes is for scripts, and the chain is whole afterwards."""
    refused = run(config, "forget", STUDY_UID, answer="n\n")
    assert refused.exit_code == 1
    assert "Erase study 1" in refused.output

    done = run(config, "forget", STUDY_UID, "--yes")

    assert done.exit_code == 0, done.output
    assert "1 texts" in done.output
    assert run(config, "audit", "verify").exit_code == 0
    assert "study-forgotten" in run(config, "explain", STUDY_UID).output
