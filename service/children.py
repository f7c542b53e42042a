"""Processes that live and die with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """From now on this process is killed when the thread that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def fork(work: Callable[[], None]) -> int:
    """Start a copy of this process that does `work` and ends, and return its number. Before any thread is started:
    a lock that another thread held would stay closed in the copy for ever."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        die_with_parent()
        if os.getppid() == parent:  # else it died before it was asked to take us along
            work()
            status = 0
    finally:
        os._exit(status)
