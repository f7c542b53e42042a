"""A volume by coarse anatomy: body, lungs by side and zone, soft tissue, bone and contrast by side. numpy and scipy.

HU thresholds and connected components on a pooled grid; good enough to promise each region its share of the
tokens, not to measure anything. Dense lung (fluid, consolidation) counts as soft tissue; vessels brighter than bone
count as bone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

BODY_HU = -400.0  # between lung or air and fat
LUNG_HU = -500.0
BRIGHT_HU = 150.0  # above soft tissue: bone or contrast medium
BONE_HU = 300.0
COUCH_MM = 5.0  # thinner things are couch, clothes and tubes
CLOSED_MM = 8.0  # vessels and small lesions belong to the lung around them
FROM_BONE_MM = 6.0  # spongy bone beside its hard shell
SMALLEST_BODY_SHARE = 0.02  # of all voxels; below this no body was found
SMALLEST_LUNG_ML = 50.0
SMALLEST_CONTRAST_ML = 1.0
ENCLOSING_SHARE = 0.1  # of an outline's area that must be body for the outline to be its skin
SKIN_MM = 3.0
_WITHIN_SLICE = np.array([[[0] * 3] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0] * 3] * 3])

OUTSIDE = 0  # label of the air around the body
LUNG_NAMES = tuple(f"{side} lung, {zone} zone" for side in ("right", "left") for zone in ("upper", "middle", "lower"))
CT_NAMES = (
    "outside the body",
    *LUNG_NAMES,
    *(f"{side} {tissue}" for tissue in ("soft tissue", "bone", "contrast") for side in ("right", "left")),
)
MR_NAMES = ("outside the body", "right body", "left body")
_SOFT, _BONE, _CONTRAST = 7, 9, 11  # labels of the right side; the left side follows

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """labels: (I, h, w) uint8, index into names; 0 is outside the body. notes: sentences, without patient data."""

    labels: NDArray[np.uint8]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Spacing:
    """Of the pooled grid, mm."""

    slice_mm: float
    row_mm: float
    column_mm: float

    @property
    def voxel_ml(self) -> float:
        return self.slice_mm * self.row_mm * self.column_mm / 1000


def find_regions(values: NDArray[np.float32], spacing: Spacing, modality: str, *, axial: bool = True) -> Regions:
    """Label each voxel of a stack (HU for CT), head first with rows to the patient's left where it is axial.

    Other stacks are body and air. Where no body is found everything is one region, and a note says so: nothing may be
    dropped as air then.
    """
    if not np.isfinite(values).all():
        return _whole_image(values.shape, "Some values are not numbers")
    body = find_body(values > (BODY_HU if modality == "CT" else _background_level(values)), spacing)
    if body.mean() < SMALLEST_BODY_SHARE:
        return _whole_image(values.shape, "No body was found")
    if not axial:
        return Regions(body.astype(np.uint8), ("outside the body", "body"))
    names = CT_NAMES if modality == "CT" else MR_NAMES
    left = _left_of(body)
    labels = np.where(body, _SOFT if modality == "CT" else 1, OUTSIDE).astype(np.uint8)
    labels[body & left] += 1
    if modality == "CT":
        _label_bright(labels, values, body, left, spacing)
        _label_lungs(labels, values, body, left, spacing)
    return Regions(labels, names)


def _whole_image(shape: tuple[int, ...], why: str) -> Regions:
    note = f"{why}: the whole image counts as one region, and no part of it was left out as air."
    return Regions(np.ones(shape, np.uint8), ("outside the body", "whole image"), (note,))


def find_body(dense: Bools, spacing: Spacing) -> Bools:
    """The large connected parts of what is dense, their holes filled slice by slice, with a rim for the skin.

    Thin things (couch, clothes) are opened away, unless they enclose what is left: then they are skin or skull.
    """
    disc = _disc(COUCH_MM / 2, spacing)
    opened = ndimage.binary_opening(dense, disc)
    parts, count = ndimage.label(opened)
    if not count:
        return np.asarray(opened, bool)
    sizes = np.bincount(parts.ravel())[1:]
    core = np.isin(parts, np.flatnonzero(sizes >= sizes.max() / 10) + 1)  # both arms, both legs
    whole = ndimage.binary_opening(_filled(dense | core), disc)
    outlines, count = ndimage.label(whole, _WITHIN_SLICE)
    sizes = np.bincount(outlines.ravel(), minlength=count + 1)
    inside = np.bincount(outlines.ravel(), weights=core.ravel(), minlength=count + 1)
    around = inside > ENCLOSING_SHARE * np.maximum(sizes, 1)
    around[0] = False
    return np.asarray(ndimage.binary_dilation(_filled(core | around[outlines]), _disc(SKIN_MM, spacing)), bool)


def _filled(mask: Bools) -> Bools:
    """Holes filled slice by slice."""
    return np.stack([ndimage.binary_fill_holes(layer) for layer in mask])


def _background_level(values: NDArray[np.float32]) -> float:
    """Otsu's threshold on the square root of the signal, halved: dark tissue must not pass for air."""
    signal = np.sqrt(np.clip(values - values.min(), 0, None))
    counts, edges = np.histogram(signal, 128)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    best = float(middles[int(np.nanargmax(np.where(above > 0, between, -1)))])
    return float(values.min()) + (best / 2) ** 2


