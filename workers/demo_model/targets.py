"""What each patch of each slab shows, from the masks: the dense teaching signal of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from workers.demo_model.findings import Nodule, NoduleKind
from workers.demo_model.phantom import Phantom
from workers.demo_model.render import Mask


class Sign(IntEnum):
    """Columns of the targets."""

    NODULE = 0
    SOLID = 1
    EFFUSION = 2
    CONSOLIDATION = 3
    PNEUMOTHORAX = 4
    CALCIFICATION = 5
    HEART = 6
    ENLARGED = 7
    LUNG = 8
    BODY = 9
    SUPPORTED = 10
    RIGHT = 11  # of the lungs
    LEFT = 12
    UPPER = 13  # thirds of the lungs
    MID = 14
    LOWER = 15


SIGNS = len(Sign)


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Per slab and cell. present: (S, n, SIGNS) float32 0/1; weight: the same shape, 0 where nobody could say.

    log_diameter: (S, n) natural logarithm of the nodule's diameter in mm, 0 without one.
    """

    present: NDArray[np.float32]
    weight: NDArray[np.float32]
    log_diameter: NDArray[np.float32]


def targets_of(phantom: Phantom, side: int) -> Targets:
    """Targets on a grid of side x side cells."""
    slabs = len(phantom.masks)
    present = np.zeros((slabs, side * side, SIGNS), np.float32)
    weight = np.ones_like(present)
    shares = {bit: _cells((phantom.masks & bit) > 0, side) for bit in Mask}
    for sign, bit, least in (
        (Sign.EFFUSION, Mask.EFFUSION, 0.08),
        (Sign.CONSOLIDATION, Mask.CONSOLIDATION, 0.08),
        (Sign.PNEUMOTHORAX, Mask.PNEUMOTHORAX, 0.08),
        (Sign.HEART, Mask.HEART, 0.15),
        (Sign.LUNG, Mask.LUNG, 0.15),
        (Sign.BODY, Mask.BODY, 0.15),
    ):
        present[..., sign] = shares[bit] > least
        weight[..., sign] = (shares[bit] > least) | (shares[bit] == 0)
    present[..., Sign.CALCIFICATION] = shares[Mask.CALCIFICATION] > 0
    present[..., Sign.SUPPORTED] = phantom.labels.supported
    present[..., Sign.ENLARGED] = present[..., Sign.HEART] * phantom.labels.cardiomegaly
    weight[..., Sign.ENLARGED] = present[..., Sign.HEART]
    weight[..., Sign.SOLID] = 0
    _place(phantom, present, weight, side)
    log_diameter = np.zeros((slabs, side * side), np.float32)
    for nodule in phantom.findings.nodules if phantom.labels.supported else ():
        share = _ball(phantom, nodule, side)
        most = share.max(axis=1, keepdims=True)
        sure = (share > 0) & (share >= 0.3 * most) & (share > 0.15 * share.max())
        present[..., Sign.NODULE][sure] = 1
        weight[..., Sign.NODULE][(share > 0) & ~sure] = 0
        weight[..., Sign.SOLID][sure] = 1
        present[..., Sign.SOLID][sure] = nodule.kind is NoduleKind.SOLID
        log_diameter[sure] = np.log(nodule.diameter_mm)
    return Targets(present, weight, log_diameter)


def _place(phantom: Phantom, present: NDArray[np.float32], weight: NDArray[np.float32], side: int) -> None:
    """Which lung and which third of it a cell shows; nothing is asked of cells without lung or on a border."""
    lung = present[..., Sign.LUNG] * phantom.labels.supported
    size = phantom.masks.shape[2]
    x = ((np.arange(side) + 0.5) / side - 0.5) * size * phantom.pixel_mm + phantom.centre_mm[0]
    x_cells = np.tile(x, side)[None]
    share = (phantom.z_mm / max(phantom.lungs_mm, 1.0))[:, None]
    for sign, inside, border in (
        (Sign.RIGHT, x_cells < 0, np.abs(x_cells) < 12),
        (Sign.LEFT, x_cells > 0, np.abs(x_cells) < 12),
        (Sign.UPPER, share > 2 / 3, np.abs(share - 2 / 3) < 0.02),
        (Sign.MID, (share > 1 / 3) & (share < 2 / 3), np.minimum(np.abs(share - 1 / 3), np.abs(share - 2 / 3)) < 0.02),
        (Sign.LOWER, share < 1 / 3, np.abs(share - 1 / 3) < 0.02),
    ):
        present[..., sign] = lung * inside
        weight[..., sign] = lung * ~border


def _cells(mask: NDArray[np.bool_], side: int) -> NDArray[np.float32]:
    """Share of each cell that the mask fills: (S, H, W) to (S, side * side), row-major."""
    slabs, rows, columns = mask.shape
    high, wide = rows // side, columns // side
    down = mask.view(np.uint8).reshape(slabs, side, high, columns).sum(axis=2, dtype=np.uint8 if high < 256 else None)
    filled = down.reshape(slabs, side * side, wide).sum(axis=2, dtype=np.float32)  # rows first, along memory: quicker
    return np.asarray(filled / np.float32(high * wide), np.float32)


def _ball(phantom: Phantom, nodule: Nodule, side: int) -> NDArray[np.float32]:
    """Share of each cell that one nodule fills: the voxels of the nodule bit within its radius."""
    step, size = phantom.pixel_mm, phantom.masks.shape[2]
    along = (np.arange(size) + 0.5 - size / 2) * step
    x, y, z = nodule.centre_mm
    reach = nodule.diameter_mm / 2
    near_x = np.abs(along + phantom.centre_mm[0] - x) < reach + 1.5 * step
    near_y = np.abs(along + phantom.centre_mm[1] - y) < reach + 1.5 * step
    near_z = np.flatnonzero(np.abs(phantom.z_mm - z) < reach + phantom.slice_mm)
    shares = np.zeros((len(phantom.masks), side * side), np.float32)
    shares[near_z] = _cells(((phantom.masks[near_z] & Mask.NODULE) > 0) & near_y[:, None] & near_x, side)
    return shares
