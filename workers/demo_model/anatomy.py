"""A made-up adult chest as numbers: sizes and places in mm, drawn from a seed. No pixels here.

Axes as in DICOM: x to the patient's left, y to the back, z to the head. z = 0 is the lowest point of the lungs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


class Side(StrEnum):
    """The patient's side, not the viewer's."""

    RIGHT = "right"
    LEFT = "left"


class Zone(StrEnum):
    """Thirds of the lung's height."""

    UPPER = "upper"
    MID = "mid"
    LOWER = "lower"


@dataclass(frozen=True, slots=True)
class Lung:
    """A tapering elliptic cylinder on a dome."""

    x_mm: float  # centre
    y_mm: float
    half_width_mm: float
    half_depth_mm: float
    height_mm: float
    dome_mm: float  # how far the diaphragm rises above the lowest point
    widest: float  # share of the height at which the lung begins to taper


@dataclass(frozen=True, slots=True, eq=False)
class Vessels:
    """Straight pieces of the vascular trees of both lungs. starts, ends: (K, 3) mm; radii_mm: (K,)."""

    starts: Floats
    ends: Floats
    radii_mm: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Chest:
    """One person, without findings."""

    half_width_mm: float
    half_depth_mm: float
    fat_mm: float
    right: Lung
    left: Lung
    cardiothoracic_ratio: float
    heart_tilt_rad: float
    aorta_radius_mm: float
    spine_y_mm: float
    spine_radius_mm: float
    rib_spacing_mm: float
    rib_phase: float
    blood_hu: float
    lung_hu: float
    liver_hu: float
    stomach_air_mm: float  # radius of the bubble under the left dome; 0 without one
    table_y_mm: float
    waves: Floats  # (6, 4): kx, ky, kz in 1/mm, phase, of the slow unevenness of the lungs
    vessels: Vessels

    def lung(self, side: Side) -> Lung:
        return self.right if side is Side.RIGHT else self.left

    @property
    def height_mm(self) -> float:
        return max(self.right.height_mm, self.left.height_mm)


NORMAL_RATIO = (0.38, 0.47)
ENLARGED_RATIO = (0.56, 0.66)


def draw_chest(random: np.random.Generator) -> Chest:
    """A person of ordinary build with a heart of ordinary size."""
    half_width = random.uniform(145, 190)
    half_depth = half_width * random.uniform(0.64, 0.74)
    fat = random.uniform(8, 32)
    height = random.uniform(210, 285)
    inner_width, inner_depth = half_width - fat - 22, half_depth - fat * 0.8 - 16
    lungs = []
    for sign in (-1, 1):
        lung_half_width = inner_width * random.uniform(0.45, 0.49)
        lungs.append(
            Lung(
                x_mm=sign * (inner_width - lung_half_width),
                y_mm=random.uniform(-4, 6),
                half_width_mm=lung_half_width,
                half_depth_mm=inner_depth * random.uniform(0.93, 1.0),
                height_mm=height * random.uniform(0.97, 1.0),
                dome_mm=height * random.uniform(0.2, 0.3),
                widest=random.uniform(0.3, 0.42),
            )
        )
    right, left = lungs
    return Chest(
        half_width_mm=half_width,
        half_depth_mm=half_depth,
        fat_mm=fat,
        right=right,
        left=left,
        cardiothoracic_ratio=random.uniform(*NORMAL_RATIO),
        heart_tilt_rad=random.uniform(0.4, 0.8),
        aorta_radius_mm=random.uniform(10, 14),
        spine_y_mm=inner_depth * random.uniform(0.6, 0.68),
        spine_radius_mm=random.uniform(15, 19),
        rib_spacing_mm=random.uniform(27, 35),
        rib_phase=random.uniform(0, 1),
        blood_hu=random.uniform(35, 50) if random.random() < 0.5 else random.uniform(120, 220),
        lung_hu=random.uniform(-880, -800),
        liver_hu=random.uniform(40, 110),
        stomach_air_mm=random.uniform(12, 30) if random.random() < 0.6 else 0.0,
        table_y_mm=half_depth + random.uniform(4, 18),
        waves=_draw_waves(random),
        vessels=_draw_vessels(random, (right, left)),
    )


def with_enlarged_heart(chest: Chest, random: np.random.Generator) -> Chest:
    return replace(chest, cardiothoracic_ratio=random.uniform(*ENLARGED_RATIO))


