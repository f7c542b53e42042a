"""Numbers over a span of time: what came, what became of it, how long each step took, how much was kept. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from statistics import median
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from service.shared.db import Analysis, AnalysisState, Delivery, DeliveryState, Result, Study

Row = dict[str, Any]
SAMPLE = 5_000  # the newest finished analyses that durations and ratios are taken from


def stats(session: Session, *, since: datetime | None = None, sender: str | None = None) -> Row:
    """Counts, percentiles and ratios of what was received since then (and from that calling AE title)."""
    which: list[ColumnElement[bool]] = []
    if since is not None:
        which.append(Study.first_received_at >= since)
    if sender is not None:
        which.append(Study.calling_ae == sender)
    received = session.execute(
        select(
            func.count().label("studies"),
            func.coalesce(func.sum(Study.instances), 0).label("instances"),
            func.coalesce(func.sum(Study.size_bytes), 0).label("bytes"),
        ).where(*which)
    ).one()
    ended = session.execute(
        select(Analysis.state, Analysis.reason_code, Analysis.route, func.count().label("analyses"))
        .join(Study, Study.id == Analysis.study_id)
        .where(*which)
        .group_by(Analysis.state, Analysis.reason_code, Analysis.route)
    ).all()
    finished = session.execute(
        select(
            Analysis.route,
            Analysis.queued_at,
            Analysis.started_at,
            Analysis.finished_at,
            Analysis.counts,
            Analysis.timings_s,
        )
        .join(Study, Study.id == Analysis.study_id)
        .where(*which, Analysis.state.in_((AnalysisState.READ, AnalysisState.DONE)))
        .order_by(Analysis.id.desc())
        .limit(SAMPLE)
    ).all()
    delivered = session.execute(
        select(Study.completed_at, Delivery.delivered_at)
        .join(Analysis, Analysis.study_id == Study.id)
        .join(Result, Result.analysis_id == Analysis.id)
        .join(Delivery, Delivery.result_id == Result.id)
        .where(*which, Delivery.delivered_at.is_not(None), Analysis.revision == Study.revision)
        .order_by(Delivery.id.desc())
        .limit(SAMPLE)
    ).all()
    steps: dict[str, list[float]] = {}
    for row in finished:
        for step, seconds in (row.timings_s or {}).items():
            steps.setdefault(step, []).append(float(seconds))
    counts = [row.counts for row in finished if row.counts]
    return {
        "studies": received.studies,
        "instances": int(received.instances),
        "bytes": int(received.bytes),
        "analyses": _by(ended, "state"),
        "reasons": _by(ended, "reason_code"),
        "routes": _by(ended, "route"),
        "deliveries": _deliveries(session, which),
        "waited_s": _spread([_seconds(row.queued_at, row.started_at) for row in finished if row.started_at]),
        "read_s": _spread([_seconds(row.started_at, row.finished_at) for row in finished if row.started_at]),
        "complete_to_delivered_s": _spread(
            [_seconds(a, b) for a, b in delivered if a is not None and b is not None and b >= a]
        ),
        "steps_s": {step: _spread(seconds) for step, seconds in steps.items()},
        "inputs_kept": _spread([_ratio(one, "inputs_kept", "inputs") for one in counts if one["inputs"]]),
        "tokens_kept": _spread([_ratio(one, "tokens_kept", "tokens_in") for one in counts if one["tokens_in"]]),
    }


def _by(ended: Sequence[Any], column: str) -> dict[str, int]:
    """How many analyses with each value of the column; those without one are left out."""
    counts: Counter[str] = Counter()
    for row in ended:
        value = getattr(row, column)
        if value is not None:
            counts[str(value)] += row.analyses
    return dict(sorted(counts.items()))


def _deliveries(session: Session, which: Sequence[ColumnElement[bool]]) -> dict[str, dict[str, int]]:
    """By destination: how many in each state."""
    rows = session.execute(
        select(Delivery.destination, Delivery.state, func.count())
        .join(Result, Result.id == Delivery.result_id)
        .join(Analysis, Analysis.id == Result.analysis_id)
        .join(Study, Study.id == Analysis.study_id)
        .where(*which)
        .group_by(Delivery.destination, Delivery.state)
        .order_by(Delivery.destination)
    ).all()
    found: dict[str, dict[str, int]] = {}
    for destination, state, count in rows:
        found.setdefault(destination, {})[DeliveryState(state).value] = count
    return found


def _spread(values: Sequence[float]) -> Row | None:
    """Median, 95th percentile (nearest rank) and maximum; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    rank = -(-95 * len(ordered) // 100)
    return {
        "n": len(ordered),
        "median": round(median(ordered), 4),
        "p95": round(ordered[rank - 1], 4),
        "max": round(ordered[-1], 4),
    }


def _seconds(start: datetime | None, end: datetime | None) -> float:
    return (end - start).total_seconds() if start is not None and end is not None else 0.0


def _ratio(counts: Row, part: str, whole: str) -> float:
    return float(counts[part]) / float(counts[whole])
