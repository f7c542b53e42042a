"""Slices given to the model -> Key Object Selection, for a PACS that jumps to the images of one."""

from __future__ import annotations

from highdicom.sr import (
    ContainerContentItem,
    ContentSequence,
    LanguageOfContentItemAndDescendants,
    RelationshipTypeValues,
    TextContentItem,
)
from highdicom.sr.coding import CodedConcept
from pydicom.dataset import Dataset
from pydicom.uid import KeyObjectSelectionDocumentStorage

from service.report import codes, words
from service.report.document import Image, add_requests, observer, reference, references, shown_images
from service.report.encoding import name_by_content
from service.report.header import common_header, private_scheme
from service.report.identity import RunIdentity
from service.report.source import SourceStudy
from service.report.validation_mode import values_as_they_are
from service.shared.messages import AnalysisOutput
from service.shared.settings import ReportSettings

SERIES_DESCRIPTION = "AI model input, not for diagnosis"


def build_key_objects(
    output: AnalysisOutput, source: SourceStudy, settings: ReportSettings, *, run: RunIdentity
) -> Dataset:
    """One Key Object Selection (TID 2010), ready for `encode`; ValueError where the model was shown nothing."""
    shown = shown_images(output, source)
    if not shown:
        raise ValueError("none of the slices was shown to the model; there is nothing to select")
    dataset = common_header(
        output,
        source,
        settings,
        run,
        sop_class_uid=KeyObjectSelectionDocumentStorage,
        modality="KO",
        kind="KO",
        series_number=settings.series_number + 3,
        series_description=SERIES_DESCRIPTION,
    )
    dataset.CodingSchemeIdentificationSequence = [private_scheme()]
    dataset.ReferencedPerformedProcedureStepSequence = []
    instances = ((one.series_uid, one.sop_class_uid, one.sop_instance_uid) for one, _ in shown)
    dataset.CurrentRequestedProcedureEvidenceSequence = [references(source.study_uid, instances)]
    add_requests(dataset, source)
    with values_as_they_are():  # UIDs of the source are copied even where they are invalid
        for element in _content(output, settings, shown):
            dataset.add(element)
    return name_by_content(dataset, "KO", *run.analysis_key)


def _content(output: AnalysisOutput, settings: ReportSettings, shown: list[Image]) -> Dataset:
    root = ContainerContentItem(codes.FOR_RESEARCH, is_content_continuous=False, template_id="2010")
    said = f"{words.NOT_FOR_DIAGNOSIS} The images that were given to the model, in part or whole."
    children = ContentSequence()
    children.extend(LanguageOfContentItemAndDescendants(CodedConcept.from_code(codes.ENGLISH)))
    children.extend(observer(output, settings))
    children.append(TextContentItem(codes.KEY_OBJECT_DESCRIPTION, said, RelationshipTypeValues.CONTAINS))
    root.ContentSequence = children
    plain = Dataset()
    plain.update(root)
    # Images of TID 2010 have no concept name, which highdicom's own content items must have
    plain.ContentSequence = [*root.ContentSequence, *(_image(image) for image in shown)]
    return plain


def _image(image: Image) -> Dataset:
    instance, frames = image
    item = Dataset()
    item.RelationshipType = "CONTAINS"
    item.ValueType = "IMAGE"
    item.ReferencedSOPSequence = [reference(instance.sop_class_uid, instance.sop_instance_uid, frames)]
    return item
