"""Volume -> the inputs that the demonstration model was trained on: few slabs, few pixels, a channel of its own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from service.shared.messages import SliceOperation
from service.shared.settings import SeriesSettings
from workers.demo_model.channels import ct_images, mr_images, slab_bounds, to_halves, to_slabs, voxel_of_halves
from workers.guide import pool, pooled_shape
from workers.preprocess import Prepared, Slab, compose, inputs_of, sources_of
from workers.volume import Volume


def prepare_for_demonstration(volume: Volume, settings: SeriesSettings, wanted: dict[str, Any]) -> Prepared:
    """Average the whole stack to the slabs and pixels that `wanted` (medpruner.json of the weights) names.

    No slice is left out. The slabs are the model's own; those of the method `guarded` do not apply to it.
    """
    count, pixels = min(int(wanted["slabs"]), settings.max_slices), int(wanted["pixels"])
    chosen = tuple(Slab(int(a), int(b)) for a, b in pairwise(slab_bounds(len(volume.voxels), count)))
    halves = to_halves(volume.voxels, count, pixels)
    small, voxel_mm = to_slabs(halves), voxel_of_halves(volume.spacing_mm, volume.voxels.shape, halves.shape)
    rows, columns = volume.voxels.shape[1:]
    shape = pooled_shape(rows, columns, *volume.spacing_mm[1:])
    pooled = np.stack([pool(volume.voxels[slab.first : slab.last].mean(axis=0), shape) for slab in chosen])
    is_ct = volume.modality == "CT"
    windows = wanted["windows_hu"] if is_ct else [[float(small.min()), float(small.max())]]
    applied: dict[str, Any] = {
        "windows": windows,
        "windows_unit": "HU" if is_ct else "MR values",
        "third_channel": wanted["third_channel"] if is_ct else "as the first",
        "sampling": "slabs: mean of neighbours, as the demonstration model was trained",
        "slab_slices": max(slab.last - slab.first for slab in chosen),
        "blob_voxel_mm": [round(step, 2) for step in voxel_mm] if is_ct else None,
        "image_rows": pixels,
        "image_columns": pixels,
    }
    voxel_from_pixel = np.array([[columns / pixels, 0.0, 0.0], [0.0, rows / pixels, 0.0]])
    return Prepared(
        pixels=ct_images(halves, voxel_mm) if is_ct else mr_images(small),
        inputs=inputs_of(volume, chosen, SliceOperation.MEAN),
        sources=sources_of(volume, chosen),
        applied=applied,
        pooled=np.asarray(pooled, np.float32),
        source_from_voxel=compose(volume.source_from_voxel, voxel_from_pixel),
    )
