"""AnalysisOutput and source headers -> Basic Text SR under TID 2000, for a PACS that shows nothing else.

The same words as the full report; no measurements, no references to single slices, nothing for machines to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from highdicom.sr import (
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    LanguageOfContentItemAndDescendants,
    RelationshipTypeValues,
    TextContentItem,
)
from highdicom.sr.coding import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import BasicTextSRStorage

from service.report import codes, words
from service.report.document import analysed_instances, document, observer, related_items
from service.report.identity import RelatedObject, RunIdentity
from service.report.source import SourceStudy
from service.shared.messages import AnalysisOutput
from service.shared.settings import ReportSettings

_CONTAINS = RelationshipTypeValues.CONTAINS


def build_text_report(
    output: AnalysisOutput,
    source: SourceStudy,
    settings: ReportSettings,
    *,
    run: RunIdentity,
    related: Sequence[RelatedObject] = (),
) -> Dataset:
    """One Basic Text SR, ready for `encode`; ValueError when none of the analysed instances is in `source`."""
    _, unlisted = analysed_instances(output, source)
    algorithm = f"Read by {output.model.name}, {output.software_version}. Settings: {words.parameters(output)}"
    limits = (f"{words.LIMITATION} {text}" for text in words.limitations(output))
    described = [*limits, *words.comments(output, run.revision_note, unlisted), *words.paragraphs(algorithm)]
    root = ContainerContentItem(codes.DIAGNOSTIC_IMAGING_REPORT, is_content_continuous=False, template_id="2000")
    children = ContentSequence()
    children.extend(LanguageOfContentItemAndDescendants(CodedConcept.from_code(codes.ENGLISH)))
    children.extend(observer(output, settings))
    # The impression stands first: what must be known before anything is read begins it
    children.append(_section(codes.IMPRESSIONS, codes.IMPRESSION, [words.impression(output)]))
    children.append(_section(codes.FINDINGS, codes.FINDING, words.findings(output)))
    description = _section(codes.PROCEDURE_DESCRIPTIONS, codes.PROCEDURE_DESCRIPTION, described)
    description.ContentSequence.extend(related_items(related))
    children.append(description)
    root.ContentSequence = children
    return document(output, source, settings, run, sop_class_uid=BasicTextSRStorage, root=root, related=related)


def _section(heading: Code, name: Code, texts: Iterable[str]) -> ContentItem:
    section = ContainerContentItem(heading, is_content_continuous=False, relationship_type=_CONTAINS)
    section.ContentSequence = ContentSequence(
        [TextContentItem(name, text, relationship_type=_CONTAINS) for text in texts]
    )
    return section
