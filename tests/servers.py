"""Real servers for the tests: Redis, PostgreSQL, Orthanc and dcmtk's senders, each in a folder of its own.

Everything listens on loopback or on a unix socket, ends with the test process (setpriv --pdeathsig) and is
installed by `./run test`. A missing program is an error, never a skip.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import psycopg
import pydicom
import redis
from pydicom.dataset import FileDataset
from redis.backoff import NoBackoff
from redis.retry import Retry

LOOPBACK = "127.0.0.1"
SYSTEM_FOLDERS = ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/bin")

Value = TypeVar("Value")
Result = subprocess.CompletedProcess[str]  # a sender's exit status and what it said


class MissingProgram(Exception):
    """A server or tool that the tests need is not installed."""


class NotInTime(AssertionError):
    """What a test waited for did not happen."""


def find_program(name: str) -> str:
    """Path of a program of the system; raise MissingProgram.

    Only the system's folders: pynetdicom puts an `echoscu` and a `storescu` of its own into the virtual environment.
    """
    found = shutil.which(name, path=os.pathsep.join(SYSTEM_FOLDERS))
    if found is None:
        raise MissingProgram(f"{name} is not installed; `./run test` installs it (as root, on a Debian-like system)")
    return found


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def wait_for(find: Callable[[], Value], what: str, timeout_s: float = 30, pause_s: float = 0.05) -> Value:
    """Call `find` until it gives something true, and return that; raise NotInTime naming `what`."""
    end = time.monotonic() + timeout_s
    while True:
        value = find()
        if value:
            return value
        if time.monotonic() > end:
            raise NotInTime(f"not within {timeout_s:g} s: {what}; last seen: {value!r}")
        time.sleep(pause_s)


class Server:
    """A subprocess that is started, killed and started again on the same folder and ports."""

    def __init__(self, folder: Path, command: Sequence[str], *, user: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log = folder / "log.txt"
        self._command = [*_as_user(user), *command]
        self._process: subprocess.Popen[bytes] | None = None

    def is_ready(self) -> bool:
        """Does the server answer?"""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    def start(self) -> Self:
        """Start the server and return once it answers."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for(self._is_up, f"{self._command[-2:]} answers; its log: {self.log}")
        return self

    def kill(self) -> None:
        """End the server as a crash does (SIGKILL), whatever it is doing."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask the server to end; return when it has."""
        self._end(signal.SIGTERM)

    def restart(self) -> Self:
        """Start again after `kill` or `stop`, with the same data, on the same port."""
        self.stop()
        return self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()  # its folder is thrown away, and Orthanc takes seconds to end politely

    def _is_up(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"ended with {self._process.returncode}:\n{self.log.read_text(errors='replace')}")
        return self.is_ready()

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class RedisServer(Server):
    """Redis on a private unix socket, append-only, as the service's embedded one."""

    def __init__(self, folder: Path) -> None:
        # The address of a unix socket holds 107 bytes; pytest's folders are longer than that.
        self._socket_folder = tempfile.TemporaryDirectory(prefix="mp-", dir="/tmp")
        self.socket = Path(self._socket_folder.name) / "redis.sock"
        super().__init__(
            folder,
            [
                find_program("redis-server"),
                *("--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700"),
                *("--dir", str(folder), "--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction"),
            ],
        )

    @property
    def url(self) -> str:
        """As Celery and [queue] url want it."""
        return f"redis+socket://{self.socket}"

    def client(self) -> redis.Redis:
        """A client that does not try again by itself: the tests want to see a dead server at once."""
        return redis.Redis(unix_socket_path=str(self.socket), retry=Retry(NoBackoff(), 0))

    def is_ready(self) -> bool:
        with self.client() as client, contextlib.suppress(redis.RedisError):
            return bool(client.ping())
        return False

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._socket_folder.cleanup()


