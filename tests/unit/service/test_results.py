"""The report step: every result of an analysis built, gated, stored and named in one transaction; or none of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from threading import Event, Thread
from typing import Any
from zoneinfo import ZoneInfo

import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service import results
from service.alerts import AlertKind, current
from service.report.encoding import name_by_content
from service.report.gate import GateFinding, Severity
from service.report.readable import walk
from service.report.source import read_source
from service.report.structured_report import build_sr
from service.shared import transitions
from service.shared.db import Analysis, AnalysisState, AuditEvent, Delivery, Instance, Result, ResultState
from service.shared.durable import digest
from service.shared.messages import store_output
from service.shared.settings import Settings
from tests.receiving import wait_until
from tests.report_samples import HEAD, arrays_of, output_for
from tests.rows import ACTOR, NOW, add_analysis, add_instance, add_study, claimed, get, kinds, open_database

SLICES = 4


@pytest.fixture
def sessions(sqlite_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(sqlite_url) as opened:
        yield opened


def destination(name: str, sr_sop_class: str | list[str] = "comprehensive3d", **changes: Any) -> dict[str, Any]:
    return {"name": name, "ae_title": name.upper(), "host": "h", "port": 104, "sr_sop_class": sr_sop_class, **changes}


@dataclass
class Desk:
    """A data folder with a real study in its spool, and analyses of it that were read."""

    data: Path
    sessions: sessionmaker[Session]
    study_id: int
    settings: Settings

    def read(self, **changes: Any) -> int:
        """An analysis of the study that its worker has finished."""
        analysis_id = add_analysis(self.sessions, self.study_id, **changes)
        source = read_source(sorted((self.data / "spool" / "study").glob("*.dcm")))
        said = output_for(source, analysis_id=analysis_id)
        arrays = arrays_of(said.retention.inputs, (4, 4)).to_npz()
        held = claimed(self.sessions, analysis_id)
        path, sha256 = store_output(self.data / "outputs" / str(analysis_id), held.fence, said, arrays)
        with self.sessions.begin() as session:
            assert transitions.close_read(
                session,
                held,
                said,
                output_path=str(path.relative_to(self.data)),
                output_sha256=sha256,
                now=NOW,
                actor=ACTOR,
            )
        return analysis_id

    def refused(self, code: str = "no-suitable-series") -> int:
        """An analysis of the study that its worker has refused."""
        analysis_id = add_analysis(self.sessions, self.study_id)
        held = claimed(self.sessions, analysis_id)
        with self.sessions.begin() as session:
            assert transitions.close_refused(
                session, held, code=code, reason="no axial series of 8 slices or more", now=NOW, actor=ACTOR
            )
        return analysis_id

    def build(self, analysis_id: int) -> None:
        results.build(self.settings, self.sessions, analysis_id)

    def made(self, analysis_id: int) -> list[Result]:
        with self.sessions() as session:
            return list(session.scalars(select(Result).filter_by(analysis_id=analysis_id).order_by(Result.id)))

    def content(self, one: Result) -> bytes:
        return (self.data / one.path).read_bytes()

    def dataset(self, one: Result) -> FileDataset:
        return pydicom.dcmread(BytesIO(self.content(one)))

    def sent_to(self, one: Result) -> list[str]:
        with self.sessions() as session:
            found = select(Delivery.destination).filter_by(result_id=one.id).order_by(Delivery.id)
            return list(session.scalars(found))


def desk_of(
    tmp_path: Path, sessions: sessionmaker[Session], header: dict[str, Any] | None = None, **settings: Any
) -> Desk:
    """header: attributes of every slice that are others than in the real study."""
    folder = tmp_path / "spool" / "study"
    folder.mkdir(parents=True)
    for path in sorted(HEAD.glob("*.dcm"))[:SLICES]:
        shutil.copy(path, folder)
        if header is not None:
            changed = pydicom.dcmread(path)
            for keyword, value in header.items():
                setattr(changed, keyword, value)
            changed.save_as(folder / path.name)
    source = read_source(sorted(folder.glob("*.dcm")))
    study_id = add_study(sessions, source.study_uid)
    for number, path in enumerate(sorted(folder.glob("*.dcm"))):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        add_instance(
            sessions,
            study_id,
            number,
            series_uid=str(header.SeriesInstanceUID),
            sop_instance_uid=str(header.SOPInstanceUID),
            path=f"study/{path.name}",
        )
    content = {"data": {"path": tmp_path}, "assembly": {"sweep_s": 0.01}} | settings
    return Desk(tmp_path, sessions, study_id, Settings.model_validate(content))


@pytest.fixture
def desk(tmp_path: Path, sessions: sessionmaker[Session]) -> Desk:
    return desk_of(tmp_path, sessions, destination=[destination("a"), destination("b")])


def test_reports_that_may_stand_in_are_built_and_due_nowhere(tmp_path: Path, sessions: sessionmaker[Session]) -> None:
    """Each is an object of its own; delivery sends one only where the best is not taken."""
    classes = ["comprehensive3d", "enhanced", "basic_text"]
    desk = desk_of(tmp_path, sessions, destination=[destination("a", classes), destination("b", "basic_text")])
    analysis_id = desk.read()

    desk.build(analysis_id)

    made = desk.made(analysis_id)
    assert {one.kind: desk.sent_to(one) for one in made} == {
        "sr-comprehensive3d": ["a"],
        "sr-enhanced": [],
        "sr-basic_text": ["b"],
    }
    assert len({one.sop_instance_uid for one in made}) == 3


def test_report_is_stored_named_and_due_for_every_destination(desk: Desk) -> None:
    """The file has the digest on record, the row the UIDs of the object, the analysis is done."""
    analysis_id = desk.read()

    desk.build(analysis_id)

    assert get(desk.sessions, Analysis, analysis_id).state is AnalysisState.DONE
    (one,) = desk.made(analysis_id)
    assert (one.state, one.kind) == (ResultState.BUILT, "sr-comprehensive3d")
    assert digest(desk.content(one)) == one.sha256
    assert len(desk.content(one)) == one.size_bytes
    dataset = desk.dataset(one)
    assert (dataset.SOPInstanceUID, dataset.SOPClassUID) == (one.sop_instance_uid, one.sop_class_uid)
    assert desk.sent_to(one) == ["a", "b"]
    assert kinds(desk.sessions)[-2:] == ["result-built", "analysis-done"]


def test_one_report_is_built_for_each_class_that_destinations_take(
    tmp_path: Path, sessions: sessionmaker[Session]
) -> None:
    """Each goes only where it was asked for, under a UID of its own."""
    wanted = [destination("a"), destination("b", "enhanced"), destination("c")]
    desk = desk_of(tmp_path, sessions, destination=wanted)
    analysis_id = desk.read()

    desk.build(analysis_id)

    one, other = desk.made(analysis_id)
    assert (desk.sent_to(one), desk.sent_to(other)) == (["a", "c"], ["b"])
    assert one.sop_instance_uid != other.sop_instance_uid
    assert one.sop_class_uid != other.sop_class_uid


def test_companions_of_the_route_stand_beside_the_report(tmp_path: Path, sessions: sessionmaker[Session]) -> None:
    """Each is an object of its own, passes the gate and goes where the report goes."""
    companions = ["sc", "seg", "pm", "pdf", "kos"]
    desk = desk_of(
        tmp_path,
        sessions,
        destination=[destination("a"), destination("b", "basic_text")],
        route=[{"name": "default", "companions": companions}],
    )
    analysis_id = desk.read()

    desk.build(analysis_id)

    made = desk.made(analysis_id)
    assert [one.kind for one in made] == ["sr-comprehensive3d", "sr-basic_text", *companions]
    assert all(one.state is ResultState.BUILT for one in made)
    assert [desk.sent_to(one) for one in made] == [["a"], ["b"], *[["a", "b"]] * 5]
    assert len({desk.dataset(one).StudyInstanceUID for one in made}) == 1


def cited(report: Dataset) -> set[str]:
    """UIDs of what the tree refers to."""
    return {
        str(one.ReferencedSOPInstanceUID) for item in walk(report) for one in item.get("ReferencedSOPSequence") or []
    }


@pytest.mark.parametrize("sop_class", ["comprehensive3d", "basic_text"])
def test_report_refers_to_its_companions(tmp_path: Path, sessions: sessionmaker[Session], sop_class: str) -> None:
    """And lists them as evidence; no companion refers to the report, so that no UID depends on itself."""
    companions = ["sc", "seg", "pm", "pdf", "kos"]
    route = [{"name": "default", "companions": companions}]
    desk = desk_of(tmp_path, sessions, destination=[destination("a", sop_class)], route=route)
    analysis_id = desk.read()

    desk.build(analysis_id)

    report, *others = desk.made(analysis_id)
    assert cited(desk.dataset(report)) >= {one.sop_instance_uid for one in others}
    assert report.state is ResultState.BUILT  # the gate holds evidence against references
    assert all(report.sop_instance_uid.encode() not in desk.content(one) for one in others)


# The ten cases of PS3.5 that a source may come in, and a destination that takes the same and no UTF-8
NAMES = {
    "latin": (["ISO_IR 100"], "Buc^Jérôme", "ISO_IR 100"),
    "polish": (["ISO_IR 101"], "Wałęsa^Lech", "ISO_IR 101"),
    "greek": (["ISO_IR 126"], "Διονυσιος", "ISO_IR 126"),
    "arabic": (["ISO_IR 127"], "قباني^لنزار", "ISO_IR 127"),
    "hebrew": (["ISO_IR 138"], "שרון^דבורה", "ISO_IR 138"),
    "cyrillic": (["ISO_IR 144"], "Люкceмбypг", "ISO_IR 144"),
    "turkish": (["ISO_IR 148"], "Öztürk^Işıl", "ISO_IR 148"),
    "thai": (["ISO_IR 166"], "สมชาย^ใจดี", "ISO_IR 166"),
    "japanese": (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう", "ISO 2022 IR 87"),
    "japanese, half-width": (
        ["ISO 2022 IR 13", "ISO 2022 IR 87"],
        "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
        "ISO 2022 IR 13\\ISO 2022 IR 87",
    ),
    "korean": (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동", "ISO 2022 IR 149"),
    "chinese, GB2312": (["", "ISO 2022 IR 58"], "Zhang^XiaoDong=张^小东", "GB18030"),
    "chinese": (["GB18030"], "Wang^XiaoDong=王^小东", "GB18030"),
    "utf-8": (["ISO_IR 192"], "Wang^XiaoDong=王^小東", "utf-8"),
}


def designated(name: str) -> bytes:
    """In GB 2312 with its escape sequence in every component (PS3.5 K.2), which pydicom does not write."""
    groups = name.split("=")
    chinese = "^".join("\x1b$)A" + part for part in groups[1].split("^"))
    return f"{groups[0]}=".encode() + chinese.encode("gb2312")


@pytest.mark.parametrize(("written", "name", "taken"), NAMES.values(), ids=NAMES)
def test_name_arrives_in_the_character_set_that_the_destination_takes(
    tmp_path: Path, sessions: sessionmaker[Session], written: list[str], name: str, taken: str
) -> None:
    """From the source's set to the destination's, in the report and what stands beside it; each passes the gate."""
    desk = desk_of(
        tmp_path,
        sessions,
        {"SpecificCharacterSet": written, "PatientName": designated(name) if "ISO 2022 IR 58" in written else name},
        destination=[destination("a"), destination("b", charset=taken)],
        route=[{"name": "default", "companions": ["kos"]}],
    )
    analysis_id = desk.read()

    desk.build(analysis_id)

    made = desk.made(analysis_id)
    assert {(one.state, str(desk.dataset(one).PatientName)) for one in made} == {(ResultState.BUILT, name)}
    if taken == "utf-8":
        assert [desk.sent_to(one) for one in made] == [["a", "b"], ["a", "b"]]
        return
    assert [desk.sent_to(one) for one in made] == [["a"], ["b"], ["a"], ["b"]]
    assert len({one.kind for one in made}) == 3  # a report in another set is of another kind
    assert len({one.sop_instance_uid for one in made}) == 4
    for one in made[1::2]:
        declared = desk.dataset(one).SpecificCharacterSet
        assert (declared if isinstance(declared, str) else "\\".join(declared)).endswith(taken)
    assert made[3].sop_instance_uid in cited(desk.dataset(made[1]))  # its own companion, not that of the others
    assert made[2].sop_instance_uid not in cited(desk.dataset(made[1]))


def test_text_that_a_destination_cannot_take_goes_on_record_and_is_not_changed(
    tmp_path: Path, sessions: sessionmaker[Session]
) -> None:
    """One object in UTF-8 for both; the reason names the attribute, and delivery refuses it to the second."""
    desk = desk_of(
        tmp_path,
        sessions,
        {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "王^小東"},
        destination=[destination("a"), destination("b", charset="ISO_IR 100")],
        route=[{"name": "default", "companions": ["kos"]}],
    )
    analysis_id = desk.read()

    desk.build(analysis_id)

    made = desk.made(analysis_id)
    assert all(str(desk.dataset(one).PatientName) == "王^小東" for one in made)
    assert [desk.sent_to(one) for one in made if one.kind == "kos"] == [["a", "b"]]
    said = [line for one in made for line in one.gate if "charset" in line]
    assert said
    assert all(line == "warning: charset: does not fit ISO_IR 100: PatientName; not for b" for line in said)


@pytest.mark.parametrize("route", [[], [{"name": "other"}]], ids=["without a destination", "route gone"])
def test_result_that_has_nowhere_to_go_is_kept(
    tmp_path: Path, sessions: sessionmaker[Session], route: list[dict[str, Any]]
) -> None:
    """Built all the same: nobody should have to read the study again for a line in the configuration."""
    destinations = [destination("a")] if route else []
    desk = desk_of(tmp_path, sessions, destination=destinations, route=route)
    analysis_id = desk.read()

    desk.build(analysis_id)

    (one,) = desk.made(analysis_id)
    assert desk.sent_to(one) == []
    assert get(desk.sessions, Analysis, analysis_id).state is AnalysisState.DONE


def test_killed_builder_is_followed_by_one_that_builds_the_same_bytes(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the outbox and the database: the second run finds the file as it would write it."""
    analysis_id = desk.read()

    def killed(*_: object, **__: object) -> bool:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(transitions, "finish_analysis", killed)
        with pytest.raises(SystemExit):
            desk.build(analysis_id)
    before = [path.name for path in (desk.data / "outbox").rglob("*.dcm")]
    assert len(before) == 1

    desk.build(analysis_id)

    assert [path.name for path in (desk.data / "outbox").rglob("*.dcm")] == before
    assert len(desk.made(analysis_id)) == 1


