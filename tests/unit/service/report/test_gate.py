"""The gate: what a checker finds in a broken report, and that no finding repeats a value of the patient."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from service.report import codes
from service.report.encoding import encode
from service.report.gate import GateFinding, Severity, check, check_any, passes, without_values
from service.report.readable import walk
from service.report.source import SourceStudy, read_source
from service.report.structured_report import build_sr
from service.shared.settings import ReportSettings, SrSopClass
from tests.report_samples import HEAD, RUN, ct_header, output_for, write


@pytest.fixture
def source(tmp_path: Path) -> SourceStudy:
    """Four CT slices."""
    return read_source(write(tmp_path, [ct_header(number) for number in range(1, 5)]))


@pytest.fixture
def document(source: SourceStudy) -> Dataset:
    """A report without any fault."""
    return build_sr(output_for(source), source, ReportSettings(), SrSopClass.COMPREHENSIVE_3D, run=RUN)


def errors(findings: tuple[GateFinding, ...]) -> list[str]:
    return [finding.text for finding in findings if finding.severity is Severity.ERROR]


def test_a_report_of_ours_passes(document: Dataset, source: SourceStudy) -> None:
    """No error, and no warning outside of the allow-list."""
    findings = check(encode(document), evidence=[one.sop_instance_uid for one in source.instances])

    assert passes(findings)
    assert {finding.severity for finding in findings} == {Severity.ALLOWED}


def item(document: Dataset, code: Any) -> Dataset:
    """The first content item under concept `code`."""
    return next(
        one
        for one in walk(document)
        if one.get("ConceptNameCodeSequence") and one.ConceptNameCodeSequence[0].CodeValue == code.value
    )


def without(document: Dataset, code: Any) -> None:
    """Take every content item under concept `code` out of the tree."""
    for parent in list(walk(document)):
        children = parent.get("ContentSequence")
        if children:
            kept = [one for one in children if one.ConceptNameCodeSequence[0].CodeValue != code.value]
            del parent[0x0040A730]
            parent.add_new(0x0040A730, "SQ", kept)


def verified(document: Dataset) -> None:
    document.VerificationFlag = "VERIFIED"


def other_study(document: Dataset) -> None:
    document.CurrentRequestedProcedureEvidenceSequence[0].StudyInstanceUID = "2.25.77"


def less_evidence(document: Dataset) -> None:
    series = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    series.ReferencedSOPSequence = list(series.ReferencedSOPSequence)[1:]


def lost_character(document: Dataset) -> None:
    document.StudyDescription = "M\ufffdller"


def bold_impression(document: Dataset) -> None:
    item(document, codes.IMPRESSION).TextValue = "No acute finding."


def foreign_procedure(document: Dataset) -> None:
    item(document, codes.PROCEDURE_REPORTED).ConceptCodeSequence[0].CodeValue = "24627-2"


def person(document: Dataset) -> None:
    item(document, codes.OBSERVER_TYPE).ConceptCodeSequence[0].CodeValue = "121006"


def latin(document: Dataset) -> None:
    document.SpecificCharacterSet = "ISO_IR 100"


def final(document: Dataset) -> None:
    document.PreliminaryFlag = "FINAL"


def no_completion_flag(document: Dataset) -> None:
    del document.CompletionFlag


def no_equipment(document: Dataset) -> None:
    del document.ContributingEquipmentSequence


def empty_meaning(document: Dataset) -> None:
    item(document, codes.OBSERVER_TYPE).ConceptNameCodeSequence[0].CodeMeaning = ""


def long_description(document: Dataset) -> None:
    document[0x0008103E].value = "x" * 65


def no_device_uid(document: Dataset) -> None:
    del document.ContributingEquipmentSequence[-1].DeviceUID


def other_title(document: Dataset) -> None:
    document.ConceptNameCodeSequence[0].CodeValue = "126001"


def other_template(document: Dataset) -> None:
    document.ContentTemplateSequence[0].TemplateIdentifier = "1501"


def loose_procedure(document: Dataset) -> None:
    item(document, codes.PROCEDURE_REPORTED).RelationshipType = "HAS OBS CONTEXT"


def loose_tracking(document: Dataset) -> None:
    item(document, codes.TRACKING_UNIQUE_IDENTIFIER).RelationshipType = "CONTAINS"


def listed_twice(document: Dataset) -> None:
    series = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    series.ReferencedSOPSequence = [*series.ReferencedSOPSequence, series.ReferencedSOPSequence[0]]


DEFECTS: list[tuple[Callable[[Dataset], None], str]] = [
    (verified, "VerificationFlag is not UNVERIFIED"),
    (final, "PreliminaryFlag is not PRELIMINARY"),
    (other_study, "evidence of another study among that of the current procedure"),
    (less_evidence, "1 referenced instances are not listed as evidence"),
    (lost_character, "StudyDescription holds a replacement character"),
    (bold_impression, "the Impression does not begin with the words that it is unverified"),
    (foreign_procedure, "Procedure Reported is not of CID 100"),
    (person, "Observer Type is not Device"),
    (latin, "SpecificCharacterSet is not ISO_IR 192"),
    (no_equipment, "ContributingEquipmentSequence does not name the processing equipment"),
    (no_device_uid, "the processing equipment has no DeviceUID"),
    (other_title, "the title is not Imaging Measurement Report"),
    (other_template, "the root template is not TID 1500"),
    (loose_procedure, "Procedure Reported is not related by HAS CONCEPT MOD"),
    (loose_tracking, "Tracking Unique Identifier is not related by HAS OBS CONTEXT"),
    (listed_twice, "an instance is listed twice as evidence"),
    (no_completion_flag, "Element=<CompletionFlag>"),
    (empty_meaning, "Element=<CodeMeaning>"),
    (long_description, "Length invalid for this VR = 65, expected <= 64"),
]


@pytest.mark.parametrize(("defect", "text"), DEFECTS, ids=[defect.__name__ for defect, _ in DEFECTS])
def test_a_defect_is_an_error(document: Dataset, defect: Callable[[Dataset], None], text: str) -> None:
    """Each defect is found, by dciodvfy or by our own assertions."""
    defect(document)

    found = errors(check(encode(document)))

    assert any(text in one for one in found), found


MISSING = [
    codes.LANGUAGE,
    codes.DEVICE_OBSERVER_UID,
    codes.PROCEDURE_REPORTED,
    codes.TRACKING_IDENTIFIER,
    codes.TRACKING_UNIQUE_IDENTIFIER,
    codes.ALGORITHM_NAME,
    codes.ALGORITHM_VERSION,
    codes.SOURCE_OF_MEASUREMENT,
    codes.MEASUREMENT_GROUP,
    codes.IMPRESSION,
    codes.FINDING,
]


@pytest.mark.parametrize("code", MISSING, ids=[code.meaning for code in MISSING])
def test_a_missing_content_item_is_an_error(document: Dataset, code: Any) -> None:
    """What no tool checks in TID 1500 is asserted here."""
    without(document, code)

    found = errors(check(encode(document)))

    assert any(code.meaning in one for one in found), found


def test_evidence_is_held_against_what_was_analysed(document: Dataset) -> None:
    """One instance too many or too few is a fault of ours."""
    expected = ["2.25.1001", "2.25.1002", "2.25.1003", "2.25.1005"]

    assert "evidence differs from the analysed instances in 2" in errors(check(encode(document), evidence=expected))


@pytest.mark.parametrize("uid", ["1.2.03.4", "9.8.7", "1.45.3", "0.0.9"])
def test_an_invalid_uid_of_the_source_is_not_our_fault(tmp_path: Path, uid: str) -> None:
    """It is copied as it is, listed, and stops nothing; the same fault in a UID of ours would."""
    header = ct_header()
    header[0x0020000D].value = uid
    source = read_source(write(tmp_path, [header]))
    content = encode(build_sr(output_for(source), source, ReportSettings(), SrSopClass.ENHANCED, run=RUN))

    findings = check(content, verbatim=source.uids)

    assert passes(findings)
    assert Severity.SOURCE in {finding.severity for finding in findings}
    assert uid not in " ".join(map(str, findings))
    assert not passes(check(content))


def test_a_fault_of_ours_beside_one_of_the_source_still_counts(tmp_path: Path) -> None:
    """The summary line of dciodvfy is forgiven only where everything it sums up is."""
    header = ct_header()
    header[0x0020000D].value = "1.2.03.4"
    source = read_source(write(tmp_path, [header]))
    document = build_sr(output_for(source), source, ReportSettings(), SrSopClass.ENHANCED, run=RUN)
    long_description(document)

    assert not passes(check(encode(document), verbatim=source.uids))


def test_findings_name_no_value(document: Dataset) -> None:
    """dciodvfy quotes what it finds invalid; the audit must not."""
    document[0x00100010].value = "Planted^Patient^A^B^C^D"
    document[0x00100020].value = "PLANTED" * 10
    document[0x00100040].value = "PLANTED"

    findings = check(encode(document))

    assert len(errors(findings)) >= 3
    assert "planted" not in " ".join(map(str, findings)).lower()
    assert any("Patient's Sex" in str(finding) for finding in findings)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "Error - Unrecognized enumerated value <X> for value 1 of attribute <Patient's Sex>",
            "Error - Unrecognized enumerated value <...> for value 1 of attribute <Patient's Sex>",
        ),
        (
            "Error - Value invalid for this VR - (0x0010,0x0030) DA Patient's Birth Date  DA [1] = <19999999> - "
            "Character invalid for this VR = '9' (0x39)",
            "Error - Value invalid for this VR - (0x0010,0x0030) DA Patient's Birth Date  DA [1] = <...> - "
            "Character invalid for this VR = ...",
        ),
        (
            "Error - Value invalid for this VR - (0x0010,0x0010) PN Patient's Name  PN [1] = <A> B> - Too many",
            "Error - Value invalid for this VR - (0x0010,0x0010) PN Patient's Name  PN [1] = <...> - Too many",
        ),
        (
            "Error - Missing attribute Type 2 Required Element=<PatientID> Module=<Patient>",
            "Error - Missing attribute Type 2 Required Element=<PatientID> Module=<Patient>",
        ),
    ],
)
def test_a_line_of_the_checker_loses_its_values(line: str, text: str) -> None:
    """Names of attributes and modules stay, what stood in the data set goes."""
    assert without_values(line) == text


def test_any_object_can_be_checked(tmp_path: Path) -> None:
    """An image of a scanner is checked by dciodvfy alone."""
    findings = check_any((HEAD / "001.dcm").read_bytes())

    assert {finding.checker for finding in findings} == {"dciodvfy"}


def test_own_assertions_hold_for_our_objects_wherever_they_are_found(document: Dataset) -> None:
    """`validate` on a folder knows our reports by their model name."""
    verified(document)

    assert "VerificationFlag is not UNVERIFIED" in errors(check_any(encode(document)))


def test_bytes_that_are_no_dicom_are_an_error() -> None:
    """Nothing raises."""
    assert not passes(check(b"not DICOM"))


def test_the_gate_reads_what_is_sent(document: Dataset) -> None:
    """It works on bytes, so that what passes is what leaves."""
    content = encode(document)

    assert dcmread(BytesIO(content)).SOPInstanceUID == document.SOPInstanceUID
    assert passes(check(content))
