"""What the doctor makes of the facts: every case that is not well, with what it says and what would help."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service import doctor
from service.doctor import Broker, Clock, Database, Disk, Finding, Model, Port, Seen, State
from service.refusals import Refused
from service.shared.settings import DestinationSettings, Settings
from service.situation import Situation

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DISK = Disk(folder="spool", exists=True, free_gb=100, mount="/data", file_system="ext4", flush_ms=1.0)
BROKER = Broker(reached=True, version="7.2", policy="noeviction")
MODEL = Model(
    "m", architecture="Gemma3ForConditionalGeneration", weights_bytes=10**6, weights_sha256="ab", memory_bytes=10**10
)
WORKER = Seen("host/1", silent=False, device="cuda:0", memory_bytes=10**10, model="demo", weights_sha256="ab")
US = DestinationSettings(name="ourselves", ae_title="US", host="h", port=1)
PRINTING = Settings.model_validate({"route": [{"name": "chest", "companions": ["pdf"]}]})


def states(findings: Iterable[Finding]) -> dict[str, str]:
    return {one.subject: one.state.value for one in findings}


def standing(**changes: Any) -> Situation:
    return Situation(**{"now": NOW, "receiving": 0, "held": 0, "workers": 1} | changes)


def test_every_finding_that_is_not_well_says_what_would_help() -> None:
    """Over all of the cases of this file that have one."""
    found = [
        *doctor.configuration(Settings()),
        *doctor.configuration(Settings.model_validate({"scp": {"storage_commitment": True}})),
        doctor.receiver(Port(False, False), US, calling="S"),
        doctor.receiver(Port(True, False, "no answer"), US, calling="S"),
        doctor.receiver(Port(True, False), US, calling=None, hindrance="every [[source]] is bound to another host"),
        doctor.web(Port(False, False), "h:1"),
        doctor.web(Port(True, False), "h:1"),
        doctor.destination("pacs", well=False, said="away", paused=False, waiting=1),
        doctor.destination("pacs", well=True, said="answers", paused=True, waiting=1),
        *doctor.certificates({"a": None, "b": -1.0, "c": 5.0}),
        *doctor.disk("spool", replace(DISK, free_gb=1, file_system="tmpfs", flush_ms=99), min_free_gb=5),
        *doctor.broker(Broker(reached=False, said="away")),
        *doctor.broker(replace(BROKER, policy="allkeys-lru", max_memory_bytes=10**6, foreign=("sidekiq",))),
        *doctor.broker(replace(BROKER, policy=None)),
        *doctor.database(Database(reached=False, said="away"), None),
        *doctor.database(Database(reached=True, said="sqlite"), None),
        *doctor.seen_workers([]),
        *doctor.seen_workers(None),
        *doctor.seen_workers([replace(WORKER, silent=True), replace(WORKER, model=None)]),
        *doctor.model(Model("m", fault="no config.json in m"), []),
        *doctor.model(replace(MODEL, weights_bytes=10**12, weights_sha256="cd"), [WORKER]),
        *doctor.fonts(PRINTING, ["fonts-noto-core"]),
        *doctor.commitment([("CT1", NOW - timedelta(hours=1))], NOW),
        doctor.clock(Clock(False, "the kernel's word")),
        doctor.clock(Clock(None)),
        *doctor.refused([Refused(NOW, "CT1", "US", "10.0.0.9", "calling AE title is not a source", "[[source]] ...")]),
    ]

    assert [one for one in found if one.state is not State.OK and not one.remedy] == []
    assert {one.state for one in found} >= {State.WARNING, State.FAULT, State.UNKNOWN}


def test_what_is_well_is_told_as_well() -> None:
    """No remedy, no fault: `doctor` exits with 0."""
    settings = Settings.model_validate(
        {
            "scp": {"host": "0.0.0.0"},
            "source": [{"ae_title": "CT1"}],
            "destination": [{"name": "pacs", "ae_title": "PACS", "host": "pacs", "port": 104}],
        }
    )
    found = [
        *doctor.configuration(settings),
        doctor.receiver(Port(True, True, "answers"), US, calling="CT1"),
        doctor.web(Port(True, True), "h:1"),
        doctor.destination("pacs", well=True, said="answers", paused=False, waiting=0),
        *doctor.certificates({"a": 300.0}),
        *doctor.disk("spool", DISK, min_free_gb=5),
        *doctor.broker(BROKER),
        *doctor.database(Database(reached=True, said="sqlite", at_head=True), standing()),
        *doctor.seen_workers([WORKER]),
        *doctor.model(MODEL, [WORKER]),
        *doctor.fonts(PRINTING, []),
        *doctor.commitment([("CT1", NOW)], NOW),
        doctor.clock(Clock(True, "systemd-timesyncd")),
        *doctor.refused([]),
    ]

    assert {one.state for one in found} == {State.OK}
    assert {one.remedy for one in found} == {""}
    assert doctor.is_well(found)


def test_only_a_fault_is_broken() -> None:
    """Warnings and what could not be found out are for people to weigh."""
    findings = [Finding("a", state, "") for state in State if state is not State.FAULT]

    assert doctor.is_well(findings)
    assert not doctor.is_well([*findings, Finding("b", State.FAULT, "")])


def test_fonts_matter_only_where_a_route_prints() -> None:
    """The remedy names the packages that are missing, and no other."""
    (warned,) = doctor.fonts(PRINTING, ["fonts-noto-core"])

    assert warned.state is State.WARNING
    assert "chest" in warned.result
    assert warned.remedy == "apt-get install fonts-noto-core"
    assert list(doctor.fonts(Settings(), ["fonts-noto-core"])) == []


def test_redis_that_evicts_is_a_fault_only_where_it_has_a_limit() -> None:
    """Without maxmemory no policy ever acts."""
    evicting = replace(BROKER, policy="allkeys-lru")

    assert states(doctor.broker(evicting))["queue: eviction"] == "ok"
    assert states(doctor.broker(replace(evicting, max_memory_bytes=1)))["queue: eviction"] == "fault"


def test_disk_below_its_floor_is_a_fault_and_names_the_status() -> None:
    """As a sender will see it."""
    space = next(doctor.disk("spool", replace(DISK, free_gb=4.9), min_free_gb=5))

    assert (space.state, space.result) == (State.FAULT, "4.9 GB free, 5 GB are kept free")
    assert "0xA700" in space.remedy


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"file_system": "tmpfs"}, {"spool: disk": "warning"}),
        ({"file_system": "nfs4"}, {"spool: disk": "warning"}),
        ({"flush_ms": 51.0}, {"spool: flush": "warning"}),
        ({"flush_ms": None}, {"spool: flush": "fault"}),
        ({"flush_ms": None, "exists": False}, {"spool: flush": "warning"}),
    ],
    ids=str,
)
def test_disk_that_does_not_last_or_is_slow_is_told(changes: dict[str, Any], expected: dict[str, str]) -> None:
    """Success to a C-STORE rests on it."""
    found = states(doctor.disk("spool", replace(DISK, **changes), min_free_gb=5))

    assert found == {"spool: space": "ok", "spool: disk": "ok", "spool: flush": "ok"} | expected


def test_backlog_without_a_worker_is_a_fault() -> None:
    """With one it is only work."""
    database = Database(reached=True, said="sqlite", at_head=True)
    waiting = {"analyses": {"queued": 3}, "oldest_unfinished_at": NOW - timedelta(minutes=7)}

    busy = {one.subject: one for one in doctor.database(database, standing(**waiting))}["backlog"]
    stuck = {one.subject: one for one in doctor.database(database, standing(workers=0, **waiting))}["backlog"]

    assert (busy.state, busy.result) == (State.OK, "3 analyses not finished, the oldest since 7 min")
    assert stuck.state is State.FAULT


def test_chain_that_is_late_is_a_fault() -> None:
    """It follows within seconds where `ingest` runs."""
    database = Database(reached=True, said="sqlite", at_head=True)
    late = standing(chain_waiting=9, chain_waiting_since=NOW - timedelta(hours=3))

    found = {one.subject: one for one in doctor.database(database, late)}["audit chain"]

    assert (found.state, found.result) == (State.FAULT, "9 events wait, the oldest since 3 h")


def test_weights_are_compared_with_those_of_the_workers() -> None:
    """Of the workers that are there; above 2 GB nothing is claimed."""
    other = replace(WORKER, weights_sha256="cd")

    assert states(doctor.model(MODEL, [other]))["weights"] == "warning"
    assert states(doctor.model(MODEL, [replace(other, silent=True)]))["weights"] == "ok"
    assert states(doctor.model(replace(MODEL, weights_sha256=None), [other]))["weights"] == "ok"


def test_model_is_measured_against_the_smallest_device_of_the_workers() -> None:
    """Against this machine only where no worker has told."""
    large = replace(MODEL, weights_bytes=9 * 10**9)

    assert states(doctor.model(large, [WORKER]))["memory"] == "warning"
    assert states(doctor.model(large, [replace(WORKER, memory_bytes=24 * 10**9)]))["memory"] == "ok"


def test_refused_association_is_told_with_the_line_that_lets_it_in() -> None:
    """Who, from where, to whom, why, how often, when."""
    (found,) = doctor.refused(
        [Refused(NOW, "CT1", "OTHER", "10.0.0.9", "called AE title is not ours", '[scp] ae_title = "OTHER"', count=4)]
    )

    assert found.subject == "refused: CT1 from 10.0.0.9 to OTHER"
    assert found.result == "called AE title is not ours; 4 times, last at 2026-03-01 12:00:00 UTC"
    assert found.remedy == '[scp] ae_title = "OTHER"'
