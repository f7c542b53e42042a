"""What the tests of the database share: an upgraded database, rows as the product makes them, audited kinds.

Rows are made through the transitions wherever one exists, so that no test starts from a state that cannot be reached.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.shared import schema, transitions
from service.shared.db import (
    Analysis,
    AuditEvent,
    Delivery,
    Instance,
    Result,
    ResultState,
    Study,
    StudyState,
    open_engine,
    open_sessions,
)
from service.shared.heartbeat import Presence
from service.shared.messages import (
    TOKEN_CODES,
    AnalysisOutput,
    Counts,
    ModelIdentity,
    Retention,
    RetentionArrays,
    TokenState,
)
from service.shared.transitions import Claim

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ACTOR = "test"
STUDY_UID = "2.25.1000"
SETTINGS = {"model": {}, "pruning": {"method": "off"}, "series": {}}


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


@contextmanager
def open_database(url: str) -> Iterator[sessionmaker[Session]]:
    """Sessions on a database with all migrations."""
    engine = open_engine(url)
    try:
        schema.upgrade(engine)
        yield open_sessions(engine)
    finally:
        engine.dispose()


def kinds(sessions: sessionmaker[Session], **which: Any) -> list[str]:
    """The kinds of the audited events, in order; `which` compares columns."""
    with sessions() as session:
        return list(session.scalars(select(AuditEvent.kind).filter_by(**which).order_by(AuditEvent.id)))


def event(sessions: sessionmaker[Session], kind: str) -> AuditEvent:
    """The one event of this kind."""
    with sessions() as session:
        return session.scalars(select(AuditEvent).filter_by(kind=kind)).one()


def get(sessions: sessionmaker[Session], table: type[Any], row_id: Any) -> Any:
    """The row as it is on record now."""
    with sessions() as session:
        return session.get_one(table, row_id)


def add_study(sessions: sessionmaker[Session], uid: str = STUDY_UID, *, revision: int = 1, **changes: Any) -> int:
    """A study, complete unless said otherwise; its row id."""
    fields: dict[str, Any] = {
        "study_uid": uid,
        "state": StudyState.COMPLETE,
        "revision": revision,
        "dispatched_revision": revision,
        "first_received_at": NOW,
        "opened_at": NOW,
        "last_image_at": NOW,
        "completed_at": NOW,
        "calling_ae": "SENDER",
        "held": False,
        "patient_mismatch": False,
    }
    with sessions.begin() as session:
        study = Study(**(fields | changes))
        session.add(study)
        session.flush()
        return study.id


def add_instance(sessions: sessionmaker[Session], study_id: int, number: int = 1, **changes: Any) -> int:
    fields: dict[str, Any] = {
        "study_id": study_id,
        "series_uid": "2.25.2000",
        "sop_instance_uid": f"2.25.3000.{number}",
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2",
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "modality": "CT",
        "sha256": f"{number:064x}",
        "size_bytes": 1000,
        "path": f"studies/x/{number}.dcm",
        "received_at": NOW,
        "revision": 1,
        "is_image": True,
        "is_conflicting": False,
        "calling_ae": "SENDER",
        "called_ae": "MEDPRUNER",
        "peer_address": "192.0.2.1",
    }
    with sessions.begin() as session:
        instance = Instance(**(fields | changes))
        session.add(instance)
        study = session.get_one(Study, study_id)
        study.instances += 1
        study.size_bytes += instance.size_bytes
        session.flush()
        return instance.id


def add_analysis(sessions: sessionmaker[Session], study_id: int, *, now: datetime = NOW, **changes: Any) -> int:
    """A queued analysis; its row id."""
    fields: dict[str, Any] = {
        "study_id": study_id,
        "revision": 1,
        "route": "default",
        "run_number": 1,
        "attempts": 0,
        "fence": 0,
        "settings": SETTINGS,
        "prompt": "Read the slices.",
    }
    with sessions.begin() as session:
        analysis = Analysis(**(fields | changes))
        transitions.queue_analysis(session, analysis, now=now, actor=ACTOR)
        return analysis.id


def claim(
    sessions: sessionmaker[Session],
    analysis_id: int,
    *,
    now: datetime = NOW,
    lease_s: float = 20,
    max_attempts: int = 3,
    worker: str = "worker/1",
) -> Claim | None:
    with sessions.begin() as session:
        return transitions.claim_analysis(
            session,
            analysis_id,
            worker=worker,
            now=now,
            lease_until=now + timedelta(seconds=lease_s),
            max_attempts=max_attempts,
        )


def claimed(sessions: sessionmaker[Session], analysis_id: int, **how: Any) -> Claim:
    """Claim it; it must be there to be claimed."""
    held = claim(sessions, analysis_id, **how)
    assert held is not None
    return held


def claim_in_a_process(url: str, analysis_id: int, gate: Barrier, fences: Queue[int | None]) -> None:
    """Claim it from this process as soon as all are at the gate, and tell the fence."""
    engine = open_engine(url)
    gate.wait(60)
    held = claim(open_sessions(engine), analysis_id, worker=f"worker/{os.getpid()}")
    fences.put(None if held is None else held.fence)
    engine.dispose()


def read(sessions: sessionmaker[Session], analysis_id: int, **changes: Any) -> None:
    """Bring a queued analysis to `read`."""
    held = claimed(sessions, analysis_id)
    with sessions.begin() as session:
        assert transitions.close_read(
            session,
            held,
            output(analysis_id=analysis_id, **changes),
            output_path=f"outputs/{analysis_id}/{held.fence}.json",
            output_sha256="0" * 64,
            now=NOW,
            actor=ACTOR,
        )


def result(analysis_id: int, number: int = 1, **changes: Any) -> Result:
    """A built result that is not on record yet."""
    fields: dict[str, Any] = {
        "analysis_id": analysis_id,
        "kind": "sr-comprehensive3d",
        "state": ResultState.BUILT,
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.88.34",
        "sop_instance_uid": f"2.25.4000.{analysis_id}.{number}",
        "series_uid": f"2.25.5000.{analysis_id}",
        "device_uid": "2.25.6000",
        "path": f"outbox/{number}.dcm",
        "sha256": "0" * 64,
        "size_bytes": 100,
        "created_at": NOW,
        "gate": [],
    }
    return Result(**(fields | changes))


def finish(
    sessions: sessionmaker[Session], analysis_id: int, *results: tuple[Result, list[str]], now: datetime = NOW
) -> bool:
    """Name the results of a read analysis, each with its destinations."""
    with sessions.begin() as session:
        analysis = session.get_one(Analysis, analysis_id)
        return transitions.finish_analysis(session, analysis, list(results), now=now, actor=ACTOR)


def add_deliveries(sessions: sessionmaker[Session], study_id: int, *destinations: str, **changes: Any) -> list[int]:
    """A done analysis of the study with one result and its pending deliveries; their row ids."""
    analysis_id = add_analysis(sessions, study_id)
    read(sessions, analysis_id)
    assert finish(sessions, analysis_id, (result(analysis_id, **changes), list(destinations)))
    return deliveries(sessions, analysis_id)


def deliveries(sessions: sessionmaker[Session], analysis_id: int) -> list[int]:
    with sessions() as session:
        found = select(Delivery.id).join(Result).where(Result.analysis_id == analysis_id).order_by(Delivery.id)
        return list(session.scalars(found))


def output(*, analysis_id: int = 1, **changes: Any) -> AnalysisOutput:
    """What a worker says, as short as it can be."""
    fields: dict[str, Any] = {
        "analysis_id": analysis_id,
        "study_uid": STUDY_UID,
        "series_uid": "2.25.2000",
        "modality": "CT",
        "frame_of_reference_uid": None,
        "series_reason": "the only one",
        "candidates": (),
        "findings": "The lungs are clear.",
        "impression": "No acute finding.",
        "raw_text": "Findings: The lungs are clear.\nImpression: No acute finding.",
        "flags": (),
        "notes": (),
        "model": ModelIdentity(
            name="tiny",
            architecture="Gemma3ForConditionalGeneration",
            path="demo",
            weights_sha256="1" * 64,
            transformers_version="5",
            torch_version="2",
            dtype="float32",
            device="cpu",
            attention="sdpa",
        ),
        "prompt": "Read the slices.",
        "max_new_tokens": 8,
        "pruning": {"method": "off"},
        "preprocessing": {},
        "counts": Counts(
            slices_in_series=20,
            slices_readable=20,
            slices_sampled=20,
            inputs=20,
            inputs_kept=12,
            tokens_in=320,
            tokens_kept=100,
            tokens_merged=40,
            tokens_text=30,
            tokens_generated=8,
        ),
        "timings_s": {"headers": 0.1, "generate": 1.5},
        "memory_peak_bytes": 10**10,
        "software_version": "0.1.0",
        "retention": Retention(sources=(), inputs=(), token_rows=0, token_columns=0),
        "arrays_sha256": "2" * 64,
    }
    return AnalysisOutput(**(fields | changes))


def presence(name: str = "gpu01/7", *, parent: int = 1) -> Presence:
    """What a worker says of itself; `name` is host/process id."""
    return Presence(
        name=name,
        host=name.partition("/")[0],
        process=int(name.partition("/")[2]),
        parent_process=parent,
        device="cuda:0",
        device_name="NVIDIA H100 80GB HBM3",
        memory_bytes=80 * 10**9,
        memory_used_bytes=10**9,
        model="medgemma",
        weights_sha256="1" * 64,
        software_version="0.1.0",
    )


def arrays() -> RetentionArrays:
    """Two inputs of four tokens, one of them not encoded."""
    codes = TOKEN_CODES
    kept, merged, absent = codes[TokenState.KEPT], codes[TokenState.MERGED], codes[TokenState.NOT_ENCODED]
    return RetentionArrays(
        tokens=np.array([[kept, merged, kept, merged], [absent] * 4], np.uint8),
        merged_into=np.array([[-1, 0, -1, 2], [-1] * 4], np.int32),
        scores=np.array([[1.5, 0.5, 1.25, 0.75], [np.nan] * 4], np.float32),
        source_pixels_from_token=np.arange(12, dtype=np.float64).reshape(2, 2, 3),
    )
