"""What is no chest CT: abdomen, pelvis, legs, head, plain objects. HU only; masks mark the body.

They exist so that the model learns to say that it does not read them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from workers.demo_model.render import AIR_HU, Floats, Grid, Mask, ellipse, in_chunks, paint, paint_couch, soft


class Body(StrEnum):
    """What lies on the couch."""

    CHEST = "chest"
    ABDOMEN = "abdomen"
    PELVIS = "pelvis"
    LEGS = "legs"
    HEAD = "head"
    OBJECT = "object"  # water cylinder, rods, boxes: what physicists scan


def render_body(body: Body, seed: int, grid: Grid) -> tuple[Floats, NDArray[np.uint8]]:
    """HU without noise and the body's mask; the stack is centred on z = 0."""
    painters: dict[Body, Callable[[np.random.Generator, Grid], Floats]] = {
        Body.ABDOMEN: _abdomen,
        Body.PELVIS: _pelvis,
        Body.LEGS: _legs,
        Body.HEAD: _head,
        Body.OBJECT: _object,
    }

    def draw(part: Grid) -> tuple[Floats, NDArray[np.uint8]]:
        hu = painters[body](np.random.default_rng((seed, 3)), part)  # the same body in every chunk
        return hu, np.where(hu > -500, np.uint8(Mask.BODY), np.uint8(0))

    return in_chunks(grid, draw)


def _air(grid: Grid) -> Floats:
    return np.full((len(grid.z_mm), len(grid.y_mm), len(grid.x_mm)), AIR_HU, np.float32)


def _blob(
    hu: Floats, grid: Grid, centre: tuple[float, float, float], radii: tuple[float, float, float], value: float
) -> None:
    """An ellipsoid."""
    x = (grid.x_mm - np.float32(centre[0]))[None, None, :] / np.float32(radii[0])
    y = (grid.y_mm - np.float32(centre[1]))[None, :, None] / np.float32(radii[1])
    z = (grid.z_mm - np.float32(centre[2]))[:, None, None] / np.float32(radii[2])
    inside = (1 - (x * x + y * y + z * z)) * np.float32(min(radii[:2]) / 2)
    paint(hu, value, soft(inside, grid.pixel_mm))


def _column(hu: Floats, grid: Grid, x: float, y: float, a: float, b: float, value: float) -> None:
    paint(hu, value, soft(ellipse(grid, x, y, a, b), grid.pixel_mm))


def _spine(hu: Floats, grid: Grid, y: float, radius: float) -> None:
    _column(hu, grid, 0, y, radius, radius * 0.85, 190)
    _column(hu, grid, 0, y + radius * 1.25, 12, 11, 220)
    _column(hu, grid, 0, y + radius * 1.25, 9, 8, 20)


def _trunk(random: np.random.Generator, grid: Grid) -> tuple[Floats, float, float]:
    hu = _air(grid)
    a = random.uniform(135, 190)
    b, fat = a * random.uniform(0.62, 0.76), random.uniform(8, 35)
    paint_couch(hu, grid, b + 8)
    _column(hu, grid, 0, 0, a, b, -100)
    _column(hu, grid, 0, 0, a - fat, b - fat * 0.8, 50)
    _column(hu, grid, 0, -8, a - fat - 16, b - fat * 0.8 - 18, -90)
    return hu, a - fat - 16, b - fat * 0.8 - 18


def _abdomen(random: np.random.Generator, grid: Grid) -> Floats:
    hu, a, b = _trunk(random, grid)
    contrast = random.choice([0.0, 80.0])
    _blob(hu, grid, (-0.45 * a, -0.05 * b, 70), (0.52 * a, 0.75 * b, random.uniform(80, 120)), 55 + contrast * 0.6)
    _blob(hu, grid, (0.7 * a, 0.25 * b, 80), (0.25 * a, 0.38 * b, 60), 50 + contrast * 0.8)
    for sign in (-1, 1):
        _blob(hu, grid, (sign * 0.5 * a, 0.5 * b, random.uniform(-30, 20)), (30, 26, 55), 32 + contrast * 1.4)
    for _ in range(int(random.integers(8, 22))):
        centre = (random.uniform(-0.7, 0.7) * a, random.uniform(-0.8, 0.2) * b, random.uniform(-160, 90))
        radii = (random.uniform(10, 26), random.uniform(10, 22), random.uniform(14, 50))
        _blob(hu, grid, centre, radii, float(random.choice([35.0, 20.0, -950.0, 250.0], p=[0.5, 0.2, 0.2, 0.1])))
    _column(hu, grid, 8, 0.55 * b, 10, 10, 40 + contrast * 1.5)
    _spine(hu, grid, 0.72 * b, 20)
    return hu


