"""SIGKILL of every process, at every step and at random times, while studies arrive: nothing acknowledged is lost.

`./run prove kills [--kills 500] [--apart 100] [--seed N] [--postgres]`. Half of the kills strike a process on its way
into a system call that changes something (fsync, rename, send, ...), which strace injects; the others strike
whenever they happen to. The first ones are apart: each waits until the recovery from the one before is over and few
studies wait. The others come in a burst, every second or so, and fall into each other's recovery.

Recovery is the time from the death of the process until its work goes on, which is all of this:
- it is there and answers: the receiver accepts an association, Redis answers PING, the database a SELECT, the worker's
  child has loaded its model, the others hold their database open;
- what waited for it when it died is done: receipts are in the rows (ingest), complete studies queued (dispatch),
  finished analyses built and delivered (deliver), what a worker was reading is claimed anew or closed, and what waited
  for a worker is claimed (worker, child, Redis); for the database and the whole service all of that;
- it did something that it had not done then: a sender got Success, a new instance is on record, a new analysis queued,
  one started, one more report delivered.
For the database and the whole service the time until somebody else starts them again is part of it.

Exit status 1 when an invariant is broken, or when a recovery from a kill that was left alone took more than 30 s.
"""

from __future__ import annotations

import argparse
import contextlib
import math
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import redis
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from service.shared.db import Analysis, AnalysisState, Delivery, DeliveryState, Instance, Study, StudyState
from service.shared.settings import Settings, spool_folder
from service.spool import waiting
from tests.prove.invariants import all_broken, ended, is_at_rest, lost_instances
from tests.prove.load import A_ASSOCIATE_AC, Load, read_pdu
from tests.receiving import association_request
from tests.running import Pacs, Service, Storescp, children_of
from tests.servers import LOOPBACK, PostgresServer, find_program, wait_for

AE_TITLES = ("CT1", "CT2", "MR1", "PACS")
SOURCES = "".join(f'[[source]]\nae_title = "{title}"\n' for title in AE_TITLES if title != "PACS")
BACKLOG = 30  # studies that may wait; beyond, the modalities rest
BACKLOG_APART = 6  # so few that none waits long for its turn
GIVE_UP_S = 600.0  # a part that is not back by then never comes back
STEP_S = 3.0  # for a process to reach the system call that kills it
CHECK_EVERY = 25  # kills
DRAIN_S = 600.0

ANY_TIME = "any time"

# How often each is chosen in a burst, relative to the others; a part is not killed again before it has recovered.
# Apart, each has its turn.
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
    "receive": "fsync,fdatasync,rename,unlink,write,pwrite64,sendto",
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
    """One kill, and how long it took until the work of what was killed went on."""

    target: str
    step: str  # the system call on whose way in it was, or ANY_TIME
    at: float  # time.monotonic()
    is_over: Callable[[], bool]
    apart: bool  # nothing else was killed before it was over
    recovery_s: float | None = None  # None: it was not over when it was given up


