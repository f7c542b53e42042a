"""Says every few seconds that this worker child is there, on what device and with which model."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.exc import DBAPIError

from service.shared import VERSION, heartbeat
from service.shared.heartbeat import BEAT_S, Presence

if TYPE_CHECKING:
    from workers.app import Child

log = structlog.get_logger(__name__)


@contextmanager
def presence_kept(child: Child, every_s: float = BEAT_S) -> Iterator[None]:
    """Beat while the block runs, and leave at its end; a database that is away costs beats and nothing else."""
    over = Event()
    thread = Thread(target=_beat_until, args=(child, over, every_s), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        try:
            with child.sessions.begin() as session:
                heartbeat.leave(session, child.name)
        except DBAPIError as error:
            log.warning("heartbeat_not_ended", error=type(error).__name__)


def presence_of(child: Child) -> Presence:
    """As it is now. Asks torch nothing before a model is loaded: loading decides how CUDA is set up."""
    identity = child.model.identity if child.model else None
    # on CUDA the identity names the card as well, "cuda:0 (NVIDIA H100)", which torch takes for no device
    device = identity.device.partition(" ")[0] if identity else child.settings.model.device
    name, total, used = _device(device) if identity else (None, None, None)
    return Presence(
        name=child.name,
        host=socket.gethostname(),
        process=os.getpid(),
        parent_process=os.getppid(),
        device=device,
        device_name=name,
        memory_bytes=total,
        memory_used_bytes=used,
        model=identity.name if identity else None,
        weights_sha256=identity.weights_sha256 if identity else None,
        software_version=VERSION,
    )


def _beat_until(child: Child, over: Event, every_s: float) -> None:
    while True:
        try:
            with child.sessions.begin() as session:
                heartbeat.beat(session, presence_of(child), now=datetime.now(UTC))
        except DBAPIError as error:
            log.warning("heartbeat_missed", error=type(error).__name__)
        if over.wait(every_s):
            return


def _device(device: str) -> tuple[str, int, int]:
    """Name, memory and used memory in bytes, of a GPU or of this machine."""
    if not device.startswith("cuda"):
        pages = os.sysconf("SC_PHYS_PAGES") - os.sysconf("SC_AVPHYS_PAGES")
        page = os.sysconf("SC_PAGE_SIZE")
        return _processor(), os.sysconf("SC_PHYS_PAGES") * page, pages * page
    import torch  # the model that is loaded there has imported it

    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.get_device_name(device), total, total - free


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, 'CPU')}, {os.cpu_count()} threads"
