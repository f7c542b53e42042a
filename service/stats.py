"""Numbers over a span of time: what came, what became of it, how long each step took, how much was kept. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from statistics import median
from typing import Any

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session

from service.shared.db import Analysis, AnalysisState, Delivery, Result, Study

Row = dict[str, Any]
SAMPLE = 2_000  # of the newest studies: finished analyses and deliveries that durations and ratios are taken from
READ = (AnalysisState.READ, AnalysisState.DONE)


def stats(session: Session, *, since: datetime | None = None, sender: str | None = None) -> Row:
    """Counts, percentiles and ratios of what was received since then (and from that calling AE title).

    Counts are of everything; percentiles and ratios of the newest, as many as they say (`n`).
    """
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
    states, reasons, routes = Counter[str](), Counter[str](), Counter[str]()
    ended = (Analysis.state, Analysis.reason_code, Analysis.route)
    for state, reason, route, count in session.execute(
        _analyses(which, *ended, func.count()).group_by(*ended).order_by(*ended)
    ):
        states[str(state)] += count
        routes[route] += count
        if reason is not None:
            reasons[reason] += count
    deliveries: dict[str, dict[str, int]] = {}
    sent = (Delivery.destination, Delivery.state)
    for destination, state, count in session.execute(
        _deliveries(which, *sent, func.count()).group_by(*sent).order_by(*sent)
    ):
        deliveries.setdefault(destination, {})[str(state)] = count
    finished = session.execute(
        _newest(
            _analyses(
                which,
                Analysis.queued_at,
                Analysis.started_at,
                Analysis.finished_at,
                Analysis.counts,
                Analysis.timings_s,
            ).where(Analysis.state.in_(READ))
        )
    ).all()
    delivered = session.execute(
        _newest(
            _deliveries(which, Study.completed_at, Delivery.delivered_at).where(
                Delivery.delivered_at >= Study.completed_at, Analysis.revision == Study.revision
            )
        )
    ).all()
    steps: dict[str, list[float]] = {}
    for row in finished:
        for step, seconds in (row.timings_s or {}).items():
            steps.setdefault(step, []).append(float(seconds))
    kept = [row.counts for row in finished if row.counts]
    return {
        "studies": received.studies,
        "instances": int(received.instances),
        "bytes": int(received.bytes),
        "analyses": dict(sorted(states.items())),
        "reasons": dict(sorted(reasons.items())),
        "routes": dict(sorted(routes.items())),
        "deliveries": deliveries,
        "waited_s": _spread([_seconds(row.queued_at, row.started_at) for row in finished if row.started_at]),
        "read_s": _spread([_seconds(row.started_at, row.finished_at) for row in finished if row.started_at]),
        "complete_to_delivered_s": _spread([_seconds(start, end) for start, end in delivered]),
        "steps_s": {step: _spread(seconds) for step, seconds in steps.items()},
        "inputs_kept": _spread([_ratio(one, "inputs_kept", "inputs") for one in kept if one["inputs"]]),
        "tokens_kept": _spread([_ratio(one, "tokens_kept", "tokens_in") for one in kept if one["tokens_in"]]),
    }


def _analyses(which: Sequence[ColumnElement[bool]], *columns: Any) -> Select[Any]:
    """Of the analyses of these studies."""
    return select(*columns).select_from(Study).join(Analysis, Analysis.study_id == Study.id).where(*which)


def _deliveries(which: Sequence[ColumnElement[bool]], *columns: Any) -> Select[Any]:
    """Of the deliveries of these studies."""
    results = _analyses(which, *columns).join(Result, Result.analysis_id == Analysis.id)
    return results.join(Delivery, Delivery.result_id == Result.id)


def _newest(query: Select[Any]) -> Select[Any]:
    """A sample in the order of the index on the time of the study, so that nothing is sorted or read to the end."""
    return query.order_by(Study.first_received_at.desc()).limit(SAMPLE)


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
