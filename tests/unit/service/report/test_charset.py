"""Results for destinations that take no UTF-8."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from service.report.charset import DoesNotFit, fits, recoded
from service.report.encoding import encode
from service.report.gate import Severity, check
from service.report.source import read_source
from service.report.structured_report import build_sr
from service.shared.settings import ReportSettings, SrSopClass
from tests.report_samples import RUN, ct_header, output_for, write

JAPANESE = "Yamada^Tarou=山田^太郎=やまだ^たろう"


def report(folder: Path, name: str, findings: str = "Clear.") -> Dataset:
    source = read_source(write(folder, [ct_header(PatientName=name)]))
    output = output_for(source, findings=findings)
    return build_sr(output, source, ReportSettings(), SrSopClass.ENHANCED, run=RUN)


CASES = [
    ("ISO_IR 100", "Müller^Jörg", "Größe 3 µm"),
    ("ISO_IR 101", "Wałęsa^Lech", "Guz"),
    ("ISO_IR 126", "Διονυσιος", "μ"),
    ("ISO_IR 144", "Люксембург", "Очаг"),
    ("ISO_IR 138", "שרון^דבורה", "Clear."),
    ("ISO_IR 166", "สมชาย", "Clear."),
    ("\\ISO 2022 IR 87", JAPANESE, "結節なし"),
    ("\\ISO 2022 IR 149", "Hong^Gildong=洪^吉洞=홍^길동", "결절 없음"),
    ("GB18030", "Wang^XiaoDong=王^小东", "无结节"),
]


@pytest.mark.parametrize(("charset", "name", "findings"), CASES, ids=[case[0] for case in CASES])
def test_text_that_fits_arrives_intact(tmp_path: Path, charset: str, name: str, findings: str) -> None:
    """In the set of the destination, read by another reader, without an error of any checker."""
    content = encode(recoded(report(tmp_path, name, findings), charset, "SR"))

    read = dcmread(BytesIO(content))
    assert str(read.PatientName) == name
    assert findings in [item.TextValue for item in read.ContentSequence[-1].ContentSequence]
    found = [str(one) for one in check(content, charset=charset) if one.severity is Severity.ERROR]
    assert found == []


@pytest.mark.parametrize(
    ("charset", "name"), [("ISO_IR 100", JAPANESE), ("ISO_IR 6", "Müller"), ("ISO_IR 144", "Müller")]
)
def test_text_that_does_not_fit_is_refused_by_keyword(tmp_path: Path, charset: str, name: str) -> None:
    """Never a `?`, and never the name in the message."""
    with pytest.raises(DoesNotFit, match=r"^does not fit ISO_IR \d+: PatientName$"):
        recoded(report(tmp_path, name), charset, "SR")


def test_the_models_text_counts_too(tmp_path: Path) -> None:
    """A typographic quotation mark is enough."""
    with pytest.raises(DoesNotFit, match="TextValue"):
        recoded(report(tmp_path, "Test^Case", "So-called “clear” lungs"), "ISO_IR 100", "SR")


def test_another_set_is_another_object(tmp_path: Path) -> None:
    """Other bytes, another UID; the original is left as it was."""
    original = report(tmp_path, "Müller")

    other = recoded(original, "ISO_IR 100", "SR")

    assert other.SOPInstanceUID != original.SOPInstanceUID
    assert original.SpecificCharacterSet == "ISO_IR 192"


def test_an_unknown_set_is_named(tmp_path: Path) -> None:
    """A wrong setting is refused as such."""
    with pytest.raises(ValueError, match="charset 'latin1' is no value of Specific Character Set"):
        recoded(report(tmp_path, "Test"), "latin1", "SR")


def test_ascii_fits_everywhere() -> None:
    """Whatever the set."""
    assert fits("Test^Case", "PN", ["ISO_IR 6"])
