"""A chest with findings as HU and lesion masks on any grid of voxels, at most ten slices at a time.

Soft edges one voxel wide stand for partial volume. Knows nothing of DICOM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.demo_model.anatomy import Chest, Lung, Side, dome_height_mm, taper
from workers.demo_model.findings import Findings, descending_aorta_mm, fluid_height, heart_of

Floats = NDArray[np.floating[Any]]
CHUNK_SLICES = 10  # larger arrays leave the processor's cache and cost two to four times as much per voxel
AIR_HU = -1000.0


class Mask(IntFlag):
    """Bits of the mask volume: what a voxel belongs to for a good part."""

    NODULE = 1
    EFFUSION = 2
    CONSOLIDATION = 4
    PNEUMOTHORAX = 8
    CALCIFICATION = 16
    HEART = 32
    LUNG = 64  # the cavity of the lungs, findings included
    BODY = 128


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Centres of voxels in mm. z: (S,) head first or feet first; y: (H,); x: (W,)."""

    z_mm: Floats
    y_mm: Floats
    x_mm: Floats
    slice_mm: float  # thickness that one voxel averages over

    @property
    def pixel_mm(self) -> float:
        return float(self.x_mm[1] - self.x_mm[0])


def square_grid(
    z_mm: Floats, slice_mm: float, pixels: int, field_of_view_mm: float, offset_mm: tuple[float, float]
) -> Grid:
    """A square field of view around (x, y) = offset."""
    step = field_of_view_mm / pixels
    centres = ((np.arange(pixels) + 0.5) * step - field_of_view_mm / 2).astype(np.float32)
    return Grid(np.asarray(z_mm, np.float32), centres + offset_mm[1], centres + offset_mm[0], slice_mm)


def render(chest: Chest, findings: Findings, grid: Grid, seed: int) -> tuple[Floats, NDArray[np.uint8]]:
    """HU without noise, (S, H, W) float32, and the masks, (S, H, W) uint8 of Mask bits.

    The same seed and person give the same vessels' speckle; a finer grid shows the same anatomy.
    """
    draw = _chest_painter(chest, findings, seed, grid)
    return in_chunks(grid, draw)


def in_chunks(grid: Grid, draw: Callable[[Grid], tuple[Floats, NDArray[np.uint8]]]) -> tuple[Floats, NDArray[np.uint8]]:
    """Run a painter over the stack, CHUNK_SLICES at a time."""
    shape = (len(grid.z_mm), len(grid.y_mm), len(grid.x_mm))
    hu, mask = np.empty(shape, np.float32), np.zeros(shape, np.uint8)
    for first in range(0, shape[0], CHUNK_SLICES):
        part = slice(first, first + CHUNK_SLICES)
        hu[part], mask[part] = draw(Grid(grid.z_mm[part], grid.y_mm, grid.x_mm, grid.slice_mm))
    return hu, mask


def soft(distance_mm: Floats, width_mm: float) -> Floats:
    """Share of a voxel that is inside, from the signed distance of its centre to the surface (inside > 0)."""
    share: Floats = np.clip(distance_mm * np.float32(1 / width_mm) + np.float32(0.5), 0, 1)
    return share


def paint(hu: Floats, value: Floats | float, share: Floats) -> None:
    """Mix `value` into `hu` where `share` says so."""
    hu += (value - hu) * share


def ellipse(grid: Grid, x: float, y: float, a: Floats | float, b: Floats | float) -> Floats:
    """Approximate signed distance to an axial ellipse, mm, inside > 0; a, b may vary along z as (S, 1, 1)."""
    u = (grid.x_mm[None, None, :] - np.float32(x)) / np.asarray(a, np.float32)
    v = (grid.y_mm[None, :, None] - np.float32(y)) / np.asarray(b, np.float32)
    return (1 - (u * u + v * v)) * (np.minimum(a, b) * np.float32(0.5))


