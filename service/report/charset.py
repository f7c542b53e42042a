"""A result in UTF-8 -> the same result in the character set of a destination that takes no UTF-8, or a refusal.

Nothing is ever replaced by `?`: a text that does not fit is named by its keyword, and the result is not written.
For Chinese take GB18030: dciodvfy 20260927 calls every name in GBK invalid, so that the gate would keep it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from io import BytesIO

from pydicom import dcmread
from pydicom.charset import python_encoding
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from service.report.attributes import Charset, decoded
from service.report.encoding import encode, name_by_content

_TEXT_VRS = ("LO", "LT", "PN", "SH", "ST", "UC", "UT")


class DoesNotFit(Exception):
    """The result holds text that the character set cannot; the message names attributes, never values."""


def recoded(dataset: Dataset, charset: str, *parts: str, transfer_syntax_uid: UID = ExplicitVRLittleEndian) -> Dataset:
    """A copy of `dataset` in `charset` with a SOP Instance UID of its own; raises DoesNotFit.

    charset: as Specific Character Set has it, several values separated by a backslash. parts: as name_by_content.
    """
    terms = charset.split("\\")
    unknown = [term for term in terms if term not in python_encoding]
    if unknown:
        raise ValueError(f"charset {charset!r} is no value of Specific Character Set; unknown: {unknown[0]!r}")
    misfits = sorted({keyword for keyword, vr, text in _texts(dataset) if not fits(text, vr, terms)})
    if misfits:
        raise DoesNotFit(f"does not fit {charset}: {', '.join(misfits)}")
    copy = deepcopy(dataset)
    copy.SpecificCharacterSet = terms if len(terms) > 1 else charset
    for element in copy.iterall():
        if element.VR == "PN" and element.value:
            element.value = str(element.value)  # a PersonName keeps the bytes of the set in which it was written first
    name_by_content(copy, *parts, transfer_syntax_uid=transfer_syntax_uid)
    written = dcmread(BytesIO(encode(copy, transfer_syntax_uid)))
    if list(_texts(written)) != list(_texts(dataset)):
        raise DoesNotFit(f"does not come back from {charset} as it was written")
    return copy


def fits(text: str, vr: str, terms: list[str]) -> bool:
    """Whether `text` comes back as it is after it was written in these sets and read again, by our own reader."""
    if text.isascii():
        return True
    sample = Dataset()
    sample.SOPClassUID = sample.SOPInstanceUID = "1.2"
    sample.SpecificCharacterSet = terms if len(terms) > 1 else terms[0]
    keyword = "PatientName" if vr == "PN" else "TextValue"
    setattr(sample, keyword, text)
    try:
        content = encode(sample)
    except (UnicodeError, TypeError, ValueError, LookupError):  # TypeError is how pydicom 3.0.2 refuses a PN
        return False
    return _read_back(content, keyword, vr, terms) == text


def _read_back(content: bytes, keyword: str, vr: str, terms: list[str]) -> str | None:
    element = dcmread(BytesIO(content)).get_item(keyword)
    assert element is not None
    assert isinstance(element.value, bytes)
    text, assumed = decoded(element.value, vr, Charset.of(terms, "ISO_IR 6"))
    return None if assumed else text


def _texts(dataset: Dataset) -> Iterator[tuple[str, str, str]]:
    for element in dataset.iterall():
        if element.VR in _TEXT_VRS and element.value:
            values = element.value if element.VM > 1 else [element.value]
            yield from ((element.keyword, element.VR, str(value)) for value in values)
