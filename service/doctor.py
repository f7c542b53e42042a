"""What a check found -> is that well, and what would help? Facts come in (probes.py), findings go out; pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from service.refusals import Refused
from service.shared.settings import Companion, DestinationSettings, Settings
from service.situation import Situation

# As in workers/vlm/folder.py, which this program never imports; a test holds them equal.
ARCHITECTURES = (
    "Gemma3ForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "VideoLlama3ForConditionalGeneration",
    "HulumedQwen2ForCausalLM",
    "HulumedQwen3ForCausalLM",
)
VOLATILE = ("tmpfs", "ramfs", "overlay")  # gone at a reboot, or with the container
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p")
SLOW_FLUSH_MS = 50.0  # above this a sender on one association waits longer for the disk than for the network
DAYS_TO_RENEW = 30.0
LATE = timedelta(minutes=10)  # the audit chain follows within seconds
ROOM = 1.3  # of the weights: activations and cache beside them


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"  # works today
    FAULT = "fault"  # does not work; `doctor` exits with 1
    UNKNOWN = "unknown"  # could not be found out from here


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was looked at, what was found, and what would help where that is not well."""

    subject: str
    state: State
    result: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Port:
    """One port that the configuration wants. `ours`: what answers there is this service."""

    listens: bool
    ours: bool
    said: str = ""


@dataclass(frozen=True, slots=True)
class Disk:
    """One folder and what it lies on. flush_ms: median of write and fsync; None where it could not be written."""

    folder: str
    exists: bool
    free_gb: float
    mount: str
    file_system: str
    flush_ms: float | None


@dataclass(frozen=True, slots=True)
class Broker:
    """What the queue's Redis says. Empty or None where it does not tell."""

    reached: bool
    said: str = ""
    version: str = ""
    policy: str | None = None
    max_memory_bytes: int = 0
    foreign: tuple[str, ...] = ()  # names that are not Celery's


