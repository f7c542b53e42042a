"""Model text -> sections. Pure: recognises headings, loops and refusals; invents nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from service.shared.messages import Flag

LONGEST_TEXT = 20_000  # characters; a report of this length is a fault of the model
REPEATS = 4  # a phrase that comes so often in a row is a loop, not a report
# what a model writes before its answer: MedGemma 1.5, thinking variants of Qwen3-VL
THOUGHTS = (("<unused94>", "<unused95>"), ("<think>", "</think>"))

_HEADING = re.compile(r"(?im)(?:^|(?<=[.\n]))\s*[*#_]*\s*(findings|impression|conclusion)\s*[*_]*\s*:[*_]*\s*")
_LOOP = re.compile(r"(?s)(.{12,200}?)\1{" + str(REPEATS - 1) + r",}")
_DECLINES = re.compile(
    r"(?i)\b(i'?m|i am) (sorry|unable|not able)|\bas an ai\b"
    r"|\bi (can(no|')t|am not able to) (provide|interpret|analy[sz]e|read|give)"
)


@dataclass(frozen=True, slots=True)
class Sections:
    """The report as the model wrote it; where a section was not recognised it is empty and flagged."""

    findings: str
    impression: str
    flags: tuple[Flag, ...]


def parse(text: str) -> Sections:
    """Return findings and impression. Text without headings stands whole under findings, flagged UNPARSED.

    A thought before the answer is left out; of a text that ends within it nothing is left.
    """
    flags = []
    answer = _without_thought(text).strip()
    bounded = answer[:LONGEST_TEXT]
    if bounded != answer:
        flags.append(Flag.TRUNCATED)
    shortened = _without_loop(bounded)
    if shortened != bounded:
        flags.append(Flag.REPETITION)
    if _DECLINES.search(shortened[:400]):
        flags.append(Flag.REFUSED)
    parts = _HEADING.split(shortened)
    found: dict[str, str] = {}
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        name = "findings" if heading.lower() == "findings" else "impression"
        found[name] = "\n".join(filter(None, [found.get(name, ""), body.strip()]))
    before = parts[0].strip()
    if "impression" not in found:
        flags.append(Flag.UNPARSED)
    findings = "\n".join(filter(None, [before, found.get("findings", "")]))
    return Sections(findings, found.get("impression", ""), tuple(flags))


def _without_thought(text: str) -> str:
    for opening, closing in THOUGHTS:
        _, ended, answer = text.rpartition(closing)
        text = answer if ended else text.partition(opening)[0]
    return text


def _without_loop(text: str) -> str:
    """Cut at the second round of the first loop."""
    loop = _LOOP.search(text)
    if loop is not None:
        text = text[: loop.start() + len(loop.group(1))]
    return text
