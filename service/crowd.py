"""How many associations are open, and from where, over all processes of a receiver. Decides nothing."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap

ADDRESS_BYTES = 64  # an IPv6 address with a zone has at most 62 characters


@dataclass(frozen=True, slots=True)
class Counted:
    """What is open at this moment."""

    associations: int
    of_this_address: int


class Crowd:
    """A table of the addresses that have an association open, one entry each, shared with every copy of this process.

    A process that is killed leaves its entries, and perhaps the lock, behind: the others must then end as well.
    """

    def __init__(self, places: int) -> None:
        self._lock = multiprocessing.get_context("fork").Lock()
        self._table = (ctypes.c_char * ADDRESS_BYTES * places).from_buffer(mmap(-1, ADDRESS_BYTES * places))

    @contextmanager
    def counted(self, address: str) -> Iterator[Counted]:
        """How full it is, and stays while the context lasts: `enter` within it."""
        wanted = _entry(address)
        with self._lock:
            entries = [entry.value for entry in self._table]
            yield Counted(sum(map(bool, entries)), entries.count(wanted))

    def enter(self, address: str) -> None:
        """Take a place for an association from here; IndexError when there is none."""
        place = next((number for number, entry in enumerate(self._table) if not entry.value), None)
        if place is None:
            raise IndexError("no place is left")
        self._table[place].value = _entry(address)

    def leave(self, address: str) -> None:
        """Give one place of this address back."""
        wanted = _entry(address)
        with self._lock:
            place = next(number for number, entry in enumerate(self._table) if entry.value == wanted)
            self._table[place].value = b""


def _entry(address: str) -> bytes:
    return address.encode("ascii", "replace")[: ADDRESS_BYTES - 1]
