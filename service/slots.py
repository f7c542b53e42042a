"""Empty files whose names survive a power cut, made ahead: what is written into one needs one flush, not two.

A new file's folder would have to be flushed for every instance; here it is flushed once for many. Knows nothing of
what is written into them.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections import deque
from pathlib import Path
from threading import Condition, Thread

import structlog

from service.shared.durable import sync_folder

SUFFIX = ".slot"
READY = 256  # kept at hand; half of them are made at a time
RETRY_S = 1.0  # after a fault of the disk

log = structlog.get_logger(__name__)


class Slots:
    """Hands out slots in `folder` to any thread. Its copies in other processes each make and hand out their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._token = secrets.token_hex(4)  # the names of a process that had our number before are not ours
        self._counter = itertools.count()
        self._ready: deque[Path] = deque()
        self._condition = Condition()
        self._running = False
        self._thread: Thread | None = None

    def start(self) -> None:
        """Keep some ready from now on, until `stop`."""
        self._running = True
        self._thread = Thread(target=self._keep_ready, name="slots", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Make no more, and remove those that nobody took."""
        with self._condition:
            self._running = False
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while self._ready:
            self._ready.popleft().unlink(missing_ok=True)

    def take(self) -> Path:
        """An empty file for its owner alone, its name durable. OSError for a fault of the disk."""
        with self._condition:
            slot = self._ready.popleft() if self._ready else None
            if len(self._ready) <= READY // 2:
                self._condition.notify()
        return slot or self._make(1)[0]

    def _make(self, number: int) -> list[Path]:
        ours = f"{self._token}-{os.getpid()}"
        made = [self._folder / f"{ours}-{next(self._counter):09d}{SUFFIX}" for _ in range(number)]
        for path in made:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        sync_folder(self._folder)
        return made

    def _keep_ready(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: not self._running or len(self._ready) <= READY // 2)
                if not self._running:
                    return
            try:
                made = self._make(READY // 2)
            except OSError as error:  # what needs a slot now finds the same fault, and says so to its sender
                log.warning("no_slots_made", error=error.strerror)
                with self._condition:
                    self._condition.wait_for(lambda: not self._running, timeout=RETRY_S)
                continue
            with self._condition:
                self._ready.extend(made)
