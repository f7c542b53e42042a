"""AnalysisOutput and source headers -> SR document under TID 1500. Pure: same input, same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import cast

from highdicom.sr import (
    AlgorithmIdentification,
    CodeContentItem,
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    ImageContentItem,
    LanguageOfContentItemAndDescendants,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
    UIDRefContentItem,
)
from highdicom.sr.coding import CodedConcept
from pydicom.dataset import Dataset
from pydicom.uid import Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage

from service.report import codes, words
from service.report.attributes import uid_is_valid
from service.report.document import Image, analysed_instances, document, observer, related_items, shown_images
from service.report.finding_groups import finding_groups
from service.report.header import clipped
from service.report.identity import RelatedObject, RunIdentity
from service.report.readable import walk
from service.report.source import SourceStudy
from service.report.validation_mode import values_as_they_are
from service.shared.messages import AnalysisOutput, Flag
from service.shared.settings import ReportSettings, SrSopClass

SOP_CLASSES: dict[SrSopClass, str] = {
    SrSopClass.COMPREHENSIVE_3D: Comprehensive3DSRStorage,
    SrSopClass.COMPREHENSIVE: ComprehensiveSRStorage,
    SrSopClass.ENHANCED: EnhancedSRStorage,
}
_CONTAINS = RelationshipTypeValues.CONTAINS


def build_sr(
    output: AnalysisOutput,
    source: SourceStudy,
    settings: ReportSettings,
    sop_class: SrSopClass,
    *,
    run: RunIdentity,
    related: Sequence[RelatedObject] = (),
) -> Dataset:
    """One SR document, ready for `encode`.

    related: its companions, which it refers to.
    source: of the analysed series; instances of the Retention without a readable header are said to be missing.
    Raises ValueError when none of the analysed instances is in `source`.
    """
    _, unlisted = analysed_instances(output, source)
    with values_as_they_are():  # UIDs of the source are copied even where they are invalid
        root = _content(output, source, settings, run, unlisted, related)
    return document(output, source, settings, run, sop_class_uid=SOP_CLASSES[sop_class], root=root, related=related)


def _content(
    output: AnalysisOutput,
    source: SourceStudy,
    settings: ReportSettings,
    run: RunIdentity,
    unlisted: int,
    related: Sequence[RelatedObject],
) -> ContentItem:
    """The tree of TID 1500, every container SEPARATE."""
    kept = shown_images(output, source)
    if Flag.NOT_ANALYSED in output.flags:  # the images that it speaks of, one of each series
        kept = _first_of_each_series([(one, None) for one in analysed_instances(output, source)[0]])
    model_input = _model_input(output, kept, run, unlisted)
    model_input[0].ContentSequence.extend(related_items(related))
    report = MeasurementReport(
        observation_context=observer(output, settings),
        procedure_reported=codes.PROCEDURES.get(output.modality, codes.IMAGING_PROCEDURE),
        title=codes.IMAGING_MEASUREMENT_REPORT,
        language_of_content_item_and_descendants=LanguageOfContentItemAndDescendants(
            CodedConcept.from_code(codes.ENGLISH)
        ),
        imaging_measurements=[model_input, *finding_groups(output, source, run)],
    )
    root = report[0]
    children = root.ContentSequence
    measurements = children.pop()
    children.append(_image_library(output, kept))
    children.append(measurements)
    children.append(_narrative(output, run, unlisted))
    for item in walk(root):
        if item.ValueType == "CONTAINER":
            item.ContinuityOfContent = "SEPARATE"
        elif item.ValueType == "NUM":
            _count_in_whole_numbers(item.MeasuredValueSequence[0])
    return cast(ContentItem, root)


def _count_in_whole_numbers(measured: Dataset) -> None:
    """`20`, where highdicom writes `20.0` for an integer."""
    if "FloatingPointValue" not in measured:
        measured.NumericValue = str(int(measured.NumericValue))


def _image_library(output: AnalysisOutput, kept: list[Image]) -> ContainerContentItem:
    """TID 1600 without the geometry of each image: that is in the images, and would bury the findings."""
    library = ContainerContentItem(codes.IMAGE_LIBRARY, relationship_type=_CONTAINS)
    groups = ContentSequence()
    for _, members in groupby(kept, key=lambda image: image[0].series_uid):
        group = ContainerContentItem(codes.IMAGE_LIBRARY_GROUP, relationship_type=_CONTAINS)
        context = RelationshipTypeValues.HAS_ACQ_CONTEXT
        items = ContentSequence()
        if output.modality in codes.MODALITIES:
            items.append(CodeContentItem(codes.MODALITY, codes.MODALITIES[output.modality], context))
        uid = output.frame_of_reference_uid
        if uid is not None and uid_is_valid(uid):
            items.append(UIDRefContentItem(codes.FRAME_OF_REFERENCE_UID, uid, context))
        items.extend(
            ImageContentItem(
                codes.SOURCE, instance.sop_class_uid, instance.sop_instance_uid, frames, relationship_type=_CONTAINS
            )
            for instance, frames in members
        )
        group.ContentSequence = items
        groups.append(group)
    library.ContentSequence = groups
    return library


def _model_input(
    output: AnalysisOutput, kept: list[Image], run: RunIdentity, unlisted: int
) -> MeasurementsAndQualitativeEvaluations:
    """TID 1501: what the model was given, by which settings, and every caution as a code."""
    counts = output.counts.model_dump()
    measured = [Measurement(name, counts[field], unit) for field, (name, unit) in codes.COUNTS.items()]
    name, unit = codes.SLICES_SHOWN
    measured.append(Measurement(name, words.shown_slices(output), unit))
    name, unit = codes.SERIES_NOT_READ
    measured.append(Measurement(name, sum(not candidate.chosen for candidate in output.candidates), unit))
    if output.counts.tokens_in:
        fraction = output.counts.tokens_kept / output.counts.tokens_in
        measured.append(Measurement(codes.TOKEN_FRACTION, round(fraction, 6), codes.NO_UNITS))
    measured += [
        Measurement(name, output.pruning[key], unit)
        for key, (name, unit) in codes.PRUNING_NUMBERS.items()
        if isinstance(output.pruning.get(key), int | float)
    ]
    evaluations = [
        QualitativeEvaluation(name, choices.get(str(output.pruning[key]), codes.OTHER_CHOICE))
        for key, (name, choices) in codes.PRUNING_CHOICES.items()
        if key in output.pruning
    ]
    evaluations += [
        QualitativeEvaluation(name, codes.YES if output.pruning[key] else codes.NO)
        for key, name in codes.PRUNING_SWITCHES.items()
        if isinstance(output.pruning.get(key), bool)
    ]
    cautions = [codes.CAUTIONS[flag] for flag in words.NOTICES if flag in output.flags]
    cautions += [codes.INSTANCES_NOT_LISTED] * bool(unlisted)
    evaluations += [QualitativeEvaluation(codes.CAUTION, caution) for caution in cautions]
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid=run.uid("model input"), identifier="Model input"),
        finding_type=codes.MODEL_INPUT_SELECTION,
        algorithm_id=_algorithm(output),
        measurements=measured,
        qualitative_evaluations=evaluations,
        source_images=[
            SourceImageForMeasurementGroup(instance.sop_class_uid, instance.sop_instance_uid, frames)
            for instance, frames in _first_of_each_series(kept)
        ],
    )


def _first_of_each_series(images: list[Image]) -> list[Image]:
    """Where a viewer opens the images; all of them stand in the Image Library, and twice would be twice as long."""
    return [next(members) for _, members in groupby(images, key=lambda image: image[0].series_uid)]


def _algorithm(output: AnalysisOutput) -> AlgorithmIdentification:
    """TID 4019 with all parameters in one text: readers keep the first Algorithm Parameters only."""
    return AlgorithmIdentification(
        name=clipped(output.model.name),
        version=", weights sha256:".join(filter(None, (output.software_version, output.model.weights_sha256))),
        parameters=[words.parameters(output)],
        family=codes.ARTIFICIAL_INTELLIGENCE,
    )


def _narrative(output: AnalysisOutput, run: RunIdentity, unlisted: int) -> ContainerContentItem:
    """Text as text: no code is ever invented from the model's words."""
    narrative = ContainerContentItem(codes.QUALITATIVE_EVALUATIONS, relationship_type=_CONTAINS)
    said = [
        *((codes.FINDING, text) for text in words.findings(output)),
        (codes.IMPRESSION, words.impression(output)),
        *((codes.COMMENT, f"{words.LIMITATION} {text}") for text in words.limitations(output)),
        *((codes.COMMENT, text) for text in words.comments(output, run.revision_note, unlisted)),
    ]
    narrative.ContentSequence = ContentSequence(
        [TextContentItem(name, text, relationship_type=_CONTAINS) for name, text in said]
    )
    return narrative
