"""Thin phantom chests with nodules of exact sizes, and what each nodule adds to every voxel.

The contrast of a nodule on an input of the model is then exact: the same mean or maximum with and without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from workers.demo_model.phantom import Phantom, Protocol, build, scan
from workers.demo_model.render import Grid, Mask

DIAMETERS_MM = (4, 6, 8, 10, 20)
SLICE_MM = 1.25
NOISE_PIXELS = 512  # noise per pixel is that of a matrix of this size, whatever size is rendered
APART_MM = 15.0  # free lung between the surfaces of two nodules
FROM_WALL_MM = 4.0
AERATED_HU = -700.0
SOLID_SHARE = 0.6  # of the nodules, as in the phantoms themselves; the others are ground glass

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Planted:
    """One nodule. added: (z, y, x) HU that it adds, at voxels `first` onward."""

    diameter_mm: int
    solid: bool
    first: tuple[int, int, int]
    added: Floats

    @property
    def native(self) -> float:
        """Peak contrast on the thin slices, HU."""
        return float(np.abs(self.added).max())


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One scanned chest. hu: (S, H, W) float32 with noise and nodules, head first."""

    seed: int
    hu: Floats
    pixel_mm: float
    nodules: tuple[Planted, ...]


def make_case(seed: int, *, pixels: int, per_size: int) -> Case:
    """`per_size` nodules of each diameter (fewer where the lungs have no room), and the noise of a 512 matrix."""
    scene = build(seed, Protocol(pixels=pixels, slice_mm=SLICE_MM), nodules=0)
    random = np.random.default_rng((seed, 77))
    lung = (scene.masks & (Mask.LUNG | Mask.EFFUSION | Mask.CONSOLIDATION | Mask.PNEUMOTHORAX)) == Mask.LUNG
    aerated = lung & (scene.hu < AERATED_HU)  # a centre within a vessel would be a nodule that nobody sees
    places = _places(lung, aerated, scene.grid, random, per_size)
    nodules = []
    for diameter, centre in places:
        solid = bool(random.random() < SOLID_SHARE)
        value = random.uniform(0, 90) if solid else random.uniform(-560, -350)
        nodules.append(_plant(scene.hu, scene.grid, centre, diameter, solid, value))
    shrunk = pixels / NOISE_PIXELS  # the scanner's noise depends on the pixel; give it the smaller one
    grid = replace(scene.grid, y_mm=scene.grid.y_mm * shrunk, x_mm=scene.grid.x_mm * shrunk)
    scanned: Phantom = scan(replace(scene, grid=grid), np.random.default_rng((seed, 5)))
    return Case(seed, scanned.values.astype(np.float32), scene.grid.pixel_mm, tuple(nodules))


def _places(
    lung: NDArray[np.bool_], aerated: NDArray[np.bool_], grid: Grid, random: np.random.Generator, per_size: int
) -> list[tuple[int, tuple[float, float, float]]]:
    """Centres in aerated lung, z, y, x in mm: large ones first, for they need most room."""
    inside = np.flatnonzero(aerated)
    found: list[tuple[int, tuple[float, float, float]]] = []
    directions = random.standard_normal((40, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    for diameter in sorted(DIAMETERS_MM, reverse=True):
        wanted = per_size
        for _ in range(4000):
            if not wanted:
                break
            z, y, x = np.unravel_index(int(random.choice(inside)), lung.shape)
            shift = random.uniform(-0.5, 0.5, 3) * (grid.slice_mm, grid.pixel_mm, grid.pixel_mm)
            centre = (grid.z_mm[z] + shift[0], grid.y_mm[y] + shift[1], grid.x_mm[x] + shift[2])
            if any(
                np.linalg.norm(np.subtract(centre, other)) < (diameter + size) / 2 + APART_MM for size, other in found
            ):
                continue
            around = directions * (diameter / 2 + FROM_WALL_MM)
            zi = np.rint(z - around[:, 0] / grid.slice_mm).astype(int)
            yi = np.rint(y + around[:, 1] / grid.pixel_mm).astype(int)
            xi = np.rint(x + around[:, 2] / grid.pixel_mm).astype(int)
            limits = zip((zi, yi, xi), lung.shape, strict=True)
            if any((index < 0).any() or (index >= size).any() for index, size in limits):
                continue
            if lung[zi, yi, xi].all():
                found.append((diameter, (float(centre[0]), float(centre[1]), float(centre[2]))))
                wanted -= 1
    return found


def _plant(
    hu: Floats, grid: Grid, centre: tuple[float, float, float], diameter: int, solid: bool, value: float
) -> Planted:
    """Paint a ball into `hu`, by 5 x 5 x 5 points of each voxel, and return what it added."""
    radius = diameter / 2
    axes, bounds = [], []
    for place, centres, step in zip(
        centre, (grid.z_mm, grid.y_mm, grid.x_mm), (grid.slice_mm, grid.pixel_mm, grid.pixel_mm), strict=True
    ):
        near = np.flatnonzero(np.abs(centres - place) < radius + step)
        bounds.append(slice(int(near[0]), int(near[-1]) + 1))
        fine = (np.arange(5) - 2) / 5 * step
        axes.append((centres[near][:, None] + fine - place) ** 2)
    reach = (
        axes[0][:, None, None, :, None, None]
        + axes[1][None, :, None, None, :, None]
        + axes[2][None, None, :, None, None]
    )
    share = (reach < radius * radius).mean(axis=(3, 4, 5), dtype=np.float32)
    block = hu[bounds[0], bounds[1], bounds[2]]
    added = ((value - block) * share).astype(np.float32)
    block += added
    return Planted(diameter, solid, (bounds[0].start, bounds[1].start, bounds[2].start), added)
