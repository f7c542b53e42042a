"""Halves of slabs in HU -> the hull of the lungs in each: a nodule at the chest wall is no part of that.

No lung itself: what hangs on the wall is not in it, and a closing of it fills the roots of the vessels, which then look
round. numpy and scipy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

BODY_HU = -500  # between lung or air and fat
AIR_HU = -950  # between air around the body and lung
DIRECTIONS = 40
SKIN_PIXELS, EDGE_PIXELS = 2, 1  # where air and tissue share a pixel it looks like lung

Bools = NDArray[np.bool_]


def hull_of_lungs(hu: NDArray[np.float32]) -> Bools:
    """(S, P, P): in each half slab the convex hull of both lungs; empty where there is none."""
    parts, count = ndimage.label(hu > BODY_HU)
    if not count:
        return np.zeros(hu.shape, bool)
    body = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    lungs = (hu > AIR_HU) & (hu < BODY_HU) & _eroded(hull(body), SKIN_PIXELS)
    inner = _eroded(lungs, EDGE_PIXELS)
    return np.asarray(ndimage.maximum_filter(hull(inner), _square(EDGE_PIXELS), mode="constant"), bool)


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


def _square(radius: int) -> tuple[int, int, int]:
    return (1, 2 * radius + 1, 2 * radius + 1)