def test_second_build_adds_nothing(desk: Desk) -> None:
    """Two builders, or one that is told twice."""
    analysis_id = desk.read()

    desk.build(analysis_id)
    desk.build(analysis_id)

    assert len(desk.made(analysis_id)) == 1


def test_next_report_names_the_one_before_it(desk: Desk) -> None:
    """A reader of the second sees that there was a first; their UIDs differ."""
    first = desk.read()
    desk.build(first)
    second = desk.read(run_number=2, predecessor_id=first)

    desk.build(second)

    (one,), (other,) = desk.made(first), desk.made(second)
    assert one.sop_instance_uid != other.sop_instance_uid
    prior = desk.dataset(other).PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert prior.ReferencedSOPInstanceUID == one.sop_instance_uid
    said = [str(item.TextValue) for item in walk(desk.dataset(other)) if item.ValueType == "TEXT"]
    assert (
        "This is revision 1, run 2; an earlier report was on revision 1, run 1. The same images were read again."
        in said
    )


def test_report_on_a_later_revision_says_how_many_images_are_new(desk: Desk) -> None:
    """Beside the name of the report before it."""
    first = desk.read()
    desk.build(first)
    with desk.sessions.begin() as session:
        late = session.scalars(select(Instance).order_by(Instance.id.desc())).first()
        assert late is not None
        late.revision = 2
    second = desk.read(revision=2, predecessor_id=first)

    desk.build(second)

    (other,) = desk.made(second)
    said = " ".join(str(item.TextValue) for item in walk(desk.dataset(other)) if item.ValueType == "TEXT")
    assert "This is revision 2, run 1; an earlier report was on revision 1, run 1. 1 image has come or changed" in said


