"""The receiver's decisions, without a connection: statuses, headers, transfer syntaxes, who may associate."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from datetime import UTC, datetime
from io import BytesIO
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import config
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    MRImageStorage,
)
from pynetdicom import AllStoragePresentationContexts

from service import instance_header
from service.acceptor import Peer, Refusal
from service.assembly import HEADER_TAGS
from service.instance_header import Header, Unreadable, read_elements, read_header, walk_elements, walk_header
from service.receiver import (
    TRANSFER_SYNTAXES,
    Status,
    acceptable,
    deny,
    deny_crowd,
    is_storage,
    judge,
)
from service.shared.settings import ScpSettings, SourceSettings
from tests.receiving import STUDY_UID, encode, instance

HEADER = Header(
    sop_class_uid=str(CTImageStorage),
    sop_instance_uid=f"{STUDY_UID}.1.1",
    study_uid=STUDY_UID,
    series_uid=f"{STUDY_UID}.1",
    modality="CT",
)


def test_command_and_data_set_that_agree_are_stored() -> None:
    """What was announced is what came."""
    assert judge(CTImageStorage, f"{STUDY_UID}.1.1", HEADER).status is Status.SUCCESS


@pytest.mark.parametrize(
    ("sop_class_uid", "sop_instance_uid", "status"),
    [
        (MRImageStorage, f"{STUDY_UID}.1.1", Status.DOES_NOT_MATCH),
        (CTImageStorage, f"{STUDY_UID}.1.2", Status.DOES_NOT_MATCH),
        (None, f"{STUDY_UID}.1.1", Status.CANNOT_UNDERSTAND),
        (CTImageStorage, None, Status.CANNOT_UNDERSTAND),
        ("", "", Status.CANNOT_UNDERSTAND),
    ],
)
def test_command_that_announces_something_else_is_refused(
    sop_class_uid: str | None, sop_instance_uid: str | None, status: Status
) -> None:
    """A mismatch is 0xA900; a command without its UIDs is 0xC000."""
    assert judge(sop_class_uid, sop_instance_uid, HEADER).status is status


@pytest.mark.parametrize("missing", ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
@pytest.mark.parametrize("value", [None, "", "1.2.x", "..", "1.2.", "../../etc/passwd", "1.2\\1.3", "1" * 65])
def test_instance_without_a_usable_uid_is_refused(missing: str, value: str | None) -> None:
    """Each of the four UIDs must be there and be made of digits and dots, else 0xC000."""
    dataset = instance()
    del dataset[missing]
    if value is not None:
        dataset.add(DataElement(tag_for_keyword(missing) or 0, "UI", value, validation_mode=config.IGNORE))

    header = read_header(BytesIO(encode(dataset)), ExplicitVRLittleEndian)
    verdict = judge(CTImageStorage, f"{STUDY_UID}.1.1", header)

    assert verdict.status is Status.CANNOT_UNDERSTAND
    assert not value or value not in verdict.reason


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, JPEG2000Lossless]
)
def test_header_is_read_in_every_encoding(syntax: UID) -> None:
    """Implicit, explicit, big endian and encapsulated data sets give the same header."""
    assert read_header(BytesIO(encode(instance(), syntax)), syntax) == HEADER


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_plain_header_is_found_in_the_first_bytes(syntax: UID) -> None:
    """Most headers need neither pydicom nor the whole data set."""
    assert walk_header(encode(instance(), syntax)[:500], syntax) == HEADER


@given(content=st.binary(max_size=100), place=st.integers(0, 300), end=st.integers(0, 700))
def test_walk_over_the_first_bytes_never_contradicts_the_reading(content: bytes, place: int, end: int) -> None:
    """Whatever stands there, the walk gives what pydicom gives, or leaves it to pydicom."""
    honest = encode(instance())
    changed = honest[:place] + content + honest[place + len(content) :]
    for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian):
        walked = walk_header(changed[:end], syntax)

        assert walked is None or walked == read_header(BytesIO(changed), syntax)


@given(content=st.binary(max_size=100), place=st.integers(0, 500), end=st.integers(0, 1400))
def test_walk_for_any_elements_never_contradicts_the_reading(content: bytes, place: int, end: int) -> None:
    """Ingest compares what the walk gives, and decodes it once where the same bytes stand."""
    honest = encode(instance())
    changed = honest[:place] + content + honest[place + len(content) :]
    for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian):
        walked = walk_elements(changed[:end], syntax, HEADER_TAGS)
        if walked is not None:
            read = read_elements(BytesIO(changed), syntax, HEADER_TAGS)
            elements = {tag: cast(RawDataElement, read.get_item(tag)) for tag in HEADER_TAGS if tag in read}

            assert {tag: (element.VR or "", element.value or b"") for tag, element in elements.items()} == {
                tag: (vr.decode(), value) for tag, (vr, value) in walked.items()
            }


def test_value_without_end_takes_no_memory() -> None:
    """A UID that claims to be longer than any header is refused before it is read."""
    sent = BytesIO(struct.pack("<HHL", 0x0008, 0x0016, 64 << 20) + bytes(64 << 20))

    tracemalloc.start()
    with pytest.raises(Unreadable):
        read_header(sent, ImplicitVRLittleEndian)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak_bytes < 20 << 20


def test_deflated_header_is_read() -> None:
    """A deflated data set is inflated as far as its UIDs, and only for them."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    sent = compressor.compress(encode(instance())) + compressor.flush()

    assert read_header(BytesIO(sent), DeflatedExplicitVRLittleEndian) == HEADER


