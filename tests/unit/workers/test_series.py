"""workers.series: which series of a study is read, and what is said of the others."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from service.shared.settings import SeriesSettings
from tests.image_headers import CORONAL, image, stack_of
from tests.phantom_series import PhantomSeries
from workers.errors import Refusal, RefusalCode
from workers.headers import InstanceHeader, read_headers
from workers.series import Choice, choose

REAL = Path(__file__).parents[2] / "data" / "real-ct"
SETTINGS = SeriesSettings()


def series(number: int, count: int = 20, step: float = 5.0, **changes: object) -> list[InstanceHeader]:
    return [
        replace(
            header,
            series_uid=f"1.2.3.{number}",
            series_number=number,
            path=Path(f"{number}-{header.instance_number}.dcm"),
            **changes,  # type: ignore[arg-type]
        )
        for header in stack_of(count, step)
    ]


def reason(choice: Choice, number: int) -> str:
    return next(c.reason for c in choice.candidates if c.series_uid == f"1.2.3.{number}")


@pytest.mark.parametrize(("folder", "count"), [("body-siemens", 20), ("head-philips", 28)])
def test_real_series_is_chosen(folder: str, count: int) -> None:
    """Each real study has one axial series, and it is read."""
    choice = choose(read_headers((REAL / folder).glob("*.dcm")), SETTINGS)

    assert choice.modality == "CT"
    assert [(c.chosen, c.instances) for c in choice.candidates] == [(True, count)]
    assert choice.reason.startswith(f"{count} original axial CT slices")


def test_lone_localizer_is_refused_with_the_reason(tmp_path: Path) -> None:
    """A study of one localizer is not read, and the reason names the series as a radiologist would."""
    paths = PhantomSeries(localizer=True, slices=2).write(tmp_path)

    with pytest.raises(Refusal) as refused:
        choose(read_headers(paths), SETTINGS)

    assert refused.value.code == RefusalCode.NO_SUITABLE_SERIES
    assert refused.value.reason == "no series can be read: series 1: localizer"


def test_every_series_that_does_not_fit_has_its_reason() -> None:
    """Beside the one that is read, each series says why it was not, in words of a radiologist."""
    capture = "1.2.840.10008.5.1.4.1.1.7"
    headers = [
        *series(1, 2, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"), orientation=CORONAL),
        *series(2),
        *series(3, image_type=("DERIVED", "SECONDARY", "AXIAL", "MPR")),
        *series(4, 1, sop_class_uid=capture, samples_per_pixel=3, orientation=None, position=None),
        *series(5, 1, modality="SR", sop_class_uid="1.2.840.10008.5.1.4.1.1.88.67"),
        *series(6, 5),
        *series(7, rescale_slope=None),
        *[
            replace(h, orientation=CORONAL, position=(0.0, -float((h.position or ())[2]), 0.0))
            for h in series(8, count=30)
        ],
        *series(9, count=20, step=45.0),
        *series(10, position=None),
        *series(11, 3, sop_class_uid="1.2.840.10008.5.1.4.1.1.66"),
    ]

    choice = choose(headers, SETTINGS)

    assert choice.series_uid == "1.2.3.2"
    assert reason(choice, 1) == "localizer"
    assert (
        reason(choice, 2)
        == choice.reason
        == ("20 original axial CT slices, 5.0 mm apart, over 95 mm; the only series that fits")
    )
    assert reason(choice, 3) == "derived image (reformat, projection or map)"
    assert reason(choice, 4) == "screen capture or dose sheet"
    assert reason(choice, 5) == "modality SR is not read (series.modality: CT, MR)"
    assert reason(choice, 6) == "5 slices at distinct positions, series.min_slices asks for 8"
    assert reason(choice, 7) == "no rescale to Hounsfield units in the header"
    assert reason(choice, 8) == "coronal, 90 degrees off the axial plane"
    assert reason(choice, 9) == "a gap of 45 mm in the stack, series.max_gap_mm allows 30"
    assert reason(choice, 10) == "no slice position or orientation in the header"
    assert reason(choice, 11) == "not a CT or MR image object"


def test_reasons_of_all_series_stand_in_the_refusal() -> None:
    """Where none fits, series with the same reason stand together."""
    headers = [*series(1, 2), *series(2, 2), *series(3, modality="US"), InstanceHeader(Path("text"), readable=False)]

    with pytest.raises(Refusal) as refused:
        choose(headers, SETTINGS)

    assert refused.value.reason == (
        "no series can be read: objects without a series: not readable as DICOM; "
        "series 1, series 2: 2 slices at distinct positions, series.min_slices asks for 8; "
        "series 3: modality US is not read (series.modality: CT, MR)"
    )


def test_study_without_objects_is_refused() -> None:
    """Nothing to read is a refusal like another."""
    with pytest.raises(Refusal, match="the study holds no objects"):
        choose([], SETTINGS)


@pytest.mark.parametrize(
    ("winner", "loser", "why"),
    [
        (series(9, 60), series(1, 30), "fits, but covers only 145 mm"),
        (series(9, 60), [h for h in series(1, 61) if h.instance_number != 30], "fits, but slices are missing in it"),
        (series(9, 60), series(1, 60, compressed_with_loss=True), "fits, but is compressed with loss"),
        (
            series(9, 60, kernel="Br40d"),
            series(1, 60, kernel="Bl57f"),
            "fits, but has a sharp kernel (bone or lung)",
        ),
        (series(9, 60, kernel="STANDARD"), series(1, 300, 1.0, kernel="LUNG"), "fits, but has a sharp kernel"),
        (series(9, 80, 3.75), series(1, 60), "fits, but has only 60 slices"),
        (
            series(9, 100, 3.0),
            series(1, 300, 1.0),
            "fits, but has 300 thinner slices, of which sampling would skip more",
        ),
        (series(1), series(9), "fits, but equals the chosen one in all that was compared"),
        (
            series(9, 20),
            series(1, 60, modality="MR", sop_class_uid="1.2.840.10008.5.1.4.1.1.4"),
            "fits, but is MR",
        ),
    ],
)
def test_preferences_among_series_that_fit(winner: list[InstanceHeader], loser: list[InstanceHeader], why: str) -> None:
    """The written order of preferences decides, and the loser says which one it lost by."""
    choice = choose(loser + winner, SETTINGS)

    assert choice.series_uid == winner[0].series_uid
    assert reason(choice, loser[0].series_number or 0).startswith(why)
    assert f"preferred to series {loser[0].series_number}" in choice.reason


@pytest.mark.parametrize("kernel", ["B30f", "I31f\\3", "FC08", "STANDARD", "SOFT", "B", "UB", "", "Hr38"])
def test_soft_kernels_are_not_called_sharp(kernel: str) -> None:
    """Soft and standard kernels of four vendors do not lose against a series without a kernel."""
    choice = choose([*series(1, kernel=kernel), *series(2)], SETTINGS)

    assert choice.series_uid == "1.2.3.1"


@pytest.mark.parametrize("kernel", ["B70f", "Br64", "FC51", "FC30", "LUNG", "BONEPLUS", "EDGE", "YA", "L"])
def test_sharp_kernels_lose(kernel: str) -> None:
    """Bone and lung kernels of four vendors lose against a series without a kernel."""
    choice = choose([*series(1, kernel=kernel), *series(2)], SETTINGS)

    assert choice.series_uid == "1.2.3.2"


@pytest.mark.parametrize("seed", range(5))
def test_choice_does_not_depend_on_the_order_of_arrival(seed: int) -> None:
    """The same study gives the same choice and the same words however its instances are shuffled."""
    headers = [*series(1, 60), *series(2, 60), *series(3, 100, 3.0), *series(4, 2), *series(5, kernel="LUNG")]
    expected = choose(headers, SETTINGS)
    random.Random(seed).shuffle(headers)

    assert choose(headers, SETTINGS) == expected


def test_orientation_any_reads_a_coronal_series(tmp_path: Path) -> None:
    """With series.orientation = "any" a coronal stack fits."""
    headers = [image(0, n, orientation=CORONAL, position=(0.0, 4.0 * n, 0.0)) for n in range(10)]

    choice = choose(headers, SeriesSettings(orientation="any"))

    assert choice.reason.startswith("10 original CT slices")


def test_tilted_head_is_axial() -> None:
    """A head scanned with 18 degrees of gantry tilt is still read as axial."""
    leaning = (1.0, 0.0, 0.0, 0.0, 0.9510565, 0.3090170)

    assert choose(series(1, orientation=leaning), SETTINGS).series_uid == "1.2.3.1"


def test_free_text_never_stands_in_a_reason() -> None:
    """A modality that is no code string is not repeated: it may hold a name."""
    with pytest.raises(Refusal) as refused:
        choose(series(1, modality="DOE^JOHN"), SETTINGS)

    assert "DOE" not in refused.value.reason