def test_report_names_what_else_is_another_than_in_the_run_before(desk: Desk) -> None:
    """Model, settings, prompt and software; what is the same is not named."""
    first = desk.read()
    desk.build(first)
    second = desk.read(run_number=2, predecessor_id=first)
    with desk.sessions.begin() as session:
        before = session.get_one(Analysis, first)
        before.model = {**(before.model or {}), "weights_sha256": "0" * 64}
        before.pruning = {**(before.pruning or {}), "tau": 0.5}

    desk.build(second)

    (other,) = desk.made(second)
    said = " ".join(str(item.TextValue) for item in walk(desk.dataset(other)) if item.ValueType == "TEXT")
    assert "The same images were read again. Other than then: the model, the settings of the pruning." in said


@pytest.mark.parametrize(
    ("report", "offset"), [({"timezone": "Asia/Kolkata"}, "+0530"), ({"timezone": "UTC"}, "+0000"), ({}, None)]
)
def test_times_are_those_of_the_site(
    tmp_path: Path, sessions: sessionmaker[Session], report: dict[str, str], offset: str | None
) -> None:
    """The start of the analysis, in the zone of the settings or of this machine: never before the study's own times."""
    desk = desk_of(tmp_path, sessions, report=report)
    analysis_id = desk.read()

    desk.build(analysis_id)

    (one,) = desk.made(analysis_id)
    dataset = desk.dataset(one)
    local = NOW.astimezone(ZoneInfo(report["timezone"]) if report else None)
    assert "TimezoneOffsetFromUTC" not in dataset
    assert (dataset.ContentDate, dataset.ContentTime[:6]) == (f"{local:%Y%m%d}", f"{local:%H%M%S}")
    assert dataset.ContributingEquipmentSequence[-1].ContributionDateTime.endswith(offset or f"{local:%z}")


