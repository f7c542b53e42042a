"""What happened, as values: queries for `status`, `history` and `show`. Reads only; printing.py makes tables of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.orm import Session

from service import chain
from service.shared import heartbeat
from service.shared.db import (
    Analysis,
    AnalysisState,
    AuditEvent,
    Delivery,
    DeliveryState,
    Destination,
    Instance,
    ReportText,
    Result,
    Study,
    StudyHeader,
    StudyState,
)
from service.shared.settings import DestinationSettings

Row = dict[str, Any]

LAST_DAY = timedelta(days=1)
OPEN = (AnalysisState.QUEUED, AnalysisState.RUNNING, AnalysisState.READ)
UNDELIVERED = (DeliveryState.PENDING, DeliveryState.REJECTED)
MOST_DIGITS = 18  # of a row id: what BIGINT holds


class NotFound(Exception):
    """Nothing in the history answers to that name; the message says what was looked for."""


def status(session: Session, destinations: Sequence[DestinationSettings], now: datetime) -> Row:
    """Everything that is not finished, what finished within the last day, and every destination with what waits for it.

    What ended longer ago is not counted: `stats` does, and /metrics.
    """
    since = now - LAST_DAY
    oldest = session.scalar(select(func.min(Analysis.queued_at)).where(Analysis.state.in_(OPEN)))
    waiting = dict(
        session.execute(
            select(Delivery.destination, func.count())
            .where(Delivery.state == DeliveryState.PENDING)
            .group_by(Delivery.destination)
        ).all()
    )
    behind = chain.lag(session)
    paused = set(session.scalars(select(Destination.name).where(Destination.paused.is_(True))))
    return {
        "since": since,
        "studies": _counts(session, Study, (StudyState.RECEIVING,), Study.last_image_at >= since),
        "studies_held": session.scalar(select(func.count()).select_from(Study).where(Study.held)),
        "instances": session.scalar(
            select(func.coalesce(func.sum(Study.instances), 0)).where(Study.last_image_at >= since)
        ),
        "analyses": _counts(session, Analysis, (*OPEN, AnalysisState.FAILED), Analysis.queued_at >= since),
        "deliveries": _counts(session, Delivery, UNDELIVERED, Delivery.delivered_at >= since),
        "oldest_unfinished_s": _age_s(oldest, now),
        "audit": {
            "chained": behind.chained,
            "waiting": behind.waiting,
            "lag_s": _age_s(behind.oldest_waiting_at, now) or 0,
        },
        "workers": heartbeat.workers(session, now),
        "destinations": [
            {
                "name": one.name,
                "ae_title": one.ae_title,
                "address": f"{one.host}:{one.port}",
                "paused": one.name in paused,
                "waiting": waiting.get(one.name, 0),
            }
            for one in destinations
        ],
        "waiting_for_others": {
            name: number for name, number in waiting.items() if name not in {one.name for one in destinations}
        },
    }


def recent(
    session: Session,
    *,
    limit: int,
    state: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    sender: str | None = None,
    accession: str | None = None,
    patient_id: str | None = None,
    route: str | None = None,
    destination: str | None = None,
) -> list[Row]:
    """Studies by their first instance, newest first, each with its newest analysis and undelivered results.

    state: of the study, of its newest analysis or of a delivery. since, until: of its first instance, `until` itself
    left out. sender: calling AE title of its last image. route, destination: of any of its analyses and deliveries.
    """
    newest = select(func.max(Analysis.id)).where(Analysis.study_id == Study.id).correlate(Study).scalar_subquery()
    query = (
        select(Study, StudyHeader, Analysis)
        .outerjoin(StudyHeader, StudyHeader.study_id == Study.id)
        .outerjoin(Analysis, Analysis.id == newest)
        .order_by(Study.first_received_at.desc(), Study.id.desc())
        .limit(limit)
    )
    if state:
        query = query.where(_in_state(state))
    if since:
        query = query.where(Study.first_received_at >= since)
    if until:
        query = query.where(Study.first_received_at < until)
    if sender:
        query = query.where(Study.calling_ae == sender)
    if patient_id:
        query = query.where(StudyHeader.patient_id == patient_id)
    if route:
        query = query.where(taken_by(route))
    if destination:
        query = query.where(sent_to(destination))
    if accession:
        query = query.where(StudyHeader.accession_number == accession)
    found = session.execute(query).all()
    ids = [study.id for study, _, _ in found]
    deliveries = _deliveries(session, ids)
    return [
        {
            "study_id": study.id,
            "study_uid": study.study_uid,
            "accession_number": header.accession_number if header else None,
            "patient_id": header.patient_id if header else None,
            "received_at": study.first_received_at,
            "from": study.calling_ae,
            "instances": study.instances,
            "revision": study.revision,
            "study_state": study.state.value,
            "held": study.held,
            "route": analysis.route if analysis else None,
            "analysis_state": analysis.state.value if analysis else None,
            "reason": analysis.reason if analysis else None,
            "counts": analysis.counts if analysis else None,
            "deliveries": deliveries.get(study.id, {}),
        }
        for study, header, analysis in found
    ]


def taken_by(route: str) -> ColumnElement[bool]:
    """Any analysis of the study is of this route."""
    return Study.id.in_(select(Analysis.study_id).where(Analysis.route == route))


def sent_to(destination: str) -> ColumnElement[bool]:
    """Any result of the study goes, went or was to go to this destination."""
    return Study.id.in_(
        select(Analysis.study_id)
        .join(Result, Result.analysis_id == Analysis.id)
        .join(Delivery, Delivery.result_id == Result.id)
        .where(Delivery.destination == destination)
    )


def _in_state(state: str) -> ColumnElement[bool]:
    """Of the study, of its newest analysis or of a delivery; one index answers, whichever it is."""
    if state in set(StudyState):
        return Study.state == state
    if state in set(DeliveryState):
        return Study.id.in_(
            select(Analysis.study_id)
            .join(Result, Result.analysis_id == Analysis.id)
            .join(Delivery, Delivery.result_id == Result.id)
            .where(Delivery.state == state)
        )
    if state == AnalysisState.DONE:  # nearly all are: the newest come first without help
        return Analysis.state == state
    return and_(Analysis.state == state, Study.id.in_(select(Analysis.study_id).where(Analysis.state == state)))


def study_named(session: Session, name: str) -> Study:
    """The study with this Study Instance UID, row id (as `history` prints it), or accession number; else NotFound.

    Also when the name means several studies: a command must never reach another patient's study by chance.
    """
    found = list(session.scalars(select(Study).where(Study.study_uid == name)))
    if not found:
        found = list(
            session.scalars(
                select(Study)
                .join(StudyHeader, StudyHeader.study_id == Study.id)
                .where(StudyHeader.accession_number == name)
            )
        )
        if name.isdecimal() and len(name) <= MOST_DIGITS:
            numbered = session.get(Study, int(name))
            found += [numbered] if numbered is not None and numbered not in found else []
    if not found:
        raise NotFound(f"no study with Study Instance UID, number or accession number {name!r}; see `history`")
    if len(found) > 1:
        raise NotFound(f"{name!r} is number or accession number of {len(found)} studies; give the Study Instance UID")
    return found[0]


def study_story(session: Session, study: Study) -> Row:
    """Everything on record about one study: header, series, analyses with results and deliveries, events."""
    header = session.get(StudyHeader, study.id)
    series = session.execute(
        select(Instance.series_uid, Instance.modality, func.count(), func.sum(Instance.size_bytes))
        .where(Instance.study_id == study.id)
        .group_by(Instance.series_uid, Instance.modality)
        .order_by(func.min(Instance.id))
    ).all()
    analyses = session.scalars(
        select(Analysis).where(Analysis.study_id == study.id).order_by(Analysis.revision, Analysis.id)
    ).all()
    events = session.scalars(select(AuditEvent).where(AuditEvent.study_id == study.id).order_by(AuditEvent.id)).all()
    return {
        "study": _columns(study),
        "header": None
        if header is None
        else {k: v for k, v in _columns(header).items() if k not in ("salt", "study_id")},
        "series": [
            {"series_uid": uid, "modality": modality, "instances": count, "size_bytes": int(size or 0)}
            for uid, modality, count, size in series
        ],
        "analyses": [_analysis_story(session, one) for one in analyses],
        "events": [_columns(one) for one in events],
    }


def _analysis_story(session: Session, analysis: Analysis) -> Row:
    text = session.get(ReportText, analysis.id)
    results = session.scalars(select(Result).where(Result.analysis_id == analysis.id).order_by(Result.id)).all()
    return {
        **_columns(analysis),
        "report": None if text is None else {"findings": text.findings, "impression": text.impression},
        "results": [
            {
                **_columns(result),
                "deliveries": [
                    _columns(delivery)
                    for delivery in session.scalars(
                        select(Delivery).where(Delivery.result_id == result.id).order_by(Delivery.id)
                    )
                ],
            }
            for result in results
        ],
    }


def _age_s(since: datetime | None, now: datetime) -> int | None:
    return None if since is None else max(0, round((now - since).total_seconds()))


def _counts(session: Session, table: Any, standing: Sequence[StrEnum], recent: ColumnElement[bool]) -> dict[str, int]:
    """By state: all rows in a standing one, the recent ones of the others."""
    states = list(table.state.type.enum_class)
    ended = [state for state in states if state not in standing]
    query = select(table.state, func.count()).group_by(table.state)
    present: dict[Any, int] = dict(session.execute(query.where(table.state.in_(standing))).all())
    present |= dict(session.execute(query.where(table.state.in_(ended), recent)).all())
    return {state.value: present.get(state, 0) for state in states}


def _deliveries(session: Session, ids: Sequence[int]) -> dict[int, dict[str, int]]:
    """By study: how many deliveries in each state."""
    rows = session.execute(
        select(Analysis.study_id, Delivery.state, func.count())
        .join(Result, Result.analysis_id == Analysis.id)
        .join(Delivery, Delivery.result_id == Result.id)
        .where(Analysis.study_id.in_(ids))
        .group_by(Analysis.study_id, Delivery.state)
    )
    found: dict[int, dict[str, int]] = {}
    for study_id, state, count in rows:
        found.setdefault(study_id, {})[state.value] = count
    return found


def _columns(row: Any) -> Row:
    return {column.key: getattr(row, column.key) for column in row.__mapper__.column_attrs}
