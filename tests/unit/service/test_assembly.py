"""Receipts -> rows: which instances open a study, whose patient it is, when it is complete, what is held."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import hypothesis
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    GrayscaleSoftcopyPresentationStateStorage,
    KeyObjectSelectionDocumentStorage,
    MRImageStorage,
    SecondaryCaptureImageStorage,
)
from sqlalchemy import select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service import assembly
from service.assembly import Patient, are_different, vouch_for_header, why_complete
from service.shared.db import Analysis, AnalysisState, Instance, Study, StudyHeader, StudyState
from service.shared.settings import Settings
from service.spool import Arrival, OpenAssociation, Receipt, Spool, file_header, key
from tests.receiving import (
    STUDY_UID,
    as_version_0_1,
    data_set_bytes,
    encode,
    instance,
    place,
    rewrite_receipt,
    wait_until,
)
from tests.rows import NOW, add_analysis, add_study, after, claimed, finish, get, kinds, open_database, read, result

SETTINGS = Settings.model_validate(
    {
        "assembly": {"quiet_period_s": 60, "max_open_s": 600},
        "source": [{"ae_title": "SENDER"}, {"ae_title": "SLOW", "quiet_period_s": 300}],
    }
)


@dataclass(frozen=True)
class Way:
    """A spool and a database, and what happens between them."""

    spool: Spool
    sessions: sessionmaker[Session]
    settings: Settings = SETTINGS

    def arrive(
        self, dataset: Dataset, *, at: datetime = NOW, calling_ae: str = "SENDER", association_id: str = "one"
    ) -> Receipt:
        """What the receiver does for one C-STORE."""
        arrival = Arrival(
            study_uid=str(dataset.StudyInstanceUID),
            series_uid=str(dataset.SeriesInstanceUID),
            sop_class_uid=str(dataset.SOPClassUID),
            sop_instance_uid=str(dataset.SOPInstanceUID),
            transfer_syntax_uid=str(ExplicitVRLittleEndian),
            modality=str(dataset.get("Modality", "")),
            calling_ae=calling_ae,
            called_ae="MEDPRUNER",
            peer_address="192.0.2.1",
            association_id=association_id,
        )
        return self.spool.store(arrival, encode(dataset), at)

    def ingest(self, now: datetime = NOW) -> int:
        return assembly.ingest(self.settings, self.sessions, self.spool, now)

    def take(self, *datasets: Dataset, at: datetime = NOW, **how: Any) -> None:
        """Arrive and ingest."""
        for dataset in datasets:
            self.arrive(dataset, at=at, **how)
        self.ingest(at)

    def complete(self, now: datetime) -> list[int]:
        return assembly.complete_quiet(self.settings, self.sessions, self.spool, now)

    def study(self, uid: str = STUDY_UID) -> Study:
        with self.sessions() as session:
            return session.scalars(select(Study).where(Study.study_uid == uid)).one()

    def instances(self) -> list[Instance]:
        with self.sessions() as session:
            return list(session.scalars(select(Instance).order_by(Instance.id)))

    def header(self) -> StudyHeader:
        return get(self.sessions, StudyHeader, self.study().id)


@pytest.fixture
def way(tmp_path: Path, database_url: str) -> Iterator[Way]:
    with open_database(database_url) as sessions:
        yield Way(Spool(tmp_path / "spool", 0), sessions)


@pytest.fixture
def sqlite_way(tmp_path: Path, sqlite_url: str) -> Iterator[Way]:
    """For what does not depend on the kind of the database."""
    with open_database(sqlite_url) as sessions:
        yield Way(Spool(tmp_path / "spool", 0), sessions)


def changed(dataset: Dataset, **attributes: Any) -> Dataset:
    """The same instance with other attributes; None removes one."""
    for name, value in attributes.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    return dataset


# --- when is a study complete? --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opened_s", "last_s", "association_open", "why"),
    [
        (0, 0, False, None),
        (0, -59.9, False, None),
        (0, -60, False, "no image instance for quiet_period_s = 60"),
        (0, -1000, True, None),
        (-599, -1, False, None),
        (-600, 0, False, "open for max_open_s = 600"),
        (-600, 0, True, "open for max_open_s = 600"),
        (-700, -650, True, "open for max_open_s = 600"),
    ],
)
def test_completion_is_decided_by_quiet_association_and_age(
    opened_s: float, last_s: float, association_open: bool, why: str | None
) -> None:
    """Quiet for long enough with nobody sending it, or open for too long whoever sends it."""
    decided = why_complete(
        opened_at=after(opened_s),
        last_image_at=after(last_s),
        association_open=association_open,
        now=NOW,
        quiet_period_s=60,
        max_open_s=600,
    )

    assert decided == why


def test_study_becomes_complete_after_its_quiet_period(way: Way) -> None:
    """Not a second before, and once."""
    way.take(instance(1), instance(2))

    assert way.complete(after(59)) == []
    assert way.complete(after(60)) == [way.study().id]
    assert way.complete(after(61)) == []
    assert (way.study().state, way.study().completed_at) == (StudyState.COMPLETE, after(60))


def test_every_image_begins_the_quiet_period_anew(sqlite_way: Way) -> None:
    """It is counted from the last one, by the time of its arrival."""
    sqlite_way.take(instance(1))
    sqlite_way.take(instance(2), at=after(50))

    assert sqlite_way.complete(after(100)) == []
    assert len(sqlite_way.complete(after(110))) == 1


def test_quiet_period_belongs_to_the_source_of_the_last_image(sqlite_way: Way) -> None:
    """A slow modality gets more time; what it sends in the end counts."""
    sqlite_way.take(instance(1), calling_ae="SENDER")
    sqlite_way.take(instance(2), calling_ae="SLOW", at=after(1))

    assert sqlite_way.study().calling_ae == "SLOW"
    assert sqlite_way.complete(after(300)) == []
    assert len(sqlite_way.complete(after(301))) == 1


def test_image_that_arrived_earlier_moves_no_clock_back(sqlite_way: Way) -> None:
    """Receipts of two associations may be read in another order than they were received."""
    sqlite_way.take(instance(1), at=after(50))
    sqlite_way.take(instance(2), at=after(10), calling_ae="SLOW")

    assert (sqlite_way.study().last_image_at, sqlite_way.study().calling_ae) == (after(50), "SENDER")


def beat(way: Way, study_uid: str, at: datetime) -> None:
    """The heartbeat of an association that sends this study, last seen `at`."""
    association = OpenAssociation(
        association_id="open",
        calling_ae="SENDER",
        called_ae="MEDPRUNER",
        peer_address="192.0.2.1",
        opened_at=NOW,
        study_keys=(key(study_uid),),
    )
    way.spool.beat(association)
    os.utime(way.spool.path / "associations" / "open.json", (at.timestamp(), at.timestamp()))


def test_study_stays_open_while_an_association_sends_it(sqlite_way: Way) -> None:
    """However long a slow sender pauses; other studies do not wait for it."""
    other = "2.25.77"
    sqlite_way.take(instance(1), instance(1, study_uid=other))
    beat(sqlite_way, STUDY_UID, after(100))

    assert sqlite_way.complete(after(100)) == [sqlite_way.study(other).id]
    sqlite_way.spool.close_association("open")
    assert sqlite_way.complete(after(100)) == [sqlite_way.study().id]


def test_association_that_fell_silent_keeps_nothing_open(sqlite_way: Way) -> None:
    """A receiver that was killed leaves its heartbeats behind."""
    sqlite_way.take(instance(1))
    beat(sqlite_way, STUDY_UID, after(60))

    assert sqlite_way.complete(after(80)) == []
    assert len(sqlite_way.complete(after(91))) == 1


def test_study_that_never_ends_is_complete_at_max_open(sqlite_way: Way) -> None:
    """An association that stays open, and images that keep coming, cannot hold it for ever."""
    sqlite_way.take(instance(1))
    sqlite_way.take(instance(2), at=after(590))
    beat(sqlite_way, STUDY_UID, after(600))

    assert sqlite_way.complete(after(599)) == []
    assert len(sqlite_way.complete(after(600))) == 1


def test_studies_become_complete_while_senders_are_busy(sqlite_way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """A receipt that comes during every batch must not keep ingest from ever judging a study."""
    count = iter(range(2, 10_000))
    settle = Spool.settle

    def settle_and_receive(spool: Spool, path: Path, receipt: Receipt) -> None:
        settle(spool, path, receipt)
        sqlite_way.arrive(instance(next(count), study_uid="2.25.77"), at=after(60))

    monkeypatch.setattr(Spool, "settle", settle_and_receive)
    sqlite_way.arrive(instance(1))

    assert sqlite_way.ingest() == 1
    assert sqlite_way.ingest(after(60)) == 1
    assert sqlite_way.complete(after(60)) == [sqlite_way.study().id]


# --- what opens a study? --------------------------------------------------------------------------------------------


def test_first_images_open_their_study_once(way: Way) -> None:
    """One revision, one event for all instances of the association, a header, every receipt settled."""
    way.take(*[instance(number) for number in range(1, 251)])

    study = way.study()
    assert (study.state, study.revision, study.opened_at, study.last_image_at) == (StudyState.RECEIVING, 1, NOW, NOW)
    assert len(way.instances()) == 250
    assert all(one.is_image and one.revision == 1 and not one.is_conflicting for one in way.instances())
    assert kinds(way.sessions) == ["study-opened", *["instances-received"] * 3]  # one per batch of a hundred
    assert way.spool.incoming() == []
    assert len(list(way.spool.settled())) == 250


def test_header_of_the_study_is_on_record(way: Way) -> None:
    """Attributes that people search by, decoded by their character set."""
    dataset = changed(
        instance(1),
        PatientName="山田^太郎",
        IssuerOfPatientID="HOSPITAL",
        PatientBirthDate="19700101",
        PatientSex="M",
        AccessionNumber="A1",
        StudyDate="20260301",
        StudyDescription="Thorax größer",
    )
    way.take(dataset)

    header = way.header()
    assert (header.patient_name, header.patient_id) == ("山田^太郎", "PLANTED-1")
    assert (header.issuer_of_patient_id, header.patient_birth_date) == ("HOSPITAL", "19700101")
    assert (header.accession_number, header.study_description) == ("A1", "Thorax größer")
    assert len(header.salt) == 32


def test_identical_resend_reopens_nothing(way: Way) -> None:
    """The same bytes again: recorded, no row, no revision, no clock moved, the receipt gone."""
    way.take(instance(1))
    way.complete(after(60))

    way.take(instance(1), at=after(100), association_id="two")

    study = way.study()
    assert (study.state, study.revision, study.last_image_at) == (StudyState.COMPLETE, 1, NOW)
    assert len(way.instances()) == 1
    assert kinds(way.sessions)[-1] == "instances-received-again"
    assert way.spool.incoming() == []


def test_same_bytes_twice_in_one_batch_are_one_row(sqlite_way: Way) -> None:
    """A sender that repeats itself at once."""
    sqlite_way.take(instance(1), instance(1))

    assert len(sqlite_way.instances()) == 1


def test_receipt_that_was_not_settled_is_ingested_again_harmlessly(sqlite_way: Way) -> None:
    """Killed between the commit and the settling: the second time finds the row."""
    receipt = sqlite_way.arrive(instance(1))
    place(sqlite_way.spool)
    with sqlite_way.sessions.begin() as session:
        assembly.take(session, SETTINGS, sqlite_way.spool, [receipt], NOW, held=False)

    sqlite_way.ingest()

    assert len(sqlite_way.instances()) == 1
    assert sqlite_way.study().revision == 1
    assert len(list(sqlite_way.spool.settled())) == 1


def test_late_image_starts_a_new_revision(way: Way) -> None:
    """Queued analyses are superseded, running ones go on, and the instance belongs to the new revision."""
    way.take(instance(1))
    way.complete(after(60))
    study_id = way.study().id
    queued, running = (add_analysis(way.sessions, study_id, route=name) for name in ("queued", "running"))
    claimed(way.sessions, running)

    way.take(instance(2), at=after(100))

    assert (way.study().state, way.study().revision) == (StudyState.RECEIVING, 2)
    assert [one.revision for one in way.instances()] == [1, 2]
    assert get(way.sessions, Analysis, queued).state is AnalysisState.SUPERSEDED
    assert get(way.sessions, Analysis, running).state is AnalysisState.RUNNING
    assert len(way.complete(after(160))) == 1


def test_other_bytes_under_a_known_uid_are_kept_and_flagged(way: Way) -> None:
    """Both files, both rows, an alert, and a new revision, for the content has changed."""
    way.take(instance(1))
    way.complete(after(60))

    way.take(changed(instance(1), StudyDescription="corrected"), at=after(100))

    first, second = way.instances()
    assert (first.is_conflicting, second.is_conflicting) == (False, True)
    assert first.path != second.path
    assert all((way.spool.path / one.path).is_file() for one in (first, second))
    assert way.study().revision == 2
    assert kinds(way.sessions)[-1] == "instance-conflict"


def test_study_counts_its_instances_and_their_bytes(way: Way) -> None:
    """As its rows do: an identical re-send is none, other bytes under a known UID are one more."""
    way.take(instance(1), instance(2))
    way.take(instance(1), changed(instance(2), StudyDescription="corrected"), at=after(5))

    study, rows = way.study(), way.instances()
    assert (study.instances, study.size_bytes) == (3, sum(row.size_bytes for row in rows))
    assert len(rows) == 3


NOT_IMAGES = {
    "SR": (BasicTextSRStorage, "SR", False),
    "PR": (GrayscaleSoftcopyPresentationStateStorage, "PR", False),
    "KO": (KeyObjectSelectionDocumentStorage, "KO", False),
    "image of another modality": (SecondaryCaptureImageStorage, "US", True),
    "image without a modality": (CTImageStorage, None, True),
    "CT object without pixels": (CTImageStorage, "CT", False),
}


def not_image(which: str, number: int = 50) -> Dataset:
    sop_class_uid, modality, has_pixels = NOT_IMAGES[which]
    dataset = changed(instance(number, sop_class_uid=sop_class_uid), Modality=modality)
    return dataset if has_pixels else changed(dataset, Rows=None, Columns=None, PixelData=None)


@pytest.mark.parametrize("which", NOT_IMAGES)
def test_what_is_no_routable_image_reopens_nothing(sqlite_way: Way, which: str) -> None:
    """It is acknowledged, kept and recorded; a study that it opened would loop or never have a series to read."""
    sqlite_way.take(instance(1))
    sqlite_way.complete(after(60))

    sqlite_way.take(not_image(which), at=after(100))

    study = sqlite_way.study()
    assert (study.state, study.revision, study.last_image_at) == (StudyState.COMPLETE, 1, NOW)
    assert [one.is_image for one in sqlite_way.instances()] == [True, False]
    assert kinds(sqlite_way.sessions)[-1] == "instances-received"


@pytest.mark.parametrize("which", ["SR", "image of another modality"])
def test_what_is_no_routable_image_opens_nothing(way: Way, which: str) -> None:
    """A study of nothing else stays at revision 0, without a header, and is never dispatched."""
    way.take(not_image(which))

    study = way.study()
    assert (study.state, study.revision, study.opened_at) == (StudyState.COMPLETE, 0, None)
    assert way.complete(after(10_000)) == []
    with way.sessions() as session:
        assert session.get(StudyHeader, study.id) is None

    way.take(instance(1), at=after(5))
    assert (way.study().state, way.study().revision) == (StudyState.RECEIVING, 1)


def test_modalities_of_every_route_are_routable(tmp_path: Path, sqlite_url: str) -> None:
    """Also those that only one route reads."""
    settings = Settings.model_validate(
        {
            "series": {"modality": ["CT"]},
            "route": [{"name": "ct"}, {"name": "mr", "series": {"modality": ["MR"]}}],
        }
    )
    with open_database(sqlite_url) as sessions:
        way = Way(Spool(tmp_path / "spool", 0), sessions, settings)
        way.take(changed(instance(1, sop_class_uid=MRImageStorage), Modality="MR"))

        assert way.study().revision == 1


# --- our own results ------------------------------------------------------------------------------------------------


OWN_DEVICE = "2.25.6000"  # of tests.rows.result


@pytest.fixture
def answered(way: Way) -> Way:
    """A study whose analysis is done."""
    way.take(instance(1))
    way.complete(after(60))
    analysis_id = add_analysis(way.sessions, way.study().id)
    read(way.sessions, analysis_id)
    finish(way.sessions, analysis_id, (result(analysis_id, sop_instance_uid=f"{STUDY_UID}.1.9"), ["pacs"]))
    return way


def contributed(dataset: Dataset, *device_uids: str) -> Dataset:
    items = []
    for uid in device_uids:
        item = Dataset()
        item.Manufacturer = "somebody"
        item.DeviceUID = uid
        items.append(item)
    return changed(dataset, ContributingEquipmentSequence=items)


@pytest.mark.parametrize(
    "returned",
    [
        instance(9),
        contributed(instance(70), "2.25.1", OWN_DEVICE),
    ],
    ids=["by its SOP Instance UID, with other bytes", "by a Device UID, under another UID"],
)
def test_own_result_that_comes_back_reopens_nothing(answered: Way, returned: Dataset) -> None:
    """Even where it looks like a CT image: a map of ours would else start the next analysis."""
    answered.take(returned, at=after(100))

    study = answered.study()
    assert (study.state, study.revision) == (StudyState.COMPLETE, 1)
    assert answered.instances()[-1].is_image is False
    assert kinds(answered.sessions)[-1] == "result-returned"


def test_own_result_that_comes_back_twice_is_an_identical_resend(answered: Way) -> None:
    """Two PACSs forward to us."""
    answered.take(instance(9), at=after(100))
    answered.take(instance(9), at=after(101))

    assert kinds(answered.sessions)[-2:] == ["result-returned", "instances-received-again"]


def test_instance_of_other_equipment_is_not_ours(answered: Way) -> None:
    """Only our Device UIDs count."""
    answered.take(contributed(instance(70), "2.25.1"), at=after(100))

    assert answered.study().revision == 2


@pytest.mark.parametrize("vr", ["LO", "UN", "OB", "DS"])
def test_nonsense_under_contributing_equipment_is_survived(sqlite_way: Way, vr: str) -> None:
    """A sender may write any VR there; the instance counts as an image all the same."""
    dataset = instance(1)
    content = encode(dataset)
    nonsense = b"\x18\x00\x01\xa0" + vr.encode() + (b"\0\0" if vr in ("UN", "OB") else b"")
    nonsense += (8).to_bytes(4 if vr in ("UN", "OB") else 2, "little") + b"nonsense"
    place = content.index(b"\x20\x00\x0d\x00")  # the next group of the data set
    sqlite_way.arrive(dataset)
    (path,) = sqlite_way.spool.incoming()
    stored = path.read_bytes()
    path.write_bytes(stored[: -len(content)] + content[:place] + nonsense + content[place:])

    sqlite_way.ingest()

    assert sqlite_way.study().revision == 1


# --- one patient ----------------------------------------------------------------------------------------------------


def patient(patient_id: str = "", issuer: str = "", name: str = "", birth_date: str = "") -> Patient:
    return Patient(patient_id, issuer, name, birth_date)


@pytest.mark.parametrize(
    ("one", "other", "different"),
    [
        (patient(), patient("1", "A", "DOE", "1970"), False),
        (patient("1"), patient("1", name="DOE"), False),
        (patient("1", name="DOE"), patient("1", name="ROE"), False),
        (patient("1"), patient("2"), True),
        (patient("1", "A"), patient("1", "B"), True),
        (patient("1", "A"), patient("1", ""), False),
        (patient("1", name="DOE"), patient(name="ROE"), True),
        (patient(name="DOE"), patient(name="DOE"), False),
        (patient(birth_date="1970"), patient(birth_date="1971"), True),
        (patient("1", name="DOE"), patient(name="DOE", birth_date="1970"), False),
    ],
)
def test_headers_of_two_patients_are_told_apart(one: Patient, other: Patient, different: bool) -> None:
    """An identifier within its issuer decides; without one, name and birth date; silence contradicts nothing."""
    assert are_different(one, other) is different


@given(*[st.builds(patient, *[st.sampled_from(["", "a", "b"])] * 4)] * 2)
def test_telling_patients_apart_has_no_order(one: Patient, other: Patient) -> None:
    """Whichever came first; and nobody differs from himself."""
    assert are_different(one, other) == are_different(other, one)
    assert not are_different(one, one)


def test_second_patient_under_one_study_is_noticed_once(way: Way) -> None:
    """Recorded at the first conflicting instance, and kept with the study."""
    way.take(instance(1))
    way.take(changed(instance(2), PatientID="OTHER"), changed(instance(3), PatientID="OTHER"), at=after(1))
    way.take(instance(4), at=after(2))

    assert way.study().patient_mismatch
    assert kinds(way.sessions).count("patient-mismatch") == 1
    assert way.header().patient_id == "PLANTED-1"


def test_name_in_capitals_is_the_same_name(sqlite_way: Way) -> None:
    """Modalities differ in how they write one."""
    without_id = [changed(instance(number), PatientID="") for number in (1, 2)]
    without_id[1].PatientName = "PLANTED^PATIENT"

    sqlite_way.take(*without_id)

    assert not sqlite_way.study().patient_mismatch


def test_silent_first_header_does_not_hide_two_patients(way: Way) -> None:
    """Neither of two patients contradicts an empty header; they contradict each other."""
    silent = {"PatientID": "", "PatientName": ""}
    way.take(changed(instance(1), **silent))
    way.take(changed(instance(2), PatientID="A"), at=after(1))
    assert not way.study().patient_mismatch

    way.take(changed(instance(3), PatientID="B"), at=after(2))

    assert way.study().patient_mismatch


def test_header_that_was_filled_in_is_vouched_for_anew(sqlite_way: Way) -> None:
    """The event holds the digest of what the header says from then on."""
    sqlite_way.take(changed(instance(1), PatientID=""))
    sqlite_way.take(changed(instance(2), PatientID="A"), at=after(1))

    assert sqlite_way.header().patient_id == "A"
    assert kinds(sqlite_way.sessions, vouches_sha256=vouch_for_header(sqlite_way.header())) == ["study-header-filled"]


def test_objects_that_are_no_images_are_not_compared(sqlite_way: Way) -> None:
    """Only what may be analysed together is; a report about somebody else is the PACS's matter."""
    sqlite_way.take(instance(1), changed(not_image("SR"), PatientID="OTHER"))

    assert not sqlite_way.study().patient_mismatch


