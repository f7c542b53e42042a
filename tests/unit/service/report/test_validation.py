"""The gate over a folder."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from service.report.encoding import encode
from service.report.gate import Severity
from service.report.source import read_source
from service.report.structured_report import build_sr
from service.report.validation import passed, table, validate_folder
from service.shared.settings import ReportSettings, SrSopClass
from tests.report_samples import HEAD, RUN, ct_header, output_for, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A report of ours, a broken one, an image of a scanner, a text file."""
    (tmp_path / "source").mkdir()
    source = read_source(write(tmp_path / "source", [ct_header(1)]))
    report = build_sr(output_for(source), source, ReportSettings(), SrSopClass.COMPREHENSIVE_3D, run=RUN)
    results = tmp_path / "results"
    (results / "images").mkdir(parents=True)
    (results / "good.dcm").write_bytes(encode(report))
    report.VerificationFlag = "VERIFIED"
    (results / "bad.dcm").write_bytes(encode(report))
    (results / "images" / "ct.dcm").write_bytes((HEAD / "001.dcm").read_bytes())
    (results / "notes.txt").write_text("not DICOM")
    return results


def test_every_file_gets_its_verdict(folder: Path) -> None:
    """Ours by our own assertions too, others by dciodvfy, the rest by name."""
    found = {str(one.path): one for one in validate_folder(folder)}

    assert list(found) == ["bad.dcm", "good.dcm", "images/ct.dcm", "notes.txt"]
    assert found["good.dcm"].count(Severity.ERROR) == 0
    assert found["bad.dcm"].count(Severity.ERROR) >= 1
    assert found["images/ct.dcm"].kind == "CT Image Storage"
    assert not found["notes.txt"].is_dicom


def test_an_error_anywhere_fails_the_folder(folder: Path) -> None:
    """The exit status of `validate` follows."""
    assert not passed(validate_folder(folder))
    assert passed(validate_folder(folder / "good.dcm"))


def test_the_table_tells_findings_without_the_allowed_ones(folder: Path) -> None:
    """And never a value of the patient."""
    console = Console(file=StringIO(), width=200)

    console.print(table(validate_folder(folder)))

    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "VerificationFlag is not UNVERIFIED" in text
    assert "Device UID" not in text
    assert "Test^Case" not in text


def test_allowed_findings_are_told_on_request(folder: Path) -> None:
    """So that the allow-list can be looked at."""
    console = Console(file=StringIO(), width=200)

    console.print(table(validate_folder(folder / "good.dcm"), show_allowed=True))

    assert "Device UID" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_file_that_stops_half_way_is_an_error(tmp_path: Path) -> None:
    """Part 10 by its prefix, broken inside."""
    (tmp_path / "cut.dcm").write_bytes((HEAD / "001.dcm").read_bytes()[:300])

    (one,) = validate_folder(tmp_path)

    assert one.is_dicom
    assert one.count(Severity.ERROR) >= 1
