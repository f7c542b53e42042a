"""What the web asks the database, page by page. Reads only; every list is bounded and keeps up with a million rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, and_, cast, extract, func, or_, select, text, union_all
from sqlalchemy.orm import Session, aliased

from service.history import sent_to, taken_by
from service.shared import heartbeat
from service.shared.db import (
    Acquisition,
    Analysis,
    AnalysisState,
    AuditEvent,
    Delivery,
    DeliveryState,
    Destination,
    Instance,
    Result,
    ResultState,
    Study,
    StudyHeader,
    StudyState,
)
from service.shared.settings import DestinationSettings

Row = dict[str, Any]
OPEN = (AnalysisState.QUEUED, AnalysisState.RUNNING, AnalysisState.READ)
ENDED = (AnalysisState.DONE, AnalysisState.REFUSED, AnalysisState.FAILED)
LAST_CHARACTER = chr(0x10FFFF)
CHART_POINTS = 2000
MOST_GROUPS = 8  # scanners and protocols that a chart tells apart
SUMMED = ("inputs", "inputs_kept", "tokens_in", "tokens_kept")


class Narrowing(StrEnum):
    """Which studies a list shows: by their own state, by that of their newest analysis, or by their deliveries."""

    RECEIVING = "receiving"
    QUEUED = "queued"
    RUNNING = "running"
    READ = "read"
    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    HELD = "held"  # rebuilt from the spool; waits for a command
    UNDELIVERED = "undelivered"  # some delivery is pending or rejected


@dataclass(frozen=True, slots=True)
class StudyFilter:
    """What a list of studies is narrowed to; None leaves a field open."""

    text: str | None = None  # beginning of accession number, patient ID or name, or a whole Study Instance UID
    state: Narrowing | None = None
    sender: str | None = None  # calling AE title
    since: datetime | None = None
    until: datetime | None = None
    patient_id: str | None = None
    accession: str | None = None
    route: str | None = None  # of any of its analyses
    destination: str | None = None  # of any of its deliveries


def list_studies(
    session: Session, which: StudyFilter, *, before: int | None, limit: int, by_identifier: bool
) -> tuple[list[Row], int | None]:
    """Studies, newest first, each with its newest analysis and its deliveries; and where the next page begins.

    by_identifier: may the text be looked for among what names a patient?
    """
    query = select(Study, StudyHeader, Analysis).outerjoin(StudyHeader, StudyHeader.study_id == Study.id)
    newest_id: Any = Study.id
    if _analysis_state(which) is None:
        newest = select(func.max(Analysis.id)).where(Analysis.study_id == Study.id).correlate(Study).scalar_subquery()
        query = query.outerjoin(Analysis, Analysis.id == newest)
    else:  # from the analyses in this state, newest study first, as their index has them
        later = aliased(Analysis)
        none_later = ~select(later.id).where(later.study_id == Analysis.study_id, later.id > Analysis.id).exists()
        query = query.join(Analysis, Analysis.study_id == Study.id).where(none_later)
        newest_id = Analysis.study_id
    query = query.where(*_study_conditions(which, by_identifier)).limit(limit + 1)
    at = session.scalar(select(Study.first_received_at).where(Study.id == before)) if which.until else None
    if which.until is None:
        query = query.order_by(newest_id.desc())
        query = query if before is None else query.where(newest_id < before)
    else:  # by time: from the newest id on, one would walk to a day that is long ago
        query = query.order_by(Study.first_received_at.desc(), Study.id.desc())
        if before is not None and at is not None:
            earlier = or_(Study.first_received_at < at, and_(Study.first_received_at == at, Study.id < before))
            query = query.where(Study.first_received_at <= at, earlier)
    found = session.execute(query).all()
    page = found[:limit]
    ids = [study.id for study, _, _ in page]
    modalities = _modalities(session, ids)
    deliveries = _deliveries(session, ids)
    rows = [
        {
            "study": study,
            "header": header,
            "analysis": analysis,
            "modalities": modalities.get(study.id, []),
            "deliveries": deliveries.get(study.id, {}),
        }
        for study, header, analysis in page
    ]
    return rows, ids[-1] if len(found) > limit else None


def _study_conditions(which: StudyFilter, by_identifier: bool) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if which.text:
        conditions.append(_names(which.text, by_identifier))
    if which.sender:
        conditions.append(Study.calling_ae == which.sender)
    if which.since:
        conditions.append(Study.first_received_at >= which.since)
    if which.until:
        conditions.append(Study.first_received_at < which.until)
    if which.patient_id:
        conditions.append(StudyHeader.patient_id == which.patient_id)
    if which.accession:
        conditions.append(StudyHeader.accession_number == which.accession)
    if which.route:
        conditions.append(taken_by(which.route))
    if which.destination:
        conditions.append(sent_to(which.destination))
    match which.state:
        case None:
            pass
        case Narrowing.RECEIVING:
            conditions.append(Study.state == StudyState.RECEIVING)
        case Narrowing.HELD:
            conditions.append(and_(Study.held))
        case Narrowing.UNDELIVERED:
            open_ones = (DeliveryState.PENDING, DeliveryState.REJECTED)
            conditions.append(
                Study.id.in_(
                    select(Analysis.study_id)
                    .join(Result, Result.analysis_id == Analysis.id)
                    .join(Delivery, Delivery.result_id == Result.id)
                    .where(Delivery.state.in_(open_ones))
                )
            )
        case _:
            conditions.append(Analysis.state == _analysis_state(which))
    return conditions


def _analysis_state(which: StudyFilter) -> AnalysisState | None:
    """The state of the newest analysis that is asked for."""
    others = (None, Narrowing.RECEIVING, Narrowing.HELD, Narrowing.UNDELIVERED)
    return None if which.state in others else AnalysisState(str(which.state))


def _names(text: str, by_identifier: bool) -> ColumnElement[bool]:
    """Beginnings, as ranges that an index answers; names as they are written in DICOM, in capitals too."""
    found = [select(Study.id).where(Study.study_uid == text)]
    if text.isdigit() and len(text) < 19:
        found.append(select(Study.id).where(Study.id == int(text)))
    if by_identifier:
        variants = dict.fromkeys((text, text.upper(), text.replace(", ", "^").replace(" ", "^").upper(), text.title()))
        for column in (StudyHeader.accession_number, StudyHeader.patient_id, StudyHeader.patient_name):
            matching = [
                column.between(variant, variant + LAST_CHARACTER) & column.startswith(variant, autoescape=True)
                for variant in variants
            ]
            found.append(select(StudyHeader.study_id).where(or_(*matching)))
    return Study.id.in_(union_all(*found))  # a union, not an OR: each part has its own index


def _modalities(session: Session, ids: Sequence[int]) -> dict[int, list[str]]:
    modalities: dict[int, list[str]] = defaultdict(list)
    rows = session.execute(
        select(Instance.study_id, Instance.modality)
        .where(Instance.study_id.in_(ids))
        .distinct()
        .order_by(Instance.study_id, Instance.modality)
    )
    for study_id, modality in rows:
        modalities[study_id].append(modality)
    return modalities


def _deliveries(session: Session, ids: Sequence[int]) -> dict[int, dict[str, int]]:
    counts: dict[int, dict[str, int]] = defaultdict(dict)
    rows = session.execute(
        select(Analysis.study_id, Delivery.state, func.count())
        .join(Result, Result.analysis_id == Analysis.id)
        .join(Delivery, Delivery.result_id == Result.id)
        .where(Analysis.study_id.in_(ids))
        .group_by(Analysis.study_id, Delivery.state)
    )
    for study_id, state, count in rows:
        counts[study_id][state.value] = count
    return counts


def list_analyses(
    session: Session,
    *,
    state: AnalysisState | None,
    route: str | None,
    study_id: int | None,
    before: int | None,
    limit: int,
) -> tuple[list[Analysis], int | None]:
    query = select(Analysis).order_by(Analysis.id.desc())
    if state is not None:
        query = query.where(Analysis.state == state)
    if route is not None:
        query = query.where(Analysis.route == route)
    if study_id is not None:
        query = query.where(Analysis.study_id == study_id)
    return _page(session, query, Analysis.id, before, limit)


def list_deliveries(
    session: Session, *, state: DeliveryState | None, destination: str | None, before: int | None, limit: int
) -> tuple[list[Delivery], int | None]:
    query = select(Delivery).order_by(Delivery.id.desc())
    if state is not None:
        query = query.where(Delivery.state == state)
    if destination is not None:
        query = query.where(Delivery.destination == destination)
    return _page(session, query, Delivery.id, before, limit)


def list_events(
    session: Session,
    *,
    kind: str | None = None,
    actor: str | None = None,
    study_id: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    before: int | None = None,
    limit: int = 50,
) -> tuple[list[AuditEvent], int | None]:
    query = select(AuditEvent)
    if kind:
        query = query.where(AuditEvent.kind == kind)
    if actor:
        query = query.where(AuditEvent.actor == actor)
    if study_id is not None:
        query = query.where(AuditEvent.study_id == study_id)
    if since is not None:
        query = query.where(AuditEvent.at >= since)
    if until is None:
        return _page(session, query.order_by(AuditEvent.id.desc()), AuditEvent.id, before, limit)
    # by time: from the newest id on, one would walk to a day that is long ago
    query = query.where(AuditEvent.at < until).order_by(AuditEvent.at.desc(), AuditEvent.id.desc())
    at = session.scalar(select(AuditEvent.at).where(AuditEvent.id == before))
    if before is not None and at is not None:
        earlier = or_(AuditEvent.at < at, and_(AuditEvent.at == at, AuditEvent.id < before))
        query = query.where(AuditEvent.at <= at, earlier)
    return _page(session, query, AuditEvent.id, None, limit)


def _page(session: Session, query: Any, key: Any, before: int | None, limit: int) -> tuple[list[Any], int | None]:
    if before is not None:
        query = query.where(key < before)
    found = list(session.scalars(query.limit(limit + 1)))
    page = found[:limit]
    return page, page[-1].id if len(found) > limit else None


def results_of(session: Session, analysis_ids: Sequence[int]) -> list[tuple[Result, list[Delivery]]]:
    """Results of these analyses in the order in which they were built, each with its deliveries."""
    results = session.scalars(select(Result).where(Result.analysis_id.in_(analysis_ids)).order_by(Result.id)).all()
    deliveries: dict[int, list[Delivery]] = defaultdict(list)
    ids = [result.id for result in results]
    for one in session.scalars(select(Delivery).where(Delivery.result_id.in_(ids)).order_by(Delivery.id)):
        deliveries[one.result_id].append(one)
    return [(result, deliveries[result.id]) for result in results]


def series_of(session: Session, study_id: int) -> list[Row]:
    rows = session.execute(
        select(Instance.series_uid, Instance.modality, func.count(), func.sum(Instance.size_bytes))
        .where(Instance.study_id == study_id)
        .group_by(Instance.series_uid, Instance.modality)
        .order_by(func.min(Instance.id))
    )
    return [
        {"series_uid": uid, "modality": modality, "instances": count, "size_bytes": int(size or 0)}
        for uid, modality, count, size in rows
    ]


def destinations(session: Session, configured: Sequence[DestinationSettings]) -> list[Row]:
    """Every configured destination with its standing and what waits for it."""
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    undelivered = (DeliveryState.PENDING, DeliveryState.REJECTED)
    rows = session.execute(
        select(Delivery.destination, Delivery.state, func.count())
        .where(Delivery.state.in_(undelivered))
        .group_by(Delivery.destination, Delivery.state)
    )
    for name, state, count in rows:
        counts[name][state.value] = count
    paused = set(session.scalars(select(Destination.name).where(Destination.paused.is_(True))))
    return [
        {
            "name": one.name,
            "ae_title": one.ae_title,
            "address": f"{one.host}:{one.port}",
            "paused": one.name in paused,
            "pending": counts[one.name].get("pending", 0),
            "rejected": counts[one.name].get("rejected", 0),
        }
        for one in configured
    ]


def overview(session: Session, now: datetime) -> Row:
    """The last day at a glance, and all that is not finished."""
    since = now - timedelta(days=1)
    states = _grouped(session, Analysis.state, Analysis.state.in_(OPEN))
    ended = _grouped(session, Analysis.state, Analysis.state.in_(ENDED), Analysis.queued_at >= since)
    deliveries = _grouped(session, Delivery.state, Delivery.state.in_((DeliveryState.PENDING, DeliveryState.REJECTED)))
    oldest = session.scalar(select(func.min(Analysis.queued_at)).where(Analysis.state.in_(OPEN)))
    return {
        "received": _count(session, Study.last_image_at >= since),
        "receiving": _count(session, Study.state == StudyState.RECEIVING),
        "waiting": states.get("queued", 0),
        "running": states.get("running", 0),
        "building": states.get("read", 0),
        "done": ended.get("done", 0),
        "refused": ended.get("refused", 0),
        "failed": ended.get("failed", 0),
        "undelivered": deliveries.get("pending", 0),
        "rejected": deliveries.get("rejected", 0),
        "quarantined": session.scalar(
            select(func.count())  # an analysis with a quarantined result stays `read`
            .select_from(Analysis)
            .join(Result, Result.analysis_id == Analysis.id)
            .where(Analysis.state == AnalysisState.READ, Result.state == ResultState.QUARANTINED)
        )
        or 0,
        "held": _count(session, and_(Study.held)),
        "oldest_unfinished_s": max(0, round((now - oldest).total_seconds())) if oldest else None,
        "workers": heartbeat.workers(session, now),
    }


def _grouped(session: Session, column: Any, *conditions: ColumnElement[bool]) -> dict[str, int]:
    rows = session.execute(select(column, func.count()).where(*conditions).group_by(column))
    return {state.value: count for state, count in rows}


def _count(session: Session, condition: ColumnElement[bool]) -> int:
    return session.scalar(select(func.count()).select_from(Study).where(condition)) or 0


def charts(session: Session, since: datetime, limit: int = CHART_POINTS) -> list[Row]:
    """One point per finished analysis, oldest first: when, from whom, shares kept and seconds by step."""
    rows = session.execute(
        select(
            Analysis.id,
            Analysis.finished_at,
            Analysis.route,
            Analysis.counts,
            Analysis.timings_s,
            Analysis.queued_at,
            Study.calling_ae,
            Acquisition.scanner,
            Acquisition.protocol,
        )
        .join(Study, Study.id == Analysis.study_id)
        .outerjoin(Acquisition, Acquisition.analysis_id == Analysis.id)
        .where(Analysis.state == AnalysisState.DONE, Analysis.queued_at >= since)
        .order_by(Analysis.queued_at.desc())
        .limit(limit)
    ).all()
    points = []
    for analysis_id, finished_at, route, counts, timings_s, queued_at, sender, scanner, protocol in reversed(rows):
        if counts is None or finished_at is None:
            continue
        points.append(
            {
                "analysis_id": analysis_id,
                "finished_at": finished_at,
                "sender": sender,
                "scanner": scanner,
                "protocol": protocol,
                "route": route,
                "slices_kept": _share(counts.get("inputs_kept"), counts.get("inputs")),
                "tokens_kept": _share(counts.get("tokens_kept"), counts.get("tokens_in")),
                "total_s": round((finished_at - queued_at).total_seconds(), 2),
                "timings_s": timings_s or {},
            }
        )
    return points


def _share(part: int | None, whole: int | None) -> float | None:
    return round(part / whole, 4) if part is not None and whole else None


def bin_seconds(span: timedelta) -> int:
    """How much time one step of a chart covers: an hour, six hours or a day."""
    if span <= timedelta(days=2):
        return 3600
    return 6 * 3600 if span <= timedelta(days=30) else 86_400


def over_time(session: Session, since: datetime, bin_s: int) -> tuple[list[Row], list[Row]]:
    """Every analysis of the period, summed up by steps of bin_s: all together, and by scanner and protocol.

    How many were done stands at the time when they were queued; what was kept, at the time when they were read. Only
    the scanners and protocols that were read most are told apart.
    """
    sums: dict[datetime, Row] = defaultdict(lambda: dict.fromkeys(("analyses", *SUMMED), 0))
    done = session.execute(
        select(_step(Analysis.queued_at, bin_s), func.count())
        .where(Analysis.state == AnalysisState.DONE, Analysis.queued_at >= since)
        .group_by(text("1"))
    )
    for step, count in done:
        sums[_begin(step, bin_s)]["analyses"] = count
    kept = session.execute(
        select(
            _step(Acquisition.at, bin_s),
            Acquisition.scanner,
            Acquisition.protocol,
            func.count(),
            *(func.sum(getattr(Acquisition, name)) for name in SUMMED),
        )
        .where(Acquisition.at >= since)
        .group_by(text("1"), Acquisition.scanner, Acquisition.protocol)
    )
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for step, scanner, protocol, analyses, *summed in kept:
        at, parts = _begin(step, bin_s), dict(zip(SUMMED, map(int, summed), strict=True))
        for name, value in parts.items():
            sums[at][name] += value
        groups[scanner, protocol].append(
            {"at": at, "scanner": scanner, "protocol": protocol, "analyses": analyses, **parts}
        )
    busiest = sorted(groups.values(), key=lambda rows: -sum(row["analyses"] for row in rows))[:MOST_GROUPS]
    together = [{"at": at, **row} for at, row in sorted(sums.items())]
    return together, sorted((row for rows in busiest for row in rows), key=lambda row: row["at"])


def _step(column: Any, bin_s: int) -> Any:
    return cast(extract("epoch", column), BigInteger) // bin_s


def _begin(step: int, bin_s: int) -> datetime:
    return datetime.fromtimestamp(int(step) * bin_s, UTC)
