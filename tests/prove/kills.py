"""SIGKILL of every process, at every step and at random times, while studies arrive: nothing acknowledged is lost.

`./run prove kills [--kills 500] [--seed N] [--postgres] [--lease-s 15]`. Half of the kills strike a process on its way
into a system call that changes something (fsync, rename, send, ...), which strace injects; the others strike
whenever they happen to. Exit status 1 when an invariant is broken or a recovery took too long.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import redis
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from service.shared.db import Analysis, AnalysisState, Delivery, DeliveryState, Study, StudyState
from service.shared.settings import spool_folder
from service.spool import waiting
from tests.prove.invariants import all_broken, is_at_rest, lost_instances, unfinished
from tests.prove.load import A_ASSOCIATE_AC, Load, read_pdu
from tests.receiving import association_request
from tests.running import Pacs, Service, Storescp, children_of
from tests.servers import LOOPBACK, PostgresServer, find_program, wait_for

AE_TITLES = ("CT1", "CT2", "MR1", "PACS")
SOURCES = "".join(f'[[source]]\nae_title = "{title}"\n' for title in AE_TITLES if title != "PACS")
BACKLOG = 30  # studies that may wait; beyond, the modalities rest
GIVE_UP_S = 240.0  # a part that is not back by then never comes back
STEP_S = 3.0  # for a process to reach the system call that kills it
CHECK_EVERY = 25  # kills
DRAIN_S = 600.0

# How often each is chosen, relative to the others; a part is not killed again before it has recovered.
TARGETS = {
    "receive": 6,
    "ingest": 6,
    "dispatch": 4,
    "deliver": 6,
    "worker": 1,
    "child": 2,
    "redis": 1.5,
    "serve": 0.7,
    "postgres": 4,
    "backend": 3,
}
STEPS = {  # the system calls by which each changes something that others see
    "receive": "fsync,fdatasync,rename,link,linkat,mkdir,unlink,write,pwrite64,sendto",
    "ingest": "fsync,fdatasync,rename,unlink,pwrite64,sendto",
    "dispatch": "fsync,fdatasync,pwrite64,sendto",
    "deliver": "fsync,fdatasync,rename,mkdir,pwrite64,sendto",
    "child": "fsync,fdatasync,rename,mkdir,pwrite64,sendto",
    "redis": "write,fdatasync,writev",
}
PLACES = re.compile(
    r"/(tmp|incoming|studies|associations|segments?|outbox|outputs|redis)\b|(sqlite-wal|sqlite-shm|sqlite)|(socket|TCP)"
)


@dataclass(slots=True)
class Kill:
    """One kill, and how long it took until what waited then was done."""

    target: str
    step: str  # the system call on whose way in it was, or "any time"
    pid: int
    at: float  # time.monotonic()
    is_over: Callable[[], bool]
    recovery_s: float | None = None


@dataclass(slots=True)
class Outcome:
    kills: list[Kill] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    studies: int = 0
    instances: int = 0
    lost_connections: int = 0

    @property
    def worst_recovery_s(self) -> float:
        return max((kill.recovery_s or 0.0 for kill in self.kills), default=0.0)


class Matrix:
    """A service under load, and the one who kills its parts."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        seed: int,
        *,
        postgres: PostgresServer | None = None,
        lease_s: float = 5,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.outcome = Outcome()
        self._seed = seed
        self._chance = random.Random(seed)
        self._say = say
        self._postgres = postgres
        self._pacs = Storescp(folder / "pacs")
        self._service = Service(
            folder / "service",
            model,
            pacs=[Pacs(self._pacs.port)],
            more=SOURCES,
            max_new_tokens=4,
            quiet_period_s=1,
            lease_s=lease_s,
            database=postgres.fresh_database() if postgres else "",
        )
        self._open: list[Kill] = []
        self._backlog = 0
        self._checked: set[tuple[str, str]] = set()
        self._targets = {
            name: weight for name, weight in TARGETS.items() if postgres or name not in ("postgres", "backend")
        }

    def run(self, kills: int) -> Outcome:
        """Kill that often, let the work come to its end, and look at everything."""
        with self._pacs, self._service:
            self._service.wait_for_model()
            load = Load(
                self._service.port, AE_TITLES, self._seed, pause_s=0.8, may_begin=lambda: self._backlog < BACKLOG
            )
            load.start()
            try:
                self._kill_them(kills, load)
            finally:
                load.stop()
            ledger = load.ledger.copy()
            self._wait_for_rest(ledger)
            self.outcome.studies = load.ledger.finished
            self.outcome.instances = len(ledger)
            self.outcome.lost_connections = load.ledger.lost_connections
            self.outcome.broken += all_broken(
                ledger,
                self._service.sessions,
                spool=spool_folder(self._service.settings),
                data=self._service.settings.data.path,
                pacs=self._pacs.files(),
            )
            return self.outcome

    # --- killing ---

    def _kill_them(self, kills: int, load: Load) -> None:
        wait_for(lambda: load.ledger.finished >= 2, "the first studies are there", 60)
        begun = time.monotonic()
        while len(self.outcome.kills) < kills:
            self._look()
            self._pause(self._chance.uniform(0.05, 1.2))
            free = {
                name: weight
                for name, weight in self._targets.items()
                if all(name != kill.target for kill in self._open) and not self._blocked(name)
            }
            if not free:
                continue
            (target,) = self._chance.choices(list(free), list(free.values()))
            kill = self._kill(target)
            if kill is None:
                continue
            self._open.append(kill)
            self.outcome.kills.append(kill)
            done = len(self.outcome.kills)
            if done % CHECK_EVERY == 0:
                self._check_so_far(load)
                self._say(
                    f"{done} of {kills} kills, {time.monotonic() - begun:.0f} s; {load.ledger.finished} studies sent, "
                    f"{self._backlog} wait; worst recovery {self.outcome.worst_recovery_s:.1f} s; "
                    f"{len(self.outcome.broken)} broken"
                )
        end = time.monotonic() + GIVE_UP_S
        while self._open and time.monotonic() < end:
            self._pause(0.2)

    def _blocked(self, target: str) -> bool:
        """The whole service is killed only while all of its parts stand, its parts only while it stands."""
        return bool(self._open) if target == "serve" else any(kill.target == "serve" for kill in self._open)

    def _kill(self, target: str) -> Kill | None:
        if target == "serve":
            return self._kill_service()
        if target == "postgres":
            return self._kill_postgres()
        if target == "backend":
            return self._kill_backend()
        pid = self._pid(target)
        if not pid:
            return None
        is_over = self._recovery(target, pid)
        step = self._kill_at_step(target, pid) if target in STEPS and self._chance.random() < 0.5 else None
        if step is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return Kill(target, step or "any time", pid, time.monotonic(), is_over)

    def _kill_at_step(self, target: str, pid: int) -> str | None:
        """Have strace kill it on its way into one of its next system calls; None when it came to none in time."""
        calls, when = STEPS[target], self._chance.randint(1, 8)
        report = self._service.folder / "strace.txt"
        strace = subprocess.Popen(
            [
                find_program("strace"),
                *("-f", "-y", "-qq", "-s", "0", "-o", str(report), "-p", str(pid)),
                *("-e", f"trace={calls}", "-e", f"inject={calls}:signal=KILL:when={when}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            strace.wait(STEP_S)
        except subprocess.TimeoutExpired:
            strace.terminate()
            strace.wait()
            return None
        lines = [line for line in report.read_text(errors="replace").splitlines() if "(" in line]
        return _step(lines[-1]) if lines else None

    def _kill_service(self) -> Kill:
        """As by the kernel: the supervisor alone; whoever started it (systemd, here we) starts it again."""
        pid, is_over = self._service.pid, self._recovery("serve", self._service.pid)
        at = time.monotonic()
        self._service.kill()
        wait_for(lambda: not self._service.processes(), "every process died with the supervisor")
        self._service.start()
        return Kill("serve", "any time", pid, at, is_over)

    def _kill_postgres(self) -> Kill:
        assert self._postgres is not None
        pid, is_over = self._postgres.pid, self._recovery("postgres", self._postgres.pid)
        self._postgres.kill()
        time.sleep(self._chance.uniform(0, 2))

        def starts() -> bool:
            with contextlib.suppress(RuntimeError):  # what the killed one left behind is still there
                assert self._postgres is not None
                self._postgres.start()
                return True
            return False

        wait_for(starts, "PostgreSQL starts again", 60, 0.3)
        return Kill("postgres", "any time", pid, time.monotonic(), is_over)

    def _kill_backend(self) -> Kill | None:
        """One connection's process: PostgreSQL then ends all the others and recovers by itself."""
        assert self._postgres is not None
        connections = [
            pid for pid in children_of(self._postgres.pid) if b"test_" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        if not connections:
            return None
        pid = self._chance.choice(connections)
        is_over = self._recovery("backend", pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return Kill("backend", "any time", pid, time.monotonic(), is_over)

    # --- recovery ---

    def _pid(self, target: str) -> int:
        if target == "child":
            worker = self._service.process_now("worker")
            return next(iter(children_of(worker)), 0) if worker else 0
        return self._service.process_now(target)

    def _recovery(self, target: str, old_pid: int) -> Callable[[], bool]:
        """A question to ask until it says yes: is the part back, and is what waited for it at the kill done?"""
        waits = self._waiting(target)
        models = self._service.log_text().count("model_loaded") if target in ("worker", "child", "serve") else 0

        def is_back() -> bool:
            if target in ("postgres", "backend"):
                return self._database_answers()
            if target == "receive":
                return self._receives()
            if target == "serve" and not self._receives():
                return False
            if target in ("worker", "child", "serve"):
                return self._service.log_text().count("model_loaded") > models
            if target == "redis":
                return self._redis_answers()
            return self._pid(target) not in (0, old_pid) and self._holds_database(self._pid(target))

        def is_over() -> bool:
            try:
                return is_back() and not waits & self._waiting(target)
            except DBAPIError:
                return False

        return is_over

    def _waiting(self, target: str) -> set[tuple[str, int | str]]:
        """What the part has still to do right now, as far as it is on record."""
        found: set[tuple[str, int | str]] = set()
        everything = target in ("serve", "postgres", "backend")
        try:
            if target == "ingest" or everything:
                found |= {("incoming", path.name) for path in waiting(spool_folder(self._service.settings))}
            with self._service.sessions() as session:
                if target == "dispatch" or everything:
                    complete = (Study.state == StudyState.COMPLETE) & (Study.dispatched_revision < Study.revision)
                    found |= {("complete", study) for study in session.scalars(select(Study.id).where(complete))}
                if target in ("worker", "child", "redis") or everything:
                    running = Analysis.state == AnalysisState.RUNNING
                    rows = session.execute(select(Analysis.id, Analysis.fence).where(running))
                    found |= {("running", f"{analysis_id} fence {fence}") for analysis_id, fence in rows}
                if target == "deliver" or everything:
                    read = Analysis.state == AnalysisState.READ
                    found |= {("read", analysis) for analysis in session.scalars(select(Analysis.id).where(read))}
                    pending = Delivery.state == DeliveryState.PENDING
                    found |= {("pending", one) for one in session.scalars(select(Delivery.id).where(pending))}
        except DBAPIError:
            if self._postgres is None:
                raise
        return found

    def _look(self) -> None:
        """Put on record who has recovered, and who will not."""
        now = time.monotonic()
        for kill in list(self._open):
            if kill.is_over():
                kill.recovery_s = now - kill.at
                self._open.remove(kill)
            elif now - kill.at > GIVE_UP_S:
                self.outcome.broken.append(f"{kill.target} (killed: {kill.step}) is not back after {GIVE_UP_S:g} s")
                self._open.remove(kill)
        with contextlib.suppress(DBAPIError):
            self._backlog = unfinished(self._service.sessions)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))
            self._look()

    def _receives(self) -> bool:
        try:
            with socket.create_connection((LOOPBACK, self._service.port), timeout=2) as connection:
                connection.sendall(association_request(calling_ae="MODALITY"))
                return read_pdu(connection)[0] == A_ASSOCIATE_AC
        except (OSError, EOFError):
            return False

    def _redis_answers(self) -> bool:
        with self._service.redis() as client, contextlib.suppress(redis.RedisError):
            return bool(client.ping())
        return False

    def _database_answers(self) -> bool:
        with self._service.sessions() as session:
            return bool(session.scalar(text("SELECT 1")))

    def _holds_database(self, pid: int) -> bool:
        """It is past its imports, and has opened what it works on."""
        wanted = "socket:" if self._postgres else ".sqlite"
        with contextlib.suppress(OSError):
            return any(wanted in os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir())
        return False

    # --- the end ---

    def _check_so_far(self, load: Load) -> None:
        """Nothing that has its row is lost; what has none yet is looked at later."""
        with contextlib.suppress(DBAPIError):
            ledger = load.ledger.copy()
            with self._service.sessions() as session:
                known = set(session.scalars(select(Study.study_uid).where(Study.state == StudyState.COMPLETE)))
            fresh = {key: digest for key, digest in ledger.items() if key[0] in known and key not in self._checked}
            broken = list(lost_instances(fresh, self._service.sessions, spool_folder(self._service.settings)))
            self._checked |= set(fresh)
            self.outcome.broken += [line for line in broken if "on record: []" not in line]

    def _wait_for_rest(self, ledger: dict[tuple[str, str], str]) -> None:
        end = time.monotonic() + DRAIN_S
        while time.monotonic() < end:
            with contextlib.suppress(DBAPIError):
                if is_at_rest(self._service.sessions, ledger):
                    return
            self._pause(0.5)
        self.outcome.broken.append(f"the service is not at rest after {DRAIN_S:g} s; what is left is listed below")


def _step(line: str) -> str:
    """The name of the system call and where it went, out of a line of strace."""
    call = re.search(r"(\w+)\(", line)
    places = PLACES.findall(line)
    place = next((name for name in places[-1] if name), "") if places else ""
    return f"{call[1] if call else '?'} {place}".strip()


def table(outcome: Outcome) -> Iterator[str]:
    """A line for each part: kills at a step and at any time, recovery; then the steps that were hit."""
    by_target: dict[str, list[Kill]] = defaultdict(list)
    for kill in outcome.kills:
        by_target[kill.target].append(kill)
    yield f"{'part':10} {'kills':>5} {'at a step':>9} {'recovery s: median':>18} {'worst':>6}"
    for target, kills in sorted(by_target.items(), key=lambda item: -len(item[1])):
        times = [kill.recovery_s for kill in kills if kill.recovery_s is not None]
        at_step = sum(kill.step != "any time" for kill in kills)
        yield (
            f"{target:10} {len(kills):5} {at_step:9} {median(times) if times else 0:18.1f} {max(times, default=0):6.1f}"
        )
    for target, kills in by_target.items():
        steps: dict[str, int] = defaultdict(int)
        for kill in kills:
            steps[kill.step] += 1
        hit = ", ".join(f"{step} {count}" for step, count in sorted(steps.items()) if step != "any time")
        if hit:
            yield f"  {target}: {hit}"


def make_model(folder: Path, seed: int = 20261123) -> Path:
    """A tiny model with random weights; in a process of its own, because torch need not be in this one."""
    program = "import sys; from pathlib import Path; from workers.demo_model.random_weights import write; "
    program += "write(Path(sys.argv[1]), int(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", program, str(folder), str(seed)], check=True, capture_output=True)
    return folder


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run prove kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--postgres", action="store_true", help="PostgreSQL instead of SQLite, killed as well")
    parser.add_argument("--lease-s", type=float, default=15, help="[queue] lease_s; default as the service's")
    parser.add_argument("--recovery-s", type=float, default=30, help="the longest recovery that is good enough")
    parser.add_argument("--folder", type=Path, help="work here and keep everything; default: a temporary folder")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="medpruner-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    say(f"seed {options.seed}, {options.kills} kills, in {folder}")
    model = make_model(folder / "model")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(PostgresServer(folder / "postgres")) if options.postgres else None
        matrix = Matrix(folder, model, options.seed, postgres=server, lease_s=options.lease_s, say=say)
        outcome = matrix.run(options.kills)
    for line in table(outcome):
        say(line)
    say(
        f"{len(outcome.kills)} kills, {outcome.studies} studies of {outcome.instances} acknowledged instances, "
        f"{outcome.lost_connections} connections lost; worst recovery {outcome.worst_recovery_s:.1f} s"
    )
    late = [kill for kill in outcome.kills if (kill.recovery_s or 0) > options.recovery_s]
    for kill in late:
        say(f"LATE: {kill.target} ({kill.step}) took {kill.recovery_s:.1f} s, more than {options.recovery_s:g} s")
    for line in outcome.broken:
        say(f"BROKEN: {line}")
    if late or outcome.broken:
        say(f"everything is kept in {folder}")
        return 1
    say("every invariant holds")
    if options.folder is None:
        shutil.rmtree(folder)
    return 0
