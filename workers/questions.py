"""Closed questions asked after the report, whose answers become coded findings. Pure.

A model is never asked to word a code: it chooses among the answers given here, and the choice is made by the
probability of their tokens (`Host.choose`), not by reading its text. The demonstration model is trained on these
very words; for other weights they are plain English.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from service.shared.messages import Aspect, FindingName

NODULE_DIAMETERS_MM = range(4, 31)

_YES_NO = ("yes", "no")
_LUNGS = ("right", "left")
_ZONES = ("upper", "mid", "lower")
_NAMES: dict[FindingName, str] = {
    FindingName.NODULE: "lung nodule",
    FindingName.EFFUSION: "pleural effusion",
    FindingName.CONSOLIDATION: "consolidation",
    FindingName.PNEUMOTHORAX: "pneumothorax",
    FindingName.CARDIOMEGALY: "cardiomegaly",
    FindingName.CALCIFICATION: "aortic calcification",
}
_SIDES: dict[FindingName, tuple[str, ...]] = {
    FindingName.NODULE: _LUNGS,
    FindingName.EFFUSION: (*_LUNGS, "both"),
    FindingName.CONSOLIDATION: _LUNGS,
    FindingName.PNEUMOTHORAX: _LUNGS,
}
_ZONED = (FindingName.NODULE, FindingName.CONSOLIDATION)
_LOCATED = (FindingName.NODULE, FindingName.CONSOLIDATION)


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its possible answers, in the order of the probabilities that come back."""

    finding: FindingName | None  # None: about the study as a whole
    aspect: Aspect
    text: str
    answers: tuple[str, ...]


_CHEST_CT = Question(None, Aspect.CHEST_CT, "Is this a chest CT? Answer yes or no.", _YES_NO)


def questions_about(findings: Sequence[FindingName], slices_shown: Sequence[int]) -> tuple[Question, ...]:
    """Every question about these findings; each stands alone, whatever the answer to another.

    The first asks whether the study is a chest CT at all: where it is not, no answer to the others is reported.

    slices_shown: numbers of the inputs that the model was shown, as the prompt names them (from 1).
    """
    if not findings:
        return ()
    asked = (question for finding in findings for question in _about(finding, slices_shown))
    return (_CHEST_CT, *asked)


def _about(finding: FindingName, slices_shown: Sequence[int]) -> Iterator[Question]:
    name = _NAMES[finding]
    yield Question(finding, Aspect.PRESENCE, f"Is there {name}? Answer yes or no.", _YES_NO)
    if finding in _SIDES:
        sides = _SIDES[finding]
        choice = ", ".join(sides[:-1]) + f" or {sides[-1]}"
        yield Question(finding, Aspect.SIDE, f"Which side is the {name}? Answer {choice}.", sides)
    if finding in _ZONED:
        yield Question(finding, Aspect.ZONE, f"Which zone is the {name}? Answer upper, mid or lower.", _ZONES)
    if finding is FindingName.NODULE:
        diameters = tuple(str(mm) for mm in NODULE_DIAMETERS_MM)
        yield Question(finding, Aspect.DIAMETER_MM, f"Diameter of the largest {name} in mm?", diameters)
    if finding in _LOCATED and slices_shown:
        slices = tuple(str(number) for number in slices_shown)
        yield Question(finding, Aspect.SLICE, f"Which SLICE shows the {name} best? Answer its number.", slices)
