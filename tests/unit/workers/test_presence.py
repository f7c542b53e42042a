"""A worker says that it is there, and on what; people see when it stops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from sqlalchemy.orm import Session, sessionmaker

from service.shared import heartbeat
from service.shared.heartbeat import GONE_AFTER, SILENT_AFTER, Presence
from service.shared.settings import Settings
from tests.receiving import wait_until
from tests.rows import NOW, add_analysis, add_study, claimed, open_database, output, presence
from workers.app import Child
from workers.presence import presence_kept, presence_of


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        yield opened


def beat(sessions: sessionmaker[Session], one: Presence, seconds: float = 0) -> None:
    with sessions.begin() as session:
        heartbeat.beat(session, one, now=NOW + timedelta(seconds=seconds))


def seen(sessions: sessionmaker[Session], later: timedelta = timedelta(0)) -> list[tuple[str, bool, int | None]]:
    with sessions() as session:
        return [(one["worker"], one["silent"], one["study_id"]) for one in heartbeat.workers(session, NOW + later)]


def test_worker_is_seen_with_what_it_reads(sessions: sessionmaker[Session]) -> None:
    """One reads, one has nothing to do."""
    study_id = add_study(sessions)
    claimed(sessions, add_analysis(sessions, study_id), worker="gpu01/7")
    beat(sessions, presence())
    beat(sessions, presence("gpu02/9"))

    assert seen(sessions) == [("gpu01/7", False, study_id), ("gpu02/9", False, None)]


def test_worker_that_stops_is_silent_and_later_gone(sessions: sessionmaker[Session]) -> None:
    """Missed for a day; beats keep it."""
    beat(sessions, presence())
    beat(sessions, presence(), seconds=10)

    assert seen(sessions, SILENT_AFTER + timedelta(seconds=9)) == [("gpu01/7", False, None)]
    assert seen(sessions, SILENT_AFTER + timedelta(seconds=11)) == [("gpu01/7", True, None)]
    assert seen(sessions, GONE_AFTER + timedelta(seconds=11)) == []


def test_new_child_takes_the_place_of_the_one_that_was_killed(sessions: sessionmaker[Session]) -> None:
    """Of the same parent; the child of another parent stays."""
    beat(sessions, presence("gpu01/7", parent=1))
    beat(sessions, presence("gpu01/8", parent=2))
    beat(sessions, presence("gpu01/9", parent=1))

    assert [name for name, _, _ in seen(sessions)] == ["gpu01/8", "gpu01/9"]


def test_reader_without_heartbeat_is_seen_too(sessions: sessionmaker[Session]) -> None:
    """A worker of an older version; silent once its lease has run out."""
    study_id = add_study(sessions)
    claimed(sessions, add_analysis(sessions, study_id), worker="old/1")

    assert seen(sessions) == [("old/1", False, study_id)]
    assert seen(sessions, timedelta(hours=1)) == [("old/1", True, study_id)]


class Model:
    """Loaded on this machine's processor."""

    identity = output().model


def test_worker_says_what_it_runs_on(sessions: sessionmaker[Session]) -> None:
    """Nothing of the device before a model was loaded on it; then name, memory and weights."""
    child = Child(Settings(), sessions, f"here/{os.getpid()}")
    loading = presence_of(child)
    child.model = Model()  # type: ignore[assignment]
    loaded = presence_of(child)

    assert (loading.model, loading.device_name, loading.memory_bytes) == (None, None, None)
    assert (loaded.model, loaded.device, loaded.weights_sha256) == ("tiny", "cpu", "1" * 64)
    assert loaded.device_name
    assert loaded.memory_bytes is not None
    assert loaded.memory_used_bytes is not None
    assert 0 < loaded.memory_used_bytes < loaded.memory_bytes


def test_worker_beats_while_it_lives_and_leaves_at_its_end(sessions: sessionmaker[Session]) -> None:
    """A planned end leaves nothing to miss."""
    child = Child(Settings(), sessions, f"here/{os.getpid()}")

    def seen_at() -> list[object]:
        with sessions() as session:
            return [one["seen_at"] for one in heartbeat.workers(session, NOW)]

    with presence_kept(child, every_s=0.05):
        wait_until(lambda: bool(seen_at()))
        first = seen_at()
        wait_until(lambda: seen_at() != first)

    assert seen_at() == []


class ModelOnCuda:
    """Loaded on a GPU, as the identity of a model says it."""

    identity = output().model.model_copy(update={"device": "cuda:1 (NVIDIA H100 80GB HBM3)"})


def test_worker_on_a_gpu_says_which_and_how_full_it_is(
    sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch is asked about the device by a name that it knows."""
    free_and_total = {torch.device("cuda:1"): (30, 80)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: free_and_total[torch.device(device)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {torch.device(device).index}")
    child = Child(Settings(), sessions, f"here/{os.getpid()}")
    child.model = ModelOnCuda()  # type: ignore[assignment]
    loaded = presence_of(child)

    assert (loaded.device, loaded.device_name) == ("cuda:1", "card 1")
    assert (loaded.memory_bytes, loaded.memory_used_bytes) == (80, 50)
