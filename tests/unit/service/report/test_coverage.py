"""Which pixels of a slice the model was given."""

from __future__ import annotations

import numpy as np
import pytest

from service.report.coverage import Cover, cover, token_of_pixel
from service.shared.messages import SourceState
from tests.report_samples import arrays_of, output_of


def test_kept_tokens_cover_exactly_their_pixels() -> None:
    """A 4 x 4 grid over 512 x 512 pixels: every second tile of 128 x 128 is kept."""
    output = output_of(["1"])
    arrays = arrays_of(output.retention.inputs, (4, 4))

    covers = cover(output.retention, arrays, output.retention.sources[0], (512, 512))

    expected = np.kron(np.arange(16).reshape(4, 4) % 2 * Cover.DROPPED, np.ones((128, 128)))
    np.testing.assert_array_equal(covers, expected)


def test_a_slice_that_was_dropped_is_covered_nowhere() -> None:
    """The anchor's tokens are the anchor's, not this slice's."""
    output = output_of(["1", "2"], keep_every=2)

    covers = cover(output.retention, arrays_of(output.retention.inputs, (4, 4)), output.retention.sources[1], (8, 8))

    assert set(np.unique(covers)) == {Cover.NOT_SHOWN}


@pytest.mark.parametrize(
    "state", [SourceState.SAMPLED_OUT, SourceState.DUPLICATE, SourceState.UNREADABLE, SourceState.REPRESENTED]
)
def test_no_other_state_is_shown(state: SourceState) -> None:
    """Only slices in a kept input reached the model."""
    output = output_of(["1"])
    source = output.retention.sources[0].model_copy(update={"state": state})

    covers = cover(output.retention, arrays_of(output.retention.inputs, (4, 4)), source, (8, 8))

    assert set(np.unique(covers)) == {Cover.NOT_SHOWN}


def test_a_pixel_belongs_to_the_token_over_its_centre() -> None:
    """Tokens of 1.5 pixels: centres at 0.5, 1.5, 2.5 fall into columns 0, 1, 1."""
    affine = np.array([[1.5, 0, 0], [0, 1.5, 0]])

    row, column, inside = token_of_pixel(affine, (2, 2), (3, 3))

    np.testing.assert_array_equal(column[0], [0, 1, 1])
    np.testing.assert_array_equal(row[:, 0], [0, 1, 1])
    assert inside.all()


def test_pixels_beyond_the_grid_are_outside() -> None:
    """A model that saw a centred square of 4 x 4 pixels saw nothing around it."""
    output = output_of(["1"], tokens=(2, 2))
    arrays = arrays_of(output.retention.inputs, (2, 2))
    arrays.source_pixels_from_token[0] = [[2, 0, 2], [0, 2, 2]]

    covers = cover(output.retention, arrays, output.retention.sources[0], (8, 8))

    inside = np.zeros((8, 8), bool)
    inside[2:6, 2:6] = True
    np.testing.assert_array_equal(covers != Cover.OUTSIDE, inside)


def test_a_turned_grid_is_followed() -> None:
    """Token columns that run along source rows: the affine swaps the axes."""
    row, column, _ = token_of_pixel(np.array([[0, 2.0, 0], [2.0, 0, 0]]), (2, 2), (4, 4))

    np.testing.assert_array_equal(row[0], [0, 0, 1, 1])
    np.testing.assert_array_equal(column[:, 0], [0, 0, 1, 1])
