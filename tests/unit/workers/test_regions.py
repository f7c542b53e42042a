"""workers.regions, salience and guide: what is known of each token before the model sees it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from workers.demo_model.phantom import Protocol, build
from workers.demo_model.render import Mask
from workers.guide import Guide, make_guide, pool, pooled_shape
from workers.regions import CT_NAMES, LUNG_NAMES, MR_NAMES, Spacing, find_regions
from workers.salience import local_contrast

AT = Spacing(4.0, 4.0, 4.0)


def chest(slices: int = 48) -> NDArray[np.float32]:
    """A body with two lungs in it, 4 mm voxels, head first; rows run to the patient's left."""
    y, x = np.mgrid[-32:32, -48:48] * 4.0
    values = np.full((slices, *x.shape), -1000.0, np.float32)
    values[:, (x / 160) ** 2 + (y / 110) ** 2 < 1] = 40
    for side in (-1, 1):
        values[8:40, ((x - side * 75) / 50) ** 2 + (y / 75) ** 2 < 1] = -850
    values[:, (x / 18) ** 2 + ((y - 60) / 18) ** 2 < 1] = 500
    return values


def named(values: NDArray[np.float32], modality: str = "CT") -> dict[str, NDArray[np.bool_]]:
    found = find_regions(values, AT, modality)
    return {name: found.labels == index for index, name in enumerate(found.names)}


def guide_of(values: NDArray[np.float32], modality: str = "CT") -> Guide:
    return make_guide(values, np.arange(len(values)) * 4.0, spacing=AT, modality=modality, window=(0, 500))


def test_lungs_have_side_and_zone() -> None:
    """Columns grow to the patient's left; slices begin at the head, so the first third is the upper zone."""
    regions = named(chest())

    assert regions["right lung, upper zone"][12, 32, 29]
    assert regions["right lung, lower zone"][38, 32, 29]
    assert regions["left lung, middle zone"][24, 32, 67]
    for name in LUNG_NAMES:
        assert regions[name].any()
        assert not regions[name][:, :, 48:].any() or name.startswith("left")
        assert not regions[name][:, :, :47].any() or name.startswith("right")


def test_bone_tissue_and_air_are_told_apart() -> None:
    """The spine is bone, what is around the lungs is soft tissue, what is around the body is outside."""
    regions = named(chest())

    assert regions["right bone"][20, 47, 47] | regions["left bone"][20, 47, 47]
    assert regions["left soft tissue"][4, 32, 60]
    assert regions["outside the body"][20, 2, 2]


def test_every_voxel_has_one_label_that_has_a_name() -> None:
    """Labels index the names."""
    found = find_regions(chest(), AT, "CT")

    assert found.names == CT_NAMES
    assert found.labels.max() < len(CT_NAMES)
    assert found.notes == ()


def test_phantom_body_and_lungs_are_found() -> None:
    """On a generated chest nearly all of the body and of the aerated lungs is labelled so, nodules included."""
    scene = build(77, Protocol(pixels=120, slice_mm=5.0), nodules=3)
    at = Spacing(5.0, scene.grid.pixel_mm, scene.grid.pixel_mm)

    found = find_regions(scene.hu, at, "CT")
    is_lung = np.isin(found.labels, range(1, 7))
    bits = scene.masks
    aerated = ((bits & Mask.LUNG) != 0) & ((bits & (Mask.EFFUSION | Mask.CONSOLIDATION | Mask.HEART)) == 0)
    body = (bits & Mask.BODY) != 0

    assert (found.labels[body] != 0).mean() > 0.99
    assert (found.labels[~body] == 0).mean() > 0.9
    assert is_lung[aerated].mean() > 0.9
    assert is_lung[(bits & Mask.NODULE) != 0].mean() > 0.9


def test_mr_is_body_by_side_and_background() -> None:
    """Signal has no scale; the threshold comes from the volume itself."""
    values = np.where(chest() > -900, np.float32(300), np.float32(5)) + np.float32(1)

    regions = named(values, "MR")

    assert tuple(regions) == MR_NAMES
    assert regions["right body"][20, 32, 20]
    assert regions["left body"][20, 32, 75]
    assert regions["outside the body"][20, 1, 1]


def test_couch_is_no_body() -> None:
    """A thin plate under the back is outside."""
    values = chest()
    values[:, 62, 10:86] = -100

    assert named(values)["outside the body"][20, 62, 48]