class PostgresServer(Server):
    """A PostgreSQL cluster of its own on a loopback port; fsync is off, its crash is not our subject."""

    def __init__(self, folder: Path) -> None:
        programs = _newest_postgres()
        self.port = free_port()
        # PostgreSQL refuses to run as root, and its user must reach the folder: not under pytest's, which are 0700.
        self._cluster = tempfile.TemporaryDirectory(prefix="mp-pg-", dir="/tmp", ignore_cleanup_errors=True)
        data = Path(self._cluster.name) / "data"
        if os.geteuid() == 0:
            shutil.chown(self._cluster.name, "postgres", "postgres")
        user = "postgres" if os.geteuid() == 0 else None
        subprocess.run(
            [
                *_as_user(user),
                str(programs / "initdb"),
                *("-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"),
            ],
            check=True,
            capture_output=True,
            cwd="/",
        )
        super().__init__(
            folder,
            [
                str(programs / "postgres"),
                *("-D", str(data), "-p", str(self.port), "-c", f"listen_addresses={LOOPBACK}"),
                *("-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "max_connections=100"),
            ],
            user=user,
        )
        self._databases = 0

    def is_ready(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError), self._connect():
            return True
        return False

    def stop(self) -> None:
        # SIGTERM waits for clients; SIGINT sends them away.
        self._end(signal.SIGINT)

    def fresh_database(self) -> str:
        """Make an empty database and return its SQLAlchemy URL."""
        self._databases += 1
        name = f"test_{self._databases}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://postgres@{LOOPBACK}:{self.port}/{name}"

    def drop(self, url: str) -> None:
        """Remove a database, whoever is connected to it."""
        name = url.rpartition("/")[2]
        with self._connect() as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def __exit__(self, *_: object) -> None:
        self.stop()  # a killed one leaves its children and shared memory behind for a while
        self._cluster.cleanup()

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host=LOOPBACK, port=self.port, user="postgres", dbname="postgres", autocommit=True, connect_timeout=5
        )


@dataclass(frozen=True)
class Modality:
    """A remote application entity as Orthanc knows it."""

    ae_title: str
    port: int
    host: str = LOOPBACK


class Orthanc(Server):
    """Orthanc as the PACS: receives by C-STORE, sends to its modalities, answers questions by its REST API.

    forward_to: the modality that every instance it receives is sent to at once, our own results included.
    modalities: by the name that `send_study` uses.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ae_title: str = "PACS",
        modalities: Mapping[str, Modality] | None = None,
        forward_to: str | None = None,
        overwrite: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.ae_title = ae_title
        self.port = free_port()
        self._http_port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "on-stored.lua"
        if forward_to is not None:
            script.write_text(
                "function OnStoredInstance(instance, tags, metadata, origin)\n"
                f"  SendToModality(instance, {json.dumps(forward_to)})\n"
                "end\n"
            )
        configuration = folder / "orthanc.json"
        content: dict[str, Any] = {
            "Name": "test PACS",
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "Plugins": [],
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "HttpPort": self._http_port,
            "DicomAet": ae_title,
            "DicomPort": self.port,
            "DicomCheckCalledAet": True,
            "UnknownSopClassAccepted": True,
            "DicomModalities": {
                name: {"AET": modality.ae_title, "Host": modality.host, "Port": modality.port}
                for name, modality in (modalities or {}).items()
            },
            "DicomScuTimeout": 30,
            "OverwriteInstances": overwrite,
            "StableAge": 1,
            "SaveJobs": False,
            "LuaScripts": [str(script)] if forward_to is not None else [],
        }
        configuration.write_text(json.dumps(content | dict(options or {}), indent=2))
        super().__init__(folder, [find_program("Orthanc"), str(configuration)])

    def is_ready(self) -> bool:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return bool(self.ask("GET", "/system"))
        return False

    def upload(self, file: Path | bytes) -> str:
        """Store a Part 10 file through the REST API (no association); return Orthanc's identifier of it."""
        content = file if isinstance(file, bytes) else file.read_bytes()
        return str(self.ask("POST", "/instances", content)["ID"])

    def upload_folder(self, folder: Path) -> list[str]:
        """Store every *.dcm under `folder`."""
        return [self.upload(path) for path in sorted(folder.rglob("*.dcm"))]

    def send_study(self, study_uid: str, to: str) -> None:
        """Send a study to one of the modalities by C-STORE and wait for the end; raise when one instance failed."""
        (study,) = self.find("Study", StudyInstanceUID=study_uid)
        answer = self.ask("POST", f"/modalities/{to}/store", {"Resources": [study], "Synchronous": True})
        if answer["FailedInstancesCount"]:
            raise AssertionError(f"{answer['FailedInstancesCount']} of {answer['InstancesCount']} instances failed")

    def find(self, level: str, **query: str) -> list[str]:
        """Orthanc's identifiers of what matches, for instance find("Instance", Modality="SR")."""
        return list(self.ask("POST", "/tools/find", {"Level": level, "Query": query}))

    def file(self, instance: str) -> bytes:
        """The Part 10 file of an instance, as Orthanc stored it."""
        return bytes(self.ask("GET", f"/instances/{instance}/file"))

    def dataset(self, instance: str) -> FileDataset:
        return pydicom.dcmread(io.BytesIO(self.file(instance)))

    def reports(self, **query: str) -> list[FileDataset]:
        """Every SR that has arrived and matches."""
        return [self.dataset(instance) for instance in self.find("Instance", Modality="SR", **query)]

    def wait_for_reports(self, count: int = 1, timeout_s: float = 60, **query: str) -> list[FileDataset]:
        """Wait until at least `count` SR have arrived."""
        what = f"{count} SR in {self.ae_title}"
        wait_for(lambda: len(self.find("Instance", Modality="SR", **query)) >= count, what, timeout_s, 0.2)
        return self.reports(**query)

    def delete_all(self) -> None:
        for study in self.find("Study"):
            self.ask("DELETE", f"/studies/{study}")

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request to the REST API; JSON answers come back as values, others as bytes."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{LOOPBACK}:{self._http_port}{path}", content, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            received = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
        return json.loads(received) if is_json else received


