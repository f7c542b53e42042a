"""The worker's output -> result objects in the outbox -> `done` with its deliveries. The report step.

Results are built once, gated, stored with their digest, and only then named in the database.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from zoneinfo import ZoneInfo

import structlog
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service.report import gate, retention_map
from service.report.charset import DoesNotFit, recoded
from service.report.encapsulated import build_pdf, key_places
from service.report.encoding import encode
from service.report.header import device_uid
from service.report.identity import PriorDocument, RelatedObject, RunIdentity
from service.report.key_objects import build_key_objects
from service.report.parametric_map import build_parametric_map
from service.report.pixels import DecodedOnce, PixelLimits
from service.report.refusal import NEVER_REPORTED, no_arrays, refused_output
from service.report.retention_map import build_secondary_capture, wanted_frames
from service.report.segmentation import build_segmentation
from service.report.source import SourceError, SourceStudy, read_source
from service.report.structured_report import build_sr
from service.report.text_report import build_text_report
from service.shared import VERSION, transitions
from service.shared.db import Analysis, AnalysisState, Result, ResultState, Study
from service.shared.durable import digest, make_folder, write_durably
from service.shared.inputs import inputs_of
from service.shared.log import explain_exception
from service.shared.messages import AnalysisOutput, Flag, RetentionArrays, load_output
from service.shared.settings import (
    UTF_8,
    Companion,
    DestinationSettings,
    ReportSettings,
    RouteSettings,
    Settings,
    SrSopClass,
    route_called,
    route_destinations,
    routes,
    spool_folder,
)

ACTOR = "service/results"
REFUSALS_OF = timedelta(days=1)
REPORT = "sr-"  # how the kind of a report begins; companions have the names of the configuration
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
            for analysis_id in [*waiting(sessions), *refused(settings, sessions, now)]:
                if now < not_before.get(analysis_id, now):
                    continue
                try:
                    build(settings, sessions, analysis_id)
                except (OperationalError, InterfaceError):
                    raise
                except SourceError as error:  # nothing to write a report on, and no second attempt changes that
                    log.error("no_report_possible", analysis_id=analysis_id, reason=str(error))
                    not_before[analysis_id] = now + REFUSALS_OF
                except Exception as error:  # noqa: BLE001  # the analysis stays `read` and is tried again
                    log.error("results_fault", analysis_id=analysis_id, error=explain_exception(error))
                    not_before[analysis_id] = now + TRY_AGAIN
        except (OperationalError, InterfaceError) as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        except Exception as error:  # noqa: BLE001  # this loop must live; what went wrong is logged and tried again
            log.error("results_fault", error=explain_exception(error))
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


def refused(settings: Settings, sessions: sessionmaker[Session], now: datetime) -> list[int]:
    """Refused analyses of routes with `report_refusals` that have no result yet; of the last day alone.

    So a route that starts to report refusals does not send reports on every study that was ever refused.
    """
    names = [route.name for route in routes(settings) if route.report_refusals]
    if not names:
        return []
    with sessions() as session:
        return list(
            session.scalars(
                select(Analysis.id)
                .where(
                    Analysis.state == AnalysisState.REFUSED,
                    Analysis.route.in_(names),
                    Analysis.finished_at > now - REFUSALS_OF,
                    Analysis.reason_code.not_in(NEVER_REPORTED),
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
        changed = _what_changed(session, analysis)
        modality = _modality(session, analysis)
    source = read_source(paths, default_charset=settings.report.default_charset)
    if analysis.state is AnalysisState.REFUSED:
        output = refused_output(
            source,
            analysis_id=analysis_id,
            modality=modality,
            reason=analysis.reason or "no reason on record",
            software_version=analysis.software_version or VERSION,
        )
        arrays = no_arrays()
    elif analysis.output_path is None or analysis.output_sha256 is None:
        raise ValueError(f"analysis {analysis_id} is `read` and has no output on record")
    else:
        output, arrays = load_output(settings.data.path / analysis.output_path, analysis.output_sha256)
    run = _run(analysis, study, output, predecessors, changed, settings.report)
    stored: dict[str, tuple[Result, list[str]]] = {}  # by SOP Instance UID
    for made in objects(settings, analysis.route, output, arrays, source, run):
        before = stored.get(str(made.dataset.SOPInstanceUID))
        if before is None:
            result = _store(settings.data.path, made, analysis, output, source)
            stored[result.sop_instance_uid] = (result, list(made.destinations))
        else:  # the same bytes: a text that does not fit goes on record with what others get
            before[0].gate.extend(_said_of(made))
            before[1].extend(made.destinations)
    # What people read goes first: no report waits behind a large map
    results = sorted(stored.values(), key=lambda one: not one[0].kind.startswith(REPORT))
    with sessions.begin() as session:
        done = transitions.finish_analysis(
            session,
            analysis,
            results,
            header_faults=[f"{repair.keyword}: {repair.action.value}" for repair in source.repairs],
            now=datetime.now(UTC),
            actor=ACTOR,
        )
    if not done:
        return
    for result, names in results:
        if result.state is ResultState.QUARANTINED:
            log.error("result_quarantined", analysis_id=analysis_id, kind=result.kind, findings=result.gate)
        else:
            log.info("result_built", analysis_id=analysis_id, kind=result.kind, bytes=result.size_bytes, to=names)


@dataclass(frozen=True, slots=True)
class Made:
    """One result object before it is gated, and where it goes."""

    kind: str
    dataset: Dataset
    transfer_syntax_uid: UID
    destinations: list[str]
    related: tuple[RelatedObject, ...] = ()  # what it refers to beside the analysed instances
    charset: str = UTF_8
    misfit: str | None = None  # why these destinations get nothing: fit for the audit


def objects(
    settings: Settings,
    route_name: str,
    output: AnalysisOutput,
    arrays: RetentionArrays,
    source: SourceStudy,
    run: RunIdentity,
) -> Iterator[Made]:
    """Everything the route asks for: its companions, and a report of each class that its destinations take.

    For a destination that takes no UTF-8 each is written once more in its character set. What does not fit goes on
    record as UTF-8 for that destination too, and delivery refuses it: nobody gets a text that was changed.
    """
    route = _route(settings, route_name)
    destinations = route_destinations(settings, route) if route else ()
    wanted = route.companions if route else ()
    if Flag.NOT_ANALYSED in output.flags:  # of what no model was shown there is nothing to draw
        wanted = tuple(companion for companion in wanted if companion is Companion.PDF)
    companions = list(_companions(wanted, output, arrays, source, settings.report, run))
    by_charset: dict[str, list[DestinationSettings]] = {}
    for destination in destinations:
        by_charset.setdefault(destination.charset, []).append(destination)
    for charset, group in (by_charset or {UTF_8: []}).items():
        names = [destination.name for destination in group]
        related = []
        for companion in companions:
            made = _in_charset(replace(companion, destinations=names), charset, run)
            if made.misfit is None:
                related.append(_as_related(made))
            yield made
        by_class: dict[SrSopClass, list[str]] = {}
        for destination in group:
            first, *instead = destination.sr_sop_classes
            by_class.setdefault(first, []).append(destination.name)
            for sop_class in instead:  # built, and sent only where the first is not taken (delivery.py)
                by_class.setdefault(sop_class, [])
        for sop_class, takers in (by_class or {SrSopClass.COMPREHENSIVE_3D: []}).items():
            report = _report(output, source, settings.report, sop_class, run, related)
            made = Made(f"{REPORT}{sop_class.value}", report, ExplicitVRLittleEndian, takers, tuple(related))
            made = _in_charset(made, charset, run)
            yield replace(made, kind=group[0].kind_of_report(sop_class)) if made.charset != UTF_8 else made


def _in_charset(made: Made, charset: str, run: RunIdentity) -> Made:
    """The same result in the character set of its destinations; as it is, with the reason, where it does not fit."""
    if charset == UTF_8:
        return made
    try:
        dataset = recoded(
            made.dataset, charset, made.kind, *run.analysis_key, transfer_syntax_uid=made.transfer_syntax_uid
        )
    except DoesNotFit as error:
        log.warning("charset_misfit", kind=made.kind, destinations=made.destinations, reason=str(error))
        return replace(made, misfit=str(error))
    return replace(made, dataset=dataset, charset=charset)


def _as_related(made: Made) -> RelatedObject:
    uids = (made.dataset.SOPClassUID, made.dataset.SOPInstanceUID, made.dataset.SeriesInstanceUID)
    return RelatedObject(Companion(made.kind), *(str(uid) for uid in uids))


def _route(settings: Settings, name: str) -> RouteSettings | None:
    """None: the configuration no longer has it, so results are kept, for nobody said where they should go."""
    try:
        return route_called(settings, name)
    except KeyError:
        log.warning("route_gone", route=name, remedy="results are kept and sent nowhere")
        return None


def _report(
    output: AnalysisOutput,
    source: SourceStudy,
    settings: ReportSettings,
    sop_class: SrSopClass,
    run: RunIdentity,
    related: Sequence[RelatedObject],
) -> Dataset:
    if sop_class is SrSopClass.BASIC_TEXT:
        return build_text_report(output, source, settings, run=run, related=related)
    return build_sr(output, source, settings, sop_class, run=run, related=related)


def _companions(
    wanted: Sequence[Companion],
    output: AnalysisOutput,
    arrays: RetentionArrays,
    source: SourceStudy,
    settings: ReportSettings,
    run: RunIdentity,
) -> Iterator[Made]:
    """What stands beside the report, without destinations; pixels are decoded once for all of it."""
    slices = wanted_frames(output, source)
    frames = DecodedOnce(slices, PixelLimits(), keep=key_places(slices) if Companion.PDF in wanted else ())
    # The Secondary Capture first, whatever the order in the configuration: it alone looks at the pixels of all slices
    for companion in sorted(wanted, key=list(Companion).index):
        try:
            match companion:
                case Companion.SC:
                    dataset = build_secondary_capture(output, arrays, source, frames, settings, run=run)
                case Companion.SEG:
                    dataset = build_segmentation(output, arrays, source, frames.placed, frames.shape, settings, run=run)
                case Companion.PM:
                    dataset = build_parametric_map(output, arrays, source, frames.placed, settings, run=run)
                case Companion.PDF:
                    dataset = build_pdf(output, arrays, source, frames.kept, settings, run=run)
                case Companion.KOS:
                    dataset = build_key_objects(output, source, settings, run=run)
        except ValueError as error:  # no place to draw on; the report says the same in words
            log.warning("companion_left_out", kind=companion.value, reason=type(error).__name__)
            continue
        syntax = retention_map.TRANSFER_SYNTAX if companion is Companion.SC else ExplicitVRLittleEndian
        yield Made(companion.value, dataset, syntax, [])


def _store(data: Path, made: Made, analysis: Analysis, output: AnalysisOutput, source: SourceStudy) -> Result:
    """Gate one object and make it durable in the outbox under its digest."""
    content = encode(made.dataset, made.transfer_syntax_uid)
    known = {one.sop_instance_uid for one in source.instances}
    findings = gate.check(
        content,
        evidence={
            *(one.sop_instance_uid for one in output.retention.sources if one.sop_instance_uid in known),
            *(one.sop_instance_uid for one in made.related),
        },
        verbatim=source.uids,
        charset=made.charset,
    )
    sha256 = digest(content)
    path = data / "outbox" / sha256[:2] / f"{sha256}.dcm"
    make_folder(path.parent)
    write_durably(path, content)
    return Result(
        analysis_id=analysis.id,
        kind=made.kind,
        state=ResultState.BUILT if gate.passes(findings) else ResultState.QUARANTINED,
        sop_class_uid=str(made.dataset.SOPClassUID),
        sop_instance_uid=str(made.dataset.SOPInstanceUID),
        series_uid=str(made.dataset.SeriesInstanceUID),
        device_uid=device_uid(output),
        path=str(path.relative_to(data)),
        sha256=sha256,
        size_bytes=len(content),
        created_at=datetime.now(UTC),
        gate=[*map(str, findings), *_said_of(made)],
    )


def _said_of(made: Made) -> list[str]:
    return [] if made.misfit is None else [f"warning: charset: {made.misfit}; not for {', '.join(made.destinations)}"]


def _run(
    analysis: Analysis,
    study: Study,
    output: AnalysisOutput,
    predecessors: tuple[PriorDocument, ...],
    changed: str,
    settings: ReportSettings,
) -> RunIdentity:
    began = analysis.started_at or analysis.queued_at
    of_this_machine = began.astimezone().tzinfo or UTC
    return RunIdentity(
        analysis_key=(study.study_uid, str(analysis.revision), analysis.route, str(analysis.run_number)),
        content_time=began,
        software_version=output.software_version,
        timezone=of_this_machine if settings.timezone is None else ZoneInfo(settings.timezone),
        predecessors=predecessors,
        revision_note=changed,
    )


def _instances(session: Session, analysis: Analysis, spool: Path) -> list[Path]:
    """The files of the series that was read; of every image where none was."""
    return [
        spool / one.path
        for one in inputs_of(session, analysis)
        if analysis.state is AnalysisState.REFUSED or one.series_uid == analysis.series_uid
    ]


def _modality(session: Session, analysis: Analysis) -> str:
    """The commonest of the study's images."""
    counted = Counter(one.modality for one in inputs_of(session, analysis))
    return counted.most_common(1)[0][0] if counted else ""


