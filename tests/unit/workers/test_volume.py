"""workers.volume: Hounsfield units in order and in standard orientation, and every fault recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import FileDataset
from pydicom.uid import JPEG2000Lossless

from service.shared.messages import Flag, SourceState
from service.shared.settings import SeriesSettings
from tests.image_headers import image
from tests.odd_series import write_changed, write_enhanced
from tests.phantom_series import PhantomSeries
from workers import decode as decoding
from workers.errors import Refusal, RefusalCode
from workers.headers import read_headers
from workers.volume import Volume, load, rescale

REAL = Path(__file__).parents[2] / "data" / "real-ct"
SETTINGS = SeriesSettings(decode_memory_gb=2)


def loaded(paths: list[Path], settings: SeriesSettings = SETTINGS) -> Volume:
    return load(read_headers(paths), settings)


def changed(tmp_path: Path, change: Callable[[int, FileDataset], None], **series: object) -> Volume:
    return loaded(write_changed(PhantomSeries(**series), tmp_path, change))  # type: ignore[arg-type]


def test_phantom_comes_back_in_hounsfield_units_from_head_to_feet(tmp_path: Path) -> None:
    """The voxels of a CT are those that were written, the head first, although they arrive feet first."""
    series = PhantomSeries(slices=12, slice_spacing_mm=4.0, pixel_spacing_mm=2.5)

    volume = loaded(series.write(tmp_path))

    assert volume.voxels.dtype == np.float32
    assert np.array_equal(volume.voxels, series.voxels()[::-1].astype(np.float32))
    assert volume.spacing_mm == (4.0, 2.5, 2.5)
    assert np.allclose(volume.positions_mm, np.arange(-44, 1, 4))
    assert [source.sop_instance_uid for source in volume.sources] == [series.instance_uid(i) for i in range(11, -1, -1)]
    assert volume.slice_sources == tuple(range(12))
    assert (volume.flags, volume.notes) == ((), ())
    assert (volume.modality, volume.series_uid) == ("CT", series.series_uid)


def test_real_body_ct_is_in_hounsfield_units() -> None:
    """Air around the Siemens body is near -1000 HU and its slices run from z = -766.5 to -804.5."""
    volume = loaded(sorted((REAL / "body-siemens").glob("*.dcm")))

    assert volume.voxels.shape == (20, 512, 512)
    assert volume.voxels[:, 2:10, 200:300].mean() == pytest.approx(-1000, abs=30)
    assert 30 < np.median(volume.voxels[volume.voxels > -200]) < 120
    assert np.allclose(volume.positions_mm, np.arange(766.5, 805, 2))
    assert volume.spacing_mm == (2.0, 0.9765625, 0.9765625)
    assert (volume.flags, volume.notes) == ((), ())


def test_real_head_is_turned_nowhere_and_runs_from_the_vertex() -> None:
    """The Philips head arrives feet first and is read from its top; its images are in standard orientation."""
    volume = loaded(sorted((REAL / "head-philips").glob("*.dcm")))

    assert volume.voxels.shape == (28, 512, 512)
    assert volume.positions_mm[0] == pytest.approx(-831.21)
    first = dcmread(REAL / "head-philips" / "028.dcm").pixel_array.astype(np.float32) - 1024
    assert np.array_equal(volume.voxels[0], first)


def test_enhanced_ct_uses_the_rescale_of_each_frame(tmp_path: Path) -> None:
    """Frames with intercepts of their own come out in HU by their own intercept, and as frames in the record."""
    series = PhantomSeries(slices=10)
    path = write_enhanced(series, tmp_path / "enhanced.dcm", transfer_syntax=JPEG2000Lossless)

    volume = loaded([path])

    expected = series.voxels().astype(np.float32) - np.arange(10, dtype=np.float32)[:, None, None]
    assert np.array_equal(volume.voxels, expected[::-1])
    assert [source.frame_number for source in volume.sources] == list(range(10, 0, -1))


def test_one_phase_of_an_enhanced_object_is_read(tmp_path: Path) -> None:
    """Of two temporal positions the first is read; frames of the other stand in the record as not used."""
    path = write_enhanced(PhantomSeries(slices=10), tmp_path / "enhanced.dcm", volumes=2)

    volume = loaded([path])

    assert [volume.sources[i].frame_number for i in volume.slice_sources] == list(range(10, 0, -1))
    assert [s.state for s in volume.sources[10:]] == [SourceState.DUPLICATE] * 10
    assert volume.flags == (Flag.DUPLICATE_POSITIONS,)
    assert volume.notes == (
        "The series holds several volumes at the same positions; one was read. Not read: 10 images of the others.",
    )


def test_enhanced_mr_is_read_frame_by_frame(tmp_path: Path) -> None:
    """Ten frames of one instance, in the order of their positions."""
    path = write_enhanced(PhantomSeries(modality="MR", slices=10), tmp_path / "enhanced.dcm")

    volume = loaded([path])

    assert volume.voxels.shape[0] == 10
    assert [source.frame_number for source in volume.sources] == list(range(10, 0, -1))


def test_private_junk_changes_no_voxel(tmp_path: Path) -> None:
    """Blocks without creator, rubbish under VR UN, and a private sequence without items."""

    def add_junk(index: int, dataset: FileDataset) -> None:
        dataset.add_new(0x00091001, "UN", bytes(range(256)) * 16)
        dataset.add_new(0x00190010, "LO", "")
        dataset.add_new(0x00191002, "OB", b"\xff\xfe\x00\xe0" * (index + 1))
        dataset.add_new(0x00211003, "SQ", [])

    volume = changed(tmp_path, add_junk)

    assert np.array_equal(volume.voxels, PhantomSeries().voxels()[::-1].astype(np.float32))
    assert volume.flags == ()


def test_mr_keeps_its_values(tmp_path: Path) -> None:
    """Stored values of MR without a rescale are the values."""
    series = PhantomSeries(modality="MR")

    assert np.array_equal(loaded(series.write(tmp_path)).voxels, series.voxels()[::-1].astype(np.float32))


def test_missing_slice_is_flagged_with_its_place(tmp_path: Path) -> None:
    """A gap is said in the images' own numbers."""
    volume = loaded(PhantomSeries(gap_after=5).write(tmp_path))

    assert volume.flags == (Flag.MISSING_SLICES,)
    assert volume.notes == ("Slices are missing: 10.0 mm between images 7 and 6, where 5.0 mm is usual.",)


