"""Audit events -> DICOM audit messages (PS3.15 A.5) as XML. Pure: knows neither the database nor the network.

One message per event of the audit that the Standard has a message for; none for the others (docs/operations.md says
which and why). EventDateTime is the time on record, for a transfer that of its end, also in Begin Transferring.
"""

from __future__ import annotations

import ipaddress
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from xml.etree import ElementTree as ET

from service.shared.audit import AuditKind

Code = tuple[str, str, str]  # csd-code, codeSystemName, originalText


def _dcm(code: str, meaning: str) -> Code:
    return code, "DCM", meaning


# PS3.16 CID 400, 401, 402, 404, 405
APPLICATION_ACTIVITY = _dcm("110100", "Application Activity")
AUDIT_LOG_USED = _dcm("110101", "Audit Log Used")
BEGIN_TRANSFERRING = _dcm("110102", "Begin Transferring DICOM Instances")
INSTANCES_ACCESSED = _dcm("110103", "DICOM Instances Accessed")
INSTANCES_TRANSFERRED = _dcm("110104", "DICOM Instances Transferred")
STUDY_DELETED = _dcm("110105", "DICOM Study Deleted")
QUERY = _dcm("110112", "Query")
SECURITY_ALERT = _dcm("110113", "Security Alert")
USER_AUTHENTICATION = _dcm("110114", "User Authentication")
APPLICATION_START, APPLICATION_STOP = _dcm("110120", "Application Start"), _dcm("110121", "Application Stop")
LOGIN, LOGOUT = _dcm("110122", "Login"), _dcm("110123", "Logout")
SOFTWARE_CONFIGURATION = _dcm("110131", "Software Configuration")
NODE_AUTHENTICATION = _dcm("110126", "Node Authentication")
SECURITY_ATTRIBUTES_CHANGED = _dcm("110137", "User Security Attributes Changed")
APPLICATION, DESTINATION, SOURCE = (
    _dcm("110150", "Application"),
    _dcm("110152", "Destination Role ID"),
    _dcm("110153", "Source Role ID"),
)
STUDY_INSTANCE_UID, SOP_CLASS_UID = _dcm("110180", "Study Instance UID"), _dcm("110181", "SOP Class UID")
# PS3.15 A.5.2.5, from RFC 3881
PATIENT_NUMBER: Code = ("2", "RFC-3881", "Patient Number")
URI: Code = ("12", "RFC-3881", "URI")

SUCCESS, MINOR_FAILURE, SERIOUS_FAILURE = "0", "4", "8"
APPLICATION_SERVER = "4"  # AuditSourceTypeCode
PERSON, SYSTEM_OBJECT = "1", "2"
PATIENT, REPORT, SECURITY_RESOURCE = "1", "3", "13"
IP_ADDRESS, MACHINE_NAME = "2", "1"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"


