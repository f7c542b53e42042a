"""Our objects against tools that others wrote: dciodvfy, PixelMed's template validator, dcmtk, on real sources."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from highdicom.sr import srread
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import (
    EncapsulatedPDFStorage,
    ExplicitVRLittleEndian,
    KeyObjectSelectionDocumentStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    ParametricMapStorage,
    RLELossless,
    SegmentationStorage,
)

from service.report.coverage import Cover, cover
from service.report.encapsulated import build_pdf, key_places
from service.report.encoding import encode, transcoded
from service.report.gate import Severity, check
from service.report.identity import PriorDocument, RelatedObject, RunIdentity
from service.report.key_objects import build_key_objects
from service.report.parametric_map import build_parametric_map
from service.report.pixels import DecodedOnce, PixelLimits, SourceFrame, read_frames
from service.report.planes import Unplaced
from service.report.refusal import refused_output
from service.report.retention_map import TRANSFER_SYNTAX, build_secondary_capture, wanted_frames
from service.report.segmentation import build_segmentation
from service.report.source import SourceStudy, read_source
from service.report.structured_report import SOP_CLASSES, build_sr
from service.report.text_report import build_text_report
from service.shared.messages import Flag
from service.shared.settings import Companion, ReportSettings, SrSopClass
from tests.report_samples import ANSWERS, BODY, HEAD, RUN, arrays_of, ct_header, output_for, write

pytestmark = pytest.mark.validators

PIXELMED = Path("/usr/share/java/pixelmed.jar")
# The templates hold more operators in one XPath than OpenJDK 17 allows by itself
JAVA = [
    "java", "-Xmx1500m", "-Djdk.xml.xpathExprGrpLimit=0", "-Djdk.xml.xpathExprOpLimit=0",
    "-Djdk.xml.xpathTotalOpLimit=0", "-cp", str(PIXELMED), "com.pixelmed.validate.DicomSRValidator",
]  # fmt: skip
# What PixelMed's rules of 2022 do not know yet, or what an extensible template leaves to us
PIXELMED_WARNINGS = re.compile(
    r"Warning: .*Measurement Group.*/(CODE|IMAGE|COMPOSITE) \((MP-\d+,99MEDPRUNER|121052,DCM),"
    r".*Content Item not in template"
)
RELATED = tuple(
    RelatedObject(companion, uid, f"2.25.60{number}", f"2.25.61{number}")
    for number, (companion, uid) in enumerate(
        {
            Companion.SC: MultiFrameTrueColorSecondaryCaptureImageStorage,
            Companion.SEG: SegmentationStorage,
            Companion.PM: ParametricMapStorage,
            Companion.PDF: EncapsulatedPDFStorage,
            Companion.KOS: KeyObjectSelectionDocumentStorage,
        }.items()
    )
)

FLAGS: dict[str, Sequence[Flag]] = {flag.value: [flag] for flag in Flag} | {"none": [], "all": list(Flag)}


def content_of(
    source: SourceStudy,
    flags: Sequence[Flag] = (),
    sop_class: SrSopClass = SrSopClass.COMPREHENSIVE_3D,
    run: RunIdentity = RUN,
) -> bytes:
    """A report on `source`, with a limit of its model and companions that it refers to."""
    settings = ReportSettings(institution="Sankt-Elisabeth-Klinik für Radiologie")
    output = output_for(source, flags=flags, limitations=("Nodules below 8 mm are missed.",))
    return encode(build_sr(output, source, settings, sop_class, run=run, related=RELATED))


def coded_content_of(source: SourceStudy, sop_class: SrSopClass = SrSopClass.COMPREHENSIVE_3D) -> bytes:
    """A report with coded findings, present and absent."""
    output = output_for(source, answers=ANSWERS)
    return encode(build_sr(output, source, ReportSettings(), sop_class, run=RUN, related=RELATED))


def refusal_of(source: SourceStudy, sop_class: SrSopClass) -> bytes:
    """A report of a study that could not be analysed, built as the report step builds it."""
    output = refused_output(
        source, analysis_id=7, modality="CT", reason="no axial series of 8 slices or more", software_version="0.1.0"
    )
    if sop_class is SrSopClass.BASIC_TEXT:
        return encode(build_text_report(output, source, ReportSettings(), run=RUN))
    return encode(build_sr(output, source, ReportSettings(), sop_class, run=RUN))


def revision_of(source: SourceStudy, sop_class: SrSopClass) -> bytes:
    """A report that follows an earlier one."""
    earlier = PriorDocument("1.2.840.10008.5.1.4.1.1.88.34", "2.25.501", "2.25.500", source.study_uid)
    run = RunIdentity(RUN.analysis_key, RUN.content_time, "0.1.0", predecessors=(earlier,), revision_note="Later.")
    return content_of(source, sop_class=sop_class, run=run)


OF_A_READING = [flag for flag in Flag if flag is not Flag.NOT_ANALYSED]
# Every kind of report under TID 1500
VARIANTS: dict[str, Callable[[SourceStudy, SrSopClass], bytes]] = {
    "plain, with companions": lambda source, sop_class: content_of(source, sop_class=sop_class),
    "every flag": lambda source, sop_class: content_of(source, OF_A_READING, sop_class),
    "coded findings": coded_content_of,
    "revision": revision_of,
    "refusal": refusal_of,
}
VARIANTS |= {
    flag.value: lambda source, sop_class, flag=flag: content_of(source, [flag], sop_class)  # type: ignore[misc]
    for flag in OF_A_READING
}
# Each of them in the class that is the default, the fullest one in the others too
every_variant = pytest.mark.parametrize(
    ("build", "sop_class"),
    [
        *(pytest.param(build, SrSopClass.COMPREHENSIVE_3D, id=name) for name, build in VARIANTS.items()),
        *(
            pytest.param(VARIANTS["every flag"], sop_class, id=sop_class.value)
            for sop_class in (SrSopClass.COMPREHENSIVE, SrSopClass.ENHANCED)
        ),
    ],
)


def unexpected(content: bytes, source: SourceStudy) -> list[str]:
    """Everything that the gate found and that the allow-list does not hold."""
    evidence = [one.sop_instance_uid for one in (*source.instances, *RELATED)]
    findings = check(content, evidence=evidence, verbatim=source.uids)
    return [str(one) for one in findings if one.severity is not Severity.ALLOWED]


@pytest.fixture(scope="module")
def body() -> SourceStudy:
    """A real body CT, with an order."""
    return read_source(BODY.glob("*.dcm"))


@pytest.mark.parametrize("sop_class", list(SOP_CLASSES))
def test_coded_findings_pass_the_gate(body: SourceStudy, sop_class: SrSopClass) -> None:
    assert unexpected(coded_content_of(body, sop_class), body) == []


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("sop_class", list(SOP_CLASSES))
def test_every_variant_passes_the_gate(body: SourceStudy, sop_class: SrSopClass, flags: Sequence[Flag]) -> None:
    """No error and no warning but the allowed ones, for each SOP class and flag."""
    assert unexpected(content_of(body, flags, sop_class), body) == []


def test_a_revision_passes_the_gate(body: SourceStudy) -> None:
    """With predecessor documents."""
    earlier = PriorDocument("1.2.840.10008.5.1.4.1.1.88.34", "2.25.501", "2.25.500", body.study_uid)
    run = RunIdentity(RUN.analysis_key, RUN.content_time, "0.1.0", predecessors=(earlier,), revision_note="Later.")

    assert unexpected(content_of(body, run=run), body) == []


def series_of_pydicom() -> dict[str, list[Path]]:
    """Small CT and MR series that come with pydicom."""
    root = Path(str(get_testdata_file("DICOMDIR", download=False))).parent
    folders = {"CT5N": "98892001/CT5N", "CT2": "77654033/CT2", "MR700": "98892003/MR700"}
    return {name: sorted((root / folder).iterdir()) for name, folder in folders.items()}


@pytest.mark.parametrize("paths", [pytest.param(paths, id=name) for name, paths in series_of_pydicom().items()])
def test_reports_on_other_peoples_series_pass_the_gate(paths: list[Path]) -> None:
    """Headers as they are found."""
    source = read_source(paths)

    assert unexpected(content_of(source), source) == []


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm"])
def test_reports_on_single_images_pass_the_gate(name: str) -> None:
    """Implicit, big-endian, deflated, hardly any header."""
    source = read_source([Path(str(get_testdata_file(name, download=False)))])

    assert unexpected(content_of(source), source) == []


BROKEN = {
    "absent": dict.fromkeys(
        ("PatientName", "PatientID", "PatientSex", "PatientBirthDate", "StudyDate", "StudyTime", "StudyID")
    ),
    "long": {"PatientID": "x" * 70, "AccessionNumber": "a" * 20, "StudyDescription": "d" * 90},
    "wrong": {"PatientSex": "X", "PatientBirthDate": "00000000", "StudyTime": "99:99", "PatientAge": "12"},
    "uids": {"StudyInstanceUID": "1.2.03.4", "SeriesInstanceUID": "1.2.004", "FrameOfReferenceUID": "none"},
    "names": {"PatientName": "A^B^C^D^E^F^G", "ReferringPhysicianName": "x" * 80},
}


@pytest.mark.hostile
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attributes", BROKEN.values(), ids=BROKEN)
def test_a_fault_of_the_source_stops_no_report(tmp_path: Path, attributes: dict[str, str | None]) -> None:
    """Reports on broken headers, and whatever goes beside them, leave without any error of ours."""
    source = read_source(write(tmp_path, [ct_header(number, **attributes) for number in (1, 2)]))

    findings = [
        str(finding)
        for content in (content_of(source), refusal_of(source, SrSopClass.BASIC_TEXT), *companions_of(source))
        for finding in check(content, verbatim=source.uids)
        if finding.severity in (Severity.ERROR, Severity.WARNING)
    ]

    assert findings == []
    assert source.repairs


def companions_of(source: SourceStudy) -> Iterator[bytes]:
    """Those that can be built, of small grey slices."""
    output = output_for(source)
    arrays = arrays_of(output.retention.inputs, (4, 4))
    grey, axial = np.full((128, 128), 90, np.uint8), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    frames = [
        SourceFrame(one.sop_instance_uid, None, grey, (0.0, 0.0, 3.0 * place), axial, (4.0, 4.0))
        for place, one in enumerate(source.instances)
    ]
    settings = ReportSettings()
    yield encode(build_secondary_capture(output, arrays, source, frames, settings, run=RUN), TRANSFER_SYNTAX)
    yield encode(build_pdf(output, arrays, source, dict(enumerate(frames)), settings, run=RUN))
    yield encode(build_key_objects(output, source, settings, run=RUN))
    with contextlib.suppress(Unplaced):  # the source has no valid frame of reference
        yield encode(build_segmentation(output, arrays, source, frames, grey.shape, settings, run=RUN))
        yield encode(build_parametric_map(output, arrays, source, frames, settings, run=RUN))


NAMES = {
    "latin": (["ISO_IR 100"], "Buc^Jérôme"),
    "polish": (["ISO_IR 101"], "Wałęsa^Lech"),
    "greek": (["ISO_IR 126"], "Διονυσιος"),
    "arabic": (["ISO_IR 127"], "قباني^لنزار"),
    "hebrew": (["ISO_IR 138"], "שרון^דבורה"),
    "cyrillic": (["ISO_IR 144"], "Люкceмбypг"),
    "turkish": (["ISO_IR 148"], "Öztürk^Işıl"),
    "thai": (["ISO_IR 166"], "สมชาย^ใจดี"),
    "japanese": (["ISO 2022 IR 13", "ISO 2022 IR 87"], "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう"),
    "korean": (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    "chinese": (["GB18030"], "Wang^XiaoDong=王^小东"),
    "utf-8": (["ISO_IR 192"], "Wang^XiaoDong=王^小東"),
}


@pytest.mark.parametrize(("charset", "name"), NAMES.values(), ids=NAMES)
def test_names_arrive_at_another_reader(tmp_path: Path, charset: list[str], name: str) -> None:
    """dcmtk reads the name in UTF-8, and dciodvfy finds nothing."""
    source = read_source(write(tmp_path, [ct_header(SpecificCharacterSet=charset, PatientName=name)]))
    path = tmp_path / "report.dcm"
    path.write_bytes(content_of(source))

    dump = subprocess.run(["dcmdump", "+P", "0010,0010", path], capture_output=True, check=True)

    assert f"[{name}]" in dump.stdout.decode("utf-8")
    assert unexpected(path.read_bytes(), source) == []


def dumped(content: bytes, folder: Path) -> str:
    """What dcmtk shows of a document, without a warning of its own."""
    path = folder / "report.dcm"
    path.write_bytes(content)
    dump = subprocess.run(["dsrdump", "+Pl", path], capture_output=True, check=True, text=True)
    of_dcmtk = ("ISO_IR 192", "template constraints not yet supported")  # what it cannot do itself
    assert [line for line in dump.stderr.splitlines() if not any(part in line for part in of_dcmtk)] == []
    return dump.stdout


@every_variant
def test_dsrdump_reads_the_whole_document(
    body: SourceStudy, tmp_path: Path, build: Callable[[SourceStudy, SrSopClass], bytes], sop_class: SrSopClass
) -> None:
    """dcmtk parses the tree of every variant, and shows the impression."""
    assert "UNVERIFIED machine output, not for diagnosis." in dumped(build(body, sop_class), tmp_path)


def test_dsrdump_reads_what_highdicom_does_not(body: SourceStudy, tmp_path: Path) -> None:
    """Basic Text SR, of a study and of a refusal, and Key Object Selection."""
    output = output_for(body, flags=list(Flag))
    text = encode(build_text_report(output, body, ReportSettings(), run=RUN, related=RELATED))
    selection = encode(build_key_objects(output_for(body), body, ReportSettings(), run=RUN))

    assert "RANDOM WEIGHTS" in dumped(text, tmp_path)
    assert "could not be analysed" in dumped(refusal_of(body, SrSopClass.BASIC_TEXT), tmp_path)
    assert "UNVERIFIED machine output, not for diagnosis." in dumped(selection, tmp_path)


@every_variant
def test_highdicom_reads_back_what_was_written(
    body: SourceStudy, build: Callable[[SourceStudy, SrSopClass], bytes], sop_class: SrSopClass
) -> None:
    """srread: the class, groups with their tracking and algorithm, evidence; and writing it again changes no item."""
    content = build(body, sop_class)

    report = srread(BytesIO(content))

    plain = dcmread(BytesIO(content))
    assert report.SOPClassUID == SOP_CLASSES[sop_class]
    groups = [*report.content.get_image_measurement_groups()]
    assert {group.tracking_identifier for group in groups} >= {"Model input"}
    assert all(group.tracking_uid for group in groups)
    listed = {str(uid) for _, _, uid, _ in report.get_evidence()}
    assert listed >= {one.sop_instance_uid for one in body.instances}
    written = BytesIO()
    report.save_as(written, enforce_file_format=True)
    assert dcmread(BytesIO(written.getvalue())).ContentSequence == plain.ContentSequence


def pixelmed(path: Path) -> tuple[list[str], str]:
    """Errors and unexpected warnings of PixelMed's validator, and all it said; its exit status is always 0."""
    if not PIXELMED.exists() or shutil.which("java") is None:
        pytest.fail("PixelMed's validator is not installed: apt-get install libpixelmed-java default-jre-headless")
    run = subprocess.run([*JAVA, str(path)], capture_output=True, text=True, check=False, timeout=300)
    said = run.stdout + run.stderr
    lines = said.splitlines()
    complaints = [line for line in lines if line.startswith(("Error", "Warning")) and not PIXELMED_WARNINGS.match(line)]
    return complaints, said


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("sop_class", list(SOP_CLASSES))
def test_the_template_is_valid_for_pixelmed(body: SourceStudy, tmp_path: Path, sop_class: SrSopClass) -> None:
    """TID 1500 in each SOP class, with every flag, coded findings, companions and a predecessor."""
    earlier = PriorDocument("1.2.840.10008.5.1.4.1.1.88.34", "2.25.501", "2.25.500", body.study_uid)
    run = RunIdentity(RUN.analysis_key, RUN.content_time, "0.1.0", predecessors=(earlier,), revision_note="Later.")
    path = tmp_path / "report.dcm"
    output = output_for(body, flags=list(Flag), answers=ANSWERS)
    path.write_bytes(encode(build_sr(output, body, ReportSettings(), sop_class, run=run, related=RELATED)))

    complaints, said = pixelmed(path)

    assert complaints == []
    assert "Found Root Template TID_1500" in said
    assert "IOD validation complete" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_template_of_a_refusal_is_valid_for_pixelmed(body: SourceStudy, tmp_path: Path) -> None:
    """A study that could not be analysed: no model, no counts, no image that the model was shown."""
    path = tmp_path / "report.dcm"
    path.write_bytes(refusal_of(body, SrSopClass.COMPREHENSIVE_3D))

    complaints, said = pixelmed(path)

    assert complaints == []
    assert "Found Root Template TID_1500" in said
    assert "IOD validation complete" in said