def box_around(grid: Grid, x: float, y: float, radius: float) -> tuple[slice, slice]:
    """Rows and columns that a disc of this radius may touch, for painting small things cheaply."""
    margin = radius + 2 * grid.pixel_mm
    rows = np.searchsorted(grid.y_mm, (y - margin, y + margin))
    columns = np.searchsorted(grid.x_mm, (x - margin, x + margin))
    return slice(*rows), slice(*columns)


def _crop(grid: Grid, box: tuple[slice, slice]) -> Grid:
    return Grid(grid.z_mm, grid.y_mm[box[0]], grid.x_mm[box[1]], grid.slice_mm)


def paint_tube(
    hu: Floats, grid: Grid, x: float, y: float, radius: float, value: float, bottom_mm: float, top_mm: float
) -> None:
    """A vertical cylinder."""
    box = box_around(grid, x, y, radius)
    part = _crop(grid, box)
    if part.x_mm.size < 2 or part.y_mm.size < 2:
        return
    share = soft(ellipse(part, x, y, radius, radius), grid.pixel_mm)
    share = share * _between(grid, bottom_mm, top_mm)
    paint(hu[:, box[0], box[1]], value, share)


def _between(grid: Grid, bottom_mm: float, top_mm: float) -> Floats:
    """Share of each slice's thickness between two heights, (S, 1, 1)."""
    z = grid.z_mm[:, None, None]
    return soft(np.minimum(z - bottom_mm, top_mm - z), grid.slice_mm)


def _chest_painter(
    chest: Chest, findings: Findings, seed: int, whole: Grid
) -> Callable[[Grid], tuple[Floats, NDArray[np.uint8]]]:
    points, volume = _vessel_points(chest, np.random.default_rng((seed, 7)), whole)

    def draw(grid: Grid) -> tuple[Floats, NDArray[np.uint8]]:
        hu, body = _paint_trunk(chest, grid)
        mask = np.where(body > 0.5, np.uint8(Mask.BODY), np.uint8(0))
        lungs = {side: _lung_share(chest.lung(side), grid) for side in Side}
        _paint_lungs(hu, mask, chest, findings, grid, lungs, _splat(points, volume, grid))
        heart = _paint_mediastinum(hu, chest, grid)
        mask[heart > 0.5] |= np.uint8(Mask.HEART)
        _paint_abdomen(hu, chest, grid)
        _paint_bones(hu, chest, grid, lungs)
        for nodule in findings.nodules:
            paint_ball(hu, mask, grid, nodule.centre_mm, nodule.diameter_mm, nodule.hu, Mask.NODULE)
        for plaque in findings.calcifications:
            paint_ball(hu, mask, grid, plaque.centre_mm, plaque.diameter_mm, plaque.hu, Mask.CALCIFICATION)
        return hu, mask

    return draw


def _paint_trunk(chest: Chest, grid: Grid) -> tuple[Floats, Floats]:
    """Air, couch, skin and fat, muscle. Returns HU and the share of the body in each voxel."""
    shape = (len(grid.z_mm), len(grid.y_mm), len(grid.x_mm))
    hu = np.full(shape, AIR_HU, np.float32)
    share_z = grid.z_mm / chest.height_mm
    neck = np.clip((share_z - 0.92) / 0.25, 0, 1)
    a = (chest.half_width_mm * (1 - 0.35 * neck**1.5))[:, None, None].astype(np.float32)
    b = (chest.half_depth_mm * (1 - 0.3 * neck))[:, None, None].astype(np.float32)
    paint_couch(hu, grid, chest.table_y_mm)
    u = np.abs(grid.x_mm[None, None, :]) / a
    v = np.abs(grid.y_mm[None, :, None]) / b
    distance = (1 - (u * u * u + v * v * v)) * (b / 3)
    body = soft(distance, grid.pixel_mm)
    paint(hu, -100.0, body)
    inner_a, inner_b = a - chest.fat_mm, b - chest.fat_mm * 0.8
    muscle = soft(ellipse(grid, 0, 0, inner_a, inner_b), grid.pixel_mm)
    paint(hu, 50.0, muscle)
    return hu, body


