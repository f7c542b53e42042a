"""The way on PostgreSQL and a Redis that others run, both by their url."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.phantom_series import PhantomSeries
from tests.running import PATIENCE_S, Pacs, Service, Storescp, send
from tests.servers import PostgresServer, RedisServer, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_study_is_reported(
    tmp_path: Path, random_model: Path, storescp: Storescp, postgres_url: str, redis_server: RedisServer
) -> None:
    """One study in, one report out; no SQLite file and no Redis of its own."""
    phantom = PhantomSeries(study=21)
    phantom.write(tmp_path / "study")

    with Service(
        tmp_path / "service",
        random_model,
        pacs=[Pacs(storescp.port)],
        database=postgres_url,
        queue_url=redis_server.url,
    ) as service:
        send(service, tmp_path / "study")
        story = service.wait_for_end(phantom.study_uid)
        shown = service.show(phantom.study_uid)

        assert [one["state"] for one in story["analyses"]] == ["done"]
        assert shown["analyses"][0]["report"] == story["analyses"][0]["report"]
        assert len(storescp.reports(phantom.study_uid)) == 1
        data = service.settings.data.path
        assert not list(data.glob("*.sqlite*"))
        assert not (data / "redis").exists()
        with redis_server.client() as client:
            assert any(b"medpruner" in key for key in client.keys("*"))  # the queue's bindings


def test_service_that_starts_before_its_database_receives(
    tmp_path: Path, random_model: Path, storescp: Storescp, postgres_server_of_our_own: PostgresServer
) -> None:
    """After a power cut, say: senders are not kept waiting, and what they sent is read once the database is there."""
    phantom = PhantomSeries(study=22)
    phantom.write(tmp_path / "study")
    database = postgres_server_of_our_own.fresh_database()
    postgres_server_of_our_own.stop()
    service = Service(tmp_path / "service", random_model, pacs=[Pacs(storescp.port)], database=database)
    try:
        service.start(with_database=False)
        send(service, tmp_path / "study")

        postgres_server_of_our_own.start()
        wait_for(service.is_up, "the database is there and upgraded", PATIENCE_S)
        story = service.wait_for_end(phantom.study_uid)
    finally:
        service.__exit__()

    assert [one["state"] for one in story["analyses"]] == ["done"]
    assert len(storescp.reports(phantom.study_uid)) == 1