@pytest.mark.parametrize("sop_class", list(SrSopClass))
def test_the_report_of_a_refusal_passes_the_gate(body: SourceStudy, sop_class: SrSopClass) -> None:
    """In every class."""
    findings = check(refusal_of(body, sop_class), evidence=[one.sop_instance_uid for one in body.instances])

    assert [str(one) for one in findings if one.severity is not Severity.ALLOWED] == []


@pytest.mark.parametrize("flags", [[], list(Flag)], ids=["none", "all"])
def test_a_text_report_passes_the_gate(body: SourceStudy, flags: Sequence[Flag]) -> None:
    """Basic Text SR on a real study."""
    output = output_for(body, flags=flags, limitations=("Nodules below 8 mm are missed.",))
    content = encode(build_text_report(output, body, ReportSettings(), run=RUN, related=RELATED))

    assert unexpected(content, body) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("refused", [False, True], ids=["read", "refused"])
def test_the_text_report_is_valid_for_pixelmed(body: SourceStudy, tmp_path: Path, refused: bool) -> None:
    """TID 2000; its rules of 2022 know the sections by their older codes, and say so without an error."""
    path = tmp_path / "report.dcm"
    text = build_text_report(output_for(body), body, ReportSettings(), run=RUN, related=RELATED)
    path.write_bytes(refusal_of(body, SrSopClass.BASIC_TEXT) if refused else encode(text))

    complaints, said = pixelmed(path)

    assert [line for line in complaints if "Content Item not in template" not in line] == []
    assert "Found Root Template TID_2000" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_template_of_key_objects_is_valid_for_pixelmed(body: SourceStudy, tmp_path: Path) -> None:
    """TID 2010."""
    path = tmp_path / "selection.dcm"
    path.write_bytes(encode(build_key_objects(output_for(body), body, ReportSettings(), run=RUN)))

    complaints, said = pixelmed(path)

    assert complaints == []
    assert "Found Root Template TID_2010" in said
    assert "IOD validation complete" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pixelmed_finds_what_is_wrong(body: SourceStudy, tmp_path: Path) -> None:
    """The check above can fail: a document without device observer UID is an error."""
    document: Dataset = build_sr(output_for(body), body, ReportSettings(), SrSopClass.COMPREHENSIVE_3D, run=RUN)
    kept = [item for item in document.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue != "121012"]
    del document[0x0040A730]
    document.add_new(0x0040A730, "SQ", kept)
    path = tmp_path / "report.dcm"
    path.write_bytes(encode(document))

    complaints, _ = pixelmed(path)

    assert any(line.startswith("Error") for line in complaints)