def paint_couch(hu: Floats, grid: Grid, table_y_mm: float) -> None:
    """A thin shell under the back."""
    y = grid.y_mm[None, :, None] + 0.0006 * grid.x_mm[None, None, :] ** 2
    wide = soft(215 - np.abs(grid.x_mm[None, None, :]), grid.pixel_mm)
    shell = soft(1.5 - np.abs(y - table_y_mm), grid.pixel_mm) * wide * min(1.0, 3 / grid.pixel_mm)
    paint(hu, -250.0, shell)
    paint(hu, -930.0, soft(y - table_y_mm - 2, grid.pixel_mm) * soft(table_y_mm + 45 - y, grid.pixel_mm) * wide)


def _lung_share(lung: Lung, grid: Grid) -> Floats:
    """Share of each voxel inside the pleural cavity, (S, H, W)."""
    share_z = np.clip(grid.z_mm / lung.height_mm, 0, 1)[:, None, None]
    width = taper(lung, share_z)
    outline = ellipse(
        grid, lung.x_mm, lung.y_mm, lung.half_width_mm * width, lung.half_depth_mm * (0.25 + 0.75 * width)
    )
    dome = dome_height_mm(lung, grid.x_mm[None, :], grid.y_mm[:, None])
    z = grid.z_mm[:, None, None]
    return soft(outline, grid.pixel_mm) * soft(z - dome[None], grid.slice_mm) * _between(grid, 0, lung.height_mm)


def _paint_lungs(
    hu: Floats,
    mask: NDArray[np.uint8],
    chest: Chest,
    findings: Findings,
    grid: Grid,
    lungs: dict[Side, Floats],
    vessels: Floats,
) -> None:
    tissue = _lung_tissue(chest, grid)
    tissue += (40.0 - tissue) * vessels
    for side, share in lungs.items():
        lung = chest.lung(side)
        fill = tissue
        for consolidation in findings.consolidations:
            if consolidation.side is side:
                patch = _consolidation_share(chest, consolidation.centre_mm, consolidation.radii_mm, grid)
                fill = fill + (consolidation.hu - fill) * patch
                mask[(patch * share) > 0.3] |= np.uint8(Mask.CONSOLIDATION)
        gas = findings.pneumothorax
        if gas is not None and gas.side is side:
            empty = _free_air_share(lung, gas.collapse, grid)
            fill = fill + (AIR_HU - fill) * empty
            mask[(empty * share) > 0.3] |= np.uint8(Mask.PNEUMOTHORAX)
        for effusion in findings.effusions:
            if effusion.side is side:
                back = (grid.y_mm - lung.y_mm) / lung.half_depth_mm
                level = (fluid_height(effusion, back) * lung.height_mm).astype(np.float32)
                fluid = soft(level[None, :, None] - grid.z_mm[:, None, None], max(grid.slice_mm, 4.0))
                fill = fill + (effusion.hu - fill) * fluid
                mask[(fluid * share) > 0.3] |= np.uint8(Mask.EFFUSION)
        paint(hu, fill, share)
        mask[share > 0.5] |= np.uint8(Mask.LUNG)


def _lung_tissue(chest: Chest, grid: Grid) -> Floats:
    """Aerated lung: denser towards the back, slowly uneven."""
    x, y, z = grid.x_mm[None, None, :], grid.y_mm[None, :, None], grid.z_mm[:, None, None]
    tissue = np.zeros((len(grid.z_mm), len(grid.y_mm), len(grid.x_mm)), np.float32)
    for kx, ky, kz, phase in chest.waves:
        tissue += (np.sin(kx * x + phase) * np.sin(ky * y + phase)) * np.sin(kz * z + phase)
    tissue *= np.float32(12)
    tissue += chest.lung_hu + y * np.float32(0.35)
    return tissue


def _consolidation_share(
    chest: Chest, centre: tuple[float, float, float], radii: tuple[float, float, float], grid: Grid
) -> Floats:
    """An ellipsoid with a ragged edge."""
    x = (grid.x_mm - centre[0])[None, None, :] / radii[0]
    y = (grid.y_mm - centre[1])[None, :, None] / radii[1]
    z = (grid.z_mm - centre[2])[:, None, None] / radii[2]
    phase = float(chest.waves[0, 3])
    ragged = np.sin(x * 5 + phase) * np.sin(y * 6 + phase) * np.cos(z * 5)
    inside = (1 - (x * x + y * y + z * z) + np.float32(0.35) * ragged) * (min(radii) / 2)
    return soft(inside, max(4.0, grid.pixel_mm)) * np.float32(0.92)


