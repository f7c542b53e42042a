"""Labels to report text in several phrasings, and the text of a report back to labels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from workers.demo_model.anatomy import Side, Zone
from workers.demo_model.findings import Extent, NoduleKind
from workers.demo_model.labels import (
    ConsolidationLabel,
    EffusionLabel,
    Labels,
    NoduleLabel,
    PneumothoraxLabel,
)

PHRASINGS = 3
NOT_SUPPORTED = "Body region not supported"


@dataclass(frozen=True, slots=True)
class Report:
    """The two sections of a report."""

    findings: str
    impression: str

    def __str__(self) -> str:
        return f"Findings: {self.findings}\nImpression: {self.impression}"


def write(labels: Labels, phrasing: int = 0) -> Report:
    """A report that says what the labels say. phrasing: 0 .. PHRASINGS - 1."""
    if not labels.supported:
        return Report(_UNSUPPORTED[phrasing], f"{NOT_SUPPORTED}. No reading is given.")
    positives = [sentence for sentence in _positives(labels, phrasing) if sentence]
    findings = [said or absent for said, absent in zip(_positives(labels, phrasing), _ABSENT[phrasing], strict=True)]
    return Report(" ".join(findings), " ".join(positives) or _NORMAL[phrasing])


def read(text: str) -> Labels:
    """The labels that a text states, whichever phrasing; what it does not mention counts as absent."""
    words = " ".join(text.split())
    words = words.split("Impression:")[0].lower()
    if NOT_SUPPORTED.lower() in text.lower():
        return Labels(supported=False)
    return Labels(
        nodules=tuple(_read_nodules(words)),
        effusion=_read_effusion(words),
        consolidation=_read_consolidation(words),
        pneumothorax=_read_pneumothorax(words),
        cardiomegaly="is enlarged" in words or re.search(r"(?<!no )cardiomegaly", words) is not None,
        calcification=re.search(r"(?<!no )(?:aortic (?:wall )?calcifications?|calcified plaques)", words) is not None,
    )


_UNSUPPORTED = (
    "Body region not supported. This is not a chest CT of the kind this model was trained on.",
    "Body region not supported by this model, which was trained on chest CT alone.",
    "Body region not supported: the images show no chest CT.",
)
_NORMAL = ("No abnormality found.", "No acute abnormality.", "Normal chest CT.")
_ABSENT = (
    (
        "No lung nodule.",
        "No pleural effusion.",
        "No consolidation.",
        "No pneumothorax.",
        "Heart size is normal.",
        "No aortic calcification.",
    ),
    (
        "Lungs without nodules.",
        "Pleural spaces are free of fluid.",
        "No airspace opacity.",
        "No pneumothorax is seen.",
        "Normal heart size.",
        "Aorta without calcified wall.",
    ),
    (
        "No pulmonary nodule is identified.",
        "There is no pleural effusion.",
        "The lungs show no consolidation.",
        "There is no pneumothorax.",
        "No cardiomegaly.",
        "No aortic wall calcification.",
    ),
)


def _positives(labels: Labels, phrasing: int) -> tuple[str, str, str, str, str, str]:
    """One sentence (or none) per finding, in the order of _ABSENT."""
    return (
        " ".join(_nodule(nodule, phrasing) for nodule in labels.nodules),
        _effusion(labels.effusion, phrasing) if labels.effusion else "",
        _consolidation(labels.consolidation, phrasing) if labels.consolidation else "",
        _pneumothorax(labels.pneumothorax, phrasing) if labels.pneumothorax else "",
        ("Heart is enlarged.", "Cardiomegaly.", "The heart is enlarged.")[phrasing] if labels.cardiomegaly else "",
        ("Aortic calcification.", "Calcified plaques of the aorta.", "Aortic wall calcifications.")[phrasing]
        if labels.calcification
        else "",
    )


def _nodule(nodule: NoduleLabel, phrasing: int) -> str:
    kind, size, side, zone = nodule.kind.value, nodule.diameter_mm, nodule.side.value, nodule.zone.value
    return (
        f"{side} {zone} zone {kind} nodule of {size} mm.".capitalize(),
        f"{kind} nodule, {size} mm, in the {zone} zone of the {side} lung.".capitalize(),
        f"There is a {size} mm {kind} nodule in the {side} lung, {zone} zone.",
    )[phrasing]


def _effusion(effusion: EffusionLabel, phrasing: int) -> str:
    side = "bilateral" if len(effusion.sides) == 2 else effusion.sides[0].value
    extent = effusion.extent.value
    return (
        f"{side} pleural effusion, {extent}.".capitalize(),
        f"{extent} {side} pleural effusion.".capitalize(),
        f"There is a {extent} {side} pleural effusion.",
    )[phrasing]


def _consolidation(consolidation: ConsolidationLabel, phrasing: int) -> str:
    side, zone = consolidation.side.value, consolidation.zone.value
    return (
        f"{side} {zone} zone consolidation.".capitalize(),
        f"Consolidation in the {zone} zone of the {side} lung.",
        f"There is consolidation in the {side} lung, {zone} zone.",
    )[phrasing]


def _pneumothorax(gas: PneumothoraxLabel, phrasing: int) -> str:
    side, extent = gas.side.value, gas.extent.value
    return (
        f"{side} pneumothorax, {extent}.".capitalize(),
        f"{extent} {side} pneumothorax.".capitalize(),
        f"There is a {extent} {side} pneumothorax.",
    )[phrasing]


_SIDE = "(right|left)"
_ZONE = "(upper|mid|lower)"
_KIND = "(solid|ground glass)"
_EXTENT = "(small|moderate|large)"


def _read_nodules(words: str) -> list[NoduleLabel]:
    """Nodules in the order of the text; a pattern per phrasing with named groups."""
    patterns = (
        rf"(?P<side>{_SIDE}) (?P<zone>{_ZONE}) zone (?P<kind>{_KIND}) nodule of (?P<size>\d+) mm",
        rf"(?P<kind>{_KIND}) nodule, (?P<size>\d+) mm, in the (?P<zone>{_ZONE}) zone of the (?P<side>{_SIDE}) lung",
        rf"(?P<size>\d+) mm (?P<kind>{_KIND}) nodule in the (?P<side>{_SIDE}) lung, (?P<zone>{_ZONE}) zone",
    )
    found = [match for pattern in patterns for match in re.finditer(pattern, words)]
    return [
        NoduleLabel(Side(m["side"]), Zone(m["zone"]), NoduleKind(m["kind"]), int(m["size"]))
        for m in sorted(found, key=lambda match: match.start())
    ]


def _read_effusion(words: str) -> EffusionLabel | None:
    match = re.search(rf"(?P<side>right|left|bilateral) pleural effusion, (?P<extent>{_EXTENT})", words)
    match = match or re.search(rf"(?P<extent>{_EXTENT}) (?P<side>right|left|bilateral) pleural effusion", words)
    if match is None:
        return None
    sides = tuple(Side) if match["side"] == "bilateral" else (Side(match["side"]),)
    return EffusionLabel(sides, Extent(match["extent"]))


def _read_consolidation(words: str) -> ConsolidationLabel | None:
    patterns = (
        rf"(?P<side>{_SIDE}) (?P<zone>{_ZONE}) zone consolidation",
        rf"consolidation in the (?P<zone>{_ZONE}) zone of the (?P<side>{_SIDE}) lung",
        rf"consolidation in the (?P<side>{_SIDE}) lung, (?P<zone>{_ZONE}) zone",
    )
    for pattern in patterns:
        match = re.search(pattern, words)
        if match is not None:
            return ConsolidationLabel(Side(match["side"]), Zone(match["zone"]))
    return None


def _read_pneumothorax(words: str) -> PneumothoraxLabel | None:
    match = re.search(rf"(?P<side>{_SIDE}) pneumothorax, (?P<extent>{_EXTENT})", words)
    match = match or re.search(rf"(?P<extent>{_EXTENT}) (?P<side>{_SIDE}) pneumothorax", words)
    return PneumothoraxLabel(Side(match["side"]), Extent(match["extent"])) if match else None