@dataclass(slots=True)
class Outcome:
    kills: list[Kill] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    studies: int = 0
    instances: int = 0
    lost_connections: int = 0

    def late(self, longest_s: float) -> list[Kill]:
        """Kills that were left alone, and yet took longer than that or for ever."""
        return [kill for kill in self.kills if kill.apart and (kill.recovery_s or math.inf) > longest_s]


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
        sweep_s: float = 0.3,
        ring_again_s: float = 2,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.outcome = Outcome()
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
            sweep_s=sweep_s,
            ring_again_s=ring_again_s,
            database=postgres.fresh_database() if postgres else "",
        )
        self._load = Load(
            self._service.port, AE_TITLES, seed, pause_s=0.8, may_begin=lambda: self._backlog < self._most_waiting
        )
        self._open: list[Kill] = []
        self._ended, self._most_waiting = 0, BACKLOG
        self._begun = time.monotonic()
        self._checked: set[tuple[str, str]] = set()
        self._targets = {
            name: weight for name, weight in TARGETS.items() if postgres or name not in ("postgres", "backend")
        }

    def run(self, kills: int, apart: int = 0) -> Outcome:
        """Kill that often, the first ones `apart`, let the work come to its end, and look at everything."""
        with self._pacs, self._service:
            self._service.wait_for_model()
            self._load.start()
            try:
                wait_for(lambda: self._load.ledger.finished >= 2, "the first studies are there", 60)
                self._kill_apart(apart)
                self._kill_in_a_burst(kills)
            finally:
                self._load.stop()
            ledger = self._load.ledger.copy()
            self._wait_for_rest(ledger)
            self.outcome.studies = self._load.ledger.finished
            self.outcome.instances = len(ledger)
            self.outcome.lost_connections = self._load.ledger.lost_connections
            self.outcome.broken += all_broken(
                ledger,
                self._service.sessions,
                spool=spool_folder(self._service.settings),
                data=self._service.settings.data.path,
                pacs=self._pacs.files(),
            )
            return self.outcome

    @property
    def _backlog(self) -> int:
        """Studies on their way, those included that are being sent: what was seen last may be a minute old."""
        return self._load.ledger.begun - self._ended

    # --- killing ---

    def _kill_apart(self, kills: int) -> None:
        """Every part in turn, in an order that chance makes anew each round."""
        self._most_waiting = BACKLOG_APART
        round_: list[str] = []
        while len(self.outcome.kills) < kills:
            self._pause(self._chance.uniform(0.05, 1.2))
            if not round_:
                round_ = self._chance.sample(list(self._targets), len(self._targets))
            end = time.monotonic() + GIVE_UP_S
            while self._backlog >= BACKLOG_APART:  # the modalities rest: nothing new would come to what is killed
                self._pause(0.2)
                assert time.monotonic() < end, f"{self._backlog} studies wait for {GIVE_UP_S:g} s already"
            if self._strike(round_.pop(), kills, apart=True):
                self._wait_for_recovery()

    def _kill_in_a_burst(self, kills: int) -> None:
        self._most_waiting = BACKLOG
        while len(self.outcome.kills) < kills:
            self._look()
            self._pause(self._chance.uniform(0.05, 1.2))
            free = {
                name: weight
                for name, weight in self._targets.items()
                if all(name != kill.target for kill in self._open) and not self._blocked(name)
            }
            if free:
                (target,) = self._chance.choices(list(free), list(free.values()))
                self._strike(target, kills, apart=False)
        self._wait_for_recovery()

    def _wait_for_recovery(self) -> None:
        while self._open:  # _look gives up what never recovers
            self._pause(0.2)

    def _blocked(self, target: str) -> bool:
        """The whole service is killed only while all of its parts stand, its parts only while it stands."""
        return bool(self._open) if target == "serve" else any(kill.target == "serve" for kill in self._open)

    def _strike(self, target: str, kills: int, *, apart: bool) -> bool:
        """Kill it and say now and then how far this is; False where there was nothing to kill."""
        before, done_before = self._waiting(target), self._done(target)
        models = self._service.log_text().count("model_loaded")
        pid = self._pid(target)
        struck = self._kill(target, self._one_of(target, pid))
        if struck is None:
            return False
        step, at = struck
        # Looked at again after its death: what it took up meanwhile is what it was in the middle of.
        waits, done = before | self._waiting(target), self._done(target) or done_before
        is_back = self._is_back(target, pid, models)

        def is_over() -> bool:
            try:
                return is_back() and not waits & self._waiting(target) and has_gone_on(done, self._done(target))
            except DBAPIError:
                return False

        self._open.append(Kill(target, step, at, is_over, apart))
        self.outcome.kills.append(self._open[-1])
        count = len(self.outcome.kills)
        if count % CHECK_EVERY == 0:
            self._check_so_far()
            self._say(
                f"{count} of {kills} kills, {time.monotonic() - self._begun:.0f} s; "
                f"{self._load.ledger.finished} studies sent, {self._backlog} wait; "
                f"worst recovery {max(kill.recovery_s or 0 for kill in self.outcome.kills):.1f} s; "
                f"{len(self.outcome.broken)} broken"
            )
        return True

    def _kill(self, target: str, pid: int) -> tuple[str, float] | None:
        """In which step it was killed, and when; None where there was nothing to kill."""
        if target == "serve":
            return self._kill_service()
        if target == "postgres":
            return self._kill_postgres()
        if target == "backend":
            return self._kill_backend()
        if not pid:
            return None
        step = self._kill_at_step(target, pid) if target in STEPS and self._chance.random() < 0.5 else None
        if step is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return step or ANY_TIME, time.monotonic()

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

    def _kill_service(self) -> tuple[str, float]:
        """As by the kernel: the supervisor alone; whoever started it (systemd, here we) starts it again."""
        at = time.monotonic()
        self._service.kill()
        wait_for(lambda: not self._service.processes(), "every process died with the supervisor")
        self._service.start()
        return ANY_TIME, at

    def _kill_postgres(self) -> tuple[str, float]:
        assert self._postgres is not None
        at = time.monotonic()
        self._postgres.kill()
        time.sleep(self._chance.uniform(0, 2))

        def starts() -> bool:
            with contextlib.suppress(RuntimeError):  # what the killed one left behind is still there
                assert self._postgres is not None
                self._postgres.start()
                return True
            return False

        wait_for(starts, "PostgreSQL starts again", 60, 0.3)
        return ANY_TIME, at

    def _kill_backend(self) -> tuple[str, float] | None:
        """One connection's process: PostgreSQL then ends all the others and recovers by itself."""
        assert self._postgres is not None
        connections = [
            pid for pid in children_of(self._postgres.pid) if b"test_" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        if not connections:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._chance.choice(connections), signal.SIGKILL)
        return ANY_TIME, time.monotonic()

    # --- recovery ---

    def _pid(self, target: str) -> int:
        if target == "child":
            worker = self._service.process_now("worker")
            return next(iter(children_of(worker)), 0) if worker else 0
        return 0 if target in ("serve", "postgres", "backend") else self._service.process_now(target)

    def _one_of(self, target: str, pid: int) -> int:
        """The receiver is several processes, and ends with any of them."""
        return self._chance.choice([pid, *children_of(pid)]) if target == "receive" and pid else pid

    def _is_back(self, target: str, old_pid: int, models: int) -> Callable[[], bool]:
        """Does it answer? models: how many were loaded before it died."""

        def is_back() -> bool:
            if target in ("postgres", "backend"):
                return self._database_answers()
            if target == "receive":
                return self._pid(target) not in (0, old_pid) and self._receives()
            if target == "serve" and not self._receives():
                return False
            if target in ("worker", "child", "serve"):
                return self._service.log_text().count("model_loaded") > models
            if target == "redis":
                return self._redis_answers()
            return self._pid(target) not in (0, old_pid) and self._holds_database(self._pid(target))

        return is_back

    def _done(self, target: str) -> dict[str, int]:
        """Counts of what the part has done so far; each grows with its next piece of work. {}: the database is away."""
        everything = target in ("serve", "postgres", "backend")
        counts = {
            "ingest": select(func.count()).select_from(Instance),
            "dispatch": select(func.count()).select_from(Analysis),
            "worker": select(func.coalesce(func.sum(Analysis.fence), 0)),  # how often one was claimed
            "deliver": select(func.count()).where(
                Delivery.state.in_([DeliveryState.DELIVERED, DeliveryState.COMMITTED])
            ),
        }
        wanted = "worker" if target in ("child", "redis") else target
        done = {"receive": self._load.ledger.successes} if everything or target == "receive" else {}
        try:
            with self._service.sessions() as session:
                return done | {
                    name: session.scalar(count) or 0 for name, count in counts.items() if everything or name == wanted
                }
        except DBAPIError:
            if self._postgres is None:
                raise
        return {}

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
                    queued = select(Analysis.id).where(Analysis.state == AnalysisState.QUEUED)
                    found |= {("queued", analysis_id) for analysis_id in session.scalars(queued)}
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
        for kill in list(self._open):
            if kill.is_over():
                kill.recovery_s = time.monotonic() - kill.at
                self._open.remove(kill)
                if kill.apart:
                    self._say(f"{kill.target} ({kill.step}) went on after {kill.recovery_s:.1f} s")
            elif time.monotonic() - kill.at > GIVE_UP_S:
                self.outcome.broken.append(f"{kill.target} (killed: {kill.step}) is not back after {GIVE_UP_S:g} s")
                self._open.remove(kill)
        with contextlib.suppress(DBAPIError):
            self._ended = ended(self._service.sessions)

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

    def _check_so_far(self) -> None:
        """Nothing that has its row is lost; what has none yet is looked at later."""
        with contextlib.suppress(DBAPIError):
            ledger = self._load.ledger.copy()
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


