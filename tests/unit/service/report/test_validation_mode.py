"""pydicom's process-wide validation is left as it was found, whatever threads do."""

from __future__ import annotations

from threading import Barrier, Thread

import pytest
from pydicom import config

from service.report.validation_mode import strict_writing, values_as_they_are


@pytest.mark.parametrize("mode", [strict_writing, values_as_they_are])
def test_the_mode_is_restored_after_a_fault(mode: object) -> None:
    """Also when the block raises."""
    before = (config.settings.reading_validation_mode, config.settings.writing_validation_mode)

    with pytest.raises(KeyError), mode():  # type: ignore[operator]
        raise KeyError

    assert (config.settings.reading_validation_mode, config.settings.writing_validation_mode) == before


def test_two_threads_never_restore_each_others_mode() -> None:
    """Each sees its own mode throughout, and the first one comes back at the end."""
    before = config.settings.writing_validation_mode
    start = Barrier(2)
    seen: list[bool] = []

    def work(mode: object, expected: int) -> None:
        start.wait()
        for _ in range(500):
            with mode():  # type: ignore[operator]
                seen.append(config.settings.writing_validation_mode == expected)

    threads = [
        Thread(target=work, args=(strict_writing, config.RAISE)),
        Thread(target=work, args=(values_as_they_are, config.IGNORE)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(seen)
    assert config.settings.writing_validation_mode == before
