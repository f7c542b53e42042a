"""Coded findings -> measurement groups of TID 1501, one for each finding that was asked for."""

from __future__ import annotations

from highdicom.sr import (
    AlgorithmIdentification,
    FindingSite,
    Measurement,
    MeasurementsAndQualitativeEvaluations,
    QualitativeEvaluation,
    SourceImageForMeasurementGroup,
    TrackingIdentifier,
)

from service.report import codes
from service.report.coded_findings import NAMES, CodedFinding, coded_findings
from service.report.document import images_of_input
from service.report.header import clipped
from service.report.identity import RunIdentity
from service.report.source import SourceStudy
from service.shared.messages import AnalysisOutput


def finding_groups(
    output: AnalysisOutput, source: SourceStudy, run: RunIdentity
) -> list[MeasurementsAndQualitativeEvaluations]:
    """One group for each coded finding, absent ones included."""
    return [_group(finding, output, source, run) for finding in coded_findings(output)]


def _group(
    finding: CodedFinding, output: AnalysisOutput, source: SourceStudy, run: RunIdentity
) -> MeasurementsAndQualitativeEvaluations:
    certainties = (
        (codes.CERTAINTY_OF_FINDING, finding.presence),
        (codes.CERTAINTY_OF_SIDE, finding.side),
        (codes.CERTAINTY_OF_ZONE, finding.zone),
        (codes.CERTAINTY_OF_DIAMETER, finding.diameter_mm),
        (codes.CERTAINTY_OF_SLICE, finding.slice_number),
    )
    measurements = [
        Measurement(name, round(answer.probability * 100, 1), codes.PERCENT)
        for name, answer in certainties
        if answer is not None
    ]
    if finding.diameter_mm is not None:
        measurements.insert(0, Measurement(codes.DIAMETER, int(finding.diameter_mm.chosen), codes.MILLIMETRES))
    presence = codes.PRESENT if finding.is_present else codes.ABSENT
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            uid=run.uid("finding", finding.name), identifier=NAMES[finding.name].capitalize()
        ),
        finding_type=codes.FINDINGS_CODED[finding.name],
        finding_sites=[_site(finding)],
        algorithm_id=AlgorithmIdentification(
            name=clipped(output.model.name),
            version=output.software_version,
            family=codes.ARTIFICIAL_INTELLIGENCE,
        ),
        measurements=measurements,
        qualitative_evaluations=[QualitativeEvaluation(codes.PRESENCE, presence)],
        source_images=_images(finding, output, source) or None,
    )


def _site(finding: CodedFinding) -> FindingSite:
    """Where it is: the zone of the lung where one was chosen, else the organ that it belongs to."""
    place = codes.FINDING_SITES[finding.name]
    if finding.zone is not None:
        place = codes.LUNG_ZONES[finding.zone.chosen]
    return FindingSite(place, laterality=None if finding.side is None else codes.SIDES[finding.side.chosen])


def _images(finding: CodedFinding, output: AnalysisOutput, source: SourceStudy) -> list[SourceImageForMeasurementGroup]:
    """The source images of the input that shows it best; several where the input is a slab."""
    if finding.slice_number is None:
        return []
    shown = images_of_input(output, source, int(finding.slice_number.chosen) - 1)
    return [
        SourceImageForMeasurementGroup(instance.sop_class_uid, instance.sop_instance_uid, frames)
        for instance, frames in shown
    ]
