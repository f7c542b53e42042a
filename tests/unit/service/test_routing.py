"""Which routes take a study, by the attributes of its series."""

from __future__ import annotations

import pytest

from service.routing import SeriesAttributes, check_routes, keywords, taking
from service.shared.settings import ConfigurationError, RouteSettings

CHEST: SeriesAttributes = {
    "BodyPartExamined": ["CHEST"],
    "Modality": ["CT"],
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
}
HEAD: SeriesAttributes = {"BodyPartExamined": ["HEAD"], "Modality": ["MR"]}


def route(name: str = "one", **match: str) -> RouteSettings:
    return RouteSettings(name=name, match=match)


@pytest.mark.parametrize(
    ("match", "series", "taken"),
    [
        ({}, [CHEST], True),
        ({}, [], False),
        ({"BodyPartExamined": "CHEST"}, [CHEST], True),
        ({"BodyPartExamined": "chest"}, [CHEST], True),
        ({"BodyPartExamined": "CH*T"}, [CHEST], True),
        ({"BodyPartExamined": "?HEST"}, [CHEST], True),
        ({"BodyPartExamined": "CHES"}, [CHEST], False),
        ({"BodyPartExamined": "CHEST"}, [HEAD, CHEST], True),
        ({"BodyPartExamined": "HEAD", "Modality": "CT"}, [HEAD, CHEST], False),
        ({"BodyPartExamined": "CHEST", "Modality": "CT"}, [HEAD, CHEST], True),
        ({"ImageType": "AXIAL"}, [CHEST], True),
        ({"ImageType": "ORIGINAL*AXIAL"}, [CHEST], False),
        ({"Laterality": "*"}, [CHEST], False),
        ({"Laterality": "*"}, [{"Laterality": [""]}], True),
    ],
)
def test_route_takes_a_study_when_one_series_fits_every_key(
    match: dict[str, str], series: list[SeriesAttributes], taken: bool
) -> None:
    """Patterns as in a shell, in either case; all keys in one and the same series; any of several values."""
    assert bool(taking([route(**match)], series)) is taken


def test_every_fitting_route_takes_the_study_in_configured_order() -> None:
    """Routes do not exclude each other."""
    routes = [route("b", Modality="CT"), route("mr", Modality="MR"), route("a")]

    assert [one.name for one in taking(routes, [CHEST])] == ["b", "a"]


def test_attributes_that_must_be_read_are_those_of_all_routes() -> None:
    """Nothing else is read from the study."""
    assert keywords([route(Modality="CT"), route(BodyPartExamined="HEAD", Modality="MR"), route()]) == {
        "Modality",
        "BodyPartExamined",
    }


def test_key_that_is_no_dicom_keyword_is_refused() -> None:
    """It would match nothing for ever; the message names route and key."""
    with pytest.raises(ConfigurationError) as caught:
        check_routes([route("chest", BodyPart="CHEST", Modality="CT"), route("head", Bodypartexamined="HEAD")])

    assert str(caught.value).splitlines()[0].startswith("route 'chest': match key 'BodyPart' is no DICOM keyword")
    assert len(str(caught.value).splitlines()) == 2


def test_dicom_keywords_are_accepted() -> None:
    """As PS3.6 spells them."""
    check_routes([route(BodyPartExamined="CHEST", StudyDescription="*thorax*")])