def _free_air_share(lung: Lung, collapse: float, grid: Grid) -> Floats:
    """The part of the cavity that the shrunken lung leaves, at the front of a patient who lies on the back."""
    share_z = np.clip(grid.z_mm / lung.height_mm, 0, 1)[:, None, None]
    width = taper(lung, share_z)
    a = lung.half_width_mm * width * (1 - 0.6 * collapse)
    b = lung.half_depth_mm * (0.25 + 0.75 * width) * (1 - collapse)
    y = lung.y_mm + lung.half_depth_mm * collapse
    x = lung.x_mm - np.sign(lung.x_mm) * lung.half_width_mm * 0.5 * collapse
    return 1 - soft(ellipse(grid, x, y, a, b), grid.pixel_mm)


def _paint_mediastinum(hu: Floats, chest: Chest, grid: Grid) -> Floats:
    """Mediastinal fat and tissue, heart, great vessels, airways. Returns the share of the heart."""
    height = chest.height_mm
    share_z = grid.z_mm / height
    a = np.interp(share_z, (0, 0.45, 0.75, 1.1), (22, 34, 27, 30)).astype(np.float32)[:, None, None]
    b = (np.interp(share_z, (0, 0.8, 1.1), (0.8, 0.85, 0.55)) * chest.left.half_depth_mm).astype(np.float32)[
        :, None, None
    ]
    column = soft(ellipse(grid, 0, 4, a, b), grid.pixel_mm) * _between(grid, -60, 1.25 * height)
    paint(hu, 10.0, column)
    heart = heart_of(chest)
    cos, sin = np.cos(heart.tilt_rad), np.sin(heart.tilt_rad)
    dx = (grid.x_mm - heart.centre_mm[0])[None, None, :].astype(np.float32)
    dy = (grid.y_mm - heart.centre_mm[1])[None, :, None].astype(np.float32)
    dz = (grid.z_mm - heart.centre_mm[2])[:, None, None].astype(np.float32) / np.float32(heart.radii_mm[2])
    u = (dx * np.float32(cos) + dy * np.float32(sin)) / np.float32(heart.radii_mm[0])
    v = (dy * np.float32(cos) - dx * np.float32(sin)) / np.float32(heart.radii_mm[1])
    inside = (1 - (u * u + v * v + dz * dz)) * np.float32(min(heart.radii_mm) / 2)
    share = soft(inside, grid.pixel_mm)
    paint(hu, chest.blood_hu, share)
    radius = chest.aorta_radius_mm
    x, y = descending_aorta_mm(chest)
    paint_tube(hu, grid, x, y, radius, chest.blood_hu, -80, 0.74 * height)
    paint_tube(hu, grid, -12, -16, radius * 1.15, chest.blood_hu, 0.48 * height, 0.74 * height)
    for step in range(7):  # the arch, from the ascending to the descending aorta
        part = step / 6
        lift = 0.74 * height + radius * 1.2 * np.sin(np.pi * part)
        paint_tube(
            hu, grid, -12 + (x + 12) * part, -16 + (y + 16) * part, radius, chest.blood_hu, lift - radius, lift + radius
        )
    paint_tube(hu, grid, 14, -22, radius * 1.1, chest.blood_hu, 0.5 * height, 0.62 * height)
    paint_tube(hu, grid, -2, 12, 8.5, AIR_HU, 0.6 * height, 1.3 * height)
    for sign in (-1, 1):
        for step in range(5):
            z = (0.6 - 0.022 * step) * height
            paint_tube(hu, grid, -2 + sign * (4 + 7.5 * step), 13, 6.0, AIR_HU, z - 0.013 * height, z + 0.013 * height)
    return share


