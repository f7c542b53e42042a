"""The doctor's probes on real things: sockets, Redis, databases, files. What they are judged by: test_doctor.py."""

from __future__ import annotations

import json
import shutil
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from service import doctor, probes
from service.doctor import Finding, State
from service.refusals import Refusals, Refused, recent
from service.shared import heartbeat
from service.shared.settings import Settings
from tests.certificates import authority, issue
from tests.receiving import SENDER, running
from tests.rows import open_database, presence
from tests.servers import RedisServer, free_port
from workers.vlm import folder as model_folder

# pynetdicom drops the socket of a refused connection without closing it; CPython closes it in the same moment
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)  # before everything


def settings(tmp_path: Path, **changes: Any) -> Settings:
    fields: dict[str, Any] = {
        "data": {"path": tmp_path},
        "scp": {"port": free_port()},
        "spool": {"min_free_gb": 0},
        "web": {"enabled": False},
    }
    return Settings.model_validate(fields | changes)


def examine(configured: Settings) -> dict[str, Finding]:
    return {one.subject: one for one in probes.examine(configured, datetime.now(UTC))}


def test_machine_on_which_nothing_runs_yet_is_told_in_words(tmp_path: Path) -> None:
    """Receiver, queue, database: each is a fault with a remedy, and the rest is still looked at."""
    found = examine(settings(tmp_path / "none"))

    assert {one.subject for one in found.values() if one.state is State.FAULT} == {"receiver", "queue", "database"}
    assert found["workers"].state is State.UNKNOWN
    assert found["model"].state is State.OK


def test_receiver_is_called_as_a_source_that_may_call_from_here(tmp_path: Path) -> None:
    """Not as one that is bound to another host."""
    sources = [{"ae_title": "AWAY", "host": "10.0.0.9"}, {"ae_title": SENDER}]
    with running(tmp_path / "spool") as receiver:
        found = examine(settings(tmp_path, scp={"port": receiver.port}, source=sources))
        unasked = examine(settings(tmp_path, scp={"port": receiver.port}, source=sources[:1]))

    assert found["receiver"].state is State.OK
    assert found["receiver"].result.endswith(f"(as {SENDER})")
    assert unasked["receiver"].state is State.UNKNOWN


def test_receiver_over_tls_is_called_as_itself(tmp_path: Path) -> None:
    """With its own certificate, where one is asked for; a port without TLS that is off is not missed."""
    ca, other_ca = authority(tmp_path), authority(tmp_path, "other")
    own = issue(ca, tmp_path, "server")
    keys = {"port": 0, "tls_port": free_port(), "tls_certificate": own.certificate, "tls_key": own.key}
    found = {}
    for asked_for in (None, ca.certificate, other_ca.certificate):
        scp = keys | {"tls_ca": asked_for}
        with running(tmp_path / "spool", **scp) as receiver:
            findings = examine(settings(tmp_path, scp=scp, source=[{"ae_title": SENDER}]))
        assert recent(receiver.spool.path, NOON) == []
        found[asked_for] = findings["receiver over TLS"]
        assert "receiver" not in findings

    assert [one.state for one in found.values()] == [State.OK, State.OK, State.UNKNOWN]
    assert found[None].result.endswith(f"with Success over TLS (as {SENDER})")
    assert "[scp] tls_ca does not vouch for" in found[other_ca.certificate].result


def test_certificate_that_was_renewed_and_not_loaded_is_a_fault(tmp_path: Path) -> None:
    """What is shown is not what the configuration names: restart."""
    ca = authority(tmp_path)
    shown, renewed = issue(ca, tmp_path, "server"), issue(ca, tmp_path, "renewed")
    port = free_port()
    with running(tmp_path / "spool", port=0, tls_port=port, tls_certificate=shown.certificate, tls_key=shown.key):
        scp = {"port": 0, "tls_port": port, "tls_certificate": renewed.certificate, "tls_key": renewed.key}
        found = examine(settings(tmp_path, scp=scp, source=[{"ae_title": SENDER}]))["receiver over TLS"]

    assert found.state is State.FAULT
    assert "its certificate is not trusted" in found.result
    assert found.remedy.endswith("restart it")