def _what_changed(session: Session, analysis: Analysis) -> str:
    """What is new since the analysis that this one follows, in words; empty for the first."""
    if analysis.predecessor_id is None:
        return ""
    before = session.get_one(Analysis, analysis.predecessor_id)
    this = f"This is revision {analysis.revision}, run {analysis.run_number}; an earlier report was on revision"
    earlier = f"{this} {before.revision}, run {before.run_number}."
    came = sum(one.revision > before.revision for one in inputs_of(session, analysis))
    images = "1 image has" if came == 1 else f"{came} images have"
    said = f"{images} come or changed since." if came else "The same images were read again."
    others = _others(before, analysis)
    return f"{earlier} {said}" + (f" Other than then: {', '.join(others)}." if others else "")


def _others(before: Analysis, analysis: Analysis) -> list[str]:
    """What beside the images is another than in the run before; nothing is said where one of the two has no record."""
    pairs = {
        "the series": (before.series_uid, analysis.series_uid),
        "the model": (_weights(before), _weights(analysis)),
        "the settings of the pruning": (before.pruning, analysis.pruning),
        "the prompt": (before.prompt, analysis.prompt),
        "the software": (before.software_version, analysis.software_version),
    }
    return [name for name, (then, now) in pairs.items() if then and now and then != now]


def _weights(analysis: Analysis) -> tuple[str, str] | None:
    model = analysis.model
    return None if model is None else (str(model.get("name")), str(model.get("weights_sha256")))


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
        if one.kind.startswith(REPORT)
    )
