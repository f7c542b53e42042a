"""The supervisor's processes, and what becomes of the work they held."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service.dispatch import hand_back_of_the_dead
from service.shared.db import Analysis, AnalysisState
from service.shared.settings import Settings
from service.supervisor import commands, supervise
from tests.rows import NOW, add_analysis, add_study, claimed, get, kinds, open_database

SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        yield opened


def a_dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_work_of_an_ended_worker_is_handed_back_without_an_attempt(sessions: sessionmaker[Session]) -> None:
    """A planned stop that outlasts its grace costs the study nothing."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    claimed(sessions, analysis_id, worker=f"here/{a_dead_process()}")

    assert hand_back_of_the_dead(sessions, "here", NOW) == 1

    analysis = get(sessions, Analysis, analysis_id)
    assert (analysis.state, analysis.attempts, analysis.rung_at) == (AnalysisState.QUEUED, 0, None)
    assert "analysis-retried" in kinds(sessions, analysis_id=analysis_id)


@pytest.mark.parametrize("worker", [f"here/{os.getpid()}", "there/1", "here_/999999999"])
def test_work_of_a_worker_that_may_live_is_left_alone(sessions: sessionmaker[Session], worker: str) -> None:
    """A running process, or one on another host, keeps what it claimed."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    claimed(sessions, analysis_id, worker=worker)

    assert hand_back_of_the_dead(sessions, "here", NOW) == 0

    assert get(sessions, Analysis, analysis_id).state is AnalysisState.RUNNING


def test_killed_process_is_started_again_and_ended_at_the_stop(tmp_path: Path) -> None:
    """What dies comes back; after the stop nothing is left running."""
    pids = tmp_path / "pids"
    command = [
        sys.executable,
        "-c",
        f"import os, time; print(os.getpid(), file=open({str(pids)!r}, 'a')); time.sleep(60)",
    ]
    stop = Event()
    thread = Thread(target=supervise, args=([("one", command), ("redis", SLEEPS)], stop))
    thread.start()
    first = wait_for_pid(pids, 0)
    os.kill(first, signal.SIGKILL)

    second = wait_for_pid(pids, 1)
    stop.set()
    thread.join(30)

    assert not thread.is_alive()
    assert second != first
    assert not Path("/proc", str(second)).exists()


def wait_for_pid(path: Path, number: int) -> int:
    for _ in range(300):
        lines = path.read_text().split() if path.exists() else []
        if len(lines) > number:
            return int(lines[number])
        time.sleep(0.1)
    raise AssertionError(f"no process number {number}")


def test_embedded_queue_is_run_only_without_a_url(tmp_path: Path) -> None:
    """A configured Redis is somebody else's to run; the web only where it is enabled; the worker where it is wanted."""
    embedded = Settings.model_validate({"data": {"path": tmp_path}})
    foreign = Settings.model_validate(
        {"data": {"path": tmp_path}, "queue": {"url": "redis://h"}, "web": {"enabled": False}}
    )

    assert [name for name, _ in commands(embedded, None, with_worker=True)] == [
        "receive", "ingest", "dispatch", "deliver", "web", "worker", "redis",
    ]  # fmt: skip
    assert [name for name, _ in commands(foreign, None, with_worker=False)] == [
        "receive",
        "ingest",
        "dispatch",
        "deliver",
    ]