def has_gone_on(before: dict[str, int], now: dict[str, int]) -> bool:
    """Every count has grown; False while there is none."""
    return bool(now) and all(now[name] > count for name, count in before.items())


def table(outcome: Outcome) -> Iterator[str]:
    """Recovery by part, and by part and step, of the kills apart and of those in a burst."""
    for apart, title in (
        (True, "each left alone until it was over"),
        (False, "in a burst, into each other's recovery"),
    ):
        kills = [kill for kill in outcome.kills if kill.apart is apart]
        if kills:
            yield f"{len(kills)} kills, {title}; recovery in s"
            yield f"{'part':10} {'step':24} {'kills':>5} {'median':>6} {'95 %':>6} {'worst':>6}"
            yield _row("all", "", kills)
            yield from (_row(part, "", some) for (part,), some in _grouped(kills, lambda kill: (kill.target,)))
            yield from (
                _row(part, step, some) for (part, step), some in _grouped(kills, lambda kill: (kill.target, kill.step))
            )


def _grouped(kills: Iterable[Kill], key: Callable[[Kill], tuple[str, ...]]) -> list[tuple[tuple[str, ...], list[Kill]]]:
    groups: dict[tuple[str, ...], list[Kill]] = defaultdict(list)
    for kill in kills:
        groups[key(kill)].append(kill)
    return sorted(groups.items())


