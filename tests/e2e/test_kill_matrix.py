"""The kill matrix in small: what `./run prove kills` does with 500 kills, with as many as a test run can wait for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.prove.kills import Matrix, Outcome
from tests.servers import PostgresServer

pytestmark = [pytest.mark.kills, pytest.mark.slow, pytest.mark.timeout(1500)]


def assert_nothing_is_broken(outcome: Outcome, kills: int) -> None:
    assert outcome.broken == []
    assert len(outcome.kills) == kills
    assert all(kill.recovery_s is not None for kill in outcome.kills)
    assert outcome.instances > 0


def test_every_part_dies_again_and_again_under_load(tmp_path: Path, random_model: Path) -> None:
    """SQLite and the embedded Redis: nothing acknowledged is lost, and no analysis is reported twice."""
    outcome = Matrix(tmp_path, random_model, seed=1).run(34, apart=8)

    assert_nothing_is_broken(outcome, 34)
    assert {kill.target for kill in outcome.kills} >= {"receive", "ingest", "dispatch", "deliver"}
    assert any(kill.step != "any time" for kill in outcome.kills)  # so strace can do what it is needed for


def test_postgresql_dies_as_well(
    tmp_path: Path, random_model: Path, postgres_server_of_our_own: PostgresServer
) -> None:
    """The same with a database server that is killed whole, and in single connections."""
    outcome = Matrix(tmp_path, random_model, seed=2, postgres=postgres_server_of_our_own).run(14, apart=10)

    assert_nothing_is_broken(outcome, 14)
    assert {kill.target for kill in outcome.kills} & {"postgres", "backend"}
