"""Complete studies -> analyses -> messages: what is queued, what a message holds, and when it is rung for again."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from pydicom.dataset import Dataset
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service import dispatch
from service.dispatch import Doorbell
from service.shared import transitions
from service.shared.db import Analysis, AnalysisState, Study, StudyState
from service.shared.settings import ConfigurationError, Settings
from tests.lifelines import let_die, worker_named
from tests.receiving import encode, instance, wait_until
from tests.rows import (
    NOW,
    add_analysis,
    add_instance,
    add_study,
    after,
    claimed,
    event,
    get,
    kinds,
    open_database,
    read,
)
from tests.servers import RedisServer


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        yield opened


@pytest.fixture
def sqlite_sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    """For what does not depend on the kind of the database."""
    with open_database(sqlite_url) as opened:
        yield opened


@dataclass
class Bell:
    """A doorbell that rings nowhere: says what was rung for, and can be out of order."""

    rung: list[int] = field(default_factory=list)
    dry: bool = True
    broken: bool = False
    watch: Any = None

    def ring(self, analysis_ids: Iterable[int]) -> list[int]:
        ids = list(analysis_ids)
        if self.watch:
            self.watch(ids)
        if self.broken:
            return []
        self.rung += ids
        return ids

    def is_dry(self) -> bool:
        return self.dry and not self.broken


def sweep(
    sessions: sessionmaker[Session],
    bell: Bell | Doorbell,
    now: datetime = NOW,
    *,
    spool: Path = Path("/nonexistent"),
    **settings: Any,
) -> None:
    dispatch.sweep(Settings.model_validate(settings), sessions, spool, bell, now)  # type: ignore[arg-type]


def ready(sessions: sessionmaker[Session], uid: str = "2.25.1", **changes: Any) -> int:
    """A complete study with an image that nobody has queued yet."""
    study_id = add_study(sessions, uid, **({"dispatched_revision": 0} | changes))
    add_instance(sessions, study_id)
    return study_id


def analyses(sessions: sessionmaker[Session]) -> list[Analysis]:
    with sessions() as session:
        return list(session.scalars(select(Analysis).order_by(Analysis.id)))


# --- queueing -------------------------------------------------------------------------------------------------------


def test_complete_study_is_queued_and_rung_for_once(sessions: sessionmaker[Session]) -> None:
    """With the settings and the prompt that hold now; the next sweep finds nothing to do."""
    study_id = ready(sessions)
    bell = Bell()

    sweep(sessions, bell, pruning={"gamma": 0.25})
    sweep(sessions, bell, after(1))

    (analysis,) = analyses(sessions)
    assert (analysis.study_id, analysis.revision, analysis.route, analysis.run_number) == (study_id, 1, "default", 1)
    assert (analysis.state, analysis.attempts, analysis.fence) == (AnalysisState.QUEUED, 0, 0)
    assert analysis.settings["pruning"]["gamma"] == 0.25
    assert set(analysis.settings) == {"model", "pruning", "series"}
    assert analysis.prompt == Settings().report.prompt
    assert (bell.rung, analysis.rung_at) == ([analysis.id], NOW)
    assert get(sessions, Study, study_id).dispatched_revision == 1
    assert kinds(sessions) == ["analysis-queued"]


def test_row_is_committed_before_its_message_is_sent(sessions: sessionmaker[Session]) -> None:
    """Whoever gets the message finds the row, from any connection."""
    ready(sessions)
    seen: list[AnalysisState] = []
    bell = Bell(watch=lambda ids: seen.extend(get(sessions, Analysis, one).state for one in ids))

    sweep(sessions, bell)

    assert seen == [AnalysisState.QUEUED]


@pytest.mark.parametrize(
    "changes",
    [
        {"state": StudyState.RECEIVING},
        {"held": True},
        {"revision": 0},
        {"dispatched_revision": 1},
    ],
    ids=str,
)
def test_other_studies_are_left_alone(sessions: sessionmaker[Session], changes: dict[str, Any]) -> None:
    """Still arriving, held, never opened, or queued already."""
    ready(sessions, **changes)

    sweep(sessions, Bell())

    assert analyses(sessions) == []


def test_study_that_was_reopened_since_is_not_queued(sessions: sessionmaker[Session]) -> None:
    """Between the sweep's look and its update a late image came."""
    study_id = ready(sessions)
    with sessions() as late:
        stale = late.get_one(Study, study_id)
        late.commit()
        with sessions.begin() as session:
            study = session.get_one(Study, study_id)
            study.revision, study.state = 2, StudyState.COMPLETE

        late.begin()
        assert stale.revision == 1  # sessions keep what they have read
        dispatch.queue_study(late, study_id, Settings(), Path("/nonexistent"), NOW)
        late.commit()

    assert get(sessions, Study, study_id).dispatched_revision == 0
    assert analyses(sessions) == []


