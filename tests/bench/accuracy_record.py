"""What a measurement of the demonstration weights leaves beside them: rates, limitations, and its part of the card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workers.demo_model.accuracy import SMALLEST_CLAIMED_MM, Accuracy, Rate
from workers.demo_model.folder import MARK

CARD = "README.md"
HEADING = "## Accuracy on held-out phantoms"  # of the card's part that is written here, up to the next heading
NODULE = f"nodule >= {SMALLEST_CLAIMED_MM} mm"


def record(folder: Path, accuracy: Accuracy, seeds: Sequence[int], tables: str, command: str) -> None:
    """accuracy: unpruned. tables: Markdown of the whole run. A folder without a card gets none."""
    mark, card = folder / MARK, folder / CARD
    known = json.loads(mark.read_text())
    found = {"measured": measured(accuracy, seeds), "limitations": limitations(accuracy)}
    mark.write_text(json.dumps(known | found, indent=2) + "\n")
    if card.exists():
        card.write_text(with_tables(card.read_text(), tables, command))


def measured(accuracy: Accuracy, seeds: Sequence[int]) -> dict[str, Any]:
    """What a report may quote of the weights: rates with their 95 % intervals, unpruned."""

    def rate(found: Rate) -> list[float] | None:
        return [round(value, 3) for value in (found.value, *found.interval)] if found.of else None

    return {
        "on": f"{accuracy.studies} computed phantoms of seeds {seeds[0]} to {seeds[-1]}, unpruned",
        "sensitivity": {name: rate(found.sensitivity) for name, found in accuracy.detections.items()},
        "precision": {name: rate(found.precision) for name, found in accuracy.detections.items()},
        "sensitivity_by_nodule_diameter": {name: rate(found) for name, found in accuracy.sensitivity_by_size.items()},
    }


def limitations(accuracy: Accuracy) -> list[str]:
    """Sentences for the reports of these weights."""
    found = accuracy.detections
    nodule, plaque = found[NODULE], found["aortic calcification"]
    sizes = ", ".join(
        f"{100 * rate.value:.0f} % at {name}" for name, rate in accuracy.sensitivity_by_size.items() if rate.of
    )
    others = [
        f"{_percent(found[name].sensitivity)} of {plural}"
        for name, plural in (
            ("effusion", "pleural effusions"),
            ("consolidation", "consolidations"),
            ("pneumothorax", "pneumothoraces"),
            ("cardiomegaly", "enlarged hearts"),
        )
    ]
    return [
        f"On {accuracy.studies} computed phantoms that took no part in training, unpruned, this model found "
        f"{_percent(nodule.sensitivity)} of nodules of {SMALLEST_CLAIMED_MM} mm and more ({sizes or 'none shown'}), "
        f"and {_named(nodule.precision)}.",
        f"It found {', '.join(others[:-1])} and {others[-1]}.",
        f"It found {_percent(plaque.sensitivity)} of aortic calcifications, and {_named(plaque.precision)}; it has "
        "never been measured on a patient.",
    ]


def with_tables(card: str, tables: str, command: str) -> str:
    """The card with its part on accuracy written anew."""
    before, found, after = card.partition(HEADING + "\n")
    if not found:
        raise SystemExit(f"the card has no heading {HEADING!r} to write under")
    _, next_heading, rest = after.partition("\n## ")
    part = f"{HEADING}\n\n`{command}`, rendered as slabs, through the product's own host.\n\n{tables.strip()}\n"
    return before + part + next_heading + rest


def _named(precision: Rate) -> str:
    return f"{_percent(precision)} of those that it named were there" if precision.of else "it named none"


def _percent(rate: Rate) -> str:
    if not rate.of:
        return "an unknown share"
    low, high = rate.interval
    return f"{100 * rate.value:.0f} % (95 % interval {100 * low:.0f}-{100 * high:.0f} %)"
