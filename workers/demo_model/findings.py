"""What can be wrong with a made-up chest, and where; drawn from a seed so that every finding can be seen.

A finding never hides in another one: its label would be wrong for every reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from workers.demo_model.anatomy import (
    ENLARGED_RATIO,
    Chest,
    Floats,
    Side,
    Zone,
    depth_in_lung_mm,
    hilum_mm,
    zone_of,
)


class NoduleKind(StrEnum):
    """How dense a nodule is."""

    SOLID = "solid"
    GROUND_GLASS = "ground glass"


class Extent(StrEnum):
    """Size of an effusion or a pneumothorax."""

    SMALL = "small"
    MODERATE = "moderate"
    LARGE = "large"


@dataclass(frozen=True, slots=True)
class Nodule:
    side: Side
    zone: Zone
    kind: NoduleKind
    diameter_mm: float
    centre_mm: tuple[float, float, float]
    hu: float


@dataclass(frozen=True, slots=True)
class Effusion:
    side: Side
    extent: Extent
    top: float  # share of the lung's height that the fluid reaches at the back
    front: float  # -1 front .. 1 back of the lung: where the fluid begins
    hu: float


@dataclass(frozen=True, slots=True)
class Consolidation:
    side: Side
    zone: Zone
    centre_mm: tuple[float, float, float]
    radii_mm: tuple[float, float, float]
    hu: float


@dataclass(frozen=True, slots=True)
class Pneumothorax:
    side: Side
    extent: Extent
    collapse: float  # share by which the lung is smaller than its cavity


@dataclass(frozen=True, slots=True)
class Calcification:
    """One plaque in the wall of the aorta."""

    centre_mm: tuple[float, float, float]
    diameter_mm: float
    hu: float


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything abnormal in one chest; the empty value is a normal chest."""

    nodules: tuple[Nodule, ...] = ()
    effusions: tuple[Effusion, ...] = ()
    consolidations: tuple[Consolidation, ...] = ()
    pneumothorax: Pneumothorax | None = None
    cardiomegaly: bool = False
    calcifications: tuple[Calcification, ...] = field(default=())


NODULE_DIAMETERS_MM = (4.0, 30.0)
TOP_OF_EFFUSION = {Extent.SMALL: (0.22, 0.3), Extent.MODERATE: (0.45, 0.55), Extent.LARGE: (0.72, 0.85)}
FRONT_OF_EFFUSION = {Extent.SMALL: 0.25, Extent.MODERATE: -0.05, Extent.LARGE: -0.5}
COLLAPSE = {Extent.SMALL: (0.12, 0.18), Extent.LARGE: (0.32, 0.45)}


def draw_findings(chest: Chest, random: np.random.Generator, *, nodules: int | None = None) -> Findings:
    """Findings of one chest; a tenth are normal. `nodules` fixes how many are tried instead of drawing it."""
    cardiomegaly = chest.cardiothoracic_ratio >= ENLARGED_RATIO[0]
    if random.random() < 0.12 and nodules is None:
        return Findings(cardiomegaly=cardiomegaly)
    effusions = _draw_effusions(random) if random.random() < 0.28 else ()
    fluid_sides = {effusion.side for effusion in effusions}
    pneumothorax = _draw_pneumothorax(random) if random.random() < 0.18 else None
    if pneumothorax is not None and pneumothorax.side in fluid_sides:
        pneumothorax = None
    taken = fluid_sides | ({pneumothorax.side} if pneumothorax else set())
    consolidations = _draw_consolidation(chest, random, taken) if random.random() < 0.25 else ()
    calcifications = draw_calcifications(chest, random) if random.random() < 0.3 else ()
    found = Findings((), effusions, consolidations, pneumothorax, cardiomegaly, calcifications)
    count = (1 if random.random() < 0.55 else 0) if nodules is None else nodules
    drawn: list[Nodule] = []
    for _ in range(count):
        nodule = draw_nodule(chest, random, found, drawn)
        if nodule is not None:
            drawn.append(nodule)
    return Findings(tuple(drawn), effusions, consolidations, pneumothorax, cardiomegaly, calcifications)


