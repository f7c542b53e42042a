"""The tables, and how to reach them on SQLite and PostgreSQL. Transitions between states: transitions.py and
delivery_transitions.py.

Two kinds of tables. *History* (study, instance, analysis, result, delivery, audit_event) holds ids, UIDs, codes and
counts and is kept. *Erasable* tables (study_header, acquisition, report_text) hold what names or describes a patient,
or might, being free text; `forget` removes their rows and history still stands. A digest in history that vouches for
erasable content is salted, and the salt is erased with the content.
"""

from __future__ import annotations

import sqlite3
import time
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    CursorResult,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    Update,
    create_engine,
    event,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

BUSY_TIMEOUT_MS = 15_000
# How long a server or a network that says nothing may hold a process up (libpq's own: for ever, or two hours). A
# parameter of the same name in [database] url overrides.
POSTGRESQL_WAITS: dict[str, Any] = {
    "connect_timeout": 5,  # s
    "keepalives_idle": 10,  # s of silence, then three probes
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # ms that sent bytes may stay unacknowledged
}


class StudyState(StrEnum):
    RECEIVING = "receiving"  # image instances may still be on their way
    COMPLETE = "complete"  # quiet for long enough; revision 0: nothing routable has arrived yet


class AnalysisState(StrEnum):
    QUEUED = "queued"  # waiting for a worker
    RUNNING = "running"  # claimed by a worker that holds a lease
    READ = "read"  # the worker's output is stored; results are not built yet
    DONE = "done"  # every result is built, stored and has its deliveries
    REFUSED = "refused"  # cannot be analysed, for the reason on record; final
    FAILED = "failed"  # a fault, as often as max_attempts allows; `requeue` resumes it
    CANCELLED = "cancelled"  # by a command, before it ran
    SUPERSEDED = "superseded"  # a late instance came before it ran


class ResultState(StrEnum):
    BUILT = "built"  # passed the gate, may be sent
    QUARANTINED = "quarantined"  # did not pass the gate, is never sent


class DeliveryState(StrEnum):
    PENDING = "pending"  # waiting for its next attempt
    DELIVERED = "delivered"  # the destination answered Success or a warning
    COMMITTED = "committed"  # the destination took responsibility for it, or was seen to hold it
    REJECTED = "rejected"  # the destination refused it for good, or attempts ran out


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python on every database; SQLite alone would hand back naive values."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time in the database must carry its time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


BigId = BigInteger().with_variant(Integer(), "sqlite")  # SQLite counts INTEGER PRIMARY KEY only
Document = JSON().with_variant(JSONB(), "postgresql")


def _states(of: type[StrEnum], name: str) -> Enum:
    """A VARCHAR with a named CHECK: readable in any client, and a new state is a plain migration."""
    return Enum(
        of,
        name=name,
        native_enum=False,
        create_constraint=True,
        length=16,
        values_callable=lambda members: [member.value for member in members],
    )


class Study(Base):
    """One Study Instance UID. `revision` counts how often image instances reopened it; 0: never opened."""

    __tablename__ = "study"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    study_uid: Mapped[str] = mapped_column(String(64), unique=True)
    state: Mapped[StudyState] = mapped_column(_states(StudyState, "state"))
    revision: Mapped[int]
    dispatched_revision: Mapped[int]  # analyses of every revision up to this one were queued
    first_received_at: Mapped[datetime] = mapped_column(UtcDateTime())
    opened_at: Mapped[datetime | None] = mapped_column(UtcDateTime())  # first image instance of this revision
    last_image_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    completed_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    calling_ae: Mapped[str] = mapped_column(String(16))  # of the last image instance
    held: Mapped[bool]  # rebuilt from the spool: nothing is analysed or sent again without a command
    patient_mismatch: Mapped[bool]  # conflicting patient identifiers arrived under this Study Instance UID
    instances: Mapped[int] = mapped_column(default=0, server_default="0")  # rows of Instance; ingest counts both
    size_bytes: Mapped[int] = mapped_column(BigInteger(), default=0, server_default="0")  # of all of them

    __table_args__ = (
        Index(None, "state", "last_image_at"),
        Index(None, "last_image_at"),
        Index(None, "first_received_at"),
        Index(None, "calling_ae", "first_received_at"),
        Index(None, "held", postgresql_where=text("held"), sqlite_where=text("held")),
    )


class StudyHeader(Base):
    """Erasable. What names the patient and the study; `salt` goes into every digest that vouches for it."""

    __tablename__ = "study_header"

    study_id: Mapped[int] = mapped_column(BigId, ForeignKey("study.id"), primary_key=True, autoincrement=False)
    salt: Mapped[str] = mapped_column(String(64))
    patient_id: Mapped[str] = mapped_column(Text, index=True)
    issuer_of_patient_id: Mapped[str] = mapped_column(Text)
    patient_name: Mapped[str] = mapped_column(Text, index=True)
    patient_birth_date: Mapped[str] = mapped_column(Text)
    patient_sex: Mapped[str] = mapped_column(Text)
    accession_number: Mapped[str] = mapped_column(Text, index=True)
    study_date: Mapped[str] = mapped_column(Text)
    study_description: Mapped[str] = mapped_column(Text)


