"""The grammar of DICOM audit messages (PS3.15 A.5.1, RELAX NG compact there) and the constraints of each message
(A.5.3.1 to A.5.3.12), as tables that a test can walk.

Written from the Standard by hand, for lack of a RELAX NG validator among the packages of this project.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from xml.etree import ElementTree as ET

ANY = re.compile(r"(?s).*")
TOKEN = re.compile(r"\S+( \S+)*")
DATE_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)?")
BOOLEAN = re.compile(r"true|false|0|1")
INTEGER = re.compile(r"[+-]?\d+")
BASE64 = re.compile(r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


def one_of(first: int, last: int) -> re.Pattern[str]:
    return re.compile("|".join(str(number) for number in range(first, last + 1)))


@dataclass(frozen=True)
class Rule:
    """attributes: name -> pattern; those of `optional` may be missing. children: in order, (name, least, most)."""

    attributes: dict[str, re.Pattern[str]] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    children: tuple[tuple[str, int, int | None], ...] = ()
    text: re.Pattern[str] | None = None


CODED = Rule(
    {"csd-code": TOKEN, "codeSystemName": TOKEN, "displayName": TOKEN, "originalText": TOKEN},
    frozenset({"displayName"}),
)
RULES = {
    "AuditMessage": Rule(
        children=(
            ("EventIdentification", 1, 1),
            ("ActiveParticipant", 1, None),
            ("AuditSourceIdentification", 1, 1),
            ("ParticipantObjectIdentification", 0, None),
        )
    ),
    "EventIdentification": Rule(
        {
            "EventActionCode": re.compile("[CRUDE]"),
            "EventDateTime": DATE_TIME,
            "EventOutcomeIndicator": re.compile("0|4|8|12"),
        },
        frozenset({"EventActionCode"}),
        (("EventID", 1, 1), ("EventTypeCode", 0, None), ("EventOutcomeDescription", 0, 1)),
    ),
    "ActiveParticipant": Rule(
        {
            "UserID": ANY,
            "AlternativeUserID": ANY,
            "UserName": ANY,
            "UserIsRequestor": BOOLEAN,
            "NetworkAccessPointID": TOKEN,
            "NetworkAccessPointTypeCode": one_of(1, 5),
        },
        frozenset({"AlternativeUserID", "UserName", "NetworkAccessPointID", "NetworkAccessPointTypeCode"}),
        (("RoleIDCode", 0, None), ("MediaIdentifier", 0, 1)),
    ),
    "AuditSourceIdentification": Rule(
        {"AuditEnterpriseSiteID": TOKEN, "AuditSourceID": TOKEN},
        frozenset({"AuditEnterpriseSiteID"}),
        (("AuditSourceTypeCode", 0, None),),
    ),
    "AuditSourceTypeCode": Rule(
        {"csd-code": TOKEN, "codeSystemName": TOKEN, "displayName": TOKEN, "originalText": TOKEN},
        frozenset({"codeSystemName", "displayName", "originalText"}),
    ),
    "ParticipantObjectIdentification": Rule(
        {
            "ParticipantObjectID": TOKEN,
            "ParticipantObjectTypeCode": one_of(1, 4),
            "ParticipantObjectTypeCodeRole": one_of(1, 26),
            "ParticipantObjectDataLifeCycle": one_of(1, 15),
            "ParticipantObjectSensitivity": TOKEN,
        },
        frozenset(
            {
                "ParticipantObjectTypeCode",
                "ParticipantObjectTypeCodeRole",
                "ParticipantObjectDataLifeCycle",
                "ParticipantObjectSensitivity",
            }
        ),
        (
            ("ParticipantObjectIDTypeCode", 1, 1),
            ("ParticipantObjectName", 0, 1),  # one of these two
            ("ParticipantObjectQuery", 0, 1),
            ("ParticipantObjectDetail", 0, None),
            ("ParticipantObjectDescription", 0, None),
        ),
    ),
    "ParticipantObjectDescription": Rule(
        children=(
            ("MPPS", 0, None),
            ("Accession", 0, None),
            ("SOPClass", 0, None),
            ("ParticipantObjectContainsStudy", 0, 1),
            ("Encrypted", 0, 1),
            ("Anonymized", 0, 1),
        )
    ),
    "Accession": Rule({"Number": TOKEN}),
    "SOPClass": Rule({"UID": TOKEN, "NumberOfInstances": INTEGER}, frozenset({"UID"}), (("Instance", 0, None),)),
    "Instance": Rule({"UID": TOKEN}),
    "ParticipantObjectName": Rule(text=TOKEN),
    "ParticipantObjectQuery": Rule(text=BASE64),
    **dict.fromkeys(("EventID", "EventTypeCode", "RoleIDCode", "ParticipantObjectIDTypeCode"), CODED),
}


SOURCE, DESTINATION, APPLICATION = "110153", "110152", "110150"
STUDY, PATIENT, LOG, ASKED = ("2", "3", "110180"), ("1", "1", "2"), ("2", "13", "12"), ("2", "3", None)
ALERT_TYPES = frozenset(str(code) for code in range(110126, 110143))  # CID 403


@dataclass(frozen=True)
class Constraints:
    """Of one message: actions, type codes (none: may be absent), roles that stand once, objects that must be there."""

    section: str
    actions: str
    types: frozenset[str] = frozenset()
    roles: tuple[str, ...] = ()
    objects: tuple[tuple[str, str, str | None], ...] = ()
    addressed: bool = False  # the first participant's network access point is mandatory
    most_participants: int | None = None


MESSAGES = {
    "110100": Constraints("A.5.3.1", "E", frozenset({"110120", "110121"}), (APPLICATION,)),
    "110101": Constraints("A.5.3.2", "R", objects=(LOG,), most_participants=2),
    "110102": Constraints("A.5.3.3", "E", roles=(SOURCE, DESTINATION), objects=(STUDY, PATIENT)),
    "110103": Constraints("A.5.3.6", "CRUD", objects=(STUDY, PATIENT), most_participants=2),
    "110104": Constraints("A.5.3.7", "CRU", roles=(SOURCE, DESTINATION), objects=(STUDY, PATIENT)),
    "110105": Constraints("A.5.3.8", "D", objects=(STUDY, PATIENT), most_participants=2),
    "110112": Constraints("A.5.3.10", "E", roles=(SOURCE, DESTINATION), objects=(ASKED,)),
    "110113": Constraints("A.5.3.11", "E", ALERT_TYPES),
    "110114": Constraints("A.5.3.12", "E", frozenset({"110122", "110123"}), addressed=True, most_participants=2),
}


def faults(content: bytes) -> list[str]:
    """What the grammar does not allow; empty for a valid message."""
    root = ET.fromstring(content)
    return [f"root is {root.tag}"] if root.tag != "AuditMessage" else _faults(root)


def faults_of_kind(content: bytes) -> list[str]:
    """What the table of this message in A.5.3 does not allow."""
    root = ET.fromstring(content)
    event = root.find("EventIdentification")
    assert event is not None
    (code,) = (one.attrib["csd-code"] for one in event.findall("EventID"))
    wanted = MESSAGES[code]
    types = {one.attrib["csd-code"] for one in event.findall("EventTypeCode")}
    participants = root.findall("ActiveParticipant")
    roles = [one.attrib["csd-code"] for each in participants for one in each.findall("RoleIDCode")]
    objects = [
        (one.attrib["ParticipantObjectTypeCode"], one.attrib["ParticipantObjectTypeCodeRole"], one)
        for one in root.findall("ParticipantObjectIdentification")
    ]
    found = []
    if event.attrib["EventActionCode"] not in wanted.actions:
        found.append(f"{wanted.section} allows no action {event.attrib['EventActionCode']}")
    if (wanted.types or types) and not (types and types <= wanted.types):
        found.append(f"{wanted.section} allows no types {types}")
    found += [f"{wanted.section} wants one {role}" for role in wanted.roles if roles.count(role) != 1]
    for type_code, role, id_type in wanted.objects:
        ids = [
            one.find("ParticipantObjectIDTypeCode").attrib["csd-code"]  # type: ignore[union-attr]
            for *what, one in objects
            if what == [type_code, role]
        ]
        if not ids or (id_type is not None and set(ids) != {id_type}):
            found.append(f"{wanted.section} wants an object {type_code}, {role}, {id_type}")
    if wanted.addressed and "NetworkAccessPointID" not in participants[0].attrib:
        found.append(f"{wanted.section} wants the address of the person")
    if wanted.most_participants is not None and len(participants) > wanted.most_participants:
        found.append(f"{wanted.section} allows {wanted.most_participants} participants")
    return found


def _faults(element: ET.Element) -> list[str]:
    rule = RULES.get(element.tag)
    if rule is None:
        return [f"{element.tag} is unknown here"]
    found = [
        f"{element.tag} has no {name}"
        for name in rule.attributes
        if name not in element.attrib | dict.fromkeys(rule.optional)
    ]
    for name, value in element.attrib.items():
        if name not in rule.attributes or not rule.attributes[name].fullmatch(value):
            found.append(f"{element.tag} {name}={value!r}")
    text = element.text or ""
    if (rule.text is None and text.strip()) or (rule.text is not None and not rule.text.fullmatch(text)):
        found.append(f"{element.tag} holds {text!r}")
    tags = [child.tag for child in element]
    order = [name for name, _, _ in rule.children]
    if any(tag not in order for tag in tags) or tags != sorted(tags, key=order.index):
        found.append(f"{element.tag} has children {tags}, expected {order}")
    if element.tag == "ParticipantObjectIdentification":
        named = [tag for tag in tags if tag in ("ParticipantObjectName", "ParticipantObjectQuery")]
        found += [] if len(named) == 1 else [f"{element.tag} has {named}, expected one"]
    for name, least, most in rule.children:
        if not least <= tags.count(name) <= (most if most is not None else len(tags)):
            found.append(f"{element.tag} has {tags.count(name)} {name}")
    return [*found, *(fault for child in element for fault in _faults(child))]