def test_new_revision_follows_the_analysis_before_it(sessions: sessionmaker[Session]) -> None:
    """The predecessor is the one that is running, else the last that was read; never one that said nothing."""
    study_id = ready(sessions, dispatched_revision=1)
    done = add_analysis(sessions, study_id)
    read(sessions, done)

    def next_revision(revision: int) -> Analysis:
        with sessions.begin() as session:
            session.get_one(Study, study_id).revision = revision
        sweep(sessions, Bell())
        return analyses(sessions)[-1]

    second = next_revision(2)
    assert (second.revision, second.run_number, second.predecessor_id) == (2, 1, done)

    with sessions.begin() as session:
        transitions.cancel_queued(session, second.id, now=NOW, actor="test")
    third = next_revision(3)
    assert third.predecessor_id == done

    claimed(sessions, third.id)
    assert next_revision(4).predecessor_id == third.id


def test_mixed_patients_are_refused_without_a_worker(sessions: sessionmaker[Session]) -> None:
    """The analysis is on record as refused, and no message is sent."""
    study_id = ready(sessions, patient_mismatch=True)
    bell = Bell()

    sweep(sessions, bell)

    (analysis,) = analyses(sessions)
    assert (analysis.state, analysis.reason_code) == (AnalysisState.REFUSED, "patient-mismatch")
    assert (analysis.finished_at, analysis.attempts) == (NOW, 0)
    assert bell.rung == []
    assert event(sessions, "analysis-refused").study_id == study_id


def test_every_route_that_takes_the_study_reads_it(sessions: sessionmaker[Session]) -> None:
    """Each with its own overrides."""
    ready(sessions)

    sweep(sessions, Bell(), route=[{"name": "a", "prompt": "Look."}, {"name": "b", "pruning": {"method": "off"}}])

    one, other = analyses(sessions)
    assert [(one.route, one.prompt), (other.route, other.prompt)] == [("a", "Look."), ("b", Settings().report.prompt)]
    assert one.settings["pruning"]["method"] == Settings().pruning.method.value
    assert other.settings["pruning"]["method"] == "off"


def stored(spool: Path, number: int, **attributes: Any) -> str:
    """An instance on disk; its path relative to the spool."""
    dataset: Dataset = instance(number)
    for name, value in attributes.items():
        setattr(dataset, name, value)
    path = spool / "studies" / f"{number}.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + encode(dataset))
    return str(path.relative_to(spool))


@pytest.mark.parametrize(
    ("match", "taken"),
    [
        ({"BodyPartExamined": "CHEST"}, True),
        ({"BodyPartExamined": "HEAD"}, False),
        ({"ImageType": "AXIAL"}, True),
        ({"ImageType": "LOCALIZER"}, False),
        ({"SliceThickness": "2.5"}, True),
        ({"StudyDescription": "*größe*"}, True),
    ],
    ids=str,
)
def test_routes_match_on_attributes_of_the_stored_images(
    sqlite_sessions: sessionmaker[Session], tmp_path: Path, match: dict[str, str], taken: bool
) -> None:
    """Single and multiple values, numbers, and text in the instance's character set."""
    study_id = add_study(sqlite_sessions, dispatched_revision=0)
    path = stored(
        tmp_path,
        1,
        BodyPartExamined="CHEST",
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
        SliceThickness="2.5",
        StudyDescription="Tumorgröße",
    )
    add_instance(sqlite_sessions, study_id, path=path)

    sweep(sqlite_sessions, Bell(), spool=tmp_path, route=[{"name": "one", "match": match}])

    assert bool(analyses(sqlite_sessions)) is taken
    assert kinds(sqlite_sessions) == (["analysis-queued"] if taken else ["study-unrouted"])