def test_duplicate_position_is_used_once(tmp_path: Path) -> None:
    """Of two images at one position one is used; the gap that the other left is seen as well."""
    series = PhantomSeries(duplicate_position=4)

    volume = loaded(series.write(tmp_path))

    duplicate = [source for source in volume.sources if source.state == SourceState.DUPLICATE]
    assert [source.sop_instance_uid for source in duplicate] == [series.instance_uid(5)]
    assert len(volume.voxels) == 11
    assert volume.flags == (Flag.MISSING_SLICES, Flag.DUPLICATE_POSITIONS)


def test_gantry_tilt_is_flagged(tmp_path: Path) -> None:
    """Sheared slices are read as they are, and it is said."""
    volume = loaded(PhantomSeries(tilt_degrees=15).write(tmp_path))

    assert volume.flags == (Flag.GANTRY_TILT,)
    assert volume.notes == ("The slices are tilted by 15.0 degrees against their stack; not corrected.",)


def test_stray_orientation_is_recorded_as_unreadable(tmp_path: Path) -> None:
    """One coronal image in twelve is no part of the stack and stands at the end of the record with its reason."""
    volume = loaded(PhantomSeries(mixed_orientation=True).write(tmp_path))

    assert len(volume.voxels) == 11
    assert volume.sources[-1].state == SourceState.UNREADABLE
    assert volume.sources[-1].reason == "other orientation or size than the series"
    assert volume.notes == (
        "Not part of the stack: 1 object of the series (1 x other orientation or size than the series).",
    )


