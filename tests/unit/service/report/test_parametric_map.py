"""The Parametric Map: scores where they lie in space, one pixel per token."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from service.report.encoding import encode
from service.report.gate import Severity, check
from service.report.parametric_map import NOT_SCORED, build_parametric_map, token_plane
from service.report.pixels import SourceFrame
from service.report.planes import Unplaced
from service.report.source import SourceStudy, read_source
from service.shared.messages import RetentionArrays
from service.shared.settings import ReportSettings
from tests.report_samples import RUN, arrays_of, ct_header, output_for, write

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
TOKENS = (4, 4)


@pytest.fixture
def source(tmp_path: Path) -> SourceStudy:
    """Four CT slices."""
    return read_source(write(tmp_path, [ct_header(number) for number in range(1, 5)]))


def frames_of(source: SourceStudy, spacing: Sequence[float] = (0.5, 0.5)) -> list[SourceFrame]:
    return [
        SourceFrame(one.sop_instance_uid, None, None, (10.0, 20.0, 3.0 * index), AXIAL, tuple(spacing))
        for index, one in enumerate(source.instances)
    ]


def arrays_for(source: SourceStudy) -> RetentionArrays:
    """Scores 0 to 15 in slice 1, tens of them in slice 3; tokens of 32 pixels."""
    output = output_for(source, tokens=TOKENS)
    arrays = arrays_of(output.retention.inputs, TOKENS)
    arrays.scores[0] = np.arange(16)
    arrays.scores[2] = np.arange(16) * 10
    arrays.source_pixels_from_token[:] = [[32, 0, 0], [0, 32, 0]]
    return arrays


def build(source: SourceStudy, arrays: RetentionArrays | None = None) -> Dataset:
    output = output_for(source, tokens=TOKENS)
    built = build_parametric_map(
        output, arrays or arrays_for(source), source, frames_of(source), ReportSettings(), run=RUN
    )
    return dcmread(BytesIO(encode(built)))


def pixels(dataset: Dataset) -> np.ndarray:
    return np.frombuffer(dataset.FloatPixelData, "<f4").reshape(-1, dataset.Rows, dataset.Columns)


def test_each_given_slice_has_its_scores(source: SourceStudy) -> None:
    """Slices 1 and 3, in order of tokens."""
    scores = pixels(build(source))

    np.testing.assert_array_equal(scores[0], np.arange(16).reshape(4, 4))
    np.testing.assert_array_equal(scores[1], np.arange(16).reshape(4, 4) * 10)


def test_a_token_lies_over_its_pixels(source: SourceStudy) -> None:
    """The first token of 32 pixels of 0.5 mm: its centre is 15.5 pixels from the centre of the first pixel."""
    dataset = build(source)

    groups = dataset.PerFrameFunctionalGroupsSequence
    assert list(groups[0].PlanePositionSequence[0].ImagePositionPatient) == [17.75, 27.75, 0]
    assert list(groups[1].PlanePositionSequence[0].ImagePositionPatient) == [17.75, 27.75, 6]
    shared = dataset.SharedFunctionalGroupsSequence[0]
    assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == [16, 16]
    assert list(shared.PlaneOrientationSequence[0].ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]


def test_unscored_tokens_are_padding(source: SourceStudy) -> None:
    """Not zero: nothing was measured there."""
    arrays = arrays_for(source)
    arrays.scores[0, 5] = np.nan

    dataset = build(source, arrays)

    assert pixels(dataset)[0, 1, 1] == NOT_SCORED
    assert dataset.FloatPixelPaddingValue == NOT_SCORED


def test_without_any_score_there_is_no_map(source: SourceStudy) -> None:
    """A method that scores nothing has no map."""
    arrays = arrays_for(source)
    arrays.scores[:] = np.nan

    with pytest.raises(ValueError, match="nothing to map"):
        build(source, arrays)


def test_a_turned_token_grid_has_its_own_orientation(source: SourceStudy) -> None:
    """Token rows along columns of the source; unequal spacing follows."""
    frame = frames_of(source, spacing=(0.5, 1.0))[0]

    plane = token_plane(frame, np.array([[0, 2.0, 0], [4.0, 0, 0]]))

    assert plane.orientation == (0, 1, 0, 1, 0, 0)
    assert plane.spacing == (2.0, 2.0)
    assert plane.position == (10.0 + 0.5 * 1.0, 20.0 + 1.5 * 0.5, 0.0)


def test_a_sheared_token_grid_has_no_plane(source: SourceStudy) -> None:
    """DICOM planes are rectangular."""
    with pytest.raises(Unplaced, match="no rectangular grid"):
        token_plane(frames_of(source)[0], np.array([[2.0, 1.0, 0], [0, 2.0, 0]]))


def test_it_passes_the_gate(source: SourceStudy) -> None:
    """Without a warning that is not allowed."""
    assert {finding.severity for finding in check(encode(build(source)))} == {Severity.ALLOWED}


def test_same_input_gives_the_same_bytes(source: SourceStudy) -> None:
    """A rebuilt map is the map."""
    assert encode(build(source)) == encode(build(source))
