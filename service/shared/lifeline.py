"""Whether a worker child has died, as the kernel knows: it holds a lock on a file, which no death of it can leave held.

A proof of death, never of life: where it is not certain (another machine, a file that is gone, a name that was given
again), the lease of the analysis decides as ever. The kernel's own id stands in the file, because a lock is only
believed within one kernel: a network file system may keep locks to each machine. Containers of one machine share both.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from service.shared.durable import make_folder

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # random(4): another one on each machine, after each start
OLD_S = 86_400.0

log = structlog.get_logger(__name__)


@contextmanager
def held(data: Path, name: str) -> Iterator[None]:
    """Hold the lifeline of this name while the block runs; where that cannot be, the lease has to do."""
    path = _path(data, name)
    descriptor: int | None = None
    try:
        make_folder(path.parent)
        _clear_away(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _kernel())
    except OSError as error:
        log.warning("no_lifeline", error=type(error).__name__, folder=str(path.parent))
        with suppress(OSError):
            path.unlink()  # two of one name: the death of one would be taken for the other's
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        if descriptor is not None:
            os.close(descriptor)


def is_cut(data: Path, name: str) -> bool:
    """The process of this name has surely died."""
    return _left_behind(_path(data, name)) == _kernel()


def _left_behind(path: Path) -> bytes | None:
    """What stands in a file that nobody holds; None: it is held, or gone."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.read(descriptor, 64)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _clear_away(folder: Path) -> None:
    """What the dead of days ago have left: their leases are over by far."""
    for path in folder.iterdir():
        if time.time() - path.stat().st_mtime > OLD_S and _left_behind(path) is not None:
            path.unlink()


def _path(data: Path, name: str) -> Path:
    return data / "workers" / name.replace("/", "-")


def _kernel() -> bytes:
    return BOOT_ID.read_bytes().strip()
