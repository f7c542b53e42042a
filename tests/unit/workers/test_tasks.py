"""One message: claimed once, read with what was on record, and always ended by a row. The model is not the subject."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog
from billiard.exceptions import SoftTimeLimitExceeded
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service.shared import transitions
from service.shared.db import Analysis, AnalysisState, ReportText
from service.shared.durable import digest
from service.shared.messages import AnalysisOutput, load_output
from service.shared.settings import ModelSettings, Settings
from service.shared.study_cache import cache_folder
from tests.receiving import wait_until
from tests.rows import (
    NOW,
    add_analysis,
    add_instance,
    add_study,
    after,
    arrays,
    claim,
    event,
    get,
    kinds,
    open_database,
    output,
)
from workers import tasks
from workers.errors import Refusal, RefusalCode
from workers.pipeline import Request

PLANTED = "Planted^Patient"


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        yield opened


@pytest.fixture
def sqlite_sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    """For what does not depend on the kind of the database."""
    with open_database(sqlite_url) as opened:
        yield opened


@dataclass
class Reader:
    """In the place of the pipeline: notes what it was asked to read, and ends as a test wants."""

    requests: list[Request] = field(default_factory=list)
    end: Callable[[Request], None] = lambda request: None

    def __call__(self, request: Request, model: object) -> tuple[AnalysisOutput, bytes]:
        self.requests.append(request)
        self.end(request)
        content = arrays().to_npz()
        return output(analysis_id=request.analysis_id, arrays_sha256=digest(content)), content


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    reader = Reader()
    monkeypatch.setattr(tasks.pipeline, "read", reader)
    return reader


@dataclass
class Child:
    """A worker's child that has no model to load."""

    sessions: Any
    settings: Settings
    name: str = "host/1"
    wanted: list[ModelSettings] = field(default_factory=list)

    def model_for(self, wanted: ModelSettings) -> None:
        self.wanted.append(wanted)


def child(sessions: Any, data: Path, **settings: Any) -> Child:
    return Child(sessions, Settings.model_validate({"data": {"path": data}} | settings))


def run(analysis_id: int, one: Child) -> None:
    tasks.read_study(analysis_id, one)  # type: ignore[arg-type]


def raising(error: Exception) -> Callable[[Request], None]:
    def end(_: Request) -> None:
        raise error

    return end


# --- what is read ---------------------------------------------------------------------------------------------------


def test_study_is_read_and_its_output_is_on_record(
    sessions: sessionmaker[Session], tmp_path: Path, reader: Reader
) -> None:
    """Files under the fence, their digest and the text in the database, the claim's end audited."""
    analysis_id = add_analysis(sessions, add_study(sessions))

    run(analysis_id, child(sessions, tmp_path))

    analysis = get(sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.worker, analysis.attempts) == (AnalysisState.READ, "host/1", 1)
    assert analysis.output_path == f"outputs/{analysis_id}/1.json"
    said, _ = load_output(tmp_path / analysis.output_path, analysis.output_sha256)
    assert said.findings == get(sessions, ReportText, analysis_id).findings
    assert kinds(sessions, analysis_id=analysis_id) == ["analysis-queued", "analysis-started", "analysis-read"]


def test_images_of_the_analysed_revision_are_read(
    sessions: sessionmaker[Session], tmp_path: Path, reader: Reader
) -> None:
    """No later ones, no reports, and of two contents under one UID the one that was received last."""
    study_id = add_study(sessions, revision=2)
    analysis_id = add_analysis(sessions, study_id, prompt="Look.")
    add_instance(sessions, study_id, 1, path="first.dcm", received_at=after(1))
    add_instance(sessions, study_id, 2, path="again.dcm", received_at=after(5), sop_instance_uid="2.25.3000.9")
    add_instance(sessions, study_id, 3, path="before.dcm", received_at=after(3), sop_instance_uid="2.25.3000.9")
    add_instance(sessions, study_id, 4, path="report.dcm", is_image=False)
    add_instance(sessions, study_id, 5, path="late.dcm", revision=2)
    for name in ("first.dcm", "again.dcm"):
        (tmp_path / "spool").mkdir(exist_ok=True)
        (tmp_path / "spool" / name).touch()

    run(analysis_id, child(sessions, tmp_path))

    (request,) = reader.requests
    assert set(request.paths) == {tmp_path / "spool" / "first.dcm", tmp_path / "spool" / "again.dcm"}
    assert (request.analysis_id, request.study_uid, request.prompt) == (analysis_id, "2.25.1000", "Look.")


