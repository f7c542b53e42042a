"""How slices are named in a prompt, and what is said about those that were dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class DroppedSlices(StrEnum):
    """What the prompt says of a slice that is not shown."""

    OMIT = "omit"  # nothing; the numbers of the others show the gap
    NAME = "name"  # its name alone: "SLICE 3:"
    REFER = "refer"  # runs of them, with the slice that stands for them: "SLICES 3-7 as SLICE 2"


@dataclass(frozen=True, slots=True)
class Image:
    """The place of one kept input in the prompt."""

    index: int


def slices_in_turn(kept: Sequence[bool], anchor: Sequence[int], dropped: DroppedSlices) -> Iterator[str | Image]:
    """Name each slice (from 1, in stack order) and show it, as MedGemma was trained: "SLICE 1:", image, ...

    kept, anchor: of the slice stage, one entry per input.
    """
    index = 0
    while index < len(kept):
        if kept[index]:
            yield f"SLICE {index + 1}:"
            yield Image(index)
            index += 1
            continue
        last = index
        while last + 1 < len(kept) and not kept[last + 1] and anchor[last + 1] == anchor[index]:
            last += 1
        yield from _of_dropped(index, last, anchor[index], dropped)
        index = last + 1


def _of_dropped(first: int, last: int, anchor: int, dropped: DroppedSlices) -> Iterator[str]:
    if dropped is DroppedSlices.NAME:
        yield from (f"SLICE {index + 1}:" for index in range(first, last + 1))
    elif dropped is DroppedSlices.REFER:
        name = f"SLICE {first + 1}" if first == last else f"SLICES {first + 1}-{last + 1}"
        yield f"{name} as SLICE {anchor + 1}"


def joined(parts: Sequence[str | Image]) -> list[str | Image]:
    """Make one text of texts that follow each other, a line each: chat templates trim each text they get."""
    result: list[str | Image] = []
    for part in parts:
        if result and isinstance(part, str) and isinstance(last := result[-1], str):
            result[-1] = f"{last}\n{part}"
        else:
            result.append(part)
    return result