class Instance(Base):
    """One acknowledged SOP instance with its bytes; the same UID with other bytes is another row, flagged."""

    __tablename__ = "instance"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    study_id: Mapped[int] = mapped_column(BigId, ForeignKey("study.id"))
    series_uid: Mapped[str] = mapped_column(String(64))
    sop_instance_uid: Mapped[str] = mapped_column(String(64))
    sop_class_uid: Mapped[str] = mapped_column(String(64))
    transfer_syntax_uid: Mapped[str] = mapped_column(String(64))
    modality: Mapped[str] = mapped_column(String(16))
    sha256: Mapped[str] = mapped_column(String(64))  # of the data set as received, file meta left out
    size_bytes: Mapped[int] = mapped_column(BigInteger())
    path: Mapped[str] = mapped_column(Text)  # relative to the spool
    received_at: Mapped[datetime] = mapped_column(UtcDateTime())
    revision: Mapped[int]  # of the study, when it arrived
    is_image: Mapped[bool]  # an image of a routable modality, and not one of our own results
    is_conflicting: Mapped[bool]  # other bytes arrived under this UID before
    calling_ae: Mapped[str] = mapped_column(String(16))
    called_ae: Mapped[str] = mapped_column(String(16))
    peer_address: Mapped[str] = mapped_column(String(64))

    __table_args__ = (
        UniqueConstraint("study_id", "sop_instance_uid", "sha256"),
        Index(None, "sop_instance_uid"),  # storage commitment asks by it alone
    )


class Analysis(Base):
    """One run of one route over one revision of a study."""

    __tablename__ = "analysis"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    study_id: Mapped[int] = mapped_column(BigId, ForeignKey("study.id"))
    revision: Mapped[int]
    route: Mapped[str] = mapped_column(String(32))
    run_number: Mapped[int]
    state: Mapped[AnalysisState] = mapped_column(_states(AnalysisState, "state"))
    reason_code: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str | None] = mapped_column(Text)  # a sentence for people, without patient data
    predecessor_id: Mapped[int | None] = mapped_column(BigId, ForeignKey("analysis.id"))
    queued_at: Mapped[datetime] = mapped_column(UtcDateTime())
    rung_at: Mapped[datetime | None] = mapped_column(UtcDateTime())  # last message sent
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    attempts: Mapped[int]
    fence: Mapped[int]  # grows with every claim; only its holder may close the analysis
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime())
    worker: Mapped[str | None] = mapped_column(String(128))
    settings: Mapped[dict[str, Any]] = mapped_column(Document)  # [pruning], [series], [model], as configured
    pruning: Mapped[dict[str, Any] | None] = mapped_column(Document)  # as applied
    model: Mapped[dict[str, Any] | None] = mapped_column(Document)  # ModelIdentity
    prompt: Mapped[str] = mapped_column(Text)
    series_uid: Mapped[str | None] = mapped_column(String(64))
    series_reason: Mapped[str | None] = mapped_column(Text)
    flags: Mapped[list[str] | None] = mapped_column(Document)
    counts: Mapped[dict[str, Any] | None] = mapped_column(Document)  # Counts
    per_input: Mapped[list[list[int]] | None] = mapped_column(Document)  # AnalysisOutput.per_input
    timings_s: Mapped[dict[str, Any] | None] = mapped_column(Document)
    memory_peak_bytes: Mapped[int | None] = mapped_column(BigInteger())
    software_version: Mapped[str | None] = mapped_column(String(64))
    software: Mapped[dict[str, Any] | None] = mapped_column(Document)  # AnalysisOutput.software
    output_path: Mapped[str | None] = mapped_column(Text)  # relative to [data] path
    output_sha256: Mapped[str | None] = mapped_column(String(64))

    __table_args__ = (
        UniqueConstraint("study_id", "revision", "route", "run_number"),
        Index(None, "state", "queued_at"),
        Index(None, "state", "study_id"),
        Index(None, "route", "study_id"),
    )


