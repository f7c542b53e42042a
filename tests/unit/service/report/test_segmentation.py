"""The SEG: its masks are those of the retention, on the grid of the source, for any reader of segmentations."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import highdicom
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from service.report.encoding import encode
from service.report.pixels import SourceFrame
from service.report.planes import Unplaced
from service.report.segmentation import build_segmentation
from service.report.source import SourceStudy, read_source
from service.shared.messages import TOKEN_CODES, SourceState, TokenState
from service.shared.settings import ReportSettings
from tests.report_samples import RUN, arrays_of, ct_header, output_for, write

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
TOKENS = (4, 4)


@pytest.fixture
def source(tmp_path: Path) -> SourceStudy:
    """Four CT slices."""
    return read_source(write(tmp_path, [ct_header(number) for number in range(1, 5)]))


def frames_of(source: SourceStudy) -> list[SourceFrame]:
    return [
        SourceFrame(one.sop_instance_uid, None, None, (0.0, 0.0, 3.0 * index), AXIAL, (0.5, 0.5))
        for index, one in enumerate(source.instances)
    ]


def build(
    source: SourceStudy, shape: tuple[int, int] = (32, 32), frames: Sequence[SourceFrame] | None = None
) -> Dataset:
    """The mask of an analysis that kept slices 1 and 3, and in those every second token."""
    output = output_for(source, tokens=TOKENS)
    arrays = arrays_of(output.retention.inputs, TOKENS)
    arrays.source_pixels_from_token[:] = [[shape[1] / 4, 0, 0], [0, shape[0] / 4, 0]]
    placed = frames_of(source) if frames is None else frames
    segmentation = build_segmentation(output, arrays, source, placed, shape, ReportSettings(), run=RUN)
    return dcmread(BytesIO(encode(segmentation)))


def kept(shape: tuple[int, int]) -> np.ndarray:
    """Every second of 4 x 4 tiles."""
    tile = np.ones((shape[0] // 4, shape[1] // 4), int)
    return np.kron(np.arange(16).reshape(TOKENS) % 2 == 0, tile)


@pytest.mark.parametrize("shape", [(32, 32), (20, 12)], ids=["whole bytes", "frames that end within a byte"])
def test_masks_are_those_of_the_retention(source: SourceStudy, shape: tuple[int, int]) -> None:
    """Segment 1: kept tokens of slices 1 and 3; segment 2: these slices, whole."""
    masks = build(source, shape).pixel_array

    np.testing.assert_array_equal(masks[:2], [kept(shape)] * 2)
    np.testing.assert_array_equal(masks[2:], np.ones((2, *shape)))


def test_each_frame_names_its_segment_place_and_source(source: SourceStudy) -> None:
    """Slices that were not given have no frame."""
    segmentation = build(source)

    said = [
        (
            group.SegmentIdentificationSequence[0].ReferencedSegmentNumber,
            group.PlanePositionSequence[0].ImagePositionPatient[2],
            group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID,
        )
        for group in segmentation.PerFrameFunctionalGroupsSequence
    ]
    assert said == [(1, 0, "2.25.1001"), (1, 6, "2.25.1003"), (2, 0, "2.25.1001"), (2, 6, "2.25.1003")]


def test_highdicom_reads_the_masks_by_source_instance(source: SourceStudy) -> None:
    """A reader of segmentations finds the pixels of a slice."""
    segmentation = highdicom.seg.segread(BytesIO(encode(build(source))))

    masks = segmentation.get_pixels_by_source_instance(["2.25.1003"], segment_numbers=[1])

    np.testing.assert_array_equal(masks[0, :, :, 0], kept((32, 32)))
    assert segmentation.get_segment_description(1).segment_label == "Given to the language model"


def test_without_any_kept_token_only_the_slices_are_masked(source: SourceStudy) -> None:
    """A segment without pixels is not declared."""
    output = output_for(source, tokens=TOKENS)
    arrays = arrays_of(output.retention.inputs, TOKENS)
    arrays.tokens[:] = TOKEN_CODES[TokenState.DROPPED]

    segmentation = build_segmentation(output, arrays, source, frames_of(source), (8, 8), ReportSettings(), run=RUN)

    assert [item.SegmentNumber for item in segmentation.SegmentSequence] == [2]


def test_a_slice_without_a_place_cannot_be_masked(source: SourceStudy) -> None:
    """The reason names what is missing."""
    frames = frames_of(source)
    frames[0] = SourceFrame(frames[0].sop_instance_uid, None, None, None, AXIAL, (0.5, 0.5))

    with pytest.raises(Unplaced, match="a slice has no position"):
        build(source, frames=frames)


def test_slices_of_other_spacing_cannot_be_masked(source: SourceStudy) -> None:
    """One grid for all frames, or none."""
    frames = frames_of(source)
    frames[0] = SourceFrame(frames[0].sop_instance_uid, None, None, (0.0, 0.0, 0.0), AXIAL, (0.7, 0.7))

    with pytest.raises(Unplaced, match="differ in orientation or pixel spacing"):
        build(source, frames=frames)


def test_a_source_without_frame_of_reference_cannot_be_masked(tmp_path: Path) -> None:
    """Positions mean nothing without one."""
    source = read_source(write(tmp_path, [ct_header(1, FrameOfReferenceUID=None)]))

    with pytest.raises(Unplaced, match="Frame of Reference"):
        build(source)


def test_a_source_without_thickness_lends_the_gap_of_its_stack(source: SourceStudy) -> None:
    """Of all its slices, 3 mm, and not of those that were given, 6 mm."""
    shared = build(source).SharedFunctionalGroupsSequence[0]

    assert shared.PixelMeasuresSequence[0].SliceThickness == 3


def test_a_slice_of_unknown_thickness_cannot_be_masked(tmp_path: Path) -> None:
    """One position alone has no gap; a mask without thickness would be a fault of ours (Type 1C)."""
    source = read_source(write(tmp_path, [ct_header()]))

    with pytest.raises(Unplaced, match="no slice thickness"):
        build(source)


def test_nothing_shown_is_nothing_to_mask(source: SourceStudy) -> None:
    """An analysis of nothing has no mask."""
    output = output_for(source)
    hidden = tuple(one.model_copy(update={"state": SourceState.SAMPLED_OUT}) for one in output.retention.sources)
    output = output.model_copy(update={"retention": output.retention.model_copy(update={"sources": hidden})})
    arrays = arrays_of(output.retention.inputs, TOKENS)

    with pytest.raises(ValueError, match="nothing to mask"):
        build_segmentation(output, arrays, source, frames_of(source), (8, 8), ReportSettings(), run=RUN)


def test_same_input_gives_the_same_bytes(source: SourceStudy) -> None:
    """A rebuilt mask is the mask."""
    assert encode(build(source)) == encode(build(source))


def test_dimensions_are_indexed_by_segment_and_place(source: SourceStudy) -> None:
    """One organization for all frames."""
    segmentation = build(source)

    values = [
        list(group.FrameContentSequence[0].DimensionIndexValues)
        for group in segmentation.PerFrameFunctionalGroupsSequence
    ]
    assert values == [[1, 1], [1, 2], [2, 1], [2, 2]]
    (organization,) = segmentation.DimensionOrganizationSequence
    assert {item.DimensionOrganizationUID for item in segmentation.DimensionIndexSequence} == {
        organization.DimensionOrganizationUID
    }