def _paint_abdomen(hu: Floats, chest: Chest, grid: Grid) -> None:
    """What lies under the diaphragm: liver, spleen, stomach with its air."""
    if float(grid.z_mm.min()) > chest.right.dome_mm + 20:
        return
    for side, value in ((Side.RIGHT, chest.liver_hu), (Side.LEFT, chest.liver_hu * 0.9)):
        lung = chest.lung(side)
        dome = dome_height_mm(lung, grid.x_mm[None, :], grid.y_mm[:, None])[None]
        z = grid.z_mm[:, None, None]
        width = 0.98 if side is Side.RIGHT else 0.7
        outline = soft(
            ellipse(grid, lung.x_mm, lung.y_mm, lung.half_width_mm * width, lung.half_depth_mm * width), grid.pixel_mm
        )
        paint(hu, value, outline * soft(dome - 4 - z, grid.slice_mm))
    if chest.stomach_air_mm:
        x, y = chest.left.x_mm * 0.8, -chest.left.half_depth_mm * 0.4
        top = float(dome_height_mm(chest.left, x, y)) - 10
        radius = chest.stomach_air_mm
        paint_tube(hu, grid, x, y, radius, AIR_HU, top - radius * 1.2, top)


def _paint_bones(hu: Floats, chest: Chest, grid: Grid, lungs: dict[Side, Floats]) -> None:
    """Spine with discs, sternum, and ribs that slope to the front."""
    z = grid.z_mm
    disc = np.clip(np.abs((z / 24.0) % 1.0 - 0.5) * 24 / max(grid.slice_mm, 1.0) - 1.0, 0, 1)
    value = (80 + 120 * disc).astype(np.float32)[:, None, None]
    radius = chest.spine_radius_mm
    box = box_around(grid, 0, chest.spine_y_mm, radius * 2)
    part = _crop(grid, box)
    block = hu[:, box[0], box[1]]
    paint(block, value, soft(ellipse(part, 0, chest.spine_y_mm, radius, radius * 0.85), grid.pixel_mm))
    canal = ellipse(part, 0, chest.spine_y_mm + radius * 1.25, 9, 8)
    paint(block, 200.0, soft(canal + 4, grid.pixel_mm))
    paint(block, 20.0, soft(canal, grid.pixel_mm))
    front = -min(chest.right.half_depth_mm, chest.left.half_depth_mm) - 7
    share = soft(ellipse(grid, 0, front, 17, 6), grid.pixel_mm) * _between(
        grid, 0.3 * chest.height_mm, 0.88 * chest.height_mm
    )
    paint(hu, 170.0, share)
    slope = (grid.y_mm[None, :, None] - chest.spine_y_mm) * np.float32(-0.55)
    phase = ((grid.z_mm[:, None, None] + slope) / np.float32(chest.rib_spacing_mm) + np.float32(chest.rib_phase)) % 1
    thick = soft(
        (np.float32(0.22) - np.abs(phase - np.float32(0.5))) * np.float32(chest.rib_spacing_mm), max(grid.slice_mm, 2.0)
    )
    for side in Side:
        lung = chest.lung(side)
        width = taper(lung, np.clip(grid.z_mm / lung.height_mm, 0, 0.97)[:, None, None])
        a, b = lung.half_width_mm * width, lung.half_depth_mm * (0.25 + 0.75 * width)
        ring = soft(4.0 - np.abs(ellipse(grid, lung.x_mm, lung.y_mm, a + 7, b + 7)), grid.pixel_mm)
        outside = soft(np.sign(lung.x_mm) * (grid.x_mm[None, None, :] - lung.x_mm * 0.35), 10.0)
        ring *= outside
        ring *= thick * _between(grid, -60, lung.height_mm + 5)
        paint(hu, 330.0, ring * (1 - lungs[side]))