def test_faults_of_the_source_header_are_in_the_audit(tmp_path: Path, sessions: sessionmaker[Session]) -> None:
    """By keyword and what was done, without any value; the report is built all the same."""
    desk = desk_of(tmp_path, sessions, {"PatientSex": "X", "StudyID": "much longer than SH"})
    analysis_id = desk.read()

    desk.build(analysis_id)

    (one,) = desk.made(analysis_id)
    assert one.state is ResultState.BUILT
    with sessions() as session:
        event = session.scalars(select(AuditEvent).filter_by(kind="result-built")).one()
    assert {"PatientSex: emptied", "StudyID: emptied"} <= set(event.detail["header_faults"])
    assert "longer" not in str(event.detail)


def test_report_that_fails_the_gate_is_quarantined_and_never_sent(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the findings on record; the analysis stays `read`, for a person to look at, and is not built again."""
    finding = GateFinding(Severity.ERROR, "ours", "attribute missing")
    monkeypatch.setattr(results.gate, "check", lambda *_, **__: [finding])
    analysis_id = desk.read()

    desk.build(analysis_id)

    (one,) = desk.made(analysis_id)
    assert (one.state, one.gate) == (ResultState.QUARANTINED, ["error: ours: attribute missing"])
    assert desk.sent_to(one) == []
    assert get(desk.sessions, Analysis, analysis_id).state is AnalysisState.READ
    assert results.waiting(desk.sessions) == []


def test_a_fault_of_ours_is_found_quarantined_and_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a broken tree to the alert, through the real gate: nothing is due anywhere, and nobody must look to know."""

    def broken(*arguments: Any, **names: Any) -> Dataset:
        document = build_sr(*arguments, **names)
        for item in walk(document):
            if item.get("RelationshipType") == "HAS OBS CONTEXT":
                item.RelationshipType = "HAS CONCEPT MOD"
        return name_by_content(document, "SR")

    monkeypatch.setattr(results, "build_sr", broken)
    analysis_id = desk.read()

    desk.build(analysis_id)

    (one,) = desk.made(analysis_id)
    assert one.state is ResultState.QUARANTINED
    assert "error: medpruner-pacs: Observer Type is not related by HAS OBS CONTEXT" in one.gate
    assert desk.sent_to(one) == []
    with desk.sessions() as session:
        told = [alert for alert in current(session, desk.settings, NOW) if alert.kind is AlertKind.QUARANTINE]
    assert [(alert.severity.value, str(desk.study_id) in alert.remedy) for alert in told] == [("critical", True)]


def test_output_with_changed_bytes_is_not_reported(desk: Desk) -> None:
    """What the worker said is what its digest says, or nothing is built."""
    analysis_id = desk.read()
    path = desk.data / str(get(desk.sessions, Analysis, analysis_id).output_path)
    path.write_bytes(path.read_bytes().replace(b"lungs are clear", b"lungs are black"))

    with pytest.raises(ValueError, match="does not match its recorded SHA-256"):
        desk.build(analysis_id)

    assert desk.made(analysis_id) == []
    assert not (desk.data / "outbox").exists()


# --- refusals -------------------------------------------------------------------------------------------------------

REPORTED = [{"name": "default", "report_refusals": True, "companions": ["sc", "pdf"]}]


@pytest.mark.parametrize("sop_class", ["comprehensive3d", "enhanced", "basic_text"])
def test_refused_study_yields_a_report_that_says_so_where_the_route_asks_for_it(
    tmp_path: Path, sessions: sessionmaker[Session], sop_class: str
) -> None:
    """The reason in words and a code, PARTIAL, every image as evidence, printed too; the analysis stays refused.

    Of the companions only the printed report has something to show.
    """
    desk = desk_of(tmp_path, sessions, destination=[destination("a", sop_class)], route=REPORTED)
    analysis_id = desk.refused()
    assert results.refused(desk.settings, sessions, NOW) == [analysis_id]

    desk.build(analysis_id)

    one, printed = desk.made(analysis_id)
    assert (one.kind, one.state, desk.sent_to(one)) == (f"sr-{sop_class}", ResultState.BUILT, ["a"])
    assert (printed.kind, printed.state, desk.sent_to(printed)) == ("pdf", ResultState.BUILT, ["a"])
    report = desk.dataset(one)
    assert cited(report) >= {printed.sop_instance_uid}
    said = " ".join(str(item.TextValue) for item in walk(report) if item.ValueType == "TEXT")
    assert "UNVERIFIED machine output, not for diagnosis. NOT ANALYSED: no model was run on this study." in said
    assert "This study could not be analysed: no axial series of 8 slices or more" in said
    assert "The model was shown" not in said
    assert report.CompletionFlag == "PARTIAL"
    (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
    of_series = [len(series.ReferencedSOPSequence) for series in evidence.ReferencedSeriesSequence]
    assert sorted(of_series) == [1, SLICES]
    assert get(sessions, Analysis, analysis_id).state is AnalysisState.REFUSED
    assert results.refused(desk.settings, sessions, NOW) == []
    desk.build(analysis_id)
    assert len(desk.made(analysis_id)) == 2


@pytest.mark.parametrize("code", ["patient-mismatch", "input-removed"])
def test_refusal_for_want_of_one_patient_or_of_images_is_never_reported(
    tmp_path: Path, sessions: sessionmaker[Session], code: str
) -> None:
    """A report would name a patient that may be another one."""
    desk = desk_of(tmp_path, sessions, destination=[destination("a")], route=REPORTED)
    desk.refused(code)

    assert results.refused(desk.settings, sessions, NOW) == []


def test_refusal_is_not_reported_by_default_nor_long_after(desk: Desk, tmp_path: Path) -> None:
    """Who turns it on gets no reports on years of refused studies."""
    desk.refused()
    asked = Settings.model_validate(desk.settings.model_dump() | {"route": REPORTED})

    assert results.refused(desk.settings, desk.sessions, NOW) == []
    assert len(results.refused(asked, desk.sessions, NOW)) == 1
    assert results.refused(asked, desk.sessions, NOW + timedelta(days=1, seconds=1)) == []


# --- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("SELECT", {}, Exception("server closed")),
        IntegrityError("INSERT", {}, Exception("UNIQUE")),
        RuntimeError("a fault of ours"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_analysis_that_cannot_be_built_holds_up_no_other(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A database that is away is waited for; any other fault of one analysis is nobody else's."""
    bad, good = desk.read(), desk.read(run_number=2)
    tried: list[int] = []
    build = results.build

    def building(settings: Settings, sessions: sessionmaker[Session], analysis_id: int) -> None:
        tried.append(analysis_id)
        if analysis_id == bad and (not isinstance(error, OperationalError) or tried.count(bad) < 3):
            raise error
        build(settings, sessions, analysis_id)

    monkeypatch.setattr(results, "build", building)
    stop = Event()
    loop = Thread(target=results.build_for_ever, args=(desk.settings, desk.sessions, stop), daemon=True)
    loop.start()
    wait_until(lambda: get(desk.sessions, Analysis, good).state is AnalysisState.DONE)
    stop.set()
    loop.join(20)

    assert not loop.is_alive()
    expected = AnalysisState.DONE if isinstance(error, OperationalError) else AnalysisState.READ
    assert get(desk.sessions, Analysis, bad).state is expected
