"""Headers of the analysed instances -> SourceStudy: what results copy, checked; and what was repaired.

Reads any source tolerantly, in its own character set. Knows nothing of pixels, reports or the database.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.charset import python_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import CTImageStorage, MRImageStorage

from service.report.attributes import Action, Charset, Repair, decoded, uid_is_valid, valid
from service.report.identity import derived_uid
from service.report.validation_mode import values_as_they_are

Checked = Mapping[str, "str | tuple[Checked, ...]"]


class SourceError(Exception):
    """The headers cannot carry a result; the message says why, without any value of them."""


@dataclass(frozen=True, slots=True)
class SourceInstance:
    """What a result must know to refer to one instance."""

    sop_class_uid: str
    sop_instance_uid: str
    series_uid: str
    path: Path


@dataclass(frozen=True, slots=True)
class SourceStudy:
    """One study as its results name it. Every value in here may be written as it stands, in UTF-8."""

    study_uid: str  # verbatim even when invalid: with another one a result would be filed elsewhere
    attributes: Checked  # patient and study; Type 2 always there
    equipment: Checked  # of the acquisition
    series: Checked  # of the analysed series, for images derived from it
    requests: tuple[Checked, ...]  # Request Attributes Sequence
    instances: tuple[SourceInstance, ...]  # in order of SOP Instance UID
    unreadable_headers: int
    repairs: tuple[Repair, ...]

    def instance(self, sop_instance_uid: str) -> SourceInstance | None:
        return next((one for one in self.instances if one.sop_instance_uid == sop_instance_uid), None)

    @property
    def uids(self) -> frozenset[str]:
        """Every identifier that results copy verbatim, for the gate."""
        series = {one.series_uid for one in self.instances}
        classes = {one.sop_class_uid for one in self.instances}
        frame_of_reference = self.series.get("FrameOfReferenceUID")
        places = {frame_of_reference} if isinstance(frame_of_reference, str) else set()
        instances = {one.sop_instance_uid for one in self.instances}
        return frozenset({self.study_uid} | series | classes | places | instances)


@dataclass(frozen=True, slots=True)
class _Rule:
    """How one attribute is copied: keyword, VR of PS3.6, Type in our objects, what else is asked of it."""

    keyword: str
    vr: str
    type: int = 3
    allowed: frozenset[str] | None = None
    many: bool = False  # value multiplicity 1-n
    items: tuple[_Rule, ...] = ()


_CODE = (
    _Rule("CodeValue", "SH", 1),
    _Rule("CodingSchemeDesignator", "SH", 1),
    _Rule("CodingSchemeVersion", "SH"),
    _Rule("CodeMeaning", "LO", 1),
)
_PATIENT_AND_STUDY = (
    _Rule("TimezoneOffsetFromUTC", "TZ"),
    _Rule("PatientName", "PN", 2),
    _Rule("PatientID", "LO", 2),
    _Rule("IssuerOfPatientID", "LO"),
    _Rule("PatientBirthDate", "DA", 2),
    _Rule("PatientBirthTime", "TM"),
    _Rule("PatientSex", "CS", 2, frozenset({"", "M", "F", "O"})),
    _Rule("PatientIdentityRemoved", "CS", 3, frozenset({"YES", "NO"})),
    _Rule("DeidentificationMethod", "LO"),
    _Rule("DeidentificationMethodCodeSequence", "SQ", 3, items=_CODE),
    _Rule("PatientAge", "AS"),
    _Rule("StudyDate", "DA", 2),
    _Rule("StudyTime", "TM", 2),
    _Rule("StudyID", "SH", 2),
    _Rule("AccessionNumber", "SH", 2),
    _Rule("ReferringPhysicianName", "PN", 2),
    _Rule("StudyDescription", "LO"),
)
_EQUIPMENT = (
    _Rule("Manufacturer", "LO"),
    _Rule("ManufacturerModelName", "LO"),
    _Rule("DeviceSerialNumber", "LO"),
    _Rule("SoftwareVersions", "LO", many=True),
    _Rule("InstitutionName", "LO"),
    _Rule("StationName", "SH"),
)
_SERIES = (
    _Rule("FrameOfReferenceUID", "UI"),
    _Rule("BodyPartExamined", "CS"),
    _Rule("Laterality", "CS", 3, frozenset({"L", "R"})),
    _Rule("SliceThickness", "DS"),
    _Rule("BurnedInAnnotation", "CS", 3, frozenset({"YES", "NO"})),
    _Rule("LossyImageCompression", "CS", 3, frozenset({"00", "01"})),
    _Rule("LossyImageCompressionRatio", "DS", many=True),
    _Rule("LossyImageCompressionMethod", "CS", many=True),
)
_REQUEST = (
    _Rule("StudyInstanceUID", "UI"),
    _Rule("AccessionNumber", "SH"),
    _Rule("RequestedProcedureID", "SH"),
    _Rule("RequestedProcedureDescription", "LO"),
    _Rule("RequestedProcedureCodeSequence", "SQ", 3, items=_CODE),
)
_IDENTITY = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality",
)  # fmt: skip
_WANTED = [
    "SpecificCharacterSet",
    "RequestAttributesSequence",
    *_IDENTITY,
    *(rule.keyword for rules in (_PATIENT_AND_STUDY, _EQUIPMENT, _SERIES) for rule in rules),
]
_NO_TEXT = b"?\\"  # of a sequence, for instance: two values, thus valid under no rule
_CLASS_OF_MODALITY = {"CT": CTImageStorage, "MR": MRImageStorage}
# What pydicom raises on bytes that are no DICOM, or stop being it half-way
MALFORMED = (
    InvalidDicomError, BytesLengthException, EOFError, ValueError, KeyError, AttributeError, NotImplementedError,
    struct.error,
)  # fmt: skip


def read_source(paths: Iterable[Path], *, default_charset: str = "ISO_IR 100") -> SourceStudy:
    """Read the headers of the instances of one series.

    The order of `paths` does not matter: patient and study are copied from the instance with the lowest UID.
    Raises SourceError when nothing can be read, or not exactly one study is named. OSError passes through.
    """
    if default_charset not in python_encoding:
        raise ValueError(f"default_charset {default_charset!r} is no defined term of Specific Character Set")
    with values_as_they_are():  # our own rules hold here, and pydicom's warnings quote values
        return _read(sorted(paths), default_charset)


def _read(paths: Sequence[Path], default_charset: str) -> SourceStudy:
    headers: list[tuple[SourceInstance, str, Dataset]] = []
    repairs: dict[Repair, None] = {}  # in order of discovery, each once
    unreadable = 0
    for path in paths:
        header = _header(path)
        identified = None if header is None else _identify(header, path, repairs)
        if header is None or identified is None:
            unreadable += 1
        else:
            headers.append((*identified, header))
    if not headers:
        raise SourceError(f"none of {unreadable} instances has a readable header with a SOP Instance UID")
    headers.sort(key=lambda one: one[0].sop_instance_uid)
    studies = {study_uid for _, study_uid, _ in headers}
    if len(studies) != 1 or "" in studies:
        raise SourceError(f"{len(studies)} Study Instance UIDs where exactly one, not empty, is needed")
    (study_uid,) = studies
    header = headers[0][2]
    charset = _charset(header, default_charset, repairs)
    attributes = _checked(header, _PATIENT_AND_STUDY, charset, repairs)
    return SourceStudy(
        study_uid=study_uid,
        attributes=_honest_about_identity(attributes, repairs),
        equipment=_checked(header, _EQUIPMENT, charset, repairs),
        series=_checked(header, _SERIES, charset, repairs),
        requests=_items(header, "RequestAttributesSequence", _REQUEST, charset, repairs) or (),
        instances=_each_once(instance for instance, _, _ in headers),
        unreadable_headers=unreadable,
        repairs=tuple(repairs),
    )


def _header(path: Path) -> Dataset | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they would quote values
        try:
            return dcmread(path, stop_before_pixels=True, specific_tags=_WANTED)
        except MALFORMED:
            return None
        except OSError as error:
            if error.errno is not None:
                raise  # of the disk; pydicom's own, about a data set that ends too early, has no number
            return None


def _each_once(instances: Iterable[SourceInstance]) -> tuple[SourceInstance, ...]:
    """Without second copies of an instance (same UID, other bytes: both are in the spool)."""
    return tuple({instance.sop_instance_uid: instance for instance in instances}.values())


def _identify(header: Dataset, path: Path, repairs: dict[Repair, None]) -> tuple[SourceInstance, str] | None:
    """The instance and its study's UID; what is missing is taken from the file's meta header or by rule."""
    uid = {keyword: _plain(header, keyword) for keyword in _IDENTITY}
    meta = getattr(header, "file_meta", Dataset())
    instance_uid = uid["SOPInstanceUID"] or _plain(meta, "MediaStorageSOPInstanceUID")
    class_uid = uid["SOPClassUID"] or _plain(meta, "MediaStorageSOPClassUID")
    class_uid = class_uid or _CLASS_OF_MODALITY.get(uid["Modality"], "")
    series_uid = uid["SeriesInstanceUID"] or derived_uid("series without a UID", uid["StudyInstanceUID"])
    if not instance_uid or not class_uid:
        return None
    used = {"SOPInstanceUID": instance_uid, "SOPClassUID": class_uid, "SeriesInstanceUID": series_uid}
    for keyword, value in (used | {"StudyInstanceUID": uid["StudyInstanceUID"]}).items():
        if value and not uid[keyword]:
            repairs[Repair(keyword, Action.SUPPLIED)] = None
        if not uid_is_valid(value):
            repairs[Repair(keyword, Action.KEPT_INVALID)] = None
    return SourceInstance(class_uid, instance_uid, series_uid, path), uid["StudyInstanceUID"]


def _charset(header: Dataset, default_charset: str, repairs: dict[Repair, None]) -> Charset:
    declared = _plain(header, "SpecificCharacterSet").split("\\")
    charset = Charset.of(declared, default_charset)
    if any(declared) and not charset.declared and declared not in (["ISO_IR 6"], ["ISO 2022 IR 6"]):
        repairs[Repair("SpecificCharacterSet", Action.ASSUMED)] = None
    return charset


def _checked(
    header: Dataset, rules: Sequence[_Rule], charset: Charset, repairs: dict[Repair, None]
) -> dict[str, str | tuple[Checked, ...]]:
    """Copy by rule. An item of a sequence that lacks a Type 1 attribute is the caller's to leave out."""
    checked: dict[str, str | tuple[Checked, ...]] = {}
    for rule in rules:
        if rule.items:
            items = _items(header, rule.keyword, rule.items, charset, repairs)
            if items:
                checked[rule.keyword] = items
            continue
        content = _bytes(header, rule.keyword)
        if content is None:
            if rule.type == 2:
                repairs[Repair(rule.keyword, Action.SUPPLIED)] = None
                checked[rule.keyword] = ""
            continue
        text, assumed = decoded(content, rule.vr, charset)
        form = None if text is None else _valid(rule, text)
        if form is None:
            repairs[Repair(rule.keyword, Action.EMPTIED if rule.type == 2 else Action.DROPPED)] = None
        elif assumed:
            repairs[Repair(rule.keyword, Action.ASSUMED)] = None
        elif text is not None and form != text and form != text.strip().rstrip("="):
            repairs[Repair(rule.keyword, Action.REPLACED)] = None
        if rule.type == 2 or form:
            checked[rule.keyword] = form or ""
    return checked


