"""A stack of slabs to the three channels that the demonstration model sees. numpy alone.

Red is the wide CT window, green the soft tissue window, blue the *blob* channel: what is brighter than
everything long around it. It is computed on the whole stack before any pruning.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SLABS = 24
PIXELS = 120
WINDOWS_HU = ((-1024, 1024), (-135, 215))
BLOB_FULL_HU = 500  # contrast that saturates the blue channel
DENSE_HU = 400  # in a slab of 11 mm only calcium is denser; what is above is added to the blue channel
LINE_PIXELS = 11  # what is longer than this in any direction is no blob
_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1), (1, 2), (2, 1), (1, -2), (2, -1))
_LOW, _HIGH = -1000, 100

HounsfieldUnits = NDArray[np.int16] | NDArray[np.float32]


def slab_bounds(slices: int, slabs: int = SLABS) -> NDArray[np.int64]:
    """Where each slab begins and the last one ends: (min(slabs, slices) + 1,) indices into the stack."""
    count = min(slabs, slices)
    return np.rint(np.linspace(0, slices, count + 1)).astype(np.int64)


def to_slabs(hu: HounsfieldUnits, slabs: int = SLABS, pixels: int = PIXELS) -> NDArray[np.float32]:
    """The mean of neighbouring slices, and of neighbouring pixels: (S, H, W) to (slabs, pixels, pixels).

    Pixels are averaged over the area they cover, so that noise falls as it does in the training data.
    """
    bounds = slab_bounds(len(hu), slabs)
    means = np.stack([hu[a:b].mean(axis=0, dtype=np.float32) for a, b in pairwise(bounds)])
    rows, columns = area_matrix(means.shape[1], pixels), area_matrix(means.shape[2], pixels)
    return np.asarray(np.einsum("ph,shw,qw->spq", rows, means, columns, optimize=True), np.float32)


def area_matrix(size: int, pixels: int) -> NDArray[np.float32]:
    """(pixels, size): how much of each source pixel lies in each target pixel; rows sum to 1."""
    edges = np.linspace(0, size, pixels + 1)
    source = np.arange(size)
    overlap = np.minimum(edges[1:, None], source + 1) - np.maximum(edges[:-1, None], source)
    weights = np.clip(overlap, 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def ct_images(hu: HounsfieldUnits) -> NDArray[np.uint8]:
    """Slabs in HU, (S, P, P), to what the model's image processor gets, (S, P, P, 3)."""
    channels = [_scaled(hu.astype(np.float32), low, high) for low, high in WINDOWS_HU]
    dense = np.maximum(hu.astype(np.float32) - DENSE_HU, 0)
    channels.append(_scaled(blobs(hu).astype(np.float32) + dense, 0, BLOB_FULL_HU))
    return np.stack(channels, axis=-1)


def mr_images(values: HounsfieldUnits) -> NDArray[np.uint8]:
    """Slabs of MR, scaled from the 0.5th to the 99.5th percentile of the stack, thrice the same channel."""
    low, high = np.percentile(values, (0.5, 99.5))
    scaled = _scaled(values.astype(np.float32), float(low), float(max(high, low + 1)))
    return np.repeat(scaled[..., None], 3, axis=-1)


def blobs(hu: HounsfieldUnits) -> NDArray[np.int16]:
    """How much brighter each place is than everything long that runs through it, in HU; 0 or more.

    Grey openings: first with a square of two pixels, which removes thin vessels; from that the greatest opening
    with a line of LINE_PIXELS in eight directions, or of three slabs along the stack, is taken away: chest wall, heart,
    diaphragm and vessels vanish, round things stay.
    """
    stack = _open(np.clip(np.rint(hu), _LOW, _HIGH).astype(np.int16), ((0, 1), (1, 0), (1, 1)))
    long = _along_stack(stack)
    for direction in _DIRECTIONS:
        np.maximum(long, _open(stack, _line(direction)), out=long)
    return stack - long


def _scaled(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    return np.asarray(np.rint(np.clip((values - low) * (255 / (high - low)), 0, 255)), np.uint8)


def _line(direction: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Pixels of a centred line without its centre, as (row, column) offsets."""
    norm = float(np.hypot(*direction))
    steps = range(-(LINE_PIXELS // 2), LINE_PIXELS // 2 + 1)
    places = {(round(step * direction[0] / norm), round(step * direction[1] / norm)) for step in steps}
    return tuple(sorted(places - {(0, 0)}))


def _open(stack: NDArray[np.int16], offsets: tuple[tuple[int, int], ...]) -> NDArray[np.int16]:
    """Grey opening of every slab by the origin and these offsets."""
    reach = LINE_PIXELS // 2 + 1
    eroded = _extreme(np.minimum, stack, offsets, reach, np.int16(_HIGH))
    mirrored = tuple((-row, -column) for row, column in offsets)
    return _extreme(np.maximum, eroded, mirrored, reach, np.int16(_LOW))


def _extreme(
    choose: np.ufunc, stack: NDArray[np.int16], offsets: tuple[tuple[int, int], ...], reach: int, outside: np.int16
) -> NDArray[np.int16]:
    rows, columns = stack.shape[1:]
    padded = np.pad(stack, ((0, 0), (reach, reach), (reach, reach)), constant_values=outside)
    result = stack.copy()
    for row, column in offsets:
        part = padded[:, reach + row : reach + row + rows, reach + column : reach + column + columns]
        choose(result, part, out=result)
    return result


def _along_stack(stack: NDArray[np.int16]) -> NDArray[np.int16]:
    """What goes on through three slabs, allowing one pixel of sideways drift."""
    near = _extreme(np.maximum, stack, ((0, 1), (0, -1), (1, 0), (-1, 0)), 1, np.int16(_LOW))
    padded = np.pad(near, ((2, 2), (0, 0), (0, 0)), constant_values=_LOW)
    count = len(stack)
    shifted = {step: padded[2 + step : 2 + step + count] for step in (-2, -1, 1, 2)}
    runs = ((-1, 1), (1, 2), (-1, -2))
    result = np.full_like(stack, _LOW)
    for one, other in runs:
        np.maximum(result, np.minimum(stack, np.minimum(shifted[one], shifted[other])), out=result)
    return result
