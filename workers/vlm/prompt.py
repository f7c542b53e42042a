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


class SliceNames(StrEnum):
    """Where the name of a slice stands, as the weights were trained."""

    AFTER = "after"  # image, "SLICE 1", ...: MedGemma 1.5, by its CT notebook and its server
    BEFORE = "before"  # "SLICE 1:", image, ...: the demonstration weights, as the published code of MedPruner writes it


@dataclass(frozen=True, slots=True)
class Image:
    """The place of one kept input in the prompt."""

    index: int


def slices_in_turn(
    kept: Sequence[bool], anchor: Sequence[int], dropped: DroppedSlices, names: SliceNames
) -> Iterator[str | Image]:
    """Show each slice and name it (from 1, in stack order).

    kept, anchor: of the slice stage, one entry per input.
    """
    index = 0
    while index < len(kept):
        if kept[index]:
            shown = (_name(index, names), Image(index))
            yield from shown if names is SliceNames.BEFORE else reversed(shown)
            index += 1
            continue
        last = index
        while last + 1 < len(kept) and not kept[last + 1] and anchor[last + 1] == anchor[index]:
            last += 1
        yield from _of_dropped(index, last, anchor[index], dropped, names)
        index = last + 1


def _name(index: int, names: SliceNames) -> str:
    return f"SLICE {index + 1}:" if names is SliceNames.BEFORE else f"SLICE {index + 1}"


def _of_dropped(first: int, last: int, anchor: int, dropped: DroppedSlices, names: SliceNames) -> Iterator[str]:
    if dropped is DroppedSlices.NAME:
        yield from (_name(index, names) for index in range(first, last + 1))
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
