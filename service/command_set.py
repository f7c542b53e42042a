"""Command sets of C-STORE, C-ECHO, N-EVENT-REPORT and N-ACTION: Implicit VR Little Endian always (PS3.7 6.3.1).

The library's classes take a millisecond for a request and its answer, longer than a slice takes to arrive; a
test holds these encodings equal to the library's. Knows nothing of PDUs or associations.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

NO_DATA_SET = 0x0101  # of Command Data Set Type; every other value says that one follows
MAX_UID_LENGTH = 64


class CommandField(IntEnum):
    """What we answer (PS3.7 table E.1-1); an answer has the highest bit set."""

    C_STORE_RQ = 0x0001
    C_ECHO_RQ = 0x0030
    N_EVENT_REPORT_RQ = 0x0100
    N_ACTION_RQ = 0x0130
    C_CANCEL_RQ = 0x0FFF  # needs no answer, and there is nothing to cancel


_GROUP_LENGTH = 0x0000
_AFFECTED_SOP_CLASS_UID = 0x0002
_REQUESTED_SOP_CLASS_UID = 0x0003
_COMMAND_FIELD = 0x0100
_MESSAGE_ID = 0x0110
_MESSAGE_ID_BEING_RESPONDED_TO = 0x0120
_DATA_SET_TYPE = 0x0800
_STATUS = 0x0900
_AFFECTED_SOP_INSTANCE_UID = 0x1000
_REQUESTED_SOP_INSTANCE_UID = 0x1001
_ACTION_TYPE_ID = 0x1008


class Malformed(Exception):
    """The bytes are no command set that can be answered; the message quotes none of them."""


@dataclass(frozen=True, slots=True)
class Command:
    """A request. UIDs are None where it has none; what an N-ACTION requests is what its answer calls affected."""

    field: int
    message_id: int
    has_data_set: bool
    affected_sop_class_uid: str | None
    affected_sop_instance_uid: str | None
    action_type: int | None = None


def decode_command(content: bytes) -> Command:
    """The request in `content`; Malformed when it lacks what an answer needs or what the next bytes mean."""
    elements = _elements(content)
    field = _number(elements, _COMMAND_FIELD)
    is_action = field == CommandField.N_ACTION_RQ
    return Command(
        field=field,
        message_id=_number(elements, _MESSAGE_ID),
        has_data_set=_number(elements, _DATA_SET_TYPE) != NO_DATA_SET,
        affected_sop_class_uid=_uid(elements, _REQUESTED_SOP_CLASS_UID if is_action else _AFFECTED_SOP_CLASS_UID),
        affected_sop_instance_uid=_uid(
            elements, _REQUESTED_SOP_INSTANCE_UID if is_action else _AFFECTED_SOP_INSTANCE_UID
        ),
        action_type=_number(elements, _ACTION_TYPE_ID) if is_action else None,
    )


def encode_answer(request: Command, status: int) -> bytes:
    """The answer to any of them (PS3.7 tables 9.3-2, 9.3-13, 10.3-2 and 10.3-8)."""
    elements = b"".join(
        (
            _encoded_uid(_AFFECTED_SOP_CLASS_UID, request.affected_sop_class_uid),
            _encoded_number(_COMMAND_FIELD, request.field | 0x8000),
            _encoded_number(_MESSAGE_ID_BEING_RESPONDED_TO, request.message_id),
            _encoded_number(_DATA_SET_TYPE, NO_DATA_SET),
            _encoded_number(_STATUS, status),
            _encoded_uid(_AFFECTED_SOP_INSTANCE_UID, request.affected_sop_instance_uid),
        )
    )
    return struct.pack("<HHLL", 0, _GROUP_LENGTH, 4, len(elements)) + elements


def _elements(content: bytes) -> dict[int, bytes]:
    """The values by element number; all are of group 0000."""
    elements: dict[int, bytes] = {}
    place = 0
    while place < len(content):
        if len(content) - place < 8:
            raise Malformed("it ends inside an element")
        group, element, length = struct.unpack_from("<HHL", content, place)
        place += 8
        if group != 0 or length > len(content) - place:
            raise Malformed("an element is not of a command or longer than all")
        elements[element] = content[place : place + length]
        place += length
    return elements


def _number(elements: dict[int, bytes], element: int) -> int:
    value = elements.get(element, b"")
    if len(value) != 2:
        raise Malformed(f"(0000,{element:04X}) is missing or no number")
    return int.from_bytes(value, "little")


def _uid(elements: dict[int, bytes], element: int) -> str | None:
    """Without padding. What is no UID is the service's to refuse, as long as it can be sent back."""
    value = elements.get(element, b"").strip(b" \0")
    if len(value) > MAX_UID_LENGTH or not value.isascii():
        raise Malformed(f"(0000,{element:04X}) is longer than 64 characters or not ASCII")
    return value.decode("ascii") or None


def _encoded_number(element: int, value: int) -> bytes:
    return struct.pack("<HHLH", 0, element, 2, value)


def _encoded_uid(element: int, uid: str | None) -> bytes:
    if uid is None:
        return b""
    value = uid.encode("ascii")
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HHL", 0, element, len(value)) + value