def test_vouching_depends_on_the_salt(sqlite_way: Way) -> None:
    """Without the salt nobody can try out names against the digest that history keeps."""
    sqlite_way.take(instance(1))
    header = sqlite_way.header()
    vouched = vouch_for_header(header)

    assert kinds(sqlite_way.sessions, vouches_sha256=vouched) == ["study-opened"]
    header.salt = "other"
    assert vouch_for_header(header) != vouched


# --- what cannot be used --------------------------------------------------------------------------------------------


def unreadable(waiting: Path) -> None:
    rewrite_receipt(waiting, lambda _: '{"version": 1, "patient": "Planted^Patient"')


def of_another_version(waiting: Path) -> None:
    rewrite_receipt(waiting, lambda text: text.replace('"version": 1', '"version": 2'))


def with_an_unknown_field(waiting: Path) -> None:
    rewrite_receipt(waiting, lambda text: text.replace('"version": 1', '"version": 1, "priority": 3'))


def too_long_for_its_column(waiting: Path) -> None:
    rewrite_receipt(waiting, lambda text: text.replace('"SENDER"', '"' + "S" * 40 + '"'))


@pytest.mark.parametrize("spoil", [unreadable, of_another_version, with_an_unknown_field])
def test_receipt_that_cannot_be_read_is_set_aside(way: Way, spoil: Callable[[Path], None]) -> None:
    """The others are ingested, a person finds it in unusable/, and the audit says so."""
    for number in (1, 2, 3):
        way.arrive(instance(number))
    bad = way.spool.incoming()[1]
    spoil(bad)

    assert way.ingest() == 2

    assert [path.name for path in (way.spool.path / "unusable").iterdir()] == [bad.name]
    assert way.spool.incoming() == []
    assert kinds(way.sessions).count("receipt-unusable") == 1