def test_every_series_of_the_study_counts(sqlite_sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Not only the first; but no object that is not an image."""
    study_id = add_study(sqlite_sessions, dispatched_revision=0)
    parts = [(1, "HEAD", "2.25.1", True), (2, "CHEST", "2.25.2", True), (3, "KNEE", "2.25.3", False)]
    for number, part, series_uid, is_image in parts:
        path = stored(tmp_path, number, BodyPartExamined=part)
        add_instance(sqlite_sessions, study_id, number, path=path, series_uid=series_uid, is_image=is_image)
    routes = [{"name": part.lower(), "match": {"BodyPartExamined": part}} for _, part, _, _ in parts]

    sweep(sqlite_sessions, Bell(), spool=tmp_path, route=routes)

    assert [one.route for one in analyses(sqlite_sessions)] == ["head", "chest"]


def test_study_that_no_route_takes_is_said_once(sqlite_sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Recorded, and not looked at again until it has a new revision."""
    study_id = add_study(sqlite_sessions, dispatched_revision=0)
    add_instance(sqlite_sessions, study_id, path=stored(tmp_path, 1))
    route = [{"name": "one", "match": {"Modality": "MR"}}]

    sweep(sqlite_sessions, Bell(), spool=tmp_path, route=route)
    sweep(sqlite_sessions, Bell(), spool=tmp_path, route=route)

    assert kinds(sqlite_sessions) == ["study-unrouted"]
    assert get(sqlite_sessions, Study, study_id).dispatched_revision == 1


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 400, None])
def test_instance_that_cannot_be_read_fits_no_pattern(
    sqlite_sessions: sessionmaker[Session], tmp_path: Path, content: bytes | None
) -> None:
    """Broken or gone: the sweep goes on."""
    study_id = add_study(sqlite_sessions, dispatched_revision=0)
    path = stored(tmp_path, 1)
    (tmp_path / path).unlink() if content is None else (tmp_path / path).write_bytes(content)
    add_instance(sqlite_sessions, study_id, path=path)

    sweep(sqlite_sessions, Bell(), spool=tmp_path, route=[{"name": "one", "match": {"Modality": "CT"}}])

    assert kinds(sqlite_sessions) == ["study-unrouted"]


def test_value_that_breaks_its_vr_fits_no_pattern(sqlite_sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """pydicom raises when it is asked for; the other attributes still count."""
    study_id = add_study(sqlite_sessions, dispatched_revision=0)
    path = tmp_path / stored(tmp_path, 1, Rows=16)
    rows, broken = b"\x28\x00\x10\x00US\x02\x00\x10\x00", b"\x28\x00\x10\x00US\x03\x00\x10\x00\x00"
    assert rows in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(rows, broken))
    add_instance(sqlite_sessions, study_id, path=str(path.relative_to(tmp_path)))
    routes = [{"name": "one", "match": {"Rows": "*"}}, {"name": "two", "match": {"Modality": "CT"}}]

    sweep(sqlite_sessions, Bell(), spool=tmp_path, route=routes)

    assert [one.route for one in analyses(sqlite_sessions)] == ["two"]


def test_routes_that_can_never_fit_are_refused_at_the_start() -> None:
    """Before anything runs."""
    with pytest.raises(ConfigurationError, match="no DICOM keyword"):
        dispatch.check(Settings.model_validate({"route": [{"match": {"Bodypart": "CHEST"}}]}))


# --- ringing again --------------------------------------------------------------------------------------------------


def test_bell_that_was_out_of_order_is_rung_by_the_next_sweep(sessions: sessionmaker[Session]) -> None:
    """The row is there; only its message was not."""
    ready(sessions)
    bell = Bell(broken=True)
    sweep(sessions, bell)
    assert analyses(sessions)[0].rung_at is None

    bell.broken = False
    sweep(sessions, bell, after(2))

    assert bell.rung == [analyses(sessions)[0].id]