def fluid_height(effusion: Effusion, towards_back: Floats | float) -> Floats:
    """Height of the fluid as a share of the lung's, where -1 is the front of the lung and 1 its back."""
    share = np.clip((np.asarray(towards_back, np.float32) - effusion.front) / (1 - effusion.front), 0, 1)
    height: Floats = effusion.top * np.sqrt(share) - 0.5 * (share <= 0)
    return height


def _draw_side(random: np.random.Generator) -> Side:
    return Side.RIGHT if random.random() < 0.5 else Side.LEFT


def _draw_effusions(random: np.random.Generator) -> tuple[Effusion, ...]:
    extent = random.choice(list(Extent))
    sides = tuple(Side) if random.random() < 0.3 else (_draw_side(random),)
    hu = random.uniform(0, 22)
    top, front = random.uniform(*TOP_OF_EFFUSION[extent]), FRONT_OF_EFFUSION[extent] + random.uniform(-0.08, 0.08)
    return tuple(Effusion(side, Extent(extent), top, front, hu) for side in sides)


def _draw_pneumothorax(random: np.random.Generator) -> Pneumothorax:
    extent = Extent.SMALL if random.random() < 0.5 else Extent.LARGE
    return Pneumothorax(_draw_side(random), extent, random.uniform(*COLLAPSE[extent]))


def _draw_consolidation(chest: Chest, random: np.random.Generator, taken: set[Side]) -> tuple[Consolidation, ...]:
    free = [side for side in Side if side not in taken]
    if not free:
        return ()
    side = free[int(random.integers(len(free)))]
    lung = chest.lung(side)
    for _ in range(60):
        x, y, z, share = _draw_place(chest, side, random)
        zone = zone_of(share)
        if zone is None or depth_in_lung_mm(lung, x, y, z) < 12:
            continue
        if np.linalg.norm(np.subtract((x, y, z), hilum_mm(lung))) < 35:
            continue
        radius = random.uniform(24, 42)
        radii = (radius, radius * random.uniform(0.8, 1.2), radius * random.uniform(0.7, 1.0))
        return (Consolidation(side, zone, (x, y, z), radii, random.uniform(5, 50)),)
    return ()


def draw_calcifications(chest: Chest, random: np.random.Generator) -> tuple[Calcification, ...]:
    """Two to five plaques in the wall of the descending aorta, large enough to show in a slab of 11 mm."""
    plaques = []
    for _ in range(int(random.integers(2, 6))):
        angle, share = random.uniform(0, 2 * np.pi), random.uniform(0.15, 0.74)
        x, y = descending_aorta_mm(chest)
        radius = chest.aorta_radius_mm - 1.5
        dx, dy = radius * float(np.cos(angle)), radius * float(np.sin(angle))
        centre = (x + dx, y + dy, share * chest.height_mm)
        plaques.append(Calcification(centre, random.uniform(8, 13), random.uniform(700, 1200)))
    return tuple(plaques)


def descending_aorta_mm(chest: Chest) -> tuple[float, float]:
    """Centre of the descending aorta in the axial plane: to the left of the spine's front."""
    return chest.spine_radius_mm + 8.0, chest.spine_y_mm - chest.spine_radius_mm * 0.55


def _draw_place(chest: Chest, side: Side, random: np.random.Generator) -> tuple[float, float, float, float]:
    lung = chest.lung(side)
    share = random.uniform(0.08, 0.95)
    x = lung.x_mm + random.uniform(-1, 1) * lung.half_width_mm
    y = lung.y_mm + random.uniform(-1, 1) * lung.half_depth_mm
    return x, y, share * lung.height_mm, share