@dataclass(frozen=True, slots=True)
class Node:
    """Who we are in every message."""

    ae_title: str
    process: str  # what UserID names beside the AE title
    host: str
    source_id: str
    enterprise_site_id: str | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a transfer."""

    ae_title: str
    address: str


@dataclass(frozen=True, slots=True)
class StudyObject:
    """What a message says of the study; empty where it was never known or is forgotten."""

    study_uid: str
    accession_number: str = ""
    patient_id: str = ""
    patient_name: str = ""
    sop_classes: tuple[tuple[str, int], ...] = ()  # UID, number of instances


@dataclass(frozen=True, slots=True)
class Event:
    """One event of the audit with what it speaks of."""

    kind: str
    at: datetime
    actor: str
    detail: dict[str, Any]
    study: StudyObject | None = None
    peer: Peer | None = None
    series_uid: str = ""  # of the result that it speaks of
    sop_instance_uid: str = ""


RECEIVED = {  # action of DICOM Instances Transferred, by what the receiver held before (A.5.3.7)
    AuditKind.INSTANCES_RECEIVED: "C",
    AuditKind.INSTANCES_RECEIVED_AGAIN: "R",
    AuditKind.INSTANCE_CONFLICT: "U",
    AuditKind.RESULT_RETURNED: "R",
}
OUTCOMES = {
    AuditKind.DELIVERY_DELIVERED: SUCCESS,
    AuditKind.DELIVERY_POSTPONED: MINOR_FAILURE,
    AuditKind.DELIVERY_REJECTED: SERIOUS_FAILURE,
}
ACCESSED = {  # action and outcome of DICOM Instances Accessed (A.5.3.6)
    AuditKind.ANALYSIS_STARTED: ("R", SUCCESS),
    AuditKind.RESULT_BUILT: ("C", SUCCESS),
    AuditKind.RESULT_QUARANTINED: ("C", MINOR_FAILURE),  # it is stored, and never leaves
    AuditKind.RESULTS_REMOVED: ("D", SUCCESS),  # some instances of the study, not all
    AuditKind.STUDY_VIEWED: ("R", SUCCESS),
    AuditKind.RESULT_READ: ("R", SUCCESS),
}
DELETED = (AuditKind.SPOOL_REMOVED, AuditKind.STUDY_FORGOTTEN)
LOG_USED = (AuditKind.AUDIT_EXPORTED, AuditKind.AUDIT_READ)
CONFIGURED = (AuditKind.DESTINATION_PAUSED, AuditKind.DESTINATION_RESUMED)
ACCOUNTS = (AuditKind.USER_ADDED, AuditKind.USER_CHANGED, AuditKind.USER_REMOVED, AuditKind.TOKEN_MADE)
SIGNED = {
    AuditKind.SIGNED_IN: (LOGIN, SUCCESS),
    AuditKind.SIGN_IN_FAILED: (LOGIN, MINOR_FAILURE),
    AuditKind.SIGNED_OUT: (LOGOUT, SUCCESS),
}


def messages(event: Event, node: Node) -> list[bytes]:
    """The messages of one event, in order; UTF-8 XML without a byte order mark."""
    return [_serialised(one, node) for one in _messages(event, node)]


def _messages(event: Event, node: Node) -> Iterable[ET.Element]:
    kind, us = event.kind, _Us(node)
    if kind in (AuditKind.SERVICE_STARTED, AuditKind.SERVICE_STOPPED):
        started = kind == AuditKind.SERVICE_STARTED
        which = APPLICATION_START if started else APPLICATION_STOP
        yield _message(event, APPLICATION_ACTIVITY, "E", SUCCESS, [us.active((APPLICATION,), False)], types=[which])
    elif kind in RECEIVED and event.peer is not None:
        ends = [_peer(event.peer, SOURCE, requestor=True), us.active((DESTINATION,), False)]
        yield _message(event, INSTANCES_TRANSFERRED, RECEIVED[AuditKind(kind)], SUCCESS, ends, objects=_study(event))
    elif kind in OUTCOMES and event.peer is not None:
        ends = [us.active((SOURCE,), True), _peer(event.peer, DESTINATION, requestor=False)]
        yield _message(event, BEGIN_TRANSFERRING, "E", SUCCESS, ends, objects=_study(event))
        ends = [us.active((SOURCE,), True), _peer(event.peer, DESTINATION, requestor=False)]
        yield _message(event, INSTANCES_TRANSFERRED, "R", OUTCOMES[AuditKind(kind)], ends, objects=_study(event))
    elif kind in ACCESSED:
        action, outcome = ACCESSED[AuditKind(kind)]
        yield _message(event, INSTANCES_ACCESSED, action, outcome, [_person(event)], objects=_study(event))
    elif kind in DELETED:
        yield _message(event, STUDY_DELETED, "D", SUCCESS, [_person(event)], objects=_study(event))
    elif kind == AuditKind.STUDIES_LISTED:
        ends = [_person(event, (SOURCE,)), us.active((DESTINATION,), False)]
        # what was looked for may name a patient and is not kept: the query is empty
        query = _object("/studies", SYSTEM_OBJECT, REPORT, URI, query=b"")
        yield _message(event, QUERY, "E", SUCCESS, ends, objects=[query])
    elif kind == AuditKind.DELIVERY_SOUGHT and event.peer is not None:
        ends = [us.active((SOURCE,), True), _peer(event.peer, DESTINATION, requestor=False)]
        yield _message(event, QUERY, "E", SUCCESS, ends, objects=[_find(event)])
    elif kind in LOG_USED:
        log = _object("audit_event", SYSTEM_OBJECT, SECURITY_RESOURCE, URI, name="Security Audit Log")
        yield _message(event, AUDIT_LOG_USED, "R", SUCCESS, [_person(event)], objects=[log])
    elif kind in CONFIGURED or kind in ACCOUNTS:
        which = SOFTWARE_CONFIGURATION if kind in CONFIGURED else SECURITY_ATTRIBUTES_CHANGED
        ends = [us.active((APPLICATION,), False), _person(event)]
        yield _message(event, SECURITY_ALERT, "E", SUCCESS, ends, types=[which])
    elif kind == AuditKind.ASSOCIATION_REFUSED and event.peer is not None:
        ends = [us.active((DESTINATION,), False), _peer(event.peer, SOURCE, requestor=False)]
        yield _message(event, SECURITY_ALERT, "E", MINOR_FAILURE, ends, types=[NODE_AUTHENTICATION])
    elif kind in SIGNED:
        which, outcome = SIGNED[AuditKind(kind)]
        ends = [_person(event, address=str(event.detail.get("address") or node.host)), us.active((APPLICATION,), False)]
        yield _message(event, USER_AUTHENTICATION, "E", outcome, ends, types=[which])


# --- parts ----------------------------------------------------------------------------------------------------------


def _message(
    event: Event,
    identity: Code,
    action: str,
    outcome: str,
    participants: Sequence[ET.Element],
    *,
    types: Sequence[Code] = (),
    objects: Sequence[ET.Element] = (),
) -> ET.Element:
    """Event and participants; the source is added when it is serialised."""
    message = ET.Element("AuditMessage")
    identification = ET.SubElement(
        message,
        "EventIdentification",
        EventActionCode=action,
        EventDateTime=event.at.isoformat(timespec="milliseconds"),
        EventOutcomeIndicator=outcome,
    )
    _code(identification, "EventID", identity)
    for one in types:
        _code(identification, "EventTypeCode", one)
    message.extend(participants)
    message.extend(objects)
    return message


def _serialised(message: ET.Element, node: Node) -> bytes:
    source = ET.Element("AuditSourceIdentification", AuditSourceID=node.source_id)
    if node.enterprise_site_id:
        source.set("AuditEnterpriseSiteID", node.enterprise_site_id)
    ET.SubElement(source, "AuditSourceTypeCode", {"csd-code": APPLICATION_SERVER})
    last = max(index for index, one in enumerate(message) if one.tag == "ActiveParticipant")
    message.insert(last + 1, source)
    content: bytes = ET.tostring(message, encoding="utf-8", xml_declaration=True)
    return content


@dataclass(frozen=True, slots=True)
class _Us:
    node: Node

    def active(self, roles: Sequence[Code], requestor: bool) -> ET.Element:
        return _participant(
            self.node.process,
            roles,
            requestor=requestor,
            alternative=f"AETITLES={self.node.ae_title}",
            address=self.node.host,
        )


def _peer(peer: Peer, role: Code, *, requestor: bool) -> ET.Element:
    return _participant(
        _clean(peer.ae_title) or "unknown",
        (role,),
        requestor=requestor,
        alternative=f"AETITLES={_clean(peer.ae_title)}" if peer.ae_title else None,
        address=peer.address,
    )


def _person(event: Event, roles: Sequence[Code] = (), *, address: str | None = None) -> ET.Element:
    """Who did it: a person of the web or the command line, or one of our programs, as the event names it."""
    return _participant(_clean(event.actor), roles, requestor=True, address=address)


def _participant(
    user: str,
    roles: Sequence[Code],
    *,
    requestor: bool,
    alternative: str | None = None,
    address: str | None = None,
) -> ET.Element:
    participant = ET.Element("ActiveParticipant", UserID=user, UserIsRequestor="true" if requestor else "false")
    if alternative:
        participant.set("AlternativeUserID", alternative)
    if address:
        participant.set("NetworkAccessPointID", address)
        participant.set("NetworkAccessPointTypeCode", IP_ADDRESS if _is_ip_address(address) else MACHINE_NAME)
    for role in roles:
        _code(participant, "RoleIDCode", role)
    return participant


def _study(event: Event) -> list[ET.Element]:
    """The study and its patient; the patient is left out once forgotten, for no name is better than a made-up one."""
    if event.study is None:
        return []
    study = event.study
    found = [_object(study.study_uid, SYSTEM_OBJECT, REPORT, STUDY_INSTANCE_UID, name=study.study_uid)]
    description = ET.SubElement(found[0], "ParticipantObjectDescription")
    if study.accession_number:
        ET.SubElement(description, "Accession", Number=_clean(study.accession_number))
    for uid, count in study.sop_classes:
        ET.SubElement(description, "SOPClass", UID=uid, NumberOfInstances=str(count))
    if study.patient_id or study.patient_name:
        identifier = _clean(study.patient_id) or "unknown"
        name = _clean(study.patient_name) or identifier
        found.append(_object(identifier, PERSON, PATIENT, PATIENT_NUMBER, name=name))
    return found


def _find(event: Event) -> ET.Element:
    """A C-FIND as its Identifier in the Native DICOM Model (PS3.19 A.1), which is what A.5.3.10 asks for."""
    study_uid = event.study.study_uid if event.study else ""
    model = ET.Element("NativeDicomModel")
    for tag, vr, keyword, value in (
        ("00080018", "UI", "SOPInstanceUID", event.sop_instance_uid),
        ("00080052", "CS", "QueryRetrieveLevel", "IMAGE"),
        ("0020000D", "UI", "StudyInstanceUID", study_uid),
        ("0020000E", "UI", "SeriesInstanceUID", event.series_uid),
    ):
        attribute = ET.SubElement(model, "DicomAttribute", {"tag": tag, "vr": vr, "keyword": keyword})
        ET.SubElement(attribute, "Value", number="1").text = value
    return _object(STUDY_ROOT_FIND, SYSTEM_OBJECT, REPORT, SOP_CLASS_UID, query=ET.tostring(model, encoding="utf-8"))


def _object(
    identifier: str, type_code: str, role: str, kind: Code, *, name: str = "", query: bytes | None = None
) -> ET.Element:
    """Its name or, of a query, what was asked."""
    one = ET.Element(
        "ParticipantObjectIdentification",
        ParticipantObjectID=identifier,
        ParticipantObjectTypeCode=type_code,
        ParticipantObjectTypeCodeRole=role,
    )
    _code(one, "ParticipantObjectIDTypeCode", kind)
    if query is None:
        ET.SubElement(one, "ParticipantObjectName").text = name
    else:
        ET.SubElement(one, "ParticipantObjectQuery").text = b64encode(query).decode()
    return one


def _code(parent: ET.Element, name: str, code: Code) -> None:
    ET.SubElement(parent, name, {"csd-code": code[0], "codeSystemName": code[1], "originalText": code[2]})


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _clean(text: str) -> str:
    """Without the control characters that XML 1.0 cannot hold at all."""
    return "".join(one if one >= " " and one not in "\ufffe\uffff" else "?" for one in text)
