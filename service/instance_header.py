"""The UIDs and the modality of an encoded data set, found without decoding it; memory is bounded whatever it holds.

Most headers are found by walking over the first bytes; what is unusual is left to pydicom, with a bound.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from io import BytesIO
from threading import Lock
from typing import BinaryIO, cast

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from service.shared.log import explain_exception

PREFIX_BYTES = 1 << 14  # of an instance, in which the walk finds its header
MAX_INFLATED_BYTES = 16 << 20  # of a deflated data set, to find its UIDs; more is a bomb
MAX_READ_BYTES = 8 << 20  # of any other; elements that are not wanted are skipped, sequences are not

_HEADER_TAGS = {
    "sop_class_uid": 0x00080016,
    "sop_instance_uid": 0x00080018,
    "modality": 0x00080060,
    "study_uid": 0x0020000D,
    "series_uid": 0x0020000E,
}
_NAMES = {tag: name for name, tag in _HEADER_TAGS.items()}
_MODALITY = re.compile(r"[A-Z0-9_ ]{0,16}")  # CS
_SHORT_VRS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split()  # 16 bits of length (PS3.5 7.1.2)
)
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_UNDEFINED_LENGTH = 0xFFFFFFFF
_reading = Lock()  # one unusual header at a time: what it may take of memory is then taken once


@dataclass(frozen=True, slots=True)
class Header:
    """What identifies an instance, as its data set says; "" where it says nothing."""

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    modality: str


class Unreadable(Exception):
    """Nothing in it can be read as a data set of this transfer syntax."""


def walk_header(prefix: bytes, transfer_syntax_uid: str) -> Header | None:
    """The header, when the first bytes of the data set hold all of it in plain order; None says nothing."""
    found = walk_elements(prefix, transfer_syntax_uid, _NAMES)
    if found is None or len(found) < len(_NAMES):
        return None
    return _header({name: _text(found[tag][1]) for name, tag in _HEADER_TAGS.items()})


def walk_elements(
    prefix: bytes, transfer_syntax_uid: str, tags: Collection[int]
) -> dict[int, tuple[bytes, bytes]] | None:
    """VR and value of those elements that are there, as they are encoded; no VR where it is implicit.

    None, which says nothing, unless the first bytes of the data set hold all up to the last of them in plain order.
    """
    if transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
        return None
    big = transfer_syntax_uid == ExplicitVRBigEndian
    implicit = transfer_syntax_uid == ImplicitVRLittleEndian
    tag_of, long_of, short_of = (
        struct.Struct(">HH" if big else "<HH").unpack_from,
        struct.Struct(">L" if big else "<L").unpack_from,
        struct.Struct(">H" if big else "<H").unpack_from,
    )
    values: dict[int, tuple[bytes, bytes]] = {}
    place, size, before, last = 0, len(prefix), 0, max(tags)
    while place + 12 <= size:
        group, element = tag_of(prefix, place)
        tag = group << 16 | element
        if tag <= before:  # pydicom decides what elements out of order mean
            return None
        before = tag
        if tag > last:
            break
        vr = prefix[place + 4 : place + 6]
        if implicit:
            (length,), place, vr = long_of(prefix, place + 4), place + 8, b""
        elif vr in _SHORT_VRS:
            (length,), place = short_of(prefix, place + 6), place + 8
        elif vr in _LONG_VRS:
            (length,), place = long_of(prefix, place + 8), place + 12
        else:
            return None
        if length == _UNDEFINED_LENGTH:
            return None
        if tag in tags:
            values[tag] = vr, prefix[place : place + length]
        place += length
    return values if before >= last and place <= size else None


def read_header(data_set: BinaryIO, transfer_syntax_uid: str) -> Header:
    """The identifying attributes, as text without padding, from where `data_set` stands; no pixel data is read.

    Unreadable when none of them is found. Tolerant otherwise: the receiver decides on what is there.
    """
    with _reading:
        deflated = transfer_syntax_uid == DeflatedExplicitVRLittleEndian
        stream = _inflated(data_set) if deflated else _Bounded(data_set)
        try:
            elements = read_elements(cast(BinaryIO, stream), transfer_syntax_uid, list(_HEADER_TAGS.values()))
            # raw, so that pydicom neither checks nor quotes a value
            found = {name: elements.get_item(tag) for name, tag in _HEADER_TAGS.items()}
        except Exception as error:  # noqa: BLE001  pydicom raises whatever the bytes lead it to
            raise Unreadable(explain_exception(error)) from None
    values = {name: _text(getattr(element, "value", None)) for name, element in found.items()}
    if not any(values.values()):
        raise Unreadable("no identifying attribute")
    return _header(values)


def read_elements(data_set: BinaryIO, transfer_syntax_uid: str, tags: list[int]) -> Dataset:
    """Of an encoded data set that is not deflated, from where it stands, these elements alone, raw; `tags` ascend.

    Reads nothing behind the last one. Raises whatever the bytes lead pydicom to.
    """

    def is_past_them(tag: BaseTag, _vr: str | None, _length: int) -> bool:
        return bool(tag > tags[-1])

    return read_dataset(
        data_set,
        is_implicit_VR=transfer_syntax_uid == ImplicitVRLittleEndian,
        is_little_endian=transfer_syntax_uid != ExplicitVRBigEndian,
        stop_when=is_past_them,
        specific_tags=tags,
    )


class _Bounded:
    """A stream of which only so many bytes can be read; it may be skipped over at will."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._left_bytes = MAX_READ_BYTES
        self.tell = stream.tell
        self.seek = stream.seek

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self._left_bytes:
            size = self._left_bytes + 1
        content = self._stream.read(size)
        self._left_bytes -= len(content)
        if self._left_bytes < 0:
            raise Unreadable("more than 8 MiB of sequences and values before the Series Instance UID")
        return content


def _header(values: dict[str, str]) -> Header:
    if not _MODALITY.fullmatch(values["modality"]):
        values["modality"] = ""
    return Header(**values)


def _text(value: object) -> str:
    return value.decode("latin-1").strip(" \0") if isinstance(value, bytes) else ""


def _inflated(data_set: BinaryIO) -> BytesIO:
    """As much as MAX_INFLATED_BYTES, out of no more than as many."""
    try:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data_set.read(MAX_INFLATED_BYTES), MAX_INFLATED_BYTES)
    except zlib.error:
        raise Unreadable("not deflated") from None
    return BytesIO(content)
