"""Who was refused and why, for the doctor, the health page and the metrics: a small bounded file under the spool.

    state/refusals.jsonl      one JSON object per line: at, calling_ae, called_ae, address, reason, remedy, count
    state/refusals.1.jsonl    the lines before, once the file above has reached MAX_FILE_BYTES

Written by the receiver alone, read by anybody. The same peer with the same reason is counted, not repeated: `count` is
how many there were since its line before. Nothing of a patient, and no instance, is in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from threading import Lock

FILE = "refusals.jsonl"
BEFORE = "refusals.1.jsonl"
MAX_FILE_BYTES = 1 << 20
REPEAT_S = 60.0  # a peer that asks again and again gets a line so often
REMEMBERED = 1000  # peers and reasons whose repetitions are counted


@dataclass(frozen=True, slots=True)
class Refused:
    """One association, connection or instance that was not taken. Empty where it was not known yet."""

    at: datetime
    calling_ae: str
    called_ae: str
    address: str
    reason: str
    remedy: str  # the line of the configuration that would let it in
    count: int = 1


class Refusals:
    """The writer. Safe to call from every thread; never raises, for a refusal must be answered on a full disk too."""

    def __init__(self, spool: Path) -> None:
        self._path = _folder(spool) / FILE
        self._lock = Lock()
        self._counted: dict[tuple[str, ...], Refused] = {}  # `at` of the last line, `count` since then

    def record(self, refused: Refused) -> None:
        """Write it down, or count it where its like was written a moment ago."""
        with self._lock:
            known = self._counted.get(_identity(refused))
            if known is not None and (refused.at - known.at).total_seconds() < REPEAT_S:
                self._counted[_identity(refused)] = replace(known, count=known.count + refused.count)
                return
            if known is None and len(self._counted) >= REMEMBERED:
                self._write_counted(refused.at, at_least_s=0.0)
                self._counted.clear()
            self._append(replace(refused, count=refused.count + (known.count if known else 0)))
            self._counted[_identity(refused)] = replace(refused, count=0)

    def flush(self, now: datetime, at_least_s: float = REPEAT_S) -> None:
        """Write what was only counted for so long; to be called every now and then, and at the end with 0."""
        with self._lock:
            self._write_counted(now, at_least_s)

    def _write_counted(self, now: datetime, at_least_s: float) -> None:
        for identity, counted in list(self._counted.items()):
            if (now - counted.at).total_seconds() < at_least_s:
                continue
            if counted.count:
                self._append(replace(counted, at=now))
                self._counted[identity] = replace(counted, at=now, count=0)
            else:
                del self._counted[identity]

    def _append(self, refused: Refused) -> None:
        line = json.dumps({**asdict(refused), "at": refused.at.isoformat()}) + "\n"
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size > MAX_FILE_BYTES:
                self._path.replace(self._path.with_name(BEFORE))
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(line)


def recent(spool: Path, since: datetime) -> list[Refused]:
    """What was refused since then, the newest first; one entry per peer and reason, with its last time and count."""
    found: dict[tuple[str, ...], Refused] = {}
    for name in (BEFORE, FILE):
        for refused in _read(_folder(spool) / name):
            if refused.at >= since:
                known = found.pop(_identity(refused), None)
                found[_identity(refused)] = replace(refused, count=refused.count + (known.count if known else 0))
    return sorted(found.values(), key=lambda refused: refused.at, reverse=True)


def last_day(spool: Path, now: datetime) -> list[Refused]:
    return recent(spool, now - timedelta(days=1))


def _folder(spool: Path) -> Path:
    return spool / "state"


def _identity(refused: Refused) -> tuple[str, ...]:
    return refused.calling_ae, refused.called_ae, refused.address, refused.reason


def _read(path: Path) -> Iterator[Refused]:
    """The lines that can be read: one may have been cut by a full disk or a power cut."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            fields = json.loads(line)
            at = datetime.fromisoformat(fields.pop("at"))
            if at.tzinfo is not None:
                yield Refused(at=at, **fields)
