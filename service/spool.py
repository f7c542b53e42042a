"""The hand-over from receiver to ingest: durable instances with their receipts in them, heartbeats of associations.

Files only; names come from digests, never from what a sender wrote. Knows nothing of DIMSE or the database.

    incoming/<token>-<pid>-<counter>.slot                   an empty file made ahead, or an instance that is arriving
    incoming/<time>-<pid>-<counter>.dcm                     an acknowledged instance that waits for ingest, by arrival
    studies/<study key>/<instance key>-<content key>.dcm    one Part 10 file per distinct instance
    studies/<study key>/committed                           its sender was promised that it is kept: no age removes it
    associations/<association id>.json                      heartbeat; gone when older than HEARTBEAT_STALE_S
    unusable/                                               what could not be read, kept for a person
    tmp/                                                    what is being written; emptied by a new receiver

The receipt of an instance is JSON in its file meta information: (0002,0102) Private Information, RECEIPT_BYTES long,
padded with spaces, under our (0002,0100) Private Information Creator UID. The data set follows exactly as it came.

Order of writing (each step may be the last one before a kill or a power cut):
1. the slot's name is durable, long before (slots.py);
2. header without receipt, data set, receipt over its place, one flush of this file: now it is durable as a whole;
3. it is renamed within incoming/, which is not flushed. Success is answered.
4. ingest links it under studies/ and flushes the folders there (`place`), commits the rows, and only then removes the
   name in incoming/.
A starting receiver adopts every slot whose receipt fits its content, and removes the others: they were never answered.
A file under studies/ with a second name waits for ingest still.

Spools of version 0.1 kept receipts apart: incoming/*.json, later beside the instance. Both are read as before.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

from pydantic import AwareDatetime, ConfigDict, TypeAdapter, ValidationError
from pydicom import dcmread

from service.shared.durable import sync_folder, write_durably
from service.slots import SUFFIX, Slots

RECEIPT_VERSION = 1
HEARTBEAT_STALE_S = 30.0
IMPLEMENTATION_CLASS_UID = "2.25.189379385699083891714922590556693550384"  # drawn once, PS3.7 D.3.3.2
IMPLEMENTATION_VERSION_NAME = "MEDPRUNER_0_1"  # at most 16 characters
RECEIPT_CREATOR_UID = "2.25.132170137356285793956309408053203975900"  # drawn once: who wrote (0002,0102), PS3.10 7.1
KEY_LENGTH = 24  # hexadecimal digits, 96 bits
COMMITTED = "committed"
CLAIM_AGAIN_S = 0.02
RECEIPT_BYTES = 1536  # the longest receipt has about 1100
HEADER_BYTES = 1 << 12  # more than preamble and file meta information have
META_BYTES = 144  # preamble, prefix and group length: what stands before the other file meta information
CHECK_SPACE_EVERY_BYTES = 64 << 20  # of an instance that is arriving

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
    """One acknowledged C-STORE. `sha256` and `size_bytes` are those of the data set as it was received."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    received_at: AwareDatetime  # UTC
    sha256: str
    size_bytes: int
    path: str  # relative to the spool, from when it is placed

    def to_json(self) -> bytes:
        content = {name: getattr(self, name) for name in _RECEIPT_FIELDS}
        return json.dumps({"version": RECEIPT_VERSION, **content, "received_at": self.received_at.isoformat()}).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Receipt:
        """Read what to_json wrote; ReceiptError for another version or anything not understood.

        Older receipts have one field more: "duplicate", which their rows knew better.
        """
        receipt = _parse(_RECEIPT, content, no_longer=("duplicate",))
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
    adopted: int  # instances that were whole and may have been acknowledged; kept


_RECEIPT = TypeAdapter(Receipt)
_RECEIPT_FIELDS = tuple(field.name for field in fields(Receipt))
_ARRIVAL_FIELDS = tuple(field.name for field in fields(Arrival))
_OPEN_ASSOCIATION = TypeAdapter(OpenAssociation)


def key(identity: str) -> str:
    """A file name for an identity: the first 96 bits of its SHA-256."""
    return sha256(identity.encode()).hexdigest()[:KEY_LENGTH]


def waiting(spool: Path) -> list[Path]:
    """What waits for ingest in a spool, in order of arrival; FileNotFoundError where there is no spool yet."""
    with os.scandir(spool / "incoming") as entries:
        names = [entry.name for entry in entries if entry.name.endswith((".dcm", ".json"))]
    return [spool / "incoming" / name for name in sorted(names)]


