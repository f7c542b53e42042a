"""The audit is counted once, whatever dies in between, and its labels stay few."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service import chain, tally
from service.shared.settings import DestinationSettings, Settings, SourceSettings
from service.tally import MOST_NAMES, OTHER, Fact, Names, Totals, fold, read_totals, tally_batch
from tests.rows import NOW, add_deliveries, add_study, open_database

NAMES = Names.of(
    Settings(
        source=(SourceSettings(ae_title="CT01"),),
        destination=(DestinationSettings(name="pacs", ae_title="PACS", host="h", port=104),),
    )
)


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        yield opened


def folded(*facts: Fact) -> Totals:
    totals = Totals()
    fold(totals, facts, NAMES)
    return totals


def fact(kind: str, **changes: object) -> Fact:
    detail = changes.pop("detail", {})
    return Fact(kind, NOW, detail, **changes)  # type: ignore[arg-type]


def test_instances_are_counted_by_source_and_arrival() -> None:
    """An event of an association counts all its instances; a sender that is not configured is `other`."""
    totals = folded(
        fact("instances-received", detail={"calling_ae": "CT01", "instances": 120}),
        fact("instances-received-again", detail={"calling_ae": "CT01", "instances": 3}),
        fact("instances-received", detail={"calling_ae": "ZQX^PATIENT", "instances": 2}),
    )

    assert totals.counters["instances"] == {"CT01\tnew": 120, "CT01\tagain": 3, f"{OTHER}\tnew": 2}


def test_reading_gives_latencies_and_shares() -> None:
    """Waiting, reading and every step in seconds, and what each stage kept, by route."""
    totals = folded(
        fact("analysis-started", route="default", queued_at=NOW - timedelta(seconds=40), detail={"attempt": 1}),
        fact(
            "analysis-read",
            route="default",
            started_at=NOW - timedelta(seconds=7),
            timings_s={"headers": 0.3, "generate": 5.5},
            counts={"inputs": 20, "inputs_kept": 10, "tokens_in": 1000, "tokens_kept": 240},
        ),
    )

    waited = totals.histograms["waited_seconds"]["default"]
    assert waited["sum"] == 40
    assert waited["buckets"][tally.SECONDS.index(60.0)] == 1
    assert totals.histograms["read_seconds"]["default"]["sum"] == 7
    assert {k: v["sum"] for k, v in totals.histograms["step_seconds"].items()} == {"headers": 0.3, "generate": 5.5}
    assert totals.histograms["tokens_kept"]["default"]["buckets"][tally.SHARES.index(0.25)] == 1
    assert totals.histograms["inputs_kept"]["default"]["sum"] == 0.5


def test_labels_stay_few_whatever_comes() -> None:
    """A hundred reasons make no hundred series."""
    totals = folded(*(fact("analysis-failed", detail={"code": f"Error{number}"}) for number in range(100)))

    assert len(totals.counters["reasons"]) == MOST_NAMES + 1
    assert totals.counters["reasons"][OTHER] == 100 - MOST_NAMES


def test_event_of_a_newer_version_is_left_out() -> None:
    """A kind that this version does not know changes nothing."""
    assert folded(fact("something-new")).to_json() == Totals().to_json()


def test_every_chained_event_is_counted_once(sessions: sessionmaker[Session]) -> None:
    """In rounds, from where the last one ended; what is not chained yet waits."""
    add_deliveries(sessions, add_study(sessions), "pacs")
    assert tally_batch(sessions, NAMES) == 0
    with sessions.begin() as session:
        chained = chain.append_batch(session)

    assert tally_batch(sessions, NAMES) == chained
    assert tally_batch(sessions, NAMES) == 0

    with sessions() as session:
        seq, totals = read_totals(session)
    assert seq == chained
    assert totals.counters["analyses"]["default\tread"] == 1
    assert totals.counters["results"] == {"sr-comprehensive3d\tbuilt": 1}
    assert totals.histograms["tokens_kept"]["default"]["sum"] == pytest.approx(100 / 320)


def test_two_loops_do_not_count_twice(sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second finds that the place has moved, and changes nothing."""
    add_deliveries(sessions, add_study(sessions), "pacs")
    with sessions.begin() as session:
        chain.append_batch(session)
    monkeypatch.setattr(tally, "BATCH", 2)
    tally_batch(sessions, NAMES)
    fold_once = tally.fold

    def fold_while_another_counts(totals: Totals, facts: object, names: Names) -> None:
        monkeypatch.setattr(tally, "fold", fold_once)
        assert tally_batch(sessions, names) == 2
        fold_once(totals, facts, names)  # type: ignore[arg-type]

    monkeypatch.setattr(tally, "fold", fold_while_another_counts)

    assert tally_batch(sessions, NAMES) == 0
    with sessions() as session:
        assert read_totals(session)[0] == 4
