"""The Basic Text SR: the same words in a form that any PACS shows."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from service.report.encoding import encode
from service.report.gate import check, passes
from service.report.readable import readable, walk
from service.report.source import SourceStudy, read_source
from service.report.structured_report import build_sr
from service.report.text_report import build_text_report
from service.shared.messages import Flag
from service.shared.settings import ReportSettings, SrSopClass
from tests.report_samples import RUN, ct_header, output_for, write

SETTINGS = ReportSettings()


@pytest.fixture
def source(tmp_path: Path) -> SourceStudy:
    """Four CT slices."""
    return read_source(write(tmp_path, [ct_header(number) for number in range(1, 5)]))


def build(source: SourceStudy, flags: list[Flag] | None = None) -> Dataset:
    report = build_text_report(output_for(source, flags=flags or []), source, SETTINGS, run=RUN)
    return dcmread(BytesIO(encode(report)))


def texts(document: Dataset) -> list[str]:
    return [item.TextValue for item in walk(document) if item.get("ValueType") == "TEXT"]


def test_the_impression_stands_first_and_says_that_it_is_unverified(source: SourceStudy) -> None:
    """Before anything else of the report."""
    document = build(source, [Flag.RANDOM_WEIGHTS])

    sections = [item for item in document.ContentSequence if item.ValueType == "CONTAINER"]
    assert sections[0].ConceptNameCodeSequence[0].CodeMeaning == "Impressions"
    (impression,) = sections[0].ContentSequence
    assert impression.TextValue.startswith(
        "UNVERIFIED machine output, not for diagnosis. RANDOM WEIGHTS: the text is noise."
    )


def test_every_word_of_the_full_report_is_there(source: SourceStudy) -> None:
    """What the full report says in texts, this one says too, all flags of an analysis included."""
    flags = [flag for flag in Flag if flag is not Flag.NOT_ANALYSED]
    full = build_sr(output_for(source, flags=flags), source, SETTINGS, SrSopClass.COMPREHENSIVE_3D, run=RUN)

    said = "\n".join(texts(build(source, flags)))
    narrative = [item for item in full.ContentSequence if item.ValueType == "CONTAINER"][-1]
    assert all(item.TextValue in said for item in narrative.ContentSequence)
    assert "pruning.tau=0.9" in said


def test_it_holds_text_and_codes_only(source: SourceStudy) -> None:
    """A viewer of Basic Text knows no measurements."""
    types = {item.ValueType for item in walk(build(source))}

    assert types == {"CONTAINER", "CODE", "UIDREF", "TEXT"}


def test_it_passes_the_gate(source: SourceStudy) -> None:
    """Evidence included."""
    assert passes(check(encode(build(source)), evidence=[one.sop_instance_uid for one in source.instances]))


def test_it_has_its_own_uid(source: SourceStudy) -> None:
    """Another class is another object."""
    full = build_sr(output_for(source), source, SETTINGS, SrSopClass.ENHANCED, run=RUN)

    assert build(source).SOPInstanceUID != full.SOPInstanceUID


def test_it_is_readable(source: SourceStudy) -> None:
    """`show` prints it like any other report."""
    text = readable(build(source))

    assert text.index("UNVERIFIED machine output") < text.index("The lungs are clear.")