class Spool:
    """The folder itself. One process and its copies store (after `claim`); any number read, settle and remove."""

    def __init__(self, path: Path, min_free_bytes: int) -> None:
        self.path = path
        self._min_free_bytes = min_free_bytes
        self._studies = path / "studies"
        self._incoming = path / "incoming"
        self._associations = path / "associations"
        self._unusable = path / "unusable"
        self._tmp = path / "tmp"
        self._claim: int | None = None
        self._counter = itertools.count()
        self._slots = Slots(self._incoming)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self._studies, self._incoming, self._associations, self._unusable, self._tmp):
            folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(path)
        sync_folder(path.parent)

    # --- the receiver's side ---

    def claim(self, patience_s: float = 0.0) -> None:
        """Become the one process that stores here, until `release` or death; SpoolInUse when there is one.

        The copies of this process hold the claim with it. patience_s: for those of one that was killed to be gone.
        """
        deadline = time.monotonic() + patience_s
        descriptor = os.open(self.path / "receiver.lock", os.O_RDWR | os.O_CREAT, 0o600)
        while self._claim is None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._claim = descriptor
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    message = f"{self.path}: another receiver writes here; give it its own [spool] path"
                    raise SpoolInUse(message) from error
                time.sleep(CLAIM_AGAIN_S)

    def release(self) -> None:
        self._slots.stop()
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def recover(self) -> Recovered:
        """Take over what a killed receiver left. Only for the process that holds the claim.

        What is removed was never acknowledged. What is whole is kept, whether its answer went out or not.
        """
        unfinished, adopted = 0, 0
        for path in (*self._tmp.iterdir(), *self._incoming.glob("*.part")):
            path.unlink()
            unfinished += 1
        for path in self._associations.iterdir():
            path.unlink()
        for slot in self._incoming.glob(f"*{SUFFIX}"):
            if slot.stat().st_size == 0:
                slot.unlink()
            elif self._adopt(slot):
                adopted += 1
            else:
                slot.unlink()
                unfinished += 1
        return Recovered(unfinished, adopted)

    def make_ahead(self) -> None:
        """Keep slots ready from now on, until `release`: without them every instance would wait for one more flush."""
        self._slots.start()

    def begin(self, *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> Draft:
        """A file for an instance that is arriving; NoSpace below the floor, OSError for a fault of the disk."""
        self._check_space()
        header = file_header(sop_class_uid, sop_instance_uid, transfer_syntax_uid)
        try:
            return Draft(self._slots.take(), header, self._check_space)
        except OSError as error:
            raise self._meant(error) from error

    def keep(self, draft: Draft, arrival: Arrival, received_at: datetime) -> Receipt:
        """Make the instance and its receipt durable; only after return may it be acknowledged.

        NoSpace, or OSError for any other fault of the disk: then nothing may be acknowledged and the sender will
        try again.
        """
        digest = draft.digest()
        file_name = f"{key(arrival.sop_instance_uid)}-{digest[:KEY_LENGTH]}.dcm"
        receipt = Receipt(
            **{name: getattr(arrival, name) for name in _ARRIVAL_FIELDS},
            received_at=received_at,
            sha256=digest,
            size_bytes=draft.size_bytes,
            path=f"studies/{key(arrival.study_uid)}/{file_name}",
        )
        try:
            draft.finish(receipt.to_json())
            draft.kept_as(f"{self._incoming}/{self._next_name(received_at)}")
        except OSError as error:
            raise self._meant(error) from error
        finally:
            draft.discard()
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
        """What waits for ingest, in order of arrival: instances, and receipts of version 0.1."""
        return waiting(self.path)

    def read(self, path: Path) -> Receipt:
        """The receipt in an instance, beside it, or in a file of its own; ReceiptError names it and what to do."""
        try:
            if path.suffix == ".json":
                return Receipt.from_json(path.read_bytes())
            embedded = _embedded_receipt(path)
            return Receipt.from_json(embedded or path.with_suffix(".json").read_bytes())
        except ReceiptError as error:
            raise ReceiptError(f"{path.name}: {error}; set it aside, or update this program") from error
        except FileNotFoundError as error:
            if path.exists():
                raise ReceiptError(f"{path.name}: there is no receipt in it; set it aside") from error
            raise

    def place(self, receipts: Iterable[tuple[Path, Receipt]]) -> None:
        """Give these instances their names under studies/, and make them durable: before their rows are committed.

        Safe to repeat. OSError for a fault of the disk; the names in incoming/ stay until `settle`.
        """
        folders = set()
        for path, receipt in receipts:
            if path.suffix == ".dcm":
                target = self.path / receipt.path
                self._link(path, target, receipt.size_bytes)
                folders.add(target.parent)
        for folder in (*folders, self._studies):
            sync_folder(folder)

    def settle(self, path: Path, receipt: Receipt) -> None:
        """Its row is committed: it waits no longer. A receipt of version 0.1 moves beside its instance.

        Safe to repeat. Not synced: what comes back after a power cut is a duplicate to ingest.
        """
        if path.suffix == ".dcm":
            path.unlink(missing_ok=True)
            return
        beside = (self.path / receipt.path).with_suffix(".json")
        if beside.exists() or not beside.parent.is_dir():
            path.unlink(missing_ok=True)
        elif path.exists():
            path.rename(beside)

    def set_aside(self, path: Path) -> Path:
        """Move what cannot be used out of the way, and say where to."""
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

    def settled(self, known: Collection[str] = ()) -> Iterator[Path]:
        """Instances that ingest has taken, all that is needed to rebuild the rows; without the paths in `known`."""
        for folder in sorted(self._studies.iterdir()):
            yield from (path for path in _files(folder) if _place(path) not in known and _is_settled(path))

    def settled_studies(self) -> Iterator[list[Path]]:
        """The same, study by study."""
        for folder in sorted(self._studies.iterdir()):
            found = [path for path in _files(folder) if _is_settled(path)]
            if found:
                yield found

    def instances(self, study_uid: str) -> list[Path]:
        """Every instance of the study that was placed here; what waits for ingest alone is not among them."""
        return _files(self._studies / key(study_uid))

    def set_aside_of(self, study_uid: str) -> list[Path]:
        """What lies in unusable/ and is of the study, as far as its receipt, its other name or its data set says."""
        inodes = {path.stat().st_ino for path in self.instances(study_uid)}
        return [
            path for path in self._unusable.iterdir() if path.stat().st_ino in inodes or self._is_of(path, study_uid)
        ]

    def remove_study(self, study_uid: str) -> int:
        """Remove the settled instances of a study and return how many; what came meanwhile stays."""
        folder = self._studies / key(study_uid)
        settled = [path for path in _files(folder) if _is_settled(path)]
        for path in settled:
            remove_instance(path)
        (folder / COMMITTED).unlink(missing_ok=True)
        for receipt in folder.glob("*.json"):  # of a removal that was cut short
            if not receipt.with_suffix(".dcm").exists():
                receipt.unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise
        return len(settled)

    @contextmanager
    def removing_or_committing(self) -> Iterator[None]:
        """One at a time, over all processes: nothing is removed while it is promised, or promised while it goes."""
        descriptor = os.open(self.path / "removal.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def holds(self, instance: str, *, sha256: str, size_bytes: int) -> bool:
        """Whether the instance of this path lies here and its data set, read back, is what was received."""
        try:
            return _data_set_digest(self.path / instance) == (sha256, size_bytes)
        except OSError:
            return False

    def commit(self, instance: str) -> None:
        """From now on no age removes the study of this instance; after return that survives a power cut."""
        marker = (self.path / instance).parent / COMMITTED
        if not marker.exists():
            write_durably(marker, b"")

    def is_committed(self, study_uid: str) -> bool:
        return (self._studies / key(study_uid) / COMMITTED).exists()

    def sync_removals(self) -> None:
        """What was settled or removed does not come back after a power cut."""
        for folder in (self._incoming, self._studies):
            sync_folder(folder)

    def free_bytes(self) -> int:
        """What an unprivileged writer has left on the spool's file system."""
        state = os.statvfs(self.path)
        return state.f_bavail * state.f_frsize

    # --- inside ---

    def _check_space(self) -> None:
        if self.free_bytes() < self._min_free_bytes:
            raise NoSpace(f"{self.path}: less than [spool] min_free_gb left; free space or lower the floor")

    def _meant(self, error: OSError) -> OSError | NoSpace:
        return NoSpace(f"{self.path}: no space left on the device") if error.errno in _NO_SPACE else error

    def _is_of(self, path: Path, study_uid: str) -> bool:
        try:
            return self.read(path).study_uid == study_uid
        except FileNotFoundError:
            return False
        except ReceiptError:
            return _study_uid(path) == study_uid

    def _link(self, source: Path, target: Path, size_bytes: int) -> None:
        """A second name for a durable instance, instead of whatever damaged copy has that name.

        size_bytes: of its data set.
        """
        try:
            os.link(source, target)
        except FileNotFoundError:  # the first of its study, or retention removed the empty folder
            target.parent.mkdir(mode=0o700, exist_ok=True)
            os.link(source, target)
        except FileExistsError:
            if _data_set_bytes(target) != size_bytes:
                beside = self._tmp / f"{source.name}.link"
                os.link(source, beside)
                beside.replace(target)

    def _adopt(self, slot: Path) -> bool:
        """Keep a slot whose content is what its receipt says; nothing else can have been acknowledged."""
        try:
            receipt = self.read(slot)
            if _data_set_digest(slot) != (receipt.sha256, receipt.size_bytes):
                return False
        except ReceiptError:
            return False
        with slot.open("rb") as stream:
            os.fsync(stream.fileno())  # what was killed may have come as far as its flush, or not
        slot.rename(self._incoming / self._next_name(receipt.received_at))
        return True

    def _next_name(self, moment: datetime) -> str:
        nanoseconds = int(moment.timestamp() * 1_000_000) * 1000
        return f"{nanoseconds:020d}-{os.getpid()}-{next(self._counter):09d}.dcm"

    def _heartbeat(self, association_id: str) -> Path:
        return self._associations / f"{association_id}.json"


class Draft:
    """An instance while it arrives: a Part 10 file in a slot, and the digest of its data set so far.

    After `discard` nothing is left of it, unless it was kept. Used by one thread.
    """

    def __init__(self, slot: Path, header: bytes, check_space: Callable[[], None]) -> None:
        self.path = slot
        self.size_bytes = 0  # of the data set
        self._header_bytes = len(header)
        self._unwritten = header  # goes with the first fragment, in one write
        self._check_space = check_space
        self._checked_bytes = 0
        self._digest = sha256()
        self._descriptor: int | None = os.open(slot, os.O_WRONLY)

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
        stream.seek(self._header_bytes)
        return stream

    def finish(self, receipt: bytes) -> None:
        """Write the receipt into its place, and make all of it durable."""
        if len(receipt) > RECEIPT_BYTES:
            raise ValueError(f"a receipt of {len(receipt)} bytes")
        if self._unwritten:
            self._append(self._unwritten)
            self._unwritten = b""
        os.pwrite(self._open(), receipt.ljust(RECEIPT_BYTES), self._header_bytes - RECEIPT_BYTES)
        os.fdatasync(self._open())

    def kept_as(self, path: str) -> None:
        """Rename it within its folder; from now on it is not ours to discard."""
        os.rename(self.path, path)
        os.close(self._open())
        self._descriptor = None

    def discard(self) -> None:
        """Remove it, if it was not kept. Safe to repeat."""
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
    """Preamble, prefix and file meta information for a data set that is to be kept as it is (PS3.10 7.1).

    It ends with the place of the receipt, blank.
    """
    elements = b"".join(
        (
            struct.pack("<HH2sHL", 0x0002, 0x0001, b"OB", 0, 2) + b"\x00\x01",
            _element(0x0002, b"UI", sop_class_uid, b"\x00"),
            _element(0x0003, b"UI", sop_instance_uid, b"\x00"),
            _element(0x0010, b"UI", transfer_syntax_uid, b"\x00"),
            _ALWAYS_THE_SAME,
        )
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHL", 0x0002, 0x0000, b"UL", 4, len(elements)) + elements


def first_bytes(path: Path, size_bytes: int) -> bytes:
    """Of an instance, how its data set begins: at most so many bytes."""
    content = _start_of(path, HEADER_BYTES + size_bytes)
    start = len(_header_in(content))
    return content[start : start + size_bytes]


def open_data_set(path: Path) -> BinaryIO:
    """An instance, from the beginning of its data set on; the caller closes it."""
    stream = path.open("rb")
    stream.seek(len(_header_of(path)))
    return stream


def remove_instance(path: Path) -> None:
    """The instance goes before a receipt beside it, so that a removal cut short can be finished."""
    path.unlink(missing_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)


def _element(number: int, vr: bytes, text: str, padding: bytes) -> bytes:
    value = text.encode("ascii")
    value += padding * (len(value) % 2)
    return struct.pack("<HH2sH", 0x0002, number, vr, len(value)) + value


_RECEIPT_ELEMENT = struct.pack("<HH2sHL", 0x0002, 0x0102, b"OB", 0, RECEIPT_BYTES)
_ALWAYS_THE_SAME = b"".join(
    (
        _element(0x0012, b"UI", IMPLEMENTATION_CLASS_UID, b"\x00"),
        _element(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME, b" "),
        _element(0x0100, b"UI", RECEIPT_CREATOR_UID, b"\x00"),
        _RECEIPT_ELEMENT,
        b" " * RECEIPT_BYTES,
    )
)


def _parse(adapter: TypeAdapter[T], content: bytes, no_longer: Iterable[str] = ()) -> T:
    try:
        fields: Any = json.loads(content)
    except ValueError as error:
        raise ReceiptError("not JSON") from error
    version = fields.pop("version", None) if isinstance(fields, dict) else None
    if version != RECEIPT_VERSION:
        raise ReceiptError(f"version {version!r} is not known here, only {RECEIPT_VERSION}")
    for name in no_longer:
        fields.pop(name, None)
    try:
        return adapter.validate_json(json.dumps(fields))
    except ValidationError as error:
        places = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors(include_input=False))
        raise ReceiptError(f"not understood: {places}") from error


def _files(folder: Path) -> list[Path]:
    """The instances in a study's folder; none where it is gone."""
    return sorted(folder.glob("*.dcm"))


def _place(path: Path) -> str:
    """As a receipt names it."""
    return f"studies/{path.parent.name}/{path.name}"


def _is_settled(path: Path) -> bool:
    """It has no second name in incoming/, and a receipt somewhere: without, version 0.1 never acknowledged it."""
    try:
        return path.stat().st_nlink == 1 and _has_receipt(path)
    except FileNotFoundError:
        return False


def _has_receipt(path: Path | str) -> bool:
    return bool(_embedded_receipt(path)) or Path(path).with_suffix(".json").exists()


def _header_of(path: Path | str) -> bytes:
    """Preamble and file meta information of an instance; empty for anything else."""
    return _header_in(_start_of(path, HEADER_BYTES))


def _start_of(path: Path | str, size_bytes: int) -> bytes:
    """At most so many bytes of a file; none where there is no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    try:
        return os.read(descriptor, size_bytes)
    finally:
        os.close(descriptor)


def _header_in(content: bytes) -> bytes:
    """Preamble and file meta information at the start of a file's first bytes."""
    if len(content) < META_BYTES or content[128:140] != _META_START:
        return b""
    size = META_BYTES + int.from_bytes(content[140:144], "little")
    return content[:size] if size <= len(content) else b""


_META_START = b"DICM" + struct.pack("<HH2sH", 0x0002, 0x0000, b"UL", 4)


def _embedded_receipt(path: Path | str) -> bytes:
    """The receipt in an instance's header, without its padding; empty where there is none."""
    header = _header_of(path)
    start = len(header) - RECEIPT_BYTES
    if start <= 0 or header[start - len(_RECEIPT_ELEMENT) : start] != _RECEIPT_ELEMENT:
        return b""
    return header[start:].rstrip(b" ")


def _data_set_bytes(path: Path | str) -> int | None:
    """How long the data set in an instance is; None where there is no instance."""
    header = _header_of(path)
    return os.stat(path).st_size - len(header) if header else None


def _data_set_digest(path: Path) -> tuple[str, int]:
    """SHA-256 and size of the data set in an instance."""
    with path.open("rb") as stream:
        stream.seek(len(_header_of(path)))
        content = file_digest(stream, "sha256").hexdigest()
        return content, stream.tell() - len(_header_of(path))


def _study_uid(path: Path) -> str | None:
    """As the data set says; None where it cannot be read."""
    try:
        return str(dcmread(path, specific_tags=["StudyInstanceUID"], stop_before_pixels=True).StudyInstanceUID)
    except Exception:  # noqa: BLE001  # pydicom raises whatever the bytes lead it to
        return None


def _create(path: Path, content: bytes) -> None:
    """A new file for its owner alone, not synced."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(content)
