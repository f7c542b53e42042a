"""tests.bench.vlm: a comparison that is not fair would prove anything."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bench.vlm import DIMS, Measured, Row, depths

ROW = Row("ours", first_s=1.0, vision_s=0.5, peak_gib=0.1, per_s=4.0, encoded=1, tokens=10)


def measured(*first_s: float) -> Measured:
    return Measured(tuple(replace(ROW, first_s=seconds, peak_gib=seconds) for seconds in first_s))


@pytest.mark.parametrize(
    ("name", "fraction", "expected"),
    [
        ("medgemma-4b", 0.148, (4, 5)),
        ("medgemma-4b", 1, (27, 34)),
        ("qwen3-vl-4b", 1 / 12, (2, 3)),
        ("hulu-7b", 0.11, (3, 3)),
    ],
)
def test_tower_and_text_model_get_the_same_share_of_their_layers(
    name: str, fraction: float, expected: tuple[int, int]
) -> None:
    """Within a twentieth of it."""
    assert depths(DIMS[name], fraction) == expected


def test_shares_that_differ_are_refused_with_those_that_fit() -> None:
    """One layer of each is 3.7 % of the tower and 2.9 % of the text: that would flatter what saves in the tower."""
    with pytest.raises(ValueError, match=r"1 of 27 and 1 of 34 .* 0\.148"):
        depths(DIMS["medgemma-4b"], 0.035)


def test_speed_up_is_of_medians_with_the_worst_and_the_best_round() -> None:
    """Rounds are paired; of the memory the most counts."""
    stock, ours = measured(10, 40, 12), measured(2, 4, 4)

    assert ours.speed_up(stock) == (3, 3, 10)
    assert ours.median.peak_gib == 4
