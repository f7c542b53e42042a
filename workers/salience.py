"""Local contrast in the stack: how much brighter each place is than everything long that runs through it. numpy.

The greatest grey opening with lines of LINE_MM in nine directions of the slice and along the stack is taken away: chest
wall, heart, ribs and vessels vanish, round things stay. Knows no organ; dark things in bright ones are not seen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LINE_MM = 28.0  # what is longer than this in some direction is no spot; a 20 mm nodule is one
LOW_HU, HIGH_HU = -1000.0, 200.0  # contrast above soft tissue is bone's
_IN_SLICE = ((0, 1), (1, 0), (1, 1), (1, -1), (1, 2), (2, 1), (1, -2), (2, -1))
_ALONG_STACK = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))

Offsets = tuple[tuple[int, int, int], ...]


def local_contrast(values: NDArray[np.float32], *, slice_mm: float, pixel_mm: float) -> NDArray[np.int16]:
    """(I, h, w) in HU to (I, h, w) contrast in the same unit, 0 or more."""
    stack = np.rint(np.clip(values, LOW_HU, HIGH_HU)).astype(np.int16)
    long = np.full_like(stack, np.iinfo(np.int16).min)
    for line in lines(slice_mm, pixel_mm):
        np.maximum(long, _open(stack, line), out=long)
    return stack - long


def lines(slice_mm: float, pixel_mm: float) -> tuple[Offsets, ...]:
    """Centred lines of about LINE_MM as (slice, row, column) offsets."""
    reach = max(1, round(LINE_MM / pixel_mm / 2))
    depth = max(1, round(LINE_MM / slice_mm / 2))
    steps = range(-reach, reach + 1)
    found = []
    for row, column in _IN_SLICE:
        longest = max(abs(row), abs(column))
        found.append(tuple((0, round(step * row / longest), round(step * column / longest)) for step in steps))
    for row, column in _ALONG_STACK:  # one pixel of drift per slice
        found.append(tuple((step, step * row, step * column) for step in range(-depth, depth + 1)))
    return tuple(found)


def _open(stack: NDArray[np.int16], line: Offsets) -> NDArray[np.int16]:
    """Grey opening; beyond the border the stack goes on as it ends."""
    eroded = _extreme(np.minimum, stack, line)
    return _extreme(np.maximum, eroded, tuple((-z, -y, -x) for z, y, x in line))


def _extreme(choose: np.ufunc, stack: NDArray[np.int16], line: Offsets) -> NDArray[np.int16]:
    reach = np.abs(np.array(line)).max(axis=0)
    padded = np.pad(stack, [(int(size), int(size)) for size in reach], mode="edge")
    result: NDArray[np.int16] | None = None
    for offset in line:
        part = padded[tuple(slice(r + o, r + o + n) for r, o, n in zip(reach, offset, stack.shape, strict=True))]
        result = part.copy() if result is None else choose(result, part, out=result)
    assert result is not None  # a line has a point
    return result