def test_receipt_that_the_database_refuses_is_set_aside(tmp_path: Path, postgres_url: str) -> None:
    """It would else keep every other receipt waiting for ever. (SQLite knows no lengths.)"""
    with open_database(postgres_url) as sessions:
        way = Way(Spool(tmp_path / "spool", 0), sessions)
        for number in (1, 2, 3):
            way.arrive(instance(number))
        too_long_for_its_column(way.spool.incoming()[1])

        assert way.ingest() == 2

        assert len(list((way.spool.path / "unusable").iterdir())) == 1
        assert len(way.instances()) == 2


def test_settled_receipt_that_the_database_refuses_does_not_stop_a_rebuild(tmp_path: Path, postgres_url: str) -> None:
    """The same on the way back from the spool."""
    with open_database(postgres_url) as sessions:
        way = Way(Spool(tmp_path / "spool", 0), sessions)
        way.take(instance(1), instance(2))
        too_long_for_its_column(next(way.spool.settled()))
        empty(way)

        assert assembly.rebuild(SETTINGS, sessions, way.spool, NOW) == 1
        assert len(way.instances()) == 1


def test_receipt_without_its_instance_is_set_aside(sqlite_way: Way) -> None:
    """A row would promise bytes that are not there. (Version 0.1 kept receipts apart.)"""
    receipt = sqlite_way.arrive(instance(1))
    as_version_0_1(sqlite_way.spool, sqlite_way.spool.incoming()[0])
    (sqlite_way.spool.path / receipt.path).unlink()

    assert sqlite_way.ingest() == 0
    assert kinds(sqlite_way.sessions) == ["receipt-unusable"]


