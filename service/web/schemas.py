"""The shapes of the REST API, version 1. Times are ISO 8601 in UTC; fields that name a patient are null for who may
not see them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from service.shared.db import AnalysisState, DeliveryState, ResultState, StudyState
from service.shared.messages import Aspect, FindingName


class Shape(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Problem(Shape):
    """What went wrong (RFC 9457)."""

    type: str = "about:blank"  # the status says it all
    title: str
    status: int
    detail: str
    reference: str | None = None  # of a fault of ours, as it stands in the log
    errors: list[dict[str, str]] = []  # of a request that cannot be: where, and what is wrong there


class Header(Shape):
    """What names the patient and the study."""

    patient_id: str
    issuer_of_patient_id: str
    patient_name: str
    patient_birth_date: str
    patient_sex: str
    accession_number: str
    study_date: str
    study_description: str


class DeliveryOut(Shape):
    id: int
    result_id: int
    destination: str
    state: DeliveryState
    attempts: int
    next_attempt_at: datetime | None
    status: int | None
    reason: str | None
    created_at: datetime
    delivered_at: datetime | None


class ResultOut(Shape):
    id: int
    analysis_id: int
    kind: str
    state: ResultState
    sop_class_uid: str
    sop_instance_uid: str
    series_uid: str
    sha256: str
    size_bytes: int
    created_at: datetime
    gate: list[str]
    deliveries: list[DeliveryOut] = []


class Report(Shape):
    findings: str
    impression: str


class AnalysisSummary(Shape):
    id: int
    study_id: int
    revision: int
    route: str
    run_number: int
    state: AnalysisState
    reason_code: str | None
    reason: str | None
    predecessor_id: int | None
    queued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempts: int
    worker: str | None
    series_uid: str | None
    flags: list[str] | None
    counts: dict[str, int] | None


class AnalysisOut(AnalysisSummary):
    series_reason: str | None
    settings: dict[str, Any]
    pruning: dict[str, Any] | None
    model: dict[str, Any] | None
    prompt: str
    timings_s: dict[str, float] | None
    memory_peak_bytes: int | None
    software_version: str | None
    output_sha256: str | None
    report: Report | None = None
    results: list[ResultOut] = []


class StudySummary(Shape):
    id: int
    study_uid: str
    state: StudyState
    revision: int
    held: bool
    patient_mismatch: bool
    first_received_at: datetime
    last_image_at: datetime | None
    calling_ae: str
    header: Header | None
    instances: int
    modalities: list[str]
    analysis: AnalysisSummary | None
    deliveries: dict[str, int]


class SeriesOut(Shape):
    series_uid: str
    modality: str
    instances: int
    size_bytes: int


class StudyOut(Shape):
    id: int
    study_uid: str
    state: StudyState
    revision: int
    held: bool
    patient_mismatch: bool
    first_received_at: datetime
    opened_at: datetime | None
    last_image_at: datetime | None
    completed_at: datetime | None
    calling_ae: str
    header: Header | None = None
    series: list[SeriesOut] = []
    analyses: list[AnalysisOut] = []


class EventOut(Shape):
    id: int
    at: datetime
    kind: str
    actor: str
    study_id: int | None
    analysis_id: int | None
    result_id: int | None
    delivery_id: int | None
    detail: dict[str, Any]


class Page(Shape):
    next: str | None  # pass it as `cursor` for the next page; null on the last one


class StudyPage(Page):
    items: list[StudySummary]


class AnalysisPage(Page):
    items: list[AnalysisSummary]


class DeliveryPage(Page):
    items: list[DeliveryOut]


class EventPage(Page):
    items: list[EventOut]


class DestinationOut(Shape):
    name: str
    ae_title: str
    address: str
    paused: bool
    pending: int
    rejected: int


class Destinations(Shape):
    items: list[DestinationOut]


class Done(Shape):
    done: list[str]  # what was done, in words; empty when there was nothing to do


class WorkerOut(Shape):
    """A worker child; null: it did not say. `silent`: its heartbeats stopped."""

    worker: str
    host: str
    device: str | None
    device_name: str | None
    memory_bytes: int | None
    memory_used_bytes: int | None
    model: str | None
    weights_sha256: str | None
    software_version: str | None
    started_at: datetime | None
    seen_at: datetime | None
    silent: bool
    analysis_id: int | None  # what it reads at the moment
    study_id: int | None
    running_s: int | None
    lease_valid: bool | None


class Overview(Shape):
    received: int
    receiving: int
    waiting: int
    running: int
    building: int
    done: int
    refused: int
    failed: int
    undelivered: int
    rejected: int
    quarantined: int
    held: int
    oldest_unfinished_s: int | None
    workers: list[WorkerOut]


class ChartPoint(Shape):
    analysis_id: int
    finished_at: datetime
    sender: str
    scanner: str | None  # model and station; with the protocol null for who may not see content
    protocol: str | None
    route: str
    slices_kept: float | None
    tokens_kept: float | None
    total_s: float
    timings_s: dict[str, float]


class ChartStep(Shape):
    """All analyses of one step of time."""

    at: datetime  # its begin
    analyses: int  # done
    inputs: int  # of those that were read
    inputs_kept: int
    tokens_in: int
    tokens_kept: int


class ChartGroup(ChartStep):
    """Of one scanner and protocol, read in this step."""

    scanner: str
    protocol: str


class Charts(Shape):
    points: list[ChartPoint]  # the newest 2,000
    step_s: int
    steps: list[ChartStep]  # all of the period
    groups: list[ChartGroup]  # all of the scanners and protocols that were read most; empty without content


class AlertOut(Shape):
    key: str  # stays the same while it holds
    kind: str
    severity: str  # critical, warning
    summary: str
    remedy: str
    since: datetime | None


class Alerts(Shape):
    items: list[AlertOut]


class SourceOut(Shape):
    index: int
    frame_number: int | None
    position_mm: float | None
    state: str
    input_index: int | None
    reason: str | None


class InputOut(Shape):
    index: int
    operation: str
    sources: list[int]
    position_mm: float
    kept: bool
    represented_by: int | None
    tokens: str  # one digit per token, row-major: 0 kept, 1 merged, 2 dropped, 3 not encoded
    source_pixels_from_token: list[list[float]]  # 2 x 3


class RetentionOut(Shape):
    modality: str
    rows: int
    columns: int
    windows: list[Any]
    sources: list[SourceOut]
    inputs: list[InputOut]
    coverage: list[dict[str, Any]]
    candidates: list[dict[str, Any]]


class AnswerOut(Shape):
    finding: FindingName | None  # None: about the study as a whole
    aspect: Aspect
    question: str
    answers: tuple[str, ...]  # that were allowed
    probabilities: tuple[float, ...]  # of each, in the same order
    chosen: str
    probability: float


class Answers(Shape):
    items: list[AnswerOut]


class RefusalOut(Shape):
    """Empty where it was not known yet."""

    at: datetime
    calling_ae: str
    called_ae: str
    address: str
    reason: str
    remedy: str
    count: int


class RefusalsOut(Shape):
    items: list[RefusalOut]


class ConfigurationKey(Shape):
    key: str
    value: Any


class Configuration(Shape):
    items: list[ConfigurationKey]
