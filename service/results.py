"""The worker's output -> result objects in the outbox -> `done` with its deliveries. The report step.

Results are built once, gated, stored with their digest, and only then named in the database.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread

import structlog
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from service.report import gate
from service.report.encoding import encode
from service.report.header import device_uid
from service.report.identity import PriorDocument, RunIdentity
from service.report.source import SourceStudy, read_source
from service.report.structured_report import SOP_CLASSES, build_sr
from service.shared import transitions
from service.shared.db import Analysis, AnalysisState, Instance, Result, ResultState, Study
from service.shared.durable import digest, make_folder, write_durably
from service.shared.log import explain_exception
from service.shared.messages import AnalysisOutput, load_output
from service.shared.settings import (
    DestinationSettings,
    ReportSettings,
    RouteSettings,
    Settings,
    SrSopClass,
    route_called,
    route_destinations,
    spool_folder,
)

ACTOR = "service/results"
TRY_AGAIN = timedelta(seconds=60)  # after a fault in building; the analysis stays `read` meanwhile

log = structlog.get_logger(__name__)


@contextmanager
def building(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> Iterator[None]:
    """Build results in a thread of its own while the block runs, until `stop`."""
    thread = Thread(target=build_for_ever, args=(settings, sessions, stop), name="results")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def build_for_ever(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> None:
    """Build the results of every analysis that was read, until `stop`; a fault in one never stops the others."""
    not_before: dict[int, datetime] = {}
    while not stop.is_set():
        now = datetime.now(UTC)
        try:
            for analysis_id in waiting(sessions):
                if now < not_before.get(analysis_id, now):
                    continue
                try:
                    build(settings, sessions, analysis_id)
                except DBAPIError:
                    raise
                except Exception as error:  # noqa: BLE001  # the analysis stays `read` and is tried again
                    log.error("results_fault", analysis_id=analysis_id, error=explain_exception(error))
                    not_before[analysis_id] = now + TRY_AGAIN
        except DBAPIError as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        stop.wait(settings.assembly.sweep_s)


def waiting(sessions: sessionmaker[Session]) -> list[int]:
    """Analyses that were read and have no result yet; one with a quarantined result has one and waits for people."""
    with sessions() as session:
        return list(
            session.scalars(
                select(Analysis.id)
                .where(
                    Analysis.state == AnalysisState.READ,
                    ~select(Result.id).where(Result.analysis_id == Analysis.id).exists(),
                )
                .order_by(Analysis.finished_at)
            )
        )


def build(settings: Settings, sessions: sessionmaker[Session], analysis_id: int) -> None:
    """Build, gate and store every result of one analysis, then name them all in one transaction."""
    with sessions() as session:
        analysis = session.get_one(Analysis, analysis_id)
        study = session.get_one(Study, analysis.study_id)
        paths = _instances(session, analysis, spool_folder(settings))
        predecessors = _predecessors(session, analysis, study)
    if analysis.output_path is None or analysis.output_sha256 is None:
        raise ValueError(f"analysis {analysis_id} is `read` and has no output on record")
    output, _arrays = load_output(settings.data.path / analysis.output_path, analysis.output_sha256)
    source = read_source(paths, default_charset=settings.report.default_charset)
    run = _run(analysis, study, output, predecessors)
    results = [
        (_store(settings, source, output, sop_class, run, analysis), names)
        for sop_class, names in _wanted(settings, analysis.route)
    ]
    with sessions.begin() as session:
        done = transitions.finish_analysis(session, analysis, results, now=datetime.now(UTC), actor=ACTOR)
    if not done:
        return
    for result, names in results:
        if result.state is ResultState.QUARANTINED:
            log.error("result_quarantined", analysis_id=analysis_id, kind=result.kind, findings=result.gate)
        else:
            log.info("result_built", analysis_id=analysis_id, kind=result.kind, bytes=result.size_bytes, to=names)


def _wanted(settings: Settings, route_name: str) -> list[tuple[SrSopClass, list[str]]]:
    """Which SR classes the route's destinations take, each with the destinations that get it.

    A route that the configuration no longer has keeps its results; nobody said where they should go.
    """
    route: RouteSettings | None
    try:
        route = route_called(settings, route_name)
    except KeyError:
        log.warning("route_gone", route=route_name, remedy="results are kept and sent nowhere")
        route = None
    destinations: tuple[DestinationSettings, ...] = () if route is None else route_destinations(settings, route)
    wanted: dict[SrSopClass, list[str]] = {}
    for destination in destinations:
        wanted.setdefault(destination.sr_sop_class, []).append(destination.name)
    return list(wanted.items()) or [(SrSopClass.COMPREHENSIVE_3D, [])]


def _store(
    settings: Settings,
    source: SourceStudy,
    output: AnalysisOutput,
    sop_class: SrSopClass,
    run: RunIdentity,
    analysis: Analysis,
) -> Result:
    """One SR, gated and durable in the outbox under its digest."""
    report: ReportSettings = settings.report
    dataset = build_sr(output, source, report, sop_class, run=run)
    content = encode(dataset)
    findings = gate.check(
        content,
        evidence={
            one.sop_instance_uid
            for one in output.retention.sources
            if source.instance(one.sop_instance_uid) is not None
        },
        verbatim={source.study_uid, *(one.sop_instance_uid for one in source.instances)},
    )
    sha256 = digest(content)
    path = settings.data.path / "outbox" / sha256[:2] / f"{sha256}.dcm"
    make_folder(path.parent)
    write_durably(path, content)
    return Result(
        analysis_id=analysis.id,
        kind=f"sr-{sop_class.value}",
        state=ResultState.BUILT if gate.passes(findings) else ResultState.QUARANTINED,
        sop_class_uid=SOP_CLASSES[sop_class],
        sop_instance_uid=str(dataset.SOPInstanceUID),
        series_uid=str(dataset.SeriesInstanceUID),
        device_uid=device_uid(output),
        path=str(path.relative_to(settings.data.path)),
        sha256=sha256,
        size_bytes=len(content),
        created_at=datetime.now(UTC),
        gate=[f"{one.severity}: {one.checker}: {one.text}" for one in findings],
    )


def _run(
    analysis: Analysis, study: Study, output: AnalysisOutput, predecessors: tuple[PriorDocument, ...]
) -> RunIdentity:
    if analysis.started_at is None:
        raise ValueError(f"analysis {analysis.id} was read and never started")
    return RunIdentity(
        analysis_key=(study.study_uid, str(analysis.revision), analysis.route, str(analysis.run_number)),
        content_time=analysis.started_at,
        software_version=output.software_version,
        predecessors=predecessors,
        revision_note=f"Revision {analysis.revision}, run {analysis.run_number}." if predecessors else "",
    )


def _instances(session: Session, analysis: Analysis, spool: Path) -> list[Path]:
    """The files of the series that was read; of several contents under one UID the last, as the worker does."""
    rows = session.execute(
        select(Instance.sop_instance_uid, Instance.path)
        .where(
            Instance.study_id == analysis.study_id,
            Instance.series_uid == analysis.series_uid,
            Instance.is_image.is_(True),
            Instance.revision <= analysis.revision,
        )
        .order_by(Instance.received_at, Instance.id)
    )
    return list({uid: spool / path for uid, path in rows}.values())


def _predecessors(session: Session, analysis: Analysis, study: Study) -> tuple[PriorDocument, ...]:
    """The reports of the analysis that this one follows, as far as they were built by now."""
    if analysis.predecessor_id is None:
        return ()
    earlier = session.scalars(
        select(Result)
        .where(Result.analysis_id == analysis.predecessor_id, Result.state == ResultState.BUILT)
        .order_by(Result.id)
    )
    return tuple(
        PriorDocument(one.sop_class_uid, one.sop_instance_uid, one.series_uid, study.study_uid)
        for one in earlier
        if one.kind.startswith("sr-")
    )