def test_instances_of_version_0_1_are_ingested(sqlite_way: Way) -> None:
    """An upgrade finds receipts that wait, and rebuilds rows from those beside their instances."""
    for number in (1, 2):
        sqlite_way.arrive(instance(number))
    for path in sqlite_way.spool.incoming():
        as_version_0_1(sqlite_way.spool, path)

    assert sqlite_way.ingest() == 2
    assert sqlite_way.spool.incoming() == []
    empty(sqlite_way)
    assert assembly.rebuild(SETTINGS, sqlite_way.sessions, sqlite_way.spool, NOW) == 2


def test_name_that_a_row_promises_is_there_before_it(sqlite_way: Way) -> None:
    """The instance waits under another name, which its receiver gave it."""
    receipt = sqlite_way.arrive(instance(1))
    assert not (sqlite_way.spool.path / receipt.path).exists()

    assert sqlite_way.ingest() == 1
    assert (sqlite_way.spool.path / receipt.path).is_file()
    assert sqlite_way.spool.incoming() == []


def test_instance_whose_header_cannot_be_read_is_on_record(sqlite_way: Way) -> None:
    """It was acknowledged; it opens nothing."""
    receipt = sqlite_way.arrive(instance(1))
    (path,) = sqlite_way.spool.incoming()
    path.write_bytes(path.read_bytes().replace(data_set_bytes(path), b"\xff" * receipt.size_bytes))

    sqlite_way.ingest()

    assert [one.is_image for one in sqlite_way.instances()] == [False]


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        (b"ISO_IR 192", b"\xff\xfe\xfd^\xed\xa0\x80"),
        (b"ISO 2022 IR 87", b"\x1b$B\xff\xff\x1b(B"),
        (b"NO SUCH SET", b"\xc3\xa4"),
        (b"ISO_IR 100", b"A\0B"),
        (b"", b"\xe4"),
    ],
)
def test_name_that_cannot_be_decoded_is_kept_as_well_as_it_can_be(way: Way, charset: bytes, name: bytes) -> None:
    """No byte of a sender may stop ingest, and both databases can keep what comes out."""
    dataset = changed(instance(1), SpecificCharacterSet="X" * 20, PatientName="N" * 20)
    way.arrive(dataset)
    (path,) = way.spool.incoming()
    content = path.read_bytes().replace(b"X" * 20, charset.ljust(20)).replace(b"N" * 20, name.ljust(20))
    path.write_bytes(content)

    way.ingest()

    assert way.study().revision == 1
    assert "\0" not in way.header().patient_name
    assert way.header().patient_id == "PLANTED-1"


