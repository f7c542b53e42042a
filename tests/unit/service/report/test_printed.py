"""The printed report: every script is shown or named, the same input gives the same bytes."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from service.report.printed import RGB, print_report
from service.report.refusal import refused_output
from service.report.source import SourceStudy, read_source
from service.report.typeface import fonts, markup
from service.shared.messages import Flag, RegionCoverage
from service.shared.settings import ReportSettings
from tests.report_samples import RUN, ct_header, output_for, write


def source_of(folder: Path, name: str) -> SourceStudy:
    return read_source(write(folder, [ct_header(number, PatientName=name) for number in (1, 2)]))


def printed(source: SourceStudy, pictures: Mapping[str, RGB] | None = None) -> bytes:
    output = output_for(source, flags=[Flag.DEMONSTRATION_WEIGHTS], limitations=("Calcification is not learned.",))
    coverage = (RegionCoverage(region="lung", tokens_total=8, tokens_kept=2),)
    output = output.model_copy(update={"retention": output.retention.model_copy(update={"coverage": coverage})})
    return print_report(output, source, ReportSettings(), pictures or {}, unlisted=0, run=RUN)


def text_of(content: bytes) -> str:
    """As another program reads it."""
    run = subprocess.run(["pdftotext", "-layout", "-", "-"], input=content, capture_output=True, check=True)
    return run.stdout.decode()


def pages_of(content: bytes) -> int:
    run = subprocess.run(["pdfinfo", "-"], input=content, capture_output=True, check=True)
    return int(run.stdout.decode().split("Pages:")[1].split()[0])


def test_impression_stands_first_and_begins_with_the_warning(tmp_path: Path) -> None:
    """Then findings, the limits of the model, coverage and settings; the banner is on the page."""
    said = text_of(printed(source_of(tmp_path, "Test^Case")))

    places = [
        said.index(part)
        for part in (
            "UNVERIFIED machine output, not for diagnosis\n",
            "Impression\n",
            "UNVERIFIED machine output, not for diagnosis. DEMONSTRATION MODEL",
            "No acute finding.",
            "Findings\n",
            "The lungs are clear.",
            "Calcification is not learned.",
            "The model was shown 1 of 2 slices",
            "Coverage by region",
            "25%",
            "Settings of the pruning",
        )
    ]
    assert places == sorted(places)


def test_a_refusal_is_printed_without_what_no_model_was_given(tmp_path: Path) -> None:
    """The reason, and no heading with nothing under it."""
    source = source_of(tmp_path, "Test^Case")
    output = refused_output(source, analysis_id=7, modality="CT", reason="no axial series", software_version="0.1.0")

    said = text_of(print_report(output, source, ReportSettings(), {}, unlisted=0, run=RUN))

    assert "This study could not be analysed: no axial series" in said
    assert "Refused by" in said
    assert [heading for heading in ("Read by", "What was read", "Settings", "What the model") if heading in said] == []


def test_every_page_says_how_many_there_are(tmp_path: Path) -> None:
    """So that a lost one is missed; whose report it is stands on each."""
    pictures = {f"Slice {number}": np.full((64, 64, 3), number, np.uint8) for number in range(12)}

    content = printed(source_of(tmp_path, "Test^Case"), pictures)

    pages = text_of(content).split("\f")[:-1]
    assert len(pages) == pages_of(content) > 1
    assert [f"page {number} of {len(pages)}" in page for number, page in enumerate(pages, 1)] == [True] * len(pages)
    assert all("Test Case" in page for page in pages)


def test_a_long_name_at_the_foot_stays_on_the_page(tmp_path: Path) -> None:
    """Four lines below the rule, every character of them."""
    name = f"{'W' * 30}^{'M' * 30}={'山' * 16}^{'太' * 16}={'や' * 16}^{'た' * 16}"
    source = read_source(write(tmp_path, [ct_header(PatientName=name, PatientID="X" * 64)]))

    content = printed(source)

    assert text_of(content).replace("\n", "").replace(" ", "").count("た" * 16) == 1 + pages_of(content)


NAMES = [
    "Buc^Jérôme",
    "Wałęsa^Lech",
    "Διονυσιος",
    "Люкceмбypг",
    "Öztürk^Işıl",
    "山田^太郎",
    "홍^길동",
    "王^小东",
    "สมชาย^ใจดี",
]


@pytest.mark.parametrize("name", NAMES)
def test_name_of_any_script_is_printed(tmp_path: Path, name: str) -> None:
    """Read back by another program, component by component."""
    assert {"Sans", "SansBold", "Asian", "Thai"} <= set(fonts())  # Debian's font packages, which `./run test` installs

    said = text_of(printed(source_of(tmp_path, name)))

    assert name.replace("^", " ") in said
    assert "?" not in said


@pytest.mark.parametrize("name", ["قباني", "שרון"])
def test_right_to_left_is_turned_round_for_paper(name: str) -> None:
    """As it is read, Arabic letters joined; digits keep their order."""
    shown = markup(f"{name} 12")

    assert shown.endswith(" 12")
    assert shown != f"{name} 12"
    if name == "שרון":
        assert shown == "ןורש 12"


def test_character_without_a_glyph_is_named_by_its_code_point(tmp_path: Path) -> None:
    """Never a `?` and never an empty box."""
    said = text_of(printed(source_of(tmp_path, "अनिल^Kumar")))

    assert "[U+0905][U+0928][U+093F][U+0932] Kumar" in said
    assert "?" not in said


def test_markup_of_the_model_is_text(tmp_path: Path) -> None:
    """A `<` or `&` is what it is."""
    assert markup("5 < 6 & <b>") == "5 &lt; 6 &amp; &lt;b&gt;"


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    """Pictures included."""
    source = source_of(tmp_path, "Test^Case")
    pictures = {"Slice 1": np.full((64, 64, 3), 90, np.uint8)}

    assert printed(source, pictures) == printed(source, pictures)
    assert printed(source, pictures) != printed(source, {"Slice 1": np.full((64, 64, 3), 91, np.uint8)})
