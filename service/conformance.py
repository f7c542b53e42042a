"""The DICOM Conformance Statement, generated from the code that it describes, in the order of PS3.2 Annex N.

Attributes, codes, classes, syntaxes and statuses are read from the objects and tables themselves; only what no code
can say (intended use, open points) is written here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from xml.etree import ElementTree

from pydicom._uid_dict import UID_dictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    EncapsulatedPDFStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    KeyObjectSelectionDocumentStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    ParametricMapStorage,
    RLELossless,
    SegmentationStorage,
)
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

from service import commitment, custody, receiver
from service.atna import Event, Node, Peer, StudyObject, messages
from service.commitment_answers import MOST_REFERENCES, PUSH_MODEL_INSTANCE
from service.delivery import Verdict, judge
from service.report import codes, example, words
from service.report.attributes import Action
from service.report.gate import ALLOWED_WARNINGS
from service.report.identity import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from service.report.readable import walk
from service.report.structured_report import SOP_CLASSES
from service.shared.audit import AuditKind
from service.shared.settings import CHARSETS, UTF_8, ReportSettings, Settings

AUDIT_MESSAGES = {  # PS3.15 A.5.3.1 to A.5.3.15, in this order
    "110100": "Application Activity",
    "110101": "Audit Log Used",
    "110102": "Begin Transferring DICOM Instances",
    "110106": "Data Export",
    "110107": "Data Import",
    "110103": "DICOM Instances Accessed",
    "110104": "DICOM Instances Transferred",
    "110105": "DICOM Study Deleted",
    "110108": "Network Entry",
    "110112": "Query",
    "110113": "Security Alert",
    "110114": "User Authentication",
    "110109": "Order Record",
    "110110": "Patient Record",
    "110111": "Procedure Record",
}
PUSH_MODEL, FIND = UID(StorageCommitmentPushModel), UID(StudyRootQueryRetrieveInformationModelFind)
# What we send as SCU, with the transfer syntaxes proposed; which of them a destination gets is its own setting
SENT: dict[str, tuple[UID, ...]] = {
    **dict.fromkeys(
        (
            *SOP_CLASSES.values(),
            BasicTextSRStorage,
            SegmentationStorage,
            ParametricMapStorage,
            KeyObjectSelectionDocumentStorage,
            EncapsulatedPDFStorage,
        ),
        (ExplicitVRLittleEndian, ImplicitVRLittleEndian),
    ),
    MultiFrameTrueColorSecondaryCaptureImageStorage: (
        JPEG2000Lossless,
        RLELossless,
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
    ),
}
# Statuses that a destination may answer with, one of each of our reactions
_ANSWERS = (0x0000, 0xB000, 0xB006, 0xB007, 0x0107, 0x0116, 0xA700, 0xA900, 0xC000, 0x0122, 0x0124)
_REACTIONS = {
    Verdict.STORED: "delivered",
    Verdict.AGAIN: "sent again later, the same bytes",
    Verdict.REFUSED: "rejected and logged as an error; not sent again by itself",
}
_REPAIRS = {
    Action.SUPPLIED: "absent and required: written empty, or taken from the meta header or by rule",
    Action.EMPTIED: "invalid, Type 2: written empty",
    Action.DROPPED: "invalid, Type 3: left out",
    Action.REPLACED: "invalid in form but certain in meaning: written in today's form",
    Action.ASSUMED: "8-bit text under no, or a wrong, character set: read by [report] default_charset",
    Action.KEPT_INVALID: "an invalid UID of the source: kept, since another one would name another object",
}


def accepted_classes() -> list[UID]:
    """Every SOP class of the dictionary that the receiver accepts; private and newer ones are accepted too."""
    known = (UID(uid) for uid, entry in UID_dictionary.items() if entry[1] == "SOP Class")
    return sorted(uid for uid in known if uid == Verification or receiver.is_storage(uid))


def statement(settings: Settings) -> str:
    """The whole statement as Markdown. `settings` give the defaults that it quotes."""
    parts = (
        _overview(),
        _application_entity(settings),
        _receiving(),
        _vouching(settings),
        _sending(),
        _proving(),
        _objects(),
        _templates(),
        _text_and_uids(),
        _security_and_limits(),
        _audit_messages(),
    )
    return "\n".join(line for part in parts for line in part) + "\n"


def _overview() -> Iterator[str]:
    yield "# DICOM Conformance Statement of medpruner-pacs"
    yield ""
    yield "Generated by `./run conformance`; do not edit. Its form follows PS3.2 Annex N."
    yield ""
    yield (
        "Research software, not a medical device. It receives CT and MR studies, reads one series of each with a "
        "vision-language model, and returns a Structured Report that nobody has verified. It is designed to IHE AI "
        "Results (AIR); conformance to that profile is not claimed (section 8)."
    )
    yield ""
    yield "## 1. Overview"
    yield ""
    yield from _table(
        ("SOP class", "UID", "SCU", "SCP"),
        [
            ("Verification", Verification, "yes", "yes"),
            (f"{len(accepted_classes()) - 1} storage classes and any private one (section 3)", "", "", "yes"),
            *((UID(uid).name, uid, "yes", "yes") for uid in SENT),
            (PUSH_MODEL.name, PUSH_MODEL, "option", "option"),
            (FIND.name, FIND, "option", ""),
        ],
    )
    yield ""
    yield (
        "No retrieve, no worklist, no MPPS, no DICOMweb, no media. Storage commitment and query are used to prove that "
        "a result has arrived (section 4), where a destination is configured for it. Storage commitment is given where "
        "it is switched on (section 3)."
    )
    yield ""


def _application_entity(settings: Settings) -> Iterator[str]:
    scp = settings.scp
    yield "## 2. Application entity"
    yield ""
    yield (
        "One application entity receives studies (Storage SCP), waits until a study is complete (no new image for "
        "`[assembly] quiet_period_s` and no open association that sent it, or `max_open_s` after its first instance), "
        "analyses it, and sends its results (Storage SCU). Results that a PACS routes back are acknowledged and "
        "analysed never."
    )
    yield ""
    yield from _table(
        ("Property", "Value"),
        [
            ("Application context", "1.2.840.10008.3.1.1.1"),
            ("Implementation Class UID", IMPLEMENTATION_CLASS_UID),
            ("Implementation Version Name", IMPLEMENTATION_VERSION_NAME),
            ("AE title", f"{scp.ae_title} (`[scp] ae_title`)"),
            ("Port", f"{scp.port} (`[scp] port`)"),
            ("Port with TLS (`[scp] tls_port`)", "none" if scp.tls_port is None else str(scp.tls_port)),
            ("Maximum PDU received", f"{scp.max_pdu_bytes} bytes (`[scp] max_pdu_bytes`)"),
            ("Associations at one time", f"{scp.max_associations} (`[scp] max_associations`)"),
            ("Asynchronous operations", "none"),
            ("Role selection", "for the Storage Commitment Push Model only (sections 3 and 4)"),
            ("Extended negotiation, user identity", "none"),
            (
                "Who may associate",
                "calling AE titles of `[[source]]`, from their host where one is given, calling us by our AE title; "
                "anyone with `accept_unknown_sources`",
            ),
        ],
    )
    yield ""


def _receiving() -> Iterator[str]:
    yield "## 3. Storage SCP"
    yield ""
    yield "Accepted for every class below, and for every class that is not in the dictionary:"
    yield ""
    yield from _table(("Transfer syntax", "UID"), [(UID(uid).name, uid) for uid in sorted(receiver.TRANSFER_SYNTAXES)])
    yield ""
    yield (
        "Instances are stored as they were received. Of what is proposed, Explicit VR Little Endian is taken first, "
        "then what the sender proposes in its order, Implicit VR Little Endian last."
    )
    yield ""
    yield from _table(("SOP class", "UID"), [(uid.name, uid) for uid in accepted_classes()])
    yield ""
    meaning = {
        receiver.Status.SUCCESS: "the instance and its receipt are durable",
        receiver.Status.OUT_OF_RESOURCES: "no space below `[spool] min_free_gb`, or a fault of the disk",
        receiver.Status.DOES_NOT_MATCH: "the data set is not what the command announced",
        receiver.Status.NOT_HERE: "it came in a presentation context of another service",
        receiver.Status.CANNOT_UNDERSTAND: "a UID is missing or malformed",
        receiver.Status.UNREADABLE: "nothing in it can be read as a data set",
    }
    yield from _table(("Status", "Given when"), [(f"0x{status:04X}", meaning[status]) for status in receiver.Status])
    yield ""


def _vouching(settings: Settings) -> Iterator[str]:
    yield "### Storage commitment (SCP)"
    yield ""
    state = "on" if settings.scp.storage_commitment else "off"
    yield (
        f"`[scp] storage_commitment` is {state} here. Where it is off, the Push Model is refused in the negotiation. "
        "Where it is on, a `[[source]]` may ask by N-ACTION, in any uncompressed syntax, with or without proposing the "
        "SCU role. The answer is an N-EVENT-REPORT on an association that we open to its `commitment_port`, under the "
        "AE title that it called, proposing the SCP role (PS3.7 D.3.3.4) and Explicit or Implicit VR Little Endian; "
        "never on the association of the request."
    )
    yield ""
    malformed = f"Transaction UID or references are missing or malformed, or more than {MOST_REFERENCES}"
    yield from _table(
        ("Status of the N-ACTION", "Given when"),
        [
            ("0x0000", "the request is durable; it survives the death of the service"),
            ("0x0112", f"it is not of the well-known SOP Instance {PUSH_MODEL_INSTANCE}"),
            ("0x0115", malformed),
            ("0x0118", "it is not of the Push Model"),
            ("0x0123", "its Action Type ID is not 1"),
            ("0x0124", "the `[[source]]` has no `commitment_port`, so nobody could be told"),
            ("0x0213", "it cannot be kept"),
        ],
    )
    yield ""
    yield from _table(
        ("Failure Reason (0008,1197)", "Given when"),
        [
            (f"0x{custody.NO_SUCH_INSTANCE:04X}", "it was not received, or it was removed before it was asked for"),
            (f"0x{custody.CLASS_CONFLICT:04X}", "what was received under this UID is of another SOP class"),
            (f"0x{custody.PROCESSING_FAILURE:04X}", "what lies on the disk is not what was received"),
        ],
    )
    yield ""
    yield (
        "What has not failed is committed: durable, read back and equal in its SHA-256 to what was received. It is "
        "kept until its study is erased on command (`forget`); no age removes it. A report that is not answered with "
        f"Success is sent again, after {custody.FIRST_DELAY_S:g} s, then at intervals that double up to "
        f"{custody.LONGEST_DELAY_S / 3600:g} h, for {custody.GIVEN_UP_AFTER.days} days; it may come twice where the "
        "service died meanwhile. The same Transaction UID with the same references while its report waits is the same "
        "request. Retrieve AE Title and Storage Media are never given."
    )
    yield ""


def _sending() -> Iterator[str]:
    yield "## 4. Storage SCU"
    yield ""
    yield from _table(
        ("SOP class", "Transfer syntax proposed"),
        [(UID(uid).name, ", ".join(syntax.name for syntax in syntaxes)) for uid, syntaxes in SENT.items()],
    )
    yield ""
    yield "Beside the report goes what `[[route]] companions` names: none by default."
    yield ""
    yield (
        "A result is built once and sent byte for byte the same however often it is sent. A destination that does not "
        "take its encoding gets the same content and pixels in the next one of the table that it takes; "
        "`[[destination]] compression` names which of the compressed ones are proposed. Where "
        '`sr_sop_class` is a list or "auto", a report goes out in the first class of the list that is accepted; each '
        "class is an object with its own UID."
    )
    yield ""
    yield from _table(
        ("Status of the destination", "Our reaction"),
        [(f"0x{status:04X}", _REACTIONS[judge(status).verdict]) for status in _ANSWERS],
    )
    yield ""


def _proving() -> Iterator[str]:
    yield "### Storage commitment (SCU)"
    yield ""
    yield (
        "Where `storage_commitment = true`: one N-ACTION (Action Type 1) for up to 64 results after they were stored, "
        "on an association of its own, in Explicit or Implicit VR Little Endian, without role selection. The "
        f"N-EVENT-REPORT is taken on the same association within {commitment.ANSWER_WAIT_S:g} s, or on one that the "
        "destination opens to our receiver, under the AE titles that we call with and call, proposing the SCP role for "
        "the Push Model (PS3.7 D.3.3.4). It is answered 0x0000 once it is durable, 0x0115 where it is no such answer, "
        "0x0213 where it cannot be kept. A failed instance is stored again; without an answer for "
        "`commitment_timeout_s` it is asked again under another Transaction UID, at intervals that double up to a day."
    )
    yield ""
    yield "### Query (SCU)"
    yield ""
    yield (
        'Where `proof = "find"`: C-FIND of the Study Root model at IMAGE level with the Study, Series and SOP Instance '
        "UID as unique keys. A match counts as committed; a result that is not found "
        f"{commitment.NOT_FOUND_LIMIT} times is stored again."
    )
    yield ""


def _objects() -> Iterator[str]:
    yield "## 5. Objects that we create"
    yield ""
    yield (
        "Presence: ALWAYS with a value; VNAP always there, empty where the source has no value; ANAP only where there "
        "is a value; EMPTY always without one. Source: COPY from the source study, CONFIG from the configuration, "
        "AUTO generated. All are Standard Extended SOP Classes by Device UID (0018,1002) inside Contributing "
        "Equipment Sequence. Content Sequence is described in section 6."
    )
    for name, rows in object_tables().items():
        yield ""
        yield f"### {name}"
        yield ""
        yield from _table(
            ("Attribute", "Tag", "VR", "Presence", "Source"),
            [(row.name, row.tag, row.vr, row.presence, row.source) for row in rows],
        )
    yield ""


@dataclass(frozen=True, slots=True)
class AttributeRow:
    """One attribute of one kind of object, as the objects themselves show it."""

    name: str  # with `>` per level of nesting
    tag: str
    vr: str
    presence: str
    source: str


def object_tables() -> dict[str, list[AttributeRow]]:
    """What each kind of object holds, found by building it in different circumstances."""
    settings = ReportSettings(institution="Example Hospital")
    other = ReportSettings(
        institution="Other Hospital",
        manufacturer="Other",
        series_number=8801,
        series_description="Other",
        device_serial_number="2",
    )
    full = example.results(example.Circumstances(settings))
    bare = example.results(example.Circumstances(ReportSettings(), complete_source=False, follows_another=False))
    configured = example.results(example.Circumstances(other))
    return {name: list(_rows(full[name], bare[name], configured[name])) for name in full}


def _rows(
    full: Dataset, bare: Dataset | None, configured: Dataset, depth: int = 0, inherited: str | None = None
) -> Iterator[AttributeRow]:
    """inherited: the source of everything below a sequence that is copied, or refers to our own, as a whole."""
    for element in full:
        if element.keyword == "ContentSequence":
            continue
        other = None if bare is None else bare.get(element.tag)
        source = inherited or ("COPY" if element.keyword in _COPIED else "AUTO")
        if source == "AUTO" and element.VR not in ("SQ", "UI") and element.value != configured[element.tag].value:
            source = "CONFIG"
        yield AttributeRow(">" * depth + element.name, str(element.tag), element.VR, _presence(element, other), source)
        if element.VR != "SQ" or not element.value:
            continue
        if element.keyword == "ContributingEquipmentSequence":
            yield from _equipment_rows(element.value, other, configured[element.tag].value, depth + 1)
            continue
        below = inherited
        if element.keyword in _OWN:
            below = "AUTO"
        elif inherited is None and element.keyword in _REFERENCES:
            below = "COPY"
        inner = other.value[-1] if other is not None and other.value else None
        yield from _rows(element.value[-1], inner, configured[element.tag].value[-1], depth + 1, below)


def _presence(full: DataElement, bare: DataElement | None) -> str:
    if full.is_empty:
        return "EMPTY"
    if bare is None:
        return "ANAP"
    return "VNAP" if bare.is_empty else "ALWAYS"


def _equipment_rows(
    items: Sequence[Dataset], bare: DataElement | None, configured: Sequence[Dataset], depth: int
) -> Iterator[AttributeRow]:
    """Two kinds of item: the scanner, where the source names it, and the model."""
    yield AttributeRow(">" * depth + "*Item 1: acquisition equipment*", "", "", "ANAP", "COPY")
    yield from _rows(items[0], None, configured[0], depth, "COPY")
    yield AttributeRow(">" * depth + "*Item 2: processing equipment*", "", "", "ALWAYS", "AUTO")
    yield from _rows(items[-1], None if bare is None else bare.value[-1], configured[-1], depth)


# Keywords of what is copied from the source, and of references to it
_COPIED = frozenset(
    {
        "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientBirthTime", "PatientSex",
        "PatientAge", "PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence",
        "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName",
        "StudyDescription", "TimezoneOffsetFromUTC", "FrameOfReferenceUID", "BodyPartExamined", "Laterality",
        "SliceThickness", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "RequestedProcedureID",
        "RequestedProcedureDescription", "RequestedProcedureCodeSequence", "ReferencedRequestSequence",
        "PatientOrientation",
    }
)  # fmt: skip
# Sequences that refer to the source, or copy it, with all that is in them; and sequences of ours, with theirs
_REFERENCES = frozenset(
    {
        "CurrentRequestedProcedureEvidenceSequence", "DeidentificationMethodCodeSequence", "ReferencedRequestSequence",
        "ReferencedSeriesSequence", "SourceImageSequence",
    }
)  # fmt: skip
_OWN = frozenset({"PredecessorDocumentsSequence", "PurposeOfReferenceCodeSequence"})


def _templates() -> Iterator[str]:
    yield "## 6. Templates and codes"
    yield ""
    yield (
        "The Structured Report follows TID 1500 with TID 1204 (language), 1002 and 1004 (device observer), 1600 (image "
        'library, without the descriptors of TID 1602), 1501 (one measurement group, "Model input", and one for each '
        "coded finding) and 4019 (algorithm). Findings and impression are TEXT under Qualitative Evaluations. No code "
        "is derived from the model's text: coded findings are answers that the model chose among given ones, each with "
        f"its probability as a certainty. The impression begins with: {words.NOT_FOR_DIAGNOSIS!r}. The Basic Text SR "
        "follows TID 2000. Every document is UNVERIFIED and PRELIMINARY; it is PARTIAL where slices were missing or "
        "unreadable or the text was cut, and where nothing was analysed."
    )
    yield ""
    yield (
        "The image library lists every slice that the model was shown, once; the measurement group cites one of each "
        "series, where a viewer opens them. The report refers to what was made beside it (maps, masks, the printed "
        "report) and lists it as evidence; nothing of that refers to the report. A revision or a further run names "
        "the reports that it follows in Predecessor Documents Sequence, and says in a comment what changed."
    )
    yield ""
    yield (
        "A study that cannot be analysed yields no object; with `[[route]] report_refusals` it yields a report with "
        "the caution MP-111, the reason as impression, and all images of the study as evidence."
    )
    yield ""
    yield "Content items of the Structured Report:"
    yield ""
    yield from _table(("Concept", "Code", "Value type"), content_items())
    yield ""
    yield f"Private codes, coding scheme {codes.SCHEME} ({codes.SCHEME_NAME}):"
    yield ""
    yield from _table(("Code", "Meaning"), [(code.value, code.meaning) for code in private_codes()])
    yield ""


def content_items() -> list[tuple[str, str, str]]:
    """Each concept of the report once, in document order."""
    report = example.results(example.Circumstances(ReportSettings()))["Structured Report (TID 1500)"]
    found: dict[tuple[str, str, str], None] = {}
    for item in walk(report):
        name = item.ConceptNameCodeSequence[0]
        found[name.CodeMeaning, f"({name.CodeValue}, {name.CodingSchemeDesignator})", item.ValueType] = None
    return list(found)


def private_codes() -> list[Code]:
    """Every code under our own scheme, by value."""
    found: dict[str, Code] = {}
    for value in vars(codes).values():
        for code in _codes_in(value):
            if code.scheme_designator == codes.SCHEME:
                found[code.value] = code
    return [found[value] for value in sorted(found)]


def _codes_in(value: object) -> Iterator[Code]:
    if isinstance(value, Code):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _codes_in(one)
    elif isinstance(value, tuple):
        for one in value:
            yield from _codes_in(one)


def _text_and_uids() -> Iterator[str]:
    yield "## 7. Character sets, identifiers, corrections"
    yield ""
    yield (
        "All character sets of PS3.3 C.12.1.1.2 are read, with and without code extensions. Results are written in "
        "ISO_IR 192 (UTF-8), or in the set of `[[destination]] charset`, then under a SOP Instance UID of their own: "
        f"{', '.join(sorted(CHARSETS - {UTF_8}))}. A result that does not fit is not sent, and the delivery says so; "
        "no character is ever replaced. Person names keep their component groups."
    )
    yield ""
    yield (
        "UIDs of results are derived under 2.25 from the run that they belong to; the SOP Instance UID is derived from "
        "all bytes of the object, so that other bytes never carry the same UID. Each kind of object of each run is a "
        "series of its own."
    )
    yield ""
    yield "Attributes of the source that cannot be copied as they are, listed in the audit by keyword:"
    yield ""
    yield from _table(("Correction", "When"), [(action.value, _REPAIRS[action]) for action in Action])
    yield ""
    yield (
        "Every result is checked by dciodvfy and by our own assertions before it is stored for sending; one with an "
        "error is kept back. Warnings that our results earn on purpose:"
    )
    yield ""
    yield from _table(
        ("Warning of dciodvfy", "Reason"),
        [(f"`{pattern.pattern}`".replace("|", "\\|"), reason) for pattern, reason in ALLOWED_WARNINGS],
    )
    yield ""


def _security_and_limits() -> Iterator[str]:
    yield "## 8. Security, and what is open"
    yield ""
    yield (
        "- Both as SCP (`[scp] tls_port`) and as SCU (`[[destination]] tls`): the BCP 195 RFC 8996, 9325 TLS Secure "
        "Transport Connection Profile (PS3.15 B.12): TLS 1.2 or newer, ephemeral keys, authenticated encryption; "
        "certificates of the peer are checked where an authority is configured."
    )
    yield "- De-identification: none."
    yield (
        "- IHE AI Results (AIR): designed to it, from what is quoted of Rev. 1.1 in public; Rev. 1.3 was not read. "
        "Held: Comprehensive 3D SR under TID 1500; Procedure Reported is the imaging procedure; each algorithm in "
        "Contributing Equipment with a Device UID that changes with model, weights and software; Content Date and Time "
        "are the start of the analysis; tracking identifiers in every measurement group; same study, a series of its "
        "own."
    )
    yield (
        '- Open in AIR: the final code of "Processing Algorithm" in Contributing Equipment, the rules of root '
        'results and of tracking are to be checked in Rev. 1.3; the code used is (109102, DCM, "Processing '
        'Equipment").'
    )
    yield "- Private codes are to be replaced by standard ones where the Standard has them."
    yield "- No commercial PACS and no viewer was tested."


def _audit_messages() -> Iterator[str]:
    """PS3.2 N.11.2.2: which message of PS3.15 A.5.3 is sent for which events of ours, as atna.py makes them."""
    node = Node("MEDPRUNER", "medpruner-pacs", "localhost", "medpruner-pacs")
    sent: dict[str, list[str]] = {}
    for kind in AuditKind:
        event = Event(kind, datetime.fromtimestamp(0, UTC), "us", {}, StudyObject("2.25.1"), Peer("THEM", "192.0.2.1"))
        for message in messages(event, node):
            code = ElementTree.fromstring(message).find("EventIdentification/EventID")
            sent.setdefault("" if code is None else code.attrib["csd-code"], []).append(f"`{kind}`")
    yield ""
    yield "### Audit messages"
    yield ""
    yield (
        "Audit Trail Message Format Profile (PS3.15 A.5), sent by syslog (RFC 5424) over TLS (RFC 5425) where `[audit] "
        "syslog_host` names a repository; triggers and content cannot be configured. Events: `docs/operations.md`."
    )
    yield ""
    yield from _table(
        ("Audit message", "Section", "Used", "Events"),
        [
            (name, f"A.5.3.{number}", "Y" if code in sent else "N", ", ".join(sent.get(code, ("-",))))
            for number, (code, name) in enumerate(AUDIT_MESSAGES.items(), start=1)
        ],
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
