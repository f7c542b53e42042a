"""Every state that a power cut may leave of the spool, rebuilt from a trace of receiver and ingest, and recovered from.

`./run prove power_cuts [--instances 48] [--states 20000] [--seed N]`. strace records what both processes write, flush,
rename and remove while studies arrive; for the moment after each of these calls, states are made that drop what was
not flushed: all of it, none, each single piece, all contents, halves, random parts. In each, the service's own
recovery and ingest run. Exit status 1 when what was acknowledged before is not there, or what was half written is.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service import assembly
from service.shared import schema
from service.shared.db import Instance, open_engine, open_sessions
from service.shared.settings import Settings, database_url, load, spool_folder
from service.spool import Spool
from tests.prove.disk import CALLS, Call, Disk, Effect, Keep, Name, Write, read_trace
from tests.prove.hostile import STORE_ANSWER, answers_in
from tests.prove.invariants import lost_instances
from tests.prove.load import Key, Load
from tests.running import DIES_WITH_US, PROJECT, listens
from tests.servers import find_program, free_port, wait_for

SLICES = 4
AT_A_MOMENT = 14  # states at least
CONFIGURATION = """\
[data]
path = "{folder}/data"
[scp]
port = {port}
accept_unknown_sources = true
[spool]
min_free_gb = 0.01
[assembly]
sweep_s = 0.2
[log]
level = "ERROR"
"""


@dataclass(slots=True)
class Outcome:
    calls: int = 0  # that changed the spool or flushed
    states: int = 0
    acknowledged: int = 0
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Recording:
    """A trace of both processes, and what was acknowledged in it."""

    calls: list[Call]
    root: Path  # the data folder, as it was called in the trace
    settings: Settings
    acknowledged: dict[Key, str]


def record(folder: Path, instances: int, seed: int) -> Recording:
    """Let receiver and ingest work under strace until that many instances are acknowledged and on record."""
    folder.mkdir(parents=True)
    port = free_port()
    config, trace = folder / "config.toml", folder / "trace.txt"
    config.write_text(CONFIGURATION.format(folder=folder, port=port))
    settings = load(config, {})
    settings.data.path.mkdir(mode=0o700)
    engine = open_engine(database_url(settings))
    schema.upgrade(engine)
    sessions = open_sessions(engine)
    receive, ingest = (
        f"{sys.executable} -m {what} --config {config}" for what in ("service.receive", "service serve --role ingest")
    )
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [
                *(*DIES_WITH_US, find_program("strace"), "-f", "-y", "-xx", "-qq", "-s", "10000000"),
                *("--seccomp-bpf", "-e", f"trace={CALLS}", "-o", str(trace)),
                *(
                    "sh",
                    "-c",
                    f"{receive} & {ingest} & wait",
                ),
            ],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_for(lambda: listens(port), f"the receiver listens; see {folder}", 300, 0.2)
            studies = max(1, instances // SLICES)
            senders = Load(port, ("CT1", "CT2"), seed, pause_s=0.1, slices=SLICES)
            senders.may_begin = lambda: senders.ledger.begun < studies
            senders.start()
            wait_for(lambda: senders.ledger.finished >= studies, "all studies are sent", 300, 0.1)
            senders.stop()
            wait_for(lambda: _rows(sessions) >= len(senders.ledger.acknowledged), "all instances have rows", 300, 0.2)
            # ingest removes the names of what has its row
            wait_for(lambda: not Spool(spool_folder(settings), 0).incoming(), "nothing waits for ingest", 300, 0.2)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            engine.dispose()
    with trace.open(errors="replace") as lines:
        calls = list(read_trace(iter(lines)))
    return Recording(calls, settings.data.path, settings, senders.ledger.copy())


def _rows(sessions: sessionmaker[Session]) -> int:
    with sessions() as session:
        return len(session.scalars(select(Instance.id)).all())


class PowerCuts:
    """The states after every call of a recording, and what the service makes of them."""

    def __init__(self, recording: Recording, workshop: Path, seed: int) -> None:
        self._recording = recording
        self._workshop = workshop
        self._chance = random.Random(seed)
        self._uids = {uid: (study_uid, uid) for study_uid, uid in recording.acknowledged}
        self._template = workshop / "template.sqlite"
        self.outcome = Outcome()
        engine = open_engine(f"sqlite:///{self._template}")
        schema.upgrade(engine)
        engine.dispose()

    def run(self, states: int, tell: Callable[[str], None] = lambda _: None) -> Outcome:
        """As many states as asked for, spread evenly over all moments."""
        changing = self._count_changes()
        per_moment = states / max(1, changing)
        disk = Disk(self._recording.root)
        acknowledged: dict[Key, str] = {}
        allowance = 0.0
        for number, call in enumerate(self._recording.calls):
            if call.name == "sendto":
                acknowledged |= self._acknowledged_by(call)
                continue
            if not disk.apply(number, call):
                continue
            self.outcome.calls += 1
            allowance += per_moment
            if allowance < AT_A_MOMENT and self.outcome.calls < changing:
                continue
            for name, survives, keep in self._choices(disk.pending(), max(AT_A_MOMENT, int(allowance))):
                allowance -= 1
                self._try(disk, f"after call {number} ({call.name}), {name}", survives, keep, acknowledged)
                if self.outcome.states % 500 == 0:
                    tell(
                        f"{self.outcome.states} states, {self.outcome.calls} of {changing} calls, "
                        f"{len(acknowledged)} acknowledged by then; {len(self.outcome.broken)} broken"
                    )
        self.outcome.acknowledged = len(acknowledged)
        return self.outcome

    def _count_changes(self) -> int:
        disk = Disk(self._recording.root)
        return sum(disk.apply(number, call) for number, call in enumerate(self._recording.calls))

    def _acknowledged_by(self, call: Call) -> dict[Key, str]:
        content = next((one for one in call.arguments[1:] if isinstance(one, bytes)), b"")
        stored = [uid for field, status, uid in answers_in(content) if field == STORE_ANSWER and status == 0x0000]
        keys = [self._uids[uid] for uid in stored if uid in self._uids]
        return {key: self._recording.acknowledged[key] for key in keys}

    def _choices(self, pending: list[Effect], number: int) -> Iterator[tuple[str, Callable[[Effect], bool], Keep]]:
        """What survives: the extremes first, then single pieces and random parts."""
        everything: list[tuple[str, Callable[[Effect], bool], Keep]] = [
            ("nothing unflushed is left", lambda _: False, Keep.ALL),
            ("everything is left", lambda _: True, Keep.ALL),
            ("names are left, contents not", lambda one: isinstance(one, Name), Keep.ALL),
            ("names and lengths are left, bytes are zero", lambda _: True, Keep.ZEROS),
            ("contents are left, names not", lambda one: isinstance(one, Write), Keep.ALL),
            ("half of every unflushed write is left", lambda _: True, Keep.HALF),
        ]
        folders = sorted({one.folder for one in pending if isinstance(one, Name)})
        for folder in self._chance.sample(folders, min(3, len(folders))):
            everything.append((f"only names in {folder} are left", _in_folder(folder), Keep.ALL))
            everything.append((f"all but names in {folder} is left", _not_in_folder(folder), Keep.ALL))
        for lost in self._chance.sample(pending, min(len(pending), max(1, (number - len(everything)) // 4))):
            everything.append((f"all but one piece is left ({lost})", _all_but(lost), Keep.ALL))
            everything.append((f"one piece is left ({lost})", _only(lost), Keep.ALL))
        while len(everything) < number:
            left = {id(one) for one in pending if self._chance.random() < self._chance.choice([0.2, 0.5, 0.8])}
            everything.append(("a random part is left", _among(left), self._chance.choice(list(Keep))))
        yield from everything

    def _try(
        self, disk: Disk, when: str, survives: Callable[[Effect], bool], keep: Keep, acknowledged: dict[Key, str]
    ) -> None:
        """Recover from one state, and look at what is there then."""
        self.outcome.states += 1
        place = self._workshop / "state"
        shutil.rmtree(place, ignore_errors=True)
        disk.leave(place, survives, keep)
        database = self._workshop / "state.sqlite"
        shutil.copyfile(self._template, database)
        for suffix in ("-wal", "-shm"):
            database.with_name(database.name + suffix).unlink(missing_ok=True)
        engine = open_engine(f"sqlite:///{database}")
        try:
            sessions = open_sessions(engine)
            spool = self._recovered(place / spool_folder(self._recording.settings).name, sessions)
            broken = [*lost_instances(acknowledged, sessions, spool), *self._believed(sessions, spool)]
        except Exception as error:  # noqa: BLE001  whatever it is, the service's recovery must not raise it
            broken = [f"recovery fails: {type(error).__name__}: {error}"]
        finally:
            engine.dispose()
        self.outcome.broken += [f"{when}: {line}" for line in broken]

    def _recovered(self, path: Path, sessions: sessionmaker[Session]) -> Path:
        """What a starting receiver and a starting ingest do, with a database that has lost everything."""
        settings, now = self._recording.settings, datetime.now(UTC)
        spool = Spool(path, 0)
        spool.claim()
        try:
            spool.recover()
        finally:
            spool.release()
        assembly.rebuild(settings, sessions, spool, now)
        while assembly.ingest(settings, sessions, spool, now):
            pass
        return path

    def _believed(self, sessions: sessionmaker[Session], spool: Path) -> Iterator[str]:
        """Rows of what was never sent like that."""
        with sessions() as session:
            rows = session.execute(select(Instance.sop_instance_uid, Instance.sha256)).all()
        believed = {self._uids[uid]: digest for uid, digest in rows if uid in self._uids}
        for uid, _ in rows:
            if uid not in self._uids:
                yield f"instance {uid} is on record and was never sent"
        for key, digest in believed.items():
            if digest != self._recording.acknowledged[key]:
                yield f"instance {key[1]} is on record with bytes that were never sent"
        yield from lost_instances(believed, sessions, spool)


def _in_folder(folder: str) -> Callable[[Effect], bool]:
    return lambda one: isinstance(one, Write) or (isinstance(one, Name) and one.folder == folder)


def _not_in_folder(folder: str) -> Callable[[Effect], bool]:
    return lambda one: not (isinstance(one, Name) and one.folder == folder)


def _all_but(lost: Effect) -> Callable[[Effect], bool]:
    return lambda one: one is not lost


def _only(left: Effect) -> Callable[[Effect], bool]:
    return lambda one: one is left


def _among(left: set[int]) -> Callable[[Effect], bool]:
    return lambda one: id(one) in left


def prove(
    folder: Path, instances: int, states: int, seed: int, tell: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Record, then try."""
    recording = record(folder / "recorded", instances, seed)
    workshop = Path(tempfile.mkdtemp(prefix="medpruner-cuts-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        return PowerCuts(recording, workshop, seed).run(states, tell)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run prove power_cuts", description=__doc__)
    parser.add_argument("--instances", type=int, default=48)
    parser.add_argument("--states", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))  # thousands of recoveries
    folder = Path(tempfile.mkdtemp(prefix="medpruner-power-cuts-"))
    begun = time.monotonic()
    outcome = prove(folder, options.instances, options.states, options.seed, say)
    for line in outcome.broken[:50]:
        say(f"BROKEN: {line}")
    say(
        f"{outcome.states} states after {outcome.calls} calls that acknowledged {outcome.acknowledged} instances: "
        f"{len(outcome.broken)} broken; {time.monotonic() - begun:.0f} s"
    )
    if outcome.broken:
        say(f"the trace is kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0
