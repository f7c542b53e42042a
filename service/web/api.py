"""The REST API, version 1: what the dashboard shows and does, for programs. Every command and view is audited."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path as FilePath
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, HTTPException, Path, Query, Request, Response
from numpy.typing import NDArray
from pydantic import AwareDatetime, BaseModel
from pydicom import dcmread
from pydicom.dataset import FileDataset
from sqlalchemy.orm import Session

from service import alerts, commands, refusals
from service.report.readable import readable
from service.shared import delivery_transitions
from service.shared.audit import AuditKind
from service.shared.db import Analysis, AnalysisState, Delivery, DeliveryState, Result, Study
from service.shared.durable import digest
from service.shared.messages import AnalysisOutput, RetentionArrays
from service.shared.settings import leaves, spool_folder
from service.web import images, queries
from service.web.access import (
    AnyVisitor,
    ConfigurationReader,
    EventReader,
    Operator,
    Reader,
    TheWeb,
    Visitor,
    Web,
    record_audit_read,
    record_list,
    record_look,
    record_view,
)
from service.web.queries import Narrowing, StudyFilter
from service.web.schemas import (
    AlertOut,
    Alerts,
    AnalysisOut,
    AnalysisPage,
    AnalysisSummary,
    AnswerOut,
    Answers,
    ChartGroup,
    ChartPoint,
    Charts,
    ChartStep,
    Configuration,
    ConfigurationKey,
    DeliveryOut,
    DeliveryPage,
    DestinationOut,
    Destinations,
    Done,
    EventOut,
    EventPage,
    Overview,
    Problem,
    RefusalOut,
    RefusalsOut,
    ResultOut,
    RetentionOut,
    StudyOut,
    StudyPage,
)
from service.web.stories import analysis_stories, study_story, study_summary

NOT_SIGNED_IN: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "Nobody is signed in"},
    403: {"model": Problem, "description": "The user may not do this"},
    500: {"model": Problem, "description": "A fault of ours; the log has more under `reference`"},
    503: {"model": Problem, "description": "The database does not answer"},
}
NOT_THERE: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is no such thing"}}
NOT_CHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "As in If-None-Match"}}
PRIVATE = {"Cache-Control": "private, no-cache", "Vary": "Cookie, Authorization"}

router = APIRouter(prefix="/api/v1", responses=NOT_SIGNED_IN)

Id = Annotated[int, Path(ge=1, lt=2**63, description="Row id")]
Cursor = Annotated[str | None, Query(pattern=r"^[0-9]{1,18}$", description="`next` of the page before")]
Limit = Annotated[int, Query(ge=1, le=200)]
Text = Annotated[str | None, Query(max_length=128, pattern=r"^[^\x00]*$")]


# --- look -----------------------------------------------------------------------------------------------------------


@router.get("/overview", responses=NOT_CHANGED, response_model=Overview, tags=["look"])
def get_overview(request: Request, web: TheWeb, who: AnyVisitor) -> Response:
    """The last day at a glance, and all that is not finished."""
    with web.reading() as session:
        return _answer(request, Overview.model_validate(queries.overview(session, web.clock())))


@router.get("/studies", responses=NOT_CHANGED, response_model=StudyPage, tags=["look"])
def get_studies(
    request: Request,
    web: TheWeb,
    who: AnyVisitor,
    q: Text = None,
    state: Narrowing | None = None,
    sender: Text = None,
    since: AwareDatetime | None = None,
    until: AwareDatetime | None = None,
    patient_id: Text = None,
    accession_number: Text = None,
    route: Text = None,
    destination: Text = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """Studies, newest first. `q`: the beginning of an accession number, patient ID or name, or a whole UID.

    `since`, `until`: of the first instance, `until` itself left out. `patient_id` and `accession_number` are whole
    values, for who may see them. `route`, `destination`: of any analysis and delivery of the study.
    """
    if (patient_id or accession_number) and not who.sees_content:
        raise HTTPException(403, "your role does not include what names a patient")
    which = StudyFilter(q, state, sender, since, until, patient_id, accession_number, route, destination)
    with web.reading() as session:
        rows, following = queries.list_studies(
            session, which, before=_before(cursor), limit=limit, by_identifier=who.sees_content
        )
        page = StudyPage(items=[study_summary(row, who) for row in rows], next=_cursor(following))
    record_list(web, who, len(page.items))
    return _answer(request, page)


@router.get("/studies/{study_id}", responses=NOT_THERE | NOT_CHANGED, response_model=StudyOut, tags=["look"])
def get_study(request: Request, web: TheWeb, who: AnyVisitor, study_id: Id) -> Response:
    """One study with its series, analyses, report, results and deliveries."""
    with web.reading() as session:
        story = study_story(session, _get(session, Study, study_id), who)
    record_view(web, AuditKind.STUDY_VIEWED, who, study_id=study_id)
    return _answer(request, story)


@router.get("/studies/{study_id}/events", responses=NOT_THERE | NOT_CHANGED, response_model=EventPage, tags=["look"])
def get_study_events(
    request: Request, web: TheWeb, who: AnyVisitor, study_id: Id, cursor: Cursor = None, limit: Limit = 100
) -> Response:
    """What happened to one study, newest first."""
    with web.reading() as session:
        _get(session, Study, study_id)
        found, following = queries.list_events(session, study_id=study_id, before=_before(cursor), limit=limit)
        page = EventPage(items=[EventOut.model_validate(one) for one in found], next=_cursor(following))
    return _answer(request, page)


@router.get("/analyses", responses=NOT_CHANGED, response_model=AnalysisPage, tags=["look"])
def get_analyses(
    request: Request,
    web: TheWeb,
    who: AnyVisitor,
    state: AnalysisState | None = None,
    route: Text = None,
    study_id: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """Analyses, newest first."""
    with web.reading() as session:
        found, following = queries.list_analyses(
            session, state=state, route=route, study_id=study_id, before=_before(cursor), limit=limit
        )
        page = AnalysisPage(items=[AnalysisSummary.model_validate(one) for one in found], next=_cursor(following))
    return _answer(request, page)


@router.get("/analyses/{analysis_id}", responses=NOT_THERE | NOT_CHANGED, response_model=AnalysisOut, tags=["look"])
def get_analysis(request: Request, web: TheWeb, who: AnyVisitor, analysis_id: Id) -> Response:
    """One analysis with its settings, counts, report, results and deliveries."""
    with web.reading() as session:
        analysis = _get(session, Analysis, analysis_id)
        (story,) = analysis_stories(session, [analysis], who)
    record_view(web, AuditKind.STUDY_VIEWED, who, study_id=analysis.study_id, analysis_id=analysis_id)
    return _answer(request, story)


@router.get(
    "/analyses/{analysis_id}/retention",
    responses=NOT_THERE | NOT_CHANGED,
    response_model=RetentionOut,
    tags=["look"],
)
def get_retention(request: Request, web: TheWeb, who: AnyVisitor, analysis_id: Id) -> Response:
    """What the model was and was not shown: slices, model inputs and tokens."""
    with web.reading() as session:
        analysis = _get(session, Analysis, analysis_id)
    output, arrays = _output(web, analysis)
    record_look(web, who, analysis.study_id, analysis_id)
    return _answer(request, RetentionOut.model_validate(images.retention_map(output, arrays)))


@router.get(
    "/analyses/{analysis_id}/frames/{index}",
    responses=NOT_THERE | {200: {"content": {"application/octet-stream": {}}, "description": "int16, little endian"}},
    response_class=Response,
    tags=["look"],
)
def get_frame(web: TheWeb, who: Reader, analysis_id: Id, index: Annotated[int, Path(ge=0, lt=2**31)]) -> Response:
    """Pixels of one slice of the series that was read: row-major int16, HU for CT; `X-Rows` and `X-Columns`."""
    _, _, pixels = _frame(web, who, analysis_id, index)
    rows, columns = pixels.shape
    headers = {"X-Rows": str(rows), "X-Columns": str(columns), "Cache-Control": "no-store"}
    return Response(pixels.tobytes(), media_type="application/octet-stream", headers=headers)


@router.get(
    "/analyses/{analysis_id}/maps/{index}",
    responses=NOT_THERE | {200: {"content": {"image/png": {}}, "description": "PNG, on the grid of the slice"}},
    response_class=Response,
    tags=["look"],
)
def get_map(
    web: TheWeb,
    who: Reader,
    analysis_id: Id,
    index: Annotated[int, Path(ge=0, lt=2**31)],
    centre: Annotated[float | None, Query(ge=-32768, le=32767, description="of the window; with `width`")] = None,
    width: Annotated[float | None, Query(ge=1, le=65535)] = None,
) -> Response:
    """One slice as a picture: kept patches clear, merged ones blue, dropped ones dark red, an orange frame around a
    slice that the model never got. The same picture as in the Secondary Capture."""
    output, arrays, pixels = _frame(web, who, analysis_id, index)
    window = (centre, width) if centre is not None and width is not None else None
    content = images.map_png(output, arrays, pixels, index, window)
    return Response(content, media_type="image/png", headers={"Cache-Control": "no-store"})


@router.get("/analyses/{analysis_id}/answers", responses=NOT_THERE | NOT_CHANGED, response_model=Answers, tags=["look"])
def get_answers(request: Request, web: TheWeb, who: Reader, analysis_id: Id) -> Response:
    """The closed questions that the model was asked, and how probable it held each allowed answer."""
    with web.reading() as session:
        analysis = _get(session, Analysis, analysis_id)
    output, _ = _output(web, analysis)
    record_look(web, who, analysis.study_id, analysis_id)
    return _answer(request, Answers(items=[AnswerOut.model_validate(one) for one in output.answers]))


@router.get("/results/{result_id}", responses=NOT_THERE | NOT_CHANGED, response_model=ResultOut, tags=["look"])
def get_result(request: Request, web: TheWeb, who: AnyVisitor, result_id: Id) -> Response:
    """One result object: identity, digest, findings of the gate, deliveries."""
    with web.reading() as session:
        result = _get(session, Result, result_id)
        found = queries.results_of(session, [result.analysis_id])
        deliveries = next(deliveries for one, deliveries in found if one.id == result_id)
        shape = ResultOut(
            **{name: getattr(result, name) for name in ResultOut.model_fields if name != "deliveries"},
            deliveries=[DeliveryOut.model_validate(one) for one in deliveries],
        )
    return _answer(request, shape)


@router.get(
    "/results/{result_id}/text",
    responses=NOT_THERE | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "UTF-8"}},
    response_class=Response,
    tags=["look"],
)
def get_result_text(web: TheWeb, who: Reader, result_id: Id) -> Response:
    """A Structured Report as plain text."""
    _, document = _document(web, who, result_id)
    if document.Modality != "SR":
        raise HTTPException(404, "this result is not a Structured Report")
    return Response(readable(document), media_type="text/plain", headers=PRIVATE)


@router.get(
    "/results/{result_id}/content",
    responses=NOT_THERE
    | {200: {"content": {"application/dicom+json": {"schema": {"type": "object"}}}, "description": "PS3.18 F.2"}},
    response_class=Response,
    tags=["look"],
)
def get_result_content(web: TheWeb, who: Reader, result_id: Id) -> Response:
    """The result in the DICOM JSON model (PS3.18 Annex F); pixel data left out."""
    _, document = _document(web, who, result_id)
    if "PixelData" in document:
        del document.PixelData
    return Response(document.to_json(), media_type="application/dicom+json", headers=PRIVATE)


@router.get(
    "/results/{result_id}/file",
    responses=NOT_THERE
    | NOT_CHANGED
    | {200: {"content": {"application/dicom": {}}, "description": "A DICOM file (PS3.10), byte for byte as sent"}},
    response_class=Response,
    tags=["look"],
)
def get_result_file(request: Request, web: TheWeb, who: Reader, result_id: Id) -> Response:
    """The stored DICOM object, byte for byte as it is sent."""
    result, path = _result_path(web, result_id)
    tag = f'"{result.sha256}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={**PRIVATE, "ETag": tag})
    content = _stored(path, result)
    _note_read(web, who, result)
    headers = {
        **PRIVATE,
        "ETag": tag,
        "Content-Disposition": f'attachment; filename="{result.kind}-{result.id}.dcm"',
    }
    return Response(content, media_type="application/dicom", headers=headers)


@router.get("/deliveries", responses=NOT_CHANGED, response_model=DeliveryPage, tags=["look"])
def get_deliveries(
    request: Request,
    web: TheWeb,
    who: AnyVisitor,
    state: DeliveryState | None = None,
    destination: Text = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """Deliveries, newest first."""
    with web.reading() as session:
        found, following = queries.list_deliveries(
            session, state=state, destination=destination, before=_before(cursor), limit=limit
        )
        page = DeliveryPage(items=[DeliveryOut.model_validate(one) for one in found], next=_cursor(following))
    return _answer(request, page)


@router.get("/destinations", responses=NOT_CHANGED, response_model=Destinations, tags=["look"])
def get_destinations(request: Request, web: TheWeb, who: AnyVisitor) -> Response:
    """Every configured destination with its standing and what waits for it."""
    with web.reading() as session:
        found = queries.destinations(session, web.settings.destination)
    return _answer(request, Destinations(items=[DestinationOut.model_validate(one) for one in found]))


@router.get("/refusals", responses=NOT_CHANGED, response_model=RefusalsOut, tags=["look"])
def get_refusals(
    request: Request, web: TheWeb, who: AnyVisitor, hours: Annotated[int, Query(ge=1, le=720)] = 24
) -> Response:
    """Associations and instances that the receiver refused lately, each with the line that would let it in."""
    found = refusals.recent(spool_folder(web.settings), web.clock() - timedelta(hours=hours))
    return _answer(request, RefusalsOut(items=[RefusalOut.model_validate(one) for one in found]))


@router.get("/events", responses=NOT_CHANGED, response_model=EventPage, tags=["look"])
def get_events(
    request: Request,
    web: TheWeb,
    who: EventReader,
    kind: Annotated[AuditKind | None, Query()] = None,
    actor: Text = None,
    study_id: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
    since: AwareDatetime | None = None,
    until: AwareDatetime | None = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """Everything that happened, newest first, also what users did."""
    record_audit_read(web, who)
    with web.reading() as session:
        found, following = queries.list_events(
            session,
            kind=kind,
            actor=actor,
            study_id=study_id,
            since=since,
            until=until,
            before=_before(cursor),
            limit=limit,
        )
        page = EventPage(items=[EventOut.model_validate(one) for one in found], next=_cursor(following))
    return _answer(request, page)


@router.get("/charts", responses=NOT_CHANGED, response_model=Charts, tags=["look"])
def get_charts(
    request: Request, web: TheWeb, who: AnyVisitor, days: Annotated[int, Query(ge=1, le=366)] = 7
) -> Response:
    """How analyses went over time: all of them in steps, and the newest 2,000 one by one with their seconds by step."""
    since = web.clock() - timedelta(days=days)
    step_s = queries.bin_seconds(timedelta(days=days))
    with web.reading() as session:
        points = queries.charts(session, since)
        steps, groups = queries.over_time(session, since, step_s)
    hidden = {} if who.sees_content else {"scanner": None, "protocol": None}  # free text of the modality
    return _answer(
        request,
        Charts(
            points=[ChartPoint.model_validate(point | hidden) for point in points],
            step_s=step_s,
            steps=[ChartStep.model_validate(one) for one in steps],
            groups=[ChartGroup.model_validate(one) for one in groups] if who.sees_content else [],
        ),
    )


@router.get("/alerts", responses=NOT_CHANGED, response_model=Alerts, tags=["look"])
def get_alerts(request: Request, web: TheWeb, who: AnyVisitor) -> Response:
    """What a person should know of now, the most severe first. No patient is named."""
    with web.reading() as session:
        found = alerts.current(session, web.settings, web.clock())
    return _answer(request, Alerts(items=[AlertOut.model_validate(one) for one in found]))


@router.get("/configuration", responses=NOT_CHANGED, response_model=Configuration, tags=["look"])
def get_configuration(request: Request, web: TheWeb, who: ConfigurationReader) -> Response:
    """Every key as resolved, secrets masked."""
    items = [ConfigurationKey(key=key, value=value) for key, value in leaves(web.settings)]
    return _answer(request, Configuration(items=items))


# --- change ---------------------------------------------------------------------------------------------------------


@router.post("/studies/{study_id}/requeue", responses=NOT_THERE, tags=["change"])
def post_requeue(web: TheWeb, who: Operator, study_id: Id, again: Annotated[bool, Body(embed=True)] = False) -> Done:
    """Resume what failed, was rejected or is held; with `again`, run every route of the study once more."""
    with web.sessions.begin() as session:
        study = _get(session, Study, study_id)
        done = commands.requeue(session, study, web.settings, again=again, now=web.clock(), actor=who.actor)
    return Done(done=done)


@router.post("/studies/{study_id}/cancel", responses=NOT_THERE, tags=["change"])
def post_cancel(web: TheWeb, who: Operator, study_id: Id) -> Done:
    """Cancel what is queued for a study; what runs is finished."""
    with web.sessions.begin() as session:
        count = commands.cancel(session, _get(session, Study, study_id), now=web.clock(), actor=who.actor)
    return Done(done=[f"{count} analyses cancelled"] if count else [])


@router.post(
    "/deliveries/{delivery_id}/resend",
    responses=NOT_THERE | {409: {"model": Problem, "description": "It is pending already"}},
    tags=["change"],
)
def post_resend(web: TheWeb, who: Operator, delivery_id: Id) -> Done:
    """Send the stored bytes once more to the same destination."""
    with web.sessions.begin() as session:
        delivery = _get(session, Delivery, delivery_id)
        if not delivery_transitions.resend_delivery(session, delivery_id, now=web.clock(), actor=who.actor):
            raise HTTPException(409, "this delivery is pending already")
    return Done(done=[f"result {delivery.result_id} is on its way to {delivery.destination} again"])


@router.post(
    "/results/{result_id}/resend",
    responses=NOT_THERE | {409: {"model": Problem, "description": "It cannot be sent"}},
    tags=["change"],
)
def post_result_resend(
    web: TheWeb, who: Operator, result_id: Id, destination: Annotated[str, Body(embed=True, max_length=32)]
) -> Done:
    """Send the stored bytes to a destination, again or for the first time."""
    result, path = _result_path(web, result_id)
    if destination not in {one.name for one in web.settings.destination}:
        raise HTTPException(404, "no [[destination]] has this name")
    _stored(path, result)
    with web.sessions.begin() as session:
        sent = delivery_transitions.resend_result(session, result_id, destination, now=web.clock(), actor=who.actor)
    if sent is None:
        raise HTTPException(409, "a result that did not pass the gate is never sent")
    return Done(done=[f"result {result_id} is on its way to {destination}"])


class Standing(BaseModel):
    """What a destination should be."""

    paused: bool


@router.put("/destinations/{name}", responses=NOT_THERE, tags=["change"])
def put_destination(
    web: TheWeb,
    who: Operator,
    name: Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")],
    standing: Standing,
) -> Done:
    """Pause a destination, so that its deliveries wait, or resume it."""
    if name not in {one.name for one in web.settings.destination}:
        raise HTTPException(404, "no [[destination]] has this name")
    with web.sessions.begin() as session:
        change = delivery_transitions.pause_destination if standing.paused else delivery_transitions.resume_destination
        changed = change(session, name, now=web.clock(), actor=who.actor)
    return Done(done=[f"{name} is {'paused' if standing.paused else 'resumed'}"] if changed else [])


# --- inside ---------------------------------------------------------------------------------------------------------


def _answer(request: Request, content: BaseModel) -> Response:
    """JSON with an ETag over its bytes; 304 when the caller has them already."""
    body = content.model_dump_json().encode()
    tag = f'"{digest(body)[:32]}"'
    headers = {**PRIVATE, "ETag": tag}
    if tag in (part.strip() for part in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def _get(session: Session, table: type[Any], row_id: int) -> Any:
    row = session.get(table, row_id)
    if row is None:
        raise HTTPException(404, f"there is no {table.__tablename__} {row_id}")
    return row


def _before(cursor: str | None) -> int | None:
    return None if cursor is None else int(cursor)


def _cursor(row_id: int | None) -> str | None:
    return None if row_id is None else str(row_id)


def _output(web: Web, analysis: Analysis) -> tuple[AnalysisOutput, RetentionArrays]:
    try:
        return images.read_output(web.settings, analysis)
    except images.NotShowable as error:
        raise HTTPException(404, str(error)) from error


def _frame(
    web: Web, who: Visitor, analysis_id: int, index: int
) -> tuple[AnalysisOutput, RetentionArrays, NDArray[np.int16]]:
    with web.reading() as session:
        analysis = _get(session, Analysis, analysis_id)
        output, arrays = _output(web, analysis)
        try:
            pixels = images.frame(session, web.settings, analysis, output, index)
        except images.NotShowable as error:
            raise HTTPException(404, str(error)) from error
    record_look(web, who, analysis.study_id, analysis_id)
    return output, arrays, pixels


def _result_path(web: Web, result_id: int) -> tuple[Result, FilePath]:
    with web.reading() as session:
        result: Result = _get(session, Result, result_id)
    return result, web.settings.data.path / result.path


def _stored(path: FilePath, result: Result) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise HTTPException(404, "the stored object has been removed") from error
    if digest(content) != result.sha256:
        raise HTTPException(404, "the stored object does not match its recorded digest")
    return content


def _document(web: Web, who: Visitor, result_id: int) -> tuple[Result, FileDataset]:
    result, path = _result_path(web, result_id)
    _stored(path, result)
    _note_read(web, who, result)
    return result, dcmread(path)


def _note_read(web: Web, who: Visitor, result: Result) -> None:
    with web.reading() as session:
        study_id = session.get_one(Analysis, result.analysis_id).study_id
    record_view(web, AuditKind.RESULT_READ, who, study_id=study_id, analysis_id=result.analysis_id, result_id=result.id)
