"""Several studies in one task, and faults that say something about the worker itself. The model is not the subject."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from billiard.exceptions import SoftTimeLimitExceeded
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import Analysis, AnalysisState
from service.shared.durable import digest
from service.shared.messages import AnalysisOutput
from service.shared.settings import Settings
from tests.rows import SETTINGS, add_analysis, add_study, arrays, get, kinds, open_database, output
from workers import tasks
from workers.errors import Refusal, RefusalCode
from workers.pipeline import Request

LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        yield opened


@dataclasses.dataclass
class Reader:
    """In the place of the pipeline: notes who was read with whom; what it was told to raise, it raises."""

    on_look: dict[int, Exception] = dataclasses.field(default_factory=dict)
    on_say: dict[int, Exception] = dataclasses.field(default_factory=dict)
    together: list[list[int]] = dataclasses.field(default_factory=list)
    left: int = 0

    def look(self, request: Request, model: object) -> Any:
        if request.analysis_id in self.on_look:
            raise self.on_look[request.analysis_id]
        return SimpleNamespace(request=request)

    def say(self, studies: Sequence[Any], model: object) -> list[tuple[AnalysisOutput, bytes]]:
        ids = [study.request.analysis_id for study in studies]
        self.together.append(ids)
        for one in ids:
            if one in self.on_say:
                raise self.on_say[one]
        content = arrays().to_npz()
        return [(output(analysis_id=one, arrays_sha256=digest(content)), content) for one in ids]

    def read(self, request: Request, model: object) -> tuple[AnalysisOutput, bytes]:
        return self.say([self.look(request, model)], model)[0]

    def leave(self) -> None:
        self.left += 1


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    reader = Reader()
    for name in ("look", "say", "read"):
        monkeypatch.setattr(tasks.pipeline, name, getattr(reader, name))
    monkeypatch.setattr(tasks, "leave", reader.leave)
    return reader


def child(sessions: Any, data: Path, **queue: Any) -> Any:
    settings = Settings.model_validate({"data": {"path": data}, "queue": {"batch_studies": 3} | queue})
    return SimpleNamespace(sessions=sessions, settings=settings, name="host/1", model_for=lambda wanted: None)


def queued(sessions: sessionmaker[Session], count: int) -> list[int]:
    return [add_analysis(sessions, add_study(sessions, place)) for place in range(1, count + 1)]


def states(sessions: sessionmaker[Session], ids: list[int]) -> list[AnalysisState]:
    return [get(sessions, Analysis, one).state for one in ids]


READ, QUEUED, FAILED, REFUSED = (
    AnalysisState.READ,
    AnalysisState.QUEUED,
    AnalysisState.FAILED,
    AnalysisState.REFUSED,
)


def test_waiting_studies_are_decoded_together(sessions: sessionmaker[Session], tmp_path: Path, reader: Reader) -> None:
    """Up to the configured number, each with its own fence and attempt; their messages then find nothing."""
    ids = queued(sessions, 4)
    one = child(sessions, tmp_path)

    for analysis_id in ids[:3]:
        tasks.read_study(analysis_id, one)

    assert reader.together == [ids[:3]]
    assert states(sessions, ids) == [READ, READ, READ, QUEUED]
    for analysis_id in ids[:3]:
        assert kinds(sessions, analysis_id=analysis_id) == ["analysis-queued", "analysis-started", "analysis-read"]
        analysis = get(sessions, Analysis, analysis_id)
        assert (analysis.fence, analysis.attempts) == (1, 1)


def test_by_default_each_study_is_read_alone(sessions: sessionmaker[Session], tmp_path: Path, reader: Reader) -> None:
    """On a CPU nothing is gained by waiting for others."""
    ids = queued(sessions, 2)

    tasks.read_study(ids[0], child(sessions, tmp_path, batch_studies=Settings().queue.batch_studies))

    assert states(sessions, ids) == [READ, QUEUED]


def test_study_for_another_model_is_not_taken(sessions: sessionmaker[Session], tmp_path: Path, reader: Reader) -> None:
    """Weights are not changed for a companion; another length of the report is no other model."""
    first = add_analysis(sessions, add_study(sessions, 1))
    model = SETTINGS.get("model", {})
    other = add_analysis(sessions, add_study(sessions, 2), settings=SETTINGS | {"model": model | {"path": "/other"}})
    longer = add_analysis(
        sessions, add_study(sessions, 3), settings=SETTINGS | {"model": model | {"max_new_tokens": 9}}
    )

    tasks.read_study(first, child(sessions, tmp_path))

    assert reader.together == [[first, longer]]
    assert states(sessions, [other]) == [QUEUED]


def test_refusal_and_fault_of_one_touch_no_other(
    sessions: sessionmaker[Session], tmp_path: Path, reader: Reader
) -> None:
    """One is refused, one is queued again, one is read."""
    ids = queued(sessions, 3)
    reader.on_look = {ids[0]: Refusal(RefusalCode.NO_CONTENT, "nothing in it"), ids[1]: ValueError("broken")}

    tasks.read_study(ids[0], child(sessions, tmp_path))

    assert states(sessions, ids) == [REFUSED, QUEUED, READ]
    assert get(sessions, Analysis, ids[1]).reason_code == "ValueError"


def test_what_fails_together_is_read_singly(sessions: sessionmaker[Session], tmp_path: Path, reader: Reader) -> None:
    """The one at fault is found, the others are read, in the same task."""
    ids = queued(sessions, 3)
    reader.on_say = {ids[1]: ValueError("NaN")}

    tasks.read_study(ids[0], child(sessions, tmp_path))

    assert reader.together == [ids, [ids[0]], [ids[1]], [ids[2]]]
    assert states(sessions, ids) == [READ, QUEUED, READ]


def test_survivors_of_a_crash_run_singly(sessions: sessionmaker[Session], tmp_path: Path, reader: Reader) -> None:
    """Whatever was tried before takes no other with it, and is taken by none."""
    tried = add_analysis(sessions, add_study(sessions, 1), attempts=1)
    fresh = queued_after(sessions, 2)

    tasks.read_study(tried, child(sessions, tmp_path))
    tasks.read_study(fresh[0], child(sessions, tmp_path))

    assert reader.together == [[tried], fresh]


def queued_after(sessions: sessionmaker[Session], count: int) -> list[int]:
    return [add_analysis(sessions, add_study(sessions, place)) for place in range(50, 50 + count)]


def test_time_limit_ends_all_of_them(sessions: sessionmaker[Session], tmp_path: Path, reader: Reader) -> None:
    """The limit is the task's: every study in it goes back with an attempt counted."""
    ids = queued(sessions, 3)
    reader.on_look = {ids[1]: SoftTimeLimitExceeded()}

    tasks.read_study(ids[0], child(sessions, tmp_path))

    assert states(sessions, ids) == [QUEUED] * 3
    assert {get(sessions, Analysis, one).reason_code for one in ids} == {"time-limit"}


