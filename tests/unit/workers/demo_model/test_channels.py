"""The three channels of the demonstration model."""

from __future__ import annotations

import numpy as np
import pytest

from workers.demo_model.channels import (
    BLOB_FULL_HU,
    area_matrix,
    blobs,
    ct_images,
    mr_images,
    slab_bounds,
    to_slabs,
)

LUNG = -850


def stack(slabs: int = 7) -> np.ndarray:
    return np.full((slabs, 60, 60), LUNG, np.int16)


def test_round_thing_is_a_blob() -> None:
    """A dense ball in one slab stands out by its contrast."""
    hu = stack()
    hu[3, 30:33, 30:33] = 30

    assert blobs(hu)[3, 31, 31] == 30 - LUNG
    assert not blobs(hu)[3, :25].any()


@pytest.mark.parametrize("turned", [False, True])
def test_long_thing_is_no_blob(turned: bool) -> None:
    """A thick vessel in the plane, or a wall, vanishes."""
    hu = stack()
    hu[3, 20:23, 5:55] = 30
    if turned:
        hu = hu.transpose(0, 2, 1).copy()

    assert not blobs(hu).any()


def test_thing_along_the_stack_is_no_blob() -> None:
    """A vessel through several slabs vanishes."""
    hu = stack()
    hu[1:6, 30:33, 30:33] = 30

    assert not blobs(hu)[2:5].any()


def test_thin_thing_is_no_blob() -> None:
    """One pixel is noise or a small vessel."""
    hu = stack()
    hu[3, 30, 30] = 30

    assert not blobs(hu).any()


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

    made = to_slabs(hu)

    assert made.shape == (24, 120, 120)
    assert made == pytest.approx(hu.reshape(24, 2, 120, 2, 120, 2).mean(axis=(1, 3, 5)), abs=1e-3)


def test_ct_channels_are_wide_soft_and_blob() -> None:
    """Red and green are windows, blue is the blob channel."""
    hu = stack()
    hu[3, 30:33, 30:33] = LUNG + BLOB_FULL_HU

    images = ct_images(hu)

    assert images.dtype == np.uint8
    assert images[3, 31, 31, 2] == 255
    assert images[0, 0, 0].tolist() == [round((LUNG + 1024) / 2048 * 255), 0, 0]


def test_mr_channels_are_alike() -> None:
    """MR has no HU: one scaled channel, three times."""
    images = mr_images(np.random.default_rng(0).integers(0, 900, (4, 20, 20)).astype(np.int16))

    assert (images[..., 0] == images[..., 2]).all()
    assert images.max() == 255


def test_calcium_shines_in_the_third_channel_though_bone_and_soft_tissue_saturate_the_second() -> None:
    """What no window tells from bone is told by density: a plaque in the aorta beside the spine."""
    hu = np.full((5, 60, 60), 40, np.int16)
    hu[:, 10:40, 10:40] = 330
    hu[2, 20:23, 20:23] = 900
    images = ct_images(hu)

    assert images[2, 21, 21, 1] == images[2, 30, 30, 1] == 255
    assert images[2, 21, 21, 2] == 255
    assert not images[2, 30, 30, 2]
