"""Fixtures of the whole way: a tiny model, and a PACS. The service itself is started by `tests.running.Service`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.prove.kills import make_model
from tests.running import Storescp
from tests.servers import PostgresServer

SEED = 20261123


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model with random weights: an analysis takes seconds, its text is noise."""
    return make_model(tmp_path_factory.mktemp("model"), SEED)


@pytest.fixture(scope="module")
def storescp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storescp]:
    """A PACS that takes what it is sent, AE title PACS."""
    with Storescp(tmp_path_factory.mktemp("pacs")) as server:
        yield server


@pytest.fixture
def postgres_server_of_our_own(tmp_path: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL that the test may stop and kill."""
    with PostgresServer(tmp_path / "postgres") as server:
        yield server
