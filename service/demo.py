"""`./run demo`: the whole way on this machine: a stand-in PACS, a real CT, a phantom with known findings, reports."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

from pydicom import dcmread
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at import from a table
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from service import history
from service.report.readable import readable
from service.sender import CannotSend, dicom_files, send_study
from service.shared.db import Role, open_engine, open_sessions
from service.shared.durable import write_durably
from service.shared.settings import Settings, database_url, load
from service.web import accounts

PROJECT = Path(__file__).resolve().parent.parent
EXAMPLE = PROJECT / "tests" / "data" / "real-ct" / "body-siemens"
PHANTOM_SEED = 19  # a nodule, an effusion and more; chosen by its findings, not by how well it is read
FOLDER = PROJECT / "var" / "demo"
MARK = "made-by-medpruner-demo"  # only a folder with this file in it is cleared
LIMIT_S = 600.0
FINAL = ("done", "refused", "failed", "cancelled", "superseded")

CONFIGURATION = """\
# Written by `./run demo`, anew each time.
[data]
path = "{folder}/data"
[scp]
port = {port}
accept_unknown_sources = true
[spool]
min_free_gb = 0.5
[assembly]
quiet_period_s = 2
sweep_s = 0.5
[model]
max_new_tokens = 128
[web]
port = {web_port}
[[route]]
name = "default"
companions = ["sc", "seg"]
[[destination]]
name = "stand-in-pacs"
ae_title = "STANDINPACS"
host = "127.0.0.1"
port = {pacs_port}
"""


@dataclass(frozen=True, slots=True)
class Phantom:
    """A computed CT on its way to disk, and what is in it."""

    folder: Path
    process: subprocess.Popen[bytes]

    def ready(self) -> Path:
        """The folder with the series, once it is written."""
        if self.process.wait(timeout=LIMIT_S):
            raise DemoFailed("the phantom could not be made; its log is beside that of the service")
        return self.folder

    @property
    def truth(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.folder.with_name(f"{self.folder.name}.truth.json").read_text())
        return found


class DemoFailed(Exception):
    """The way broke off; the message says where."""


@dataclass(frozen=True, slots=True)
class StandInPacs:
    """What came back, in order of arrival."""

    port: int
    folder: Path

    def received(self) -> list[Path]:
        return sorted(self.folder.glob("*.dcm"), key=lambda path: path.stat().st_mtime_ns)


def run_demo(study: Path | None, *, stay: bool, console: Console, stop: Event) -> int:
    """Run it and return the exit status: 0 only when a report on each study came back to the stand-in PACS.

    Without `study`: the example CT of a person, and a phantom with known findings beside it.
    """
    _fresh_folder()
    with _phantom(wanted=study is None, console=console) as phantom, _stand_in_pacs(FOLDER / "pacs") as pacs:
        port = _free_port()
        config = FOLDER / "config.toml"
        places = {"folder": FOLDER, "port": port, "pacs_port": pacs.port, "web_port": _free_port()}
        config.write_text(CONFIGURATION.format(**places), encoding="utf-8")
        settings = load(config, {})
        with _service(config, console) as service:
            try:
                _send(study or EXAMPLE, settings, service, console)
                if phantom is not None:
                    _send(phantom.ready(), settings, service, console)
                stories = _follow(settings, service, 1 if phantom is None else 2, console, stop)
                well = _tell(stories, pacs, phantom, config, console)
            except (DemoFailed, CannotSend) as error:
                console.print(f"[red]{error}[/]", highlight=False)
                console.print(f"The log of the service: {FOLDER / 'service.log'}", markup=False, highlight=False)
                return 1
            if stay:
                address = f"http://127.0.0.1:{settings.web.port}"
                console.print(f"Dashboard: {address}  user demo, password {_make_user(settings)}", highlight=False)
                console.print(f"Up until Ctrl-C: send studies to {settings.scp.ae_title} at 127.0.0.1:{port}.")
                stop.wait()
    return 0 if well else 1


def _fresh_folder() -> None:
    if FOLDER.exists():
        if not (FOLDER / MARK).exists():
            raise SystemExit(f"{FOLDER} is not the demo's own; move it away")
        shutil.rmtree(FOLDER)
    FOLDER.mkdir(parents=True, mode=0o700)
    (FOLDER / MARK).touch()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _phantom(*, wanted: bool, console: Console) -> Iterator[Phantom | None]:
    """Have a phantom made while the service starts."""
    if not wanted:
        yield None
        return
    folder = FOLDER / "phantom"
    command = ["-m", "workers", "phantom", "--seed", str(PHANTOM_SEED), "--out", str(folder)]
    console.print(
        f"[bold]0.[/] computing a chest CT with known findings: ./run phantom --seed {PHANTOM_SEED} --out {folder}",
        highlight=False,
        soft_wrap=True,
    )
    with (FOLDER / "phantom.log").open("wb") as stream:
        process = subprocess.Popen([sys.executable, *command], cwd=PROJECT, stdout=stream, stderr=stream)
    try:
        yield Phantom(folder, process)
    finally:
        process.kill()
        process.wait()


@contextmanager
def _stand_in_pacs(folder: Path) -> Iterator[StandInPacs]:
    """A real C-STORE SCP on loopback that keeps what it gets."""
    folder.mkdir(mode=0o700)

    def keep(event: evt.Event) -> int:
        uid = event.file_meta.MediaStorageSOPInstanceUID
        write_durably(folder / f"{uid}.dcm", event.encoded_dataset())
        return 0x0000

    application = AE(ae_title="STANDINPACS")
    for context in AllStoragePresentationContexts:
        application.add_supported_context(context.abstract_syntax or "")
    application.add_supported_context(Verification)
    server = application.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)])
    if server is None:
        raise DemoFailed("the stand-in PACS could not start")
    try:
        yield StandInPacs(int(server.server_address[1]), folder)
    finally:
        server.shutdown()


@contextmanager
def _service(config: Path, console: Console) -> Iterator[subprocess.Popen[bytes]]:
    """The real service as a user starts it, its log in a file."""
    console.print("[bold]1.[/] starting receiver, embedded queue, SQLite, dispatcher, deliverer and one worker")
    log = FOLDER / "service.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MEDPRUNER__")}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve", "--config", str(config)],
            cwd=PROJECT,
            stdout=stream,
            stderr=stream,
            env=environment,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def _send(folder: Path, settings: Settings, service: subprocess.Popen[bytes], console: Console) -> None:
    if not dicom_files(folder):
        raise CannotSend(f"{folder}: no DICOM files (Part 10, with the DICM prefix) in it")
    deadline = time.monotonic() + LIMIT_S
    while not _listens(settings.scp.port):
        if service.poll() is not None or time.monotonic() > deadline:
            raise DemoFailed("the receiver did not come up")
        time.sleep(0.1)
    console.print(f"[bold]2.[/] sending {folder} to {settings.scp.ae_title} by C-STORE", highlight=False)
    sent = send_study(
        folder,
        host="127.0.0.1",
        port=settings.scp.port,
        called_ae=settings.scp.ae_title,
        calling_ae="DEMOSENDER",
    )
    stored = sum(one.stored for one in sent)
    console.print(f"   {stored} of {len(sent)} instances acknowledged: each is durable on disk by now", highlight=False)
    if not stored:
        raise DemoFailed("the receiver stored nothing")


def _make_user(settings: Settings) -> str:
    """A user of this demonstration alone; the password is new each time."""
    password = secrets.token_urlsafe(12)
    with open_sessions(open_engine(database_url(settings))).begin() as session:
        accounts.add_user(session, "demo", password, Role.OPERATOR, now=datetime.now(UTC), actor="demo")
    return password


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _follow(
    settings: Settings, service: subprocess.Popen[bytes], studies: int, console: Console, stop: Event
) -> list[dict[str, Any]]:
    """Print every event as it is audited, until the analysis of each study has its end and its results are delivered.

    Returns the stories of the studies, in the order in which they came.
    """
    sessions = open_sessions(open_engine(database_url(settings)))
    console.print("[bold]3.[/] what the audit records meanwhile:")
    told: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT_S
    while not stop.is_set() and time.monotonic() < deadline:
        if service.poll() is not None:
            raise DemoFailed("the service ended")
        try:
            with sessions() as session:
                rows = reversed(history.recent(session, limit=studies))
                stories = [history.study_story(session, history.study_named(session, row["study_uid"])) for row in rows]
        except DBAPIError:  # not created yet
            stories = []
        for number, story in enumerate(stories, 1):
            for event in story["events"][told.get(number, 0) :]:
                detail = ", ".join(f"{key} {value}" for key, value in event["detail"].items() if "sha256" not in key)
                line = f"   {event['at']:%H:%M:%S} study {number}  {event['kind']:<20} {detail}"
                console.print(line, markup=False, highlight=False)
            told[number] = len(story["events"])
        if len(stories) == studies and all(map(_is_over, stories)):
            return stories
        time.sleep(0.2)
    raise DemoFailed("interrupted" if stop.is_set() else f"no report within {LIMIT_S:g} s")


def _is_over(story: dict[str, Any]) -> bool:
    analyses = story.get("analyses", [])
    if not analyses or any(one["state"] not in FINAL for one in analyses):
        return False
    deliveries = [one for analysis in analyses for result in analysis["results"] for one in result["deliveries"]]
    return all(one["state"] != "pending" for one in deliveries)


def _tell(
    stories: list[dict[str, Any]], pacs: StandInPacs, phantom: Phantom | None, config: Path, console: Console
) -> bool:
    """The reports as the PACS got them, and where to look further; whether there is one on each study."""
    reports = [(path, dataset) for path in pacs.received() if (dataset := dcmread(path)).Modality == "SR"]
    well = True
    for story in stories:
        for analysis in story["analyses"]:
            if analysis["state"] == "refused":
                console.print(f"[magenta]Not analysed:[/] {analysis['reason']}", highlight=False)
        own = [(path, found) for path, found in reports if found.StudyInstanceUID == story["study"]["study_uid"]]
        well = well and bool(own)
        for path, dataset in own:
            console.print(Panel(readable(dataset), title="the Structured Report, as the PACS received it"))
            console.print(f"It lies in {path}", markup=False, highlight=False, soft_wrap=True)
    if phantom is not None:
        console.print(_beside(phantom.truth["report"], stories[-1]))
    study = stories[-1]["study"]["id"]
    relative = shlex.quote(os.path.relpath(config))
    console.print(
        f"Look further:  ./run show {study} --config {relative}\n"
        f"               ./run history --config {relative}\n"
        "               ./run demo --stay keeps it up, with a dashboard\n"
        "Research software, not a medical device; not for diagnosis.",
        markup=False,
        highlight=False,
    )
    return well


def _beside(truth: str, story: dict[str, Any]) -> Table:
    """What is in the phantom, and what the model wrote of it."""
    table = Table(title=f"the phantom (seed {PHANTOM_SEED}): truth and report, not from a patient")
    table.add_column("what was put into it")
    table.add_column("what the model wrote")
    said = story["analyses"][-1]["report"] or {}
    written = "\n".join(
        f"{section.title()}: {said[section]}" for section in ("findings", "impression") if said.get(section)
    )
    table.add_row(Text(truth), Text(written or "no report"))
    return table
