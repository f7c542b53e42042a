"""Coded findings: which answers become codes, which do not, and that people can read the same in words."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from service.report import codes, words
from service.report.coded_findings import coded_findings, sentences
from service.report.encoding import encode
from service.report.readable import readable
from service.report.source import SourceStudy, read_source
from service.report.structured_report import build_sr
from service.report.text_report import build_text_report
from service.shared.messages import AnalysisOutput, Aspect, FindingName
from service.shared.settings import ReportSettings, SrSopClass
from tests.report_samples import ANSWERS, RUN, answer, ct_header, output_for, output_of, write

UNSUITABLE = (answer(None, Aspect.CHEST_CT, "no", 0.98), *ANSWERS[1:])


@pytest.fixture
def source(tmp_path: Path) -> SourceStudy:
    """Four CT slices."""
    return read_source(write(tmp_path, [ct_header(number) for number in range(1, 5)]))


def document(output: AnalysisOutput, source: SourceStudy) -> Dataset:
    """The SR as a receiver reads it."""
    built = build_sr(output, source, ReportSettings(), SrSopClass.COMPREHENSIVE_3D, run=RUN)
    return dcmread(BytesIO(encode(built)))


def groups(document: Dataset) -> dict[str, Dataset]:
    """The measurement groups of coded findings by the code of the finding."""
    (measurements,) = [
        item
        for item in document.ContentSequence
        if item.ConceptNameCodeSequence[0].CodeValue == codes.IMAGING_MEASUREMENTS.value
    ]
    found = {}
    for group in measurements.ContentSequence:
        for code in items(group, codes.FINDING.value):
            found[code.ConceptCodeSequence[0].CodeValue] = group
    found.pop(codes.MODEL_INPUT_SELECTION.value, None)
    return found


def items(group: Dataset, value: str) -> list[Dataset]:
    return [item for item in group.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == value]


def measured(group: Dataset, value: str) -> float:
    (item,) = items(group, value)
    return float(item.MeasuredValueSequence[0].NumericValue)


def nodule_of(document: Dataset) -> Dataset:
    return groups(document)[codes.FINDINGS_CODED[FindingName.NODULE].value]


def test_every_finding_that_was_asked_for_has_a_group_with_presence_or_absence(source: SourceStudy) -> None:
    said = {
        finding: items(group, codes.PRESENCE.value)[0].ConceptCodeSequence[0].CodeValue
        for finding, group in groups(document(output_for(source, answers=ANSWERS), source)).items()
    }
    expected = {
        FindingName.NODULE: codes.PRESENT,
        FindingName.EFFUSION: codes.PRESENT,
        FindingName.CONSOLIDATION: codes.ABSENT,
        FindingName.PNEUMOTHORAX: codes.ABSENT,
        FindingName.CARDIOMEGALY: codes.PRESENT,
        FindingName.CALCIFICATION: codes.PRESENT,
    }
    assert said == {codes.FINDINGS_CODED[name].value: code.value for name, code in expected.items()}


def test_a_finding_has_its_site_side_diameter_and_the_certainty_of_each(source: SourceStudy) -> None:
    nodule = nodule_of(document(output_for(source, answers=ANSWERS), source))
    (site,) = items(nodule, "363698007")
    assert site.ConceptCodeSequence[0].CodeValue == codes.LUNG_ZONES["upper"].value
    assert site.ContentSequence[0].ConceptCodeSequence[0].CodeValue == codes.SIDES["right"].value
    assert measured(nodule, codes.DIAMETER.value) == 12
    certainties = [
        measured(nodule, code.value)
        for code in (
            codes.CERTAINTY_OF_FINDING,
            codes.CERTAINTY_OF_SIDE,
            codes.CERTAINTY_OF_ZONE,
            codes.CERTAINTY_OF_DIAMETER,
            codes.CERTAINTY_OF_SLICE,
        )
    ]
    assert certainties == [93.0, 81.0, 70.0, 60.0, 55.0]


def test_a_finding_refers_to_the_slice_that_shows_it_best(source: SourceStudy) -> None:
    output = output_for(source, answers=ANSWERS)
    nodule = nodule_of(document(output, source))
    (image,) = [item for item in nodule.ContentSequence if item.ValueType == "IMAGE"]
    assert image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == output.retention.sources[2].sop_instance_uid


def test_an_absent_finding_has_no_side_no_size_and_no_slice(source: SourceStudy) -> None:
    consolidation = groups(document(output_for(source, answers=ANSWERS), source))[
        codes.FINDINGS_CODED[FindingName.CONSOLIDATION].value
    ]
    assert [item for item in consolidation.ContentSequence if item.ValueType == "IMAGE"] == []
    (site,) = items(consolidation, "363698007")
    assert "ContentSequence" not in site
    assert items(consolidation, codes.CERTAINTY_OF_SIDE.value) == []
    assert measured(consolidation, codes.CERTAINTY_OF_FINDING.value) == 97.0


def test_nothing_is_coded_of_a_study_that_the_model_holds_for_no_chest_ct(source: SourceStudy) -> None:
    output = output_for(source, answers=UNSUITABLE)
    assert coded_findings(output) == ()
    assert groups(document(output, source)) == {}
    assert sentences(output) == ["No finding is coded: the model holds that this is no chest CT (98 %)."]


def test_a_report_without_questions_says_nothing_of_coded_findings(source: SourceStudy) -> None:
    output = output_for(source)
    assert groups(document(output, source)) == {}
    assert not [text for text in words.comments(output, "", 0) if "coded" in text.lower()]


def test_tracking_identifiers_differ_between_findings_and_stay_the_same_for_the_same_run(source: SourceStudy) -> None:
    first, second = (
        [
            items(group, codes.TRACKING_UNIQUE_IDENTIFIER.value)[0].UID
            for group in groups(document(output_for(source, answers=ANSWERS), source)).values()
        ]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == len(FindingName)


def test_people_read_the_coded_findings_in_words_with_what_the_percentages_mean(source: SourceStudy) -> None:
    output = output_for(source, answers=ANSWERS)
    opening, nodule, effusion, *_ = sentences(output)
    assert "no measured accuracy" in opening
    assert nodule == (
        "Lung nodule: present (93 %), right side (81 %), upper zone (70 %), diameter 12 mm (60 %), "
        "best on model input 3 (55 %)."
    )
    assert effusion == "Pleural effusion: present (88 %), both sides (75 %)."
    assert nodule in readable(document(output, source))
    basic = build_text_report(output, source, ReportSettings(), run=RUN)
    assert nodule in readable(basic)


def test_a_finding_on_a_slab_refers_to_every_slice_of_it(source: SourceStudy) -> None:
    output = output_of([one.sop_instance_uid for one in source.instances], keep_every=1, answers=ANSWERS)
    slab = output.retention.inputs[2].model_copy(update={"source_instances": (1, 2)})
    inputs = (*output.retention.inputs[:2], slab, output.retention.inputs[3])
    output = output.model_copy(update={"retention": output.retention.model_copy(update={"inputs": inputs})})
    images = [item for item in nodule_of(document(output, source)).ContentSequence if item.ValueType == "IMAGE"]
    assert len(images) == 2
