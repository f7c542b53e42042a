"""Slices as grey pictures, decoded in a child."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from service.report.pixels import PixelLimits, SourceFrame, Wanted, read_frames
from tests.report_samples import BODY, HEAD

LIMITS = PixelLimits(memory_gb=4, timeout_s=60)


def frames(*wanted: Wanted, limits: PixelLimits = LIMITS) -> list[SourceFrame]:
    return list(read_frames(wanted, limits))


def test_an_uncompressed_slice_is_shown_by_its_own_window() -> None:
    """Grey 0 and 255 at the ends of the window; geometry from the header."""
    path = HEAD / "014.dcm"
    source = dcmread(path)

    (frame,) = frames((source.SOPInstanceUID, None, path))

    assert frame.grey is not None
    hu = source.pixel_array + float(source.RescaleIntercept)
    assert set(np.unique(frame.grey[hu <= 0])) == {0}  # window 40, 80
    assert set(np.unique(frame.grey[hu >= 80])) == {255}
    assert frame.spacing == (0.451171875, 0.451171875)
    assert frame.position == tuple(source.ImagePositionPatient)


def test_a_jpeg_2000_slice_is_decoded() -> None:
    """As the body CT of the demonstration is."""
    path = BODY / "270.dcm"

    (frame,) = frames(("1.2", None, path))

    assert frame.grey is not None
    assert frame.grey.shape == (512, 512)
    assert frame.grey.max() == 255


@pytest.fixture
def multi_frame(tmp_path: Path) -> Path:
    """Two frames of an enhanced image with functional groups."""
    header = dcmread(HEAD / "001.dcm")
    header.PixelData = np.stack([np.full((4, 4), 1024), np.full((4, 4), 1104)]).astype(np.uint16).tobytes()
    header.Rows = header.Columns = 4
    header.NumberOfFrames = 2
    del header.ImagePositionPatient
    groups = []
    for z in (0.0, 5.0):
        group, place = Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, z]
        group.PlanePositionSequence = [place]
        groups.append(group)
    header.PerFrameFunctionalGroupsSequence = groups
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path = tmp_path / "enhanced.dcm"
    header.save_as(path)
    return path


def test_frames_of_a_multi_frame_object_have_their_own_place(multi_frame: Path) -> None:
    """Frame numbers start at 1."""
    first, second = frames(("1.2", 1, multi_frame), ("1.2", 2, multi_frame))

    assert first.grey is not None
    assert second.grey is not None
    assert (int(first.grey[0, 0]), int(second.grey[0, 0])) == (0, 255)
    assert (first.position, second.position) == ((0.0, 0.0, 0.0), (0.0, 0.0, 5.0))


@pytest.mark.hostile
def test_what_cannot_be_decoded_costs_its_slice_only(tmp_path: Path) -> None:
    """Truncated pixels, no pixels, no DICOM: a frame without pixels, and the next one is there."""
    header = dcmread(HEAD / "001.dcm")
    header.PixelData = header.PixelData[:1000]
    header.save_as(tmp_path / "short.dcm")
    del header.PixelData
    header.save_as(tmp_path / "none.dcm")
    (tmp_path / "junk.dcm").write_bytes(b"junk")

    found = frames(
        *(("1.2", None, tmp_path / name) for name in ("short.dcm", "none.dcm", "junk.dcm")),
        ("1.3", None, HEAD / "001.dcm"),
    )

    assert [frame.grey is None for frame in found] == [True, True, True, False]


@pytest.mark.hostile
def test_a_frame_that_claims_to_be_huge_is_not_decoded(tmp_path: Path) -> None:
    """The size is checked before anything is allocated for it."""
    header = dcmread(HEAD / "001.dcm")
    header.Rows = header.Columns = 65535
    header.save_as(tmp_path / "bomb.dcm")

    (frame,) = frames(("1.2", None, tmp_path / "bomb.dcm"))

    assert frame.grey is None


@pytest.mark.hostile
def test_a_child_that_is_killed_leaves_frames_without_pixels() -> None:
    """Past its time limit nothing hangs and nothing is lost count of."""
    wanted = [(str(number), None, HEAD / "001.dcm") for number in range(3)]

    found = frames(*wanted, limits=PixelLimits(memory_gb=4, timeout_s=0.01))

    assert [frame.sop_instance_uid for frame in found] == ["0", "1", "2"]
    assert [frame.grey for frame in found] == [None, None, None]