def test_unreadable_slice_is_flagged_and_the_rest_read(tmp_path: Path) -> None:
    """A slice without pixels leaves a gap, a reason and eleven slices in their places."""

    def empty(index: int, dataset: FileDataset) -> None:
        if index == 4:
            dataset.PixelData = b""

    series = PhantomSeries(slices=12)
    volume = changed(tmp_path, empty)

    assert np.array_equal(volume.voxels, np.delete(series.voxels(), 4, axis=0)[::-1].astype(np.float32))
    assert volume.sources[7].state == SourceState.UNREADABLE
    assert volume.sources[7].reason == "no pixel data"
    assert volume.sources[7].position_mm == -20
    assert volume.slice_sources == (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11)
    assert volume.flags == (Flag.MISSING_SLICES, Flag.UNREADABLE_SLICES)
    assert volume.notes[1] == "1 image could not be decoded: 1 x no pixel data."


def test_second_copy_of_a_slice_stands_in_for_a_broken_one(tmp_path: Path) -> None:
    """An instance that came twice, once broken, is read from the copy that can be read."""
    series = PhantomSeries(slices=12)

    def empty(index: int, dataset: FileDataset) -> None:
        if index == 4:
            dataset.PixelData = b""

    broken = write_changed(series, tmp_path / "a", empty)
    whole = series.write(tmp_path / "b")[4]

    volume = loaded([*broken, whole])

    assert np.array_equal(volume.voxels, series.voxels()[::-1].astype(np.float32))
    assert [source.state for source in volume.sources[7:9]] == [SourceState.SAMPLED_OUT, SourceState.UNREADABLE]
    assert Flag.MISSING_SLICES not in volume.flags


def test_too_few_readable_slices_are_refused_with_the_count(tmp_path: Path) -> None:
    """Eight slices are asked for; with five of twelve broken the refusal says how many could be read, and why."""

    def empty(index: int, dataset: FileDataset) -> None:
        if index % 2:
            dataset.PixelData = b""

    with pytest.raises(Refusal) as refused:
        changed(tmp_path, empty)

    assert refused.value.code == RefusalCode.TOO_FEW_SLICES
    assert refused.value.reason.startswith("6 of 12 slices could be decoded (6 x no pixel data); ")


def test_gap_left_by_unreadable_slices_is_refused(tmp_path: Path) -> None:
    """Seven neighbours of thirty that cannot be read leave 40 mm unseen, which series.max_gap_mm forbids."""

    def empty(index: int, dataset: FileDataset) -> None:
        if 10 <= index < 17:
            dataset.PixelData = b""

    with pytest.raises(Refusal, match=r"a gap of 40 mm in the stack, series\.max_gap_mm allows 30") as refused:
        changed(tmp_path, empty, slices=30)

    assert refused.value.code == RefusalCode.MISSING_SLICES


def test_ct_without_rescale_is_refused(tmp_path: Path) -> None:
    """Stored values of CT are not shown as HU."""
    with pytest.raises(Refusal) as refused:
        loaded(PhantomSeries(rescale=False).write(tmp_path))

    assert refused.value.code == RefusalCode.NO_HOUNSFIELD_UNITS


@pytest.mark.parametrize("slope", [1, 1e38])
def test_volume_without_content_is_refused(tmp_path: Path, slope: float) -> None:
    """A constant volume, and one whose values are not finite, are not read."""

    def flatten(index: int, dataset: FileDataset) -> None:
        value = 7 if slope == 1 else 1000 + index
        dataset.PixelData = np.full(64 * 64, value, "<u2").tobytes()
        dataset.RescaleSlope = f"{slope:g}"

    with pytest.raises(Refusal) as refused:
        changed(tmp_path, flatten)

    assert refused.value.code == RefusalCode.NO_CONTENT