def _row(part: str, step: str, kills: Sequence[Kill]) -> str:
    """A recovery that was given up counts as endless."""
    times = sorted(math.inf if kill.recovery_s is None else kill.recovery_s for kill in kills)
    high = times[math.ceil(0.95 * len(times)) - 1]
    return f"{part:10} {step:24} {len(times):5} {median(times):6.1f} {high:6.1f} {times[-1]:6.1f}"


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
    defaults = Settings()
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--apart", type=int, default=100, help="of these, kills that wait for each other's recovery")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--postgres", action="store_true", help="PostgreSQL instead of SQLite, killed as well")
    parser.add_argument("--recovery-s", type=float, default=30, help="the longest recovery that is good enough")
    parser.add_argument("--folder", type=Path, help="work here and keep everything; default: a temporary folder")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="medpruner-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    say(f"seed {options.seed}, {options.kills} kills, {min(options.apart, options.kills)} of them apart, in {folder}")
    model = make_model(folder / "model")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(PostgresServer(folder / "postgres")) if options.postgres else None
        matrix = Matrix(
            folder,
            model,
            options.seed,
            postgres=server,
            lease_s=defaults.queue.lease_s,
            sweep_s=defaults.assembly.sweep_s,
            ring_again_s=defaults.queue.ring_again_s,
            say=say,
        )
        outcome = matrix.run(options.kills, min(options.apart, options.kills))
    for line in table(outcome):
        say(line)
    say(
        f"{len(outcome.kills)} kills, {outcome.studies} studies of {outcome.instances} acknowledged instances, "
        f"{outcome.lost_connections} connections lost"
    )
    late = outcome.late(options.recovery_s)
    for kill in late:
        took = "never" if kill.recovery_s is None else f"after {kill.recovery_s:.1f} s"
        say(f"LATE: {kill.target} ({kill.step}) went on {took}, more than {options.recovery_s:g} s after its death")
    for line in outcome.broken:
        say(f"BROKEN: {line}")
    if late or outcome.broken:
        say(f"everything is kept in {folder}")
        return 1
    say(
        "every invariant holds"
        + (f", every kill left alone was over within {options.recovery_s:g} s" * bool(options.apart))
    )
    if options.folder is None:
        shutil.rmtree(folder)
    return 0
