"""What is known of each input before the model sees it: regions, local contrast and a smoothed picture for each token.

Computed once per study on slabs pooled to about PIXEL_MM; handed to the host, which asks for it on its token grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.regions import OUTSIDE, Regions, Spacing, find_regions
from workers.salience import local_contrast

PIXEL_MM = 2.6  # a 4 mm nodule still stands out, noise hardly does
TILE_MM = 20.0
WIDE_HU = (-1024.0, 1024.0)
SHARE_OF_TOKEN = 0.05  # a region that fills less of a token is not in it
MR_RANGE = 1000.0  # MR is scaled to this range, from and to the percentiles that the model's window has


@dataclass(frozen=True, slots=True, eq=False)
class TokenGuide:
    """The guide on a token grid; n tokens row by row.

    regions: (I, n, R) bool, R regions of the body (outside is none of them); body: (I, n) bool.
    salience: (I, n) float32, greatest local contrast within the token; HU, for MR thousandths of its range.
    """

    regions: NDArray[np.bool_]
    body: NDArray[np.bool_]
    salience: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Guide:
    """For I inputs, (h, w) pooled pixels each, which divide the image evenly.

    tiles: (I, th, tw) float32, mean of the wide window in tiles of about TILE_MM, scale -1 to 1.
    positions_mm: (I,), increasing.
    """

    regions: Regions
    contrast: NDArray[np.int16]
    tiles: NDArray[np.float32]
    positions_mm: NDArray[np.float64]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the regions of TokenGuide."""
        return self.regions.names[OUTSIDE + 1 :]

    @property
    def has_body(self) -> NDArray[np.bool_]:
        """(I,): is any of it in this input?"""
        return np.asarray((self.regions.labels != OUTSIDE).any(axis=(1, 2)), bool)

    def on_grid(self, rows: int, columns: int) -> TokenGuide:
        """What lies in each token when the whole image is divided into rows x columns of them."""
        labels = self.regions.labels
        shares = np.stack(
            [_cells(labels == label, rows, columns, np.add) for label in range(1, len(self.regions.names))], axis=-1
        )
        pixels = _cells(np.ones_like(labels[:1], bool), rows, columns, np.add)[..., None]
        body = shares.sum(axis=-1) > 0
        present = (shares > SHARE_OF_TOKEN * pixels) | ((shares == shares.max(axis=-1, keepdims=True)) & (shares > 0))
        salience = _cells(np.where(labels != OUTSIDE, self.contrast, 0), rows, columns, np.maximum)
        return TokenGuide(present, body, salience.astype(np.float32))


def make_guide(
    pooled: NDArray[np.float32],
    positions_mm: NDArray[np.float64],
    *,
    spacing: Spacing,
    modality: str,
    axial: bool = True,
    window: tuple[float, float] = WIDE_HU,
) -> Guide:
    """pooled: (I, h, w) of the inputs, HU for CT; window: what the model sees as black and white, for MR."""
    finite = np.nan_to_num(pooled, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = WIDE_HU if modality == "CT" else window
    span = max(high - low, 1e-6)
    units = finite if modality == "CT" else ((finite - low) / span * MR_RANGE - MR_RANGE).astype(np.float32)
    scaled = np.clip((finite - low) / span, 0, 1) * 2 - 1
    rows = max(1, round(pooled.shape[1] * spacing.row_mm / TILE_MM))
    columns = max(1, round(pooled.shape[2] * spacing.column_mm / TILE_MM))
    sums = _cells(scaled, rows, columns, np.add)
    counts = _cells(np.ones_like(scaled[:1]), rows, columns, np.add)
    return Guide(
        regions=find_regions(pooled, spacing, modality, axial=axial),
        contrast=local_contrast(units, slice_mm=spacing.slice_mm, pixel_mm=(spacing.row_mm + spacing.column_mm) / 2),
        tiles=np.asarray((sums / counts).reshape(len(pooled), rows, columns), np.float32),
        positions_mm=positions_mm,
    )


def pooled_shape(rows: int, columns: int, row_mm: float, column_mm: float) -> tuple[int, int]:
    """How many blocks of about PIXEL_MM an image is divided into; its own pixels where spacing is not known."""
    heights = [round(size * mm / PIXEL_MM) if mm > 0 else size for size, mm in ((rows, row_mm), (columns, column_mm))]
    return min(max(heights[0], 1), rows), min(max(heights[1], 1), columns)


def pool(image: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Mean over blocks that divide the image evenly to a pixel."""
    edges = [
        np.rint(np.linspace(0, size, count + 1)).astype(int) for size, count in zip(image.shape, shape, strict=True)
    ]
    sums = np.add.reduceat(np.add.reduceat(image, edges[0][:-1], axis=0), edges[1][:-1], axis=1)
    return np.asarray(sums / np.outer(np.diff(edges[0]), np.diff(edges[1])), np.float32)


def _cells(values: NDArray[np.generic], rows: int, columns: int, reduce: np.ufunc) -> NDArray[np.float32]:
    """(I, h, w) to (I, rows * columns): `reduce` over the pixels that overlap each cell of an even division."""
    wide = values.astype(np.float32)
    for axis, cells in ((1, rows), (2, columns)):
        size = wide.shape[axis]
        edges = np.linspace(0, size, cells + 1)
        low = np.floor(edges[:-1] + 1e-6).astype(int)
        high = np.maximum(np.ceil(edges[1:] - 1e-6).astype(int), low + 1)
        parts = [reduce.reduce(wide.take(range(a, b), axis=axis), axis=axis) for a, b in zip(low, high, strict=True)]
        wide = np.stack(parts, axis=axis)
    return np.asarray(wide.reshape(len(wide), rows * columns), np.float32)
