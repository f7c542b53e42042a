"""Who has an association open, counted over several processes."""

from __future__ import annotations

import os

import pytest

from service.crowd import Crowd


def enter(crowd: Crowd, address: str) -> None:
    with crowd.counted(address):
        crowd.enter(address)


def counts(crowd: Crowd, address: str) -> tuple[int, int]:
    with crowd.counted(address) as counted:
        return counted.associations, counted.of_this_address


def test_associations_are_counted_in_all_and_by_address() -> None:
    """And no longer once they are closed."""
    crowd = Crowd(4)
    for address in ("192.0.2.1", "2001:db8::1", "192.0.2.1"):
        enter(crowd, address)

    assert counts(crowd, "192.0.2.1") == (3, 2)
    crowd.leave("192.0.2.1")
    assert counts(crowd, "192.0.2.1") == (2, 1)
    assert counts(crowd, "192.0.2.2") == (2, 0)


def test_place_that_was_left_is_taken_again() -> None:
    """There are as many as were asked for."""
    crowd = Crowd(1)
    enter(crowd, "192.0.2.1")
    with crowd.counted("192.0.2.2"), pytest.raises(IndexError):
        crowd.enter("192.0.2.2")

    crowd.leave("192.0.2.1")
    enter(crowd, "192.0.2.2")

    assert counts(crowd, "192.0.2.2") == (1, 1)


def test_copies_of_a_process_count_together() -> None:
    """What a copy has open, the others see."""
    crowd = Crowd(4)
    enter(crowd, "192.0.2.1")
    copy = os.fork()
    if not copy:
        enter(crowd, "192.0.2.1")
        os._exit(0 if counts(crowd, "192.0.2.1") == (2, 2) else 1)

    assert os.waitpid(copy, 0)[1] == 0
    assert counts(crowd, "192.0.2.1") == (2, 2)
