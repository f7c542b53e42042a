"""The Key Object Selection: the slices that the model was given, and nothing else."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from service.report.encoding import encode
from service.report.gate import Severity, check
from service.report.key_objects import build_key_objects
from service.report.source import SourceStudy, read_source
from service.shared.messages import SourceState
from service.shared.settings import ReportSettings
from tests.report_samples import RUN, ct_header, output_for, output_of, write


@pytest.fixture
def source(tmp_path: Path) -> SourceStudy:
    """Four CT slices."""
    return read_source(write(tmp_path, [ct_header(number) for number in range(1, 5)]))


def build(source: SourceStudy) -> Dataset:
    return dcmread(BytesIO(encode(build_key_objects(output_for(source), source, ReportSettings(), run=RUN))))


def images(document: Dataset) -> list[Dataset]:
    return [item.ReferencedSOPSequence[0] for item in document.ContentSequence if item.ValueType == "IMAGE"]


def test_the_given_slices_are_selected(source: SourceStudy) -> None:
    """Slices 1 and 3 of an analysis that kept every second one."""
    assert [one.ReferencedSOPInstanceUID for one in images(build(source))] == ["2.25.1001", "2.25.1003"]


def test_the_description_says_that_it_is_unverified(source: SourceStudy) -> None:
    """Whatever a viewer shows beside the images."""
    (text,) = [item for item in build(source).ContentSequence if item.get("TextValue", "").startswith("UNVERIFIED")]

    assert text.ConceptNameCodeSequence[0].CodeMeaning == "Key Object Description"


def test_frames_of_a_multi_frame_instance_are_selected_by_number(source: SourceStudy) -> None:
    """One reference with the given frames."""
    output = output_of([source.instances[0].sop_instance_uid] * 4)
    frames = tuple(
        one.model_copy(update={"frame_number": number}) for number, one in enumerate(output.retention.sources, 1)
    )
    output = output.model_copy(update={"retention": output.retention.model_copy(update={"sources": frames})})

    (image,) = images(build_key_objects(output, source, ReportSettings(), run=RUN))

    assert list(image.ReferencedFrameNumber) == [1, 3]


def test_it_passes_the_gate_without_a_warning_of_its_own(source: SourceStudy) -> None:
    """Evidence is what is selected."""
    findings = check(encode(build(source)))

    assert {finding.severity for finding in findings} == {Severity.ALLOWED}


def test_a_selected_image_that_is_no_evidence_is_found(source: SourceStudy) -> None:
    """The gate looks at key objects too."""
    document = build(source)
    images(document)[0].ReferencedSOPInstanceUID = "2.25.77"

    errors = [one.text for one in check(encode(document)) if one.severity is Severity.ERROR]

    assert "1 referenced instances are not listed as evidence" in errors


def test_nothing_shown_is_nothing_to_select(source: SourceStudy) -> None:
    """An empty selection says nothing."""
    output = output_for(source)
    hidden = tuple(one.model_copy(update={"state": SourceState.SAMPLED_OUT}) for one in output.retention.sources)
    output = output.model_copy(update={"retention": output.retention.model_copy(update={"sources": hidden})})

    with pytest.raises(ValueError, match="nothing to select"):
        build_key_objects(output, source, ReportSettings(), run=RUN)