class Acquisition(Base):
    """Erasable. How the series that was read was acquired, in the modality's words, and how much of it was kept."""

    __tablename__ = "acquisition"

    analysis_id: Mapped[int] = mapped_column(BigId, ForeignKey("analysis.id"), primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(UtcDateTime(), index=True)  # when it was read
    scanner: Mapped[str] = mapped_column(Text)  # Manufacturer's Model Name, Station Name
    protocol: Mapped[str] = mapped_column(Text)  # Protocol Name
    method: Mapped[str] = mapped_column(String(16))  # of pruning, as applied
    inputs: Mapped[int]
    inputs_kept: Mapped[int]
    tokens_in: Mapped[int]
    tokens_kept: Mapped[int]


class ReportText(Base):
    """Erasable. What the model said: it may repeat what it was shown."""

    __tablename__ = "report_text"

    analysis_id: Mapped[int] = mapped_column(BigId, ForeignKey("analysis.id"), primary_key=True, autoincrement=False)
    findings: Mapped[str] = mapped_column(Text)
    impression: Mapped[str] = mapped_column(Text)
    raw_text: Mapped[str] = mapped_column(Text)


class Result(Base):
    """One DICOM object built from an analysis, stored once and sent byte for byte."""

    __tablename__ = "result"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    analysis_id: Mapped[int] = mapped_column(BigId, ForeignKey("analysis.id"), index=True)
    kind: Mapped[str] = mapped_column(String(32))  # sr-comprehensive3d, ...
    state: Mapped[ResultState] = mapped_column(_states(ResultState, "state"))
    sop_class_uid: Mapped[str] = mapped_column(String(64))
    sop_instance_uid: Mapped[str] = mapped_column(String(64), unique=True)
    series_uid: Mapped[str] = mapped_column(String(64))
    device_uid: Mapped[str] = mapped_column(String(64), index=True)
    path: Mapped[str] = mapped_column(Text)  # relative to [data] path
    sha256: Mapped[str] = mapped_column(String(64))  # of the whole Part 10 content
    size_bytes: Mapped[int] = mapped_column(BigInteger())
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    gate: Mapped[list[str]] = mapped_column(Document)  # findings of the gate, errors and warnings

    __table_args__ = (
        Index(
            None,
            "state",
            postgresql_where=text("state = 'quarantined'"),
            sqlite_where=text("state = 'quarantined'"),
        ),
    )


class Delivery(Base):
    """One result to one destination."""

    __tablename__ = "delivery"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    result_id: Mapped[int] = mapped_column(BigId, ForeignKey("result.id"))
    destination: Mapped[str] = mapped_column(String(32))
    state: Mapped[DeliveryState] = mapped_column(_states(DeliveryState, "state"))
    attempts: Mapped[int]
    next_attempt_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    status: Mapped[int | None]  # last DIMSE status; None: no answer was had
    reason: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    delivered_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    proof_at: Mapped[datetime | None] = mapped_column(UtcDateTime())  # when to ask for proof; None: none is wanted
    proof_attempts: Mapped[int] = mapped_column(default=0, server_default="0")
    transaction_uid: Mapped[str | None] = mapped_column(String(64))  # of the last request for storage commitment
    committed_at: Mapped[datetime | None] = mapped_column(UtcDateTime())

    __table_args__ = (
        UniqueConstraint("result_id", "destination"),
        Index(None, "state", "next_attempt_at"),
        Index(None, "state", "destination", "created_at"),
        Index(None, "delivered_at"),
        Index(None, "destination", "id"),
        Index(None, "proof_at"),
        Index(None, "transaction_uid"),
    )


class Destination(Base):
    """Standing of a configured destination; a row appears when it is first paused."""

    __tablename__ = "destination"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    paused: Mapped[bool]
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime())


class Worker(Base):
    """A worker child that says that it is there; written by heartbeat.py. What it reads says Analysis.worker."""

    __tablename__ = "worker"

    name: Mapped[str] = mapped_column(String(128), primary_key=True)  # host/process id, as in Analysis.worker
    host: Mapped[str] = mapped_column(String(96))
    process: Mapped[int]
    parent_process: Mapped[int]  # the Celery parent that starts a new child when this one ends
    device: Mapped[str] = mapped_column(String(32))
    device_name: Mapped[str | None] = mapped_column(String(128))  # None until a model was loaded on it
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger())  # of the device
    memory_used_bytes: Mapped[int | None] = mapped_column(BigInteger())  # of the device, by everybody
    model: Mapped[str | None] = mapped_column(String(128))  # None: loading, or it could not be loaded
    weights_sha256: Mapped[str | None] = mapped_column(String(64))
    software_version: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime())
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime())


class Role(StrEnum):
    VIEWER = "viewer"  # reads studies, reports and images, with identifiers
    OPERATOR = "operator"  # what a viewer does, and commands: requeue, cancel, re-send, pause
    AUDITOR = "auditor"  # reads every event and the configuration; no identifiers, reports or images


