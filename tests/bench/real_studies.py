"""Real studies with reference labels or reports, read by a model folder as a worker reads them.

A finding is what the model answers to the closed question about its presence, never what its text is taken to mean;
texts are compared as texts, by the longest common subsequence of words (ROUGE-L: C.-Y. Lin, ACL 2004).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from service.shared.messages import Aspect, FindingName
from service.shared.settings import ModelSettings, PruningSettings, ReportSettings, Settings
from workers.demo_model.accuracy import Detection
from workers.errors import Refusal
from workers.pipeline import Request, read


@dataclass(frozen=True, slots=True)
class Reference:
    """What is known of one study. findings: those somebody looked for; report: "" without one."""

    findings: dict[FindingName, bool]
    report: str


def references(path: Path) -> dict[str, Reference]:
    """Study folder -> reference; an unknown finding is an error that names it."""
    found = {}
    for study, known in json.loads(path.read_text(encoding="utf-8")).items():
        try:
            findings = {FindingName(name): bool(there) for name, there in known.get("findings", {}).items()}
        except ValueError as error:
            names = ", ".join(FindingName)
            raise SystemExit(f"{path}: {study}: {error}; a finding is one of {names}") from error
        found[study] = Reference(findings, str(known.get("report", "")))
    return found


def rouge_l(said: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1."""
    one, other = said.lower().split(), reference.lower().split()
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for index, against in enumerate(other, 1):
            before, row[index] = row[index], before + 1 if word == against else max(row[index], row[index - 1])
    return 2 * row[-1] / (len(one) + len(other)) if one or other else 1.0


def compare(
    model: Path | None,
    studies: Path,
    labels: Path,
    settings: Sequence[tuple[str, PruningSettings]],
    say: Callable[[str], Any],
) -> str:
    """Read every study under every setting; return the table in Markdown."""
    from workers.vlm import open_model

    known = references(labels)
    folders = {name: studies / name for name in known}
    if missing := [name for name, folder in folders.items() if not folder.is_dir()]:
        raise SystemExit(f"{labels} names {missing[0]}, which is no folder in {studies}")
    host = open_model(ModelSettings(), model)
    lines = ["| setting | finding | sensitivity | precision |", "|---|---|---|---|"]
    text_lines = ["| setting | studies read | tokens kept | ROUGE-L | seconds per study |", "|---|---|---|---|---|"]
    for name, pruning in settings:
        said: dict[FindingName, list[tuple[bool, bool]]] = {}
        scores, kept, total, seconds = [], 0, 0, []
        for number, (study, reference) in enumerate(known.items(), 1):
            paths = tuple(sorted(path for path in folders[study].rglob("*") if path.is_file()))
            asked = ModelSettings(coded_findings=tuple(reference.findings))
            request = Request(number, study, paths, ReportSettings().prompt, Settings(model=asked, pruning=pruning))
            try:
                output, _ = read(request, host)
            except Refusal as refusal:
                say(f"{name}: {study}: refused, {refusal}\n")
                continue
            chest = next((one.chosen == "yes" for one in output.answers if one.aspect is Aspect.CHEST_CT), True)
            for answer in output.answers:
                if answer.aspect is Aspect.PRESENCE and answer.finding is not None:
                    pair = reference.findings[answer.finding], chest and answer.chosen == "yes"
                    said.setdefault(answer.finding, []).append(pair)
            if reference.report:
                scores.append(rouge_l(output.raw_text, reference.report))
            kept, total = kept + output.counts.tokens_kept, total + output.counts.tokens_in
            seconds.append(sum(output.timings_s.values()))
            say(f"{name}: {number} of {len(known)} studies\n")
        for finding, pairs in said.items():
            found = Detection(pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False)))
            lines.append(f"| {name} | {finding} | {found.sensitivity} | {found.precision} |")
        score = f"{mean(scores):.3f}" if scores else "no reference"
        if seconds:
            text_lines.append(f"| {name} | {len(seconds)} | {kept / total:.1%} | {score} | {mean(seconds):.2f} |")
    return "\n".join([*text_lines, "", *lines]) + "\n"