HEADER = encode(changed(contributed(instance(1), OWN_DEVICE), PixelData=None))


@pytest.mark.hostile
@given(
    data=st.data(),
    rubbish=st.binary(min_size=1, max_size=12),
    vr=st.sampled_from([b"PN", b"SQ", b"UN", b"DA", b"CS", b"US", b"AT", b"OB", b"IS", b"zz"]),
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_no_header_stops_ingest(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, rubbish: bytes, vr: bytes
) -> None:
    """Whatever bytes and VRs stand in it: text that a database can keep, or nothing."""
    content = bytearray(HEADER)
    if data.draw(st.booleans()):
        element = content.index(data.draw(st.sampled_from([b"PN", b"LO", b"CS", b"UI", b"SQ"])))
        content[element : element + 2] = vr
    place = data.draw(st.integers(0, len(content) - len(rubbish)))
    content[place : place + len(rubbish)] = rubbish
    path = tmp_path_factory.getbasetemp() / "rubbish.dcm"
    path.write_bytes(file_header(CTImageStorage, "1.2.3", ExplicitVRLittleEndian) + content)

    header = assembly._header(path, ExplicitVRLittleEndian, {})
    row = assembly._study_header(1, header.content, salt="")

    for column in row.__mapper__.column_attrs:
        str(getattr(row, column.key)).encode()
        assert "\0" not in str(getattr(row, column.key))


def test_log_lines_never_name_the_patient(sqlite_way: Way) -> None:
    """Opened, conflicting, mixed, unreadable: none quotes a value."""
    with structlog.testing.capture_logs() as lines:
        sqlite_way.take(instance(1))
        sqlite_way.take(changed(instance(1), PatientID="OTHER-PLANTED", PatientBirthDate="Planted^Patient"))
        sqlite_way.arrive(instance(3))
        unreadable(sqlite_way.spool.incoming()[0])
        sqlite_way.ingest()
        sqlite_way.complete(after(60))

    assert {"study_opened", "patient_mismatch", "instance_conflict", "receipt_unusable", "study_complete"} <= {
        line["event"] for line in lines
    }
    assert "planted" not in str(lines).lower()


# --- rebuilding -----------------------------------------------------------------------------------------------------


def empty(way: Way) -> None:
    """Lose every row that ingest wrote."""
    with way.sessions.begin() as session:
        for table in ("instance", "study_header", "study"):
            session.execute(text(f"DELETE FROM {table}"))


def test_rows_are_rebuilt_from_the_spool_and_held(way: Way) -> None:
    """Study, header and instances are there again; nothing is analysed again without a command."""
    way.take(instance(1), instance(2), not_image("SR"))
    before = [(one.sop_instance_uid, one.sha256, one.path, one.is_image) for one in way.instances()]
    empty(way)

    assert assembly.rebuild(SETTINGS, way.sessions, way.spool, after(1000)) == 3

    assert sorted((one.sop_instance_uid, one.sha256, one.path, one.is_image) for one in way.instances()) == sorted(
        before
    )
    study = way.study()
    assert (study.held, study.state, study.first_received_at, study.last_image_at) == (
        True,
        StudyState.RECEIVING,
        NOW,
        NOW,
    )
    assert way.header().patient_id == "PLANTED-1"
    assert kinds(way.sessions).count("study-held") == 1
    assert way.complete(after(1000)) == [study.id]


def test_rebuilding_with_all_rows_there_changes_nothing(way: Way) -> None:
    """It happens at every start."""
    way.take(instance(1))
    before = kinds(way.sessions)

    assert assembly.rebuild(SETTINGS, way.sessions, way.spool, after(1000)) == 0
    assert not way.study().held
    assert kinds(way.sessions) == before


def test_only_studies_with_missing_rows_are_held(sqlite_way: Way) -> None:
    """A database that was restored from yesterday's copy knows the older studies."""
    sqlite_way.take(instance(1))
    old = sqlite_way.study()
    sqlite_way.take(instance(1, study_uid="2.25.77"), at=after(100))
    with sqlite_way.sessions.begin() as session:
        new = sqlite_way.study("2.25.77").id
        for table, column in (("instance", "study_id"), ("study_header", "study_id"), ("study", "id")):
            session.execute(text(f"DELETE FROM {table} WHERE {column} = {new}"))

    assembly.rebuild(SETTINGS, sqlite_way.sessions, sqlite_way.spool, after(1000))

    assert sqlite_way.study("2.25.77").held
    assert not get(sqlite_way.sessions, Study, old.id).held


def test_held_study_stays_held_when_more_of_it_arrives(sqlite_way: Way) -> None:
    """Only a command releases it."""
    sqlite_way.take(instance(1))
    empty(sqlite_way)
    assembly.rebuild(SETTINGS, sqlite_way.sessions, sqlite_way.spool, after(1))

    sqlite_way.take(instance(2), at=after(2))

    assert sqlite_way.study().held


# --- the loop -------------------------------------------------------------------------------------------------------


@pytest.fixture
def running(sqlite_way: Way) -> Iterator[Callable[[Way], Event]]:
    """Start ingest's loop in a thread; it is stopped at the end."""
    stop, threads = Event(), []

    def start(way: Way) -> Event:
        settings = Settings.model_validate({"assembly": {"quiet_period_s": 0.01, "sweep_s": 0.01}})
        threads.append(
            Thread(target=assembly.ingest_for_ever, args=(settings, way.sessions, way.spool, stop), daemon=True)
        )
        threads[-1].start()
        return stop

    yield start
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_loop_brings_a_study_from_its_receipt_to_complete(sqlite_way: Way, running: Callable[[Way], Event]) -> None:
    """Without anybody's help."""
    running(sqlite_way)

    sqlite_way.arrive(instance(1))

    wait_until(lambda: "study-complete" in kinds(sqlite_way.sessions))


class Away:
    """Sessions of a database that cannot be reached, until it is back: as PostgreSQL in a restart."""

    def __init__(self, sessions: sessionmaker[Session], error: Exception) -> None:
        self._sessions, self._error = sessions, error
        self.is_away, self.asked = True, 0

    def _through(self) -> sessionmaker[Session]:
        if self.is_away:
            self.asked += 1
            raise self._error
        return self._sessions

    def __call__(self) -> Session:
        return self._through()()

    def begin(self) -> Any:
        return self._through().begin()


@pytest.mark.parametrize(
    "error", [OperationalError("SELECT", {}, Exception("server closed")), RuntimeError("a fault of ours")], ids=repr
)
def test_loop_survives_what_goes_wrong_and_loses_nothing(
    sqlite_way: Way, running: Callable[[Way], Event], error: Exception
) -> None:
    """What was acknowledged meanwhile waits in the spool and is ingested afterwards."""
    away = Away(sqlite_way.sessions, error)
    running(Way(sqlite_way.spool, away))  # type: ignore[arg-type]
    sqlite_way.arrive(instance(1))
    wait_until(lambda: away.asked > 2)
    assert len(sqlite_way.spool.incoming()) == 1

    away.is_away = False

    wait_until(lambda: "study-complete" in kinds(sqlite_way.sessions))


def test_second_ingest_waits_for_the_first_and_can_be_stopped(sqlite_way: Way) -> None:
    """Two would judge studies on half of what arrived; one that waits must still end on SIGTERM."""
    first, second = Event(), Event()
    settings = Settings.model_validate({"assembly": {"quiet_period_s": 0.01, "sweep_s": 0.01}})
    arguments = (settings, sqlite_way.sessions, sqlite_way.spool)
    one = Thread(target=assembly.ingest_for_ever, args=(*arguments, first), daemon=True)
    one.start()
    sqlite_way.arrive(instance(1))
    wait_until(lambda: "study-complete" in kinds(sqlite_way.sessions))
    other = Thread(target=assembly.ingest_for_ever, args=(*arguments, second), daemon=True)
    other.start()

    second.set()
    other.join(10)
    assert not other.is_alive()
    first.set()
    one.join(10)
    assert not one.is_alive()


def test_waiting_study_of_another_spool_is_left_alone(sqlite_way: Way) -> None:
    """A study without an open time is no candidate, whatever its state."""
    add_study(sqlite_way.sessions, state=StudyState.RECEIVING, opened_at=None, last_image_at=None)

    assert sqlite_way.complete(NOW + timedelta(days=1)) == []
