"""The three channels of the demonstration model."""

from __future__ import annotations

import numpy as np
import pytest

from workers.demo_model.channels import (
    BLOB_FULL_HU,
    USUAL_VOXEL_MM,
    area_matrix,
    blobs,
    ct_images,
    mr_images,
    slab_bounds,
    to_halves,
    to_slabs,
    voxel_of_halves,
)

LUNG = -850
STEP_HU = 1100 / 255  # of the blob channel


def stack(halves: int = 14) -> np.ndarray:
    return np.full((halves, 60, 60), LUNG, np.float32)


def tube(hu: np.ndarray, direction: tuple[float, float, float], radius_mm: float) -> np.ndarray:
    """A vessel through the middle of the stack."""
    places = [(np.arange(size) - size // 2) * step for size, step in zip(hu.shape, USUAL_VOXEL_MM, strict=True)]
    at = np.stack(np.meshgrid(*places, indexing="ij"), axis=-1)
    along = np.asarray(direction) / np.linalg.norm(direction)
    away = np.linalg.norm(at - (at @ along)[..., None] * along, axis=-1)
    return np.where(away < radius_mm, 30, hu).astype(np.float32)


def test_round_thing_is_a_blob() -> None:
    """A dense ball in one half of a slab stands out by its contrast."""
    hu = stack()
    hu[6, 30:33, 30:33] = 30

    assert blobs(hu, USUAL_VOXEL_MM)[6, 31, 31] == pytest.approx(30 - LUNG, abs=STEP_HU)
    assert not blobs(hu, USUAL_VOXEL_MM)[6, :25].any()


@pytest.mark.parametrize(
    "direction", [(0, 1, 0), (0, 0, 1), (0, 1, 2), (1, 0, 0), (1, 1, 1), (2, 1, 0), (1, 0, -2), (3, 2, 1)]
)
def test_long_thing_is_no_blob_whichever_way_it_runs(direction: tuple[float, float, float]) -> None:
    """A vessel that crosses a slab slantwise is as short there as a nodule; in space it is long."""
    found = blobs(tube(stack(), direction, 4), USUAL_VOXEL_MM)

    assert found[3:11, 15:45, 15:45].max() < 0.3 * (30 - LUNG)


def test_wall_is_no_blob() -> None:
    """The chest wall, the heart and the diaphragm vanish."""
    hu = stack()
    hu[:, 40:] = 30
    hu[9:] = 30

    assert not blobs(hu, USUAL_VOXEL_MM).any()


def test_thick_slices_leave_lines_within_a_slice() -> None:
    """With 40 mm from slice to slice nothing is known of what goes on between them."""
    hu = stack(6)
    hu[2, 30:33, 5:55] = 30
    hu[3, 30:33, 30:33] = 30

    found = blobs(hu, (40.0, 3.1, 3.1))

    assert not found[2].any()
    assert found[3, 31, 31] > 800


def test_thin_thing_is_no_blob() -> None:
    """One pixel is noise or a small vessel."""
    hu = stack()
    hu[6, 30, 30] = 30

    assert not blobs(hu, USUAL_VOXEL_MM).any()


def test_slabs_share_the_stack_evenly() -> None:
    """Every slice is in one slab; sizes differ by one at most."""
    sizes = np.diff(slab_bounds(61, 24))

    assert sizes.sum() == 61
    assert set(sizes) <= {2, 3}


def test_short_series_keeps_its_slices() -> None:
    """Fewer slices than slabs: each is its own."""
    assert (np.diff(slab_bounds(9, 24)) == 1).all()


@pytest.mark.parametrize("size", [512, 120, 100, 77])
def test_area_weights_sum_to_one(size: int) -> None:
    """Averaging keeps a constant a constant, whatever the size."""
    assert area_matrix(size, 120).sum(axis=1) == pytest.approx(np.ones(120), abs=1e-5)


def test_slab_is_the_mean_of_its_slices() -> None:
    """Nothing is dropped: every source voxel counts."""
    hu = np.random.default_rng(0).normal(0, 100, (48, 240, 240)).astype(np.float32)

    made = to_slabs(to_halves(hu))

    assert made.shape == (24, 120, 120)
    assert made == pytest.approx(hu.reshape(24, 2, 120, 2, 120, 2).mean(axis=(1, 3, 5)), abs=1e-3)


def test_odd_slab_is_halved_through_its_middle_slice() -> None:
    """Both halves are as long; together they are still the mean."""
    hu = np.arange(9, dtype=np.float32)[:, None, None] * np.ones((9, 4, 4), np.float32)

    halves = to_halves(hu, 3, 4)

    assert halves[:2, 0, 0] == pytest.approx([(0 + 0.5) / 1.5, (0.5 + 2) / 1.5])
    assert to_slabs(halves)[:, 0, 0] == pytest.approx([1, 4, 7])


def test_slab_of_one_slice_is_its_own_halves() -> None:
    """A short series has nothing finer."""
    halves = to_halves(np.arange(5, dtype=np.int16)[:, None, None] * np.ones((5, 4, 4), np.int16), 24, 4)

    assert halves[:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_voxel_of_halves_covers_what_the_source_covers() -> None:
    """As many mm in all, along each axis; where nobody knows them, those of a usual chest."""
    assert voxel_of_halves((1.25, 0.7, 0.7), (240, 512, 512), (48, 120, 120)) == pytest.approx(
        (6.25, 2.99, 2.99), abs=0.01
    )
    assert voxel_of_halves((0.0, 0.7, 0.7), (240, 512, 512), (48, 120, 120)) == USUAL_VOXEL_MM
    assert voxel_of_halves((float("nan"), 0.7, 0.7), (9, 512, 512), (18, 120, 120)) == USUAL_VOXEL_MM


def test_ct_channels_are_wide_soft_and_blob() -> None:
    """Red and green are windows, blue is the blob channel."""
    hu = stack()
    hu[:, :5] = hu[:, -5:] = hu[:, :, :5] = hu[:, :, -5:] = 30
    hu[6:8, 30:33, 30:33] = LUNG + BLOB_FULL_HU + STEP_HU

    images = ct_images(hu, USUAL_VOXEL_MM)

    assert images.dtype == np.uint8
    assert images.shape == (7, 60, 60, 3)
    assert images[3, 31, 31, 2] == 255
    assert images[0, 10, 10].tolist() == [round((LUNG + 1024) / 2048 * 255), 0, 0]


def test_mr_channels_are_alike() -> None:
    """MR has no HU: one scaled channel, three times."""
    images = mr_images(np.random.default_rng(0).integers(0, 900, (4, 20, 20)).astype(np.int16))

    assert (images[..., 0] == images[..., 2]).all()
    assert images.max() == 255


def test_calcium_shines_in_the_third_channel_though_bone_and_soft_tissue_saturate_the_second() -> None:
    """What no window tells from bone is told by density: a plaque in the aorta beside the spine."""
    hu = np.full((10, 60, 60), 40, np.float32)
    hu[:, 10:40, 10:40] = 330
    hu[4:6, 20:23, 20:23] = 900
    images = ct_images(hu, USUAL_VOXEL_MM)

    assert images[2, 21, 21, 1] == images[2, 30, 30, 1] == 255
    assert images[2, 21, 21, 2] == 255
    assert not images[2, 30, 30, 2]