# --- dcmtk's senders -----------------------------------------------------------------------------------


def echoscu(port: int, *, called: str, calling: str = "PACS", options: Sequence[str] = ()) -> Result:
    """C-ECHO to loopback."""
    return _dcmtk("echoscu", "-v", "-aet", calling, "-aec", called, *options, LOOPBACK, str(port))


def storescu(
    paths: Sequence[Path], port: int, *, called: str, calling: str = "PACS", options: Sequence[str] = ()
) -> Result:
    """C-STORE of files (folders: recursively) with storescu; compressed ones need their option, such as -xv."""
    return _dcmtk(
        *("storescu", "-v", "-aet", calling, "-aec", called, "+sd", "+r", *options, LOOPBACK, str(port)),
        *map(str, paths),
    )


def dcmsend(
    paths: Sequence[Path], port: int, *, called: str, calling: str = "PACS", options: Sequence[str] = ()
) -> Result:
    """C-STORE of files (folders: recursively) with dcmsend, in the transfer syntaxes that the files have."""
    return _dcmtk(
        *("dcmsend", "-v", "-aet", calling, "-aec", called, "+sd", "+r", "--decompress-never", *options),
        *(LOOPBACK, str(port), *map(str, paths)),
    )


def _dcmtk(name: str, *arguments: str) -> Result:
    return subprocess.run(
        [find_program(name), *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=100,
        # Without it every answer waits for the delayed acknowledgement, about 40 ms an instance.
        env={**os.environ, "TCP_NODELAY": "1"},
    )


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Start servers in order; end them in reverse order."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        yield


def _as_user(user: str | None) -> list[str]:
    """The command prefix that ends a server with its parent and drops root where the server refuses it."""
    identity = ["--reuid", user, "--regid", user, "--clear-groups"] if user else []
    return [find_program("setpriv"), *identity, "--pdeathsig", "KILL", "--"]


def _newest_postgres() -> Path:
    folders = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    found = sorted((path.parent for path in folders), key=lambda folder: float(folder.parent.name))
    if not found:
        raise MissingProgram("postgresql is not installed; `./run test` installs it (as root, on a Debian-like system)")
    return found[-1]
