"""A seed and a protocol in, one scanned phantom out: voxels as a scanner would store them, masks, and the truth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from workers.demo_model.anatomy import Chest, draw_chest, with_enlarged_heart
from workers.demo_model.channels import slab_bounds
from workers.demo_model.findings import Findings, draw_findings
from workers.demo_model.labels import Labels, labels_of
from workers.demo_model.other_bodies import Body, render_body
from workers.demo_model.render import Floats, Grid, render, square_grid


class Kernel(StrEnum):
    """How the scanner filters: less noise or sharper edges."""

    SOFT = "soft"
    SHARP = "sharp"


class Modality(StrEnum):
    """DICOM's defined terms."""

    CT = "CT"
    MR = "MR"


@dataclass(frozen=True, slots=True)
class Protocol:
    """How densely the phantom is scanned. Either `slice_mm` or `slices` is given."""

    pixels: int
    slice_mm: float | None = None
    slices: int | None = None


OTHER_SHARE = 0.15  # of held-out phantoms that are no chest CT
THIN = Protocol(pixels=512, slice_mm=1.25)
THICK = Protocol(pixels=512, slice_mm=5.0)
SLABS = Protocol(pixels=120, slices=48)  # two slices for each slab that the demonstration model sees of either


@dataclass(frozen=True, slots=True, eq=False)
class Phantom:
    """One series. values: (S, H, W) int16, head first, HU for CT; masks: (S, H, W) uint8, bits of render.Mask."""

    seed: int
    body: Body
    modality: Modality
    kernel: Kernel
    values: NDArray[np.int16]
    masks: NDArray[np.uint8]
    z_mm: Floats
    slice_mm: float
    pixel_mm: float
    centre_mm: tuple[float, float]  # of the field of view, x and y
    findings: Findings
    labels: Labels
    lungs_mm: float  # height of the lungs, whose lowest point is z = 0; 0 where there is no chest


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A phantom before the scanner's noise; the same scene can be scanned again with other noise."""

    seed: int
    body: Body
    modality: Modality
    grid: Grid
    hu: Floats
    masks: NDArray[np.uint8]
    findings: Findings
    labels: Labels
    lungs_mm: float = 0.0


def generate(
    seed: int, protocol: Protocol = SLABS, *, body: Body = Body.CHEST, modality: Modality = Modality.CT
) -> Phantom:
    """One scanned phantom; the same arguments give the same bytes."""
    return scan(build(seed, protocol, body=body, modality=modality), np.random.default_rng((seed, 5)))


def generate_mixed(seed: int, protocol: Protocol = SLABS, *, other_share: float = OTHER_SHARE) -> Phantom:
    """A chest CT, or with probability `other_share` anything else: what held-out phantoms are drawn from."""
    body, modality = draw_kind(np.random.default_rng((seed, 11)), other_share)
    return generate(seed, protocol, body=body, modality=modality)


def draw_kind(random: np.random.Generator, other_share: float) -> tuple[Body, Modality]:
    """Chest CT, or one of the bodies and modalities that are not supported."""
    if random.random() >= other_share:
        return Body.CHEST, Modality.CT
    body = Body(random.choice(list(Body)))
    modality = Modality.MR if body is Body.CHEST or random.random() < 0.25 else Modality.CT
    return body, modality


def build(
    seed: int,
    protocol: Protocol,
    *,
    body: Body = Body.CHEST,
    modality: Modality = Modality.CT,
    nodules: int | None = None,
) -> Scene:
    """The person, the findings and the grid, rendered without noise. `nodules` asks for a number of them."""
    random = np.random.default_rng(seed)
    supported = body is Body.CHEST and modality is Modality.CT
    if body is not Body.CHEST:
        top, bottom, view = _reach(body, random)
        grid = _grid(protocol, top, bottom, view, _offset(random))
        hu, masks = render_body(body, seed, grid)
        return Scene(seed, body, modality, grid, hu, masks, Findings(), Labels(supported=False))
    chest, findings = _draw_patient(random, nodules)
    view = 2 * chest.half_width_mm * random.uniform(0.97, 1.18)
    top, bottom = chest.height_mm * random.uniform(1.01, 1.08), random.uniform(-55, -8)
    grid = _grid(protocol, top, bottom, view, _offset(random))
    hu, masks = render(chest, findings, grid, seed)
    labels = labels_of(findings) if supported else Labels(False)
    return Scene(seed, body, modality, grid, hu, masks, findings, labels, chest.height_mm)


def labels_at(seed: int, *, other_share: float = OTHER_SHARE) -> Labels:
    """The truth about `generate_mixed(seed)`, without rendering it."""
    body, modality = draw_kind(np.random.default_rng((seed, 11)), other_share)
    if body is not Body.CHEST or modality is not Modality.CT:
        return Labels(supported=False)
    return labels_of(_draw_patient(np.random.default_rng(seed), None)[1])


def chest_at(seed: int) -> Chest:
    """The person whom `build` gives a chest of this seed."""
    return _draw_patient(np.random.default_rng(seed), 0)[0]


def _draw_patient(random: np.random.Generator, nodules: int | None) -> tuple[Chest, Findings]:
    chest = draw_chest(random)
    if random.random() < 0.25:
        chest = with_enlarged_heart(chest, random)
    return chest, draw_findings(chest, random, nodules=nodules)


