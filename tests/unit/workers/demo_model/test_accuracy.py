"""Counting right and wrong reports."""

from __future__ import annotations

import pytest

from workers.demo_model.accuracy import Detection, Rate, accuracy_of, table
from workers.demo_model.anatomy import Side, Zone
from workers.demo_model.findings import Extent, NoduleKind
from workers.demo_model.labels import EffusionLabel, Labels, NoduleLabel


def with_nodule(diameter_mm: int, side: Side = Side.LEFT) -> Labels:
    return Labels(nodules=(NoduleLabel(side, Zone.MID, NoduleKind.SOLID, diameter_mm),))


def test_hits_misses_and_inventions_are_counted_apart() -> None:
    """Sensitivity and precision come from different errors."""
    found, empty = with_nodule(12), Labels()

    nodule = accuracy_of([(found, found), (found, empty), (empty, found), (empty, empty)]).detections["nodule >= 8 mm"]

    assert nodule == Detection(true_positives=1, false_positives=1, false_negatives=1)
    assert nodule.f1 == 0.5


def test_nodules_below_the_claim_count_neither_way() -> None:
    """They are in the table by size only."""
    result = accuracy_of([(with_nodule(5), Labels())])

    assert result.detections["nodule >= 8 mm"].sensitivity.of == 0
    assert result.sensitivity_by_size["4-6 mm"].of == 1


def test_attributes_count_among_right_positives() -> None:
    """A wrong side is no missed finding."""
    result = accuracy_of([(with_nodule(12), with_nodule(15, Side.RIGHT))])

    assert result.agreements["nodule side"] == Rate(0, 1)
    assert result.median_diameter_error_mm == 3


def test_unsupported_studies_count_for_abstention_alone() -> None:
    """Findings are asked of chest CT only."""
    effusion = Labels(effusion=EffusionLabel((Side.LEFT,), Extent.SMALL))

    result = accuracy_of([(Labels(supported=False), effusion)])

    assert result.detections["not supported"].false_negatives == 1
    assert result.detections["effusion"].precision.of == 0


def test_interval_is_wilsons() -> None:
    """Value from Wilson's formula for 45 of 50."""
    low, high = Rate(45, 50).interval

    assert (low, high) == (pytest.approx(0.7864, abs=1e-3), pytest.approx(0.9565, abs=1e-3))


def test_table_names_every_finding() -> None:
    """Markdown with one line per finding, also when nothing was counted."""
    text = table(accuracy_of([]))

    assert "| effusion |" in text
    assert "| nodule >= 8 mm |" in text
