"""The slice stage: which slices of a stack differ enough from the last kept one to be encoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.pruning.finite import require_finite


@dataclass(frozen=True, slots=True, eq=False)
class SliceChoice:
    """What the slice stage decided about S slices, in stack order.

    kept: (S,) bool; the first slice is always kept.
    anchor: (S,) int64, the kept slice that stands for this one: itself when kept, else the last one kept.
    distance: (S,) float64, mean absolute difference to the anchor before it; NaN where none was taken.
    """

    kept: Tensor
    anchor: Tensor
    distance: Tensor


def keep_changed(slices: Tensor, *, gamma: float) -> SliceChoice:
    """Keep a slice when its mean absolute difference to the last kept slice is above gamma.

    slices: (S, ...), S >= 1, as the model sees them (normally scaled to [-1, 1]).
    gamma: on the same scale; 0 keeps every slice that differs at all.
    The loop waits for no device: anchors are indexed by tensors. NotFinite when a value is NaN or infinite.
    Source: MedPruner (arXiv 2603.11625), slice stage.
    """
    require_finite(slices, "slices")
    count, device = slices.shape[0], slices.device
    anchor = torch.zeros((), dtype=torch.int64, device=device)
    kept = [torch.ones((), dtype=torch.bool, device=device)]
    anchors = [anchor]
    distances = [torch.full((), torch.nan, dtype=torch.float64, device=device)]
    for index in range(1, count):
        last = slices.index_select(0, anchor.view(1))[0].float()
        # summed in float64: near gamma the order of a float32 sum over a million pixels decides
        distance = (slices[index].float() - last).abs().mean(dtype=torch.float64)
        changed = distance > gamma
        anchor = torch.where(changed, index, anchor)
        kept.append(changed)
        anchors.append(anchor)
        distances.append(distance)
    return SliceChoice(torch.stack(kept), torch.stack(anchors), torch.stack(distances))


def keep_all(count: int) -> SliceChoice:
    """Keep each of `count` slices; no distance is taken."""
    return SliceChoice(
        kept=torch.ones(count, dtype=torch.bool),
        anchor=torch.arange(count),
        distance=torch.full((count,), torch.nan, dtype=torch.float64),
    )