def test_study_of_which_images_were_removed_is_refused(
    sessions: sessionmaker[Session], tmp_path: Path, reader: Reader
) -> None:
    """A late image of a study whose files retention removed: what is left is not read in the study's place."""
    study_id = add_study(sessions)
    analysis_id = add_analysis(sessions, study_id)
    add_instance(sessions, study_id, 1, path="removed.dcm")

    run(analysis_id, child(sessions, tmp_path))

    analysis = get(sessions, Analysis, analysis_id)
    assert reader.requests == []
    assert (analysis.state, analysis.reason_code) == (AnalysisState.REFUSED, "input-removed")
    assert "1 of 1 images were removed by age" in analysis.reason


def test_settings_on_record_count_and_not_those_of_the_file(
    sqlite_sessions: sessionmaker[Session], tmp_path: Path, reader: Reader
) -> None:
    """A file that was changed since, or lost the route, changes nothing about a queued analysis."""
    recorded = {
        "model": {"max_new_tokens": 7},
        "pruning": {"method": "off"},
        "series": {"min_slices": 3},
    }
    analysis_id = add_analysis(sqlite_sessions, add_study(sqlite_sessions), route="gone", settings=recorded)
    one = child(sqlite_sessions, tmp_path, series={"min_slices": 30}, scp={"port": 104}, route=[{"name": "other"}])

    run(analysis_id, one)

    settings = reader.requests[0].settings
    assert (settings.model.max_new_tokens, settings.series.min_slices) == (7, 3)
    assert settings.pruning.method.value == "off"
    assert settings.scp.port == 104
    assert one.wanted == [settings.model]
    assert get(sqlite_sessions, Analysis, analysis_id).state is AnalysisState.READ


# --- once -----------------------------------------------------------------------------------------------------------


