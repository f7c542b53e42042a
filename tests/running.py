"""The whole service as a user starts it, with short periods, and a PACS of dcmtk that keeps what it gets.

What a test starts here ends with the test: every process carries a mark in its environment and is looked for by it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import redis
from pydicom import dcmread
from pydicom.dataset import FileDataset
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from service import history
from service.shared import schema
from service.shared.db import open_engine, open_sessions
from service.shared.queue import embedded_socket
from service.shared.settings import Settings, database_url, load
from tests.servers import LOOPBACK, Server, dcmsend, find_program, free_port, wait_for

PROJECT = Path(__file__).resolve().parent.parent
FINAL = frozenset({"done", "refused", "failed", "cancelled", "superseded"})
SENDER = "MODALITY"  # the calling AE title that every service here takes studies from
MARK = "MEDPRUNER_E2E"  # in the environment of every process that a test started
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")  # also when the test run is killed
PATIENCE_S = 180  # for one study on two busy cores; a test that waits so long has failed

Value = TypeVar("Value")
Story = dict[str, Any]

# Every period is short, so that seconds decide what takes minutes in a hospital.
CONFIGURATION = """\
[data]
path = "{folder}/data"
[scp]
port = {port}
[[source]]
ae_title = "MODALITY"
[[source]]
ae_title = "PACS"
[spool]
{spool}
min_free_gb = {min_free_gb}
[assembly]
quiet_period_s = {quiet_period_s}
sweep_s = {sweep_s}
[queue]
{queue}
lease_s = {lease_s}
ring_again_s = {ring_again_s}
[database]
{database}
[model]
path = "{model}"
max_new_tokens = {max_new_tokens}
threads = 1
[web]
{web}
[log]
level = "{level}"
"""

DESTINATION = """\
[[destination]]
name = "{name}"
ae_title = "{ae_title}"
host = "127.0.0.1"
port = {port}
timeout_s = 10
retry_delay_s = 0.5
retry_max_delay_s = 1
"""


@dataclass(frozen=True)
class Pacs:
    """A [[destination]]."""

    port: int
    name: str = "pacs"
    ae_title: str = "PACS"

    def as_configuration(self) -> str:
        return DESTINATION.format(name=self.name, ae_title=self.ae_title, port=self.port)


class Storescp(Server):
    """dcmtk's storescp as the PACS: every instance that arrives is a file of its own, its data set bit for bit."""

    def __init__(self, folder: Path, ae_title: str = "PACS") -> None:
        self.port = free_port()
        self.ae_title = ae_title
        self.store = folder / "store"
        self.store.mkdir(parents=True, exist_ok=True)
        super().__init__(
            folder,
            [
                find_program("storescp"),
                *("-v", "-aet", ae_title, "--bit-preserving", "--unique-filenames", "-od", str(self.store)),
                str(self.port),
            ],
        )

    def is_ready(self) -> bool:
        return listens(self.port)

    def files(self) -> list[Path]:
        """Everything that arrived, in order of arrival; an instance that was sent twice is there twice."""
        return sorted(self.store.iterdir(), key=lambda path: path.stat().st_mtime_ns)

    def reports(self, study_uid: str) -> list[FileDataset]:
        """Every SR of this study, in order of arrival."""
        # storescp writes under the final name: a file that is still short is left for the next look
        found = []
        for path in self.files():
            with contextlib.suppress(EOFError, OSError, ValueError, AttributeError):
                dataset = dcmread(path)
                if dataset.Modality == "SR" and dataset.StudyInstanceUID == study_uid and "ContentSequence" in dataset:
                    found.append(dataset)
        return found

    def report_uids(self, study_uid: str) -> set[str]:
        """The distinct SOP Instance UIDs among them."""
        return {str(dataset.SOPInstanceUID) for dataset in self.reports(study_uid)}

    def wait_for_reports(self, study_uid: str, count: int = 1) -> list[FileDataset]:
        """Wait until `count` distinct reports of the study have arrived."""
        wait_for(lambda: len(self.report_uids(study_uid)) >= count, f"{count} SR at {self.ae_title}", PATIENCE_S)
        return self.reports(study_uid)


