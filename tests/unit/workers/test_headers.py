"""workers.headers: what is read of a file before its pixels, whatever the file holds."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from tests.odd_series import write_changed, write_enhanced
from tests.phantom_series import PhantomSeries
from workers import headers
from workers.headers import read_headers

REAL = Path(__file__).parents[2] / "data" / "real-ct"


def test_header_of_a_real_slice_holds_its_geometry_and_scale() -> None:
    """Position, orientation, spacing and rescale of the Siemens body CT come out as the scanner wrote them."""
    (header,) = read_headers([REAL / "body-siemens" / "267.dcm"])

    assert header.position == (-249.51171875, -437.51171875, -766.5)
    assert header.orientation == (1, 0, 0, 0, 1, 0)
    assert header.pixel_spacing == (0.9765625, 0.9765625)
    assert (header.rescale_slope, header.rescale_intercept, header.rescale_type) == (1, -1024, "HU")
    assert (header.modality, header.rows, header.columns, header.bits_stored) == ("CT", 512, 512, 12)
    assert header.transfer_syntax_uid == "1.2.840.10008.1.2.4.90"


def test_enhanced_object_gives_one_header_per_frame(tmp_path: Path) -> None:
    """Each frame has the position and rescale of its own group, and the spacing of the shared one."""
    path = write_enhanced(PhantomSeries(slices=3), tmp_path / "enhanced.dcm", volumes=2)

    frames = read_headers([path])

    assert [frame.frame_number for frame in frames] == [1, 2, 3, 4, 5, 6]
    assert [(frame.position or ())[2] for frame in frames] == [0, 5, 10, 0, 5, 10]
    assert [frame.rescale_intercept for frame in frames] == [-1024, -1025, -1026] * 2
    assert [frame.temporal_position for frame in frames] == [1, 1, 1, 2, 2, 2]
    assert {frame.pixel_spacing for frame in frames} == {(5.0, 5.0)}
    assert {frame.image_type for frame in frames} == {("ORIGINAL", "PRIMARY", "VOLUME", "NONE")}


@pytest.mark.parametrize(
    ("keyword", "field", "raw"),
    [
        ("ImagePositionPatient", "position", b"1\\2"),
        ("ImagePositionPatient", "position", b"1\\2\\nan "),
        ("ImagePositionPatient", "position", b"here  "),
        ("ImageOrientationPatient", "orientation", b"1\\0\\0\\1\\0\\0 "),
        ("ImageOrientationPatient", "orientation", b"2\\0\\0\\0\\1\\0 "),
        ("ImageOrientationPatient", "orientation", b""),
        ("PixelSpacing", "pixel_spacing", b"0\\0 "),
        ("RescaleSlope", "rescale_slope", b"one "),
        ("RescaleSlope", "rescale_slope", b"1e999 "),
        ("InstanceNumber", "instance_number", b"1.5 "),
        ("InstanceNumber", "instance_number", b"1\\2 "),
    ],
)
def test_malformed_value_is_none(tmp_path: Path, keyword: str, field: str, raw: bytes) -> None:
    """A value that cannot be what the Standard asks for is not understood, and says so by being None."""
    path = PhantomSeries(slices=1).write(tmp_path)[0]
    dataset = dcmread(path)
    tag = dataset[keyword].tag
    dataset[tag] = RawDataElement(Tag(tag), dataset[keyword].VR, len(raw), raw, 0, False, True)
    dataset.save_as(path)

    (header,) = read_headers([path])

    assert header.readable
    assert getattr(header, field) is None


def test_numbers_in_the_wrong_representation_are_read(tmp_path: Path) -> None:
    """Positions written as text of another VR are still positions."""
    path = PhantomSeries(slices=1).write(tmp_path)[0]
    dataset = dcmread(path)
    dataset.add_new("ImagePositionPatient", "LO", ["1", "2.5", "-3"])
    dataset.add_new("Rows", "IS", "64")
    dataset.save_as(path)

    (header,) = read_headers([path])

    assert header.position == (1, 2.5, -3)
    assert header.rows == 64


def test_file_that_is_no_dicom_is_counted_as_unreadable(tmp_path: Path) -> None:
    """Text, an empty file and a file that is gone each give one unreadable header, in the order asked."""
    (tmp_path / "text").write_text("Dear colleague, " * 100)
    (tmp_path / "empty").write_bytes(b"")
    good = PhantomSeries(slices=1).write(tmp_path)[0]

    found = read_headers([tmp_path / "text", tmp_path / "empty", tmp_path / "gone", good])

    assert [header.readable for header in found] == [False, False, False, True]


def test_patient_attributes_are_not_taken(tmp_path: Path) -> None:
    """Nothing that names the patient is in a header, so nothing of it can reach a log or a reason."""
    path = PhantomSeries(slices=1, patient_name="Planted^Name", patient_id="PLANTED-ID").write(tmp_path)[0]

    (header,) = read_headers([path])

    assert "lanted" not in repr(header).lower().replace(str(path).lower(), "")


def test_deflated_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deflated data set above the limit is unreadable without being unpacked in memory; a small one is read."""
    monkeypatch.setattr(headers, "MAX_INFLATED_BYTES", 2**20)
    small, bomb = tmp_path / "small.dcm", tmp_path / "bomb.dcm"
    dataset = PhantomSeries(slices=1).datasets()[0]
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    dataset.save_as(small, enforce_file_format=True)
    dataset.PixelData = bytes(8 * 2**20)
    dataset.save_as(bomb, enforce_file_format=True)

    found = read_headers([small, bomb])

    assert bomb.stat().st_size < 2**16
    assert [header.readable for header in found] == [True, False]


