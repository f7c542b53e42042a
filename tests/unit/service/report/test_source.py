"""Headers of any source become a SourceStudy; what could not be copied is listed by keyword, never by value."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

from service.report.attributes import Action, Repair
from service.report.source import SourceError, read_source
from tests.report_samples import BODY, HEAD, ct_header, write


def test_a_complete_header_is_copied_without_repairs(tmp_path: Path) -> None:
    """What is valid is copied as it stands."""
    source = read_source(write(tmp_path, [ct_header(1), ct_header(2)]))

    assert source.repairs == ()
    assert source.study_uid == "2.25.11"
    assert source.attributes["PatientName"] == "Test^Case"
    assert source.attributes["AccessionNumber"] == "A-1"
    assert [one.sop_instance_uid for one in source.instances] == ["2.25.1001", "2.25.1002"]
    assert {one.series_uid for one in source.instances} == {"2.25.12"}


def test_real_studies_need_no_repairs() -> None:
    """Two scanners' own headers are understood as they are."""
    body = read_source(BODY.glob("*.dcm"))
    head = read_source(HEAD.glob("*.dcm"))

    assert (body.repairs, head.repairs) == ((), ())
    assert (len(body.instances), len(head.instances)) == (20, 28)
    assert body.requests[0]["RequestedProcedureID"] == "30543134"
    assert head.attributes["StudyDescription"] == "1A TRAUMA/PLAIN HEAD DM"


def test_the_order_of_the_files_does_not_matter(tmp_path: Path) -> None:
    """Patient and study come from the lowest UID, whatever is read first."""
    paths = write(tmp_path, [ct_header(2, PatientSex="M"), ct_header(1, PatientSex="F")])

    assert read_source(paths) == read_source(reversed(paths))
    assert read_source(paths).attributes["PatientSex"] == "F"


FAULTS = [
    ("PatientSex", "CS", "U", "", Action.EMPTIED),
    ("PatientSex", "CS", "m", "M", Action.REPLACED),
    ("PatientBirthDate", "DA", "00000000", "", Action.EMPTIED),
    ("PatientBirthDate", "DA", "1970.01.31", "19700131", Action.REPLACED),
    ("PatientID", "LO", "x" * 65, "", Action.EMPTIED),
    ("PatientID", "LO", "one\\two", "", Action.EMPTIED),
    ("StudyTime", "TM", "25:00:00", "", Action.EMPTIED),
    ("AccessionNumber", "SH", "a" * 17, "", Action.EMPTIED),
    ("PatientName", "PN", "A^B^C^D^E^F", "", Action.EMPTIED),
    ("StudyDescription", "LO", "x" * 65, None, Action.DROPPED),
    ("PatientAge", "AS", "old", None, Action.DROPPED),
    ("TimezoneOffsetFromUTC", "SH", "CET", None, Action.DROPPED),
]


@pytest.mark.parametrize(("keyword", "vr", "value", "written", "action"), FAULTS)
def test_an_invalid_attribute_is_emptied_dropped_or_replaced(
    tmp_path: Path, keyword: str, vr: str, value: str, written: str | None, action: Action
) -> None:
    """Type 2 is emptied, Type 3 dropped, and a certain meaning written in today's form; each is listed."""
    source = read_source(write(tmp_path, [_with_raw(ct_header(), keyword, vr, value.encode())]))

    assert source.attributes.get(keyword) == written
    assert source.repairs == (Repair(keyword, action),)


@pytest.mark.parametrize("keyword", ["PatientName", "PatientID", "StudyDate", "StudyID", "ReferringPhysicianName"])
def test_an_absent_type_2_attribute_is_supplied_empty(tmp_path: Path, keyword: str) -> None:
    """A missing Type 2 attribute stops nothing."""
    source = read_source(write(tmp_path, [ct_header(**{keyword: None})]))

    assert source.attributes[keyword] == ""
    assert source.repairs == (Repair(keyword, Action.SUPPLIED),)