def scan(scene: Scene, random: np.random.Generator) -> Phantom:
    """Add the scanner: kernel and noise, and the contrast of MR where that is the modality."""
    grid = scene.grid
    kernel = Kernel.SHARP if random.random() < 0.35 else Kernel.SOFT
    if scene.modality is Modality.MR:
        values = _as_mr(scene.hu, random)
    else:
        values = scene.hu + _noise_hu(random, scene.hu.shape, grid, kernel)
    return _phantom(scene, np.clip(np.rint(values), -1024, 3071).astype(np.int16), kernel)


def without_noise(scene: Scene) -> Phantom:
    """The scene as an ideal scanner would store it: for what is asked of the masks alone."""
    return _phantom(scene, scene.hu.astype(np.int16), Kernel.SOFT)


def as_slabs(phantom: Phantom) -> Phantom:
    """The phantom in the slabs that the model sees: values are means, masks show what any of a slab's slices does."""
    slabs = [slice(a, b) for a, b in pairwise(slab_bounds(len(phantom.values)))]  # ten times as fast as reduceat
    return replace(
        phantom,
        values=np.rint([phantom.values[slab].mean(axis=0, dtype=np.float32) for slab in slabs]).astype(np.int16),
        masks=np.stack([np.bitwise_or.reduce(phantom.masks[slab], axis=0) for slab in slabs]),
        z_mm=np.stack([phantom.z_mm[slab].mean() for slab in slabs]),
        slice_mm=phantom.slice_mm * len(phantom.values) / len(slabs),
    )


def _phantom(scene: Scene, stored: NDArray[np.int16], kernel: Kernel) -> Phantom:
    grid = scene.grid
    return Phantom(
        seed=scene.seed,
        body=scene.body,
        modality=scene.modality,
        kernel=kernel,
        values=stored,
        masks=scene.masks,
        z_mm=grid.z_mm,
        slice_mm=grid.slice_mm,
        pixel_mm=grid.pixel_mm,
        centre_mm=(float(grid.x_mm.mean()), float(grid.y_mm.mean())),
        findings=scene.findings,
        labels=scene.labels,
        lungs_mm=scene.lungs_mm,
    )


def _grid(protocol: Protocol, top_mm: float, bottom_mm: float, view_mm: float, offset: tuple[float, float]) -> Grid:
    """Slices side by side from the head down."""
    if protocol.slices is not None:
        count, thickness = protocol.slices, (top_mm - bottom_mm) / protocol.slices
    elif protocol.slice_mm is not None:
        thickness = protocol.slice_mm
        count = int(np.ceil((top_mm - bottom_mm) / thickness))
    else:
        raise ValueError("a protocol needs slice_mm or slices")
    z = top_mm - (np.arange(count) + 0.5) * thickness
    return square_grid(z.astype(np.float32), thickness, protocol.pixels, view_mm, offset)


def _reach(body: Body, random: np.random.Generator) -> tuple[float, float, float]:
    """Top, bottom and field of view in mm of the scan of another body, often only a part of it."""
    if body is Body.HEAD:
        extent, view = random.uniform(80, 190), random.uniform(210, 260)
        top = random.uniform(extent / 2 - 20, extent / 2 + 20)
    elif body is Body.BASES:
        top, view = random.uniform(5, 85), random.uniform(330, 500)
        extent = top + random.uniform(30, 190)
    else:
        extent, view = random.uniform(40, 380), random.uniform(330, 510)
        top = random.uniform(extent / 2, max(extent / 2, 190))
    return top, top - extent, view


def _offset(random: np.random.Generator) -> tuple[float, float]:
    return float(random.uniform(-10, 10)), float(random.uniform(-8, 14))


def _noise_hu(random: np.random.Generator, shape: tuple[int, ...], grid: Grid, kernel: Kernel) -> Floats:
    """Noise that falls with the voxel's volume, is correlated with its neighbours, and depends on dose and kernel."""
    reference_mm3 = 5 * 0.7**2
    volume = grid.slice_mm * grid.pixel_mm**2
    sigma = 11 * random.uniform(0.7, 1.8) * np.sqrt(reference_mm3 / volume) + random.uniform(0, 2)
    white = random.standard_normal(shape, np.float32)
    blurred = white.copy()
    blurred[:, 1:] += white[:, :-1]
    blurred[:, :, 1:] += white[:, :, :-1]
    noise = blurred * np.float32(0.57) if kernel is Kernel.SOFT else white * np.float32(1.9)
    noise[1:] += np.float32(0.3) * noise[:-1]
    noise *= np.float32(sigma)
    return noise


_MR_KNOTS_HU = (-1000, -850, -150, -90, 0, 30, 60, 120, 300, 1200)


def _as_mr(hu: Floats, random: np.random.Generator) -> Floats:
    """Signal of a made-up sequence: a random contrast per tissue, a shading of the coil, noise; never negative."""
    signal = random.uniform(0, 1, len(_MR_KNOTS_HU))
    signal[0], signal[1], signal[-1] = 0.01, 0.04, 0.03
    shade = 1 + random.uniform(-0.35, 0.35) * np.linspace(-1, 1, hu.shape[2], dtype=np.float32)
    image = np.interp(hu, _MR_KNOTS_HU, signal).astype(np.float32) * shade * np.float32(random.uniform(300, 1500))
    noise = np.float32(random.uniform(5, 25))
    real = image + random.standard_normal(hu.shape, np.float32) * noise
    return np.asarray(np.hypot(real, random.standard_normal(hu.shape, np.float32) * noise), np.float32)
