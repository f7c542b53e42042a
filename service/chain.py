"""The hash chain over the audit: appended by one chainer in batches, checked by anybody. Knows no event's meaning.

    hash(seq) = SHA-256(hash(seq - 1) || canonical bytes of the event),   hash(0) = 32 zero bytes

Canonical bytes, version 1: ASCII JSON without white space, the keys of `detail` sorted, of the array
[1, id, at, kind, actor, study_id, analysis_id, result_id, delivery_id, detail, vouches_sha256]; `at` is UTC as
YYYY-MM-DD HH:MM:SS.ffffff. They name no patient, for an event does not; erasing patients leaves the chain whole.

The order is that of arrival at the chainer, not of event ids: PostgreSQL hands ids out before their transactions
commit, so an id below the newest one may appear late, or never (rolled back). Every round therefore looks at the
last WINDOW ids again, and once an hour the chainer looks for any event at all that has no place yet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

import structlog
from sqlalchemy import Connection, func, insert, select, text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import AuditChain, AuditEvent
from service.shared.durable import make_folder, sync_folder
from service.shared.log import explain_exception
from service.shared.settings import AuditSettings

CANONICAL_VERSION = 1
BATCH = 1000  # events per transaction: SQLite's other writers wait about 20 ms
WINDOW = 2000  # ids below the newest chained one that are looked at again in every round
SEARCH_ALL_S = 3600.0
PAGE = 20_000  # rows that `verify` reads at a time
GENESIS = bytes(32)
LOCK = 20_261_124  # PostgreSQL advisory lock: one chainer appends at a time

log = structlog.get_logger(__name__)

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, check_circular=False).encode

_FIELDS = "{at}, e.kind, e.actor, e.study_id, e.analysis_id, e.result_id, e.delivery_id, {detail}, e.vouches_sha256"
_FIELDS_OF = {
    "sqlite": _FIELDS.format(at="e.at", detail="e.detail"),
    "postgresql": _FIELDS.format(
        at="to_char(e.at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')", detail="CAST(e.detail AS text)"
    ),
}


@dataclass(frozen=True, slots=True)
class Head:
    """How far the chain reaches. Kept elsewhere, it proves later that nothing before it was changed or cut off."""

    seq: int
    hash: str
    at: datetime  # when it was looked at

    def to_json(self) -> str:
        return json.dumps({"seq": self.seq, "hash": self.hash, "at": self.at.isoformat()})


@dataclass(frozen=True, slots=True)
class Lag:
    """What the chainer has not come to yet, among the newest events."""

    chained: int
    waiting: int
    oldest_waiting_at: datetime | None


@dataclass(frozen=True, slots=True)
class Verification:
    """What `audit verify` found. `fault` names the first row that is not as it was; None: the chain is whole."""

    checked: int
    head: str
    not_chained: int
    heads_checked: int
    fault: str | None


# --- the chainer ----------------------------------------------------------------------------------------------------


def chain_for_ever(
    settings: AuditSettings,
    heads: Path,
    sessions: sessionmaker[Session],
    stop: Event,
    on_head: Callable[[Head], None] = lambda head: None,
) -> None:
    """Append to the chain what was committed, and export its head on schedule, until `stop`."""
    searched_at = exported_at = float("-inf")
    while not stop.is_set():
        now = datetime.now(UTC)
        try:
            search_all = now.timestamp() - searched_at >= SEARCH_ALL_S
            appended = _append_all(sessions, stop, search_all=search_all)
            if search_all:
                searched_at = now.timestamp()
            if now.timestamp() - exported_at >= settings.head_interval_s:
                head = export_head(sessions, heads, now)
                exported_at = now.timestamp()
                if head is not None:
                    on_head(head)
            if appended:
                log.debug("audit_chained", events=appended)
        except (OperationalError, InterfaceError) as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        except Exception as error:  # noqa: BLE001  # this loop must live; what went wrong is logged and tried again
            log.error("chain_fault", error=explain_exception(error))
        stop.wait(settings.chain_interval_s)


def _append_all(sessions: sessionmaker[Session], stop: Event, *, search_all: bool) -> int:
    done = 0
    with sessions() as session:
        events, chained = (
            session.scalar(select(func.count()).select_from(table)) for table in (AuditEvent, AuditChain)
        )
    everywhere = search_all and events != chained
    while not stop.is_set():
        with sessions.begin() as session:
            appended = append_batch(session, search_all=everywhere)
        done += appended
        if appended < BATCH:
            break
    return done


def append_batch(session: Session, *, search_all: bool = False) -> int:
    """Give the next events their place, at most BATCH of them; how many. Only one caller at a time gets through."""
    connection = session.connection()
    if connection.dialect.name == "postgresql":  # SQLite's transactions are exclusive from their beginning
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
    last = session.execute(select(AuditChain.seq, AuditChain.hash).order_by(AuditChain.seq.desc()).limit(1)).first()
    seq, digest = (last.seq, bytes.fromhex(last.hash)) if last else (0, GENESIS)
    rows = connection.execute(
        text(
            f"SELECT e.id, {_FIELDS_OF[connection.dialect.name]} FROM audit_event e "
            "LEFT JOIN audit_chain c ON c.event_id = e.id "
            "WHERE c.event_id IS NULL AND e.id > :floor ORDER BY e.id LIMIT :batch"
        ),
        {"floor": 0 if search_all else _floor(session), "batch": BATCH},
    ).all()
    links = []
    for row in rows:
        seq, digest = seq + 1, _link(digest, row)
        links.append({"seq": seq, "event_id": row[0], "hash": digest.hex()})
    if links:
        session.execute(insert(AuditChain), links)
    return len(links)


def lag(session: Session) -> Lag:
    """How far the chainer is behind. Looks at the newest events only; `verify` counts them all."""
    waiting, oldest = session.execute(
        select(func.count(AuditEvent.id), func.min(AuditEvent.at))
        .outerjoin(AuditChain, AuditChain.event_id == AuditEvent.id)
        .where(AuditChain.event_id.is_(None), AuditEvent.id > _floor(session))
    ).one()
    return Lag(session.scalar(select(func.max(AuditChain.seq))) or 0, waiting, oldest)


def _floor(session: Session) -> int:
    return (session.scalar(select(func.max(AuditChain.event_id))) or 0) - WINDOW


def _link(previous: bytes, row: Any) -> bytes:
    """row: id, then the columns of _FIELDS."""
    event_id, at, kind, actor, study_id, analysis_id, result_id, delivery_id, detail, vouches = row
    canonical = _encode(
        [
            CANONICAL_VERSION,
            event_id,
            at,
            kind,
            actor,
            study_id,
            analysis_id,
            result_id,
            delivery_id,
            json.loads(detail),
            vouches,
        ]
    )
    return hashlib.sha256(previous + canonical.encode("ascii")).digest()


# --- heads ----------------------------------------------------------------------------------------------------------


def export_head(sessions: sessionmaker[Session], heads: Path, now: datetime) -> Head | None:
    """Append the head to the file `heads` when it has moved; it, or None when it has not."""
    with sessions() as session:
        last = session.execute(select(AuditChain.seq, AuditChain.hash).order_by(AuditChain.seq.desc()).limit(1)).first()
    if last is None or last.seq in {head.seq for head in read_heads(heads)[-1:]}:
        return None
    head = Head(last.seq, last.hash, now)
    make_folder(heads.parent)
    is_new = not heads.exists()
    descriptor = os.open(heads, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(head.to_json() + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    if is_new:
        sync_folder(heads.parent)
    log.info("audit_head", seq=head.seq, hash=head.hash)
    return head


def read_heads(heads: Path) -> list[Head]:
    """The exported heads, oldest first; ValueError names a line that is none. A cut-off last line is left out."""
    if not heads.exists():
        return []
    found = []
    lines = heads.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            found.append(Head(int(content["seq"]), str(content["hash"]), datetime.fromisoformat(content["at"])))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break  # a power cut while it was written
            raise ValueError(f"{heads}: line {number} is no head of the chain") from error
    return found


# --- verify ---------------------------------------------------------------------------------------------------------


def verify(connection: Connection, heads: list[Head]) -> Verification:
    """Compute the whole chain again, compare it with the exported heads, and count what has no place in it yet."""
    expected = {head.seq: head.hash for head in heads}
    seq, digest, wrong = 0, GENESIS, None
    with closing(_links(connection)) as links:
        for place, event_id, recorded, row in links:
            if place != seq + 1 or not _fits(digest, row, recorded) or expected.get(place, recorded) != recorded:
                wrong = (place, event_id, recorded, row)
                break
            seq, digest = place, bytes.fromhex(recorded)
    fault = None if wrong is None else _fault(connection, seq + 1, digest, *wrong)
    if fault is None and (cut := sorted(place for place in expected if place > seq)):
        fault = f"row {seq + 1} of audit_chain is missing: the exported head reaches to {cut[-1]}, the chain to {seq}"
    not_chained = connection.scalar(
        text(
            "SELECT count(*) FROM audit_event e WHERE NOT EXISTS (SELECT 1 FROM audit_chain c WHERE c.event_id = e.id)"
        )
    )
    return Verification(seq, digest.hex() if seq else "", int(not_chained or 0), len(expected), fault)


def _links(connection: Connection) -> Generator[tuple[int, int, str, Any]]:
    """Every row of audit_chain in order, with its event; the event's id is None where there is none.

    The next page is fetched while this one is hashed; the connection is free again once this is closed.
    """
    statement = text(
        f"SELECT c.seq, c.event_id, c.hash, e.id, {_FIELDS_OF[connection.dialect.name]} FROM audit_chain c "
        "LEFT JOIN audit_event e ON e.id = c.event_id WHERE c.seq > :after ORDER BY c.seq LIMIT :page"
    )

    def fetch(after: int) -> Sequence[Any]:
        return connection.execute(statement, {"after": after, "page": PAGE}).all()

    with ThreadPoolExecutor(1) as pool:
        page = pool.submit(fetch, -(2**62))
        while rows := page.result():
            page = pool.submit(fetch, rows[-1][0])
            for row in rows:
                yield row[0], row[1], row[2], row[3:]


def _fits(previous: bytes, row: Any, recorded: str) -> bool:
    """Whether the event is there and is the one that was chained."""
    try:
        return row[0] is not None and _link(previous, row).hex() == recorded
    except ValueError:  # a detail that is not JSON
        return False


def _fault(
    connection: Connection, expected: int, previous: bytes, place: int, event_id: int, recorded: str, row: Any
) -> str:
    """What is wrong with this row of the chain."""
    if place != expected:
        return f"row {expected} of audit_chain is missing (the next one is {place})"
    if row[0] is None:
        return f"event {event_id} is missing (row {place} of audit_chain)"
    if _fits(previous, row, recorded):
        return f"row {place} of audit_chain differs from the exported head: the chain was written anew"
    moved = _event_that_fits(connection, previous, place, recorded)
    if moved is not None:
        return f"row {place} of audit_chain was reordered: event {event_id} stands where event {moved} belongs"
    return f"event {event_id} was altered, or row {place} of audit_chain"


def _event_that_fits(connection: Connection, previous: bytes, place: int, recorded: str) -> int | None:
    """The event of a neighbouring place that the recorded hash belongs to, where rows were swapped."""
    neighbours = connection.execute(
        text(
            f"SELECT e.id, {_FIELDS_OF[connection.dialect.name]} FROM audit_chain c "
            "JOIN audit_event e ON e.id = c.event_id WHERE c.seq BETWEEN :low AND :high"
        ),
        {"low": place - 1000, "high": place + 1000},
    )
    return next((int(row[0]) for row in neighbours if _fits(previous, row, recorded)), None)
