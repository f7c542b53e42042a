"""Redis, database, destination and disk away, each for a while under load: receiving goes on, everything drains.

`./run prove outages [--hold-s 60] [--seed N]`, as root (the full disk is a small tmpfs of its own). Exit status 1 when
an instance was refused that had room, was acknowledged and lost, or waits for ever.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from service.shared.settings import spool_folder
from tests.prove.invariants import all_broken, is_at_rest
from tests.prove.kills import make_model, say
from tests.prove.load import Load
from tests.running import Pacs, Service, Storescp, children_of
from tests.servers import PostgresServer, RedisServer, Server, find_program, wait_for

AE_TITLES = ("MODALITY", "PACS")
DISK_BYTES = 256 << 20
FLOOR_GB = 0.03
OUT_OF_RESOURCES = 0xA700
GOES_ON = 16  # instances that have to be acknowledged while something is away
PATIENCE_S = 120.0
DRAIN_S = 300.0

Outage = Callable[[], AbstractContextManager[object]]


class Outages:
    """A service under load, and what it depends on taken away piece by piece.

    spool: a folder on a small file system, or None for the ordinary place.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        seed: int,
        *,
        postgres: PostgresServer | None = None,
        redis: RedisServer | None = None,
        spool: Path | None = None,
        min_free_gb: float = FLOOR_GB,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.pacs = Storescp(folder / "pacs")
        self.service = Service(
            folder / "service",
            model,
            pacs=[Pacs(self.pacs.port)],
            max_new_tokens=4,
            quiet_period_s=1,
            database=postgres.fresh_database() if postgres else "",
            queue_url=redis.url if redis else "",
            spool=spool,
            min_free_gb=min_free_gb,
        )
        self._load = Load(self.service.port, AE_TITLES, seed, pause_s=1.0, may_begin=self._may_begin)
        self._allowed = 4  # studies in all; raised by every outage, so that a slow machine is not flooded
        self._tell = tell

    def run(self, outages: Sequence[tuple[str, Outage, bool]], hold_s: float) -> list[str]:
        """Each outage (name, how, whether senders notice it) for `hold_s` at least; then what is broken."""
        broken: list[str] = []
        with self.pacs, self.service:
            self.service.wait_for_model()
            self._load.start()
            try:
                self._goes_on("before anything is away", 8)
                for name, away, is_noticed in outages:
                    begun = time.monotonic()
                    try:
                        self._take_away(name, away, hold_s, is_noticed=is_noticed)
                    except AssertionError as error:
                        broken.append(f"{name}: {error}")
                    self._tell(f"{name}: {time.monotonic() - begun:.0f} s, {self._acknowledged()} acknowledged so far")
            finally:
                self._load.stop()
            ledger = self._load.ledger.copy()
            begun = time.monotonic()
            if not self._drains(ledger):
                broken.append(f"the service is not at rest {DRAIN_S:g} s after everything was back")
            self._tell(f"drained in {time.monotonic() - begun:.0f} s")
            return broken + all_broken(
                ledger,
                self.service.sessions,
                spool=spool_folder(self.service.settings),
                data=self.service.settings.data.path,
                pacs=self.pacs.files(),
            )

    def _take_away(self, name: str, away: Outage, hold_s: float, *, is_noticed: bool) -> None:
        refused = self._load.ledger.refused
        before = refused.total()
        with away():
            begun = time.monotonic()
            if is_noticed:
                self._allowed += 4
                noted = refused[OUT_OF_RESOURCES]
                wait_for(lambda: refused[OUT_OF_RESOURCES] > noted, "0xA700 while there is no room", PATIENCE_S)
            else:
                self._goes_on(f"while {name}", GOES_ON)
            time.sleep(max(0.0, hold_s - (time.monotonic() - begun)))
            if not is_noticed and refused.total() > before:
                raise AssertionError(f"instances were refused: {dict(refused)}")
        self._goes_on(f"after {name}", 8)

    def _goes_on(self, when: str, instances: int) -> None:
        self._allowed += 4
        before = self._acknowledged()
        wait_for(lambda: self._acknowledged() >= before + instances, f"receiving goes on {when}", PATIENCE_S)

    def _acknowledged(self) -> int:
        return len(self._load.ledger.acknowledged)

    def _may_begin(self) -> bool:
        return self._load.ledger.begun < self._allowed

    def _drains(self, ledger: dict[tuple[str, str], str]) -> bool:
        end = time.monotonic() + DRAIN_S
        while time.monotonic() < end:
            with contextlib.suppress(DBAPIError):
                if is_at_rest(self.service.sessions, ledger):
                    return True
            time.sleep(0.3)
        return False


