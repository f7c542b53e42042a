"""Volume -> images as the model's own image processor gets them, and the record of what was made of what.

numpy alone. The processor resizes each image to its square and scales it; nothing is resampled here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.shared.messages import ModelInput, SliceOperation, SourceInstance, SourceState
from service.shared.settings import SeriesSettings
from workers.volume import Volume

# Red, green, blue of a CT slice as MedGemma 1.5 was trained: wide, soft tissue, brain (its CT notebook, `window`).
CT_WINDOWS_HU = ((-1024.0, 1024.0), (-135.0, 215.0), (0.0, 80.0))
MR_PERCENTILES = (0.5, 99.5)  # over the whole volume; MR has no scale of its own
PERCENTILE_VOXELS = 2**22  # enough for a percentile; a whole volume takes seconds


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Inputs of the model, before any stage of pruning.

    pixels: (I, rows, columns, 3) uint8, in stack order.
    inputs: I of them, all kept so far.
    sources: every instance of the series with its state as if all inputs were shown.
    applied: what was done, for the audit.
    """

    pixels: NDArray[np.uint8]
    inputs: tuple[ModelInput, ...]
    sources: tuple[SourceInstance, ...]
    applied: dict[str, Any]
    source_from_voxel: NDArray[np.float64]

    def source_pixels_from_token(self, token_rows: int, token_columns: int) -> NDArray[np.float64]:
        """(I, 2, 3) float64, as RetentionArrays wants it: token centres to pixels of the source frames."""
        rows, columns = self.pixels.shape[1:3]
        affine = compose(self.source_from_voxel, token_affine(rows, columns, token_rows, token_columns))
        return np.repeat(affine[None], len(self.inputs), axis=0)


def prepare(volume: Volume, settings: SeriesSettings) -> Prepared:
    """Sample the stack to at most series.max_slices slices and window them."""
    chosen = sample(len(volume.voxels), settings.max_slices)
    pixels = np.empty((len(chosen), *volume.voxels.shape[1:], 3), np.uint8)
    windows = CT_WINDOWS_HU if volume.modality == "CT" else (_percentiles(volume.voxels),) * 3
    for index, slice_index in enumerate(chosen):
        for channel, (low, high) in enumerate(windows):
            pixels[index, ..., channel] = to_grey(volume.voxels[slice_index], low, high)
    applied: dict[str, Any] = {
        "windows": [[low, high] for low, high in windows],
        "windows_unit": "HU" if volume.modality == "CT" else "MR percentiles 0.5 and 99.5 of the volume",
        "sampling": "uniform, first and last slice included",
        "max_slices": settings.max_slices,
        "image_rows": volume.voxels.shape[1],
        "image_columns": volume.voxels.shape[2],
    }
    return Prepared(pixels, _inputs(volume, chosen), _sources(volume, chosen), applied, volume.source_from_voxel)


def sample(slices: int, at_most: int) -> tuple[int, ...]:
    """Indices of evenly spaced slices, the first and the last among them; all where there are few enough.

    MedGemma's notebook leaves the first slice out and spaces the rest by `(slices - 1) / at_most`; both ends of the
    body matter here, and the difference elsewhere is below one slice.
    """
    if slices <= at_most:
        return tuple(range(slices))
    if at_most == 1:
        return (slices // 2,)
    return tuple(int(index) for index in np.rint(np.linspace(0, slices - 1, at_most)))


def to_grey(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """Clip to the window and scale it to 0..255, rounded to the nearest."""
    scaled = (np.clip(values, low, high) - np.float32(low)) / np.float32(high - low) * np.float32(255)
    return np.asarray(np.rint(scaled), np.uint8)


def token_affine(rows: int, columns: int, token_rows: int, token_columns: int) -> NDArray[np.float64]:
    """(2, 3): (column + 0.5, row + 0.5, 1) of a token to (x, y) in pixels of an image of `rows` x `columns`.

    Holds because the processor stretches the whole image to the square that the token grid divides.
    """
    return np.array([[columns / token_columns, 0.0, 0.0], [0.0, rows / token_rows, 0.0]])


def compose(outer: NDArray[np.float64], inner: NDArray[np.float64]) -> NDArray[np.float64]:
    """The (2, 3) affine that applies `inner`, then `outer`."""
    return np.asarray(outer @ np.vstack([inner, [0.0, 0.0, 1.0]]), np.float64)


def _percentiles(voxels: NDArray[np.float32]) -> tuple[float, float]:
    flat = voxels.reshape(-1)
    low, high = np.percentile(flat[:: max(1, flat.size // PERCENTILE_VOXELS)], MR_PERCENTILES)
    if high <= low:  # nearly everything is background
        low, high = voxels.min(), voxels.max()
    return float(low), float(high)


def _inputs(volume: Volume, chosen: tuple[int, ...]) -> tuple[ModelInput, ...]:
    return tuple(
        ModelInput(
            index=index,
            operation=SliceOperation.SINGLE,
            source_instances=(volume.slice_sources[slice_index],),
            position_mm=float(volume.positions_mm[slice_index]),
            kept=True,
        )
        for index, slice_index in enumerate(chosen)
    )


def _sources(volume: Volume, chosen: tuple[int, ...]) -> tuple[SourceInstance, ...]:
    sources = list(volume.sources)
    for index, slice_index in enumerate(chosen):
        source = volume.slice_sources[slice_index]
        sources[source] = sources[source].model_copy(update={"state": SourceState.SHOWN, "input_index": index})
    return tuple(sources)
