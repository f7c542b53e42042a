"""What goes by age and state, what stays, and what `forget` leaves of a patient: nothing, with the chain whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service import chain, retention
from service.retention import CannotForget, Standing, why_kept
from service.shared import delivery_transitions
from service.shared.db import (
    AnalysisState,
    Delivery,
    DeliveryState,
    Instance,
    ReportText,
    Result,
    Study,
    StudyHeader,
    StudyState,
)
from service.shared.study_cache import cache_folder
from service.spool import Arrival, OpenAssociation, Spool, key
from tests.receiving import place
from tests.rows import (
    ACTOR,
    NOW,
    STUDY_UID,
    add_analysis,
    add_deliveries,
    add_instance,
    add_study,
    claimed,
    get,
    kinds,
    open_database,
)

SECRET = "PLANTED^PATIENT"
LATER = NOW + timedelta(days=10)


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        yield opened


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", 0)


def file_instance(
    sessions: sessionmaker[Session],
    spool: Spool,
    study_id: int,
    sop_instance_uid: str = "2.25.3000.1",
    *,
    study_uid: str = STUDY_UID,
    settled: bool = True,
) -> Path:
    """One instance as receiver and ingest leave it, as old as NOW."""
    arrival = Arrival(
        study_uid=study_uid,
        series_uid="2.25.2000",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid=sop_instance_uid,
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        modality="CT",
        calling_ae="SENDER",
        called_ae="MEDPRUNER",
        peer_address="192.0.2.1",
        association_id="0" * 32,
    )
    receipt = spool.store(arrival, f"{SECRET} {sop_instance_uid}".encode(), NOW)
    place(spool)
    if settled:
        add_instance(sessions, study_id, sop_instance_uid=sop_instance_uid, sha256=receipt.sha256, path=receipt.path)
        (waiting,) = spool.incoming()
        spool.settle(waiting, receipt)
    for path in (spool.path / receipt.path).parent.iterdir():
        os.utime(path, (NOW.timestamp(), NOW.timestamp()))
    return spool.path / receipt.path


def file_results(sessions: sessionmaker[Session], data: Path) -> list[Path]:
    """The files that the rows of outputs and results name, as old as NOW."""
    with sessions() as session:
        results = session.scalars(select(Result)).all()
    made = []
    for result in results:
        for path in (data / result.path, data / "outputs" / str(result.analysis_id) / "1.json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(SECRET)
            made.append(path)
        os.utime(made[-1].parent, (NOW.timestamp(), NOW.timestamp()))
    return made


def file_features(data: Path, study_id: int) -> Path:
    """What a worker keeps of a study for its next route."""
    path = cache_folder(data, study_id) / "features.safetensors"
    path.parent.mkdir(parents=True)
    path.write_text(SECRET)
    return path


def deliver(sessions: sessionmaker[Session], delivery_id: int) -> None:
    with sessions.begin() as session:
        delivery = session.get_one(Delivery, delivery_id)
        assert delivery_transitions.close_delivered(session, delivery, status=0, note=None, now=NOW, actor=ACTOR)


def header(study_id: int) -> StudyHeader:
    names = ("issuer_of_patient_id", "patient_birth_date", "patient_sex", "study_date", "study_description")
    return StudyHeader(
        study_id=study_id,
        salt="5a17" * 8,
        patient_name=SECRET,
        patient_id=f"{SECRET}-ID",
        accession_number=f"{SECRET}-A",
        **dict.fromkeys(names, ""),
    )


def remove(sessions: sessionmaker[Session], spool: Spool, now: datetime = LATER) -> int:
    return retention.remove_instances(sessions, spool, spool.path.parent, keep_days=3, now=now)


# --- by age ---------------------------------------------------------------------------------------------------------


def standing(**changes: object) -> Standing:
    fields: dict[str, object] = {
        "complete": True,
        "held": False,
        "dispatched": True,
        "analyses": (AnalysisState.DONE,),
        "deliveries": (DeliveryState.DELIVERED,),
        "last_change": NOW,
    }
    return Standing(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"complete": False},
        {"held": True},
        {"dispatched": False},
        *({"analyses": (AnalysisState.DONE, state)} for state in AnalysisState if state not in retention.FINISHED),
        *({"deliveries": (DeliveryState.DELIVERED, state)} for state in DeliveryState if state not in retention.SENT),
        {"last_change": LATER - timedelta(days=2)},
    ],
)
def test_nothing_goes_that_somebody_may_need(changes: dict[str, object]) -> None:
    """Each alone keeps the files, however old the rest is."""
    assert why_kept(standing(), now=LATER, keep_days=3) is None

    assert why_kept(standing(**changes), now=LATER, keep_days=3)


def test_delivered_study_leaves_the_spool_when_it_is_old_enough(sessions: sessionmaker[Session], spool: Spool) -> None:
    """Its files go, its rows stay, and the history says so."""
    study_id = add_study(sessions)
    path = file_instance(sessions, spool, study_id)
    (delivery_id,) = add_deliveries(sessions, study_id, "pacs")
    assert remove(sessions, spool) == 0  # pending
    deliver(sessions, delivery_id)
    assert remove(sessions, spool, NOW + timedelta(days=2)) == 0  # too young

    assert remove(sessions, spool) == 1

    assert not path.exists()
    assert not path.with_suffix(".json").exists()
    assert kinds(sessions, study_id=study_id)[-1] == "spool-removed"
    assert remove(sessions, spool) == 0


def test_kept_features_leave_with_the_instances(sessions: sessionmaker[Session], spool: Spool, tmp_path: Path) -> None:
    """They show the same anatomy; those of a study that stays are left alone."""
    gone, stays = add_study(sessions), add_study(sessions, "2.25.2")
    file_instance(sessions, spool, gone)
    file_instance(sessions, spool, stays, "2.25.3000.2", study_uid="2.25.2")
    (delivery_id,) = add_deliveries(sessions, gone, "pacs")
    add_deliveries(sessions, stays, "pacs")
    features, others = file_features(tmp_path, gone), file_features(tmp_path, stays)
    assert remove(sessions, spool) == 0
    assert features.exists()
    deliver(sessions, delivery_id)

    assert remove(sessions, spool) == 1

    assert not features.parent.exists()
    assert others.exists()


def test_study_that_is_arriving_again_stays(sessions: sessionmaker[Session], spool: Spool) -> None:
    """An open association that brings its images, whatever the rows say."""
    path = file_instance(sessions, spool, add_study(sessions))
    opened = OpenAssociation(
        association_id="1" * 32,
        calling_ae="SENDER",
        called_ae="MEDPRUNER",
        peer_address="192.0.2.1",
        opened_at=LATER,
        study_keys=(key(STUDY_UID),),
    )
    spool.beat(opened)
    beat = spool.path / "associations" / f"{opened.association_id}.json"
    os.utime(beat, (LATER.timestamp(), LATER.timestamp()))

    assert remove(sessions, spool) == 0
    assert path.exists()


def test_results_go_after_their_own_time(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """Output and stored result; the report's text stays on record."""
    study_id = add_study(sessions)
    (delivery_id,) = add_deliveries(sessions, study_id, "pacs")
    files = file_results(sessions, tmp_path)
    assert retention.remove_results(sessions, tmp_path, keep_days=3, now=LATER) == 0  # pending
    deliver(sessions, delivery_id)

    assert retention.remove_results(sessions, tmp_path, keep_days=90, now=LATER) == 0
    assert retention.remove_results(sessions, tmp_path, keep_days=3, now=LATER) == 1

    assert not any(path.exists() for path in files)
    assert kinds(sessions, study_id=study_id)[-1] == "results-removed"
    with sessions() as session:
        assert session.scalars(select(ReportText)).one().findings


