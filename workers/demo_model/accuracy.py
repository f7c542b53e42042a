"""How often reports say what is there: counts, rates and their intervals per finding. No model in here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median

from workers.demo_model.labels import Labels

SMALLEST_CLAIMED_MM = 8  # nodules below are counted apart
NODULE_SIZES_MM = ((4, 6), (6, 8), (8, 12), (12, 20), (20, 31))


@dataclass(frozen=True, slots=True)
class Rate:
    """A share with its 95 % Wilson interval."""

    hits: int
    of: int

    @property
    def value(self) -> float:
        return self.hits / self.of if self.of else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209."""
        if not self.of:
            return float("nan"), float("nan")
        z, n, p = 1.959964, self.of, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        if not self.of:
            return "none (0/0)"
        return f"{self.value:.3f} ({low:.3f}-{high:.3f}, {self.hits}/{self.of})"


@dataclass(frozen=True, slots=True)
class Detection:
    """One finding over many studies."""

    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def sensitivity(self) -> Rate:
        return Rate(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def precision(self) -> Rate:
        return Rate(self.true_positives, self.true_positives + self.false_positives)

    @property
    def f1(self) -> float:
        all_named = 2 * self.true_positives + self.false_positives + self.false_negatives
        return 2 * self.true_positives / all_named if all_named else float("nan")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Everything that is published about a set of reports. Detections count studies, not lesions."""

    studies: int
    detections: dict[str, Detection]
    agreements: dict[str, Rate]  # of the right positives: how many have this attribute right
    sensitivity_by_size: dict[str, Rate]
    diameter_errors_mm: tuple[int, ...]

    @property
    def median_diameter_error_mm(self) -> float:
        return float(median(self.diameter_errors_mm)) if self.diameter_errors_mm else float("nan")


Pair = tuple[Labels, Labels]  # truth, said


def accuracy_of(pairs: Sequence[Pair]) -> Accuracy:
    """Compare truths with what was said. "unsupported" is a finding of its own; the others count chest CTs only.

    A study whose only nodules are smaller than SMALLEST_CLAIMED_MM counts neither way for "nodule": a reader who
    names it is right, one who misses it is within the claim.
    """
    chests = [(truth, said) for truth, said in pairs if truth.supported]
    claimed = [(truth, said) for truth, said in chests if not truth.nodules or _largest(truth) >= SMALLEST_CLAIMED_MM]
    detections = {
        f"nodule >= {SMALLEST_CLAIMED_MM} mm": _detection(claimed, lambda labels: bool(labels.nodules)),
        "effusion": _detection(chests, lambda labels: labels.effusion is not None),
        "consolidation": _detection(chests, lambda labels: labels.consolidation is not None),
        "pneumothorax": _detection(chests, lambda labels: labels.pneumothorax is not None),
        "cardiomegaly": _detection(chests, lambda labels: labels.cardiomegaly),
        "aortic calcification": _detection(chests, lambda labels: labels.calcification),
        "not supported": _detection(pairs, lambda labels: not labels.supported),
    }
    nodules = [(t.nodules[0], s.nodules[0]) for t, s in claimed if t.nodules and s.nodules]
    effusions = [(t.effusion, s.effusion) for t, s in chests if t.effusion and s.effusion]
    opacities = [(t.consolidation, s.consolidation) for t, s in chests if t.consolidation and s.consolidation]
    gases = [(t.pneumothorax, s.pneumothorax) for t, s in chests if t.pneumothorax and s.pneumothorax]
    agreements = {
        "nodule side": _share(t.side is s.side for t, s in nodules),
        "nodule zone": _share(t.zone is s.zone for t, s in nodules),
        "nodule kind": _share(t.kind is s.kind for t, s in nodules),
        "effusion side": _share(t.sides == s.sides for t, s in effusions),
        "effusion extent": _share(t.extent is s.extent for t, s in effusions),
        "consolidation side": _share(t.side is s.side for t, s in opacities),
        "consolidation zone": _share(t.zone is s.zone for t, s in opacities),
        "pneumothorax side": _share(t.side is s.side for t, s in gases),
        "pneumothorax extent": _share(t.extent is s.extent for t, s in gases),
    }
    by_size = {
        f"{low}-{high} mm": _share(bool(s.nodules) for t, s in chests if t.nodules and low <= _largest(t) < high)
        for low, high in NODULE_SIZES_MM
    }
    errors = tuple(abs(t.diameter_mm - s.diameter_mm) for t, s in nodules)
    return Accuracy(len(pairs), detections, agreements, by_size, errors)


def table(accuracy: Accuracy) -> str:
    """Markdown: one line per finding, then attributes, then nodules by size."""
    lines = [
        f"{accuracy.studies} studies; 95 % intervals by Wilson.",
        "",
        "| finding | F1 | sensitivity | precision |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {found.f1:.3f} | {found.sensitivity} | {found.precision} |"
        for name, found in accuracy.detections.items()
    ]
    lines += ["", "| of the findings named rightly | share right |", "|---|---|"]
    lines += [f"| {name} | {rate} |" for name, rate in accuracy.agreements.items()]
    lines += [f"| median error of the nodule's diameter | {accuracy.median_diameter_error_mm:.1f} mm |"]
    lines += ["", "| nodule diameter | sensitivity |", "|---|---|"]
    lines += [f"| {name} | {rate} |" for name, rate in accuracy.sensitivity_by_size.items()]
    return "\n".join(lines) + "\n"


def _largest(labels: Labels) -> int:
    return max(nodule.diameter_mm for nodule in labels.nodules)


def _detection(pairs: Sequence[Pair], present: Callable[[Labels], bool]) -> Detection:
    outcomes = [(present(truth), present(said)) for truth, said in pairs]
    return Detection(outcomes.count((True, True)), outcomes.count((False, True)), outcomes.count((True, False)))


def _share(outcomes: Iterable[bool]) -> Rate:
    listed = list(outcomes)
    return Rate(sum(listed), len(listed))
