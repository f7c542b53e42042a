"""What Prometheus is shown: it parses, its labels are ours, and every alerting rule finds its metric."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import exposition
from service.shared.settings import DestinationSettings, Settings, SourceSettings
from service.situation import Folder, Situation, Waiting
from service.tally import Fact, Names, Totals, fold
from tests.rows import NOW

RULES = Path(__file__).parents[3] / "compose" / "alerts.yml"
SETTINGS = Settings(
    source=(SourceSettings(ae_title="CT01"),),
    destination=(DestinationSettings(name="pacs", ae_title="PACS", host="h", port=104),),
)
NAMES = Names.of(SETTINGS)
SITUATION = Situation(
    now=NOW,
    receiving=2,
    held=0,
    analyses={"queued": 3, "running": 1, "read": 0},
    oldest_unfinished_at=NOW - timedelta(minutes=5),
    workers=1,
    deliveries={
        ("pacs", "pending"): Waiting(4, NOW - timedelta(hours=1)),
        ("gone-from-the-configuration", "rejected"): Waiting(1, NOW),
    },
    chained=100,
    tallied=90,
    folders={"spool": Folder(10**9, 10**10)},
    certificates={"web.tls_certificate": 12.5, "audit.syslog_certificate": None},
)


def samples(situation: Situation = SITUATION, totals: Totals | None = None) -> dict[tuple[str, tuple[str, ...]], float]:
    """Name and label values, in the order of the labels' names -> value."""
    text = exposition(situation, totals or Totals(), NAMES).decode()
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_standing_is_shown_as_gauges() -> None:
    """Counts, ages and days, one sample each."""
    shown = samples()

    assert shown["medpruner_analyses_open", ("queued",)] == 3
    assert shown["medpruner_oldest_unfinished_seconds", ()] == 300
    assert shown["medpruner_deliveries_waiting", ("pacs", "pending")] == 4
    assert shown["medpruner_delivery_oldest_seconds", ("pacs",)] == 3600
    assert shown["medpruner_tally_lag_events", ()] == 10
    assert shown["medpruner_certificate_days", ("web.tls_certificate",)] == 12.5
    assert shown["medpruner_certificate_unreadable", ("audit.syslog_certificate",)] == 1


def test_destination_that_left_the_configuration_is_other() -> None:
    """No label comes from a row."""
    assert samples()["medpruner_deliveries_waiting", ("other", "rejected")] == 1


def test_totals_are_shown_as_counters_and_cumulative_buckets() -> None:
    """What never happened at a configured name is 0, so that a first failure is an increase."""
    totals = Totals()
    started = [Fact("analysis-read", NOW, {}, "default", started_at=NOW - timedelta(seconds=s)) for s in (2, 40)]
    fold(totals, started, NAMES)
    shown = samples(totals=totals)

    assert shown["medpruner_analyses_total", ("read", "default")] == 2
    assert shown["medpruner_deliveries_total", ("pacs", "rejected")] == 0
    assert shown["medpruner_read_seconds_bucket", ("2.5", "default")] == 1
    assert shown["medpruner_read_seconds_bucket", ("60.0", "default")] == 2
    assert shown["medpruner_read_seconds_count", ("default",)] == 2
    assert shown["medpruner_read_seconds_sum", ("default",)] == 42


def test_every_metric_of_the_alerting_rules_exists() -> None:
    """A rule over a metric that nobody exports would never fire; `promtool check rules` looks at the syntax only."""
    totals = Totals()
    read = Fact("analysis-read", NOW, {}, "default", counts={"tokens_in": 10, "tokens_kept": 1})
    fold(totals, [read, Fact("patient-mismatch", NOW, {})], NAMES)
    known = {name for name, _ in samples(totals=totals)} | {"up"}
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]

    assert len(rules) >= 14
    for rule in rules:
        assert {"summary", "remedy"} <= rule["annotations"].keys()
        named = set(re.findall(r"\b(?:medpruner_\w+|up)\b", re.sub(r"\{[^}]*\}", "", rule["expr"])))
        assert named
        assert named <= known, rule["alert"]
