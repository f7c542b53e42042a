"""The Secondary Capture: its pixels are held against the mask they draw."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import config, dcmread
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, RLELossless

from service.report.encoding import encode, transcoded
from service.report.gate import Severity, check
from service.report.pixels import SourceFrame
from service.report.retention_map import TRANSFER_SYNTAX, build_secondary_capture, caption, sides, wanted_frames
from service.report.source import SourceStudy, read_source
from service.shared.messages import SourceState
from service.shared.settings import ReportSettings
from tests.report_samples import RUN, arrays_of, ct_header, output_for, write

SHAPE = (256, 256)
TOKENS = (4, 4)
TILE = 64
EDGE = 20  # within it are the orange frame and all words
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@pytest.fixture
def source(tmp_path: Path) -> SourceStudy:
    """Four CT slices."""
    headers = [ct_header(number, BodyPartExamined="CHEST") for number in range(1, 5)]
    return read_source(write(tmp_path, headers))


def frames_of(source: SourceStudy, grey: int = 200) -> list[SourceFrame]:
    """Slices of one grey, 3 mm apart."""
    return [
        SourceFrame(
            one.sop_instance_uid, None, np.full(SHAPE, grey, np.uint8), (0.0, 0.0, 3.0 * index), AXIAL, (0.5, 0.5)
        )
        for index, one in enumerate(source.instances)
    ]


def build(source: SourceStudy, frames: Sequence[SourceFrame] | None = None, **changes: Any) -> bytes:
    """The map of an analysis that kept every second slice, and in those every second token."""
    output = output_for(source, tokens=TOKENS, **changes)
    arrays = arrays_of(output.retention.inputs, TOKENS)
    arrays.source_pixels_from_token[:] = [[TILE, 0, 0], [0, TILE, 0]]
    capture = build_secondary_capture(
        output, arrays, source, frames_of(source) if frames is None else frames, ReportSettings(), run=RUN
    )
    return encode(capture, TRANSFER_SYNTAX)


def read(content: bytes) -> Dataset:
    return dcmread(BytesIO(content))


def inner(picture: Any) -> Any:
    """Without the frame and the words."""
    return picture[EDGE:-EDGE, EDGE:-EDGE]


def test_kept_patches_are_clear_and_dropped_ones_dark(source: SourceStudy) -> None:
    """Pixel by pixel on the grid of the source."""
    picture = read(build(source)).pixel_array[0]

    kept = np.kron(np.arange(16).reshape(TOKENS) % 2 == 0, np.ones((TILE, TILE), bool)).astype(bool)
    clear = (picture == 200).all(axis=-1)
    np.testing.assert_array_equal(inner(clear), inner(kept))
    assert inner(picture)[~inner(kept)].max() < 150


def test_a_slice_that_was_not_given_is_dark_in_an_orange_frame(source: SourceStudy) -> None:
    """No patch of it is clear."""
    picture = read(build(source)).pixel_array[1]

    assert inner(picture).max() < 150
    assert picture[128, 0].tolist() == [255, 140, 0]
    assert picture[128, -1].tolist() == [255, 140, 0]


def test_a_slice_that_was_given_has_no_orange_frame(source: SourceStudy) -> None:
    """Colours mean one thing each."""
    picture = read(build(source)).pixel_array[0]

    assert not (picture == [255, 140, 0]).all(axis=-1).any()


def test_patches_of_air_tell_their_state_too(source: SourceStudy) -> None:
    """A dropped patch of black is not black."""
    picture = read(build(source, frames_of(source, grey=0))).pixel_array[0]

    colours = {tuple(colour.tolist()) for colour in np.unique(inner(picture).reshape(-1, 3), axis=0)}
    assert colours == {(0, 0, 0), (36, 12, 12)}


def test_every_slice_has_a_frame_in_stack_order_at_its_place(source: SourceStudy) -> None:
    """Dropped slices included."""
    capture = read(build(source))

    assert capture.NumberOfFrames == 4
    positions = [
        group.PlanePositionSequence[0].ImagePositionPatient[2] for group in capture.PerFrameFunctionalGroupsSequence
    ]
    assert positions == [0, 3, 6, 9]
    assert [item.ReferencedSOPInstanceUID for item in capture.SourceImageSequence] == [
        one.sop_instance_uid for one in source.instances
    ]


def test_the_banner_is_burned_into_every_frame(source: SourceStudy) -> None:
    """White, above and below: a viewer may show nothing of the header."""
    for picture in read(build(source)).pixel_array:
        white = (picture == 255).all(axis=-1)
        assert white[:11].any()
        assert white[11:EDGE].any()  # what the colours mean
        assert white[-EDGE:].any()


def test_words_leave_the_orange_frame_whole(source: SourceStudy) -> None:
    """On all four edges, two pixels wide."""
    orange = (read(build(source)).pixel_array[1] == [255, 140, 0]).all(axis=-1)

    assert all(edge.all() for edge in (orange[:2], orange[-2:], orange[:, :2], orange[:, -2:]))
    assert not orange[2:-2, 2:-2].any()


def test_words_cover_nothing_beside_their_own_strokes(source: SourceStudy) -> None:
    """The anatomy between and around the letters stays."""
    picture = read(build(source)).pixel_array[0]

    strokes = np.isin(picture, (0, 255)).all(axis=-1)
    kept = np.kron(np.arange(16).reshape(TOKENS) % 2 == 0, np.ones((TILE, TILE), bool)).astype(bool)
    assert strokes.any()
    assert not inner(strokes).any()
    assert strokes[:EDGE].mean() < 0.6
    assert (picture[kept & ~strokes] == 200).all()
    assert picture[~kept & ~strokes].max() < 150


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (AXIAL, ("R", "L")),
        ((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0), ("L", "R")),
        ((0.0, 1.0, 0.0, 0.0, 0.0, -1.0), ("A", "P")),
        ((0.1, 0.2, -0.97, 0.0, 1.0, 0.0), ("H", "F")),
        (None, ("", "")),
    ],
)
def test_the_sides_of_the_patient_follow_the_orientation(
    source: SourceStudy, orientation: tuple[float, ...] | None, expected: tuple[str, str]
) -> None:
    """Left and right edge (PS3.3 C.7.6.1.1.1); none is named where the header does not say."""
    frame = SourceFrame("2.25.1", None, None, None, orientation, None)

    assert sides(frame) == expected


def test_a_side_is_written_at_each_edge(source: SourceStudy) -> None:
    """Halfway down, and nothing in its place where it is unknown."""
    without = [SourceFrame(one.sop_instance_uid, None, one.grey, None, None, None) for one in frames_of(source)]

    for frames, written in ((frames_of(source), True), (without, False)):
        picture = read(build(source, frames)).pixel_array[0]
        white = (picture[128:140] == 255).all(axis=-1)
        assert (white[:, :EDGE].any(), white[:, -EDGE:].any()) == (written, written)


def test_the_words_are_in_the_header_too(source: SourceStudy) -> None:
    """A list of series says that it is not for diagnosis."""
    capture = read(build(source))

    assert capture.SeriesDescription == "AI model input, not for diagnosis"
    assert capture.ImageComments.endswith("Not for diagnosis.")
    assert capture.BurnedInAnnotation == "NO"


@pytest.mark.parametrize(
    ("state", "inputs", "said"),
    [
        (SourceState.SHOWN, (1,), "Slice 3 of 4: given to the model"),
        (SourceState.IN_SLAB, (1, 2, 3), "Slice 3 of 4: given as part of the mean of slices 2 to 4"),
        (SourceState.REPRESENTED, (1,), "Slice 3 of 4: NOT GIVEN, represented by slice 2"),
        (SourceState.SAMPLED_OUT, (1,), "Slice 3 of 4: NOT GIVEN, left out by sampling"),
        (SourceState.DUPLICATE, (1,), "Slice 3 of 4: NOT GIVEN, another slice at this position was"),
        (SourceState.UNREADABLE, (1,), "Slice 3 of 4: NOT GIVEN, unreadable"),
    ],
)
def test_the_caption_names_what_became_of_a_slice(
    source: SourceStudy, state: SourceState, inputs: tuple[int, ...], said: str
) -> None:
    """And the anchor that stands for it."""
    retention = output_for(source).retention
    model_input = retention.inputs[1].model_copy(update={"source_instances": inputs})
    retention = retention.model_copy(update={"inputs": (retention.inputs[0], model_input)})

    one = retention.sources[2].model_copy(update={"state": state, "input_index": 1})

    assert caption(retention, one, 3) == said


def test_an_undecodable_slice_is_black_and_says_so(source: SourceStudy) -> None:
    """Also when it is the first one, whose size nobody knows yet."""
    frames = frames_of(source)
    frames[0] = SourceFrame(frames[0].sop_instance_uid, None, None, (0.0, 0.0, 0.0), AXIAL, (0.5, 0.5))

    capture = read(build(source, frames))

    assert capture.NumberOfFrames == 4
    assert set(np.unique(inner(capture.pixel_array[0]).max(axis=-1))) <= {0, 36}


def test_without_any_decodable_slice_there_is_no_map(source: SourceStudy) -> None:
    """A fault with its reason, not an empty picture."""
    frames = [SourceFrame(one.sop_instance_uid, None, None, None, None, None) for one in source.instances]

    with pytest.raises(ValueError, match="none of the slices could be decoded"):
        build(source, frames)


def test_slices_without_a_place_get_no_plane_groups(source: SourceStudy) -> None:
    """A wrong place is worse than none."""
    frames = frames_of(source)
    frames[2] = SourceFrame(frames[2].sop_instance_uid, None, frames[2].grey, None, AXIAL, (0.5, 0.5))

    assert "PerFrameFunctionalGroupsSequence" not in read(build(source, frames))


@pytest.mark.parametrize("uid", [None, "", "HEAD"], ids=["absent", "empty", "invalid"])
def test_a_map_without_a_frame_of_reference_passes_the_gate(tmp_path: Path, uid: str | None) -> None:
    """A fault of the source; planes without a frame of reference would be one of ours, and keep the report back."""
    with config.disable_value_validation():
        headers = [ct_header(number, FrameOfReferenceUID=uid, BodyPartExamined="CHEST") for number in (1, 2, 3, 4)]
        source = read_source(write(tmp_path, headers))

    content = build(source)

    assert [str(one) for one in check(content, verbatim=source.uids) if one.severity is Severity.ERROR] == []
    assert "PerFrameFunctionalGroupsSequence" not in read(content)


def test_a_map_of_slices_without_a_place_passes_the_gate(source: SourceStudy) -> None:
    """The source has a frame of reference, its slices say no position."""
    frames = [SourceFrame(one.sop_instance_uid, None, one.grey, None, None, None) for one in frames_of(source)]

    content = build(source, frames)

    assert [str(one) for one in check(content, verbatim=source.uids) if one.severity is Severity.ERROR] == []


def test_same_input_gives_the_same_bytes(source: SourceStudy) -> None:
    """A rebuilt map is the map."""
    assert build(source) == build(source)


def test_other_pixels_never_carry_the_same_uid(source: SourceStudy) -> None:
    """The UID is derived from all of the bytes."""
    first, second = read(build(source)), read(build(source, frames_of(source, grey=199)))

    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert first.SeriesInstanceUID == second.SeriesInstanceUID


@pytest.mark.parametrize("syntax", [RLELossless, ExplicitVRLittleEndian])
def test_another_encoding_has_the_same_uid_and_pixels(source: SourceStudy, tmp_path: Path, syntax: UID) -> None:
    """For a destination that refuses JPEG 2000."""
    content = build(source)
    (tmp_path / "map.dcm").write_bytes(content)

    other = read(encode(transcoded(tmp_path / "map.dcm", syntax), syntax))

    assert other.file_meta.TransferSyntaxUID == syntax
    assert other.PhotometricInterpretation == "RGB"
    assert other.SOPInstanceUID == read(content).SOPInstanceUID
    np.testing.assert_array_equal(other.pixel_array, read(content).pixel_array)


def test_wanted_frames_follow_the_stack(source: SourceStudy) -> None:
    """Instances without a readable header are left out."""
    output = output_for(source)

    wanted = wanted_frames(output, source)

    assert [uid for uid, _, _ in wanted] == [one.sop_instance_uid for one in output.retention.sources]