def test_thin_skull_around_a_body_is_body() -> None:
    """A shell of one or two pixels is not opened away where it encloses what is body; its inside counts too."""
    y, x = np.mgrid[-32:32, -48:48] * 4.0
    radius = np.hypot(x, y)
    values = np.full((10, *x.shape), -1000.0, np.float32)
    values[:, (radius < 100) & (radius > 94)] = 800
    values[:, radius < 50] = 30

    outside = named(values)["outside the body"]

    assert not outside[:, radius < 96].any()
    assert outside[:, radius > 108].all()


@pytest.mark.parametrize("value", [-1000.0, np.nan])
def test_without_a_body_everything_is_one_region_and_a_note_says_so(value: float) -> None:
    """Nothing may be dropped as air when nothing was recognised."""
    found = find_regions(np.full((3, 20, 20), value, np.float32), AT, "CT")

    assert found.names[1:] == ("whole image",)
    assert (found.labels == 1).all()
    assert "no part of it was left out as air" in found.notes[0]


def test_other_orientations_have_no_sides() -> None:
    """A coronal stack has a body, but its slices are no heights and no zones are made up."""
    assert find_regions(chest(), AT, "CT", axial=False).names == ("outside the body", "body")


def test_ball_stands_out_and_a_tube_does_not() -> None:
    """What is short in every direction has its contrast; a vessel through the stack and one within it have none."""
    values = np.full((30, 60, 60), -850, np.float32)
    values[:, 10:12, 10:12] = 40
    values[15, 40:42, :] = 40
    values[14:17, 25:28, 44:47] = 40

    contrast = local_contrast(values, slice_mm=4.0, pixel_mm=2.6)

    assert contrast[15, 26, 45] == 890
    assert contrast[15, 10, 10] == 0
    assert contrast[15, 40, 30] == 0
    assert contrast.min() >= 0


def test_contrast_of_one_flat_slice_is_nothing() -> None:
    """A stack of one works, and has no contrast where it is constant."""
    assert not local_contrast(np.full((1, 5, 7), 3, np.float32), slice_mm=5, pixel_mm=0.7).any()


def test_tokens_of_air_are_no_body_and_every_body_token_has_a_region() -> None:
    """The corner of a chest image is air; wherever there is body there is a region."""
    tokens = guide_of(chest()).on_grid(16, 16)

    assert not tokens.body[:, [0, 15, 240, 255]].any()
    assert (tokens.regions.any(axis=-1) == tokens.body).all()
    assert 0.3 < tokens.body.mean() < 0.9


def test_small_lesion_marks_its_token() -> None:
    """The token that holds a spot has its contrast, whatever else is in it."""
    values = chest()
    values[20:22, 31, 20] = 60

    with_it, without = guide_of(values).on_grid(16, 16), guide_of(chest()).on_grid(16, 16)

    token = (31 * 16 // 64) * 16 + 20 * 16 // 96
    assert with_it.salience[20, token] > 800
    assert without.salience[20, token] < 150


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (16, 16), (64, 96), (80, 100)])
def test_grid_of_any_size(grid: tuple[int, int]) -> None:
    """Coarser and finer than the pooled picture: every token gets an answer."""
    tokens = guide_of(chest(8)).on_grid(*grid)

    assert tokens.regions.shape == (8, grid[0] * grid[1], len(CT_NAMES) - 1)
    assert np.isfinite(tokens.salience).all()
    assert tokens.body.any()


def test_values_that_are_no_numbers_leave_a_guide_that_drops_nothing() -> None:
    """NaN becomes one region over the whole image."""
    values = chest(8)
    values[3, 5, 5] = np.nan
    guide = guide_of(values)

    assert guide.has_body.all()
    assert guide.on_grid(4, 4).body.all()
    assert np.isfinite(guide.tiles).all()


def test_pooling_keeps_the_mean_and_covers_the_image() -> None:
    """Blocks differ by one pixel at most; small pixels are pooled, large ones are not."""
    image = np.random.default_rng(1).normal(size=(101, 50)).astype(np.float32)

    assert pooled_shape(512, 512, 0.7, 0.7) == (138, 138)
    assert pooled_shape(64, 64, 5.0, 0.0) == (64, 64)
    assert pool(image, (101, 50)) == pytest.approx(image)
    assert pool(np.full((7, 9), 3, np.float32), (2, 4)) == pytest.approx(np.full((2, 4), 3))
