"""Rows -> the shapes of the API, with what the visitor may not see left out. API and pages tell the same story."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.shared.db import Analysis, ReportText, Study, StudyHeader
from service.web import queries
from service.web.access import Visitor
from service.web.schemas import (
    AnalysisOut,
    AnalysisSummary,
    DeliveryOut,
    Header,
    Report,
    ResultOut,
    SeriesOut,
    StudyOut,
    StudySummary,
)


def study_summary(row: dict[str, Any], who: Visitor) -> StudySummary:
    study, header, analysis = row["study"], row["header"], row["analysis"]
    return StudySummary(
        **_columns(study, StudySummary, "header", "modalities", "analysis", "deliveries"),
        header=Header.model_validate(header) if header is not None and who.sees_content else None,
        modalities=row["modalities"],
        analysis=None if analysis is None else AnalysisSummary.model_validate(analysis),
        deliveries=row["deliveries"],
    )


def study_story(session: Session, study: Study, who: Visitor) -> StudyOut:
    """Everything on record about one study, newest analysis first."""
    header = session.get(StudyHeader, study.id) if who.sees_content else None
    analyses = session.scalars(select(Analysis).where(Analysis.study_id == study.id).order_by(Analysis.id.desc())).all()
    return StudyOut(
        **_columns(study, StudyOut, "header", "series", "analyses"),
        header=Header.model_validate(header) if header is not None else None,
        series=[SeriesOut.model_validate(one) for one in queries.series_of(session, study.id)],
        analyses=analysis_stories(session, analyses, who),
    )


def analysis_stories(session: Session, analyses: Sequence[Analysis], who: Visitor) -> list[AnalysisOut]:
    ids = [one.id for one in analyses]
    texts: dict[int, ReportText] = {}
    if who.sees_content:
        texts = {
            one.analysis_id: one for one in session.scalars(select(ReportText).where(ReportText.analysis_id.in_(ids)))
        }
    results = queries.results_of(session, ids)
    return [
        AnalysisOut(
            **_columns(one, AnalysisOut, "report", "results"),
            report=Report.model_validate(texts[one.id], from_attributes=True) if one.id in texts else None,
            results=[
                ResultOut(
                    **_columns(result, ResultOut, "deliveries"),
                    deliveries=[DeliveryOut.model_validate(delivery) for delivery in deliveries],
                )
                for result, deliveries in results
                if result.analysis_id == one.id
            ],
        )
        for one in analyses
    ]


def _columns(row: Any, shape: type[Any], *but: str) -> dict[str, Any]:
    return {name: getattr(row, name) for name in shape.model_fields if name not in but}
