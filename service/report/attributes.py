"""One copied text attribute: bytes of any source -> a value that may be written, or what to do instead.

Strict where we write, tolerant where we read. Knows nothing of files, and never repeats a value in a message.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from enum import StrEnum

from pydicom import config
from pydicom.charset import convert_encodings, decode_bytes, python_encoding
from pydicom.valuerep import TEXT_VR_DELIMS, PersonName

_ESCAPE = 0x1B
_GB2312_DESIGNATION = "\x1b$)A"  # of ISO 2022 IR 58; Python's codec, and thus pydicom 3.0.2, leave it in the text
_UNDECLARED = ("", "ISO_IR 6", "ISO 2022 IR 6")


class Action(StrEnum):
    """What was done to an attribute of the source that could not be copied as it is."""

    SUPPLIED = "supplied"  # absent, required: written empty or by rule
    EMPTIED = "emptied"  # invalid, Type 2
    DROPPED = "dropped"  # invalid, Type 3
    REPLACED = "replaced"  # invalid, but its meaning is certain: written in today's form
    ASSUMED = "assumed"  # 8-bit text under no (or a wrong) character set: read with [report] default_charset
    KEPT_INVALID = "kept-invalid"  # an identifier that is not ours to change


@dataclass(frozen=True, slots=True)
class Repair:
    """One deviation from a verbatim copy, fit for the audit: a keyword, never a value."""

    keyword: str
    action: Action


@dataclass(frozen=True, slots=True)
class Charset:
    """The character sets of one data set, as declared and as Python decodes them."""

    encodings: tuple[str, ...]  # of Python
    fallback: tuple[str, ...]  # of Python, from [report] default_charset
    declared: bool  # False: nothing but ASCII was announced, or the announcement is unknown

    @classmethod
    def of(cls, declared: Sequence[str], default_charset: str) -> Charset:
        """From the values of Specific Character Set; an unknown one counts as not declared."""
        terms = [_spelled_right(term) for term in declared]
        known = [term for term in terms if term in python_encoding]
        fallback = tuple(convert_encodings(default_charset))
        announces = len(known) == len(terms) and any(term not in _UNDECLARED for term in terms)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # terms that code extensions do not allow are left out
            encodings = tuple(convert_encodings(list(known) or None))
        return cls(encodings, fallback, announces)

    def within(self, declared: Sequence[str]) -> Charset:
        """Of an item of a sequence: its own sets where it declares some (PS3.5 7.5.3), else these."""
        return replace(Charset.of(declared, "ISO_IR 6"), fallback=self.fallback) if any(declared) else self


def decoded(content: bytes, vr: str, charset: Charset) -> tuple[str | None, bool]:
    """Decode one value; None when no set fits. The second part: was the default assumed?"""
    content = content.rstrip(b" \0") if vr != "UI" else content.strip(b" \0")
    eight_bit = any(byte >= 0x80 for byte in content)
    if not eight_bit and _ESCAPE not in content:
        return content.decode("ascii"), False
    if charset.declared and not _outside_of_code_extensions(content, charset):
        text = _decode(content, vr, charset.encodings)
        if text is not None:
            return text, False
    text = _decode(content, vr, charset.fallback)
    return text, True


def _decode(content: bytes, vr: str, encodings: tuple[str, ...]) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # replacement characters are noticed below
        try:
            if vr == "PN":
                name = PersonName(content, list(encodings), validation_mode=config.IGNORE)
                text = "=".join(name.components)
            else:
                text = decode_bytes(content, list(encodings), TEXT_VR_DELIMS)
        except (UnicodeError, LookupError):
            return None
    text = text.replace(_GB2312_DESIGNATION, "")
    return None if "\ufffd" in text or "\x1b" in text else text


def _outside_of_code_extensions(content: bytes, charset: Charset) -> bool:
    """8-bit bytes without any escape, where the first set is the 7-bit default (PS3.5 6.1.2.5.3)."""
    extended = len(charset.encodings) > 1 and charset.encodings[0] == python_encoding["ISO_IR 6"]
    return extended and _ESCAPE not in content


def _spelled_right(term: str) -> str:
    """`ISO-IR 100` and `ISO 2022-IR 87` are common misspellings with one possible meaning."""
    term = re.sub(r"^ISO[-_ ]?IR[-_ ]", "ISO_IR ", term.strip().upper())
    return re.sub(r"^ISO[-_ ]2022[-_ ]IR[-_ ]", "ISO 2022 IR ", term)


def valid(vr: str, text: str, allowed: frozenset[str] | None = None) -> str | None:
    """One value in the form in which it may be written under `vr`; None when it may not."""
    form = _FORMS[vr](text)
    if form is None or (allowed is not None and form not in allowed):
        return None
    return form


def uid_is_valid(text: str) -> bool:
    """PS3.5 9.1: 64 characters, numeric components, no leading zeros, a root of ISO 9834 (0.0-0.39, 1.0-1.39, 2)."""
    form = r"([01]\.[1-3]?\d|2\.(0|[1-9]\d*))(\.(0|[1-9]\d*))*"
    return len(text) <= 64 and re.fullmatch(form, text, re.ASCII) is not None and re.search(r"[1-9]", text) is not None


def _string(limit: int) -> Callable[[str], str | None]:
    def form(text: str) -> str | None:
        printable = not any(character < " " or "\x7f" <= character < "\xa0" for character in text)
        return text if printable and "\\" not in text and len(text) <= limit else None

    return form


def _person_name(text: str) -> str | None:
    groups = text.split("=")
    fits = len(groups) <= 3 and all(len(group) <= 64 and group.count("^") <= 4 for group in groups)
    return text.rstrip("=") if fits and _string(194)(text) is not None else None


def _code_string(text: str) -> str | None:
    text = text.strip().upper()
    return text if re.fullmatch(r"[A-Z0-9 _]{0,16}", text, re.ASCII) else None


def _date(text: str) -> str | None:
    """DA; `1999.12.31` of ACR-NEMA and `1999-12-31` mean what they say; a year below 1800 is an error."""
    digits = re.sub(r"^(\d{4})[.-](\d\d)[.-](\d\d)$", r"\1\2\3", text.strip())
    if digits == "":
        return ""
    if re.fullmatch(r"\d{8}", digits, re.ASCII) is None or digits < "1800":
        return None
    try:
        date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return None
    return digits


def _time(text: str) -> str | None:
    """TM; `12:34:56` of ACR-NEMA means what it says."""
    digits = text.strip()
    if re.match(r"\d\d:\d\d(:\d\d|$)", digits, re.ASCII):
        digits = digits.replace(":", "", 2)
    pattern = r"(([01]\d|2[0-3])([0-5]\d(([0-5]\d|60)(\.\d{1,6})?)?)?)?"
    return digits if re.fullmatch(pattern, digits, re.ASCII) else None


def _matching(pattern: str) -> Callable[[str], str | None]:
    return lambda text: text.strip() if re.fullmatch(pattern, text.strip(), re.ASCII) else None


_FORMS: dict[str, Callable[[str], str | None]] = {
    "AS": _matching(r"(\d{3}[DWMY])?"),
    "CS": _code_string,
    "DA": _date,
    "DS": _matching(r"(?=.{0,16}$)([-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?)?"),
    "LO": _string(64),
    "PN": _person_name,
    "SH": _string(16),
    "TM": _time,
    "TZ": _matching(r"([-+](0\d|1[0-4])[0-5]\d)?"),  # Timezone Offset From UTC, an SH
    "UI": lambda text: text if text == "" or uid_is_valid(text) else None,
}
