"""Halves of slabs in HU -> where blobs are looked for: a nodule at the chest wall or mediastinum is no part of these.

No lung itself: what hangs on the wall is not in it, and a closing of it fills the roots of the vessels, which then look
round. numpy and scipy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from workers.demo_model.opening import Voxel

BODY_HU = -500  # between lung or air and fat
AIR_HU = -950  # between air around the body and lung
DIRECTIONS = 40
SKIN_PIXELS, EDGE_PIXELS = 2, 1  # where air and tissue share a pixel it looks like lung
LEAST_LUNG_LITRES = 0.1
SOFT_HU = -400  # a nodule of ground glass is no tissue
MASSIVE_MM = 18.0  # what a cube of this edge finds no room in is a nodule, a vessel or a notch between organs

Bools = NDArray[np.bool_]


def lungs_of(hu: NDArray[np.float32]) -> Bools:
    """(S, P, P): both lungs in each half slab, one pixel within their edges; empty where there is none."""
    parts, count = ndimage.label(hu > BODY_HU)
    if not count:
        return np.zeros(hu.shape, bool)
    body = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    return _eroded((hu > AIR_HU) & (hu < BODY_HU) & _eroded(hull(body), SKIN_PIXELS), EDGE_PIXELS)


def hull_of_lungs(lungs: Bools) -> Bools:
    """(S, P, P): in each half slab the convex hull of both lungs; what hangs on the chest wall is within."""
    return _widened(hull(lungs))


def hull_of_each_lung(lungs: Bools, voxel_mm: Voxel) -> Bools:
    """(S, P, P): in each half slab the hull of either lung; of the mediastinum only what bulges into one is within."""
    parts, count = ndimage.label(lungs)
    volumes = np.bincount(parts.ravel(), minlength=count + 1)[1:] * np.prod(voxel_mm) * 1e-6
    large = [1 + one for one in np.argsort(-volumes)[:2] if volumes[one] >= LEAST_LUNG_LITRES]
    found = np.zeros(lungs.shape, bool)
    for one in large:
        found |= hull(parts == one)
    return _widened(found)


def massive(hu: NDArray[np.float32], within: Bools, voxel_mm: Voxel) -> Bools:
    """(S, P, P): what lies outside `within`, heart and diaphragm, one pixel wider; nodules on them are not massive."""
    soft = (hu > SOFT_HU) | ~within
    edge = [1 + 2 * int(MASSIVE_MM / 2 // step) for step in voxel_mm]
    core = ndimage.minimum_filter(soft, edge, mode="nearest")
    return _widened(ndimage.maximum_filter(core, edge, mode="constant"))


def hull(mask: Bools) -> Bools:
    """(S, H, W): of each layer what lies, in every one of DIRECTIONS, no further out than the outermost of it."""
    rows, columns = np.arange(mask.shape[1]), np.arange(mask.shape[2])
    some = mask.any(axis=2)
    first, last = mask.argmax(axis=2), mask.shape[2] - 1 - mask[:, :, ::-1].argmax(axis=2)
    low, high = np.full(some.shape, -np.inf), np.full(some.shape, np.inf)
    for angle in (np.arange(DIRECTIONS) + 0.5) * 2 * np.pi / DIRECTIONS:  # by half a step: never along the rows
        right, down = np.cos(angle), np.sin(angle)
        outermost = np.where(some, np.maximum(first * right, last * right) + rows * down, -np.inf).max(axis=1)
        edge = (outermost[:, None] - rows * down) / right
        low, high = (low, np.minimum(high, edge)) if right > 0 else (np.maximum(low, edge), high)
    return (columns >= low[..., None] - 1e-6) & (columns <= high[..., None] + 1e-6)


def _eroded(mask: Bools, pixels: int) -> Bools:
    """Not from the edges of the image: a lung that it cuts off goes on there. By a filter: a tenth of the time."""
    return np.asarray(ndimage.minimum_filter(mask, _square(pixels), mode="constant", cval=1), bool)


def _widened(mask: Bools) -> Bools:
    return np.asarray(ndimage.maximum_filter(mask, _square(EDGE_PIXELS), mode="constant"), bool)


def _square(radius: int) -> tuple[int, int, int]:
    return (1, 2 * radius + 1, 2 * radius + 1)
