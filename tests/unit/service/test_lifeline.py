"""The lifeline of a worker child: cut by its death and by nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.shared import lifeline
from tests.lifelines import let_die, worker_named


def test_killed_process_is_known_as_dead(tmp_path: Path) -> None:
    """At once, and as often as one asks."""
    with worker_named("host/7", tmp_path) as process:
        assert not lifeline.is_cut(tmp_path, "host/7")
        process.kill()
        process.wait()

        assert lifeline.is_cut(tmp_path, "host/7")
        assert lifeline.is_cut(tmp_path, "host/7")


def test_process_that_ends_as_planned_leaves_nothing(tmp_path: Path) -> None:
    """So nothing can be taken for a death."""
    with worker_named("host/7", tmp_path, then="sys.stdin.read()") as process:
        process.communicate()

    assert not lifeline.is_cut(tmp_path, "host/7")
    assert list((tmp_path / "workers").iterdir()) == []


def test_death_is_not_believed_of_another_machine(tmp_path: Path) -> None:
    """A network file system may not carry locks between machines; its worker may well live."""
    let_die("host/7", tmp_path)
    (file,) = (tmp_path / "workers").iterdir()
    file.write_text("another boot of another kernel")

    assert not lifeline.is_cut(tmp_path, "host/7")


def test_name_that_nobody_held_is_not_dead(tmp_path: Path) -> None:
    """A worker of an earlier version, say."""
    assert not lifeline.is_cut(tmp_path, "host/7")


def test_name_that_is_given_again_lives(tmp_path: Path) -> None:
    """A container that starts again has the same host name and process ids; the lease tells of its predecessor."""
    let_die("host/7", tmp_path)

    with lifeline.held(tmp_path, "host/7"):
        assert not lifeline.is_cut(tmp_path, "host/7")


def test_two_of_one_name_have_no_lifeline(tmp_path: Path) -> None:
    """The death of one would be taken for the other's."""
    with worker_named("host/7", tmp_path) as process, lifeline.held(tmp_path, "host/7"):
        process.kill()
        process.wait()

        assert not lifeline.is_cut(tmp_path, "host/7")


def test_folder_that_cannot_be_made_costs_the_lifeline_alone(tmp_path: Path) -> None:
    """The worker reads all the same; its leases run out when it dies."""
    (tmp_path / "workers").write_text("a file is in the way")

    with lifeline.held(tmp_path, "host/7"):
        assert not lifeline.is_cut(tmp_path, "host/7")


@pytest.mark.parametrize(("age_s", "left"), [(lifeline.OLD_S - 60, True), (lifeline.OLD_S + 60, False)])
def test_lifelines_of_the_long_dead_are_cleared_away(tmp_path: Path, age_s: float, left: bool) -> None:
    """By the next worker; those that are held stay whatever their age."""
    let_die("host/7", tmp_path)
    (file,) = (tmp_path / "workers").iterdir()
    os.utime(file, (file.stat().st_mtime - age_s,) * 2)

    with lifeline.held(tmp_path, "host/8"):
        os.utime(tmp_path / "workers" / "host-8", (0, 0))
        with lifeline.held(tmp_path, "host/9"):
            assert file.exists() is left
            assert (tmp_path / "workers" / "host-8").exists()
