"""The way on PostgreSQL and a Redis that others run, both by their url."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.phantom_series import PhantomSeries
from tests.running import Pacs, Service, Storescp, send
from tests.servers import RedisServer

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