def test_an_attribute_under_a_wrong_vr_is_not_believed(tmp_path: Path) -> None:
    """Patient ID as a sequence, Study Date as binary: emptied, and nothing raised."""
    header = ct_header()
    header.add_new(0x00080020, "US", 7)
    header.add_new(0x00100020, "SQ", [Dataset()])

    source = read_source(write(tmp_path, [header]))

    assert (source.attributes["PatientID"], source.attributes["StudyDate"]) == ("", "")
    assert {(repair.keyword, repair.action) for repair in source.repairs} == {
        ("PatientID", Action.EMPTIED),
        ("StudyDate", Action.EMPTIED),
    }


def test_private_junk_is_neither_copied_nor_repaired(tmp_path: Path) -> None:
    """Blocks without creator, rubbish under VR UN, and a private sequence without items."""
    clean = tmp_path / "clean"
    clean.mkdir()
    header = ct_header()
    header.add_new(0x00091001, "UN", bytes(range(256)) * 16)
    header.add_new(0x00191002, "OB", b"\xff\xfe\x00\xe0")
    header.add_new(0x00211003, "SQ", [])

    source = read_source(write(tmp_path, [header]))

    assert source.repairs == ()
    assert source.attributes == read_source(write(clean, [ct_header()])).attributes


def test_a_string_under_vr_un_is_read_by_its_dictionary_vr(tmp_path: Path) -> None:
    """UN is what a node without the dictionary writes; the text is still there."""
    source = read_source(write(tmp_path, [_with_raw(ct_header(), "PatientID", "UN", b"P-77")]))

    assert (source.attributes["PatientID"], source.repairs) == ("P-77", ())


def test_an_item_of_a_sequence_may_have_its_own_character_set(tmp_path: Path) -> None:
    """PS3.5 7.5.3: an order typed on another system than the name."""
    request = Dataset()
    request.SpecificCharacterSet = "GB18030"
    request.RequestedProcedureDescription = "胸部CT"
    header = ct_header(SpecificCharacterSet="ISO_IR 100", PatientName="Müller", RequestAttributesSequence=[request])

    source = read_source(write(tmp_path, [header]))

    assert source.attributes["PatientName"] == "Müller"
    assert source.requests[0]["RequestedProcedureDescription"] == "胸部CT"
    assert source.repairs == ()


def test_undeclared_text_is_read_by_the_configured_default_and_listed(tmp_path: Path) -> None:
    """8-bit bytes under no character set are flagged, not silently guessed."""
    header = ct_header(SpecificCharacterSet=None)
    paths = write(tmp_path, [_with_raw(header, "PatientName", "PN", "Łukasz".encode("iso8859-2"))])

    source = read_source(paths, default_charset="ISO_IR 101")

    assert source.attributes["PatientName"] == "Łukasz"
    assert source.repairs == (Repair("PatientName", Action.ASSUMED),)


def test_an_unknown_default_charset_is_refused() -> None:
    """A wrong setting is named, not worked round."""
    with pytest.raises(ValueError, match="default_charset 'latin'"):
        read_source([], default_charset="latin")


def test_missing_class_and_instance_uid_are_taken_from_the_meta_header(tmp_path: Path) -> None:
    """The Type 1 identifiers stand twice in a file."""
    (path,) = write(tmp_path, [ct_header(SOPClassUID=None, SOPInstanceUID=None)])

    (instance,) = read_source([path]).instances

    assert (instance.sop_class_uid, instance.sop_instance_uid) == (CTImageStorage, "2.25.2000")


def test_an_invalid_uid_stays_as_it_is(tmp_path: Path) -> None:
    """A result under a corrected Study Instance UID would be filed with another study."""
    source = read_source(write(tmp_path, [_with_raw(ct_header(), "StudyInstanceUID", "UI", b"1.2.03.4")]))

    assert source.study_uid == "1.2.03.4"
    assert source.repairs == (Repair("StudyInstanceUID", Action.KEPT_INVALID),)
    assert "1.2.03.4" in source.uids


