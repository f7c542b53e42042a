"""Volume -> images as the model's own image processor gets them, and the record of what was made of what.

numpy alone. The processor resizes each image to its square and scales it; nothing is resampled here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.shared.messages import ModelInput, SliceOperation, SourceInstance, SourceState
from service.shared.settings import PruningMethod, PruningSettings, SeriesSettings
from workers.guide import Guide, make_guide, pool, pooled_shape
from workers.regions import Spacing
from workers.volume import Volume

# Red, green, blue of a CT slice as MedGemma 1.5 was trained: wide, soft tissue, brain (its CT notebook, `window`).
CT_WINDOWS_HU = ((-1024.0, 1024.0), (-135.0, 215.0), (0.0, 80.0))
MR_PERCENTILES = (0.5, 99.5)  # over the whole volume; MR has no scale of its own
UNKNOWN_MM = 1.0  # where a series does not say how large its pixels are
AXIAL_COSINE = 0.7  # of the stack's direction with the patient's axis
PERCENTILE_VOXELS = 2**22  # enough for a percentile; a whole volume takes seconds


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Inputs of the model, before any stage of pruning.

    pixels: (I, rows, columns, 3) uint8, in stack order.
    inputs: I of them, all kept so far.
    sources: every instance of the series with its state as if all inputs were shown.
    applied: what was done, for the audit.
    pooled: (I, h, w) float32, the same inputs in HU (MR: rescaled values), averaged over a few pixels.
    """

    pixels: NDArray[np.uint8]
    inputs: tuple[ModelInput, ...]
    sources: tuple[SourceInstance, ...]
    applied: dict[str, Any]
    pooled: NDArray[np.float32]
    source_from_voxel: NDArray[np.float64]

    def source_pixels_from_token(self, token_rows: int, token_columns: int) -> NDArray[np.float64]:
        """(I, 2, 3) float64, as RetentionArrays wants it: token centres to pixels of the source frames."""
        rows, columns = self.pixels.shape[1:3]
        affine = compose(self.source_from_voxel, token_affine(rows, columns, token_rows, token_columns))
        return np.repeat(affine[None], len(self.inputs), axis=0)

    def guide(self, volume: Volume) -> Guide:
        """What pruning may know of these inputs."""
        places = np.array([one.position_mm for one in self.inputs])
        along = float(np.median(np.diff(places))) if len(places) > 1 else volume.spacing_mm[0]
        row_mm, column_mm = (
            (mm or UNKNOWN_MM) * whole / pooled
            for mm, whole, pooled in zip(
                volume.spacing_mm[1:], volume.voxels.shape[1:], self.pooled.shape[1:], strict=True
            )
        )
        return make_guide(
            self.pooled,
            places,
            spacing=Spacing(along or UNKNOWN_MM, row_mm, column_mm),
            modality=volume.modality,
            axial=abs(volume.normal[2]) > AXIAL_COSINE,
            window=self.applied["windows"][0],
        )


@dataclass(frozen=True, slots=True)
class Slab:
    """Slices first to last - 1 of the volume make one input."""

    first: int
    last: int


def prepare(volume: Volume, settings: SeriesSettings, pruning: PruningSettings | None = None) -> Prepared:
    """Make at most series.max_slices inputs of the stack, and window them.

    By method `guarded` thin slices become slabs and none is left out; else the stack is sampled evenly.
    """
    slices = len(volume.voxels)
    slabbed = pruning is not None and pruning.method is PruningMethod.GUARDED
    if pruning is not None and slabbed:
        chosen = slabs(slices, volume.spacing_mm[0], pruning.slab_mm, settings.max_slices)
        operation = SliceOperation(pruning.slab_operation)
    else:
        chosen = tuple(Slab(index, index + 1) for index in sample(slices, settings.max_slices))
        operation = SliceOperation.MEAN  # of one slice each
    rows, columns = volume.voxels.shape[1:]
    pixels = np.empty((len(chosen), rows, columns, 3), np.uint8)
    shape = pooled_shape(rows, columns, *volume.spacing_mm[1:])
    pooled = np.empty((len(chosen), *shape), np.float32)
    windows = CT_WINDOWS_HU if volume.modality == "CT" else (_percentiles(volume.voxels),) * 3
    for index, slab in enumerate(chosen):
        image = combine(volume.voxels[slab.first : slab.last], operation)
        pooled[index] = pool(image, shape)
        for channel, (low, high) in enumerate(windows):
            pixels[index, ..., channel] = to_grey(image, low, high)
    thickest = max(slab.last - slab.first for slab in chosen)
    applied: dict[str, Any] = {
        "windows": [[low, high] for low, high in windows],
        "windows_unit": "HU" if volume.modality == "CT" else "MR percentiles 0.5 and 99.5 of the volume",
        "sampling": f"slabs: {operation} of neighbours" if slabbed else "uniform, first and last slice included",
        "max_slices": settings.max_slices,
        "image_rows": rows,
        "image_columns": columns,
    }
    if slabbed:
        applied |= {"slab_slices": thickest, "slab_mm": round(thickest * volume.spacing_mm[0], 3)}
    return Prepared(
        pixels,
        inputs_of(volume, chosen, operation),
        sources_of(volume, chosen),
        applied,
        pooled,
        volume.source_from_voxel,
    )


def slabs(slices: int, slice_mm: float, slab_mm: float, at_most: int) -> tuple[Slab, ...]:
    """Divide the stack into slabs of at most slab_mm, thicker where there would be more than `at_most`.

    Every slice is in exactly one slab; numbers of slices differ by one at most.
    """
    together = max(1, int(slab_mm / slice_mm + 1e-3)) if slice_mm > 0 else 1
    count = min(at_most, -(-slices // together))
    bounds = np.rint(np.linspace(0, slices, count + 1)).astype(int).tolist()
    return tuple(Slab(first, last) for first, last in pairwise(bounds))


def combine(slices: NDArray[np.float32], operation: SliceOperation) -> NDArray[np.float32]:
    """(k, rows, columns) to (rows, columns); a single slice stays as it is."""
    if len(slices) == 1:
        return np.asarray(slices[0])
    if operation is SliceOperation.MIP:
        return np.asarray(slices.max(axis=0))
    return np.asarray(slices.mean(axis=0, dtype=np.float32))


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


def inputs_of(volume: Volume, chosen: tuple[Slab, ...], operation: SliceOperation) -> tuple[ModelInput, ...]:
    return tuple(
        ModelInput(
            index=index,
            operation=SliceOperation.SINGLE if slab.last - slab.first == 1 else operation,
            source_instances=volume.slice_sources[slab.first : slab.last],
            position_mm=float(volume.positions_mm[slab.first : slab.last].mean()),
            kept=True,
        )
        for index, slab in enumerate(chosen)
    )


def sources_of(volume: Volume, chosen: tuple[Slab, ...]) -> tuple[SourceInstance, ...]:
    sources = list(volume.sources)
    for index, slab in enumerate(chosen):
        state = SourceState.SHOWN if slab.last - slab.first == 1 else SourceState.IN_SLAB
        for source in volume.slice_sources[slab.first : slab.last]:
            sources[source] = sources[source].model_copy(update={"state": state, "input_index": index})
    return tuple(sources)
