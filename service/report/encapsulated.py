"""The printed report as a DICOM object: Encapsulated PDF, for a PACS that shows nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydicom.dataset import Dataset
from pydicom.uid import EncapsulatedPDFStorage

from service.report import codes
from service.report.coverage import cover, is_shown
from service.report.document import analysed_instances, reference
from service.report.encoding import name_by_content
from service.report.header import clipped, code_item, common_header, private_scheme
from service.report.identity import RunIdentity
from service.report.pixels import SourceFrame, Wanted
from service.report.printed import PICTURES, RGB, print_report
from service.report.retention_map import caption, paint, sides
from service.report.source import SourceStudy
from service.shared.messages import AnalysisOutput, RetentionArrays
from service.shared.settings import Companion, ReportSettings


def key_places(wanted: Sequence[Wanted]) -> list[int]:
    """Which of the wanted frames are printed: evenly over the stack, so that left out slices are there too."""
    count = min(PICTURES, len(wanted))
    return sorted({round(step * (len(wanted) - 1) / max(count - 1, 1)) for step in range(count)})


def build_pdf(
    output: AnalysisOutput,
    arrays: RetentionArrays,
    source: SourceStudy,
    frames: Mapping[int, SourceFrame],
    settings: ReportSettings,
    *,
    run: RunIdentity,
) -> Dataset:
    """One Encapsulated PDF, ready for `encode`; frames: those of key_places with their pixels, by place.

    A slice without pixels is left out of the pictures. ValueError when no analysed instance is in `source`.
    """
    evidence, unlisted = analysed_instances(output, source)
    pictures = dict(_pictures(output, arrays, frames))
    printed = print_report(output, source, settings, pictures, unlisted=unlisted, run=run)
    dataset = common_header(
        output,
        source,
        settings,
        run,
        sop_class_uid=EncapsulatedPDFStorage,
        modality="DOC",
        kind="PDF",
        series_number=settings.series_number + 5,
        series_description=settings.series_description,
    )
    dataset.ConversionType = "WSD"
    dataset.AcquisitionDateTime = ""
    dataset.BurnedInAnnotation = "YES"
    dataset.CodingSchemeIdentificationSequence = [private_scheme()]
    dataset.SourceInstanceSequence = [reference(one.sop_class_uid, one.sop_instance_uid) for one in evidence]
    dataset.DocumentTitle = clipped(settings.series_description)
    dataset.VerificationFlag = "UNVERIFIED"
    dataset.ConceptNameCodeSequence = [code_item(codes.COMPANIONS[Companion.PDF])]
    dataset.MIMETypeOfEncapsulatedDocument = "application/pdf"
    dataset.EncapsulatedDocumentLength = len(printed)
    dataset.EncapsulatedDocument = printed + b"\0" * (len(printed) % 2)
    return name_by_content(dataset, "PDF", *run.analysis_key)


def _pictures(
    output: AnalysisOutput, arrays: RetentionArrays, frames: Mapping[int, SourceFrame]
) -> Sequence[tuple[str, RGB]]:
    numbers = {(one.sop_instance_uid, one.frame_number): number for number, one in enumerate(output.retention.sources)}
    drawn = []
    for frame in frames.values():
        if frame.grey is None:
            continue
        number = numbers[frame.sop_instance_uid, frame.frame_number]
        one = output.retention.sources[number]
        covers = cover(output.retention, arrays, one, (frame.grey.shape[0], frame.grey.shape[1]))
        said = caption(output.retention, one, number + 1)
        drawn.append((said, paint(frame.grey, covers, said, is_shown(one), sides(frame))))
    return drawn