def test_patient_identity_removed_names_a_method(tmp_path: Path) -> None:
    """The copied YES needs its Type 1C companion."""
    source = read_source(write(tmp_path, [ct_header(PatientIdentityRemoved="YES")]))

    assert source.attributes["DeidentificationMethod"] == "Not stated by the source"


def test_two_studies_are_never_one_source(tmp_path: Path) -> None:
    """One report is about one study."""
    paths = write(tmp_path, [ct_header(1), ct_header(2, StudyInstanceUID="2.25.22")])

    with pytest.raises(SourceError, match="2 Study Instance UIDs"):
        read_source(paths)


def test_files_that_are_no_dicom_are_counted(tmp_path: Path) -> None:
    """A broken header costs its instance, not the report."""
    (tmp_path / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 40)
    paths = write(tmp_path, [ct_header()])

    source = read_source([*paths, tmp_path / "broken.dcm"])

    assert (len(source.instances), source.unreadable_headers) == (1, 1)


def test_nothing_readable_is_said_by_number(tmp_path: Path) -> None:
    """The refusal holds a count, no name and no path."""
    (tmp_path / "Smith^John.dcm").write_bytes(b"nothing")

    with pytest.raises(SourceError, match="none of 1 instances has a readable header"):
        read_source([tmp_path / "Smith^John.dcm"])


def test_a_second_copy_of_an_instance_counts_once(tmp_path: Path) -> None:
    """The same UID with other bytes is one piece of evidence."""
    paths = write(tmp_path, [ct_header(1), ct_header(1, PatientSex="M")])

    assert len(read_source(paths).instances) == 1


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "JPEG2000.dcm",
        "image_dfl.dcm",
        "SC_rgb_small_odd.dcm",
        "rtplan.dcm",
        "empty_charset_LEI.dcm",
        "DICOMDIR-empty.dcm",
        "no_meta.dcm",
    ],
)
def test_other_peoples_files_give_a_source_or_a_reason(name: str) -> None:
    """Any object of pydicom's collection is read or refused, never a fault."""
    path = get_testdata_file(name, download=False)

    try:
        source = read_source([Path(str(path))])
    except SourceError:
        assert not dcmread(str(path), force=True).get("StudyInstanceUID") or name == "no_meta.dcm"
    else:
        assert source.study_uid


@pytest.mark.hostile
@pytest.mark.parametrize("folder", [BODY, HEAD], ids=["body", "head"])
def test_damaged_headers_give_a_source_or_a_reason(tmp_path: Path, folder: Path) -> None:
    """Whatever bytes of a real header are overwritten, nothing else than SourceError comes out."""
    header = next(iter(sorted(folder.glob("*.dcm")))).read_bytes()[:6000]
    random = Random(20261123)
    path = tmp_path / "damaged.dcm"
    outcomes = Counter[str]()

    for _ in range(300):
        damaged = bytearray(header)
        for _ in range(random.randint(1, 12)):
            place = random.randrange(132, len(damaged) - 2)
            damaged[place : place + 2] = random.choice((random.randbytes(2), random.randbytes(5), b"\xff\xff", b"SQ"))
        path.write_bytes(damaged)
        try:
            outcomes["read"] += bool(read_source([path]).study_uid)
        except SourceError:
            outcomes["refused"] += 1

    assert outcomes["read"] + outcomes["refused"] == 300
    assert min(outcomes.values()) > 10


def test_a_disk_that_fails_is_not_a_header_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file is a fault to be retried, not an instance to be left out."""
    with pytest.raises(FileNotFoundError):
        read_source([tmp_path / "gone.dcm"])


def _with_raw(header: Dataset, keyword: str, vr: str, value: bytes) -> Dataset:
    """`header` with the bytes of one element as a scanner might send them, right or wrong."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    tag = Tag(tag_for_keyword(keyword) or 0)
    padded = value + b" " * (len(value) % 2)
    header[tag] = RawDataElement(tag, vr, len(padded), padded, 0, False, True)
    return header