def zone_of(share_of_height: float) -> Zone | None:
    """Which third of the lung; None within 2 % of a border, where two readers would disagree."""
    for border in (1 / 3, 2 / 3):
        if abs(share_of_height - border) < 0.02:
            return None
    return Zone.LOWER if share_of_height < 1 / 3 else Zone.MID if share_of_height < 2 / 3 else Zone.UPPER


def taper(lung: Lung, share_of_height: Floats | float) -> Floats:
    """Width of the lung at a height (share of its own height), as a share of its greatest."""
    above = np.clip((np.asarray(share_of_height, np.float32) - lung.widest) / (1 - lung.widest), 0, 1)
    width: Floats = np.sqrt(np.maximum(1 - above**2.2, 1e-4)).astype(np.float32)
    return width


def dome_height_mm(lung: Lung, x_mm: Floats | float, y_mm: Floats | float) -> Floats:
    """Height of the diaphragm under a place of the lung; deepest at the back, where fluid gathers."""
    across = (np.asarray(x_mm, np.float32) - lung.x_mm * 0.9) / (lung.half_width_mm * 1.15)
    along = (np.asarray(y_mm, np.float32) - lung.y_mm + 0.25 * lung.half_depth_mm) / (lung.half_depth_mm * 1.25)
    return (lung.dome_mm * (1 - across**2 - along**2)).astype(np.float32)


def depth_in_lung_mm(lung: Lung, x_mm: float, y_mm: float, z_mm: float) -> float:
    """Roughly how far a point lies inside the lung; negative outside."""
    share = z_mm / lung.height_mm
    if not 0 < share < 1:
        return -1.0
    width = float(taper(lung, share))
    a, b = lung.half_width_mm * width, lung.half_depth_mm * (0.25 + 0.75 * width)
    inside = 1 - np.hypot((x_mm - lung.x_mm) / a, (y_mm - lung.y_mm) / b)
    return float(min(inside * min(a, b), z_mm - dome_height_mm(lung, x_mm, y_mm), lung.height_mm - z_mm))


def hilum_mm(lung: Lung) -> tuple[float, float, float]:
    """Where bronchi and vessels enter the lung."""
    return lung.x_mm * 0.48, lung.y_mm + 5.0, lung.height_mm * 0.52


def _draw_waves(random: np.random.Generator) -> Floats:
    waves = np.empty((6, 4), np.float32)
    waves[:, :3] = random.normal(0, 1, (6, 3)) / random.uniform(12, 40, (6, 1))
    waves[:, 3] = random.uniform(0, 2 * np.pi, 6)
    return waves


def _draw_vessels(random: np.random.Generator, lungs: tuple[Lung, Lung]) -> Vessels:
    """Trees from each hilum: every piece splits in two thinner, shorter ones."""
    starts, ends, radii = [], [], []
    for lung in lungs:
        trunks = int(random.integers(9, 14))
        start = np.tile(np.asarray(hilum_mm(lung)), (trunks, 1)) + random.normal(0, 1, (trunks, 3)) * (3, 7, 14)
        aim = np.stack(
            [
                lung.x_mm + random.uniform(-0.4, 0.9, trunks) * np.sign(lung.x_mm) * lung.half_width_mm,
                lung.y_mm + random.uniform(-0.9, 0.9, trunks) * lung.half_depth_mm,
                random.uniform(0.1, 0.95, trunks) * lung.height_mm,
            ],
            axis=1,
        )
        direction = aim - start
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        length = random.uniform(22, 34, trunks)
        radius = random.uniform(1.8, 3.2, trunks)
        for _ in range(5):
            end = start + direction * length[:, None]
            starts.append(start)
            ends.append(end)
            radii.append(radius)
            start = np.repeat(end, 2, axis=0)
            direction = np.repeat(direction, 2, axis=0) + random.normal(0, 0.42, (len(start), 3))
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            length = np.repeat(length, 2) * random.uniform(0.7, 1.0, len(start))
            radius = np.repeat(radius, 2) * random.uniform(0.62, 0.82, len(start))
    return Vessels(
        np.concatenate(starts).astype(np.float32),
        np.concatenate(ends).astype(np.float32),
        np.concatenate(radii).astype(np.float32),
    )
