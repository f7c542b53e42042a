"""The facts that the doctor judges: ports, disks, servers, files and clock are looked at here, and nothing is decided.

Every probe ends in bounded time and raises nothing: what cannot be found out is a fact too.
"""

from __future__ import annotations

import ctypes
import hashlib
import ipaddress
import json
import os
import shutil
import socket
import ssl
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from service import commitment_requests, doctor, refusals, requestor, situation
from service.certificates import CertificateError, fit_together, server_context
from service.doctor import Broker, Clock, Database, Disk, Finding, Model, Port, Seen
from service.report import typeface
from service.shared import heartbeat, schema
from service.shared.db import open_engine, open_sessions
from service.shared.queue import broker_url
from service.shared.settings import DestinationSettings, Settings, SourceSettings, database_url, spool_folder

TIMEOUT_S = 5.0
FLUSHES = 7
FLUSHED_BYTES = 65_536
MOST_HASHED_BYTES = 2_000_000_000
MOST_KEYS = 2_000
SOCKET_SCHEME = "redis+socket://"
DEMONSTRATION = Path(__file__).resolve().parents[1] / "workers" / "demo_model" / "weights"
OURS = ("_kombu", "unacked", "celery")  # how Celery's names begin


def examine(settings: Settings, now: datetime) -> Iterator[Finding]:
    """Everything, in the order in which one would look; each finding as soon as it is there."""
    yield from doctor.configuration(settings)
    yield from _receivers(settings)
    if settings.web.enabled:
        where = f"{settings.web.host}:{settings.web.port}"
        yield doctor.web(_web(settings), where)
    found, standing, workers = _database(settings, now)
    for one in settings.destination:
        well, said = requestor.echo(one.model_copy(update={"timeout_s": min(one.timeout_s, TIMEOUT_S)}), settings.scp)
        waiting = standing.deliveries.get((one.name, "pending")) if standing else None
        yield doctor.destination(
            one.name,
            well=well,
            said=said,
            paused=standing is not None and one.name in standing.paused,
            waiting=waiting.count if waiting else 0,
        )
    yield from doctor.certificates(situation.certificates(settings, now))
    for name, folder in (("spool", spool_folder(settings)), ("data", settings.data.path)):
        yield from doctor.disk(name, disk(folder), min_free_gb=settings.spool.min_free_gb)
    yield from doctor.broker(broker(settings))
    yield from doctor.database(found, standing)
    yield from doctor.seen_workers(workers)
    yield from doctor.model(model(settings), workers or ())
    yield from doctor.fonts(settings, typeface.missing_packages())
    yield from doctor.commitment(_untold(settings), now)
    yield doctor.clock(clock())
    yield from doctor.refused(refusals.recent(spool_folder(settings), doctor.last_day(now)))


# --- network --------------------------------------------------------------------------------------------------------


def ourselves(settings: Settings) -> list[DestinationSettings]:
    """Each port of our own receiver as a destination, called by a source that may call from this machine.

    With TLS the one certificate that is trusted is [scp] tls_certificate, so what answers is ours and has loaded it.
    """
    scp, found = settings.scp, []
    fields = {
        "ae_title": scp.ae_title,
        "host": reachable(scp.host),
        "calling_ae_title": local_source(settings) or scp.ae_title,
        "timeout_s": TIMEOUT_S,
    }
    if scp.port or scp.tls_port is None:
        found.append({"name": "ourselves", "port": scp.port or 1})
    if scp.tls_port is not None:
        shown = {} if scp.tls_ca is None else {"tls_certificate": scp.tls_certificate, "tls_key": scp.tls_key}
        tls = {"tls": True, "tls_ca": scp.tls_certificate, "tls_minimum": scp.tls_minimum, "tls_verify_host": False}
        found.append({"name": "ourselves-tls", "port": scp.tls_port} | tls | shown)
    return [DestinationSettings.model_validate(fields | one) for one in found]


def local_source(settings: Settings) -> str | None:
    """A title under which this machine may call its own receiver."""
    for source in settings.source:
        if _may_be_local(source):
            return source.ae_title
    return "DOCTOR" if settings.scp.accept_unknown_sources else None


def _may_be_local(source: SourceSettings) -> bool:
    if source.host is None or source.host == "localhost":
        return True
    try:
        return ipaddress.ip_address("127.0.0.1") in ipaddress.ip_network(source.host, strict=False)
    except ValueError:  # a name; it may well be ours, but that is not known
        return False


