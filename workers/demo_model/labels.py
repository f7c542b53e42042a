"""The truth about one phantom in a report's words: what a reader should say, no more than can be seen."""

from __future__ import annotations

from dataclasses import dataclass

from workers.demo_model.anatomy import Side, Zone
from workers.demo_model.findings import Extent, Findings, NoduleKind


@dataclass(frozen=True, slots=True)
class NoduleLabel:
    side: Side
    zone: Zone
    kind: NoduleKind
    diameter_mm: int


@dataclass(frozen=True, slots=True)
class EffusionLabel:
    sides: tuple[Side, ...]  # right before left
    extent: Extent


@dataclass(frozen=True, slots=True)
class ConsolidationLabel:
    side: Side
    zone: Zone


@dataclass(frozen=True, slots=True)
class PneumothoraxLabel:
    side: Side
    extent: Extent


@dataclass(frozen=True, slots=True)
class Labels:
    """All that a report says. `supported` is False for anything that is no chest CT; the rest is then empty."""

    supported: bool = True
    nodules: tuple[NoduleLabel, ...] = ()
    effusion: EffusionLabel | None = None
    consolidation: ConsolidationLabel | None = None
    pneumothorax: PneumothoraxLabel | None = None
    cardiomegaly: bool = False
    calcification: bool = False

    @property
    def normal(self) -> bool:
        return self == Labels()


def labels_of(findings: Findings) -> Labels:
    """Labels of a chest with these findings; nodules largest first, diameters in whole mm."""
    nodules = sorted(findings.nodules, key=lambda nodule: -nodule.diameter_mm)
    effusions = findings.effusions
    gas = findings.pneumothorax
    return Labels(
        nodules=tuple(NoduleLabel(n.side, n.zone, n.kind, round(n.diameter_mm)) for n in nodules),
        effusion=EffusionLabel(tuple(s for s in Side if s in {e.side for e in effusions}), effusions[0].extent)
        if effusions
        else None,
        consolidation=next((ConsolidationLabel(c.side, c.zone) for c in findings.consolidations), None),
        pneumothorax=PneumothoraxLabel(gas.side, gas.extent) if gas else None,
        cardiomegaly=findings.cardiomegaly,
        calcification=bool(findings.calcifications),
    )
