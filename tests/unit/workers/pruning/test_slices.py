"""workers.pruning.slices: which slices of a stack are kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from workers.pruning.finite import NotFinite
from workers.pruning.slices import keep_all, keep_changed


def stack(*levels: float) -> Tensor:
    """One flat slice per level."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


LEVELS = arrays.arrays("float32", st.integers(1, 12), elements=st.floats(-1, 1, width=16))


def test_distance_is_to_last_kept_slice() -> None:
    """A slow drift is noticed: the distance is to the last kept slice, not to the slice before."""
    choice = keep_changed(stack(0.0, 0.04, 0.08, 0.12, 0.16), gamma=0.1)

    assert choice.kept.tolist() == [True, False, False, True, False]
    assert choice.anchor.tolist() == [0, 0, 0, 3, 3]


def test_threshold_is_strict() -> None:
    """A slice exactly at gamma is dropped."""
    assert keep_changed(stack(0.0, 0.25), gamma=0.25).kept.tolist() == [True, False]


def test_single_slice_is_kept() -> None:
    """A stack of one keeps it."""
    choice = keep_changed(stack(0.3), gamma=2.0)

    assert choice.kept.tolist() == [True]
    assert choice.anchor.tolist() == [0]


def test_equal_slices_leave_the_first() -> None:
    """Of slices without any difference only the first is encoded, even at gamma 0."""
    assert keep_changed(stack(0.5, 0.5, 0.5), gamma=0.0).kept.tolist() == [True, False, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    """NaN compares as `not changed` and would drop slices silently, so it is refused by name."""
    slices = stack(0.0, 0.5, 1.0)
    slices[1, 0, 0, 0] = value

    with pytest.raises(NotFinite, match="slices"):
        keep_changed(slices, gamma=0.05)


@given(LEVELS)
def test_gamma_0_keeps_every_difference(levels: object) -> None:
    """At gamma 0 a dropped slice equals the one that stands for it, value for value."""
    slices = torch.as_tensor(levels).view(-1, 1)

    choice = keep_changed(slices, gamma=0.0)

    assert torch.equal(slices[choice.anchor], slices)


@given(LEVELS, st.floats(0, 2))
def test_each_slice_is_near_its_anchor(levels: object, gamma: float) -> None:
    """No slice is further than gamma from the kept slice that stands for it; anchors are kept and never later."""
    slices = torch.as_tensor(levels).view(-1, 1)

    choice = keep_changed(slices, gamma=gamma)

    assert ((slices - slices[choice.anchor]).abs().mean(dim=1).double() <= gamma).all()
    assert choice.kept[choice.anchor].all()
    assert (choice.anchor <= torch.arange(len(slices))).all()
    assert torch.equal(choice.anchor[choice.kept], torch.arange(len(slices))[choice.kept])


@given(LEVELS)
def test_extremes_of_gamma_keep_one_and_all(levels: object) -> None:
    """2 is the whole range of pixels and leaves one slice; a negative gamma keeps all."""
    slices = torch.as_tensor(levels).view(-1, 1)

    assert keep_changed(slices, gamma=2.0).kept.sum() == 1
    assert keep_changed(slices, gamma=-1.0).kept.all()


def test_low_precision_slices_are_compared_in_full() -> None:
    """A difference that bfloat16 arithmetic would round away from gamma is measured in float."""
    slices = stack(0.9, 0.95).bfloat16()
    exact = float((slices[1].double() - slices[0].double()).abs().mean())

    assert float(keep_changed(slices, gamma=0.01).distance[1]) == pytest.approx(exact, abs=1e-12)


def test_keep_all_measures_nothing() -> None:
    """With the stage off every slice stands for itself and no distance is claimed."""
    choice = keep_all(3)

    assert choice.kept.all()
    assert choice.anchor.tolist() == [0, 1, 2]
    assert choice.distance.isnan().all()
