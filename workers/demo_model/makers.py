"""Processes that make studies while this one trains: one process cannot make as many as a GPU learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

Made = TypeVar("Made")
Make = Callable[[int, int], Iterator[Made]]  # from a maker's number and how many there are to what it makes


class Stream(IterableDataset[Made]):
    """What one maker makes, without end."""

    def __init__(self, make: Make[Made]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Made]:
        maker = get_worker_info()
        assert maker is not None  # only makers ask
        return self._make(maker.id, maker.num_workers)


def made(make: Make[Made], makers: int) -> Iterator[Made]:
    """What all makers make, in turn; without any it is made here when asked for.

    They are spawned, not forked: a process that has touched CUDA may not fork.
    """
    if makers == 0:
        return make(0, 1)
    loader = DataLoader(
        Stream(make),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=makers,
        prefetch_factor=2,
        multiprocessing_context="spawn",
    )
    return iter(loader)


def _as_it_is(one: Made) -> Made:
    return one
