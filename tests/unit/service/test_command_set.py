"""Our encoding of command sets, held equal to pynetdicom's."""

from __future__ import annotations

import struct
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.dimse_messages import (
    C_ECHO_RQ,
    C_ECHO_RSP,
    C_STORE_RQ,
    C_STORE_RSP,
    N_ACTION_RQ,
    N_ACTION_RSP,
    DIMSEMessage,
)
from pynetdicom.dimse_primitives import C_ECHO, C_STORE, N_ACTION
from pynetdicom.pdu import P_DATA_TF

from service.command_set import Command, CommandField, Malformed, decode_command, encode_answer
from service.upper_layer import p_data

UIDS = st.from_regex(r"[1-9][0-9]{0,8}(\.[1-9][0-9]{0,8}){1,5}", fullmatch=True)
NUMBERS = st.integers(0, 0xFFFF)
STATUSES = st.sampled_from([0x0000, 0xA700, 0xA900, 0xC000, 0xC210])


def pdus(message: DIMSEMessage, primitive: C_STORE | C_ECHO | N_ACTION, max_pdu_bytes: int = 0) -> bytes:
    """The library's P-DATA-TF PDUs of the message, in presentation context 1."""
    message.primitive_to_message(primitive)
    encoded = b""
    for part in message.encode_msg(1, max_pdu_bytes):
        pdu = P_DATA_TF()
        pdu.from_primitive(part)
        encoded += pdu.encode()
    return encoded


def store(primitive: C_STORE, sop_class_uid: str | None, sop_instance_uid: str | None) -> C_STORE:
    primitive.AffectedSOPClassUID = sop_class_uid
    primitive.AffectedSOPInstanceUID = sop_instance_uid
    return primitive


@given(sop_class_uid=UIDS, sop_instance_uid=UIDS, message_id=NUMBERS)
def test_request_of_the_library_is_understood(sop_class_uid: str, sop_instance_uid: str, message_id: int) -> None:
    """What pynetdicom encodes, we decode to the same values."""
    primitive = store(C_STORE(), sop_class_uid, sop_instance_uid)
    primitive.MessageID, primitive.Priority, primitive.DataSet = message_id, 2, BytesIO(b"x" * 8)
    message = C_STORE_RQ()
    message.primitive_to_message(primitive)
    (command, *_) = [part.presentation_data_value_list[0][1] for part in message.encode_msg(1, 0)]

    assert decode_command(command[1:]) == Command(1, message_id, True, sop_class_uid, sop_instance_uid)


@given(
    sop_class_uid=UIDS | st.none(),
    sop_instance_uid=UIDS | st.none(),
    message_id=NUMBERS,
    status=STATUSES,
    max_pdu_bytes=st.sampled_from([0, 16, 64, 16384]),
)
def test_answer_is_the_library_s_byte_for_byte(
    sop_class_uid: str | None, sop_instance_uid: str | None, message_id: int, status: int, max_pdu_bytes: int
) -> None:
    """Also where the peer takes small PDUs only."""
    primitive = store(C_STORE(), sop_class_uid, sop_instance_uid)
    primitive.MessageIDBeingRespondedTo, primitive.Status = message_id, status
    request = Command(CommandField.C_STORE_RQ, message_id, True, sop_class_uid, sop_instance_uid)

    ours = p_data(1, encode_answer(request, status), max_pdu_bytes)

    assert ours == pdus(C_STORE_RSP(), primitive, max_pdu_bytes)


@given(message_id=NUMBERS)
def test_echo_and_its_answer_are_the_library_s(message_id: int) -> None:
    """C-ECHO goes the same way."""
    echo, answer = C_ECHO(), C_ECHO()
    echo.MessageID, answer.MessageIDBeingRespondedTo, answer.Status = message_id, message_id, 0
    echo.AffectedSOPClassUID = answer.AffectedSOPClassUID = "1.2.840.10008.1.1"
    request = decode_command(pdus(C_ECHO_RQ(), echo)[12:])

    assert request == Command(CommandField.C_ECHO_RQ, message_id, False, "1.2.840.10008.1.1", None)
    assert p_data(1, encode_answer(request, 0), 0) == pdus(C_ECHO_RSP(), answer)


@given(sop_class_uid=UIDS, sop_instance_uid=UIDS, message_id=NUMBERS, action_type=NUMBERS, status=STATUSES)
def test_action_and_its_answer_are_the_library_s(
    sop_class_uid: str, sop_instance_uid: str, message_id: int, action_type: int, status: int
) -> None:
    """What an N-ACTION requests is what its answer calls affected (PS3.7 tables 10.3-7 and 10.3-8)."""
    action, answer = N_ACTION(), N_ACTION()
    action.MessageID, action.ActionTypeID, action.ActionInformation = message_id, action_type, BytesIO(b"x" * 8)
    action.RequestedSOPClassUID, action.RequestedSOPInstanceUID = sop_class_uid, sop_instance_uid
    answer.MessageIDBeingRespondedTo, answer.Status = message_id, status
    answer.AffectedSOPClassUID, answer.AffectedSOPInstanceUID = sop_class_uid, sop_instance_uid
    message = N_ACTION_RQ()
    message.primitive_to_message(action)
    (command, *_) = [part.presentation_data_value_list[0][1] for part in message.encode_msg(1, 0)]

    request = decode_command(command[1:])

    assert request == Command(
        CommandField.N_ACTION_RQ, message_id, True, sop_class_uid, sop_instance_uid, action_type=action_type
    )
    assert p_data(1, encode_answer(request, status), 0) == pdus(N_ACTION_RSP(), answer)


@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_command_or_malformed(content: bytes) -> None:
    """Nothing else comes out, and what comes out can be answered."""
    try:
        command = decode_command(content)
    except Malformed:
        return

    assert encode_answer(command, 0x0000)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<HHLH", 0, 0x0100, 2, 1),
        struct.pack("<HHL", 0, 0x0100, 0xFFFFFFFF),
        struct.pack("<HHLH", 8, 0x0100, 2, 1),
        struct.pack("<HHLL", 0, 0x0100, 4, 1),
    ],
    ids=["empty", "no-message-id", "endless", "other-group", "long-number"],
)
def test_command_that_cannot_be_answered_is_malformed(content: bytes) -> None:
    """Without a message id and a type of data set there is nothing to answer to."""
    with pytest.raises(Malformed):
        decode_command(content)