def test_deflated_bomb_is_inflated_to_its_bound_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes cannot become gigabytes in the receiver's memory."""
    monkeypatch.setattr(instance_header, "MAX_INFLATED_BYTES", 1 << 20)
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    sent = compressor.compress(bytes(16 << 20)) + compressor.flush()

    tracemalloc.start()
    with pytest.raises(Unreadable):
        read_header(BytesIO(sent), DeflatedExplicitVRLittleEndian)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak_bytes < 4 << 20


def test_sequences_before_the_uids_do_no_harm() -> None:
    """Nested sequences of undefined length stand before the Study Instance UID; their UIDs are not taken for it."""
    inner, outer = Dataset(), Dataset()
    inner.StudyInstanceUID = "1.2.3"
    outer.ReferencedSeriesSequence = Sequence([inner])
    dataset = instance()
    dataset.ReferencedStudySequence = Sequence([outer, outer])
    dataset["ReferencedStudySequence"].is_undefined_length = True

    for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        assert read_header(BytesIO(encode(dataset, syntax)), syntax) == HEADER


def test_pixel_data_is_not_read() -> None:
    """A data set that is cut in its pixel data has its header all the same."""
    assert read_header(BytesIO(encode(instance())[:-300]), ExplicitVRLittleEndian) == HEADER


def test_modality_that_is_no_code_is_left_out() -> None:
    """A value that could be anything does not reach receipts and logs."""
    dataset = instance()
    dataset.add(DataElement(0x00080060, "CS", "Planted^Patient", validation_mode=config.IGNORE))

    assert read_header(BytesIO(encode(dataset)), ExplicitVRLittleEndian).modality == ""


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 4000, b"GET / HTTP/1.1\r\n" * 40, bytes(4000)])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_what_is_no_data_set_is_unreadable(content: bytes, syntax: UID) -> None:
    """Bytes in which none of the identifying attributes is found are refused with 0xC210."""
    with pytest.raises(Unreadable):
        read_header(BytesIO(content), syntax)


@given(
    content=st.binary(max_size=300),
    place=st.integers(0, 700),
    syntax=st.sampled_from(sorted(TRANSFER_SYNTAXES)),
)
def test_any_bytes_give_a_header_or_unreadable(content: bytes, place: int, syntax: str) -> None:
    """Whatever stands in a data set, reading it ends, in one of two ways."""
    honest = encode(instance(), syntax if UID(syntax) != DeflatedExplicitVRLittleEndian else ExplicitVRLittleEndian)
    try:
        header = read_header(BytesIO(honest[:place] + content + honest[place + len(content) :]), syntax)
    except Unreadable:
        return

    assert judge(CTImageStorage, f"{STUDY_UID}.1.1", header).status in set(Status)


def test_every_storage_class_is_served() -> None:
    """Those of the library, retired ones, private ones and ones newer than the dictionary."""
    known = [context.abstract_syntax for context in AllStoragePresentationContexts]
    retired, private, newer = "1.2.840.10008.5.1.4.1.1.5", "1.2.826.0.1.3680043.2.1.1", "1.2.840.10008.5.1.4.1.1.999.9"

    assert [uid for uid in (*known, retired, private, newer) if not is_storage(UID(uid))] == []


@pytest.mark.parametrize(
    "uid",
    [
        "1.2.840.10008.1.20.1",  # Storage Commitment Push Model
        "1.2.840.10008.1.3.10",  # Media Storage Directory Storage
        "1.2.840.10008.5.1.4.1.2.1.1",  # Patient Root Query/Retrieve - FIND
        "1.2.840.10008.5.1.4.31",  # Modality Worklist - FIND
        "1.2.840.10008.1.2.1",  # a transfer syntax
    ],
)
def test_other_services_are_not_storage(uid: str) -> None:
    """What is registered as something else is not accepted as storage."""
    assert not is_storage(UID(uid))


def test_explicit_is_preferred_then_what_the_sender_has_and_implicit_last() -> None:
    """Nobody is made to compress, nobody to decompress, and the VRs of private elements survive if they can."""
    proposed = [ImplicitVRLittleEndian, JPEG2000Lossless, ExplicitVRBigEndian, JPEGLSLossless, ExplicitVRLittleEndian]

    assert acceptable(proposed) == [
        ExplicitVRLittleEndian,
        JPEG2000Lossless,
        JPEGLSLossless,
        ExplicitVRBigEndian,
        ImplicitVRLittleEndian,
    ]