def draw_nodule(
    chest: Chest,
    random: np.random.Generator,
    found: Findings,
    others: list[Nodule],
    *,
    diameter_mm: float | None = None,
) -> Nodule | None:
    """Somewhere free, of any diameter if none is given; None where no place was found."""
    drawn = float(np.exp(random.uniform(*np.log(NODULE_DIAMETERS_MM))))
    diameter = drawn if diameter_mm is None else diameter_mm
    solid = bool(random.random() < 0.6)
    for _ in range(80):
        side = _draw_side(random)
        x, y, z, share = _draw_place(chest, side, random)
        zone = zone_of(share)
        if zone is None or not _is_free(chest, found, others, side, (x, y, z), diameter):
            continue
        kind = NoduleKind.SOLID if solid else NoduleKind.GROUND_GLASS
        hu = random.uniform(0, 90) if solid else random.uniform(-560, -350)
        return Nodule(side, zone, kind, diameter, (x, y, z), hu)
    return None


def _is_free(
    chest: Chest,
    found: Findings,
    others: list[Nodule],
    side: Side,
    place: tuple[float, float, float],
    diameter_mm: float,
) -> bool:
    """In aerated lung, off the hilum, and touching nothing that could be taken for it."""
    x, y, z = place
    lung, radius = chest.lung(side), diameter_mm / 2
    if depth_in_lung_mm(lung, x, y, z) < radius + 4:
        return False
    if np.linalg.norm(np.subtract(place, hilum_mm(lung))) < 32 + radius:
        return False
    if _distance_to_heart_mm(chest, place) < radius + 8:
        return False
    for effusion in found.effusions:
        back = (y - lung.y_mm + radius + 6) / lung.half_depth_mm
        if effusion.side is side and fluid_height(effusion, back) * lung.height_mm > z - radius - 8:
            return False
    for consolidation in found.consolidations:
        apart = np.linalg.norm(np.subtract(place, consolidation.centre_mm))
        if apart < max(consolidation.radii_mm) * 1.2 + radius + 8:
            return False
    if found.pneumothorax is not None and found.pneumothorax.side is side:
        return False
    return all(
        np.linalg.norm(np.subtract(place, other.centre_mm)) > radius + other.diameter_mm / 2 + 15 for other in others
    )


@dataclass(frozen=True, slots=True)
class Heart:
    """An ellipsoid, tilted in the axial plane. Radii along its long, short and vertical axis."""

    centre_mm: tuple[float, float, float]
    radii_mm: tuple[float, float, float]
    tilt_rad: float


def heart_of(chest: Chest) -> Heart:
    """The heart whose width in the axial plane is the cardiothoracic ratio times the lungs' outer width."""
    outer = chest.left.x_mm + chest.left.half_width_mm - chest.right.x_mm + chest.right.half_width_mm
    half_width = chest.cardiothoracic_ratio * outer / 2
    cos, sin = np.cos(chest.heart_tilt_rad), np.sin(chest.heart_tilt_rad)
    shape = 0.72  # short over long axis
    long = half_width / np.hypot(cos, shape * sin)
    centre = (half_width * 0.34, -chest.left.half_depth_mm * 0.28, chest.height_mm * 0.34)
    return Heart(centre, (float(long), float(long * shape), float(long * 0.85)), chest.heart_tilt_rad)


def _distance_to_heart_mm(chest: Chest, place: tuple[float, float, float]) -> float:
    heart = heart_of(chest)
    dx, dy, dz = np.subtract(place, heart.centre_mm)
    cos, sin = np.cos(heart.tilt_rad), np.sin(heart.tilt_rad)
    scaled = np.asarray(
        [(cos * dx + sin * dy) / heart.radii_mm[0], (cos * dy - sin * dx) / heart.radii_mm[1], dz / heart.radii_mm[2]]
    )
    return float((np.linalg.norm(scaled) - 1) * min(heart.radii_mm))
