"""From a situation to what a person should know of."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service.alerts import AlertKind, Severity, current, decide
from service.shared import transitions
from service.shared.db import ResultState, StudyState
from service.shared.settings import DataSettings, DestinationSettings, Settings
from service.situation import Folder, Share, Situation, Waiting
from tests.rows import (
    ACTOR,
    NOW,
    add_analysis,
    add_deliveries,
    add_instance,
    add_study,
    after,
    claimed,
    finish,
    open_database,
    output,
    read,
    result,
)

PACS = DestinationSettings(name="pacs", ae_title="PACS", host="h", port=104)
SETTINGS = Settings(destination=(PACS,))
QUIET = Situation(now=NOW, receiving=0, held=0, folders={"spool": Folder(10**12, 10**13)})
LONG_AGO = NOW - timedelta(hours=3)
SHARE = Share("Scanner A", "Thorax", "guarded", 25, 0.2, 100, 0.3, 12)


def test_nothing_to_tell_of_a_quiet_service() -> None:
    """No alert without a reason."""
    assert decide(QUIET, SETTINGS) == []


@pytest.mark.parametrize(
    ("changes", "key", "severity", "said"),
    [
        (
            {"oldest_unfinished_at": LONG_AGO, "oldest_unfinished_ids": (7,), "analyses": {"queued": 2}},
            "stuck",
            Severity.CRITICAL,
            "not finished after 3 h (2 queued; 0 workers are there)",
        ),
        ({"oldest_receipt_at": LONG_AGO, "receipts_waiting": 9}, "ingest", Severity.CRITICAL, "9 received instances"),
        ({"failed": 2, "failed_ids": (3, 4)}, "failed", Severity.CRITICAL, "2 analyses failed"),
        ({"quarantined": 1, "quarantined_ids": (3,)}, "quarantine", Severity.CRITICAL, "did not pass the gate"),
        ({"mismatched_ids": (5,)}, "patient-mismatch", Severity.CRITICAL, "different patients"),
        (
            {"deliveries": {("pacs", "pending"): Waiting(4, LONG_AGO)}},
            "undelivered:pacs",
            Severity.CRITICAL,
            "4 results wait for pacs, the oldest for 3 h",
        ),
        (
            {"deliveries": {("old", "rejected"): Waiting(1, LONG_AGO)}},
            "rejected:old",
            Severity.CRITICAL,
            "old (no longer configured)",
        ),
        ({"refused": 20}, "refused", Severity.WARNING, "20 associations or instances"),
        ({"folders": {"spool": Folder(int(7e9), 10**12)}}, "disk:spool", Severity.WARNING, "7.0 GB are free"),
        ({"folders": {"spool": Folder(int(1e9), 10**12)}}, "disk:spool", Severity.CRITICAL, "as now"),
        (
            {"certificates": {"web.tls_certificate": 12.0}},
            "certificate:web.tls_certificate",
            Severity.WARNING,
            "ends in 12 days",
        ),
        (
            {"certificates": {"web.tls_certificate": -1.0}},
            "certificate:web.tls_certificate",
            Severity.CRITICAL,
            "has ended",
        ),
        (
            {"certificates": {"scp.tls_certificate": None}},
            "certificate:scp.tls_certificate",
            Severity.CRITICAL,
            "cannot be read",
        ),
        ({"chain_waiting": 5, "chain_waiting_since": LONG_AGO}, "audit-chain", Severity.WARNING, "5 events"),
        ({"shares": (SHARE,)}, "drift:guarded:644b32a7", Severity.WARNING, "keeps 20.0% of the tokens"),
    ],
)
def test_reason_gives_its_alert(changes: dict[str, object], key: str, severity: Severity, said: str) -> None:
    """One key that stays the same while it holds, a severity, a sentence and a remedy."""
    (alert,) = decide(replace(QUIET, **changes), SETTINGS)  # type: ignore[arg-type]

    assert (alert.key, alert.severity) == (key, severity)
    assert said in alert.summary
    assert alert.remedy


@pytest.mark.parametrize(
    "changes",
    [
        {"oldest_unfinished_at": NOW - timedelta(minutes=59)},
        {"deliveries": {("pacs", "pending"): Waiting(4, NOW)}},
        {"refused": 19},
        {"certificates": {"web.tls_certificate": 31.0}},
        {"chain_waiting": 5, "chain_waiting_since": NOW},
        {"shares": (replace(SHARE, recent=0.28),)},
        {"shares": (replace(SHARE, recent_analyses=19),)},
    ],
)
def test_what_is_usual_is_no_alert(changes: dict[str, object]) -> None:
    """Below its limit nothing is told; a share of few analyses says nothing."""
    assert decide(replace(QUIET, **changes), SETTINGS) == []  # type: ignore[arg-type]


def test_free_text_of_a_modality_is_in_no_alert() -> None:
    """A technologist may have typed a patient's name as the protocol: a study that has it is named by its number."""
    share = replace(SHARE, scanner="ZQX", protocol="a\nCRITICAL: ZQX^PATIENT")
    (alert,) = decide(replace(QUIET, shares=(share,)), SETTINGS)

    assert "study 12;" in alert.summary
    assert "ZQX" not in f"{alert}"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=DataSettings(path=tmp_path), destination=(PACS,))