def reachable(host: str) -> str:
    """Where to call a server that listens on every address."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def _receivers(settings: Settings) -> Iterator[Finding]:
    calling = local_source(settings)
    for us in ourselves(settings):
        hindrance = "" if calling else "every [[source]] is bound to another host"
        try:
            if us.tls and not hindrance and not _lets_us_in(settings, us):
                hindrance = "[scp] tls_ca does not vouch for [scp] tls_certificate as a sender's"
        except CertificateError as error:  # with these files it cannot have started either
            yield doctor.receiver(Port(listens=True, ours=False, said=str(error)), us, calling=calling)
            continue
        # where we would be refused, we would stand among the refused: then it is only seen whether somebody listens
        well, said = (False, "") if hindrance else requestor.echo(us, settings.scp, section="[scp]")
        yield doctor.receiver(
            Port(well or listens(us.host, us.port), ours=well, said=said), us, calling=calling, hindrance=hindrance
        )


def _lets_us_in(settings: Settings, us: DestinationSettings) -> bool:
    """Whether the receiver takes its own certificate for that of a caller."""
    scp = settings.scp
    assert scp.tls_certificate is not None
    assert scp.tls_key is not None
    server = server_context(scp.tls_certificate, scp.tls_key, ca=scp.tls_ca, minimum=scp.tls_minimum)
    return fit_together(server, requestor.tls_context(us))


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _web(settings: Settings) -> Port:
    host = reachable(settings.web.host)
    if not listens(host, settings.web.port):
        return Port(listens=False, ours=False)
    scheme = "https" if settings.web.tls_certificate else "http"
    unchecked = ssl.create_default_context()  # who answers is asked, not whether it may be trusted
    unchecked.check_hostname = False
    unchecked.verify_mode = ssl.CERT_NONE
    try:
        with urllib.request.urlopen(
            f"{scheme}://{host}:{settings.web.port}/health/live", timeout=TIMEOUT_S, context=unchecked
        ) as answer:
            ours = json.loads(answer.read(1000)).get("alive") is True
    except (OSError, ValueError, AttributeError) as error:
        return Port(listens=True, ours=False, said=f"it does not answer as we do ({type(error).__name__})")
    return Port(listens=True, ours=ours, said="" if ours else "it does not answer as we do")


def _untold(settings: Settings) -> list[tuple[str, datetime]]:
    """Who has asked us for storage commitment and waits for the answer, and since when."""
    spool = spool_folder(settings)
    asked = [request for _, request in commitment_requests.requests(spool) if request is not None]
    asked += [report.request for _, report in commitment_requests.reports(spool) if report is not None]
    return [(one.calling_ae, one.requested_at) for one in asked]


# --- disk -----------------------------------------------------------------------------------------------------------


def disk(folder: Path) -> Disk:
    there = next(one for one in (folder, *folder.resolve().parents) if one.exists())
    mount, file_system = mount_of(there.resolve(), _mounts())
    return Disk(
        folder=str(folder),
        exists=folder.is_dir(),
        free_gb=shutil.disk_usage(there).free / 1e9,
        mount=mount,
        file_system=file_system,
        flush_ms=_flush_ms(folder),
    )


def mount_of(path: Path, mounts: list[tuple[str, str]]) -> tuple[str, str]:
    """Mount point and file system that `path` lies on. mounts: in the order of /proc/self/mounts, later ones above."""
    best = ("/", "unknown")
    for point, file_system in mounts:
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, file_system)
    return best


def _mounts() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines]
    return [(one[1].replace("\\040", " "), one[2]) for one in fields if len(one) > 2]


def _flush_ms(folder: Path) -> float | None:
    """Median of writing 64 KiB and flushing it, into files without a name."""
    taken = []
    try:
        for _ in range(FLUSHES):
            with tempfile.TemporaryFile(dir=folder) as stream:
                started = time.perf_counter()
                stream.write(bytes(FLUSHED_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
                taken.append((time.perf_counter() - started) * 1000)
    except OSError:
        return None
    return statistics.median(taken)


# --- servers --------------------------------------------------------------------------------------------------------


def broker(settings: Settings) -> Broker:
    url = broker_url(settings)
    limits: dict[str, Any] = {
        "socket_timeout": TIMEOUT_S,
        "socket_connect_timeout": TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        "decode_responses": True,
    }
    try:
        client = (
            redis.Redis(unix_socket_path=unquote(url.removeprefix(SOCKET_SCHEME)), **limits)
            if url.startswith(SOCKET_SCHEME)
            else redis.Redis.from_url(url, **limits)
        )
        with client:
            version = str(client.info("server").get("redis_version", "?"))
            policy, most = _memory(client)
            foreign = _foreign(client, settings.queue.name)
    except (RedisError, ValueError) as error:
        return Broker(reached=False, said=f"it does not answer ({type(error).__name__})")
    return Broker(reached=True, version=version, policy=policy, max_memory_bytes=most, foreign=foreign)


def _memory(client: redis.Redis) -> tuple[str | None, int]:
    try:
        found = client.config_get("maxmemory*")
        return str(found["maxmemory-policy"]), int(found["maxmemory"] or 0)
    except (RedisError, KeyError, ValueError):  # a hosted Redis may forbid the question
        return None, 0


def _foreign(client: redis.Redis, queue: str) -> tuple[str, ...]:
    """A few names of keys that are not the queue's, of the first thousands."""
    found: list[str] = []
    for number, name in enumerate(client.scan_iter(count=500)):
        if not name.startswith((queue, *OURS)):
            found.append(name[:40])
        if number >= MOST_KEYS or len(found) >= 3:
            break
    return tuple(found)


