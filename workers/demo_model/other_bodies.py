"""What is no chest CT: abdomen, lung bases alone, pelvis, legs, head, plain objects. HU only; masks mark the body.

They exist so that the model learns to say that it does not read them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from workers.demo_model.anatomy import draw_chest
from workers.demo_model.findings import Findings
from workers.demo_model.render import AIR_HU, Floats, Grid, Mask, ellipse, in_chunks, paint, paint_couch, render, soft


class Body(StrEnum):
    """What lies on the couch."""

    CHEST = "chest"
    ABDOMEN = "abdomen"
    BASES = "bases"  # abdomen with the lowest part of the lungs
    PELVIS = "pelvis"
    LEGS = "legs"
    HEAD = "head"
    OBJECT = "object"  # water cylinder, rods, boxes: what physicists scan


def render_body(body: Body, seed: int, grid: Grid) -> tuple[Floats, NDArray[np.uint8]]:
    """HU without noise and the body's mask; the stack is centred on z = 0, but for the lung bases."""
    if body is Body.BASES:
        return _bases(seed, grid)
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


def _couches(hu: Floats, grid: Grid, random: np.random.Generator, y: float) -> None:
    """One to three shells under the back, flat or curved, as different makers build them."""
    if random.random() < 0.4:
        paint_couch(hu, grid, y)
        return
    x = grid.x_mm[None, None, :]
    bend, wide = random.uniform(-0.0008, 0.0022), soft(random.uniform(170, 240) - np.abs(x), grid.pixel_mm)
    for _ in range(int(random.integers(1, 4))):
        depth = grid.y_mm[None, :, None] + np.float32(bend) * x**2
        shell = soft(random.uniform(0.7, 2.5) - np.abs(depth - y), grid.pixel_mm) * wide
        paint(hu, float(random.uniform(-600, 100)), shell * min(1.0, 3 / grid.pixel_mm))
        y += random.uniform(12, 45)


def _arms(hu: Floats, grid: Grid, random: np.random.Generator, half_width_mm: float) -> None:
    """Arms beside the body."""
    for sign in (-1, 1):
        radius = random.uniform(26, 45)
        x, y = sign * (half_width_mm + radius + random.uniform(-4, 14)), random.uniform(0, 55)
        _column(hu, grid, x, y, radius, radius * random.uniform(0.9, 1.4), -100)
        _column(hu, grid, x, y, radius * 0.8, radius, 55)
        for dx in (-9, 9) if random.random() < 0.5 else (0,):
            _column(hu, grid, x + dx, y, 9, 9, float(random.uniform(500, 1000)))
            _column(hu, grid, x + dx, y, 5, 5, float(random.uniform(-50, 100)))


def _ribs(hu: Floats, grid: Grid, random: np.random.Generator, a: float, b: float) -> None:
    """Ribs cut across, as bright spots in the wall, moving from slice to slice."""
    phase, spacing = random.uniform(0, 1), random.uniform(27, 38)
    ring = soft(4.0 - np.abs(ellipse(grid, 0, 0, a, b)), grid.pixel_mm)
    slope = np.abs(grid.y_mm[None, :, None] - 0.7 * b) * np.float32(0.6)
    turn = ((grid.z_mm[:, None, None] + slope) / np.float32(spacing) + np.float32(phase)) % 1
    here = soft((np.float32(0.2) - np.abs(turn - np.float32(0.5))) * np.float32(spacing), max(grid.slice_mm, 2.0))
    low = soft(grid.z_mm[:, None, None] - random.uniform(-120, 20), 20.0)
    paint(hu, float(random.uniform(250, 500)), ring * here * low)


def _trunk(random: np.random.Generator, grid: Grid) -> tuple[Floats, float, float]:
    """Skin, fat, muscle and the fat between the organs; the half axes of what holds the organs."""
    hu = _air(grid)
    a = random.uniform(130, 195)
    b, fat = a * random.uniform(0.55, 0.78), random.uniform(6, 38)
    _couches(hu, grid, random, b + random.uniform(2, 14))
    if random.random() < 0.4:
        _arms(hu, grid, random, a)
    _column(hu, grid, 0, 0, a, b, -100)
    _column(hu, grid, 0, 0, a - fat, b - fat * 0.8, 50)
    wall = random.uniform(6, 16)
    _column(hu, grid, 0, -6, a - fat - wall, b - fat * 0.8 - wall - 2, -95)
    _ribs(hu, grid, random, a - fat - wall / 2, b - fat * 0.8 - wall / 2)
    return hu, a - fat - wall, b - fat * 0.8 - wall - 2


