"""When to try once more what failed."""

from __future__ import annotations

from datetime import datetime, timedelta

MOST_DOUBLINGS = 16  # beyond any wait that is configured, and far from what a float holds


def try_again_at(now: datetime, doublings: int, *, first_s: float, longest_s: float, jitter: float = 0.0) -> datetime:
    """After `first_s`, doubled so often, at most `longest_s`; less up to a quarter (`jitter` 0 to 1), so that those
    that failed together do not come back together."""
    delay_s = min(longest_s, first_s * 2.0 ** min(doublings, MOST_DOUBLINGS))
    return now + timedelta(seconds=delay_s * (1 - 0.25 * jitter))