# --- what can be away ------------------------------------------------------------------------------------------------


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """It is not there: connections are refused."""
    server.stop()
    try:
        yield
    finally:
        server.start()


@contextmanager
def hanging(server: Server) -> Iterator[None]:
    """It is there and does not answer, neither those who are connected nor those who come."""
    pids = [server.pid, *children_of(server.pid)]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another program writes to the SQLite file and takes its time."""
    connection = sqlite3.connect(database, isolation_level=None, timeout=60)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of DISK_BYTES under `folder`, for as long as the block runs; only root can mount it."""
    folder.mkdir(parents=True)
    options = f"size={DISK_BYTES},mode=0700"
    subprocess.run([find_program("mount"), "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder / "spool"
    finally:
        subprocess.run([find_program("umount"), "--lazy", str(folder)], check=True)


def free_bytes(disk: Path) -> int:
    state = os.statvfs(disk)
    return state.f_bavail * state.f_frsize


@contextmanager
def filled(disk: Path, leave_bytes: int) -> Iterator[None]:
    """Somebody else's file takes all room but `leave_bytes`."""
    balloon = disk / "balloon"
    with balloon.open("wb") as stream:
        while (room := free_bytes(disk) - leave_bytes) > 0:
            try:
                os.posix_fallocate(stream.fileno(), 0, room)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                # senders took some of it meanwhile: look again
            else:
                break
    try:
        yield
    finally:
        balloon.unlink()


def prove_with_servers(folder: Path, model: Path, seed: int, hold_s: float, tell: Callable[[str], None]) -> list[str]:
    """PostgreSQL, Redis, the destination, and the floor of free space."""
    with (
        PostgresServer(folder / "postgres") as postgres,
        RedisServer(folder / "redis") as redis,
        small_disk(folder / "disk") as spool,
    ):
        proof = Outages(folder, model, seed, postgres=postgres, redis=redis, spool=spool, tell=tell)
        return proof.run(
            [
                ("Redis is stopped", lambda: stopped(redis), False),
                ("Redis hangs", lambda: hanging(redis), False),
                ("PostgreSQL is stopped", lambda: stopped(postgres), False),
                ("PostgreSQL hangs", lambda: hanging(postgres), False),
                ("the destination is stopped", lambda: stopped(proof.pacs), False),
                ("the destination hangs", lambda: hanging(proof.pacs), False),
                ("the disk is at its floor", lambda: filled(spool.parent, int(FLOOR_GB * 1e9) - (1 << 20)), True),
            ],
            hold_s,
        )


def prove_embedded(folder: Path, model: Path, seed: int, hold_s: float, tell: Callable[[str], None]) -> list[str]:
    """SQLite, and a disk without a floor."""
    with small_disk(folder / "disk") as spool:
        proof = Outages(folder, model, seed, spool=spool, min_free_gb=0, tell=tell)
        database = proof.service.settings.data.path / "medpruner.sqlite"
        return proof.run(
            [
                ("SQLite is locked", lambda: locked(database), False),
                ("the disk is full", lambda: filled(spool.parent, 0), True),
            ],
            hold_s,
        )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run prove outages", description=__doc__)
    parser.add_argument("--hold-s", type=float, default=60, help="how long each is away at least")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="medpruner-outages-"))
    model = make_model(folder / "model")
    broken = prove_with_servers(folder / "servers", model, options.seed, options.hold_s, say)
    broken += prove_embedded(folder / "embedded", model, options.seed + 1, options.hold_s, say)
    for line in broken:
        say(f"BROKEN: {line}")
    if broken:
        say(f"everything is kept in {folder}")
        return 1
    say("nothing was lost, and everything drained")
    shutil.rmtree(folder)
    return 0
