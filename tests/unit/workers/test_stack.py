"""workers.stack: which images of a series make one stack, and in which order."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace

import numpy as np
import pytest

from service.shared.settings import SeriesSettings
from tests.image_headers import AXIAL, CORONAL, SAGITTAL, image, stack_of
from workers.errors import Refusal, RefusalCode
from workers.headers import InstanceHeader
from workers.stack import arrange, gaps, require_complete


def used_numbers(headers: list[InstanceHeader]) -> list[int | None]:
    return [entry.headers[0].instance_number for entry in arrange(headers).slices]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_axial_stack_runs_from_head_to_feet(seed: int) -> None:
    """Whatever order the instances come in, the highest z is first and positions increase towards the feet."""
    headers = stack_of(12)
    random.Random(seed).shuffle(headers)

    stack = arrange(headers)

    assert used_numbers(headers) == list(range(12, 0, -1))
    assert np.allclose(stack.positions_mm, np.arange(-55, 1, 5))
    assert stack.normal == (0, 0, -1)


@pytest.mark.parametrize(
    ("orientation", "axis", "first"),
    [
        (CORONAL, 1, -1),  # front first: y grows to the back
        (tuple(-c for c in CORONAL[:3]) + CORONAL[3:], 1, -1),
        (SAGITTAL, 0, -1),  # right first: x grows to the left
        (AXIAL, 2, 1),
        (tuple(-c for c in AXIAL), 2, 1),  # prone: rows and columns both turned round
        ((-1.0, 0.0, 0.0, 0.0, 1.0, 0.0), 2, 1),  # mirrored: the cross product points the other way
    ],
)
def test_order_does_not_depend_on_how_the_image_is_turned(
    orientation: tuple[float, ...], axis: int, first: int
) -> None:
    """The way along the patient is the same for every in-plane orientation."""
    places = [tuple(float(v if a == axis else 0) for a in range(3)) for v in range(-4, 5)]
    headers = [image(0, n, orientation=orientation, position=place) for n, place in enumerate(places)]

    stack = arrange(headers)

    assert (stack.slices[0].headers[0].position or ())[axis] == 4 * first
    assert np.all(np.diff(stack.positions_mm) > 0)


def test_localizers_and_captures_in_the_series_are_left_out_with_their_reason() -> None:
    """A series may hold any number of foreign objects; the stack is made of the rest."""
    headers = [
        *stack_of(8),
        image(0, 20, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"), orientation=CORONAL),
        image(0, 21, sop_class_uid="1.2.840.10008.5.1.4.1.1.7", position=None, orientation=None),
        image(0, 22, image_type=("DERIVED", "SECONDARY", "AXIAL", "MPR")),
        image(0, 23, samples_per_pixel=3),
        image(0, 24, image_type=("ORIGINAL", "SECONDARY", "AXIAL")),
        image(0, 25, image_type=("ORIGINAL", "PRIMARY", "MPR")),
        image(0, 26, sop_class_uid="1.2.840.10008.5.1.4.1.1.88.33"),
        image(0, 27, readable=False),
    ]

    stack = arrange(headers)

    assert len(stack.slices) == 8
    assert [(header.instance_number, reason) for header, reason in stack.left_out] == [
        (20, "localizer"),
        (21, "screen capture or dose sheet"),
        (22, "derived image (reformat, projection or map)"),
        (23, "colour image"),
        (24, "derived image (reformat, projection or map)"),
        (25, "derived image (reformat, projection or map)"),
        (26, "not a CT or MR image object"),
        (27, "not readable as DICOM"),
    ]


def test_lossy_compression_alone_does_not_make_an_axial_slice_derived() -> None:
    """The Standard turns ORIGINAL into DERIVED for a lossily compressed slice; it is still that slice."""
    kind = ("DERIVED", "PRIMARY", "AXIAL")

    compressed = arrange([replace(h, image_type=kind, compressed_with_loss=True) for h in stack_of(8)])
    with pytest.raises(Refusal) as refused:
        arrange([replace(h, image_type=kind) for h in stack_of(8)])

    assert len(compressed.slices) == 8
    assert refused.value.reason == "derived image (reformat, projection or map)"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"orientation": CORONAL}, RefusalCode.NOT_A_STACK),
        ({"rows": 32}, RefusalCode.NOT_A_STACK),
        ({"frame_of_reference_uid": "1.9"}, RefusalCode.NOT_A_STACK),
        ({"position": None}, RefusalCode.NOT_A_STACK),
        ({"number_of_frames": 4}, RefusalCode.NOT_A_STACK),
        ({"rescale_slope": None}, RefusalCode.NO_HOUNSFIELD_UNITS),
        ({"rescale_slope": 0.0}, RefusalCode.NO_HOUNSFIELD_UNITS),
        ({"rescale_type": "Z_EFF"}, RefusalCode.NO_HOUNSFIELD_UNITS),
    ],
)
def test_few_strays_are_left_out_and_many_refuse_the_series(changes: dict[str, object], code: RefusalCode) -> None:
    """One odd image in twenty is left out; three in twenty make the series no stack."""
    headers = stack_of(20)

    one = arrange([*headers[1:], replace(headers[0], **changes)])  # type: ignore[arg-type]
    with pytest.raises(Refusal) as refused:
        arrange([*headers[3:], *(replace(h, **changes) for h in headers[:3])])  # type: ignore[arg-type]

    assert len(one.slices) == 19
    assert len(one.left_out) == 1
    assert refused.value.code == code


def test_mr_needs_no_rescale() -> None:
    """Stored values of MR have no unit, so a missing rescale refuses nothing."""
    headers = [
        replace(h, modality="MR", sop_class_uid="1.2.840.10008.5.1.4.1.1.4", rescale_slope=None) for h in stack_of(8)
    ]

    assert len(arrange(headers).slices) == 8


def test_images_at_one_position_are_alternatives() -> None:
    """A position sent twice is one slice; the lower instance number is used, the other stands behind it."""
    headers = [*stack_of(8), image(10.0, 30), image(10.001, 31)]

    stack = arrange(headers)

    assert len(stack.slices) == 8
    assert [h.instance_number for h in stack.slices[5].headers] == [3, 30, 31]


@pytest.mark.parametrize("attribute", ["temporal_position", "echo_time_ms", "b_value", "acquisition_number"])
def test_one_volume_of_several_is_taken(attribute: str) -> None:
    """Of phases, echoes, b-values or acquisitions over the same range the first is read, never a mixture."""
    volumes = [
        [replace(h, instance_number=100 * v + n, **{attribute: v + 1}) for n, h in enumerate(stack_of(10))]  # type: ignore[arg-type]
        for v in range(3)
    ]

    stack = arrange([h for volume in reversed(volumes) for h in volume])

    assert {getattr(entry.headers[0], attribute) for entry in stack.slices} == {1}
    assert len(stack.slices) == 10
    assert len(stack.other_volumes) == 20


def test_the_longer_of_two_phases_is_taken() -> None:
    """A later phase that covers more is taken whole; slices between its positions are not mixed in."""
    short = [image(101.3 + 5 * n, n, acquisition_number=1) for n in range(20)]
    long = [image(5.0 * n, 100 + n, acquisition_number=2) for n in range(40)]

    stack = arrange(short + long)

    assert {entry.headers[0].acquisition_number for entry in stack.slices} == {2}
    assert len(stack.slices) == 40
    assert len(stack.other_volumes) == 20


def test_step_and_shoot_acquisitions_are_one_stack() -> None:
    """Sequential CT counts an acquisition per table position, also where its spacing changes."""
    fine = [image(3.0 * n, n, acquisition_number=n) for n in range(10)]
    coarse = [image(27.0 + 8.0 * n, 10 + n, acquisition_number=10 + n) for n in range(1, 10)]

    stack = arrange(fine + coarse)

    assert len(stack.slices) == 19
    assert stack.other_volumes == ()


def test_a_second_acquisition_that_continues_the_first_is_kept() -> None:
    """Two table ranges that overlap in one slice are one stack with one repeated position."""
    first = [image(5.0 * n, n, acquisition_number=1) for n in range(30)]
    second = [image(5.0 * n, 50 + n, acquisition_number=2) for n in range(29, 40)]

    stack = arrange(first + second)

    assert len(stack.slices) == 40
    assert stack.other_volumes == ()


def test_a_short_acquisition_beyond_the_end_is_kept_although_positions_repeat() -> None:
    """The last slices of the table range are not lost because another slice came twice."""
    first = [image(5.0 * n, n, acquisition_number=1) for n in range(40)]
    again = image(25.0, 90, acquisition_number=1)
    last = [image(5.0 * n, n, acquisition_number=2) for n in range(40, 43)]

    stack = arrange([*first, again, *last])

    assert len(stack.slices) == 43
    assert stack.other_volumes == ()


def test_interleaved_packages_are_one_stack() -> None:
    """MR packages of odd and even slices have numbers of their own and belong together."""
    headers = [replace(h, acquisition_number=n % 2) for n, h in enumerate(stack_of(20))]

    assert len(arrange(headers).slices) == 20


def test_missing_slice_is_a_gap() -> None:
    """One slice taken out of a regular stack is found where it was."""
    headers = stack_of(20)
    del headers[15]  # z 75; the stack starts at the head, z 95

    assert gaps(arrange(headers).positions_mm) == (3,)


def test_regular_stack_has_no_gap_although_positions_are_rounded() -> None:
    """Positions written with few decimals are no gaps."""
    headers = [image(round(0.625 * n, 1), n) for n in range(100)]

    assert gaps(arrange(headers).positions_mm) == ()


@pytest.mark.parametrize(
    ("count", "step", "code"), [(7, 5.0, RefusalCode.TOO_FEW_SLICES), (9, 31.0, RefusalCode.MISSING_SLICES)]
)
def test_incomplete_stack_is_refused(count: int, step: float, code: RefusalCode) -> None:
    """Too few slices, or slices further apart than series.max_gap_mm, with the setting named."""
    with pytest.raises(Refusal, match=r"series\.(min_slices|max_gap_mm)") as refused:
        require_complete(arrange(stack_of(count, step)).positions_mm, SeriesSettings())

    assert refused.value.code == code


def test_tilt_is_measured_from_the_geometry() -> None:
    """Slices whose positions follow the table while the images lean are tilted by that angle."""
    angle = np.radians(12.0)
    leaning = (1.0, 0.0, 0.0, 0.0, float(np.cos(angle)), float(np.sin(angle)))

    assert arrange([replace(h, orientation=leaning) for h in stack_of(10)]).tilt_deg == pytest.approx(12.0)
    assert arrange(stack_of(10)).tilt_deg == pytest.approx(0.0)


def test_refusal_survives_pickling() -> None:
    """Code and reason arrive whole in another process."""
    sent = Refusal(RefusalCode.TOO_LARGE, "too large")
    got = pickle.loads(pickle.dumps(sent))

    assert (got.code, got.reason, str(got)) == (RefusalCode.TOO_LARGE, "too large", "too large")