# --- on command -----------------------------------------------------------------------------------------------------


def test_forgotten_study_leaves_nothing_of_its_patient(
    sessions: sessionmaker[Session], spool: Spool, tmp_path: Path
) -> None:
    """No file, no row, no byte of an SQLite database; history stands, and the chain over it is whole."""
    study_id = add_study(sessions)
    file_instance(sessions, spool, study_id)
    (delivery_id,) = add_deliveries(sessions, study_id, "pacs")
    with sessions.begin() as session:
        session.add(header(study_id))
        result = session.scalars(select(Result)).one()
    elsewhere = add_study(sessions, "2.25.77", revision=0)
    returned = file_instance(sessions, spool, elsewhere, result.sop_instance_uid, study_uid="2.25.77")
    files = [*file_results(sessions, tmp_path), file_features(tmp_path, study_id)]
    with sessions.begin() as session:
        chain.append_batch(session)

    gone = retention.forget(sessions, spool, tmp_path, study_id, now=LATER, actor="cli/me")

    assert (gone.instances, gone.results, gone.outputs, gone.reports, gone.header) == (2, 1, 1, 1, True)
    assert not any(path.exists() for path in (*files, returned, cache_folder(tmp_path, study_id)))
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    with sessions.begin() as session:
        assert session.scalars(select(StudyHeader)).all() == []
        assert session.scalars(select(ReportText)).all() == []
        assert len(session.scalars(select(Instance)).all()) == 2
        chain.append_batch(session)
        assert chain.verify(session.connection(), []).fault is None
    assert get(sessions, Delivery, delivery_id).state is DeliveryState.REJECTED
    assert kinds(sessions, study_id=study_id)[-2:] == ["delivery-rejected", "study-forgotten"]


