"""Requests for storage commitment that come to us (PS3.4 J.3.2), and our reports of them (J.3.3): wire and files.

    commitment-requests/<digest>.json   one N-ACTION that was answered with Success; waits for ingest (custody.py)
    commitment-reports/<digest>.json    what we vouch for and what not; waits until the requester has taken it

Both below the spool, so that a request is as durable as an instance and is taken while the database is away. Knows no
database and no network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from pydicom.dataset import Dataset

from service.commitment_answers import MOST_REFERENCES, kept_in
from service.shared.durable import digest, make_folder, write_durably

REQUESTS, REPORTS = "commitment-requests", "commitment-reports"
REQUEST_STORAGE_COMMITMENT = 1  # Action Type ID, PS3.4 table J.3-1
ALL_COMMITTED, FAILURES_EXIST = 1, 2  # Event Type ID, PS3.4 table J.3-2

_UID = re.compile(r"[0-9.]{1,64}")

Uid = Annotated[str, Field(max_length=64)]


class BadRequest(Exception):
    """An N-ACTION that is no request for storage commitment; the message names attributes, never values."""


class Reference(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sop_class_uid: Uid
    sop_instance_uid: Uid


class Request(BaseModel):
    """One transaction, and who asked for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transaction_uid: Uid
    references: tuple[Reference, ...]
    calling_ae: str
    called_ae: str
    address: str
    association_id: str
    requested_at: AwareDatetime

    @property
    def name(self) -> str:
        """Of its file: the same request again, whenever and on whichever association, has the same."""
        pairs = [(one.sop_class_uid, one.sop_instance_uid) for one in self.references]
        return digest(json.dumps([self.calling_ae, self.transaction_uid, pairs]).encode())[:40] + ".json"


class Report(BaseModel):
    """What becomes of a request. What is not in `failed` is committed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: Request
    failed: dict[str, int]  # SOP Instance UID -> Failure Reason (0008,1197)

    @property
    def event_type(self) -> int:
        return FAILURES_EXIST if self.failed else ALL_COMMITTED

    def event_information(self) -> Dataset:
        """PS3.4 table J.3-2. A sequence that would be empty is left out."""
        information = Dataset()
        information.TransactionUID = self.request.transaction_uid
        committed, failed = [], []
        for one in self.request.references:
            item = Dataset()
            item.ReferencedSOPClassUID = one.sop_class_uid
            item.ReferencedSOPInstanceUID = one.sop_instance_uid
            if one.sop_instance_uid in self.failed:
                item.FailureReason = self.failed[one.sop_instance_uid]
                failed.append(item)
            else:
                committed.append(item)
        if committed:
            information.ReferencedSOPSequence = committed
        if failed:
            information.FailedSOPSequence = failed
        return information


def decode(action_information: Dataset) -> tuple[str, tuple[Reference, ...]]:
    """Transaction UID and references of an N-ACTION's Action Information (PS3.4 table J.3-1), each instance once."""
    try:
        transaction_uid = str(action_information.TransactionUID).strip(" \0")
        references = [
            Reference(
                sop_class_uid=str(one.ReferencedSOPClassUID).strip(" \0"),
                sop_instance_uid=str(one.ReferencedSOPInstanceUID).strip(" \0"),
            )
            for one in action_information.get("ReferencedSOPSequence") or ()
        ]
    except (AttributeError, TypeError, ValueError) as error:  # pydantic's error is a ValueError
        raise BadRequest(f"an attribute is missing or malformed ({type(error).__name__})") from None
    uids = [transaction_uid, *(uid for one in references for uid in (one.sop_class_uid, one.sop_instance_uid))]
    if not all(_UID.fullmatch(uid) for uid in uids):
        raise BadRequest("the Transaction UID or a reference is no UID")
    if not references:
        raise BadRequest("nothing is referenced")
    if len(references) > MOST_REFERENCES:
        raise BadRequest(f"more than {MOST_REFERENCES} references")
    return transaction_uid, tuple({one.sop_instance_uid: one for one in references}.values())


def keep_request(spool: Path, request: Request) -> None:
    """Make the request durable, once. OSError where the disk fails."""
    _keep(spool / REQUESTS, request.name, request)


def keep_report(spool: Path, report: Report) -> None:
    _keep(spool / REPORTS, report.request.name, report)


def requests(spool: Path) -> Iterator[tuple[Path, Request | None]]:
    """Every request that waits, with its file; None for one that cannot be read."""
    return kept_in(spool / REQUESTS, Request)


def reports(spool: Path) -> Iterator[tuple[Path, Report | None]]:
    """Every report that waits, with its file; None for one that cannot be read."""
    return kept_in(spool / REPORTS, Report)


def _keep(folder: Path, name: str, content: BaseModel) -> None:
    if not (folder / name).exists():
        make_folder(folder)
        write_durably(folder / name, content.model_dump_json().encode())
