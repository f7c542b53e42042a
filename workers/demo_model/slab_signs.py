"""A teaching signal inside the language model: at the end of each slab it is asked what the slab shows.

A report has one word that says whether there is a nodule; this has 24 per study. The heads are thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from workers.demo_model.anatomy import Side
from workers.demo_model.architecture import TEXT_WIDTH
from workers.demo_model.encode import Shown
from workers.demo_model.findings import NoduleKind
from workers.demo_model.labels import Labels
from workers.demo_model.pool import TOKENS_PER_SIDE
from workers.demo_model.targets import Sign, Targets

NAMES = (
    *("nodule", "nodule right", "nodule left", "nodule >= 12 mm", "solid nodule"),
    *("effusion right", "effusion left", "consolidation right", "consolidation left"),
    *("pneumothorax right", "pneumothorax left", "calcification", "enlarged heart"),
)
IMPORTANCE = torch.tensor([4.0, *[2.0] * 4, *[1.0] * 6, 3.0, 1.0])
LARGE_MM = 12
SO_FAR_WEIGHT = 0.5

Signs = tuple[NDArray[np.float32], NDArray[np.float32]]  # (S, len(NAMES)): 0/1, and weight 0 where nobody could say


def slab_signs(targets: Targets, labels: Labels) -> Signs:
    """targets: on the token grid. Patient's right is the left half of the image."""
    present = targets.present
    found = np.zeros((len(present), len(NAMES)), np.float32)
    weight = np.ones_like(found)
    nodule = present[..., Sign.NODULE].max(axis=1)
    found[:, 0] = nodule
    if labels.nodules:
        largest = labels.nodules[0]
        found[:, 1 if largest.side is Side.RIGHT else 2] = nodule
        found[:, 3] = nodule * (largest.diameter_mm >= LARGE_MM)
        found[:, 4] = nodule * (largest.kind is NoduleKind.SOLID)
    weight[(targets.weight[..., Sign.NODULE] == 0).any(axis=1) & (nodule == 0), :5] = 0
    right = np.arange(TOKENS_PER_SIDE**2) % TOKENS_PER_SIDE < TOKENS_PER_SIDE // 2
    for column, sign in ((5, Sign.EFFUSION), (7, Sign.CONSOLIDATION), (9, Sign.PNEUMOTHORAX)):
        found[:, column] = present[:, right, sign].max(axis=1)
        found[:, column + 1] = present[:, ~right, sign].max(axis=1)
    found[:, 11] = present[..., Sign.CALCIFICATION].max(axis=1)
    found[:, 12] = present[..., Sign.ENLARGED].max(axis=1)
    return found, weight


class SlabHeads(nn.Module):
    """What a slab shows, read early; what all slabs so far showed, read from the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.slab = nn.Linear(TEXT_WIDTH, len(NAMES))
        self.so_far = nn.Linear(TEXT_WIDTH, len(NAMES))

    def loss(self, early: Tensor, late: Tensor, signs: Sequence[Signs], shown: Sequence[Shown]) -> Tensor:
        """early, late: hidden states at the ends of the shown slabs, study after study."""
        device = early.device
        kept = [one.kept.any(dim=1).numpy() for one in shown]
        found = [present[some] for (present, _), some in zip(signs, kept, strict=True)]
        weight = torch.from_numpy(np.concatenate([w[some] for (_, w), some in zip(signs, kept, strict=True)]))
        so_far = torch.from_numpy(np.concatenate([np.maximum.accumulate(one, axis=0) for one in found]))
        here = functional.binary_cross_entropy_with_logits(
            self.slab(functional.rms_norm(early, early.shape[-1:])),
            torch.from_numpy(np.concatenate(found)).to(device),
            (weight * IMPORTANCE).to(device),
        )
        return here + SO_FAR_WEIGHT * functional.binary_cross_entropy_with_logits(
            self.so_far(late), so_far.to(device), IMPORTANCE.expand_as(so_far).to(device)
        )