def test_broken_deflate_stream_is_unreadable(tmp_path: Path) -> None:
    """A deflated data set that does not unpack is unreadable, not an exception."""
    dataset = PhantomSeries(slices=1).datasets()[0]
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    path = tmp_path / "broken.dcm"
    dataset.save_as(path, enforce_file_format=True)
    content = path.read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    path.write_bytes(content[:start] + bytes(b ^ 0xFF for b in content[start:]))
    with pytest.raises(zlib.error):
        zlib.decompress(path.read_bytes()[start:], -15)

    assert not read_headers([path])[0].readable


@pytest.mark.hostile
@pytest.mark.parametrize("kind", ["classic", "enhanced", "implicit"])
def test_damaged_files_never_raise(tmp_path: Path, kind: str) -> None:
    """Three hundred files with random bytes changed or cut off give headers, never an exception."""
    if kind == "enhanced":
        path = write_enhanced(PhantomSeries(slices=2, rows=8, columns=8), tmp_path / "good.dcm")
    else:
        syntax = "1.2.840.10008.1.2" if kind == "implicit" else "1.2.840.10008.1.2.1"
        path = PhantomSeries(slices=1, rows=8, columns=8, transfer_syntax=syntax).write(tmp_path)[0]
    content = path.read_bytes()
    chance = random.Random(1)
    damaged = tmp_path / "damaged.dcm"
    for _ in range(300):
        changed = bytearray(content[: chance.choice((len(content), chance.randrange(132, len(content))))])
        for _ in range(chance.randrange(1, 30)):
            changed[chance.randrange(132, len(changed))] = chance.randrange(256)
        damaged.write_bytes(changed)

        assert len(read_headers([damaged])) >= 1


def test_empty_sequences_do_not_hide_the_instance(tmp_path: Path) -> None:
    """Empty functional groups leave the attributes of the instance itself."""

    def empty_groups(_: int, dataset: object) -> None:
        dataset.PerFrameFunctionalGroupsSequence = []  # type: ignore[attr-defined]
        dataset.SharedFunctionalGroupsSequence = []  # type: ignore[attr-defined]

    path = write_changed(PhantomSeries(slices=1), tmp_path, empty_groups)[0]

    (header,) = read_headers([path])

    assert header.frame_number is None
    assert header.position is not None
