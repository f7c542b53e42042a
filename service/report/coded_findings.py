"""Answers to the closed questions -> coded findings, and the same in words. Knows nothing of DICOM encodings.

No code comes from the model's text. Each rests on an answer that the model chose among given ones, with the
probability that it gave to it; where it held that the study is no chest CT, nothing is coded.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.shared.messages import AnalysisOutput, Aspect, ClosedAnswer, FindingName

NAMES: dict[FindingName, str] = {
    FindingName.NODULE: "lung nodule",
    FindingName.EFFUSION: "pleural effusion",
    FindingName.CONSOLIDATION: "lung consolidation",
    FindingName.PNEUMOTHORAX: "pneumothorax",
    FindingName.CARDIOMEGALY: "cardiomegaly",
    FindingName.CALCIFICATION: "aortic calcification",
}


@dataclass(frozen=True, slots=True)
class CodedFinding:
    """One finding of the closed vocabulary. Aspects of an absent finding are None, whatever was answered."""

    name: FindingName
    presence: ClosedAnswer
    side: ClosedAnswer | None = None
    zone: ClosedAnswer | None = None
    diameter_mm: ClosedAnswer | None = None
    slice_number: ClosedAnswer | None = None

    @property
    def is_present(self) -> bool:
        return self.presence.chosen == "yes"


def coded_findings(output: AnalysisOutput) -> tuple[CodedFinding, ...]:
    """The findings in the order in which they were asked for; none where the study was held to be no chest CT."""
    if _held_unsuitable(output) is not None:
        return ()
    answers = {(answer.finding, answer.aspect): answer for answer in output.answers}
    found = []
    for (name, aspect), presence in answers.items():
        if name is None or aspect is not Aspect.PRESENCE:
            continue
        finding = CodedFinding(name, presence)
        if finding.is_present:
            of_finding = (Aspect.SIDE, Aspect.ZONE, Aspect.DIAMETER_MM, Aspect.SLICE)
            finding = CodedFinding(name, presence, *(answers.get((name, one)) for one in of_finding))
        found.append(finding)
    return tuple(found)


def sentences(output: AnalysisOutput) -> list[str]:
    """The coded findings for people, one line each, behind what the percentages mean; empty where nothing was asked."""
    if not output.answers:
        return []
    unsuitable = _held_unsuitable(output)
    if unsuitable is not None:
        return [f"No finding is coded: the model holds that this is no chest CT ({_percent(unsuitable)})."]
    opening = (
        "Coded findings, each chosen by the model among given answers. The percentage is the probability that the "
        "model gave to its choice; it is no measured accuracy."
    )
    return [opening, *(_sentence(finding) for finding in coded_findings(output))]


def _held_unsuitable(output: AnalysisOutput) -> ClosedAnswer | None:
    """The answer that the study is no chest CT, where the model chose it."""
    asked = (answer for answer in output.answers if answer.aspect is Aspect.CHEST_CT)
    return next((answer for answer in asked if answer.chosen == "no"), None)


def _sentence(finding: CodedFinding) -> str:
    state = "present" if finding.is_present else "absent"
    parts = [f"{NAMES[finding.name].capitalize()}: {state} ({_percent(finding.presence)})"]
    if finding.side is not None:
        parts.append(f"{finding.side.chosen} {'sides' if finding.side.chosen == 'both' else 'side'}")
        parts[-1] += f" ({_percent(finding.side)})"
    if finding.zone is not None:
        parts.append(f"{finding.zone.chosen} zone ({_percent(finding.zone)})")
    if finding.diameter_mm is not None:
        parts.append(f"diameter {finding.diameter_mm.chosen} mm ({_percent(finding.diameter_mm)})")
    if finding.slice_number is not None:
        parts.append(f"best on model input {finding.slice_number.chosen} ({_percent(finding.slice_number)})")
    return ", ".join(parts) + "."


def _percent(answer: ClosedAnswer) -> str:
    return f"{answer.probability * 100:.0f} %"