@pytest.mark.parametrize("where", ["look", "say"])
@pytest.mark.parametrize("count", [1, 3])
def test_lost_gpu_ends_the_process_with_all_on_record(
    sessions: sessionmaker[Session], tmp_path: Path, reader: Reader, where: str, count: int
) -> None:
    """Every study in the task is queued again before the process ends, once."""
    ids = queued(sessions, count)
    getattr(reader, f"on_{where}")[ids[-1]] = LOST

    tasks.read_study(ids[0], child(sessions, tmp_path))

    assert reader.left == 1
    assert states(sessions, ids) == [QUEUED] * count
    assert {get(sessions, Analysis, one).reason_code for one in ids} == {"AcceleratorError"}


def test_too_little_memory_fails_with_a_remedy(sessions: sessionmaker[Session], tmp_path: Path, reader: Reader) -> None:
    """The host tried smaller pieces already; a second attempt would end in the same way, and the process lives."""
    (analysis_id,) = queued(sessions, 1)
    reader.on_look = {analysis_id: torch.OutOfMemoryError("CUDA out of memory")}

    tasks.read_study(analysis_id, child(sessions, tmp_path))

    analysis = get(sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.attempts, analysis.reason_code) == (FAILED, 1, "out-of-memory")
    assert "[series] max_slices" in analysis.reason
    assert reader.left == 0