def test_message_delivered_three_times_at_once_gives_one_run(
    sessions: sessionmaker[Session], tmp_path: Path, reader: Reader
) -> None:
    """Two of the three find nothing to claim."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    gate = threading.Barrier(3)

    def deliver(number: int) -> None:
        one = child(sessions, tmp_path)
        one.name = f"host/{number}"
        gate.wait()
        run(analysis_id, one)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(deliver, range(3)))

    assert len(reader.requests) == 1
    assert get(sessions, Analysis, analysis_id).attempts == 1


def test_message_that_comes_late_finds_nothing(
    sqlite_sessions: sessionmaker[Session], tmp_path: Path, reader: Reader
) -> None:
    """Read already, superseded, or never heard of."""
    study_id = add_study(sqlite_sessions)
    done = add_analysis(sqlite_sessions, study_id, route="done")
    run(done, child(sqlite_sessions, tmp_path))
    superseded = add_analysis(sqlite_sessions, study_id, route="superseded")
    with sqlite_sessions.begin() as session:
        transitions.supersede_queued(session, study_id, now=NOW, actor="test")

    for analysis_id in (done, superseded, 4711):
        run(analysis_id, child(sqlite_sessions, tmp_path))

    assert len(reader.requests) == 1


def test_worker_that_lost_its_lease_changes_nothing(
    sessions: sessionmaker[Session], tmp_path: Path, reader: Reader
) -> None:
    """It was taken for dead, and somebody else has begun; its output and the features it kept go, for by then the
    study may have been forgotten."""
    study_id = add_study(sessions)
    analysis_id = add_analysis(sessions, study_id)

    def somebody_else_takes_over(_: Request) -> None:
        cache_folder(tmp_path, study_id).mkdir(parents=True)
        assert claim(sessions, analysis_id, now=after(10**9), lease_s=1000, worker="host/2") is not None

    reader.end = somebody_else_takes_over
    run(analysis_id, child(sessions, tmp_path))

    analysis = get(sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.worker, analysis.fence) == (AnalysisState.RUNNING, "host/2", 2)
    assert analysis.output_sha256 is None
    assert not list((tmp_path / "outputs" / str(analysis_id)).iterdir())
    assert not cache_folder(tmp_path, study_id).exists()
    assert "analysis-read" not in kinds(sessions)


def test_output_stays_when_only_the_answer_to_the_commit_was_lost(
    sessions: sessionmaker[Session], tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second try finds that the analysis is no longer running: it was closed by the first."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    committed = tasks._committed

    def twice(one: Any, close: Any) -> Any:
        committed(one, close)
        return committed(one, close)

    monkeypatch.setattr(tasks, "_committed", twice)
    run(analysis_id, child(sessions, tmp_path))

    analysis = get(sessions, Analysis, analysis_id)
    assert analysis.state is AnalysisState.READ
    assert (tmp_path / str(analysis.output_path)).is_file()


def test_lease_is_renewed_while_the_study_is_read(
    sqlite_sessions: sessionmaker[Session], tmp_path: Path, reader: Reader
) -> None:
    """However long that takes; nobody takes a living worker for dead."""
    analysis_id = add_analysis(sqlite_sessions, add_study(sqlite_sessions))
    leases: list[Any] = []

    def two_renewals(_: Request) -> None:
        def seen() -> bool:
            lease = get(sqlite_sessions, Analysis, analysis_id).lease_until
            if lease not in leases:
                leases.append(lease)
            return len(leases) == 3

        wait_until(seen)

    reader.end = two_renewals
    run(analysis_id, child(sqlite_sessions, tmp_path, queue={"lease_s": 0.3}))

    assert leases == sorted(leases)
    assert get(sqlite_sessions, Analysis, analysis_id).state is AnalysisState.READ


# --- other ends -----------------------------------------------------------------------------------------------------


def test_refusal_is_an_outcome(sessions: sessionmaker[Session], tmp_path: Path, reader: Reader) -> None:
    """With its code and its sentence, at the first attempt, for good."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    reader.end = raising(Refusal(RefusalCode.NO_SUITABLE_SERIES, "no axial series of 8 slices or more"))

    run(analysis_id, child(sessions, tmp_path))
    run(analysis_id, child(sessions, tmp_path))

    analysis = get(sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.attempts) == (AnalysisState.REFUSED, 1)
    assert (analysis.reason_code, analysis.reason) == ("no-suitable-series", "no axial series of 8 slices or more")
    assert event(sessions, "analysis-refused").detail == {"fence": 1, "code": "no-suitable-series"}


def test_fault_is_tried_again_and_then_fails(sessions: sessionmaker[Session], tmp_path: Path, reader: Reader) -> None:
    """Three attempts; the class and the place of the fault stand in the reason, its text does not."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    reader.end = raising(RuntimeError(f"a fault beside {PLANTED}"))

    states = []
    for _ in range(3):
        run(analysis_id, child(sessions, tmp_path))
        states.append(get(sessions, Analysis, analysis_id).state)

    assert states == [AnalysisState.QUEUED, AnalysisState.QUEUED, AnalysisState.FAILED]
    analysis = get(sessions, Analysis, analysis_id)
    assert analysis.reason_code == "RuntimeError"
    assert analysis.reason.startswith("a fault in the worker: RuntimeError in end (test_tasks.py:")
    assert PLANTED not in analysis.reason
    assert len(reader.requests) == 3


def test_model_that_cannot_be_loaded_is_a_fault(
    sqlite_sessions: sessionmaker[Session], tmp_path: Path, reader: Reader
) -> None:
    """With its reason on record; the weights may be there at the next attempt."""
    analysis_id = add_analysis(sqlite_sessions, add_study(sqlite_sessions))
    one = child(sqlite_sessions, tmp_path)

    def absent(wanted: ModelSettings) -> None:
        raise FileNotFoundError(wanted.path)

    one.model_for = absent  # type: ignore[method-assign]
    run(analysis_id, one)

    analysis = get(sqlite_sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.reason_code) == (AnalysisState.QUEUED, "FileNotFoundError")


def test_time_limit_is_named(sqlite_sessions: sessionmaker[Session], tmp_path: Path, reader: Reader) -> None:
    """Celery's soft limit comes before the hard one, so that there is time to say so."""
    analysis_id = add_analysis(sqlite_sessions, add_study(sqlite_sessions))
    reader.end = raising(SoftTimeLimitExceeded())

    run(analysis_id, child(sqlite_sessions, tmp_path))

    analysis = get(sqlite_sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.reason_code) == (AnalysisState.QUEUED, "time-limit")
    assert "[queue] hard_time_limit_s = 1800" in analysis.reason