def test_port_that_another_program_holds_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the receiver and for the web."""
    monkeypatch.setattr(probes, "TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        held = settings(tmp_path, scp={"port": port}, source=[{"ae_title": SENDER}], web={"port": port})
        found = examine(held)

    assert found["receiver"].state is State.FAULT
    assert found["web"].state is State.FAULT
    assert "held by another program" in found["web"].result


def test_redis_tells_what_it_would_drop_and_whose_it_is(tmp_path: Path, redis_server: RedisServer) -> None:
    """The embedded recipe is well; a limit with an evicting policy, and keys of others, are not."""
    configured = settings(tmp_path, queue={"url": redis_server.url})
    with redis_server.client() as client:
        client.lpush("medpruner", "message")
        client.sadd("_kombu.binding.medpruner", "binding")
        well = {one.subject: one.state for one in doctor.broker(probes.broker(configured))}
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.set("sidekiq:queue", "1")
        found = {one.subject: one for one in doctor.broker(probes.broker(configured))}

    assert set(well.values()) == {State.OK}
    assert found["queue: eviction"].state is State.FAULT
    assert (found["queue: sharing"].state, "sidekiq:queue" in found["queue: sharing"].result) == (State.WARNING, True)


def test_database_is_looked_at_without_changing_it(tmp_path: Path, database_url: str) -> None:
    """Empty: of another version. Upgraded: well."""
    configured = settings(tmp_path, database={"url": database_url})
    with open_database(database_url):
        pass

    found = examine(configured)

    assert found["database"].state is State.OK
    assert found["backlog"].result == "0 analyses not finished"
    assert found["workers"].state is State.FAULT


def test_workers_are_named_with_their_device(tmp_path: Path, sqlite_url: str) -> None:
    """As they say themselves; one of other weights than the model folder's is a warning."""
    with open_database(sqlite_url) as sessions, sessions.begin() as session:
        heartbeat.beat(session, presence("gpu01/7"), now=datetime.now(UTC))

    found = examine(settings(tmp_path, database={"url": sqlite_url}))

    assert found["worker gpu01/7"].result == "medgemma on NVIDIA H100 80GB HBM3"
    assert (found["weights"].state, "gpu01/7 runs other weights" in found["weights"].result) == (State.WARNING, True)


def test_database_that_is_away_is_a_fault(tmp_path: Path) -> None:
    """The reason is the class of the error: its text may hold a password."""
    url = f"postgresql://somebody:secret@127.0.0.1:{free_port()}/medpruner"

    found = examine(settings(tmp_path, database={"url": url}))["database"]

    assert found.state is State.FAULT
    assert "secret" not in found.result


def test_destination_that_is_away_is_a_fault(tmp_path: Path) -> None:
    """With the sentence that its deliveries have."""
    destination = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": free_port()}

    found = examine(settings(tmp_path, destination=[destination]))["destination pacs"]

    assert found.state is State.FAULT
    assert "cannot be reached; check [[destination]] host and port" in found.result


def test_refused_of_the_last_day_are_named(tmp_path: Path) -> None:
    """As the receiver wrote them down."""
    (tmp_path / "spool").mkdir()
    now = datetime.now(UTC)
    Refusals(tmp_path / "spool").record(Refused(now, "CT1", "US", "10.0.0.9", "not a source", "the line"))

    assert examine(settings(tmp_path))["refused: CT1 from 10.0.0.9 to US"].remedy == "the line"


def test_mount_is_the_innermost_one() -> None:
    """Of mounts over each other the later."""
    mounts = [("/", "ext4"), ("/data", "xfs"), ("/data", "nfs4"), ("/database", "tmpfs")]

    assert probes.mount_of(Path("/data/spool"), mounts) == ("/data", "nfs4")
    assert probes.mount_of(Path("/datab"), mounts) == ("/", "ext4")


# --- the model's folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A copy of the demonstration model."""
    return shutil.copytree(model_folder.DEMONSTRATION, tmp_path / "model")


def test_known_architectures_and_digest_are_those_of_the_worker(weights: Path) -> None:
    """The service never imports the worker, so this holds the two equal."""
    found = probes.model(Settings.model_validate({"model": {"path": str(weights)}}))

    assert tuple(model_folder.HOSTS) == doctor.ARCHITECTURES
    assert (found.fault, found.architecture) == ("", model_folder.architecture_of(weights))
    assert found.weights_sha256 == model_folder.weights_sha256(weights)
    assert probes.DEMONSTRATION == model_folder.DEMONSTRATION


def test_folder_that_cannot_be_a_model_is_named_with_its_fault(tmp_path: Path, weights: Path) -> None:
    """Missing, cut short, of another architecture, without safetensors."""

    def fault(folder: Path) -> str:
        return probes.model(Settings.model_validate({"model": {"path": str(folder)}})).fault

    assert fault(tmp_path / "none") == f"no config.json in {tmp_path / 'none'}"
    file = next(weights.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert "was cut" in fault(weights)
    for one in weights.glob("*.safetensors"):
        one.unlink()
    assert "no *.safetensors" in fault(weights)
    (weights / "config.json").write_text(json.dumps({"architectures": ["Other"]}))
    assert "'Other', which is not known here" in fault(weights)
