"""What a person may tell the service to do with one study. Each command is a transition with its user on record."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.dispatch import new_analysis
from service.shared import audit, delivery_transitions, transitions
from service.shared.audit import AuditKind
from service.shared.db import (
    Analysis,
    AnalysisState,
    Delivery,
    DeliveryState,
    Result,
    ResultState,
    Study,
    StudyState,
)
from service.shared.settings import Settings, routes


class CannotResend(Exception):
    """Nothing can be sent again; the message says why."""


def requeue(session: Session, study: Study, settings: Settings, *, again: bool, now: datetime, actor: str) -> list[str]:
    """Release a held study, resume failed analyses of its present revision and rejected deliveries; with `again`,
    queue a new run of every route that ran and is not under way. Says what was done; the sweep sends the messages."""
    done = []
    if study.held:
        study.held = False
        audit.append(session, AuditKind.STUDY_RELEASED, now=now, actor=actor, study_id=study.id)
        done.append("study released")
    analyses = session.scalars(select(Analysis).where(Analysis.study_id == study.id).order_by(Analysis.id)).all()
    for analysis in analyses:
        if analysis.revision < study.revision:  # what it would read is out of date; the new revision has its own
            continue
        if transitions.requeue_failed(session, analysis.id, now=now, actor=actor):
            done.append(f"analysis {analysis.id} queued again")
    rejected = session.scalars(
        select(Delivery.id)
        .join(Result, Result.id == Delivery.result_id)
        .join(Analysis, Analysis.id == Result.analysis_id)
        .where(Analysis.study_id == study.id, Delivery.state == DeliveryState.REJECTED)
    ).all()
    for delivery_id in rejected:
        if delivery_transitions.requeue_delivery(session, delivery_id, now=now, actor=actor):
            done.append(f"delivery {delivery_id} pending again")
    if again and study.state is StudyState.COMPLETE and not study.patient_mismatch:
        present = [one for one in analyses if one.revision == study.revision]
        under_way = {one.route for one in present if one.state in (AnalysisState.QUEUED, AnalysisState.RUNNING)}
        for route in routes(settings):
            if route.name in {one.route for one in present} - under_way:
                analysis = new_analysis(session, study, route, settings)
                transitions.queue_analysis(session, analysis, now=now, actor=actor)
                done.append(f"route {route.name} queued as run {analysis.run_number}")
    return done


def resend(
    session: Session, study: Study, settings: Settings, *, to: str | None, now: datetime, actor: str
) -> list[str]:
    """Send the stored results of the study's newest finished analyses once more: to where they went, or `to` one
    destination. Says what was done; CannotResend when there is nothing that could be sent."""
    known = {one.name for one in settings.destination}
    if to is not None and to not in known:
        raise CannotResend(f"no [[destination]] is called {to!r}; known: {', '.join(sorted(known)) or 'none'}")
    results = session.scalars(
        select(Result)
        .join(Analysis, Analysis.id == Result.analysis_id)
        .where(Analysis.id.in_(_newest_done(session, study)), Result.state == ResultState.BUILT)
        .order_by(Result.id)
    ).all()
    if not results:
        raise CannotResend("this study has no result that was built for sending; see `show`")
    sent = set(session.scalars(select(Delivery.result_id).where(Delivery.result_id.in_([one.id for one in results]))))
    done, gone = [], 0
    results = [one for one in results if one.id in sent] or results  # the others only stand in for those
    for result in results:
        if not (settings.data.path / result.path).exists():
            gone += 1
            continue
        went = set(session.scalars(select(Delivery.destination).where(Delivery.result_id == result.id)))
        for name in sorted({to} if to is not None else went & known):
            if delivery_transitions.resend_result(session, result.id, name, now=now, actor=actor) is not None:
                done.append(f"{result.kind} is on its way to {name}")
    if gone == len(results):
        raise CannotResend("the stored results have been removed ([data] keep_days); `requeue --again` makes new ones")
    return done


def _newest_done(session: Session, study: Study) -> list[int]:
    """Of each route, its newest analysis that has results."""
    rows = session.execute(
        select(Analysis.id, Analysis.route)
        .where(Analysis.study_id == study.id, Analysis.state == AnalysisState.DONE)
        .order_by(Analysis.id)
    )
    return list({route: analysis_id for analysis_id, route in rows}.values())


def cancel(session: Session, study: Study, *, now: datetime, actor: str) -> int:
    """Cancel the study's queued analyses; how many."""
    queued = session.scalars(
        select(Analysis.id).where(Analysis.study_id == study.id, Analysis.state == AnalysisState.QUEUED)
    ).all()
    return sum(transitions.cancel_queued(session, one, now=now, actor=actor) for one in queued)