def test_size_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that promises more voxels than a worker holds is refused without a decoder being started."""
    monkeypatch.setattr(decoding, "MAX_VOXELS", 12 * 64 * 64 - 1)
    monkeypatch.setattr(decoding.sys, "executable", "/nonexistent")

    with pytest.raises(Refusal) as refused:
        loaded(PhantomSeries().write(tmp_path))

    assert refused.value.code == RefusalCode.TOO_LARGE


@pytest.mark.parametrize(
    ("representation", "padding", "limit", "stored"),
    [
        (0, 0, None, [0, 1, 1024, 4095]),
        (1, -2000, None, [-2000, -1999, 0, 5]),
        (1, 63536, None, [-2000, -1999, 0, 5]),  # the same, written in the VR of the other sign
        (1, -2000, -1900, [-1950, -1899, 0, 5]),
    ],
)
def test_padding_outside_the_circle_is_air(
    representation: int, padding: int, limit: int | None, stored: list[int]
) -> None:
    """Pixels at the padding value, or in its range, are air; their neighbours keep their value."""
    header = image(
        0,
        bits_stored=16,
        pixel_representation=representation,
        pixel_padding_value=padding,
        pixel_padding_range_limit=limit,
        rescale_intercept=0.0,
    )

    values = rescale(np.array([stored], np.int32), header)

    assert values.tolist() == [[-1024, *stored[1:]]]


def test_padding_of_mr_is_as_dark_as_its_darkest_pixel() -> None:
    """MR has no air value, so padding takes the lowest value of its slice."""
    header = image(
        0, modality="MR", rescale_slope=None, rescale_intercept=None, bits_stored=16, pixel_padding_value=65535
    )

    values = rescale(np.array([[65535, 12, 700]], np.int32), replace(header, pixel_representation=0))

    assert values.tolist() == [[12, 12, 700]]


@pytest.mark.parametrize(
    ("representation", "stored", "expected"),
    [(0, [0, 100, 4095], [4095, 3995, 0]), (1, [-2048, 0, 2047], [2047, -1, -2048])],
)
def test_monochrome1_mr_is_inverted(representation: int, stored: list[int], expected: list[int]) -> None:
    """White tissue is bright to the model however the values were stored."""
    header = image(0, modality="MR", bits_stored=12, pixel_representation=representation, rescale_intercept=0.0)

    values = rescale(np.array([stored], np.int32), replace(header, photometric_interpretation="MONOCHROME1"))

    assert values.tolist() == [expected]


def test_monochrome1_ct_is_not_inverted() -> None:
    """HU are HU, however they are to be displayed."""
    header = image(0, bits_stored=12, pixel_representation=0, photometric_interpretation="MONOCHROME1")

    assert rescale(np.array([[1024, 2024]], np.int32), header).tolist() == [[0, 1000]]


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        ([1, 0, 0, 0, 1, 0], False),
        ([-1, 0, 0, 0, -1, 0], True),  # prone
        ([-1, 0, 0, 0, 1, 0], True),  # mirrored
        ([0, 1, 0, 1, 0, 0], True),  # transposed
        ([0, 1, 0, -1, 0, 0], True),  # on the side
        ([0, -1, 0, 1, 0, 0], True),
    ],
)
def test_left_stays_left_however_the_images_were_stored(tmp_path: Path, orientation: list[int], turned: bool) -> None:
    """A mark on the patient's left and front is at one place of the volume, and its source pixel is found again."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    marks: dict[int, tuple[int, int]] = {}

    def turn(index: int, dataset: FileDataset) -> None:
        # Patient x = 40 mm (left), y = -30 mm (front) on a frame of 48 x 64 pixels of 2 x 3 mm around (0, 0).
        dataset.Rows, dataset.Columns = 48, 64
        dataset.PixelSpacing = [2, 3]
        corner = -row * 3 * 31.5 - column * 2 * 23.5
        dataset.ImagePositionPatient = [*corner[:2].tolist(), 5.0 * index]
        dataset.ImageOrientationPatient = orientation
        offset = np.array([40.0, -30.0, 0.0]) - corner
        marks[index] = (int(np.rint(offset @ column / 2)), int(np.rint(offset @ row / 3)))
        pixels = np.zeros((48, 64), "<u2")
        pixels[marks[index]] = 3000
        dataset.PixelData = pixels.tobytes()

    volume = changed(tmp_path, turn)

    s, y, x = np.argwhere(volume.voxels > 1000)[0]
    height, width = volume.voxels.shape[1:]
    _, row_mm, column_mm = volume.spacing_mm
    assert (x + 0.5 - width / 2) * column_mm == pytest.approx(40, abs=2)
    assert (y + 0.5 - height / 2) * row_mm == pytest.approx(-30, abs=2)
    source = volume.source_from_voxel @ (x + 0.5, y + 0.5, 1)
    assert tuple(source) == (marks[int(s)][1] + 0.5, marks[int(s)][0] + 0.5)
    assert volume.orientation == pytest.approx((1, 0, 0, 0, 1, 0))
    assert bool(volume.notes) == turned
