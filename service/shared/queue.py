"""What the sender and the worker must agree on about the queue. Knows no Celery: options as plain values.

The message is one analysis id. Redis is the doorbell; the truth is in the database.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from service.shared.durable import digest
from service.shared.settings import Settings

TASK_READ_STUDY = "workers.read_study"  # by name, so that the service never imports the worker
SOCKET_PATH_LIMIT_BYTES = 107  # sun_path in sockaddr_un, less its closing zero


def embedded_socket(data: Path) -> Path:
    """Where the embedded Redis listens: under [data], or in a private folder of /tmp when that path is too long."""
    path = data.resolve() / "redis" / "redis.sock"
    if len(str(path).encode()) <= SOCKET_PATH_LIMIT_BYTES:
        return path
    return Path("/tmp") / f"medpruner-{digest(str(path).encode())[:16]}" / "redis.sock"


def broker_url(settings: Settings) -> str:
    """The configured Redis, or the embedded one on its private socket."""
    return settings.queue.url.get_secret_value() or f"redis+socket://{quote(str(embedded_socket(settings.data.path)))}"


def celery_options(settings: Settings) -> dict[str, Any]:
    """Options that both ends share; each with its reason."""
    return {
        "broker_url": broker_url(settings),
        "broker_transport_options": {
            # above the hard time limit: shorter, and Redis would hand running work to a second worker
            "visibility_timeout": settings.queue.visibility_timeout_s,
        },
        "visibility_timeout": settings.queue.visibility_timeout_s,
        "task_default_queue": settings.queue.name,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_ignore_result": True,  # results are rows, not messages
        "enable_utc": True,
    }