def test_queued_analysis_is_rung_for_again_when_its_message_is_lost(sessions: sessionmaker[Session]) -> None:
    """After ring_again_s, once the queue is dry; then again, until somebody claims it."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    bell = Bell()

    for seconds in (0, 29, 31, 40, 62):
        sweep(sessions, bell, after(seconds), queue={"ring_again_s": 30})

    assert bell.rung == [analysis_id] * 3  # at 0, 31 and 62 s


def test_queue_that_is_not_dry_is_not_filled_further(sessions: sessionmaker[Session]) -> None:
    """Workers are busy; the messages wait there still."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    bell = Bell(dry=False)

    for seconds in (0, 31, 1000):
        sweep(sessions, bell, after(seconds))

    assert bell.rung == [analysis_id]


def test_analysis_that_later_ones_have_overtaken_has_lost_its_message(sessions: sessionmaker[Session]) -> None:
    """A queue keeps its order, and at a busy site it never runs dry: a worker died with the message in its hand."""
    lost, taken, waiting = (
        add_analysis(sessions, add_study(sessions, f"2.25.{number}"), now=after(number)) for number in (1, 2, 3)
    )
    bell = Bell(dry=False)
    with sessions.begin() as session:
        for number, analysis_id in enumerate((lost, taken, waiting)):
            session.get_one(Analysis, analysis_id).rung_at = after(number)
    claimed(sessions, taken, now=after(20), lease_s=10_000)

    for seconds in (25, 31, 33):
        sweep(sessions, bell, after(seconds), queue={"ring_again_s": 30})
    assert bell.rung == [lost]  # at 31 s; the message of the third is still to come

    sweep(sessions, bell, after(62), queue={"ring_again_s": 30})
    assert bell.rung == [lost]  # its new message is behind all others


def test_running_analysis_is_left_alone_while_its_lease_holds(sessions: sessionmaker[Session]) -> None:
    """However long it takes."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    claimed(sessions, analysis_id, lease_s=10_000)
    bell = Bell()

    sweep(sessions, bell, after(9_999))

    assert bell.rung == []


def test_analysis_that_lost_its_worker_is_rung_for_at_once(sessions: sessionmaker[Session]) -> None:
    """As soon as its lease has expired, also while other messages wait; once, and then when it is overdue."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    bell = Bell()
    sweep(sessions, bell)
    claimed(sessions, analysis_id, now=after(1), lease_s=20)
    bell.rung.clear()
    bell.dry = False

    for seconds in (20, 22, 24):
        sweep(sessions, bell, after(seconds))
    assert bell.rung == [analysis_id]  # at 22 s

    bell.dry = True
    sweep(sessions, bell, after(33))
    assert bell.rung == [analysis_id] * 2


def test_analysis_whose_attempts_are_spent_fails_in_the_sweep(sessions: sessionmaker[Session]) -> None:
    """Nobody is left to close it, and nobody is called."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    for number in range(3):
        claimed(sessions, analysis_id, now=after(100 * number))
    bell = Bell()

    sweep(sessions, bell, after(230), queue={"max_attempts": 3})

    assert get(sessions, Analysis, analysis_id).state is AnalysisState.FAILED
    assert bell.rung == []


@pytest.mark.parametrize("how", ["read", "cancelled", "superseded"])
def test_nobody_is_called_for_what_is_over(sessions: sessionmaker[Session], how: str) -> None:
    """Whatever the queue says."""
    study_id = add_study(sessions)
    analysis_id = add_analysis(sessions, study_id)
    with sessions.begin() as session:
        if how == "cancelled":
            transitions.cancel_queued(session, analysis_id, now=NOW, actor="test")
        elif how == "superseded":
            transitions.supersede_queued(session, study_id, now=NOW, actor="test")
    if how == "read":
        read(sessions, analysis_id)
    bell = Bell()

    sweep(sessions, bell, after(1000))

    assert bell.rung == []


def test_older_analyses_are_rung_for_first(sessions: sessionmaker[Session]) -> None:
    """In the order in which they were queued."""
    study_id = add_study(sessions)
    late = add_analysis(sessions, study_id, route="late", now=after(5))
    early = add_analysis(sessions, study_id, route="early", now=after(1))
    bell = Bell()

    sweep(sessions, bell, after(6))

    assert bell.rung == [early, late]


# --- after the death of a worker ------------------------------------------------------------------------------------


def test_what_a_dead_worker_was_reading_is_rung_for_at_once(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """However long its lease would still hold; once, and the attempt counts, for the study may have killed it."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    bell = Bell()
    sweep(sessions, bell, data={"path": tmp_path})
    bell.rung.clear()
    claimed(sessions, analysis_id, now=after(1), lease_s=10_000, worker="here/1")
    let_die("here/1", tmp_path)

    for seconds in (2, 4, 6):
        sweep(sessions, bell, after(seconds), data={"path": tmp_path})

    assert bell.rung == [analysis_id]
    assert claimed(sessions, analysis_id, now=after(7)) is not None
    assert get(sessions, Analysis, analysis_id).attempts == 2