def _label_bright(
    labels: NDArray[np.uint8], values: NDArray[np.float32], body: Bools, left: Bools, at: Spacing
) -> None:
    """Bone: what is bright around a hard core. Contrast: other bright things of some size."""
    bright = body & (values > BRIGHT_HU)
    hard = ndimage.binary_opening(body & (values > BONE_HU), np.ones((1, 2, 2)))
    bone = bright & ndimage.binary_dilation(hard, _disc(FROM_BONE_MM, at))
    rest = ndimage.binary_opening(bright & ~bone, np.ones((1, 2, 2)))
    parts, _ = ndimage.label(rest)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    contrast = (sizes * at.voxel_ml >= SMALLEST_CONTRAST_ML)[parts]
    labels[contrast] = _CONTRAST + left[contrast]
    labels[bone] = _BONE + left[bone]


def _label_lungs(labels: NDArray[np.uint8], values: NDArray[np.float32], body: Bools, left: Bools, at: Spacing) -> None:
    """Large airy parts of the body, each on the side where most of it lies, in thirds of its own height."""
    inner = ndimage.binary_erosion(body, _disc(SKIN_MM, at))  # the rim of the skin is air too
    airy = ndimage.binary_opening(inner & (values < LUNG_HU), np.ones((1, 2, 2)))
    parts, count = ndimage.label(airy)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    lefts = np.bincount(parts.ravel(), weights=left.ravel(), minlength=count + 1)
    side_of = np.full(count + 1, -1)  # 0 right, 1 left, 2 both
    for part in np.flatnonzero(sizes * at.voxel_ml >= SMALLEST_LUNG_ML):
        share = lefts[part] / sizes[part]
        side_of[part] = 1 if share > 0.9 else 0 if share < 0.1 else 2
    side_of[0] = -1
    for side, own in enumerate((~left, left)):
        lung = (side_of == side)[parts] | ((side_of == 2)[parts] & own)
        slices = np.flatnonzero(lung.any(axis=(1, 2)))
        if not slices.size:
            continue
        closed = _closed(lung, _disc(CLOSED_MM, at))
        closed = _filled(closed)  # a mass that the lung surrounds is in it, however large
        closed &= body & ((labels < _BONE) | lung)
        first, height = slices[0], slices[-1] + 1 - slices[0]
        zone = np.clip((np.arange(len(labels)) - first) * 3 // height, 0, 2)
        wanted = np.broadcast_to((1 + 3 * side + zone)[:, None, None], labels.shape)
        labels[closed] = wanted[closed]


def _closed(mask: Bools, disc: Bools) -> Bools:
    """Closing that does not shrink what touches the border."""
    rows, columns = disc.shape[1] // 2, disc.shape[2] // 2
    wide = ndimage.binary_closing(np.pad(mask, ((0, 0), (rows, rows), (columns, columns))), disc)
    return np.asarray(wide[:, rows : rows + mask.shape[1], columns : columns + mask.shape[2]], bool)


def _left_of(body: Bools) -> Bools:
    """Columns to the patient's left of the body's middle, which is smoothed along the stack."""
    columns = np.arange(body.shape[2])
    mass = body.sum(axis=(1, 2))
    middle = (body.sum(axis=1) @ columns) / np.maximum(mass, 1)
    middle = np.where(mass > 0, middle, np.average(middle, weights=mass))
    smooth = ndimage.uniform_filter1d(middle, min(len(middle), 15), mode="nearest")
    return np.broadcast_to(columns > smooth[:, None, None], body.shape)


def _disc(radius_mm: float, spacing: Spacing) -> Bools:
    """A disc within the slice, (1, 2r+1, 2c+1); one pixel at least."""
    rows, columns = max(1, round(radius_mm / spacing.row_mm)), max(1, round(radius_mm / spacing.column_mm))
    y, x = np.ogrid[-rows : rows + 1, -columns : columns + 1]
    return np.asarray((y / rows) ** 2 + (x / columns) ** 2 <= 1.0, bool)[None]