@dataclass(frozen=True, slots=True)
class Database:
    reached: bool
    said: str = ""  # what is used; or why it was not reached
    at_head: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """The folder of [model] path, as far as it can be judged without torch. fault: why it cannot be used."""

    folder: str
    fault: str = ""
    architecture: str = ""
    weights_bytes: int = 0
    weights_sha256: str | None = None  # None: too large to compute here
    memory_bytes: int = 0  # of this machine


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker that has said that it is there."""

    name: str
    silent: bool
    device: str
    memory_bytes: int | None  # of its device
    model: str | None
    weights_sha256: str | None


@dataclass(frozen=True, slots=True)
class Clock:
    """None: this system does not say."""

    synchronised: bool | None
    by: str = ""


# --- decisions ------------------------------------------------------------------------------------------------------


def configuration(settings: Settings) -> Iterator[Finding]:
    """Valid it is, else nobody would be here; is it complete?"""
    if settings.source or settings.scp.accept_unknown_sources:
        who = ", ".join(one.ae_title for one in settings.source) or "anybody"
        yield Finding("sources", State.OK, f"{who} may send")
    else:
        yield Finding("sources", State.WARNING, "every sender is refused", '[[source]] ae_title = "THE PACS\'S TITLE"')
    if settings.destination:
        yield Finding("destinations", State.OK, ", ".join(one.name for one in settings.destination))
    else:
        yield Finding("destinations", State.WARNING, "results are kept and sent nowhere", "add a [[destination]]")
    if settings.scp.storage_commitment and not any(one.commitment_port for one in settings.source):
        remedy = "[[source]] commitment_port: where a modality takes the answer"
        yield Finding("storage commitment", State.WARNING, "is on, and every request for it is refused", remedy)
    if settings.scp.host in ("127.0.0.1", "localhost", "::1"):
        remedy = '[scp] host = "0.0.0.0", once the network may reach it'
        yield Finding("receiver's address", State.WARNING, f"{settings.scp.host}: this machine alone", remedy)


def receiver(port: Port, us: DestinationSettings, *, calling: str | None, hindrance: str = "") -> Finding:
    """us: this port of the receiver. calling: the source as which we called. hindrance: why we could not call."""
    subject = "receiver over TLS" if us.tls else "receiver"
    where = f"{us.host}:{us.port}"
    if port.ours:
        return Finding(subject, State.OK, f"{port.said} (as {calling})")
    if not port.listens:
        remedy = "start it: `./run serve`; its log says why it ends, if it does"
        return Finding(subject, State.FAULT, f"nobody listens at {where}", remedy)
    if hindrance:
        remedy = f"C-ECHO {us.ae_title} from the PACS's console"
        return Finding(subject, State.UNKNOWN, f"{where} listens, and cannot be asked from here: {hindrance}", remedy)
    remedy = "another program may hold the port (`ss -ltnp`), or it runs with another configuration"
    if us.tls:
        remedy += " or an older certificate: restart it"
    return Finding(subject, State.FAULT, port.said, remedy)


def web(port: Port, where: str) -> Finding:
    if port.ours:
        return Finding("web", State.OK, f"{where} answers")
    if port.listens:
        remedy = "stop the other program (`ss -ltnp`), or choose another [web] port"
        return Finding("web", State.FAULT, f"{where} is held by another program: {port.said}", remedy)
    remedy = "start it: `./run serve`; or [web] enabled = false"
    return Finding("web", State.FAULT, f"nobody listens at {where}", remedy)


def destination(name: str, *, well: bool, said: str, paused: bool, waiting: int) -> Finding:
    subject = f"destination {name}"
    if not well:
        return Finding(subject, State.FAULT, said, f"then `./run echo {name}`; what waits is sent by itself")
    if paused:
        return Finding(subject, State.WARNING, f"{said}; paused, {waiting} results wait", f"`./run resume {name}`")
    return Finding(subject, State.OK, said)


def certificate(key: str, days_left: float | None) -> Finding:
    subject = f"certificate {key}"
    if days_left is None:
        return Finding(subject, State.FAULT, "cannot be read", "give the path of a PEM file that this user may read")
    if days_left < 0:
        return Finding(subject, State.FAULT, f"expired {-days_left:.0f} days ago", "renew it and restart")
    if days_left < DAYS_TO_RENEW:
        return Finding(subject, State.WARNING, f"{days_left:.0f} days left", "renew it and restart")
    return Finding(subject, State.OK, f"{days_left:.0f} days left")


def disk(name: str, found: Disk, *, min_free_gb: float) -> Iterator[Finding]:
    """The space, what kind of disk it is, and how long a flush takes, by which Success to a C-STORE is bound."""
    space = f"{found.free_gb:.1f} GB free, {min_free_gb:g} GB are kept free"
    where = f"{found.folder} on {found.mount} ({found.file_system})"
    if found.free_gb < min_free_gb:
        remedy = "make space, or lower [spool] min_free_gb or keep_days; every C-STORE is answered 0xA700 meanwhile"
        yield Finding(f"{name}: space", State.FAULT, space, remedy)
    else:
        yield Finding(f"{name}: space", State.OK, space)
    if found.file_system in VOLATILE:
        remedy = "mount a disk there: what was acknowledged must survive a power cut"
        yield Finding(f"{name}: disk", State.WARNING, f"{where} does not last", remedy)
    elif found.file_system in REMOTE:
        remedy = "a local disk is safer: what a flush means depends on the server"
        yield Finding(f"{name}: disk", State.WARNING, f"{where} is remote", remedy)
    else:
        yield Finding(f"{name}: disk", State.OK, where)
    if found.flush_ms is None:
        said = "cannot be written by this user" if found.exists else "is not there yet; `serve` makes it"
        state = State.FAULT if found.exists else State.WARNING
        yield Finding(f"{name}: flush", state, said, "see owner and mode of the folder" if found.exists else "")
    elif found.flush_ms > SLOW_FLUSH_MS:
        remedy = "a faster disk, or more associations at the sender"
        yield Finding(f"{name}: flush", State.WARNING, f"{found.flush_ms:.1f} ms per file", remedy)
    else:
        yield Finding(f"{name}: flush", State.OK, f"{found.flush_ms:.1f} ms per file")


def broker(found: Broker) -> Iterator[Finding]:
    """Reached, never evicting, and ours alone. Receiving goes on without it; reading does not."""
    if not found.reached:
        yield Finding("queue", State.FAULT, found.said, "`./run serve` starts the embedded one; else see [queue] url")
        return
    yield Finding("queue", State.OK, f"Redis {found.version} answers")
    if found.policy is None:
        remedy = "make sure that its maxmemory-policy is noeviction"
        yield Finding("queue: eviction", State.UNKNOWN, "it does not tell its configuration", remedy)
    elif found.policy != "noeviction" and found.max_memory_bytes:
        result = f"{found.policy} at {found.max_memory_bytes / 1e6:.0f} MB: it may drop messages"
        yield Finding("queue: eviction", State.FAULT, result, "maxmemory-policy noeviction")
    else:
        yield Finding("queue: eviction", State.OK, f"{found.policy}, nothing is dropped")
    if found.foreign:
        result = f"other programs keep data in it ({', '.join(found.foreign)})"
        yield Finding(
            "queue: sharing", State.WARNING, result, "a database number of our own: [queue] url redis://.../N"
        )
    else:
        yield Finding("queue: sharing", State.OK, "ours alone")


def database(found: Database, now: Situation | None) -> Iterator[Finding]:
    """now: how everything stands, where the database is of this version."""
    if not found.reached:
        yield Finding("database", State.FAULT, found.said, "see [database] url, and that the server is up")
        return
    if not found.at_head or now is None:
        remedy = "`./run migrate`, or `./run serve` without --role"
        yield Finding("database", State.FAULT, f"{found.said}: empty, or of another version", remedy)
        return
    yield Finding("database", State.OK, f"{found.said}, at the newest migration")
    waiting = sum(now.analyses.values())
    age = None if now.oldest_unfinished_at is None else now.now - now.oldest_unfinished_at
    backlog = f"{waiting} analyses not finished" + ("" if age is None else f", the oldest since {_minutes(age)}")
    stuck = waiting > 0 and now.workers == 0
    yield Finding("backlog", State.FAULT if stuck else State.OK, backlog, "no worker is there" if stuck else "")
    behind = now.now - now.chain_waiting_since if now.chain_waiting_since else timedelta()
    if behind > LATE:
        result = f"{now.chain_waiting} events wait, the oldest since {_minutes(behind)}"
        yield Finding("audit chain", State.FAULT, result, "the role `ingest` appends it; see its log")
    else:
        yield Finding("audit chain", State.OK, f"{now.chained} events, {now.chain_waiting} wait")


def model(found: Model, workers: Sequence[Seen]) -> Iterator[Finding]:
    """Can it be loaded, are the weights those that the workers run, and do they fit?"""
    if found.fault:
        yield Finding("model", State.FAULT, found.fault, '[model] path: a folder in the transformers format, or "demo"')
        return
    size = f"{found.weights_bytes / 1e6:,.1f} MB"
    yield Finding("model", State.OK, f"{found.architecture}, {size} of safetensors in {found.folder}")
    there = [one for one in workers if not one.silent]
    if found.weights_sha256 is None:
        yield Finding("weights", State.OK, "above 2 GB: their digest is what a worker says, not computed here")
    else:
        others = [one.name for one in there if one.weights_sha256 not in (None, found.weights_sha256)]
        digest = f"sha256 {found.weights_sha256[:16]}..."
        if others:
            remedy = "restart them, or give them the same folder"
            yield Finding("weights", State.WARNING, f"{digest}; {', '.join(others)} runs other weights", remedy)
        else:
            yield Finding("weights", State.OK, digest)
    memory = min((one.memory_bytes for one in there if one.memory_bytes), default=None)
    on, room = ("this machine", found.memory_bytes) if memory is None else ("the workers' device", memory)
    if found.weights_bytes * ROOM > room:
        remedy = "a smaller model, or a device with more memory"
        result = f"{size} of weights against {room / 1e9:.1f} GB of {on}"
        yield Finding("memory", State.WARNING, result, remedy)
    else:
        yield Finding("memory", State.OK, f"{room / 1e9:.1f} GB of {on}")


def seen_workers(workers: Sequence[Seen] | None) -> Iterator[Finding]:
    """None: nobody could ask the database."""
    if workers is None:
        yield Finding("workers", State.UNKNOWN, "the database was not asked", "mend the database first")
        return
    if not any(not one.silent for one in workers):
        yield Finding("workers", State.FAULT, "none is there", "`./run worker`, or `./run serve` without --no-worker")
    for one in workers:
        if one.silent:
            remedy = "its work is given to another after the lease; see its log"
            yield Finding(f"worker {one.name}", State.WARNING, "silent", remedy)
        elif one.model is None:
            remedy = "its log says why, if this lasts"
            yield Finding(f"worker {one.name}", State.WARNING, f"on {one.device}, has loaded no model", remedy)
        else:
            yield Finding(f"worker {one.name}", State.OK, f"{one.model} on {one.device}")


def fonts(settings: Settings, missing: Sequence[str]) -> Iterator[Finding]:
    """missing: Debian's packages of fonts that are not there. Nothing where no route prints a report."""
    printing = [route.name for route in settings.route if Companion.PDF in route.companions]
    if not printing:
        return
    if missing:
        result = f"route {', '.join(printing)} prints reports, and some scripts will stand in them as code points"
        yield Finding("fonts", State.WARNING, result, f"apt-get install {' '.join(missing)}")
    else:
        yield Finding("fonts", State.OK, "for printed reports are there")


