"""Where the frames of derived objects lie: planes, dimensions, and references to the slices they come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from service.report import codes
from service.report.document import reference
from service.report.header import code_item, copy_into, decimal
from service.report.identity import RunIdentity
from service.report.pixels import SourceFrame
from service.report.source import SourceStudy

SEGMENT_NUMBER = (0x0062000B, 0x0062000A)  # the attribute that indexes a dimension, and its functional group
POSITION = (0x00200032, 0x00209113)


class Unplaced(ValueError):
    """The slices have no common frame of reference, orientation, spacing or thickness: nothing can lie over them."""


def require_place(dataset: Dataset, frames: Sequence[SourceFrame]) -> None:
    """Raises Unplaced unless `frames` lie on one grid in one frame of reference."""
    if "FrameOfReferenceUID" not in dataset:
        raise Unplaced("the source has no valid Frame of Reference UID")
    if any(frame.position is None for frame in frames):
        raise Unplaced("a slice has no position")
    first = frames[0]
    if len({(frame.orientation, frame.spacing) for frame in frames}) != 1 or None in (first.orientation, first.spacing):
        raise Unplaced("the slices differ in orientation or pixel spacing, or state none")


def dimensions(dataset: Dataset, run: RunIdentity, kind: str, pointers: Sequence[tuple[int, int]]) -> None:
    """Declare by what the frames are indexed, slowest first."""
    organization = run.uid("dimensions", kind)
    item = Dataset()
    item.DimensionOrganizationUID = organization
    dataset.DimensionOrganizationSequence = [item]
    indices = []
    for pointer, group in pointers:
        index = Dataset()
        index.DimensionOrganizationUID = organization
        index.DimensionIndexPointer = pointer
        index.FunctionalGroupPointer = group
        indices.append(index)
    dataset.DimensionIndexSequence = indices


def shared_planes(
    frames: Sequence[SourceFrame], source: SourceStudy, orientation: Sequence[float], spacing: Sequence[float]
) -> Dataset:
    """Shared functional groups of planes with these row and column cosines and these distances of rows and columns.

    frames: the whole stack, whose usual gap is the thickness where the source states none. Raises Unplaced where both
    are unknown.
    """
    shared, plane, measures = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient = [decimal(part) for part in orientation]
    measures.PixelSpacing = [decimal(part) for part in spacing]
    thickness = source.series.get("SliceThickness") or _median_gap(frames)
    if not thickness:
        raise Unplaced("the source states no slice thickness, and there is one position alone")
    measures.SliceThickness = thickness
    shared.PlaneOrientationSequence = [plane]
    shared.PixelMeasuresSequence = [measures]
    return shared


def frame_groups(
    frame: SourceFrame, source: SourceStudy, index: Sequence[int], position: Sequence[float], derivation: Code
) -> Dataset:
    """Functional groups of one frame: its index, the place of its first pixel, and the slice that it comes from."""
    groups, content, plane, derived = (Dataset() for _ in range(4))
    content.DimensionIndexValues = list(index)
    plane.ImagePositionPatient = [decimal(part) for part in position]
    image = reference_to(frame, source)
    if frame.frame_number is not None:
        image.ReferencedFrameNumber = frame.frame_number
    image.PurposeOfReferenceCodeSequence = [code_item(codes.SOURCE_IMAGE)]
    image.SpatialLocationsPreserved = "YES"
    derived.SourceImageSequence = [image]
    derived.DerivationCodeSequence = [code_item(derivation)]
    groups.FrameContentSequence = [content]
    groups.PlanePositionSequence = [plane]
    groups.DerivationImageSequence = [derived]
    return groups


def referenced_series(frames: Sequence[SourceFrame], source: SourceStudy) -> list[Dataset]:
    """Referenced Series Sequence (PS3.3 C.12.2): each instance once."""
    series_of = {one.sop_instance_uid: one.series_uid for one in source.instances}
    by_series: dict[str, dict[str, Dataset]] = {}
    for frame in frames:
        of_series = by_series.setdefault(series_of[frame.sop_instance_uid], {})
        of_series.setdefault(frame.sop_instance_uid, reference_to(frame, source))
    items = []
    for series_uid, references in by_series.items():
        item = Dataset()
        copy_into(item, {"SeriesInstanceUID": series_uid})
        item.ReferencedInstanceSequence = list(references.values())
        items.append(item)
    return items


def reference_to(frame: SourceFrame, source: SourceStudy) -> Dataset:
    instance = source.instance(frame.sop_instance_uid)
    assert instance is not None, "frames are of instances of the source"
    return reference(instance.sop_class_uid, instance.sop_instance_uid)


def _median_gap(frames: Sequence[SourceFrame]) -> str:
    """The usual distance between neighbours, where the source states no thickness; empty for a single slice."""
    positions = np.array(sorted({frame.position for frame in frames if frame.position is not None}))
    if len(positions) < 2:
        return ""
    return decimal(float(np.median(np.linalg.norm(np.diff(positions, axis=0), axis=1))))
