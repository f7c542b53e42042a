"""Fixtures only. The servers behind them stand in servers.py, synthetic series in phantom_series.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Orthanc, PostgresServer, RedisServer

REAL_CT = Path(__file__).parent / "data" / "real-ct"


@pytest.fixture(autouse=True)
def _no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A MEDPRUNER__ variable of the shell that runs the tests must not change them."""
    for variable in list(os.environ):
        if variable.startswith("MEDPRUNER"):
            monkeypatch.delenv(variable)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A fresh Redis on a unix socket: `.url`, `.client()`, `.kill()`, `.restart()`."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """One PostgreSQL for the session; take `postgres_url` unless you mean to stop it."""
    with PostgresServer(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """SQLAlchemy URL of an empty PostgreSQL database, removed afterwards: hundreds at the end would take minutes."""
    url = postgres_server.fresh_database()
    yield url
    postgres_server.drop(url)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """SQLAlchemy URL of an SQLite database that does not exist yet."""
    return f"sqlite:///{tmp_path / 'medpruner.sqlite'}"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind that the service supports, one after the other."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[Orthanc]:
    """An empty Orthanc, AE title PACS, that knows no modality; make your own Orthanc(...) for more."""
    with Orthanc(tmp_path / "orthanc") as server:
        yield server


@pytest.fixture(scope="session")
def body_ct() -> Path:
    """Folder of a real CT: 20 axial slices of a body, 512 x 512, JPEG 2000 lossless (Siemens)."""
    return REAL_CT / "body-siemens"


@pytest.fixture(scope="session")
def head_ct() -> Path:
    """Folder of a real CT: 28 axial slices of a head phantom, 512 x 512, uncompressed (Philips)."""
    return REAL_CT / "head-philips"