def paint_ball(
    hu: Floats,
    mask: NDArray[np.uint8],
    grid: Grid,
    centre: tuple[float, float, float],
    diameter_mm: float,
    value: float,
    bit: Mask,
) -> None:
    """A ball by sub-sampling 3 x 3 x 5 points of each voxel: right partial volume however thick the slice."""
    radius = diameter_mm / 2
    near = np.flatnonzero(np.abs(grid.z_mm - centre[2]) < radius + grid.slice_mm)
    box = box_around(grid, centre[0], centre[1], radius)
    part = _crop(grid, box)
    if not near.size or part.x_mm.size < 2 or part.y_mm.size < 2:
        return
    fine = np.asarray((-1 / 3, 0, 1 / 3), np.float32) * np.float32(grid.pixel_mm)
    deep = np.linspace(-0.4, 0.4, 5, dtype=np.float32) * np.float32(grid.slice_mm)
    x2 = (part.x_mm[:, None] + fine - np.float32(centre[0])) ** 2  # (W, 3)
    y2 = (part.y_mm[:, None] + fine - np.float32(centre[1])) ** 2
    z2 = (grid.z_mm[near][:, None] + deep - np.float32(centre[2])) ** 2  # (Z, 5)
    reach = z2[:, None, None, :, None, None] + y2[None, :, None, None, :, None] + x2[None, None, :, None, None, :]
    share = (reach < radius * radius).mean(axis=(3, 4, 5), dtype=np.float32)
    for index, slice_share in zip(near, share, strict=True):
        paint(hu[index][box], value, slice_share)
        mask[index][box][slice_share > 0.15] |= np.uint8(bit)


def _vessel_points(chest: Chest, random: np.random.Generator, whole: Grid) -> tuple[Floats, float]:
    """Random points inside the vessels, sorted by z, about twenty-five per voxel of vessel; and the mm³ of each."""
    vessels = chest.vessels
    lengths = np.linalg.norm(vessels.ends - vessels.starts, axis=1)
    volumes = np.pi * vessels.radii_mm**2 * lengths
    voxel = whole.pixel_mm**2 * max(whole.slice_mm, whole.pixel_mm)
    total = float(volumes.sum())
    number = int(np.clip(total / voxel * 25, 20_000, 3_000_000))
    counts = np.maximum((volumes / total * number).astype(int), 1)
    piece = np.repeat(np.arange(len(counts)), counts)
    along = random.random(len(piece), np.float32)[:, None]
    points = vessels.starts[piece] * (1 - along) + vessels.ends[piece] * along
    direction = ((vessels.ends - vessels.starts) / lengths[:, None])[piece]
    offset = random.standard_normal((len(piece), 3), np.float32)
    offset -= direction * (offset * direction).sum(axis=1, keepdims=True)
    offset /= np.linalg.norm(offset, axis=1, keepdims=True) + np.float32(1e-6)
    points += offset * (vessels.radii_mm[piece] * np.sqrt(random.random(len(piece), np.float32)))[:, None]
    return points[np.argsort(points[:, 2])], total / number


def _splat(points: Floats, volume_mm3: float, grid: Grid) -> Floats:
    """Share of each voxel that is vessel."""
    low, high = float(grid.z_mm.min()), float(grid.z_mm.max())
    half = grid.slice_mm / 2
    first, last = np.searchsorted(points[:, 2], (low - half, high + half))
    inside = points[first:last]
    step = float(grid.z_mm[1] - grid.z_mm[0]) if len(grid.z_mm) > 1 else grid.slice_mm
    shape = (len(grid.z_mm), len(grid.y_mm), len(grid.x_mm))
    z = np.rint((inside[:, 2] - grid.z_mm[0]) / step).astype(np.int64)
    y = np.rint((inside[:, 1] - grid.y_mm[0]) / grid.pixel_mm).astype(np.int64)
    x = np.rint((inside[:, 0] - grid.x_mm[0]) / grid.pixel_mm).astype(np.int64)
    fits = (z >= 0) & (z < shape[0]) & (y >= 0) & (y < shape[1]) & (x >= 0) & (x < shape[2])
    flat = (z[fits] * shape[1] + y[fits]) * shape[2] + x[fits]
    filled = np.bincount(flat, minlength=shape[0] * shape[1] * shape[2]).reshape(shape)
    share: Floats = np.minimum(filled.astype(np.float32) * np.float32(volume_mm3 / (grid.pixel_mm**2 * abs(step))), 1)
    return share
