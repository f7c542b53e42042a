"""Numbers over a span of time: what came, what became of it, how long each step took, how much was kept. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from statistics import median
from typing import Any

import orjson
from sqlalchemy import ColumnElement, Text, cast, func, select
from sqlalchemy.orm import Session

from service.shared.db import Analysis, AnalysisState, Delivery, DeliveryState, Result, Study

Row = dict[str, Any]
SAMPLE = 5_000  # of the newest studies: finished analyses and deliveries that durations and ratios are taken from
PAGE = 2_000
READ = (AnalysisState.READ, AnalysisState.DONE)


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
    ended: Counter[tuple[AnalysisState, str | None, str]] = Counter()
    finished: list[Any] = []
    for row in _newest_first(
        session,
        which,
        Analysis.state,
        Analysis.reason_code,
        Analysis.route,
        Analysis.queued_at,
        Analysis.started_at,
        Analysis.finished_at,
        cast(Analysis.counts, Text).label("counts"),  # as text: what is not in the sample is not parsed
        cast(Analysis.timings_s, Text).label("timings_s"),
    ):
        ended[row[:3]] += 1
        if row[0] in READ and len(finished) < SAMPLE:
            finished.append(row)
    sent: Counter[tuple[str, DeliveryState]] = Counter()
    to_delivered: list[float] = []
    for row in _newest_first(
        session,
        which,
        Delivery.destination,
        Delivery.state,
        Study.completed_at,
        Delivery.delivered_at,
        Analysis.revision == Study.revision,
        of_deliveries=True,
    ):
        sent[row[:2]] += 1
        _, _, start, end, is_newest = row
        if is_newest and start is not None and end is not None and end >= start and len(to_delivered) < SAMPLE:
            to_delivered.append(_seconds(start, end))
    steps: dict[str, list[float]] = {}
    for row in finished:
        for step, seconds in _parsed(row.timings_s).items():
            steps.setdefault(step, []).append(float(seconds))
    kept = [parsed for row in finished if (parsed := _parsed(row.counts))]
    return {
        "studies": received.studies,
        "instances": int(received.instances),
        "bytes": int(received.bytes),
        "analyses": _counted((str(state), count) for (state, _, _), count in ended.items()),
        "reasons": _counted((reason, count) for (_, reason, _), count in ended.items() if reason),
        "routes": _counted((route, count) for (_, _, route), count in ended.items()),
        "deliveries": {
            name: _counted((str(state), count) for (to, state), count in sent.items() if to == name)
            for name in sorted({to for to, _ in sent})
        },
        "waited_s": _spread([_seconds(row.queued_at, row.started_at) for row in finished if row.started_at]),
        "read_s": _spread([_seconds(row.started_at, row.finished_at) for row in finished if row.started_at]),
        "complete_to_delivered_s": _spread(to_delivered),
        "steps_s": {step: _spread(seconds) for step, seconds in steps.items()},
        "inputs_kept": _spread([_ratio(one, "inputs_kept", "inputs") for one in kept if one["inputs"]]),
        "tokens_kept": _spread([_ratio(one, "tokens_kept", "tokens_in") for one in kept if one["tokens_in"]]),
    }


def _newest_first(
    session: Session, which: Sequence[ColumnElement[bool]], *columns: Any, of_deliveries: bool = False
) -> Iterable[Any]:
    """One row for each analysis (or delivery) of these studies, the newest study first; memory stays bounded.

    The order is that of the index on the time of the study, so nothing is sorted.
    """
    query = select(*columns).select_from(Study).join(Analysis, Analysis.study_id == Study.id)
    if of_deliveries:
        query = query.join(Result, Result.analysis_id == Analysis.id).join(Delivery, Delivery.result_id == Result.id)
    newest_first = query.where(*which).order_by(Study.first_received_at.desc())
    return session.execute(newest_first.execution_options(yield_per=PAGE))


def _parsed(document: str | None) -> Row:
    found: Row | None = None if document is None else orjson.loads(document)
    return found or {}


def _counted(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Summed up by name, in the order of names."""
    summed: Counter[str] = Counter()
    for name, count in counts:
        summed[name] += count
    return dict(sorted(summed.items()))


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
