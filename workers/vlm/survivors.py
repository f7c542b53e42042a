"""What tower and pruning left of a study, before any prompt; a file keeps it for the next prompt about it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from service.shared import VERSION
from service.shared.durable import make_folder, write_durably
from service.shared.messages import ModelIdentity
from service.shared.settings import PruningSettings
from service.shared.study_cache import SUFFIX
from workers.guide import Guide
from workers.pruning.slices import SliceChoice
from workers.pruning.tokens import Reduced


@dataclass(frozen=True, slots=True, eq=False)
class Survivors:
    """I inputs, K of them encoded, n tokens each.

    choice: of the slice stage. kept, merged_into, scores: (K, n), of the token stage.
    features: (kept, c), of the surviving tokens in order; deepstack: further features of each, (kept, c).
    patch_rows, patch_columns: of one input, before the projector pools them.
    """

    choice: SliceChoice
    kept: Tensor
    merged_into: Tensor
    scores: Tensor
    features: Tensor
    deepstack: tuple[Tensor, ...]
    patch_rows: int
    patch_columns: int


def survivors_of(
    choice: SliceChoice, reduced: Reduced, deepstack: tuple[Tensor, ...], patch_rows: int, patch_columns: int
) -> Survivors:
    """Take out what was not kept; deepstack rows are selected, not merged."""
    flat = reduced.kept.flatten()
    return Survivors(
        choice,
        reduced.kept,
        reduced.merged_into,
        reduced.scores,
        reduced.features.flatten(0, 1)[flat],
        tuple(layer.flatten(0, 1)[flat] for layer in deepstack),
        patch_rows,
        patch_columns,
    )


def cache_key(images: NDArray[np.uint8], pruning: PruningSettings, guide: Guide | None, model: ModelIdentity) -> str:
    """Return a digest of everything that the survivors depend on, and of nothing else: not of the prompt.

    images: as preprocessed, so that source pixels and preprocessing are both in it.
    """
    digest = hashlib.sha256()
    settings = pruning.model_dump_json(exclude={"dropped_slices"})
    for text in (VERSION, settings, model.model_dump_json(exclude={"name", "path"})):
        digest.update(text.encode() + b"\0")
    arrays = [images]
    if guide is not None:
        digest.update("\0".join(guide.regions.names).encode())
        arrays += [guide.regions.labels, guide.contrast, guide.tiles, guide.positions_mm]  # type: ignore[list-item]
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def store(folder: Path, key: str, survivors: Survivors) -> None:
    """Write one file, whole or not at all."""
    tensors = {
        "inputs_kept": survivors.choice.kept,
        "anchor": survivors.choice.anchor,
        "distance": survivors.choice.distance,
        "kept": survivors.kept,
        "merged_into": survivors.merged_into,
        "scores": survivors.scores,
        "features": survivors.features,
        "patches": torch.tensor([survivors.patch_rows, survivors.patch_columns]),
    }
    tensors |= {f"deepstack.{layer}": values for layer, values in enumerate(survivors.deepstack)}
    make_folder(folder)
    content = save({name: values.detach().cpu().contiguous() for name, values in tensors.items()})
    write_durably(folder / f"{key}{SUFFIX}", content)


def load(folder: Path, key: str, device: torch.device) -> Survivors | None:
    """Return what store() wrote, or None where there is nothing whole; using it makes it young again."""
    path = folder / f"{key}{SUFFIX}"
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        os.utime(path)
    except (OSError, SafetensorError):  # absent, removed meanwhile, or cut short
        return None
    rows, columns = tensors["patches"].tolist()
    layers = sum(name.startswith("deepstack.") for name in tensors)
    return Survivors(
        choice=SliceChoice(tensors["inputs_kept"], tensors["anchor"], tensors["distance"]),
        kept=tensors["kept"].to(device),
        merged_into=tensors["merged_into"].to(device),
        scores=tensors["scores"].to(device),
        features=tensors["features"].to(device),
        deepstack=tuple(tensors[f"deepstack.{layer}"].to(device) for layer in range(layers)),
        patch_rows=rows,
        patch_columns=columns,
    )