class UserAccount(Base):
    """Who may sign in. A removed account keeps its row, so that its name in the history stays one person's."""

    __tablename__ = "user_account"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    password_hash: Mapped[str] = mapped_column(Text)  # argon2id, with its parameters and salt; "": has no password
    issuer: Mapped[str | None] = mapped_column(String(255))  # whose sign-in service knows this person; None: ours
    subject: Mapped[str | None] = mapped_column(String(255))  # the person's identifier there
    role: Mapped[Role] = mapped_column(_states(Role, "role"))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    removed_at: Mapped[datetime | None] = mapped_column(UtcDateTime())

    __table_args__ = (UniqueConstraint("issuer", "subject"),)


class WebSession(Base):
    """One sign-in, or one token of a program. The secret itself is with its holder only."""

    __tablename__ = "web_session"

    secret_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    user_id: Mapped[int] = mapped_column(BigId, ForeignKey("user_account.id"), index=True)
    is_token: Mapped[bool]  # of a program: sent as a bearer token, never idle
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime())
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime())


class AuditEvent(Base):
    """Append-only (triggers in the first migration). Row ids, codes and counts; nothing that names a patient.

    No foreign keys: an event must outlive what it speaks of. `vouches_sha256` is a digest salted with
    StudyHeader.salt over erasable content the event is evidence for.
    """

    __tablename__ = "audit_event"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime(), index=True)
    kind: Mapped[str] = mapped_column(String(48))
    actor: Mapped[str] = mapped_column(String(128))  # program and role, or the user of a command
    study_id: Mapped[int | None] = mapped_column(BigId, index=True)
    analysis_id: Mapped[int | None] = mapped_column(BigId, index=True)
    result_id: Mapped[int | None] = mapped_column(BigId)
    delivery_id: Mapped[int | None] = mapped_column(BigId)
    detail: Mapped[dict[str, Any]] = mapped_column(Document)
    vouches_sha256: Mapped[str | None] = mapped_column(String(64))

    __table_args__ = (
        Index(None, "kind", "id"),
        Index(None, "actor", "id"),
    )


class AuditChain(Base):
    """Append-only (triggers). Which event stands where in the chain, and the hash up to it; written by chain.py."""

    __tablename__ = "audit_chain"

    seq: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=False)  # 1, 2, 3, ... without gaps
    event_id: Mapped[int] = mapped_column(BigId, unique=True)
    hash: Mapped[str] = mapped_column(String(64))


class Tally(Base):
    """What the audit adds up to, as far as the chain was counted: one row, written by tally.py, read by /metrics."""

    __tablename__ = "tally"

    id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=False)  # always 1
    seq: Mapped[int] = mapped_column(BigInteger())  # of audit_chain: everything up to it is in the totals
    totals: Mapped[dict[str, Any]] = mapped_column(Document)


def open_engine(url: str, *, read_only: bool = False) -> Engine:
    """An engine with the recipe each database needs for several processes that write.

    read_only: no statement can change anything, and on SQLite no reader keeps a writer waiting.

    SQLite: WAL, and every transaction begins IMMEDIATE, because a read that turns into a write may fail at once
    with SQLITE_BUSY where a writer would only have waited (https://www.sqlite.org/lang_transaction.html).
    """
    parsed = make_url(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    # parameters are patient attributes, among others: no exception may quote them
    waits = {key: value for key, value in POSTGRESQL_WAITS.items() if key not in parsed.query}
    options = {"connect_args": waits} if parsed.get_backend_name() == "postgresql" else {}
    engine = create_engine(parsed, pool_pre_ping=True, hide_parameters=True, **options)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        if read_only:
            event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA query_only=ON"))
        begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        return engine
    event.listen(engine, "connect", _prepare_postgresql)
    return engine.execution_options(postgresql_readonly=True) if read_only else engine


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    """Indexes over scans: the default of 4 was made for disks that turn, and reads whole tables for a week's rows."""
    connection.autocommit = True  # a SET within a transaction would end with it
    connection.execute("SET random_page_cost = 1.1")
    connection.autocommit = False


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    _write_ahead(connection)
    for pragma in (
        "synchronous=FULL",  # what was committed survives a power cut: Success and the outbox rest on it
        "foreign_keys=ON",
        "secure_delete=ON",  # what `forget` erases is overwritten, not only unlinked
    ):
        connection.execute(f"PRAGMA {pragma}")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turn a file to WAL, once for all: whoever does it beside another is told SQLITE_BUSY at once, whatever the busy
    timeout (two that hold a reader's lock would wait for each other), so here is the waiting.
    """
    until = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)


def open_sessions(engine: Engine) -> sessionmaker[Session]:
    return sessionmaker(engine, expire_on_commit=False)


def took_place(session: Session, statement: Update) -> bool:
    """Whether a conditional UPDATE found its one row as it wanted it."""
    result = session.execute(statement.execution_options(synchronize_session=False))
    return cast("CursorResult[Any]", result).rowcount == 1
