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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from threading import Event
from typing import Any

import orjson
import structlog
from sqlalchemy import Connection, func, insert, select, text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import AuditChain, AuditEvent, open_engine
from service.shared.durable import make_folder, sync_folder
from service.shared.log import explain_exception
from service.shared.settings import AuditSettings

CANONICAL_VERSION = 1
BATCH = 1000  # events per transaction: SQLite's other writers wait about 20 ms
WINDOW = 2000  # ids below the newest chained one that are looked at again in every round
MOST_WAITING = 10_000  # events that the lag counts: it is asked for with every page
SEARCH_ALL_S = 3600.0
PAGE = 10_000  # rows that `verify` reads at a time
SPAN = 250_000  # rows that a process of `verify` takes at a time
WORTH_PROCESSES = 4  # spans; below, starting processes takes longer than they save
NO_END = 2**62
NO_EVENT: tuple[None, ...] = (None,) * 10
GENESIS = bytes(32)
LOCK = 20_261_124  # PostgreSQL advisory lock: one chainer appends at a time

log = structlog.get_logger(__name__)

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, check_circular=False).encode

_FIELDS = "{at}, e.kind, e.actor, e.study_id, e.analysis_id, e.result_id, e.delivery_id, {detail}, e.vouches_sha256"
FIELDS_OF = {
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
            f"SELECT e.id, {FIELDS_OF[connection.dialect.name]} FROM audit_event e "
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
    """How far the chainer is behind, up to MOST_WAITING events; `verify` counts them all."""
    first = (
        select(AuditEvent.id, AuditEvent.at)
        .outerjoin(AuditChain, AuditChain.event_id == AuditEvent.id)
        .where(AuditChain.event_id.is_(None), AuditEvent.id > _floor(session))
        .order_by(AuditEvent.id)
        .limit(MOST_WAITING)
        .subquery()
    )
    waiting, oldest = session.execute(select(func.count(), func.min(first.c.at)).select_from(first)).one()
    return Lag(session.scalar(select(func.max(AuditChain.seq))) or 0, waiting, oldest)


def _floor(session: Session) -> int:
    return (session.scalar(select(func.max(AuditChain.event_id))) or 0) - WINDOW


def _link(previous: bytes, row: Sequence[Any]) -> bytes:
    return hashlib.sha256(previous + canonical(row)).digest()


def canonical(row: Sequence[Any]) -> bytes:
    """The canonical bytes of an event; row: id, then the columns of FIELDS_OF. ValueError: the detail is not JSON."""
    event_id, at, kind, actor, study_id, analysis_id, result_id, delivery_id, detail, vouches = row
    fields = [CANONICAL_VERSION, event_id, at, kind, actor, study_id, analysis_id, result_id, delivery_id]
    return _encode([*fields, json.loads(detail), vouches]).encode("ascii")


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


@dataclass(frozen=True, slots=True)
class Span:
    """Places of the chain that are checked in one go: those above `after`, up to and with `upto`."""

    after: int
    upto: int


@dataclass(frozen=True, slots=True)
class Scanned:
    """How far the chain is whole: its last good place and the hash there, and the first row that is not (`wrong`)."""

    seq: int
    digest: bytes
    wrong: tuple[int, int, str, Sequence[Any]] | None = None  # place, event id, recorded hash, the event's row


def verify(
    connection: Connection,
    heads: list[Head],
    *,
    processes: int = 1,
    on_progress: Callable[[int, int], None] = lambda checked, total: None,
) -> Verification:
    """Compute the whole chain again, compare it with the exported heads, and count what has no place in it yet.

    processes: how many check at the same time, each its spans of the chain. Every row is checked against the recorded
    hash of the row before it, and that hash against its own row by whoever has the span before: nothing is left out
    at a joint. on_progress: rows checked so far, and of how many.
    """
    expected = {head.seq: head.hash for head in heads}
    last = connection.scalar(select(func.max(AuditChain.seq))) or 0
    spans = [Span(after, min(after + SPAN, last)) for after in range(0, last, SPAN)] or [Span(0, 0)]
    reached = Scanned(0, GENESIS)
    for span, scanned in _scanned(connection, spans, expected, processes):
        if scanned is None or scanned.wrong is not None or scanned.seq != span.upto:
            reached = scan(connection, Span(span.after, NO_END), expected)  # once more, to the row that is wrong
            break
        reached = scanned
        on_progress(reached.seq, last)
    seq = reached.seq
    fault = None if reached.wrong is None else _fault(connection, seq + 1, reached.digest, *reached.wrong)
    if fault is None and (cut := sorted(place for place in expected if place > seq)):
        fault = f"row {seq + 1} of audit_chain is missing: the exported head reaches to {cut[-1]}, the chain to {seq}"
    return Verification(seq, reached.digest.hex() if seq else "", _not_chained(connection, fault), len(expected), fault)


def _scanned(
    connection: Connection, spans: list[Span], expected: dict[int, str], processes: int
) -> Iterator[tuple[Span, Scanned | None]]:
    """Every span with what was found, in order; None where not even its beginning is there."""
    if processes < 2 or len(spans) < WORTH_PROCESSES:
        for span in spans:
            yield span, _scan_from(connection, span, expected)
        return
    url = connection.engine.url.render_as_string(hide_password=False)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        try:
            shares = [{place: hash_ for place, hash_ in expected.items() if s.after < place <= s.upto} for s in spans]
            yield from zip(spans, pool.map(_scan_in_a_process, [url] * len(spans), spans, shares), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _scan_in_a_process(url: str, span: Span, expected: dict[int, str]) -> Scanned | None:
    engine = open_engine(url, read_only=True)
    try:
        with engine.connect() as connection:
            return _scan_from(connection, span, expected)
    finally:
        engine.dispose()


def _scan_from(connection: Connection, span: Span, expected: dict[int, str]) -> Scanned | None:
    try:
        return scan(connection, span, expected)
    except ValueError:  # the hash before the span is not there, or is none
        return None


def scan(connection: Connection, span: Span, expected: dict[int, str]) -> Scanned:
    """Check a span against the recorded hash before it; ValueError where that is missing.

    The first span begins at the lowest place that there is, so that nothing stands before the first one unseen.
    """
    seq, digest, after = span.after, GENESIS, -NO_END
    if span.after:
        after = span.after
        recorded = connection.scalar(select(AuditChain.hash).where(AuditChain.seq == after))
        digest = bytes.fromhex(recorded or "none")
    while places := _places(connection, after, span.upto):
        events = _events(connection, [event_id for _, event_id, _ in places])
        for place, event_id, recorded in places:
            row = events.get(event_id, NO_EVENT)
            if place != seq + 1 or expected.get(place, recorded) != recorded or not _fits(digest, row, recorded):
                return Scanned(seq, digest, (place, event_id, recorded, tuple(row)))
            seq, digest = place, bytes.fromhex(recorded)
        after = seq
    return Scanned(seq, digest)


def _places(connection: Connection, after: int, upto: int) -> Sequence[tuple[int, int, str]]:
    return _rows(
        connection,
        f"SELECT seq, event_id, hash FROM audit_chain WHERE seq > {after:d} AND seq <= {upto:d} "
        f"ORDER BY seq LIMIT {PAGE:d}",
    )


def _events(connection: Connection, ids: list[int]) -> dict[int, Sequence[Any]]:
    """The events by id. They lie close together but for the few that came late: a range is read, not a join made."""
    low, high = min(ids), max(ids)
    if high - low <= 4 * len(ids) + WINDOW:
        which = f"e.id BETWEEN {low:d} AND {high:d}"
    else:
        which = f"e.id IN ({','.join(str(int(one)) for one in ids)})"
    fields = FIELDS_OF[connection.dialect.name]
    return {row[0]: row for row in _rows(connection, f"SELECT e.id, {fields} FROM audit_event e WHERE {which}")}


def _rows(connection: Connection, statement: str) -> Sequence[Any]:
    """The rows as the driver hands them over: those of SQLAlchemy would take half of the time. Whole numbers only."""
    cursor = connection.connection.cursor()
    try:
        cursor.execute(statement)
        return cursor.fetchall()
    finally:
        cursor.close()


def _not_chained(connection: Connection, fault: str | None) -> int:
    if fault is None:  # every place has its own event: the difference is what has none
        statement = "SELECT (SELECT count(*) FROM audit_event) - (SELECT count(*) FROM audit_chain)"
    else:
        statement = (
            "SELECT count(*) FROM audit_event e WHERE NOT EXISTS (SELECT 1 FROM audit_chain c WHERE c.event_id = e.id)"
        )
    return int(connection.scalar(text(statement)) or 0)


def _fits(previous: bytes, row: Sequence[Any], recorded: str) -> bool:
    """Whether the event is there and is the one that was chained."""
    if row[0] is None:
        return False
    try:
        if hashlib.sha256(previous + canonical_quickly(row)).hexdigest() == recorded:
            return True
        return _link(previous, row).hex() == recorded
    except ValueError:  # a detail that is not JSON
        return False


def canonical_quickly(row: Sequence[Any]) -> bytes:
    """The canonical bytes of nearly every event, in a third of the time; a hash that fits them proves that they are.

    orjson differs where text is not ASCII and in how some floats are written; then `canonical` decides.
    """
    event_id, at, kind, actor, study_id, analysis_id, result_id, delivery_id, detail, vouches = row
    fields = [CANONICAL_VERSION, event_id, at, kind, actor, study_id, analysis_id, result_id, delivery_id]
    return orjson.dumps([*fields, orjson.loads(detail), vouches], option=orjson.OPT_SORT_KEYS)


def _fault(
    connection: Connection, expected: int, previous: bytes, place: int, event_id: int, recorded: str, row: Sequence[Any]
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
            f"SELECT e.id, {FIELDS_OF[connection.dialect.name]} FROM audit_chain c "
            "JOIN audit_event e ON e.id = c.event_id WHERE c.seq BETWEEN :low AND :high"
        ),
        {"low": place - 1000, "high": place + 1000},
    )
    return next((int(row[0]) for row in neighbours if _fits(previous, row, recorded)), None)