def _pelvis(random: np.random.Generator, grid: Grid) -> Floats:
    hu, a, b = _trunk(random, grid)
    for sign in (-1, 1):
        _blob(hu, grid, (sign * 0.72 * a, 0.3 * b, 60), (18, 0.5 * b, 90), 350)
        _blob(hu, grid, (sign * 0.72 * a, 0.3 * b, 60), (12, 0.42 * b, 80), 120)
        _blob(hu, grid, (sign * 0.68 * a, 0.1 * b, -60), (25, 25, 40), 320)
        _blob(hu, grid, (sign * 0.45 * a, 0.75 * b, -20), (45, 26, 90), 55)
    _blob(hu, grid, (0, -0.15 * b, -30), (42, 36, 40), random.uniform(0, 12))
    _blob(hu, grid, (random.uniform(-8, 8), 0.55 * b, -40), (18, 18, 90), float(random.choice([30, -900])))
    for _ in range(int(random.integers(3, 10))):
        centre = (random.uniform(-0.6, 0.6) * a, random.uniform(-0.8, 0.1) * b, random.uniform(0, 150))
        _blob(hu, grid, centre, (20, 18, 25), float(random.choice([35.0, -950.0])))
    _spine(hu, grid, 0.72 * b, 20)
    return hu


def _legs(random: np.random.Generator, grid: Grid) -> Floats:
    hu = _air(grid)
    paint_couch(hu, grid, 100)
    radius, gap = random.uniform(55, 95), random.uniform(2, 20)
    for sign in (-1, 1):
        x = sign * (radius + gap)
        _column(hu, grid, x, 0, radius, radius, -100)
        _column(hu, grid, x, 0, radius * 0.82, radius * 0.82, 55)
        for _ in range(5):
            dx, dy = random.uniform(-0.5, 0.5, 2) * radius
            _column(hu, grid, x + dx, dy, 4, radius * 0.25, -90)
        bone = random.uniform(11, 16)
        _column(hu, grid, x - sign * 5, -0.1 * radius, bone, bone, 1100)
        _column(hu, grid, x - sign * 5, -0.1 * radius, bone * 0.6, bone * 0.6, -50)
    return hu


def _head(random: np.random.Generator, grid: Grid) -> Floats:
    hu = _air(grid)
    a, b, c = random.uniform(68, 80), random.uniform(85, 102), random.uniform(75, 95)
    _blob(hu, grid, (0, 0, 0), (a + 8, b + 8, c + 8), 20)
    _column(hu, grid, 0, b * 0.25, a * 0.7, b * 0.7, 45) if random.random() < 0.3 else None
    _blob(hu, grid, (0, 0, 0), (a, b, c), random.uniform(700, 1200))
    _blob(hu, grid, (0, 0, 0), (a - 7, b - 7, c - 7), 36)
    for sign in (-1, 1):
        _blob(hu, grid, (sign * 14, -8, 8), (8, random.uniform(22, 38), 16), 6)
    low = np.clip((-grid.z_mm - c * 0.3) / 20, 0, 1)[:, None, None].astype(np.float32)
    for x, y, radius in ((-22, -b * 0.75, 14), (22, -b * 0.75, 14), (0, -b * 0.5, 12)):
        paint(hu, -900.0, soft(ellipse(grid, x, y, radius, radius), grid.pixel_mm) * low)
    if random.random() < 0.3:
        _blob(hu, grid, (random.uniform(-40, 40), random.uniform(-40, 40), 20), (18, 22, 18), 65)
    return hu


def _object(random: np.random.Generator, grid: Grid) -> Floats:
    hu = _air(grid)
    if random.random() < 0.5:
        paint_couch(hu, grid, 125)
    radius = random.uniform(60, 150)
    squeeze = random.uniform(0.7, 1) if random.random() < 0.4 else 1.0
    filling = float(random.choice([0.0, 0.0, 120.0, -90.0, -800.0]))
    _column(hu, grid, 0, 0, radius, radius * squeeze, 120)
    _column(hu, grid, 0, 0, radius - 5, (radius - 5) * squeeze, filling)
    for _ in range(int(random.integers(0, 9))):
        angle, far = random.uniform(0, 2 * np.pi), random.uniform(0.2, 0.75) * radius
        rod = random.uniform(4, 20)
        value = float(random.choice([-1000.0, -800.0, -100.0, 120.0, 340.0, 950.0]))
        _column(hu, grid, far * np.cos(angle), far * np.sin(angle) * squeeze, rod, rod, value)
    return hu
