"""Where the demonstration model looks for blobs."""

from __future__ import annotations

import numpy as np

from workers.demo_model.channels import USUAL_VOXEL_MM, ct_images
from workers.demo_model.thorax import hull, hull_of_each_lung, hull_of_lungs, lungs_of, massive

AIR, LUNG, TISSUE = -1000, -850, 30


def disc(row: int, column: int, radius: float, size: int = 120) -> np.ndarray:
    rows, columns = np.ogrid[:size, :size]
    return np.asarray((rows - row) ** 2 + (columns - column) ** 2 <= radius**2)


def chest(halves: int = 14) -> np.ndarray:
    """Two round lungs in a round body, in air."""
    layer = np.where(disc(60, 60, 50), TISSUE, AIR)
    layer[disc(60, 35, 20) | disc(60, 85, 20)] = LUNG
    return np.repeat(layer[None], halves, axis=0).astype(np.float32)


def with_nodule_at_the_wall() -> np.ndarray:
    hu = chest()
    hu[6, 58:62, 14:18] = TISSUE
    return hu


def test_what_hangs_on_the_chest_wall_is_within_the_hull() -> None:
    """The lungs themselves have a dent there; the wall is without."""
    found = hull_of_lungs(lungs_of(with_nodule_at_the_wall()))

    assert found[6, 58:62, 16:18].all()
    assert not found[6, 58:62, :13].any()
    assert found[6][disc(60, 35, 19)].all()


def test_nodule_at_the_chest_wall_is_a_blob() -> None:
    """A line from the wall through it is long; within the hull it is not."""
    images = ct_images(with_nodule_at_the_wall(), USUAL_VOXEL_MM)

    assert images[3, 58:62, 16:18, 2].max() > 200
    assert not images[:, :, :13, 2].any()


def test_nodule_at_the_mediastinum_is_a_blob() -> None:
    """The hull of both lungs holds the mediastinum, through which a line from the nodule is long."""
    hu = chest()
    hu[6, 58:62, 51:56] = TISSUE

    images = ct_images(hu, USUAL_VOXEL_MM)

    assert images[3, 58:62, 51:54, 2].max() > 200
    assert not images[3, :, 56:, 2].any()


def test_hull_of_each_lung_leaves_out_what_lies_between_them() -> None:
    """Where a lung is round; both together hold the mediastinum."""
    lungs = lungs_of(chest())

    assert hull_of_lungs(lungs)[6, 60, 60]
    assert not hull_of_each_lung(lungs, USUAL_VOXEL_MM)[6, :, 60].any()
    assert hull_of_each_lung(lungs, USUAL_VOXEL_MM)[6][disc(60, 35, 19) | disc(60, 85, 19)].all()


def test_organs_are_massive_and_nodules_on_them_are_not() -> None:
    """Neither is a vessel."""
    hu = chest()
    hu[6, 58:62, 51:56] = TISSUE
    hu[:, 60:62, 30:32] = TISSUE
    lungs = lungs_of(hu)

    found = massive(hu, hull_of_lungs(lungs), USUAL_VOXEL_MM)

    assert found[:, 55:65, 57:63].all()
    assert not found[6, 58:62, 51:54].any()
    assert not found[:, 60:62, 30:32].any()


def test_couch_does_not_widen_the_hull() -> None:
    """Foam under the patient is as dense as lung."""
    hu = chest()
    hu[:, 112:118, 10:110] = -900

    assert (lungs_of(hu) == lungs_of(chest())).all()


def test_lung_that_the_image_cuts_off_counts() -> None:
    """A field of view that is too small leaves no wall beside the lung."""
    found = hull_of_lungs(lungs_of(chest()[:, :, 30:]))

    assert found[6, 50:70, :20].all()


def test_nothing_is_found_without_a_body() -> None:
    """Air alone has no hull."""
    lungs = lungs_of(np.full((4, 60, 60), AIR, np.float32))

    assert not hull_of_lungs(lungs).any()
    assert not hull_of_each_lung(lungs, USUAL_VOXEL_MM).any()


def test_hull_of_some_points_holds_them_and_what_lies_between() -> None:
    """Layer by layer; an empty layer stays empty."""
    points = np.zeros((2, 60, 60), bool)
    points[0, 10, 10] = points[0, 10, 50] = points[0, 50, 10] = True

    found = hull(points)

    assert found[0][points[0]].all()
    assert found[0, 20, 20]
    assert not found[0, 45, 45]
    assert not found[1].any()
