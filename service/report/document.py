"""What every SR document of ours has around its tree: flags, evidence, request, predecessors, observer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from highdicom.sr import (
    CompositeContentItem,
    ContentItem,
    DeviceObserverIdentifyingAttributes,
    ImageContentItem,
    ObservationContext,
    ObserverContext,
    RelationshipTypeValues,
)
from highdicom.sr.coding import CodedConcept
from pydicom.dataset import Dataset

from service.report import codes
from service.report.encoding import name_by_content
from service.report.header import clipped, common_header, copy_into, device_uid, private_scheme
from service.report.identity import PriorDocument, RelatedObject, RunIdentity
from service.report.source import Checked, SourceInstance, SourceStudy
from service.shared.messages import AnalysisOutput, Flag, SourceState
from service.shared.messages import SourceInstance as RetainedInstance
from service.shared.settings import Companion, ReportSettings

Image = tuple[SourceInstance, list[int] | None]  # frame numbers, 1-based, of a multi-frame instance
# The text or the images it rests on are not all there (PS3.3 C.17.2.1, Completion Flag)
_INCOMPLETE = (Flag.NOT_ANALYSED, Flag.MISSING_SLICES, Flag.UNREADABLE_SLICES, Flag.TRUNCATED, Flag.REPETITION)


def document(
    output: AnalysisOutput,
    source: SourceStudy,
    settings: ReportSettings,
    run: RunIdentity,
    *,
    sop_class_uid: str,
    root: Dataset,
    related: Sequence[RelatedObject] = (),
) -> Dataset:
    """An SR document around the content tree `root`, named by all of its bytes.

    related: what the tree refers to beside the analysed instances.
    """
    evidence, unlisted = analysed_instances(output, source)
    dataset = common_header(
        output,
        source,
        settings,
        run,
        sop_class_uid=sop_class_uid,
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
        references(source.study_uid, [*map(_where, evidence), *map(_where, related)])
    ]
    add_requests(dataset, source)
    if run.predecessors:
        dataset.PredecessorDocumentsSequence = list(_predecessors(run.predecessors))
    for element in root:
        dataset.add(element)
    return name_by_content(dataset, "SR", *run.analysis_key)


def _where(one: SourceInstance | RelatedObject) -> tuple[str, str, str]:
    return one.series_uid, one.sop_class_uid, one.sop_instance_uid


def add_requests(dataset: Dataset, source: SourceStudy) -> None:
    """Referenced Request Sequence, where the source was made on request."""
    if source.requests:
        dataset.ReferencedRequestSequence = [_request(request, source) for request in source.requests]


def analysed_instances(output: AnalysisOutput, source: SourceStudy) -> tuple[list[SourceInstance], int]:
    """Every analysed instance in stack order, dropped ones included, and how many have no readable header.

    Raises ValueError when none of them is in `source`.
    """
    known = {instance.sop_instance_uid: instance for instance in source.instances}
    analysed = dict.fromkeys(one.sop_instance_uid for one in output.retention.sources)
    evidence = [known[uid] for uid in analysed if uid in known]
    if not evidence:
        raise ValueError(f"none of the {len(analysed)} analysed instances is among the source's headers")
    return evidence, len(analysed) - len(evidence)


def shown_images(output: AnalysisOutput, source: SourceStudy) -> list[Image]:
    """What the model was shown, alone or averaged, in stack order; frames of one instance in one reference."""
    shown_states = (SourceState.SHOWN, SourceState.IN_SLAB)
    return _images(source, (one for one in output.retention.sources if one.state in shown_states))


def images_of_input(output: AnalysisOutput, source: SourceStudy, index: int) -> list[Image]:
    """The source images that one model input was made of, in stack order; several for a slab."""
    return _images(
        source, (output.retention.sources[place] for place in output.retention.inputs[index].source_instances)
    )


def _images(source: SourceStudy, shown: Iterable[RetainedInstance]) -> list[Image]:
    """Instances with a readable header; frames of one instance in one reference."""
    known = {instance.sop_instance_uid: instance for instance in source.instances}
    frames: dict[str, list[int]] = {}
    for one in shown:
        if one.sop_instance_uid in known:
            of_instance = frames.setdefault(one.sop_instance_uid, [])
            if one.frame_number is not None:
                of_instance.append(one.frame_number)
    return [(known[uid], sorted(numbers) or None) for uid, numbers in frames.items()]


def related_items(related: Iterable[RelatedObject]) -> Iterator[ContentItem]:
    """One content item for each: what it is, and where."""
    for one in related:
        name = codes.COMPANIONS[one.companion]
        kind = CompositeContentItem if one.companion in (Companion.PDF, Companion.KOS) else ImageContentItem
        yield kind(name, one.sop_class_uid, one.sop_instance_uid, relationship_type=RelationshipTypeValues.CONTAINS)


def references(study_uid: str, instances: Iterable[tuple[str, str, str]]) -> Dataset:
    """One item of an evidence sequence; `instances` as (series, class, instance), each once."""
    item = Dataset()
    copy_into(item, {"StudyInstanceUID": study_uid})
    series_items = []
    for series_uid, members in groupby(sorted(set(instances)), key=lambda one: one[0]):
        series_item = Dataset()
        copy_into(series_item, {"SeriesInstanceUID": series_uid})
        series_item.ReferencedSOPSequence = [reference(class_uid, uid) for _, class_uid, uid in members]
        series_items.append(series_item)
    item.ReferencedSeriesSequence = series_items
    return item


def reference(sop_class_uid: str, sop_instance_uid: str, frames: list[int] | None = None) -> Dataset:
    """One item of Referenced SOP Sequence; the UIDs may be invalid ones of the source."""
    item = Dataset()
    copy_into(item, {"ReferencedSOPClassUID": sop_class_uid, "ReferencedSOPInstanceUID": sop_instance_uid})
    if frames:
        item.ReferencedFrameNumber = frames
    return item


def observer(output: AnalysisOutput, settings: ReportSettings) -> ObservationContext:
    """The reading device (TID 1002, 1004)."""
    attributes = DeviceObserverIdentifyingAttributes(
        uid=device_uid(output),
        name=clipped(output.model.name),
        manufacturer_name=clipped(settings.manufacturer),
        model_name=clipped(output.model.architecture),
        serial_number=clipped(settings.device_serial_number),
    )
    context = ObserverContext(CodedConcept.from_code(codes.DEVICE), attributes)
    return ObservationContext(observer_device_context=context)


def _predecessors(documents: tuple[PriorDocument, ...]) -> Iterator[Dataset]:
    for study_uid, members in groupby(sorted(documents, key=lambda one: one.study_uid), key=lambda one: one.study_uid):
        yield references(study_uid, [(one.series_uid, one.sop_class_uid, one.sop_instance_uid) for one in members])


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