# --- a database that goes away --------------------------------------------------------------------------------------


class Away:
    """Sessions of a database that cannot be reached for a while, as PostgreSQL in a restart."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions
        self.refusals = 0

    def _through(self) -> sessionmaker[Session]:
        if self.refusals:
            self.refusals -= 1
            raise OperationalError("SELECT", {}, Exception("server closed the connection"))
        return self._sessions

    def __call__(self) -> Session:
        return self._through()()

    def begin(self) -> Any:
        return self._through().begin()


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, AnalysisState.READ),
        (Refusal(RefusalCode.NO_CONTENT, "nothing in it"), AnalysisState.REFUSED),
        (RuntimeError(), AnalysisState.QUEUED),
    ],
    ids=["read", "refused", "fault"],
)
def test_end_waits_for_a_database_that_is_away(
    sqlite_sessions: sessionmaker[Session],
    tmp_path: Path,
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    state: AnalysisState,
) -> None:
    """What took minutes to read is not read again because the database restarts just then."""
    monkeypatch.setattr(tasks, "CLOSE_AGAIN_S", (0, 0, 0))
    away = Away(sqlite_sessions)
    analysis_id = add_analysis(sqlite_sessions, add_study(sqlite_sessions))

    def goes_away(request: Request) -> None:
        away.refusals = 3
        if error:
            raise error

    reader.end = goes_away
    run(analysis_id, child(away, tmp_path))

    assert get(sqlite_sessions, Analysis, analysis_id).state is state
    assert len(reader.requests) == 1


def test_database_that_stays_away_leaves_the_analysis_to_its_lease(
    sqlite_sessions: sessionmaker[Session], tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is Celery's to log; the lease expires and the sweep calls again."""
    monkeypatch.setattr(tasks, "CLOSE_AGAIN_S", (0, 0))
    away = Away(sqlite_sessions)
    analysis_id = add_analysis(sqlite_sessions, add_study(sqlite_sessions))
    reader.end = lambda request: setattr(away, "refusals", 100)

    with pytest.raises(OperationalError):
        run(analysis_id, child(away, tmp_path))

    assert get(sqlite_sessions, Analysis, analysis_id).state is AnalysisState.RUNNING


def test_lease_survives_a_database_that_is_away(
    sqlite_sessions: sessionmaker[Session], tmp_path: Path, reader: Reader
) -> None:
    """A renewal that fails is tried again."""
    away = Away(sqlite_sessions)
    analysis_id = add_analysis(sqlite_sessions, add_study(sqlite_sessions))

    def away_for_two_renewals(_: Request) -> None:
        away.refusals = 2
        wait_until(lambda: away.refusals == 0)
        lease = get(sqlite_sessions, Analysis, analysis_id).lease_until
        wait_until(lambda: get(sqlite_sessions, Analysis, analysis_id).lease_until != lease)

    reader.end = away_for_two_renewals
    run(analysis_id, child(away, tmp_path, queue={"lease_s": 0.3}))

    assert get(sqlite_sessions, Analysis, analysis_id).state is AnalysisState.READ


# --- logs -----------------------------------------------------------------------------------------------------------


def test_log_lines_name_the_analysis_and_never_the_patient(
    sqlite_sessions: sessionmaker[Session], tmp_path: Path, reader: Reader
) -> None:
    """Neither what was said nor what a fault quotes."""
    study_id = add_study(sqlite_sessions)
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        for route, error in (("a", None), ("b", ValueError(PLANTED)), ("c", KeyError(PLANTED))):
            reader.end = raising(error) if error else lambda request: None
            run(add_analysis(sqlite_sessions, study_id, route=route), child(sqlite_sessions, tmp_path))

    assert {"analysis_started", "analysis_read", "analysis_fault", "analysis_closed"} <= {
        line["event"] for line in lines
    }
    assert all("analysis_id" in line for line in lines)
    assert PLANTED not in str(lines)
    assert "lungs" not in str(lines)
