"""The hand-over from receiver to ingest: durable instances, a receipt for each, heartbeats of associations.

Files only; names come from digests, never from what a sender wrote. Knows nothing of DIMSE or the database.

    studies/<study key>/<instance key>-<content key>.dcm    one Part 10 file per distinct instance
    studies/<study key>/<instance key>-<content key>.json   its receipt, once ingest has its row
    incoming/<time>-<pid>-<counter>.json                    receipts that wait for ingest, in order of arrival
    associations/<association id>.json                      heartbeat; gone when older than HEARTBEAT_STALE_S
    unusable/                                               receipts that could not be read, kept for a person
    tmp/                                                    what is being written; emptied by a new receiver
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, ClassVar, TypeVar

from pydantic import AwareDatetime, ConfigDict, TypeAdapter, ValidationError

from service.shared.durable import sync_folder, write_durably

RECEIPT_VERSION = 1
HEARTBEAT_STALE_S = 30.0
ORPHAN_AGE_S = 3600.0
IMPLEMENTATION_CLASS_UID = "2.25.189379385699083891714922590556693550384"  # drawn once, PS3.7 D.3.3.2
IMPLEMENTATION_VERSION_NAME = "MEDPRUNER_0_1"  # at most 16 characters
KEY_LENGTH = 24  # hexadecimal digits, 96 bits
CHECK_SPACE_EVERY_BYTES = 64 << 20  # of an instance that is arriving
REMEMBERED = 200_000  # instances acknowledged since the start, about 20 MB

T = TypeVar("T")

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class NoSpace(Exception):
    """Free space would fall below the floor, or the disk is full: answer 0xA700 and keep nothing."""


class SpoolInUse(Exception):
    """Another receiver writes to this spool; give every receiver its own [spool] path."""


class ReceiptError(Exception):
    """A receipt or heartbeat that this program cannot read; the message names the file, never its content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What is known of an instance before it is written, and who sent it. Nothing of the patient."""

    study_uid: str
    series_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    modality: str
    calling_ae: str
    called_ae: str
    peer_address: str
    association_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt(Arrival):
    """One acknowledged C-STORE. `sha256` and `size_bytes` are those of the data set as it was received.

    `duplicate` says that the same bytes had been acknowledged before and no second copy was written. It may
    be false for a duplicate (after a restart), never true for the first: its row decides what is new.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    received_at: AwareDatetime  # UTC
    sha256: str
    size_bytes: int
    path: str  # relative to the spool
    duplicate: bool

    def to_json(self) -> bytes:
        content = {"version": RECEIPT_VERSION, **asdict(self), "received_at": self.received_at.isoformat()}
        return json.dumps(content, indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Receipt:
        """Read what to_json wrote; ReceiptError for another version or anything not understood."""
        receipt = _parse(_RECEIPT, content)
        parts = receipt.path.split("/")
        if len(parts) != 3 or parts[0] != "studies" or ".." in parts or not receipt.path.endswith(".dcm"):
            raise ReceiptError("its path does not lie under studies/")
        return receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAssociation:
    """The heartbeat of an association, and the studies of which it brought at least one instance."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    association_id: str
    calling_ae: str
    called_ae: str
    peer_address: str
    opened_at: AwareDatetime
    study_keys: tuple[str, ...]

    def to_json(self) -> bytes:
        content = {"version": RECEIPT_VERSION, **asdict(self), "opened_at": self.opened_at.isoformat()}
        return json.dumps(content, indent=1).encode()


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a starting receiver found of the one before it."""

    unfinished: int  # files that were being written and were never acknowledged; removed
    orphans: int  # instances without any receipt, never acknowledged
    orphans_removed: int  # of those, the ones removed; none while a receipt cannot be read


_RECEIPT = TypeAdapter(Receipt)
_OPEN_ASSOCIATION = TypeAdapter(OpenAssociation)


def key(identity: str) -> str:
    """A file name for an identity: the first 96 bits of its SHA-256."""
    return sha256(identity.encode()).hexdigest()[:KEY_LENGTH]


class Spool:
    """The folder itself. One process stores (after `claim`); any number read, settle and remove."""

    def __init__(self, path: Path, min_free_bytes: int) -> None:
        self.path = path
        self._min_free_bytes = min_free_bytes
        self._studies = path / "studies"
        self._incoming = path / "incoming"
        self._associations = path / "associations"
        self._unusable = path / "unusable"
        self._tmp = path / "tmp"
        self._lock = Lock()
        self._claim: int | None = None
        self._counter = itertools.count()
        self._durable_studies: set[str] = set()  # folders whose own entry is known to be synced
        self._acknowledged: set[str] = set()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self._studies, self._incoming, self._associations, self._unusable, self._tmp):
            folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(path)
        sync_folder(path.parent)

    # --- the receiver's side ---

    def claim(self) -> None:
        """Become the one process that stores here, until `release` or death; SpoolInUse when there is one."""
        descriptor = os.open(self.path / "receiver.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            message = f"{self.path}: another receiver writes here; give it its own [spool] path"
            raise SpoolInUse(message) from error
        self._claim = descriptor

    def release(self) -> None:
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def recover(self, now: datetime, orphan_age_s: float = ORPHAN_AGE_S) -> Recovered:
        """Clear what a killed receiver left half done. Only for the process that holds the claim.

        What is removed was never acknowledged: unfinished files, and instances that no receipt names. While
        some receipt cannot be read, nobody knows which instance it names, and no orphan is removed.
        """
        unfinished = [*self._tmp.iterdir(), *self._incoming.glob("*.part")]
        for path in (*unfinished, *self._associations.iterdir()):
            path.unlink()
        waiting, complete = self._waiting()
        orphans = self._unnamed(waiting, now, orphan_age_s)
        if complete:
            for path in orphans:
                path.unlink()
        self._acknowledged = waiting
        return Recovered(len(unfinished), len(orphans), len(orphans) if complete else 0)

    def begin(self, *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> Draft:
        """A file for an instance that is arriving; NoSpace below the floor, OSError for a fault of the disk."""
        self._check_space()
        path = self._tmp / f"{os.getpid()}-{next(self._counter)}.dcm"
        return Draft(path, file_header(sop_class_uid, sop_instance_uid, transfer_syntax_uid), self._check_space)

    def keep(self, draft: Draft, arrival: Arrival, received_at: datetime) -> Receipt:
        """Make the instance and its receipt durable; only after return may it be acknowledged.

        The file is a Part 10 header followed by the data set exactly as it came. NoSpace, or OSError for any
        other fault of the disk: then nothing may be acknowledged and the sender will try again.
        """
        name = self._next_name(received_at)
        try:
            self._check_space()
            digest = draft.digest()
            study_key = key(arrival.study_uid)
            stem = f"{study_key}/{key(arrival.sop_instance_uid)}-{digest[:KEY_LENGTH]}"
            path = self._studies / f"{stem}.dcm"
            duplicate = False
            if _size(path) == draft.file_bytes:
                draft.discard()
                duplicate = stem in self._acknowledged or path.with_suffix(".json").exists()
                # the one that wrote it may not have come as far as its own sync
                self._ensure_study(study_key)
                sync_folder(path.parent)
            else:
                self._place(draft, study_key, path)
            receipt = Receipt(
                **asdict(arrival),
                received_at=received_at,
                sha256=digest,
                size_bytes=draft.size_bytes,
                path=f"studies/{stem}.dcm",
                duplicate=duplicate,
            )
            write_durably(self._incoming / f"{name}.json", receipt.to_json())
        except OSError as error:
            for suffix in (".json", ".json.part"):
                (self._incoming / f"{name}{suffix}").unlink(missing_ok=True)
            if error.errno in _NO_SPACE:
                raise NoSpace(f"{self.path}: no space left on the device") from error
            raise
        finally:
            draft.discard()
        self._remember(stem)
        return receipt

    def store(self, arrival: Arrival, data_set: bytes | memoryview, received_at: datetime) -> Receipt:
        """`begin`, write and `keep` a data set that is there as a whole."""
        draft = self.begin(
            sop_class_uid=arrival.sop_class_uid,
            sop_instance_uid=arrival.sop_instance_uid,
            transfer_syntax_uid=arrival.transfer_syntax_uid,
        )
        try:
            draft.write(data_set)
            return self.keep(draft, arrival, received_at)
        finally:
            draft.discard()

    def beat(self, association: OpenAssociation) -> None:
        """Write the heartbeat: at the association's first instance of each study, before it is stored."""
        path = self._heartbeat(association.association_id)
        temporary = self._tmp / path.name
        _create(temporary, association.to_json())
        temporary.rename(path)

    def touch_association(self, association_id: str) -> None:
        """Keep the heartbeat fresh; nothing happens where there is none."""
        try:
            os.utime(self._heartbeat(association_id))
        except FileNotFoundError:
            return

    def close_association(self, association_id: str) -> None:
        self._heartbeat(association_id).unlink(missing_ok=True)

    # --- ingest's side ---

    def incoming(self) -> list[Path]:
        """The receipts that wait, in order of arrival."""
        return sorted(self._incoming.glob("*.json"))

    def read(self, path: Path) -> Receipt:
        """The receipt in `path`; ReceiptError names the file and what to do."""
        try:
            return Receipt.from_json(path.read_bytes())
        except ReceiptError as error:
            raise ReceiptError(f"{path.name}: {error}; set it aside, or update this program") from error

    def settle(self, path: Path, receipt: Receipt) -> None:
        """Its row is committed: the first receipt of an instance moves beside it, later ones are removed.

        Safe to repeat. Not synced: a receipt that comes back after a power cut is a duplicate to ingest.
        """
        beside = (self.path / receipt.path).with_suffix(".json")
        if beside.exists() or not beside.parent.is_dir():
            path.unlink(missing_ok=True)
        elif path.exists():
            path.rename(beside)

    def set_aside(self, path: Path) -> Path:
        """Move a receipt that cannot be used out of the way, and say where to."""
        return path.rename(self._unusable / path.name)

    def open_associations(self, now: datetime) -> list[OpenAssociation]:
        """Associations that are open right now and have brought instances; stale heartbeats left out."""
        found = []
        for path in self._associations.glob("*.json"):
            try:
                age_s = now.timestamp() - path.stat().st_mtime
                content = path.read_bytes()
            except FileNotFoundError:  # closed meanwhile
                continue
            if age_s <= HEARTBEAT_STALE_S:
                found.append(_parse(_OPEN_ASSOCIATION, content))
        return found

    def open_studies(self, now: datetime) -> frozenset[str]:
        """The studies that an open association has brought instances of, as `key(study_uid)`."""
        return frozenset(study for opened in self.open_associations(now) for study in opened.study_keys)

    def settled(self) -> Iterator[Path]:
        """The receipts beside their instances: all that is needed to rebuild the rows."""
        return (path for folder in sorted(self._studies.iterdir()) for path in sorted(folder.glob("*.json")))

    def instances(self, study_uid: str) -> list[Path]:
        """Every instance of the study that lies here, with or without a receipt."""
        return sorted((self._studies / key(study_uid)).glob("*.dcm"))

    def orphans(self, now: datetime, older_than_s: float = ORPHAN_AGE_S) -> list[Path]:
        """Instances that no receipt names and that nobody is about to acknowledge."""
        return self._unnamed(self._waiting()[0], now, older_than_s)

    def remove_study(self, study_uid: str) -> int:
        """Remove the settled instances of a study and return how many; what came meanwhile stays.

        The instance goes before its receipt, so that a removal cut short can be finished by calling again.
        """
        folder = self._studies / key(study_uid)
        receipts = sorted(folder.glob("*.json"))
        for receipt in receipts:
            receipt.with_suffix(".dcm").unlink(missing_ok=True)
            receipt.unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise
        return len(receipts)

    def free_bytes(self) -> int:
        """What an unprivileged writer has left on the spool's file system."""
        state = os.statvfs(self.path)
        return state.f_bavail * state.f_frsize

    # --- inside ---

    def _check_space(self) -> None:
        if self.free_bytes() < self._min_free_bytes:
            raise NoSpace(f"{self.path}: less than [spool] min_free_gb left; free space or lower the floor")

    def _place(self, draft: Draft, study_key: str, path: Path) -> None:
        draft.sync()
        self._ensure_study(study_key)
        try:
            draft.path.rename(path)
        except FileNotFoundError:  # retention removed the empty folder in between
            self._ensure_study(study_key)
            draft.path.rename(path)
        sync_folder(path.parent)

    def _ensure_study(self, study_key: str) -> None:
        """The study's folder exists and survives a power cut."""
        folder = self._studies / study_key
        with self._lock:
            if study_key in self._durable_studies and folder.is_dir():
                return
            folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._studies)
            self._durable_studies.add(study_key)

    def _remember(self, stem: str) -> None:
        with self._lock:
            if len(self._acknowledged) >= REMEMBERED:
                self._acknowledged.clear()
            self._acknowledged.add(stem)

    def _next_name(self, moment: datetime) -> str:
        nanoseconds = int(moment.timestamp() * 1_000_000) * 1000
        return f"{nanoseconds:020d}-{os.getpid()}-{next(self._counter):09d}"

    def _heartbeat(self, association_id: str) -> Path:
        return self._associations / f"{association_id}.json"

    def _waiting(self) -> tuple[set[str], bool]:
        """<study key>/<stem> of instances whose receipts wait, and whether every receipt could be read.

        Those set aside count: what they name was acknowledged.
        """
        stems = set()
        complete = True
        for path in (*self._unusable.iterdir(), *self.incoming()):
            try:
                receipt = self.read(path)
            except FileNotFoundError:  # settled meanwhile
                continue
            except ReceiptError:
                complete = False
                continue
            stems.add(receipt.path.removeprefix("studies/").removesuffix(".dcm"))
        return stems, complete

    def _unnamed(self, waiting: set[str], now: datetime, older_than_s: float) -> list[Path]:
        """Instances that neither `waiting` nor a receipt beside them names.

        `waiting` was read before: a receipt that ingest moves meanwhile is then seen in one place at least.
        """
        before = now.timestamp() - older_than_s
        return [
            path
            for path in sorted(self._studies.glob("*/*.dcm"))
            if f"{path.parent.name}/{path.stem}" not in waiting
            and not path.with_suffix(".json").exists()
            and _modified(path) < before
        ]


class Draft:
    """An instance while it arrives: a Part 10 file under tmp/, and the digest of its data set so far.

    After `discard` nothing is left of it, unless it was kept. Used by one thread.
    """

    def __init__(self, path: Path, header: bytes, check_space: Callable[[], None]) -> None:
        self.path = path
        self.size_bytes = 0  # of the data set
        self._header = header
        self._unwritten = header  # goes with the first fragment, in one write
        self._check_space = check_space
        self._checked_bytes = 0
        self._digest = sha256()
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    @property
    def file_bytes(self) -> int:
        return len(self._header) + self.size_bytes

    def write(self, fragment: bytes | memoryview) -> None:
        """Append to the data set; NoSpace or OSError when it does not fit."""
        self.size_bytes += len(fragment)
        try:
            self._append(b"".join((self._unwritten, fragment)) if self._unwritten else fragment)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise NoSpace(f"{self.path.parent}: no space left on the device") from error
            raise
        self._unwritten = b""
        self._digest.update(fragment)
        if self.size_bytes - self._checked_bytes > CHECK_SPACE_EVERY_BYTES:
            self._check_space()
            self._checked_bytes = self.size_bytes

    def digest(self) -> str:
        """SHA-256 of the data set so far, in hexadecimal."""
        return self._digest.hexdigest()

    def open_data_set(self) -> BinaryIO:
        """What was written, to be read again from the beginning of the data set on; the caller closes it."""
        stream = self.path.open("rb")
        stream.seek(len(self._header))
        return stream

    def sync(self) -> None:
        os.fsync(self._open())

    def discard(self) -> None:
        """Remove it, if it still lies under tmp/. Safe to repeat."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self.path.unlink(missing_ok=True)

    def _append(self, content: bytes | memoryview) -> None:
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[os.write(self._open(), remaining) :]

    def _open(self) -> int:
        if self._descriptor is None:
            raise RuntimeError("the draft was discarded")
        return self._descriptor


def file_header(sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """Preamble, prefix and file meta information for a data set that is to be kept as it is (PS3.10 7.1)."""
    elements = b"".join(
        (
            struct.pack("<HH2sHL", 0x0002, 0x0001, b"OB", 0, 2) + b"\x00\x01",
            _element(0x0002, b"UI", sop_class_uid, b"\x00"),
            _element(0x0003, b"UI", sop_instance_uid, b"\x00"),
            _element(0x0010, b"UI", transfer_syntax_uid, b"\x00"),
            _element(0x0012, b"UI", IMPLEMENTATION_CLASS_UID, b"\x00"),
            _element(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME, b" "),
        )
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHL", 0x0002, 0x0000, b"UL", 4, len(elements)) + elements


def _element(number: int, vr: bytes, text: str, padding: bytes) -> bytes:
    value = text.encode("ascii")
    value += padding * (len(value) % 2)
    return struct.pack("<HH2sH", 0x0002, number, vr, len(value)) + value


def _parse(adapter: TypeAdapter[T], content: bytes) -> T:
    try:
        fields: Any = json.loads(content)
    except ValueError as error:
        raise ReceiptError("not JSON") from error
    version = fields.pop("version", None) if isinstance(fields, dict) else None
    if version != RECEIPT_VERSION:
        raise ReceiptError(f"version {version!r} is not known here, only {RECEIPT_VERSION}")
    try:
        return adapter.validate_json(json.dumps(fields))
    except ValidationError as error:
        places = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors(include_input=False))
        raise ReceiptError(f"not understood: {places}") from error


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _modified(path: Path) -> float:
    """Seconds since the epoch; never, when the file has gone meanwhile."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _create(path: Path, content: bytes) -> None:
    """A new file for its owner alone, not synced."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(content)