def test_syntaxes_whose_pixels_lie_elsewhere_are_never_accepted() -> None:
    """JPIP refers to a server and SMPTE to a stream: what would be stored is not the instance."""
    referenced = ["1.2.840.10008.1.2.4.94", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.204"]
    streams = ["1.2.840.10008.1.2.4.205", "1.2.840.10008.1.2.7.1", "1.2.840.10008.1.2.7.2", "1.2.840.10008.1.2.7.3"]

    assert acceptable(UID(uid) for uid in (*referenced, *streams, JPEGBaseline8Bit)) == [JPEGBaseline8Bit]
    assert {"1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.108"} <= TRANSFER_SYNTAXES


SCP = ScpSettings(ae_title="MEDPRUNER")
NAMES = {"scanner.example": frozenset({"192.0.2.7", "2001:db8::7"})}


def peer(calling_ae: str = "CT1", called_ae: str = "MEDPRUNER", address: str = "192.0.2.7") -> Peer:
    return Peer("association-1", calling_ae, called_ae, address, datetime(2026, 3, 1, tzinfo=UTC))


def addresses_of(host: str) -> frozenset[str]:
    return NAMES.get(host, frozenset())


@pytest.mark.parametrize(
    ("host", "address"),
    [
        (None, "198.51.100.1"),
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7", "::ffff:192.0.2.7"),
        ("192.0.2.0/24", "192.0.2.200"),
        ("scanner.example", "192.0.2.7"),
        ("scanner.example", "2001:db8::7"),
        ("fe80::1", "fe80::1%eth0"),
    ],
)
def test_source_is_let_in_from_its_address(host: str | None, address: str) -> None:
    """An address, a network or a name; without any, every address."""
    assert deny(peer(address=address), SCP, [SourceSettings(ae_title="CT1", host=host)], addresses_of) is None


@pytest.mark.parametrize("host", ["192.0.2.8", "192.0.3.0/24", "other.example"])
def test_source_from_another_address_is_refused(host: str) -> None:
    """The remedy names the address that would have to be allowed."""
    denial = deny(peer(), SCP, [SourceSettings(ae_title="CT1", host=host)], addresses_of)

    assert denial is not None
    assert denial.refusal == Refusal(1, 1, 3)
    assert denial.remedy == '[[source]] ae_title = "CT1", host = "192.0.2.7"'


def test_source_may_have_several_hosts() -> None:
    """One AE title on two scanners is two [[source]] entries."""
    sources = [SourceSettings(ae_title="CT1", host=host) for host in ("192.0.2.6", "192.0.2.7")]

    assert deny(peer(), SCP, sources, addresses_of) is None


def test_wrong_called_title_is_refused_before_anything_else() -> None:
    """The sender has a wrong AE title for us: PS3.8 reason 7, and the two places where it can be put right."""
    denial = deny(peer(called_ae="PACS"), SCP, [], addresses_of)

    assert denial is not None
    assert denial.refusal == Refusal(1, 1, 7)
    assert denial.remedy == '[scp] ae_title = "PACS" here, or call "MEDPRUNER" there'


def test_unknown_calling_title_is_refused_with_the_line_that_would_allow_it() -> None:
    """PS3.8 reason 3, and the [[source]] to add."""
    denial = deny(peer("NEW"), SCP, [SourceSettings(ae_title="CT1")], addresses_of)

    assert denial is not None
    assert denial.refusal == Refusal(1, 1, 3)
    assert denial.remedy == '[[source]] ae_title = "NEW", or [scp] accept_unknown_sources = true'


def test_unknown_sources_are_accepted_when_that_is_configured() -> None:
    """With accept_unknown_sources a new title is let in; a listed one still has to come from its host."""
    scp = ScpSettings(accept_unknown_sources=True)
    sources = [SourceSettings(ae_title="CT1", host="192.0.2.8")]

    assert deny(peer("NEW"), scp, sources, addresses_of) is None
    assert deny(peer("CT1"), scp, sources, addresses_of) is not None


def test_crowd_is_refused_for_now() -> None:
    """At max_associations the next is told to try again, and the log names the key."""
    scp = ScpSettings(max_associations=2)
    denial = deny_crowd(scp, 2)

    assert deny_crowd(scp, 1) is None
    assert denial is not None
    assert denial.refusal == Refusal(2, 3, 2)
    assert "max_associations" in denial.remedy


def test_crowd_from_one_address_is_refused_for_now() -> None:
    """One address has its own bound, below that of all."""
    scp = ScpSettings(max_associations=9, max_associations_per_address=2)
    denial = deny_crowd(scp, 5, 2)

    assert deny_crowd(scp, 5, 1) is None
    assert denial is not None
    assert "max_associations_per_address" in denial.remedy