def test_the_head_study_of_another_maker_passes_the_gate() -> None:
    """Explicit VR, no request, no accession number."""
    source = read_source(HEAD.glob("*.dcm"))

    assert unexpected(content_of(source), source) == []
    assert dcmread(HEAD / "001.dcm", stop_before_pixels=True).StudyInstanceUID == source.study_uid


@every_variant
def test_dcmqi_reads_the_measurements(
    body: SourceStudy, tmp_path: Path, build: Callable[[SourceStudy, SrSopClass], bytes], sop_class: SrSopClass
) -> None:
    """tid1500reader finds the group, its counts and its parameters; its exit status says nothing."""
    reader = shutil.which("tid1500reader", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if reader is None:
        pytest.fail("tid1500reader is not installed: pip install dcmqi")
    path = tmp_path / "report.dcm"
    content = build(body, sop_class)
    path.write_bytes(content)

    subprocess.run(
        [reader, "--inputDICOM", path, "--outputMetadata", tmp_path / "read.json"], capture_output=True, check=True
    )

    group, *findings = json.loads((tmp_path / "read.json").read_text())["Measurements"]
    values = {one["quantity"]["CodeValue"]: one["value"] for one in group["measurementItems"]}
    (parameters,) = group["measurementAlgorithmIdentification"]["AlgorithmParameters"]
    assert group["TrackingIdentifier"] == "Model input"
    assert (values["MP-001"], "pruning.tau=0.9" in parameters) in (("20", True), ("0", False))
    assert 1 + len(findings) == len(srread(BytesIO(content)).content.get_image_measurement_groups())


@pytest.mark.parametrize("folder", [BODY, HEAD], ids=["body", "head"])
def test_the_key_objects_of_a_real_study_pass_the_gate(folder: Path) -> None:
    """Key Object Selection."""
    source = read_source(folder.glob("*.dcm"))

    content = encode(build_key_objects(output_for(source), source, ReportSettings(), run=RUN))

    assert [str(one) for one in check(content, verbatim=source.uids) if one.severity is not Severity.ALLOWED] == []


@pytest.mark.parametrize("folder", [BODY, HEAD], ids=["body", "head"])
def test_the_printed_report_of_a_real_study_passes_the_gate(folder: Path, tmp_path: Path) -> None:
    """Encapsulated PDF; poppler reads it, and every font with a glyph in it is inside."""
    source = read_source(folder.glob("*.dcm"))
    output = output_for(source, tokens=(16, 16), flags=list(Flag))
    wanted = wanted_frames(output, source)
    frames = DecodedOnce(wanted, PixelLimits(), keep=key_places(wanted)).kept

    document = build_pdf(
        output, arrays_of(output.retention.inputs, (16, 16)), source, frames, ReportSettings(), run=RUN
    )

    findings = check(encode(document), verbatim=source.uids)
    assert [str(one) for one in findings if one.severity is not Severity.ALLOWED] == []
    path = tmp_path / "report.pdf"
    path.write_bytes(document.EncapsulatedDocument)
    fonts = subprocess.run(["pdffonts", path], capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    assert [line for line in fonts if " yes yes yes " not in line and not line.startswith("Helvetica")] == []
    images = subprocess.run(["pdfimages", "-list", path], capture_output=True, text=True, check=True).stdout
    assert images.count(" jpeg ") == len(frames)


LONG = {"StudyDescription": "Грудная клетка с контрастированием, поздняя фаза", "AccessionNumber": "Снимок-2026/77"}


def test_a_text_that_is_long_in_bytes_alone_stops_no_report(tmp_path: Path) -> None:
    """dciodvfy counts bytes; the standard limits characters (PS3.5 6.2)."""
    source = read_source(write(tmp_path, [ct_header(SpecificCharacterSet="ISO_IR 144", **LONG)]))
    assert len(LONG["StudyDescription"]) <= 64 < len(LONG["StudyDescription"].encode())

    findings = check(content_of(source), verbatim=source.uids)

    assert [str(one) for one in findings if one.severity is not Severity.ALLOWED] == []


@pytest.mark.parametrize("folder", [BODY, HEAD], ids=["body", "head"])
def test_the_maps_of_a_real_study_pass_the_gate(folder: Path, tmp_path: Path) -> None:
    """Secondary Capture in each of its encodings, segmentation and parametric map."""
    source = read_source(folder.glob("*.dcm"))
    output = output_for(source, tokens=(16, 16))
    arrays = arrays_of(output.retention.inputs, (16, 16))
    frames = list(read_frames(wanted_frames(output, source), PixelLimits()))
    settings = ReportSettings()

    capture = encode(build_secondary_capture(output, arrays, source, frames, settings, run=RUN), TRANSFER_SYNTAX)
    mask = encode(build_segmentation(output, arrays, source, frames, (512, 512), settings, run=RUN))
    attention = encode(build_parametric_map(output, arrays, source, frames, settings, run=RUN))

    stored = tmp_path / "map.dcm"
    stored.write_bytes(capture)
    others = [encode(transcoded(stored, syntax), syntax) for syntax in (RLELossless, ExplicitVRLittleEndian)]
    for content in (capture, *others, mask, attention):
        findings = check(content, verbatim=source.uids)
        assert [str(one) for one in findings if one.severity is not Severity.ALLOWED] == []


def test_the_map_of_the_real_body_shows_what_the_mask_says() -> None:
    """Against the pixels: clear where a token was kept, dark red where none was, on the source's own grid."""
    source = read_source(BODY.glob("*.dcm"))
    output = output_for(source, tokens=(16, 16))
    arrays = arrays_of(output.retention.inputs, (16, 16))
    frames = list(read_frames(wanted_frames(output, source), PixelLimits()))

    capture = build_secondary_capture(output, arrays, source, frames, ReportSettings(), run=RUN)

    capture.file_meta.TransferSyntaxUID = TRANSFER_SYNTAX
    pictures = capture.pixel_array[:, 40:-40, 24:-24].astype(int)
    for one, frame, picture in zip(output.retention.sources, frames, pictures, strict=True):
        covers = cover(output.retention, arrays, one, (512, 512))[40:-40, 24:-24]
        assert frame.grey is not None
        grey = frame.grey[40:-40, 24:-24]
        kept = covers == Cover.KEPT
        np.testing.assert_array_equal(picture[kept], np.repeat(grey[kept][:, None], 3, axis=1))
        assert (picture[~kept][:, 1:] == 12).all()
        assert (picture[~kept][:, 0] >= 36).all()