def _valid(rule: _Rule, text: str) -> str | None:
    parts = text.split("\\") if rule.many else [text]
    forms = [valid(rule.vr, part, rule.allowed) for part in parts]
    return None if None in forms else "\\".join(form or "" for form in forms)


def _items(
    header: Dataset, keyword: str, rules: tuple[_Rule, ...], charset: Charset, repairs: dict[Repair, None]
) -> tuple[Checked, ...] | None:
    """The items of a sequence that may be written; None when it is absent."""
    if keyword not in header:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sequence = header[keyword]
            items = list(sequence.value) if sequence.VR == "SQ" else None
        except (*MALFORMED, OSError):
            items = None
    if items is None:
        repairs[Repair(keyword, Action.DROPPED)] = None
        return None
    needed = {rule.keyword for rule in rules if rule.type == 1}
    declared = [_plain(item, "SpecificCharacterSet").split("\\") for item in items]
    checked = [_checked(item, rules, charset.within(own), repairs) for item, own in zip(items, declared, strict=True)]
    complete = tuple(item for item in checked if item and needed <= set(item))
    if len(complete) < len(items) and needed:
        repairs[Repair(keyword, Action.DROPPED)] = None
    return complete


def _honest_about_identity(attributes: dict[str, str | tuple[Checked, ...]], repairs: dict[Repair, None]) -> Checked:
    """Patient Identity Removed YES needs its method beside it (PS3.3 C.7.1.1, Type 1C)."""
    methods = ("DeidentificationMethod", "DeidentificationMethodCodeSequence")
    removed = attributes.get("PatientIdentityRemoved") == "YES"
    if removed and not any(method in attributes for method in methods):
        repairs[Repair("DeidentificationMethod", Action.REPLACED)] = None
        attributes["DeidentificationMethod"] = "Not stated by the source"
    return attributes


def _plain(header: Dataset, keyword: str) -> str:
    """An identifier or code as ASCII text without padding; empty when absent or not text."""
    content = _bytes(header, keyword)
    return "" if content is None else content.decode("ascii", "replace").strip(" \0").replace("\ufffd", "?")


def _bytes(header: Dataset, keyword: str) -> bytes | None:
    """The value as it was received, whatever VR it came under; None when absent.

    pydicom would decode, validate and warn with the value; results need their own rules for all three.
    """
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    if tag not in header:
        return None
    try:
        value: Any = header.get_item(tag).value
    except MALFORMED:
        return _NO_TEXT
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("ascii", "replace")
    if isinstance(value, Iterable) and all(isinstance(part, str) for part in value):
        return "\\".join(value).encode("ascii", "replace")
    return _NO_TEXT
