"""pydicom's value validation is one setting for the whole process; in here it is changed by one thread at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from pydicom import config

_lock = RLock()


@contextmanager
def strict_writing() -> Iterator[None]:
    """Raise where a text does not fit its character set; otherwise pydicom writes `?` in its place."""
    with _lock:
        before = config.settings.writing_validation_mode
        config.settings.writing_validation_mode = config.RAISE
        try:
            yield
        finally:
            config.settings.writing_validation_mode = before


@contextmanager
def values_as_they_are() -> Iterator[None]:
    """Take values of other makers without pydicom's checks: its warnings quote them, and our own rules hold."""
    with _lock, config.disable_value_validation():
        yield
