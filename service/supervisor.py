"""`serve`: every role as a process of its own, started again when it dies. Decides nothing about studies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import structlog

from service.broker import redis_command
from service.children import die_with_parent
from service.shared.settings import Settings

ROLES = ("receive", "ingest", "dispatch", "deliver", "web")
RECEIVER, QUEUE = "receive", "redis"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 4.0
SETTLED_S = 30.0  # a process that lived this long starts again at once
TERM_GRACE_S = 30.0

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Supervised:
    """One process that should be running."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    wait_s: float = FIRST_WAIT_S
    not_before: float = 0.0


def commands(settings: Settings, config: Path | None, *, with_worker: bool) -> list[tuple[str, list[str]]]:
    """What `serve` runs, in the order in which it is started."""
    tail = ["--config", str(config)] if config else []
    roles = [role for role in ROLES if role != "web" or settings.web.enabled]
    wanted = [(role, [sys.executable, "-m", *_program(role), *tail]) for role in roles]
    if with_worker:
        wanted.append(("worker", [sys.executable, "-m", "workers", "worker", *tail]))
    if not settings.queue.url.get_secret_value():
        wanted.append((QUEUE, redis_command(settings.data.path)))
    return wanted


def _program(role: str) -> list[str]:
    """The receiver loads nothing but itself: senders wait for it after it died."""
    return ["service.receive"] if role == "receive" else ["service", "serve", "--role", role]


def supervise(wanted: list[tuple[str, list[str]]], stop: Event, ready: Event | None = None) -> None:
    """Keep all commands running until `stop`, then end them all, the queue last.

    ready: set once the database can be used. Before, only the receiver runs, which needs none.
    """
    supervised = [Supervised(name, command) for name, command in wanted]
    try:
        while not stop.is_set():
            for one in supervised:
                if one.name == RECEIVER or ready is None or ready.is_set():
                    _keep(one, time.monotonic())
            stop.wait(0.2)
    finally:
        last = [one for one in supervised if one.name == QUEUE]
        _end([one for one in supervised if one.name != QUEUE])  # they finish what they hold; the queue listens still
        _end(last)


def _keep(one: Supervised, now: float) -> None:
    if one.process is not None:
        status = one.process.poll()
        if status is None:
            return
        if now - one.started_at > SETTLED_S:
            one.wait_s = FIRST_WAIT_S
        log.error("process_ended", process=one.name, status=status, again_in_s=one.wait_s)
        _kill_group(one.process.pid)  # what it left behind: a worker's child still holds the GPU's memory
        one.process = None
        one.not_before = now + one.wait_s
        one.wait_s = min(LONGEST_WAIT_S, one.wait_s * 2)
    if now >= one.not_before:
        # a supervisor that is killed takes its processes with it, so that the next one finds ports and sockets free
        one.process = subprocess.Popen(one.command, start_new_session=True, preexec_fn=die_with_parent)
        one.started_at = now
        log.info("process_started", process=one.name, pid=one.process.pid)


def _end(ending: list[Supervised]) -> None:
    """Ask all at once, wait for all, and kill what outlives the grace, with all that they have started."""
    started = [(one.name, one.process) for one in ending if one.process is not None]
    for _, process in started:
        process.terminate()
    deadline = time.monotonic() + TERM_GRACE_S
    for name, process in started:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("process_killed", process=name, after_s=TERM_GRACE_S)
        _kill_group(process.pid)
        process.wait()
        log.info("process_stopped", process=name)


def _kill_group(leader: int) -> None:
    """End what `leader` and its children have started in its session, and `leader` itself where it still runs."""
    with suppress(ProcessLookupError):  # nobody is left
        os.killpg(leader, signal.SIGKILL)