def _database(settings: Settings, now: datetime) -> tuple[Database, situation.Situation | None, list[Seen] | None]:
    url = database_url(settings)
    try:
        name = make_url(url).get_backend_name()
        if name == "sqlite" and not Path(make_url(url).database or "").exists():
            return Database(reached=True, said="SQLite, no file yet"), None, None
        engine = open_engine(url, read_only=True)
        try:
            if not schema.is_current(engine):
                return Database(reached=True, said=name), None, None
            with open_sessions(engine)() as session:
                standing, workers = situation.look(session, settings, now), _workers(session, now)
        finally:
            engine.dispose()
    except (SQLAlchemyError, ArgumentError) as error:
        return Database(reached=False, said=f"it cannot be reached ({type(error).__name__})"), None, None
    return Database(reached=True, said=name, at_head=True), standing, workers


def _workers(session: Session, now: datetime) -> list[Seen]:
    return [
        Seen(
            name=one["worker"],
            silent=one["silent"],
            device=one["device_name"] or one["device"] or "an unknown device",
            memory_bytes=one["memory_bytes"],
            model=one["model"],
            weights_sha256=one["weights_sha256"],
        )
        for one in heartbeat.workers(session, now)
    ]


# --- files and clock ------------------------------------------------------------------------------------------------


def model(settings: Settings) -> Model:
    """The folder as the worker would find it, without torch."""
    folder = DEMONSTRATION if settings.model.path == "demo" else Path(settings.model.path)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = str((config.get("architectures") or ["none"])[0])
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        fault = next(filter(None, (_safetensors_fault(file) for file in files)), "")
        small = bool(files) and size <= MOST_HASHED_BYTES
        digest = _digest(files) if small else None
    except FileNotFoundError:
        return Model(str(folder), fault=f"no config.json in {folder}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return Model(str(folder), fault=f"{folder} cannot be read ({type(error).__name__})")
    if architecture not in doctor.ARCHITECTURES:
        known = ", ".join(doctor.ARCHITECTURES)
        fault = f"{folder} holds the architecture {architecture!r}, which is not known here; known: {known}"
    elif not files:
        fault = f"no *.safetensors in {folder}; weights in other formats (pickles) are not loaded"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Model(str(folder), fault, architecture, size, digest, memory)


def _safetensors_fault(file: Path) -> str:
    """Whether a file is as long as its header says (https://github.com/huggingface/safetensors#format)."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        whole = os.fstat(stream.fileno()).st_size
        if not 2 <= length <= min(whole - 8, 100_000_000):
            return f"{file} is no safetensors file, or was cut"
        header = json.loads(stream.read(length))
    ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
    return "" if 8 + length + max(ends, default=0) == whole else f"{file} was cut: it is not as long as it says"


def _digest(files: list[Path]) -> str:
    """As the worker computes it: over the bytes of all files in name order."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                found.update(block)
    return found.hexdigest()


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2), as far as it is read; the rest is room for the kernel to write into."""

    _fields_ = (("modes", ctypes.c_uint), ("longs", ctypes.c_long * 64))


def clock() -> Clock:
    """Whether the kernel holds its clock for synchronised (adjtimex(2), which asks and changes nothing)."""
    if Path("/run/systemd/timesync/synchronized").exists():
        return Clock(True, "systemd-timesyncd")
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(_Timex()))
    except (OSError, AttributeError):
        return Clock(None)
    if state < 0:
        return Clock(None)
    return Clock(state != TIME_ERROR, "the kernel's word")


TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
