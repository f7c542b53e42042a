"""workers.preprocess: windows, sampling, the record of both, and the way back to source pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.shared.messages import SliceOperation, SourceState
from service.shared.settings import SeriesSettings
from tests.odd_series import write_changed
from tests.phantom_series import PhantomSeries
from workers.headers import read_headers
from workers.preprocess import Prepared, prepare, sample, to_grey, token_affine
from workers.volume import Volume, load

REAL = Path(__file__).parents[2] / "data" / "real-ct"


def volume_of(paths: list[Path]) -> Volume:
    return load(read_headers(paths), SeriesSettings(decode_memory_gb=2))


def prepared(volume: Volume, max_slices: int = 85) -> Prepared:
    return prepare(volume, SeriesSettings(max_slices=max_slices))


@pytest.mark.parametrize(
    ("hu", "red_green_blue"),
    [
        (-3000, (0, 0, 0)),
        (-1024, (0, 0, 0)),
        (-135, (111, 0, 0)),  # 889 / 2048 * 255 = 110.7
        (0, (128, 98, 0)),  # 127.5 and 98.36; halves go to even
        (40, (132, 128, 128)),  # 132.5, 127.5, 127.5
        (80, (137, 157, 255)),
        (215, (154, 255, 255)),
        (1024, (255, 255, 255)),
        (3071, (255, 255, 255)),
    ],
)
def test_ct_windows_are_those_of_medgemma(tmp_path: Path, hu: int, red_green_blue: tuple[int, int, int]) -> None:
    """Wide, soft tissue and brain window stand in red, green and blue, each from 0 to 255."""

    def paint(_: int, dataset: object) -> None:
        pixels = np.zeros((64, 64), "<i2")
        pixels[32, 32] = hu
        dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 1, 16, 15  # type: ignore[attr-defined]
        dataset.RescaleIntercept = 0  # type: ignore[attr-defined]
        pixels[0, 0] = 5  # so that the volume is never constant
        dataset.PixelData = pixels.tobytes()  # type: ignore[attr-defined]

    pixels = prepared(volume_of(write_changed(PhantomSeries(slices=8), tmp_path, paint))).pixels

    assert pixels.dtype == np.uint8
    assert tuple(pixels[3, 32, 32].tolist()) == red_green_blue


def test_real_ct_becomes_images_of_its_own_size() -> None:
    """The body CT gives twenty RGB images of 512 x 512, all shown, each a picture of its own slice."""
    volume = volume_of(sorted((REAL / "body-siemens").glob("*.dcm")))

    made = prepared(volume)

    assert made.pixels.shape == (20, 512, 512, 3)
    assert [entry.source_instances for entry in made.inputs] == [(i,) for i in range(20)]
    assert [entry.position_mm for entry in made.inputs] == volume.positions_mm.tolist()
    assert {entry.operation for entry in made.inputs} == {SliceOperation.SINGLE}
    assert [(s.state, s.input_index) for s in made.sources] == [(SourceState.SHOWN, i) for i in range(20)]
    assert np.array_equal(made.pixels[7, ..., 1], to_grey(volume.voxels[7], -135, 215))
    assert made.applied["windows"] == [[-1024, 1024], [-135, 215], [0, 80]]


def test_sampled_out_slices_stand_in_the_record(tmp_path: Path) -> None:
    """Of twelve slices five are shown, the first and the last among them; the others are in no input."""
    series = PhantomSeries(slices=12)
    volume = volume_of(series.write(tmp_path))

    made = prepared(volume, max_slices=5)

    shown = [i for i, source in enumerate(made.sources) if source.state == SourceState.SHOWN]
    assert shown == [0, 3, 6, 8, 11]
    assert [made.sources[i].input_index for i in shown] == [0, 1, 2, 3, 4]
    assert {made.sources[i].state for i in range(12) if i not in shown} == {SourceState.SAMPLED_OUT}
    assert np.array_equal(made.pixels[3, ..., 2], to_grey(volume.voxels[8], 0, 80))
    assert made.applied["max_slices"] == 5


def test_unreadable_and_repeated_images_keep_their_state(tmp_path: Path) -> None:
    """Sampling changes nothing of what loading found, and inputs point past it."""

    def empty(index: int, dataset: object) -> None:
        if index == 4:
            dataset.PixelData = b""  # type: ignore[attr-defined]

    made = prepared(volume_of(write_changed(PhantomSeries(slices=12), tmp_path, empty)))

    assert made.sources[7].state == SourceState.UNREADABLE
    assert [entry.source_instances[0] for entry in made.inputs] == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("slices", "at_most"), [(1, 85), (8, 85), (85, 85), (86, 85), (170, 85), (1000, 85), (9, 2), (3, 1)]
)
def test_sample_is_even_and_holds_both_ends(slices: int, at_most: int) -> None:
    """Distinct, in order, never more than allowed, no step longer than another by more than one slice."""
    chosen = sample(slices, at_most)

    steps = np.diff(chosen)
    assert len(chosen) == min(slices, at_most)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == 1 or (chosen[0], chosen[-1]) == (0, slices - 1)
    assert len(steps) == 0 or steps.max() - steps.min() <= 1


def test_mr_is_scaled_by_percentiles_and_grey(tmp_path: Path) -> None:
    """All three channels are alike; half a percent at either end is clipped, whatever the scale of the scanner."""

    def spread(index: int, dataset: object) -> None:
        ramp = np.linspace(100, 1100, 64 * 64)
        ramp[:4] = 4000  # a few bright voxels do not set the scale
        dataset.PixelData = ramp.astype("<u2").tobytes()  # type: ignore[attr-defined]

    volume = volume_of(write_changed(PhantomSeries(modality="MR"), tmp_path, spread))
    made = prepared(volume)

    assert np.array_equal(made.pixels[..., 0], made.pixels[..., 1])
    assert np.array_equal(made.pixels[..., 0], made.pixels[..., 2])
    low, high = made.applied["windows"][0]
    assert (low, high) == (pytest.approx(106, abs=2), pytest.approx(1096, abs=2))
    middle = made.pixels[0, 32, 0, 0]
    assert middle == pytest.approx(127.5, abs=1.5)
    assert made.pixels[0, 0, 0, 0] == 255


def test_mostly_black_mr_is_still_shown(tmp_path: Path) -> None:
    """Where the percentiles meet, the darkest and brightest voxel set the scale."""

    def dot(_: int, dataset: object) -> None:
        pixels = np.zeros(64 * 64, "<u2")
        pixels[2000] = 900
        dataset.PixelData = pixels.tobytes()  # type: ignore[attr-defined]

    made = prepared(volume_of(write_changed(PhantomSeries(modality="MR"), tmp_path, dot)))

    assert made.applied["windows"][0] == [0.0, 900.0]
    assert made.pixels[0].reshape(-1, 3)[2000].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("rows", "columns", "grid"), [(512, 512, 16), (64, 192, 8), (300, 200, 6)])
def test_token_centre_is_where_the_stretched_image_has_it(rows: int, columns: int, grid: int) -> None:
    """A mark at the source pixel of a token's centre lands in that token after the processor's stretch."""
    affine = token_affine(rows, columns, grid, grid)
    for token in (0, grid + 1, grid * grid - 1, grid * grid // 2):
        x, y = affine @ (token % grid + 0.5, token // grid + 0.5, 1)
        image = np.zeros((rows, columns), np.uint8)
        image[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2] = 255

        side = grid * 14
        stretched = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR), float)

        cells = stretched.reshape(grid, 14, grid, 14).sum(axis=(1, 3)).ravel()
        assert int(cells.argmax()) == token


def test_tokens_of_a_turned_series_point_into_the_frame_as_it_was_stored(tmp_path: Path) -> None:
    """For a prone series the first token of each input is the last corner of the source frame."""

    def prone(_: int, dataset: object) -> None:
        dataset.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]  # type: ignore[attr-defined]

    made = prepared(volume_of(write_changed(PhantomSeries(), tmp_path, prone)))
    affines = made.source_pixels_from_token(8, 8)

    assert affines.shape == (12, 2, 3)
    assert (affines[5] @ (0.5, 0.5, 1)).tolist() == [60.0, 60.0]
    assert (affines[5] @ (7.5, 0.5, 1)).tolist() == [4.0, 60.0]
