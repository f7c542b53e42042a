"""Attention that each patch received -> Parametric Map: one small frame per given slice, a pixel per token.

The scores rank patches within a slice for pruning. They explain nothing: a patch may matter that scored low.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ParametricMapStorage

from service.report import codes
from service.report.coverage import is_shown
from service.report.encoding import name_by_content
from service.report.header import code_item, common_header, copy_series_of_source, private_scheme
from service.report.identity import RunIdentity
from service.report.pixels import SourceFrame
from service.report.planes import (
    POSITION,
    Unplaced,
    dimensions,
    frame_groups,
    referenced_series,
    require_place,
    shared_planes,
)
from service.report.source import SourceStudy
from service.shared.messages import AnalysisOutput, RetentionArrays
from service.shared.settings import ReportSettings

SERIES_DESCRIPTION = "AI attention, not for diagnosis"
NOT_SCORED = -1.0  # Float Pixel Padding Value; scores are never negative


class TokenPlane(NamedTuple):
    """A plane whose pixels are the tokens of one slice."""

    position: tuple[float, ...]  # of the centre of the first token, mm
    orientation: tuple[float, ...]  # cosines of token rows, then of token columns
    spacing: tuple[float, float]  # between rows, then columns of tokens, mm


def build_parametric_map(
    output: AnalysisOutput,
    arrays: RetentionArrays,
    source: SourceStudy,
    frames: Sequence[SourceFrame],
    settings: ReportSettings,
    *,
    run: RunIdentity,
) -> Dataset:
    """One Parametric Map, ready for `encode`; `frames` for their geometry only.

    Raises Unplaced where the tokens have no place in space, ValueError where no slice was given or none scored.
    """
    shown = {(one.sop_instance_uid, one.frame_number): one for one in output.retention.sources if is_shown(one)}
    given = [frame for frame in frames if (frame.sop_instance_uid, frame.frame_number) in shown]
    inputs = [shown[frame.sop_instance_uid, frame.frame_number].input_index or 0 for frame in given]
    scores = _scores(output, arrays, inputs)
    if not (scores != NOT_SCORED).any():
        raise ValueError("no patch of the given slices was scored; there is nothing to map")
    dataset = common_header(
        output,
        source,
        settings,
        run,
        sop_class_uid=ParametricMapStorage,
        modality="OT",
        kind="PM",
        series_number=settings.series_number + 4,
        series_description=SERIES_DESCRIPTION,
    )
    copy_series_of_source(dataset, source)
    require_place(dataset, given)
    planes = [
        token_plane(frame, arrays.source_pixels_from_token[index]) for frame, index in zip(given, inputs, strict=True)
    ]
    if len({(plane.orientation, plane.spacing) for plane in planes}) != 1:
        raise Unplaced("the token grids of the slices differ")
    dataset.CodingSchemeIdentificationSequence = [private_scheme()]
    _describe_pixels(dataset, scores)
    dimensions(dataset, run, "PM", (POSITION,))
    dataset.SharedFunctionalGroupsSequence = [_shared(frames, source, planes[0], float(scores.max()))]
    dataset.PerFrameFunctionalGroupsSequence = [
        frame_groups(frame, source, (place,), plane.position, codes.SALIENCY)
        for place, (frame, plane) in enumerate(zip(given, planes, strict=True), 1)
    ]
    dataset.ReferencedSeriesSequence = referenced_series(given, source)
    return name_by_content(dataset, "PM", *run.analysis_key)


def token_plane(frame: SourceFrame, source_pixels_from_token: NDArray[np.float64]) -> TokenPlane:
    """Where the tokens of one slice lie; Unplaced where they form no rectangular grid.

    source_pixels_from_token: (2, 3), see RetentionArrays.
    """
    position, cosines, (row_gap, column_gap) = (
        np.array(part) for part in (frame.position, frame.orientation, frame.spacing)
    )
    millimetres_per_pixel = np.stack([cosines[:3] * column_gap, cosines[3:] * row_gap], axis=1)  # (3, 2): of x, of y
    steps = millimetres_per_pixel @ source_pixels_from_token[:, :2]  # (3, 2): along a token row, along a column
    lengths = np.linalg.norm(steps, axis=0)
    if (lengths == 0).any() or abs(steps[:, 0] @ steps[:, 1]) > 1e-6 * lengths.prod():
        raise Unplaced("the tokens form no rectangular grid")
    first = source_pixels_from_token @ np.array([0.5, 0.5, 1.0]) - 0.5  # from the centre of the first pixel
    directions = (steps / lengths).T.ravel()
    return TokenPlane(
        tuple(np.round(position + millimetres_per_pixel @ first, 6).tolist()),
        tuple(np.round(directions, 8).tolist()),
        (round(float(lengths[1]), 8), round(float(lengths[0]), 8)),
    )


def _scores(output: AnalysisOutput, arrays: RetentionArrays, inputs: Sequence[int]) -> NDArray[np.float32]:
    """(frames, rows, columns) float32; NOT_SCORED where there is no score."""
    grid = output.retention.token_rows, output.retention.token_columns
    scores = arrays.scores[list(inputs)].reshape(len(inputs), *grid)
    return np.where(np.isfinite(scores), scores, np.float32(NOT_SCORED)).astype(np.float32)


def _describe_pixels(dataset: Dataset, scores: NDArray[np.float32]) -> None:
    count, rows, columns = scores.shape
    dataset.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    dataset.ContentLabel = "ATTENTION"
    dataset.ContentDescription = "Attention received by patches; not an explanation"
    dataset.ContentCreatorName = ""
    dataset.ContentQualification = "RESEARCH"
    dataset.RecognizableVisualFeatures = "NO"
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.AcquisitionContextSequence = []
    dataset.NumberOfFrames = count
    dataset.Rows, dataset.Columns = rows, columns
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = 32
    dataset.FloatPixelPaddingValue = NOT_SCORED
    dataset.FloatPixelPaddingRangeLimit = NOT_SCORED
    dataset.FloatPixelData = scores.astype("<f4").tobytes()


def _shared(frames: Sequence[SourceFrame], source: SourceStudy, plane: TokenPlane, highest: float) -> Dataset:
    shared = shared_planes(frames, source, plane.orientation, plane.spacing)
    frame_type, window, mapping, quantity, pixel = (Dataset() for _ in range(5))
    frame_type.FrameType = ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    window.WindowCenter = "1"
    window.WindowWidth = "2"
    window.VOILUTFunction = "LINEAR_EXACT"
    mapping.LUTExplanation = "Attention received"
    mapping.LUTLabel = "ATTENTION"
    mapping.RealWorldValueIntercept = 0.0
    mapping.RealWorldValueSlope = 1.0
    mapping.DoubleFloatRealWorldValueFirstValueMapped = 0.0
    mapping.DoubleFloatRealWorldValueLastValueMapped = highest
    mapping.MeasurementUnitsCodeSequence = [code_item(codes.NO_UNITS)]
    quantity.ValueType = "CODE"
    quantity.ConceptNameCodeSequence = [code_item(codes.QUANTITY)]
    quantity.ConceptCodeSequence = [code_item(codes.SALIENCY)]
    mapping.QuantityDefinitionSequence = [quantity]
    pixel.RescaleIntercept = "0"
    pixel.RescaleSlope = "1"
    pixel.RescaleType = "US"
    shared.ParametricMapFrameTypeSequence = [frame_type]
    shared.FrameVOILUTSequence = [window]
    shared.RealWorldValueMappingSequence = [mapping]
    shared.PixelValueTransformationSequence = [pixel]
    return shared
