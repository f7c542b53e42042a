"""AnalysisOutput and source headers -> SR document under TID 1500. Pure: same input, same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import groupby
from typing import cast

from highdicom.sr import (
    AlgorithmIdentification,
    CodeContentItem,
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    ImageContentItem,
    LanguageOfContentItemAndDescendants,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
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
from service.report.encoding import name_by_content
from service.report.header import (
    clipped,
    common_header,
    copy_into,
    device_uid,
    private_scheme,
)
from service.report.identity import PriorDocument, RunIdentity
from service.report.readable import walk
from service.report.source import Checked, SourceInstance, SourceStudy
from service.shared.messages import AnalysisOutput, Flag, SourceState
from service.shared.settings import ReportSettings, SrSopClass

SOP_CLASSES: dict[SrSopClass, str] = {
    SrSopClass.COMPREHENSIVE_3D: Comprehensive3DSRStorage,
    SrSopClass.COMPREHENSIVE: ComprehensiveSRStorage,
    SrSopClass.ENHANCED: EnhancedSRStorage,
}
# The text or the images it rests on are not all there (PS3.3 C.17.2.1, Completion Flag)
_INCOMPLETE = (Flag.MISSING_SLICES, Flag.UNREADABLE_SLICES, Flag.TRUNCATED, Flag.REPETITION)
_CONTAINS = RelationshipTypeValues.CONTAINS


def build_sr(
    output: AnalysisOutput,
    source: SourceStudy,
    settings: ReportSettings,
    sop_class: SrSopClass,
    *,
    run: RunIdentity,
) -> Dataset:
    """One SR document, ready for `encode`.

    source: of the analysed series; instances of the Retention without a readable header are said to be missing.
    Raises ValueError when none of the analysed instances is in `source`.
    """
    evidence, unlisted = _evidence(output, source)
    dataset = common_header(
        output,
        source,
        settings,
        run,
        sop_class_uid=SOP_CLASSES[sop_class],
        modality="SR",
        kind="SR",
        series_number=settings.series_number,
        series_description=settings.series_description,
    )
    dataset.CodingSchemeIdentificationSequence = [private_scheme()]
    dataset.ReferencedPerformedProcedureStepSequence = []
    dataset.PerformedProcedureCodeSequence = []
    complete = not unlisted and not any(flag in output.flags for flag in _INCOMPLETE)
    dataset.CompletionFlag = "COMPLETE" if complete else "PARTIAL"
    dataset.VerificationFlag = "UNVERIFIED"
    dataset.PreliminaryFlag = "PRELIMINARY"
    dataset.CurrentRequestedProcedureEvidenceSequence = [
        references(source.study_uid, [(one.series_uid, one.sop_class_uid, one.sop_instance_uid) for one in evidence])
    ]
    if source.requests:
        dataset.ReferencedRequestSequence = [_request(request, source) for request in source.requests]
    if run.predecessors:
        dataset.PredecessorDocumentsSequence = list(_predecessors(run.predecessors))
    root = _content(output, evidence, source, settings, run, unlisted)
    for element in root:
        dataset.add(element)
    return name_by_content(dataset, "SR", *run.analysis_key)


def references(study_uid: str, instances: Iterable[tuple[str, str, str]]) -> Dataset:
    """One item of an evidence sequence; `instances` as (series, class, instance), each once."""
    item = Dataset()
    copy_into(item, {"StudyInstanceUID": study_uid})
    series_items = []
    for series_uid, members in groupby(sorted(set(instances)), key=lambda one: one[0]):
        series_item = Dataset()
        copy_into(series_item, {"SeriesInstanceUID": series_uid})
        series_item.ReferencedSOPSequence = [_reference(class_uid, uid) for _, class_uid, uid in members]
        series_items.append(series_item)
    item.ReferencedSeriesSequence = series_items
    return item


def _reference(sop_class_uid: str, sop_instance_uid: str) -> Dataset:
    item = Dataset()
    copy_into(
        item, {"ReferencedSOPClassUID": sop_class_uid, "ReferencedSOPInstanceUID": sop_instance_uid}
    )
    return item


def _evidence(output: AnalysisOutput, source: SourceStudy) -> tuple[list[SourceInstance], int]:
    """Every analysed instance in stack order, dropped ones included, and how many have no readable header."""
    known = {instance.sop_instance_uid: instance for instance in source.instances}
    analysed = dict.fromkeys(one.sop_instance_uid for one in output.retention.sources)
    evidence = [known[uid] for uid in analysed if uid in known]
    if not evidence:
        raise ValueError(f"none of the {len(analysed)} analysed instances is among the source's headers")
    return evidence, len(analysed) - len(evidence)


def _predecessors(documents: tuple[PriorDocument, ...]) -> Iterator[Dataset]:
    for study_uid, members in groupby(sorted(documents, key=lambda one: one.study_uid), key=lambda one: one.study_uid):
        yield references(
            study_uid, [(one.series_uid, one.sop_class_uid, one.sop_instance_uid) for one in members]
        )


def _request(request: Checked, source: SourceStudy) -> Dataset:
    """One item of Referenced Request Sequence: all of its Type 1 and 2 attributes (PS3.3 C.17.2)."""
    item = Dataset()
    item.ReferencedStudySequence = []
    item.RequestedProcedureCodeSequence = []
    empty = {
        "PlacerOrderNumberImagingServiceRequest": "",
        "FillerOrderNumberImagingServiceRequest": "",
        "RequestedProcedureID": "",
        "RequestedProcedureDescription": "",
    }
    study = {"StudyInstanceUID": source.study_uid, "AccessionNumber": source.attributes["AccessionNumber"]}
    copy_into(item, empty | study | dict(request))
    return item


def _content(
    output: AnalysisOutput,
    evidence: list[SourceInstance],
    source: SourceStudy,
    settings: ReportSettings,
    run: RunIdentity,
    unlisted: int,
) -> ContentItem:
    """The tree of TID 1500, every container SEPARATE."""
    kept = _kept_images(output, source)
    report = MeasurementReport(
        observation_context=_observer(output, settings),
        procedure_reported=codes.PROCEDURES.get(output.modality, codes.IMAGING_PROCEDURE),
        title=codes.IMAGING_MEASUREMENT_REPORT,
        language_of_content_item_and_descendants=LanguageOfContentItemAndDescendants(
            CodedConcept.from_code(codes.ENGLISH)
        ),
        imaging_measurements=[_model_input(output, kept, run, unlisted)],
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


def _observer(output: AnalysisOutput, settings: ReportSettings) -> ObservationContext:
    attributes = DeviceObserverIdentifyingAttributes(
        uid=device_uid(output),
        name=clipped(output.model.name),
        manufacturer_name=clipped(settings.manufacturer),
        model_name=clipped(output.model.architecture),
        serial_number=clipped(settings.device_serial_number),
    )
    context = ObserverContext(CodedConcept.from_code(codes.DEVICE), attributes)
    return ObservationContext(observer_device_context=context)


Image = tuple[SourceInstance, list[int] | None]  # frame numbers, 1-based, of a multi-frame instance


def _kept_images(output: AnalysisOutput, source: SourceStudy) -> list[Image]:
    """What the model was shown, alone or averaged, in stack order; frames of one instance in one reference."""
    known = {instance.sop_instance_uid: instance for instance in source.instances}
    frames: dict[str, list[int]] = {}
    for one in output.retention.sources:
        if one.state in (SourceState.SHOWN, SourceState.IN_SLAB) and one.sop_instance_uid in known:
            of_instance = frames.setdefault(one.sop_instance_uid, [])
            if one.frame_number is not None:
                of_instance.append(one.frame_number)
    return [(known[uid], sorted(numbers) or None) for uid, numbers in frames.items()]


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
    if output.counts.tokens_in:
        fraction = output.counts.tokens_kept / output.counts.tokens_in
        measured.append(Measurement(codes.TOKEN_FRACTION, round(fraction, 6), codes.NO_UNITS))
    measured += [
        Measurement(name, output.pruning[key], codes.NO_UNITS)
        for key, name in codes.PRUNING_NUMBERS.items()
        if isinstance(output.pruning.get(key), int | float)
    ]
    method = codes.PRUNING_METHODS.get(str(output.pruning.get("method")), codes.OTHER_PRUNING_METHOD)
    evaluations = [QualitativeEvaluation(codes.PRUNING_METHOD, method)]
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
            for instance, frames in kept
        ],
    )


def _algorithm(output: AnalysisOutput) -> AlgorithmIdentification:
    """TID 4019 with all parameters in one text: readers keep the first Algorithm Parameters only."""
    return AlgorithmIdentification(
        name=clipped(output.model.name),
        version=f"{output.software_version}, weights sha256:{output.model.weights_sha256}",
        parameters=["; ".join(f"{name}={_plain(value)}" for name, value in _parameters(output))],
        family=codes.ARTIFICIAL_INTELLIGENCE,
    )


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
    return " ".join(words.paragraphs(text)).replace(";", ",")


def _narrative(output: AnalysisOutput, run: RunIdentity, unlisted: int) -> ContainerContentItem:
    """Text as text: no code is ever invented from the model's words."""
    narrative = ContainerContentItem(codes.QUALITATIVE_EVALUATIONS, relationship_type=_CONTAINS)
    said = [
        *((codes.FINDING, text) for text in words.findings(output)),
        (codes.IMPRESSION, words.impression(output)),
        *((codes.COMMENT, text) for text in words.comments(output, run.revision_note, unlisted)),
    ]
    narrative.ContentSequence = ContentSequence(
        [TextContentItem(name, text, relationship_type=_CONTAINS) for name, text in said]
    )
    return narrative