def _abdomen(random: np.random.Generator, grid: Grid) -> Floats:
    """Liver, spleen, kidneys, stomach and bowel with their gas, in fat; now and then a sliver of lung above."""
    hu, a, b = _trunk(random, grid)
    contrast, up = random.uniform(0, 110), random.uniform(-40, 60)  # of the organs along the stack
    liver = (random.uniform(0.5, 0.75) * a, random.uniform(0.7, 0.95) * b, random.uniform(80, 140))
    _blob(hu, grid, (a * random.uniform(-0.42, -0.25), -0.05 * b, 60 + up), liver, 55 + contrast * 0.6)
    if random.random() < 0.6:
        _blob(hu, grid, (0.1 * a, -0.35 * b, 80 + up), (0.5 * a, 0.4 * b, 70), 55 + contrast * 0.6)
    _blob(hu, grid, (0.7 * a, 0.25 * b, 70 + up), (0.25 * a, 0.4 * b, 65), 50 + contrast * 0.8)
    _blob(hu, grid, (0.45 * a, -0.25 * b, 70 + up), (0.38 * a, 0.42 * b, 60), random.uniform(10, 60))
    for sign in (-1, 1):
        place = (sign * 0.5 * a, 0.5 * b, random.uniform(-50, 0) + up)
        _blob(hu, grid, place, (random.uniform(24, 34), 26, 55), 32 + contrast * 1.4)
    for _ in range(int(random.integers(10, 34))):
        centre = (random.uniform(-0.75, 0.75) * a, random.uniform(-0.85, 0.3) * b, random.uniform(-190, 70) + up)
        radii = (random.uniform(8, 26), random.uniform(8, 22), random.uniform(12, 50))
        _blob(hu, grid, centre, radii, float(random.choice([35.0, 20.0, -950.0, 250.0], p=[0.5, 0.2, 0.22, 0.08])))
    if random.random() < 0.5:  # the stomach's bubble
        _blob(hu, grid, (0.4 * a, -0.5 * b, 60 + up), (random.uniform(12, 35), random.uniform(8, 20), 40), -960)
    if random.random() < 0.4:  # lung behind the liver and spleen, a crescent
        above = soft(grid.z_mm[:, None, None] - random.uniform(40, 150), 15.0)
        edge = soft(ellipse(grid, 0, 0, a, b), grid.pixel_mm) * (
            1 - soft(ellipse(grid, 0, -12, 0.93 * a, 0.9 * b), 3.0)
        )
        paint(hu, -830.0, edge * above)
    _column(hu, grid, random.uniform(0, 14), 0.5 * b, 10, 10, 40 + contrast * 1.5)
    _spine(hu, grid, 0.72 * b, random.uniform(17, 23))
    return hu


def _bases(seed: int, grid: Grid) -> tuple[Floats, NDArray[np.uint8]]:
    """The lowest part of a chest and what lies below it; z = 0 is the lowest point of the lungs."""
    random = np.random.default_rng((seed, 4))
    chest = draw_chest(random)
    hu, masks = render(chest, Findings(), grid, seed)
    for _ in range(int(random.integers(0, 16))):
        centre = (random.uniform(-0.6, 0.6) * chest.half_width_mm, random.uniform(-70, 20), random.uniform(-160, -15))
        radii = (random.uniform(8, 30), random.uniform(8, 24), random.uniform(12, 40))
        _blob(hu, grid, centre, radii, float(random.choice([30.0, -95.0, -950.0, 150.0], p=[0.3, 0.4, 0.2, 0.1])))
    if random.random() < 0.4:
        _arms(hu, grid, random, chest.half_width_mm)
    return hu, np.asarray(masks & Mask.BODY, np.uint8)


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
