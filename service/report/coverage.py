"""Retention -> which pixels of each source slice the model was given. Pure geometry; knows nothing of DICOM."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from service.shared.messages import Retention, RetentionArrays, SourceInstance, SourceState


class Cover(IntEnum):
    """What became of one pixel of a source slice; the first four are the codes of TokenState."""

    KEPT = 0  # under a token that entered the language model
    MERGED = 1  # under a token whose content lives on in another one only
    DROPPED = 2  # seen by the vision tower, not by the language model
    NOT_SHOWN = 3  # of a slice that never reached the vision tower
    OUTSIDE = 4  # of a shown slice, but outside of the model's field of view


def cover(
    retention: Retention, arrays: RetentionArrays, source: SourceInstance, shape: tuple[int, int]
) -> NDArray[np.uint8]:
    """Codes of Cover for every pixel of one slice; shape: its (rows, columns)."""
    if not is_shown(source) or source.input_index is None:
        return np.full(shape, Cover.NOT_SHOWN, np.uint8)
    grid = retention.token_rows, retention.token_columns
    states = arrays.tokens[source.input_index].reshape(grid)
    affine = np.ascontiguousarray(arrays.source_pixels_from_token[source.input_index], np.float64)
    row, column, inside = _same_for_most_slices(affine.tobytes(), grid, shape)
    return np.where(inside, states[row, column], np.uint8(Cover.OUTSIDE))


@lru_cache(maxsize=4)
def _same_for_most_slices(
    affine: bytes, grid: tuple[int, int], shape: tuple[int, int]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
    return token_of_pixel(np.frombuffer(affine, np.float64).reshape(2, 3), grid, shape)


def token_of_pixel(
    source_pixels_from_token: NDArray[np.float64], grid: tuple[int, int], shape: tuple[int, int]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
    """Token row and column over the centre of every pixel, and whether there is one; each of `shape`.

    source_pixels_from_token: (2, 3), see RetentionArrays. Where no token is, row and column are those of the nearest.
    """
    linear, offset = source_pixels_from_token[:, :2], source_pixels_from_token[:, 2]
    x, y = np.meshgrid(np.arange(shape[1]) + 0.5 - offset[0], np.arange(shape[0]) + 0.5 - offset[1])
    inverse = np.linalg.inv(linear)
    column = np.floor(inverse[0, 0] * x + inverse[0, 1] * y).astype(np.intp)
    row = np.floor(inverse[1, 0] * x + inverse[1, 1] * y).astype(np.intp)
    inside = (row >= 0) & (row < grid[0]) & (column >= 0) & (column < grid[1])
    return np.clip(row, 0, grid[0] - 1), np.clip(column, 0, grid[1] - 1), inside


def is_shown(source: SourceInstance) -> bool:
    return source.state in (SourceState.SHOWN, SourceState.IN_SLAB)
