"""What the model was shown, for machines: one binary Segmentation on the grid of the source slices.

Segment 1 is what entered the language model, segment 2 the slices that reached the vision tower. Slices that did
not are in neither, and have no frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import SegmentationStorage

from service.report import codes
from service.report.coverage import Cover, cover, is_shown
from service.report.encoding import name_by_content
from service.report.header import (
    clipped,
    code_item,
    common_header,
    copy_series_of_source,
    private_scheme,
)
from service.report.identity import RunIdentity
from service.report.pixels import SourceFrame
from service.report.planes import (
    POSITION,
    SEGMENT_NUMBER,
    dimensions,
    frame_groups,
    referenced_series,
    require_place,
    shared_planes,
)
from service.report.source import SourceStudy
from service.shared.messages import AnalysisOutput, RetentionArrays
from service.shared.settings import ReportSettings

SERIES_DESCRIPTION = "AI model input mask, not for diagnosis"


class _Segment(NamedTuple):
    number: int
    label: str
    code: Code
    colour: tuple[int, int, int]  # CIELab as PS3.3 C.10.7.1.1 encodes it


_TOKENS = _Segment(1, "Given to the language model", codes.TOKENS_GIVEN, (46000, 20000, 50000))
_SLICES = _Segment(2, "Slice given to the model", codes.SLICE_GIVEN, (40000, 36000, 18000))


@dataclass(frozen=True, slots=True)
class _MaskFrame:
    segment: _Segment
    source: SourceFrame
    place: int  # from 1, in stack order


def build_segmentation(
    output: AnalysisOutput,
    arrays: RetentionArrays,
    source: SourceStudy,
    frames: Sequence[SourceFrame],
    shape: tuple[int, int],
    settings: ReportSettings,
    *,
    run: RunIdentity,
) -> Dataset:
    """One SEG, ready for `encode`.

    frames: geometry of the slices in stack order; their pixels are not looked at. shape: (rows, columns) of each.
    Raises Unplaced where a mask cannot be put over its slices, ValueError where the model was shown none of them.
    """
    shown = {(one.sop_instance_uid, one.frame_number): one for one in output.retention.sources if is_shown(one)}
    given = [frame for frame in frames if (frame.sop_instance_uid, frame.frame_number) in shown]
    if not given:
        raise ValueError("none of the slices was shown to the model; there is nothing to mask")
    dataset = common_header(
        output,
        source,
        settings,
        run,
        sop_class_uid=SegmentationStorage,
        modality="SEG",
        kind="SEG",
        series_number=settings.series_number + 2,
        series_description=SERIES_DESCRIPTION,
    )
    copy_series_of_source(dataset, source)
    dataset.pop("Laterality", None)  # not in a segmentation: its segments say what they are of
    require_place(dataset, given)
    dataset.CodingSchemeIdentificationSequence = [private_scheme()]
    mask_frames: list[_MaskFrame] = []
    bits: list[NDArray[np.bool_]] = []
    for place, frame in enumerate(given, 1):
        covers = cover(output.retention, arrays, shown[frame.sop_instance_uid, frame.frame_number], shape)
        if (covers == Cover.KEPT).any():
            mask_frames.append(_MaskFrame(_TOKENS, frame, place))
            bits.append(covers == Cover.KEPT)
    present = [*([_TOKENS] if bits else []), _SLICES]
    mask_frames += [_MaskFrame(_SLICES, frame, place) for place, frame in enumerate(given, 1)]
    bits += [np.ones(shape, np.bool_)] * len(given)
    _describe_pixels(dataset, shape, bits)
    dataset.SegmentSequence = [_segment(segment, output, run) for segment in present]
    dimensions(dataset, run, "SEG", (SEGMENT_NUMBER, POSITION))
    shared = shared_planes(frames, source, given[0].orientation or (), given[0].spacing or ())
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = [_frame_groups(frame, source) for frame in mask_frames]
    dataset.ReferencedSeriesSequence = referenced_series(given, source)
    return name_by_content(dataset, "SEG", *run.analysis_key)


def _describe_pixels(dataset: Dataset, shape: tuple[int, int], bits: Sequence[NDArray[np.bool_]]) -> None:
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    dataset.ContentLabel = "MODEL_INPUT"
    dataset.ContentDescription = "Parts of the images that were given to the model"
    dataset.ContentCreatorName = ""
    dataset.SegmentationType = "BINARY"
    dataset.LossyImageCompression = "00"
    dataset.NumberOfFrames = len(bits)
    dataset.Rows, dataset.Columns = shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = 1
    dataset.BitsStored = 1
    dataset.HighBit = 0
    dataset.PixelRepresentation = 0
    packed = _packed(bits)
    dataset.PixelData = packed + b"\0" * (len(packed) % 2)
    dataset["PixelData"].VR = "OB"


def _packed(bits: Sequence[NDArray[np.bool_]]) -> bytes:
    """One bit per pixel, the first in the least significant place; frames are not aligned to bytes (PS3.5 8.1.1)."""
    if bits[0].size % 8 == 0:
        return b"".join(np.packbits(mask, bitorder="little").tobytes() for mask in bits)
    return np.packbits(np.concatenate([mask.ravel() for mask in bits]), bitorder="little").tobytes()


def _segment(segment: _Segment, output: AnalysisOutput, run: RunIdentity) -> Dataset:
    item = Dataset()
    item.SegmentNumber = segment.number
    item.SegmentLabel = segment.label
    item.SegmentAlgorithmType = "AUTOMATIC"
    item.SegmentAlgorithmName = clipped(output.model.name)
    algorithm = Dataset()
    algorithm.AlgorithmFamilyCodeSequence = [code_item(codes.ARTIFICIAL_INTELLIGENCE)]
    algorithm.AlgorithmName = clipped(output.model.name)
    algorithm.AlgorithmVersion = clipped(output.software_version)
    algorithm.AlgorithmSource = clipped(output.model.architecture)
    item.SegmentationAlgorithmIdentificationSequence = [algorithm]
    item.SegmentedPropertyCategoryCodeSequence = [code_item(codes.SPATIAL_CONCEPT)]
    item.SegmentedPropertyTypeCodeSequence = [code_item(segment.code)]
    item.TrackingID = segment.label
    item.TrackingUID = run.uid("segment", str(segment.number))
    item.RecommendedDisplayCIELabValue = list(segment.colour)
    return item


def _frame_groups(frame: _MaskFrame, source: SourceStudy) -> Dataset:
    index = (frame.segment.number, frame.place)
    groups = frame_groups(frame.source, source, index, frame.source.position or (), codes.SEGMENTATION)
    identification = Dataset()
    identification.ReferencedSegmentNumber = frame.segment.number
    groups.SegmentIdentificationSequence = [identification]
    return groups