def test_rows_and_files_give_their_alerts(database_url: str, settings: Settings) -> None:
    """What a database at work holds is found by the queries, on SQLite and PostgreSQL."""
    incoming = settings.data.path / "spool" / "incoming"
    incoming.mkdir(parents=True)
    with open_database(database_url) as sessions:
        (waiting,) = add_deliveries(sessions, add_study(sessions, "2.25.1"), "pacs")
        add_analysis(sessions, add_study(sessions, "2.25.2"))
        _quarantine(sessions)
        add_study(sessions, "2.25.4", patient_mismatch=True)
        add_study(sessions, "2.25.5", state=StudyState.RECEIVING, completed_at=None, held=True)
        with sessions() as session:
            found = {alert.kind: alert for alert in current(session, settings, after(4 * 3600))}

    assert waiting
    assert {AlertKind.STUCK, AlertKind.UNDELIVERED, AlertKind.QUARANTINE, AlertKind.MISMATCH} <= found.keys()
    assert "4 h" in found[AlertKind.STUCK].summary


def test_share_is_compared_per_scanner_and_protocol(sqlite_url: str, settings: Settings) -> None:
    """The last week against the four before; another protocol of the same scanner stays as it was."""
    rules = settings.alerts.model_copy(update={"drift_min_analyses": 2})
    settings = settings.model_copy(update={"alerts": rules})
    with open_database(sqlite_url) as sessions:
        for number in range(8):
            study_id = add_study(sessions, f"2.25.{number + 1}")
            add_instance(sessions, study_id, number)
            recent, drifts = number % 2, number % 4 < 2
            counts = {"tokens_in": 1000, "tokens_kept": 100 if recent and drifts else 300}
            _read_at(sessions, study_id, days_ago=1 if recent else 10, protocol="A" if drifts else "B", **counts)
        with sessions() as session:
            found = [alert for alert in current(session, settings, NOW) if alert.kind is AlertKind.DRIFT]

    assert len(found) == 1
    assert "keeps 10.0% of the tokens of one scanner and protocol, those of study 6;" in found[0].summary


def _quarantine(sessions: sessionmaker[Session]) -> None:
    analysis_id = add_analysis(sessions, add_study(sessions, "2.25.3"))
    read(sessions, analysis_id)
    assert finish(sessions, analysis_id, (result(analysis_id, state=ResultState.QUARANTINED), []))


def _read_at(sessions: sessionmaker[Session], study_id: int, *, days_ago: float, protocol: str, **counts: int) -> None:
    analysis_id = add_analysis(sessions, study_id)
    held = claimed(sessions, analysis_id)
    said = output(analysis_id=analysis_id, scanner="Scanner", protocol=protocol)
    said = said.model_copy(update={"counts": said.counts.model_copy(update=counts)})
    with sessions.begin() as session:
        assert transitions.close_read(
            session, held, said, output_path="x", output_sha256="0", now=after(-86_400 * days_ago), actor=ACTOR
        )
