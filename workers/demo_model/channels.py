"""A stack of slabs to the three channels that the demonstration model sees. numpy and scipy.

Red is the wide CT window, green the soft tissue window, blue the *blob* channel: what is brighter than
everything long around it. It is computed on the whole stack before any pruning, on halves of slabs: in a slab of 11 mm
a vessel that crosses slantwise is as short as a nodule.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from workers.demo_model.opening import SQUARE, Voxel, greatest_opening, lines, widened
from workers.demo_model.thorax import hull_of_each_lung, hull_of_lungs, lungs_of, massive

# Weights say which they are to be shown.
THIRD_CHANNEL = "blobs in the lungs and at the mediastinum in halves of slabs, and what is denser than dense_hu"
SLABS = 24
PIXELS = 120
WINDOWS_HU = ((-1024, 1024), (-135, 215))
BLOB_FULL_HU = 500  # contrast that saturates the blue channel
DENSE_HU = 400  # in a slab of 11 mm only calcium is denser; what is above is added to the blue channel
LINE_MM = 30.0  # what is longer than this in any direction is no blob
USUAL_VOXEL_MM = (5.6, 3.1, 3.1)  # of half a slab of a chest; taken where a series does not say its own
_LOW_HU, _HIGH_HU = -1000, 100  # between which blobs are looked for, in 255 steps

HounsfieldUnits = NDArray[np.int16] | NDArray[np.float32]


def slab_bounds(slices: int, slabs: int = SLABS) -> NDArray[np.int64]:
    """Where each slab begins and the last one ends: (min(slabs, slices) + 1,) indices into the stack."""
    count = min(slabs, slices)
    return np.rint(np.linspace(0, slices, count + 1)).astype(np.int64)


def to_halves(values: HounsfieldUnits, slabs: int = SLABS, pixels: int = PIXELS) -> NDArray[np.float32]:
    """Each slab in two halves of equal length, and pixels averaged: (S, H, W) to (2 * slabs, pixels, pixels).

    Slices and pixels are averaged over what they cover, so that noise falls as it does in the training data; a slab
    of one slice is its own two halves.
    """
    halves = np.concatenate(
        [
            np.tensordot(area_matrix(b - a, 2), values[a:b].astype(np.float32), axes=1)
            for a, b in pairwise(slab_bounds(len(values), slabs))
        ]
    )
    if values.shape[1:] != (pixels, pixels):  # as phantoms for training are
        rows, columns = (area_matrix(size, pixels) for size in values.shape[1:])
        halves = rows @ halves @ columns.T
    return np.asarray(halves, np.float32)


def to_slabs(halves: NDArray[np.float32]) -> NDArray[np.float32]:
    """(2 S, P, P) to (S, P, P): the mean of each slab's halves, which is that of its slices."""
    return (halves[::2] + halves[1::2]) * np.float32(0.5)


def voxel_of_halves(spacing_mm: Voxel, shape: tuple[int, ...], halves: tuple[int, ...]) -> Voxel:
    """mm between the voxels of `halves`, a shape, made from a stack of this spacing and shape.

    Where the spacing is not known, that of a usual chest.
    """
    if not all(np.isfinite(step) and step > 0 for step in spacing_mm):
        return USUAL_VOXEL_MM
    slices, rows, columns = (step * size / small for step, size, small in zip(spacing_mm, shape, halves, strict=True))
    return (slices, rows, columns)


def area_matrix(size: int, pixels: int) -> NDArray[np.float32]:
    """(pixels, size): how much of each source pixel lies in each target pixel; rows sum to 1."""
    edges = np.linspace(0, size, pixels + 1)
    source = np.arange(size)
    overlap = np.minimum(edges[1:, None], source + 1) - np.maximum(edges[:-1, None], source)
    weights = np.clip(overlap, 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def ct_images(halves: NDArray[np.float32], voxel_mm: Voxel) -> NDArray[np.uint8]:
    """Halves of slabs in HU, (2 S, P, P), to what the model's image processor gets, (S, P, P, 3)."""
    slabs = to_slabs(halves)
    channels = [_scaled(slabs, low, high) for low, high in WINDOWS_HU]
    round_hu = to_slabs(round_in_lungs(halves, voxel_mm))
    channels.append(_scaled(round_hu + np.maximum(slabs - DENSE_HU, 0), 0, BLOB_FULL_HU))
    return np.stack(channels, axis=-1)


def round_in_lungs(halves: NDArray[np.float32], voxel_mm: Voxel) -> NDArray[np.float32]:
    """(2 S, P, P) in HU: blobs within the hull of both lungs, or at the mediastinum.

    A line from the mediastinum through a nodule at it is long. With organs dark it is not, but then notches between
    them look round as well; others do within the hull of each lung, where most of the mediastinum is dark. What is
    round in both is a blob too.
    """
    lungs = lungs_of(halves)
    both = hull_of_lungs(lungs)
    each = both & hull_of_each_lung(lungs, voxel_mm)
    free = both & ~massive(halves, both, voxel_mm)
    inside, in_each, in_free = (_blobs_within(one, halves, voxel_mm) for one in (both, each, free))
    return np.maximum(inside, np.minimum(in_each, in_free))


def _blobs_within(mask: NDArray[np.bool_], halves: NDArray[np.float32], voxel_mm: Voxel) -> NDArray[np.float32]:
    return np.where(mask, blobs(np.where(mask, halves, _LOW_HU), voxel_mm), 0)


def mr_images(values: HounsfieldUnits) -> NDArray[np.uint8]:
    """Slabs of MR, scaled from the 0.5th to the 99.5th percentile of the stack, thrice the same channel."""
    low, high = np.percentile(values, (0.5, 99.5))
    scaled = _scaled(values.astype(np.float32), float(low), float(max(high, low + 1)))
    return np.repeat(scaled[..., None], 3, axis=-1)


def blobs(hu: HounsfieldUnits, voxel_mm: Voxel) -> NDArray[np.float32]:
    """How much brighter each place is than everything long that runs through it, in HU; 0 or more.

    A grey opening with a square of two pixels removes thin vessels; from that the greatest opening with a line of
    LINE_MM in any of 49 directions of space is taken away: chest wall, heart, diaphragm and vessels vanish, round
    things stay.
    """
    step_hu = (_HIGH_HU - _LOW_HU) / 255
    levels = np.rint((np.clip(hu.astype(np.float32), _LOW_HU, _HIGH_HU) - _LOW_HU) / step_hu).astype(np.uint8)
    stack = greatest_opening(levels, (SQUARE,))
    long = greatest_opening(widened(stack), lines(LINE_MM, voxel_mm))
    return np.asarray(stack - np.minimum(stack, long), np.float32) * np.float32(step_hu)


def _scaled(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    return np.asarray(np.rint(np.clip((values - low) * (255 / (high - low)), 0, 255)), np.uint8)
