"""SIGTERM and SIGINT: what is to stop hears of them, whatever they interrupt."""

from __future__ import annotations

import os
import signal

import pytest

from service import __main__ as command_line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_that_interrupts_the_wait_is_heard(number: signal.Signals) -> None:
    """It comes while its own thread holds the event's lock, as it does on the way into and out of every wait."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = command_line._stop_on_signal()
        with stop._cond:  # type: ignore[attr-defined]
            os.kill(os.getpid(), number)

        assert stop.wait(20)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
