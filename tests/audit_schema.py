"""The grammar of DICOM audit messages (PS3.15 A.5.1.1, RELAX NG compact there), as tables that a test can walk.

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
            ("ParticipantObjectName", 1, 1),  # or ParticipantObjectQuery, which we never write
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
    **dict.fromkeys(("EventID", "EventTypeCode", "RoleIDCode", "ParticipantObjectIDTypeCode"), CODED),
}


def faults(content: bytes) -> list[str]:
    """What the grammar does not allow; empty for a valid message."""
    root = ET.fromstring(content)
    return [f"root is {root.tag}"] if root.tag != "AuditMessage" else _faults(root)


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
    for name, least, most in rule.children:
        if not least <= tags.count(name) <= (most if most is not None else len(tags)):
            found.append(f"{element.tag} has {tags.count(name)} {name}")
    return [*found, *(fault for child in element for fault in _faults(child))]