def test_other_studies_are_not_touched(sessions: sessionmaker[Session], spool: Spool, tmp_path: Path) -> None:
    """Neither files nor rows nor kept features."""
    one, other = add_study(sessions), add_study(sessions, "2.25.2")
    file_instance(sessions, spool, one)
    kept = file_instance(sessions, spool, other, "2.25.3000.2", study_uid="2.25.2")
    features = [file_features(tmp_path, study_id) for study_id in (one, other)]
    with sessions.begin() as session:
        session.add_all([header(one), header(other)])

    retention.forget(sessions, spool, tmp_path, one, now=LATER, actor=ACTOR)

    assert kept.exists()
    assert [path.exists() for path in features] == [False, True]
    assert get(sessions, StudyHeader, other).patient_name == SECRET


def test_study_under_way_is_not_forgotten(sessions: sessionmaker[Session], spool: Spool, tmp_path: Path) -> None:
    """Receiving, waiting in the spool, or running; a queued analysis is cancelled."""
    receiving = add_study(sessions, "2.25.1", state=StudyState.RECEIVING)
    running = add_study(sessions, "2.25.2")
    claimed(sessions, add_analysis(sessions, running))
    for study_id, why in ((receiving, "still arriving"), (running, "is running")):
        with pytest.raises(CannotForget, match=why):
            retention.forget(sessions, spool, tmp_path, study_id, now=LATER, actor=ACTOR)

    queued = add_study(sessions, "2.25.3")
    analysis_id = add_analysis(sessions, queued)
    file_instance(sessions, spool, queued, study_uid="2.25.3", settled=False)
    with pytest.raises(CannotForget, match="still arriving"):
        retention.forget(sessions, spool, tmp_path, queued, now=LATER, actor=ACTOR)
    for path in spool.incoming():
        path.unlink()
    retention.forget(sessions, spool, tmp_path, queued, now=LATER, actor=ACTOR)

    assert kinds(sessions, analysis_id=analysis_id)[-1] == "analysis-cancelled"
    assert get(sessions, Study, queued).study_uid == "2.25.3"