class Service:
    """`python -m service serve --config FILE` as a subprocess, and what a test wants to know of it."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        pacs: Sequence[Pacs] = (),
        more: str = "",
        max_new_tokens: int = 12,
        quiet_period_s: float = 1.5,
        queue_url: str = "",
        database: str = "",
        spool: Path | None = None,
        min_free_gb: float = 0.01,
        lease_s: float = 5,
        sweep_s: float = 0.3,
        ring_again_s: float = 2,
        level: str = "INFO",
        port: int = 0,
        web_port: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = port or free_port()
        self.config = folder / "config.toml"
        self.log = folder / "service.log"
        content = CONFIGURATION.format(
            folder=folder,
            port=self.port,
            model=model,
            max_new_tokens=max_new_tokens,
            quiet_period_s=quiet_period_s,
            queue=f'url = "{queue_url}"' if queue_url else "",
            database=f'url = "{database}"' if database else "",
            spool=f'path = "{spool}"' if spool else "",
            min_free_gb=min_free_gb,
            lease_s=lease_s,
            sweep_s=sweep_s,
            ring_again_s=ring_again_s,
            level=level,
            web=f"port = {web_port}" if web_port else "enabled = false",
        )
        self.config.write_text(content + "".join(one.as_configuration() for one in pacs) + more)
        self._mark = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self._more: list[subprocess.Popen[bytes]] = []  # workers beside its own

    @cached_property
    def settings(self) -> Settings:
        return load(self.config, {})

    @cached_property
    def _engine(self) -> Engine:
        return open_engine(database_url(self.settings))

    @cached_property
    def sessions(self) -> sessionmaker[Session]:
        """Sessions on the database of the service."""
        return open_sessions(self._engine)

    # --- life ---

    def start(self, *, with_database: bool = True) -> Self:
        """Start it and return once the receiver listens and the database is there."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*DIES_WITH_US, sys.executable, "-m", "service", "serve", "--config", str(self.config)],
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
            )
        is_up = self.is_up if with_database else self._listens
        wait_for(is_up, f"the service listens; its log: {self.log}", PATIENCE_S)
        return self

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        if self._process is None:
            raise RuntimeError("the service is not running")
        return self._process.pid

    def stop(self) -> int:
        """SIGTERM; return the exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.terminate()
        return process.wait(PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL of the supervisor alone, as a crash; what becomes of its children is the service's own affair."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self.kill()
        finally:
            self._engine.dispose()
            self.clear_away()

    def clear_away(self) -> None:
        """End every process that was started for this service and is still there, in whatever way it got away."""

        def none_left() -> bool:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not self.processes()

        wait_for(none_left, "no process of the service is left")
        for process in self._more:
            process.wait()

    # --- its processes ---

    def processes(self) -> list[int]:
        """Every living process that carries this service's mark, wherever it stands in the tree."""
        wanted = f"{MARK}={self._mark}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile
                if wanted in (folder / "environ").read_bytes().split(b"\0") and not _is_zombie(folder):
                    found.append(int(folder.name))
        return found

    def process(self, name: str) -> int:
        """The process id of `receive`, `ingest`, `dispatch`, `deliver`, `worker` or `redis`; waits for a new one."""
        return wait_for(lambda: self.process_now(name), f"a process {name}", PATIENCE_S)

    def worker_child(self) -> int:
        """The child that holds the model."""
        worker = self.process("worker")
        return wait_for(lambda: next(iter(children_of(worker)), 0), "a child of the worker", PATIENCE_S)

    def kill_process(self, name: str) -> None:
        """SIGKILL of one process; returns when another one has taken its place."""
        pid = self.process(name)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: self.process_now(name) not in (0, pid), f"another {name} process", PATIENCE_S)

    def start_worker(self) -> None:
        """One more worker beside the service's own, which writes to the same log; returns once its model is loaded."""
        loaded = self.log_text().count("model_loaded")
        with self.log.open("ab") as log:
            self._more.append(
                subprocess.Popen(
                    [*DIES_WITH_US, sys.executable, "-m", "workers", "worker", "--config", str(self.config)],
                    cwd=PROJECT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                )
            )
        wait_for(lambda: self.log_text().count("model_loaded") > loaded, "one more loaded model", PATIENCE_S)

    def process_now(self, name: str) -> int:
        """The process id right now; 0 while there is none."""
        for pid in children_of(self.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if name in words or f"service.{name}" in words or (name == "redis" and "redis-server" in words[0]):
                    return pid
        return 0

    def wait_for_model(self) -> None:
        """Until the worker's child has loaded its model at least once."""
        wait_for(lambda: "model_loaded" in self.log_text(), "a loaded model", PATIENCE_S)

    # --- what it says ---

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def cli(self, *words: str, status: int = 0) -> str:
        """Run a command of the service and return what it printed; it must exit with `status`."""
        done = subprocess.run(
            [sys.executable, "-m", "service", *words, "--config", str(self.config)],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env=self._environment(),
        )
        assert done.returncode == status, done.stderr
        return done.stdout

    def show(self, study_uid: str) -> Story:
        """`show STUDY --json`, as a person would ask."""
        return dict(json.loads(self.cli("show", study_uid, "--json")))

    def story(self, study_uid: str) -> Story:
        """The same from the database, cheap enough to ask again and again; empty while there is no such study."""
        with self.sessions() as session:
            try:
                return history.study_story(session, history.study_named(session, study_uid))
            except history.NotFound:
                return {}

    def wait_for(
        self, study_uid: str, holds: Callable[[Story], object], what: str, timeout_s: float = PATIENCE_S
    ) -> Story:
        """Wait until what is on record about the study fulfils `holds`; return it."""

        def look() -> Story:
            story = self.story(study_uid)
            return story if story and holds(story) else {}

        try:
            return wait_for(look, what, timeout_s, 0.1)
        except AssertionError as error:
            told = json.dumps(self.story(study_uid), indent=1, default=str)
            raise AssertionError(f"{error}\n{told}\n{self.log_text()[-6000:]}") from None

    def wait_for_end(self, study_uid: str, analyses: int = 1) -> Story:
        """Wait until there are that many analyses and all have their final state, and nothing waits for delivery."""
        return self.wait_for(
            study_uid,
            lambda story: (
                len(story["analyses"]) >= analyses
                and all(one["state"] in FINAL for one in story["analyses"])
                and all(one["state"] != "pending" for one in deliveries(story))
            ),
            f"{analyses} finished analyses",
        )

    # --- its parts ---

    def redis(self) -> redis.Redis:
        """A client of the embedded Redis."""
        path = embedded_socket(self.settings.data.path)
        return redis.Redis(unix_socket_path=str(path), retry=Retry(NoBackoff(), 0))

    def outbox(self, result: dict[str, Any]) -> bytes:
        """The stored content of a result."""
        return (self.settings.data.path / result["path"]).read_bytes()

    def _environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MEDPRUNER")}
        return kept | {MARK: self._mark, "OMP_NUM_THREADS": "1"}

    def _listens(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"ended with {self._process.returncode}:\n{self.log_text()}")
        return listens(self.port)

    def is_up(self) -> bool:
        """The receiver listens, and the database is there and of this version."""
        if not self._listens():
            return False
        with contextlib.suppress(DBAPIError):
            return schema.is_current(self._engine)
        return False


# --- small things ----------------------------------------------------------------------------------------------------


def send(service: Service, *paths: Path) -> None:
    """Send files or folders to the service as a modality would; every instance must be acknowledged.

    A receiver that was killed by the test before needs seconds to listen again; a modality would try again too.
    """
    wait_for(lambda: listens(service.port), f"the receiver listens; its log: {service.log}", PATIENCE_S)
    sent = dcmsend(paths, service.port, called="MEDPRUNER", calling=SENDER)
    assert sent.returncode == 0, sent.stdout + sent.stderr


def deliveries(story: Story) -> Iterator[dict[str, Any]]:
    for analysis in story.get("analyses", ()):
        for result in analysis["results"]:
            yield from result["deliveries"]


def kinds(story: Story) -> list[str]:
    """The kinds of the study's audit events, in order."""
    return [event["kind"] for event in story["events"]]


def children_of(pid: int) -> list[int]:
    """The living children of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if _status(folder)[1] == str(pid) and not _is_zombie(folder):
                found.append(int(folder.name))
    return sorted(found)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def data_set_of(content: bytes) -> bytes:
    """What follows the file meta information of a Part 10 file (PS3.10 7.1)."""
    assert content[128:132] == b"DICM"
    (length,) = struct.unpack("<L", content[140:144])
    return content[144 + length :]


def _status(process: Path) -> list[str]:
    """state and parent: proc(5), the fields after the command in brackets."""
    return (process / "stat").read_text().rpartition(")")[2].split()


def _is_zombie(process: Path) -> bool:
    return _status(process)[0] == "Z"
