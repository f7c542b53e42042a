"""workers.vlm.prompt: how slices are named, and what is said of dropped ones."""

from __future__ import annotations

import pytest

from workers.vlm.prompt import DroppedSlices, Image, SliceNames, joined, slices_in_turn

KEPT = [True, False, False, True, False, True]
ANCHOR = [0, 0, 0, 3, 3, 5]


@pytest.mark.parametrize(
    ("dropped", "expected"),
    [
        (DroppedSlices.OMIT, ["SLICE 1:", Image(0), "SLICE 4:", Image(3), "SLICE 6:", Image(5)]),
        (
            DroppedSlices.NAME,
            ["SLICE 1:", Image(0), "SLICE 2:\nSLICE 3:\nSLICE 4:", Image(3), "SLICE 5:\nSLICE 6:", Image(5)],
        ),
        (
            DroppedSlices.REFER,
            [
                "SLICE 1:",
                Image(0),
                "SLICES 2-3 as SLICE 1\nSLICE 4:",
                Image(3),
                "SLICE 5 as SLICE 4\nSLICE 6:",
                Image(5),
            ],
        ),
    ],
)
def test_dropped_slices_are_said_as_asked(dropped: DroppedSlices, expected: list[object]) -> None:
    """Kept slices keep their number in the stack; dropped ones are left out, named, or referred to."""
    assert joined(list(slices_in_turn(KEPT, ANCHOR, dropped, SliceNames.BEFORE))) == expected


@pytest.mark.parametrize(
    ("dropped", "expected"),
    [
        (DroppedSlices.OMIT, [Image(0), "SLICE 1", Image(3), "SLICE 4", Image(5), "SLICE 6"]),
        (
            DroppedSlices.NAME,
            [Image(0), "SLICE 1\nSLICE 2\nSLICE 3", Image(3), "SLICE 4\nSLICE 5", Image(5), "SLICE 6"],
        ),
        (
            DroppedSlices.REFER,
            [Image(0), "SLICE 1\nSLICES 2-3 as SLICE 1", Image(3), "SLICE 4\nSLICE 5 as SLICE 4", Image(5), "SLICE 6"],
        ),
    ],
)
def test_names_may_follow_their_images(dropped: DroppedSlices, expected: list[object]) -> None:
    """As in MedGemma 1.5's own prompts; a name before the image would be read as that of the image before."""
    assert joined(list(slices_in_turn(KEPT, ANCHOR, dropped, SliceNames.AFTER))) == expected


def test_every_slice_is_shown_when_none_is_dropped() -> None:
    """Name and image in turn."""
    parts = list(slices_in_turn([True, True], [0, 1], DroppedSlices.REFER, SliceNames.BEFORE))

    assert parts == ["SLICE 1:", Image(0), "SLICE 2:", Image(1)]