def clock(found: Clock) -> Finding:
    """Times of the audit, of reports and of TLS rest on it."""
    remedy = "run chrony, systemd-timesyncd or another NTP client on the host"
    if found.synchronised is None:
        return Finding("clock", State.UNKNOWN, "this system does not say whether it is synchronised", remedy)
    if not found.synchronised:
        return Finding("clock", State.WARNING, f"not synchronised ({found.by})", remedy)
    return Finding("clock", State.OK, f"synchronised ({found.by})")


def refused(found: Sequence[Refused]) -> Iterator[Finding]:
    """Who was not let in within the last day, and the line of the configuration that would let it in."""
    if not found:
        yield Finding("refused", State.OK, "nobody within the last day")
    for one in found:
        who = f"{one.calling_ae or 'somebody'} from {one.address}" + (f" to {one.called_ae}" if one.called_ae else "")
        times = "once" if one.count == 1 else f"{one.count} times"
        result = f"{one.reason}; {times}, last at {one.at:%Y-%m-%d %H:%M:%S} UTC"
        yield Finding(f"refused: {who}", State.WARNING, result, one.remedy)


def commitment(waiting: Sequence[tuple[str, datetime]], now: datetime) -> Iterator[Finding]:
    """waiting: who has asked for storage commitment and was not told yet, and since when. Nothing where nobody has."""
    for calling_ae in sorted({one for one, _ in waiting}):
        times = [at for one, at in waiting if one == calling_ae]
        result = f"{len(times)} answers to {calling_ae} wait, the oldest since {_minutes(now - min(times))}"
        late = now - min(times) > LATE
        remedy = f'[[source]] ae_title = "{calling_ae}": host, commitment_port; the log says how it fails'
        yield Finding("storage commitment", State.WARNING if late else State.OK, result, remedy if late else "")


def certificates(days_left: Mapping[str, float | None]) -> Iterator[Finding]:
    for key, days in days_left.items():
        yield certificate(key, days)


def is_well(findings: Sequence[Finding]) -> bool:
    """Whether nothing is broken; warnings and what could not be found out do not count."""
    return all(one.state is not State.FAULT for one in findings)


def _minutes(age: timedelta) -> str:
    minutes = age.total_seconds() / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def last_day(now: datetime) -> datetime:
    return now - timedelta(days=1)