def test_dead_worker_that_had_the_last_attempt_fails_the_analysis(
    sessions: sessionmaker[Session], tmp_path: Path
) -> None:
    """Nobody is called again."""
    analysis_id = add_analysis(sessions, add_study(sessions), attempts=2)
    claimed(sessions, analysis_id, lease_s=10_000, worker="here/1")
    let_die("here/1", tmp_path)
    bell = Bell()

    sweep(sessions, bell, after(1), data={"path": tmp_path}, queue={"max_attempts": 3})

    assert get(sessions, Analysis, analysis_id).state is AnalysisState.FAILED
    assert bell.rung == []


def test_worker_that_lives_keeps_what_it_reads(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Its lifeline is held."""
    analysis_id = add_analysis(sessions, add_study(sessions))
    claimed(sessions, analysis_id, lease_s=10_000, worker="here/1")
    bell = Bell()

    with worker_named("here/1", tmp_path):
        sweep(sessions, bell, after(1), data={"path": tmp_path})
        assert dispatch.hand_back_of_the_dead(sessions, tmp_path, after(1)) == 0

    assert bell.rung == []
    assert get(sessions, Analysis, analysis_id).state is AnalysisState.RUNNING


def test_work_of_an_ended_worker_is_handed_back_without_an_attempt(
    sessions: sessionmaker[Session], tmp_path: Path
) -> None:
    """A planned stop that outlasts its grace costs the study nothing; what may live elsewhere is left alone."""
    ended, elsewhere = (add_analysis(sessions, add_study(sessions, f"2.25.{number}")) for number in (1, 2))
    claimed(sessions, ended, worker="here/1")
    claimed(sessions, elsewhere, worker="there/1")
    let_die("here/1", tmp_path)

    assert dispatch.hand_back_of_the_dead(sessions, tmp_path, NOW) == 1

    analysis = get(sessions, Analysis, ended)
    assert (analysis.state, analysis.attempts, analysis.rung_at) == (AnalysisState.QUEUED, 0, None)
    assert "analysis-retried" in kinds(sessions, analysis_id=ended)
    assert get(sessions, Analysis, elsewhere).state is AnalysisState.RUNNING


# --- the real queue -------------------------------------------------------------------------------------------------


@pytest.fixture
def doorbell(redis_server: RedisServer) -> Iterator[Doorbell]:
    bell = Doorbell(Settings.model_validate({"queue": {"url": redis_server.url}}))
    yield bell
    bell.close()


def messages(server: RedisServer) -> list[dict[str, Any]]:
    with server.client() as client:
        return [json.loads(one) for one in client.lrange("medpruner", 0, -1)]


def test_message_holds_one_integer_and_nothing_of_the_patient(
    sqlite_sessions: sessionmaker[Session], redis_server: RedisServer, doorbell: Doorbell, tmp_path: Path
) -> None:
    """The analysis id is the only argument; no UID, name or path is anywhere in Redis."""
    study_uid = "2.25.123456789"
    study_id = add_study(sqlite_sessions, study_uid, dispatched_revision=0)
    add_instance(sqlite_sessions, study_id, path=stored(tmp_path, 1))

    sweep(sqlite_sessions, doorbell, spool=tmp_path)

    (analysis,) = analyses(sqlite_sessions)
    (message,) = messages(redis_server)
    arguments, keywords, embedded = json.loads(base64.b64decode(message["body"]))
    assert (arguments, keywords) == ([analysis.id], {})
    assert all(value is None for value in embedded.values())
    assert message["headers"]["task"] == "workers.read_study"
    assert message["headers"]["argsrepr"] == f"[{analysis.id}]"
    with redis_server.client() as client:
        everything = (
            b" ".join(
                key + (client.dump(key) or b"")
                for key in client.scan_iter()  # type: ignore[operator]
            )
            + json.dumps(message).encode()
        )
    for secret in (study_uid, "Planted", "PLANTED-1", "2.25.2000", "2.25.3000", str(tmp_path), "studies/"):
        assert secret.encode() not in everything


def test_queue_is_dry_when_no_message_waits(doorbell: Doorbell, redis_server: RedisServer) -> None:
    """One message is not dry."""
    assert doorbell.is_dry()
    doorbell.ring([1])
    assert not doorbell.is_dry()
    with redis_server.client() as client:
        client.flushall()
    assert doorbell.is_dry()


def test_messages_that_redis_lost_are_sent_again_after_it_came_back(
    sqlite_sessions: sessionmaker[Session], redis_server: RedisServer, doorbell: Doorbell
) -> None:
    """Killed and restarted empty: every waiting analysis is rung for by the same process, in one sweep."""
    study_id = add_study(sqlite_sessions)
    ids = [add_analysis(sqlite_sessions, study_id, run_number=number) for number in (1, 2, 3)]
    sweep(sqlite_sessions, doorbell)
    assert len(messages(redis_server)) == 3

    redis_server.kill()
    sweep(sqlite_sessions, doorbell, after(31))  # away: nothing is raised, nothing is marked as sent
    for leftover in redis_server.folder.glob("appendonlydir/*"):
        leftover.unlink()
    redis_server.start()
    assert messages(redis_server) == []
    sweep(sqlite_sessions, doorbell, after(62))

    sent = [json.loads(base64.b64decode(message["body"]))[0][0] for message in reversed(messages(redis_server))]
    assert sent == ids


def test_queue_that_is_away_keeps_nobody_from_queueing(
    sqlite_sessions: sessionmaker[Session], redis_server: RedisServer, doorbell: Doorbell
) -> None:
    """The truth is in the database; the bell is rung when there is one again."""
    redis_server.kill()
    ready(sqlite_sessions)

    sweep(sqlite_sessions, doorbell)
    (analysis,) = analyses(sqlite_sessions)
    assert (analysis.state, analysis.rung_at) == (AnalysisState.QUEUED, None)

    redis_server.start()
    sweep(sqlite_sessions, doorbell, after(1))
    assert len(messages(redis_server)) == 1


# --- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OperationalError("SELECT", {}, Exception("server closed")), RuntimeError("a fault of ours")], ids=repr
)
def test_loop_survives_what_goes_wrong(
    sqlite_sessions: sessionmaker[Session], redis_server: RedisServer, error: Exception
) -> None:
    """A database that is away, or a fault: logged, tried again, and the study is queued in the end."""
    ready(sqlite_sessions)
    asked: list[int] = []

    class Away:
        def __call__(self) -> Session:
            asked.append(1)
            if len(asked) < 4:
                raise error
            return sqlite_sessions()

        begin = sqlite_sessions.begin

    stop = Event()
    settings = Settings.model_validate({"assembly": {"sweep_s": 0.01}, "queue": {"url": redis_server.url}})
    loop = Thread(target=dispatch.dispatch_for_ever, args=(settings, Away(), Path("/nonexistent"), stop), daemon=True)
    loop.start()
    wait_until(lambda: len(messages(redis_server)) == 1)
    stop.set()
    loop.join(20)

    assert not loop.is_alive()
    assert kinds(sqlite_sessions) == ["analysis-queued"]
