"""How the kill matrix judges recovery: what it calls going on, and that it fails where it took too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.prove import kills
from tests.prove.kills import Kill, Outcome, has_gone_on, table


def kill(recovery_s: float | None, *, apart: bool = True, target: str = "child", step: str = "any time") -> Kill:
    return Kill(target, step, at=0.0, is_over=lambda: True, apart=apart, recovery_s=recovery_s)


@pytest.mark.parametrize(
    ("now", "gone_on"),
    [
        ({"ingest": 8, "worker": 3}, True),
        ({"ingest": 8, "worker": 2}, False),  # one of them stands still
        ({"ingest": 7, "worker": 3}, False),
        ({}, False),  # the database is away
    ],
)
def test_work_goes_on_once_every_part_has_done_something_new(now: dict[str, int], gone_on: bool) -> None:
    """What was done at the death of the process does not count."""
    assert has_gone_on({"ingest": 7, "worker": 2}, now) is gone_on


def test_recovery_that_took_too_long_or_never_came_is_late() -> None:
    """Of the kills that were left alone; in a burst others fall into the recovery."""
    fine, slow, never = kill(29.9), kill(30.1), kill(None)
    outcome = Outcome(kills=[fine, slow, never, kill(200.0, apart=False), kill(None, apart=False)])

    assert outcome.late(30) == [slow, never]


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome(kills=[kill(29.0)]), 0),
        (Outcome(kills=[kill(29.0), kill(31.0)]), 1),
        (Outcome(kills=[kill(None)]), 1),
        (Outcome(kills=[kill(1.0)], broken=["an instance is gone"]), 1),
        (Outcome(kills=[kill(200.0, apart=False)]), 0),
    ],
)
def test_proof_fails_with_a_late_recovery_as_with_a_broken_invariant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, status: int
) -> None:
    """The exit status of `./run prove kills`."""

    class Struck:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def run(self, *_: int) -> Outcome:
            return outcome

    monkeypatch.setattr(kills, "Matrix", Struck)
    monkeypatch.setattr(kills, "make_model", lambda folder: folder)

    assert kills.main(["--folder", str(tmp_path)]) == status


def test_table_tells_recovery_by_part_and_by_step() -> None:
    """Median, the smallest that 95 % do not exceed, and the worst; what never came back is endless."""
    outcome = Outcome(
        kills=[
            *(kill(float(seconds)) for seconds in range(1, 21)),
            kill(7.0, target="ingest", step="fsync studies"),
            kill(None, target="ingest", apart=False),
        ]
    )

    lines = [line.split() for line in table(outcome)]

    assert ["child", "20", "10.5", "19.0", "20.0"] in lines
    assert ["child", "any", "time", "20", "10.5", "19.0", "20.0"] in lines
    assert ["ingest", "fsync", "studies", "1", "7.0", "7.0", "7.0"] in lines
    assert ["ingest", "1", "inf", "inf", "inf"] in lines
