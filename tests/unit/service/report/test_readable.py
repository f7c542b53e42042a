"""An SR as plain text."""

from __future__ import annotations

from pathlib import Path

from pydicom.dataset import Dataset

from service.report.readable import readable
from service.report.source import read_source
from service.report.structured_report import build_sr
from service.shared.messages import Flag
from service.shared.settings import ReportSettings, SrSopClass
from tests.report_samples import RUN, ct_header, output_for, write


def report(folder: Path) -> Dataset:
    """A report on two slices."""
    source = read_source(write(folder, [ct_header(1), ct_header(2)]))
    output = output_for(source, flags=[Flag.RANDOM_WEIGHTS], findings="Line one.\nLine two.")
    return build_sr(output, source, ReportSettings(), SrSopClass.COMPREHENSIVE_3D, run=RUN)


def test_text_comes_before_tables(tmp_path: Path) -> None:
    """Header, findings, impression, comments, and only then the machine's numbers."""
    text = readable(report(tmp_path))

    order = ["IMAGING MEASUREMENT REPORT", "Test^Case (P-1)", "Finding:", "Impression:", "Comment:", "Slices in series"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_every_text_of_the_report_is_shown(tmp_path: Path) -> None:
    """Nothing of what the radiologist must know is left out."""
    text = readable(report(tmp_path))

    assert "  Line one.\n  Line two.\n" in text
    assert "  UNVERIFIED machine output, not for diagnosis. RANDOM WEIGHTS: the text is noise.\n  No acute" in text
    assert "Status        UNVERIFIED, PRELIMINARY, COMPLETE" in text


def test_numbers_have_units_and_images_are_counted(tmp_path: Path) -> None:
    """A table for people: meanings instead of codes, a count instead of UIDs."""
    text = readable(report(tmp_path))

    assert "Slices in series: 2 slices" in text
    assert "Fraction of visual tokens kept: 0.25\n" in text
    assert "Source of Measurement: 1 image\n" in text
    assert "Caution: Model with random weights" in text


def test_a_document_without_content_is_still_printed() -> None:
    """Any SR can be shown, however little it says."""
    assert readable(Dataset()).startswith("STRUCTURED REPORT")
