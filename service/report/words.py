"""What a report says in words: notices before the impression, comments on what was read, the model's text.

Plain English for people, no markup. Knows nothing of DICOM encodings.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256

from service.report.coded_findings import sentences
from service.shared.messages import AnalysisOutput, Flag, SourceState

NOT_FOR_DIAGNOSIS = "UNVERIFIED machine output, not for diagnosis."
LIMITATION = "Limit of the model, as measured by its makers:"
NO_FINDINGS_TEXT = "The model produced no text under this heading."

LEGEND = (
    "Clear: patches given to the language model. Blue: merged into other patches. Dark red: not given. "
    "Orange frame: slice not given. Not for diagnosis."
)

# In the order in which they are said
NOTICES: dict[Flag, str] = {
    Flag.NOT_ANALYSED: "NOT ANALYSED: no model was run on this study.",
    Flag.RANDOM_WEIGHTS: "RANDOM WEIGHTS: the text is noise.",
    Flag.DEMONSTRATION_WEIGHTS: (
        "DEMONSTRATION MODEL: trained on computer-made phantoms; it has never seen a patient and means nothing on one."
    ),
    Flag.REFUSED: "The model declined to report; its own words stand under Finding.",
    Flag.UNPARSED: "No sections were recognised in the model's text; all of it stands under Finding.",
    Flag.TRUNCATED: "The text ended at its length limit and is not complete.",
    Flag.REPETITION: "The model repeated itself; the text was cut there.",
    Flag.MISSING_SLICES: "Slices are missing from the series that was read.",
    Flag.UNREADABLE_SLICES: "Some slices of the series could not be read.",
    Flag.DUPLICATE_POSITIONS: "Several slices stand at one position; one of each was read.",
    Flag.GANTRY_TILT: "The gantry was tilted; slices were read without correction.",
}
# Said before the impression itself; the others are comments
_URGENT = (
    Flag.NOT_ANALYSED, Flag.RANDOM_WEIGHTS, Flag.DEMONSTRATION_WEIGHTS, Flag.REFUSED, Flag.UNPARSED, Flag.TRUNCATED,
    Flag.REPETITION, Flag.MISSING_SLICES, Flag.UNREADABLE_SLICES,
)  # fmt: skip
_NOT_SHOWN = {
    SourceState.REPRESENTED: "represented by a similar neighbour",
    SourceState.SAMPLED_OUT: "left out by sampling",
    SourceState.DUPLICATE: "at a position already read",
    SourceState.UNREADABLE: "unreadable",
}


def findings(output: AnalysisOutput) -> list[str]:
    """The model's findings by paragraph; never empty."""
    return paragraphs(output.findings) or [NO_FINDINGS_TEXT]


def impression(output: AnalysisOutput) -> str:
    """The model's impression behind what must be known before it is read, as one text with CR LF."""
    notices = [NOTICES[flag] for flag in NOTICES if flag in output.flags and flag in _URGENT]
    opening = " ".join([NOT_FOR_DIAGNOSIS, *notices])
    return "\r\n".join([opening, *(paragraphs(output.impression) or [NO_FINDINGS_TEXT])])


def limitations(output: AnalysisOutput) -> list[str]:
    """What the model's makers measured that it cannot do; each is one text."""
    return [text for part in output.limitations for text in paragraphs(part)]


def comments(output: AnalysisOutput, revision_note: str, instances_not_listed: int) -> list[str]:
    """What was read and shown, what was not, and why; each is one text."""
    said = []
    if Flag.NOT_ANALYSED not in output.flags:
        said += [*sentences(output), _shown(output), f"Series read: {output.series_reason}", *_series_not_read(output)]
    said += [NOTICES[flag] for flag in NOTICES if flag in output.flags and flag not in _URGENT]
    said += output.notes
    if instances_not_listed:
        said.append(f"Not listed, for want of a readable header: {_instances(instances_not_listed)} of the series.")
    if revision_note:
        said.append(revision_note)
    return [text for part in said for text in paragraphs(part)]


def parameters(output: AnalysisOutput) -> str:
    """Every setting as applied and every digest, as `name=value; name=value`."""
    if Flag.NOT_ANALYSED in output.flags:
        return "none: nothing was analysed"
    return "; ".join(f"{name}={_plain(value)}" for name, value in _parameters(output))


def shown_slices(output: AnalysisOutput) -> int:
    """Source slices that are, alone or in a slab, in an input that the model got."""
    return sum(source.state in (SourceState.SHOWN, SourceState.IN_SLAB) for source in output.retention.sources)


def paragraphs(text: str) -> list[str]:
    """Lines of text that may be written in UTF-8: no control characters, none that stand for lost ones."""
    written = "".join(_writable(character) for character in text)
    return [line.strip() for line in re.split(r"[\r\n]+", written) if line.strip()]


def _writable(character: str) -> str:
    if character == "\ufffd" or "\ud800" <= character <= "\udfff":
        return "[unreadable character]"
    if character in "\r\n\u2028\u2029\x0b\x0c\x85":
        return "\n"
    return " " if character == "\t" or character < " " or "\x7f" <= character < "\xa0" else character


def _shown(output: AnalysisOutput) -> str:
    counts = output.counts
    states = Counter(source.state for source in output.retention.sources)
    rest = [f"{states[state]} {words}" for state, words in _NOT_SHOWN.items() if states[state]]
    slabs = states[SourceState.IN_SLAB]
    return (
        f"The model was shown {shown_slices(output)} of {counts.slices_in_series} slices"
        + (f" ({slabs} of them in slabs with neighbours)" if slabs else "")
        + f" and {counts.tokens_kept} of {counts.tokens_in} image tokens."
        + (f" Slices not shown: {', '.join(rest)}." if rest else "")
    )


def _series_not_read(output: AnalysisOutput) -> list[str]:
    return [
        f"Series not read: {candidate.modality or 'unknown modality'}, {_instances(candidate.instances)}: "
        f"{candidate.reason}"
        for candidate in output.candidates
        if not candidate.chosen
    ]


def _instances(count: int) -> str:
    return "1 instance" if count == 1 else f"{count} instances"


def _parameters(output: AnalysisOutput) -> Iterator[tuple[str, object]]:
    """Every setting as applied, in a fixed order; the prompt by its digest, the weights' folder not at all."""
    yield from (("pruning." + key, output.pruning[key]) for key in sorted(output.pruning))
    yield from (("preprocessing." + key, output.preprocessing[key]) for key in sorted(output.preprocessing))
    model = output.model
    yield "model", model.name
    yield "architecture", model.architecture
    yield "weights", f"sha256:{model.weights_sha256}"
    yield "dtype", model.dtype
    yield "device", model.device
    yield "attention", model.attention
    yield "transformers", model.transformers_version
    yield "torch", model.torch_version
    yield "prompt", f"sha256:{sha256(output.prompt.encode()).hexdigest()}"
    yield "max_new_tokens", output.max_new_tokens
    yield "retention", f"sha256:{output.arrays_sha256}"


def _plain(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return " ".join(paragraphs(text)).replace(";", ",")
