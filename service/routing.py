"""Which routes take a study. Pure: attribute values in, routes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from pydicom.datadict import tag_for_keyword

from service.shared.settings import ConfigurationError, RouteSettings

SeriesAttributes = Mapping[str, Sequence[str]]  # DICOM keyword -> its values in one series


def check_routes(routes: Sequence[RouteSettings]) -> None:
    """Raise ConfigurationError for a `match` key that is no DICOM keyword."""
    faults = [
        f"route {route.name!r}: match key {keyword!r} is no DICOM keyword (as in PS3.6, for instance BodyPartExamined)"
        for route in routes
        for keyword in route.match
        if tag_for_keyword(keyword) is None
    ]
    if faults:
        raise ConfigurationError("\n".join(faults))


def keywords(routes: Sequence[RouteSettings]) -> frozenset[str]:
    """The attributes that must be read from a study before `taking` can decide."""
    return frozenset(keyword for route in routes for keyword in route.match)


def taking(routes: Sequence[RouteSettings], series: Sequence[SeriesAttributes]) -> tuple[RouteSettings, ...]:
    """The routes that take a study with these image series, in configured order.

    A route takes a study when one series of it has, for every key of `match`, a value that fits the pattern
    (`*` and `?` as in a shell, upper and lower case alike). A route without `match` takes every study.
    """
    return tuple(route for route in routes if any(_fits(route, attributes) for attributes in series))


def _fits(route: RouteSettings, attributes: SeriesAttributes) -> bool:
    return all(
        any(fnmatchcase(value.upper(), pattern.upper()) for value in attributes.get(keyword, ()))
        for keyword, pattern in route.match.items()
    )
