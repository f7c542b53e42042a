"""What both ends of the queue agree on: addresses and options, as plain values."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery import Celery
from kombu import Connection

from service.shared.queue import SOCKET_PATH_LIMIT_BYTES, broker_url, celery_options, embedded_socket
from service.shared.settings import Settings


def settings(**queue: object) -> Settings:
    return Settings.model_validate({"queue": queue})


def under(data: Path) -> Settings:
    return Settings.model_validate({"data": {"path": data}})


def test_embedded_socket_lies_under_data(tmp_path: Path) -> None:
    """As long as the path fits into a socket's address."""
    assert embedded_socket(Path("/srv/medpruner")) == Path("/srv/medpruner/redis/redis.sock")


def test_relative_data_folder_means_the_same_socket_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Service and worker may run in other folders, for the address is absolute."""
    monkeypatch.chdir(tmp_path)

    assert embedded_socket(Path("var")) == embedded_socket(tmp_path / "var")


@pytest.mark.parametrize("length", [SOCKET_PATH_LIMIT_BYTES, SOCKET_PATH_LIMIT_BYTES + 1, 400])
def test_embedded_socket_always_fits_into_an_address(length: int) -> None:
    """Too long by one byte is too long; then it is a folder of /tmp that belongs to this data folder."""
    rest = length - len("/") - len("/redis/redis.sock")
    data = Path("/" + "ä" * (rest // 2) + "a" * (rest % 2))

    socket = embedded_socket(data)

    assert len(str(socket).encode()) <= SOCKET_PATH_LIMIT_BYTES
    assert (socket.parent.parent == data) is (length <= SOCKET_PATH_LIMIT_BYTES)
    assert socket == embedded_socket(data)
    assert socket != embedded_socket(data / "other")


def test_configured_queue_is_used_as_it_is() -> None:
    """With its password, which the masked settings hide."""
    assert broker_url(settings(url="redis://:hunter2@queue:6379/1")) == "redis://:hunter2@queue:6379/1"


@pytest.mark.parametrize("name", ["plain", "with space", "a#b", "100%25", "what?", "größe", "a@b:c", "plus+"])
def test_url_of_the_embedded_queue_names_its_socket(name: str) -> None:
    """Whatever the data folder is called: the transport opens exactly that path."""
    data = Path("/srv") / name

    with Connection(broker_url(under(data))) as connection:
        parameters = connection.transport.Channel._connparams  # type: ignore[attr-defined]
        channel = connection.transport.Channel.__new__(connection.transport.Channel)
        channel.connection = connection.transport
        path = parameters(channel)["path"]

    assert path == str(embedded_socket(data))


def test_only_json_is_accepted_and_no_results_are_kept() -> None:
    """A message must not be able to run code, and Redis must not keep anything about studies."""
    app = Celery(set_as_current=False)
    app.conf.update(celery_options(settings()))

    assert app.conf.task_serializer == "json"
    assert list(app.conf.accept_content) == ["json"]
    assert app.conf.task_ignore_result is True
    assert app.conf.result_backend is None


def test_redis_gives_work_to_another_worker_only_after_the_time_limit() -> None:
    """The visibility timeout reaches the transport, which alone obeys it."""
    options = celery_options(settings(name="reading", visibility_timeout_s=4000, hard_time_limit_s=3000))

    assert options["broker_transport_options"]["visibility_timeout"] == 4000
    assert options["task_default_queue"] == "reading"


def test_options_are_nobody_elses() -> None:
    """Each end adds to them; the other end must not see that."""
    celery_options(settings())["broker_transport_options"]["socket_timeout"] = 1

    assert "socket_timeout" not in celery_options(settings())["broker_transport_options"]
