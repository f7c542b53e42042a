"""Grey openings in space with lines: what is long in any direction, so that what is left is round. numpy alone.

Source: J. Serra, Image Analysis and Mathematical Morphology (1982), openings and the top-hat.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Offset = tuple[int, int, int]  # slices, rows, columns
Line = tuple[Offset, ...]
Voxel = tuple[float, float, float]  # mm between slices, rows, columns

SQUARE: Line = ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1))
SMALLEST_MM = 0.5  # voxels are taken for no smaller: a line would have more points than it is worth


def directions() -> tuple[Offset, ...]:
    """49 directions of space, evenly enough: along the axes and the diagonals, and by one and two steps."""
    kinds = ([0, 0, 1], [0, 1, 1], [0, 1, 2], [1, 1, 1], [1, 1, 2], [1, 2, 2])
    steps = (-2, -1, 0, 1, 2)
    every = [(z, y, x) for z in steps for y in steps for x in steps]
    return tuple(one for one in every if one > (0, 0, 0) and sorted(map(abs, one)) in kinds)


def line(direction: Offset, length_mm: float, voxel_mm: Voxel) -> Line:
    """The voxels of a line of this length in mm; with thick voxels only the origin may be left."""
    voxel = np.maximum(voxel_mm, SMALLEST_MM)
    unit = np.asarray(direction) / np.linalg.norm(direction)
    steps = np.linspace(-length_mm / 2, length_mm / 2, int(length_mm // 2) * 2 + 1)
    places = np.floor(steps[:, None] * unit / voxel + 0.5).astype(int)
    fresh = np.any(places[1:] != places[:-1], axis=1)
    return tuple((z, y, x) for z, y, x in places[np.append(True, fresh)].tolist())


def lines(length_mm: float, voxel_mm: Voxel) -> tuple[Line, ...]:
    """One line in each direction that the voxels can show: where slices are too thick, none leaves its slice."""
    found = []
    for direction in directions():
        points = line(direction, length_mm, voxel_mm)
        if all(any(point[axis] for point in points) for axis in range(3) if direction[axis]):
            found.append(points)
    return tuple(found)


def greatest_opening(stack: NDArray[np.uint8], some: Sequence[Line]) -> NDArray[np.uint8]:
    """(S, H, W): at each place the greatest of the openings with these lines.

    What lies outside the stack takes no part. On one flat padded array a step in space is a step in memory, which is
    several times as fast as slices of a stack.
    """
    slices, rows, columns = stack.shape
    down, right = (max((abs(point[axis]) for one in some for point in one), default=0) for axis in (1, 2))
    padded = (slices, rows + down, columns + right)
    strides = (padded[1] * padded[2], padded[2], 1)
    shifts = [
        [sum(step * stride for step, stride in zip(point, strides, strict=True)) for point in one] for one in some
    ]
    size, margin = slices * strides[0], max((abs(shift) for one in shifts for shift in one), default=0)
    whole, eroded = np.full(size + 2 * margin, 255, np.uint8), np.zeros(size + 2 * margin, np.uint8)
    result = np.zeros(size, np.uint8)
    whole[margin : margin + size].reshape(padded)[:, :rows, :columns] = stack
    core = eroded[margin : margin + size]
    for one in shifts:
        core[:] = whole[margin : margin + size]
        for shift in one:
            np.minimum(core, whole[margin + shift : margin + shift + size], out=core)
        core.reshape(padded)[:, rows:] = 0
        core.reshape(padded)[:, :, columns:] = 0
        for shift in one:
            np.maximum(result, eroded[margin - shift : margin - shift + size], out=result)
    return result.reshape(padded)[:, :rows, :columns].copy()


def widened(stack: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Each voxel as bright as the brightest of it and its four neighbours in the slice: lines may be crooked."""
    result = stack.copy()
    for axis in (1, 2):
        here, there = ([slice(None)] * 3 for _ in range(2))
        here[axis], there[axis] = slice(1, None), slice(None, -1)
        for one, other in ((tuple(here), tuple(there)), (tuple(there), tuple(here))):
            np.maximum(result[one], stack[other], out=result[one])
    return result
