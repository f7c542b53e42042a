"""Answers to storage commitment (PS3.4 J.3.3), from the wire to a file and back. Knows no database and no network.

The receiver writes one file for each N-EVENT-REPORT before it answers Success; delivery turns it into rows. So an
answer is as durable as an instance, and is taken while the database is away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydicom.dataset import Dataset

from service.shared.durable import digest, make_folder, write_durably

PUSH_MODEL = "1.2.840.10008.1.20.1"  # Storage Commitment Push Model SOP Class
PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"  # its well-known SOP Instance
FOLDER = "commitment-answers"  # below the spool
UNUSABLE = ".unusable"
MOST_REFERENCES = 10_000

Kept = TypeVar("Kept", bound=BaseModel)

# Failure Reason (0008,1197), PS3.3 C.14.1.1
FAILURES = {
    0x0110: "processing failure",
    0x0112: "no such object instance",
    0x0119: "class and instance conflict",
    0x0122: "referenced SOP class not supported",
    0x0131: "duplicate transaction UID",
    0x0213: "resource limitation",
}


class BadAnswer(Exception):
    """An N-EVENT-REPORT that is no answer to storage commitment; the message names attributes, never values."""


class Answer(BaseModel):
    """What a destination says to one request. Both lists hold SOP Instance UIDs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transaction_uid: str
    committed: tuple[str, ...]
    failed: dict[str, int]  # with the Failure Reason
    calling_ae: str = ""  # who said so, where it was said on an association of its own


def decode(event_information: Dataset, calling_ae: str = "") -> Answer:
    """The answer in an N-EVENT-REPORT's Event Information (PS3.4 table J.3-2); BadAnswer where it is none.

    The event type says whether all went well; the sequences say the same for each instance, so they are believed.
    """
    try:
        transaction_uid = str(event_information.TransactionUID).strip(" \0")
        committed = [str(one.ReferencedSOPInstanceUID) for one in event_information.get("ReferencedSOPSequence") or ()]
        failed = {
            str(one.ReferencedSOPInstanceUID): int(one.get("FailureReason") or 0x0110)
            for one in event_information.get("FailedSOPSequence") or ()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise BadAnswer(f"an attribute is missing or malformed ({type(error).__name__})") from None
    if not 0 < len(transaction_uid) <= 64:
        raise BadAnswer("no Transaction UID")
    if len(committed) + len(failed) > MOST_REFERENCES:
        raise BadAnswer(f"more than {MOST_REFERENCES} references")
    return Answer(
        transaction_uid=transaction_uid,
        committed=tuple(uid for uid in committed if uid not in failed),
        failed=failed,
        calling_ae=calling_ae,
    )


def keep(spool: Path, answer: Answer) -> None:
    """Make the answer durable; the same answer again is the same file. OSError where the disk fails."""
    content = answer.model_dump_json().encode()
    make_folder(spool / FOLDER)
    write_durably(spool / FOLDER / f"{digest(content)}.json", content)


def waiting(spool: Path) -> Iterator[tuple[Path, Answer | None]]:
    """Every kept answer with its file; None for one that cannot be read."""
    return kept_in(spool / FOLDER, Answer)


def set_aside(path: Path) -> None:
    """Keep what cannot be used for a person, out of the way."""
    with suppress(OSError):
        path.rename(path.with_suffix(UNUSABLE))


def kept_in(folder: Path, kind: type[Kept]) -> Iterator[tuple[Path, Kept | None]]:
    """Everything of this kind that was kept in the folder, with its file; None for what cannot be read."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield path, kind.model_validate_json(path.read_bytes())
        except FileNotFoundError:  # somebody else has taken it
            continue
        except (OSError, ValidationError):
            yield path, None
