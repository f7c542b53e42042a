"""What the service depends on is away under load, piece by piece; `./run prove outages` does the same for longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.prove.outages import prove_embedded, prove_with_servers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which only root can"),
]


def test_servers_and_space_come_and_go(tmp_path: Path, random_model: Path) -> None:
    """Redis, PostgreSQL and the destination stopped and hanging, free space below its floor: receiving goes on until
    the floor (0xA700), nothing is lost, and everything drains."""
    assert prove_with_servers(tmp_path, random_model, 11, hold_s=3, tell=lambda _: None) == []


def test_sqlite_is_locked_and_the_disk_is_full(tmp_path: Path, random_model: Path) -> None:
    """A foreign writer and a disk without a byte left: the same."""
    assert prove_embedded(tmp_path, random_model, 12, hold_s=3, tell=lambda _: None) == []
