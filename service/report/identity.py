"""Who made a result, from which run, and the UIDs that follow from that. Knows nothing of content."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo

from service.shared.settings import Companion

# Of this project alone: UIDs derived under it change meaning if it changes
_NAMESPACE = uuid.UUID("5b0c7f6e-6d1b-5c0a-9a55-0f6f2d6c0b52")


def derived_uid(*parts: str) -> str:
    """A UID under 2.25 (PS3.5 B.2) that is the same for the same parts, everywhere and for ever."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, chr(0x1F).join(parts)).int}"


# The same as the receiver announces; the version changes when the same content gives other bytes
IMPLEMENTATION_CLASS_UID = "2.25.189379385699083891714922590556693550384"
IMPLEMENTATION_VERSION_NAME = "MEDPRUNER_0_1"


@dataclass(frozen=True, slots=True)
class PriorDocument:
    """An earlier report on the same study which this one follows."""

    sop_class_uid: str
    sop_instance_uid: str
    series_uid: str
    study_uid: str


@dataclass(frozen=True, slots=True)
class RelatedObject:
    """Another result of the same run, which the report names. Companions name no report: UIDs never go in a circle."""

    companion: Companion
    sop_class_uid: str
    sop_instance_uid: str
    series_uid: str


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """One run as the job record has it; a result built twice from the same record has the same bytes.

    analysis_key: what makes the run unique, for instance (study UID, revision, route, run number).
    content_time: aware; the start of the analysis (IHE AI Results), never the clock of the builder.
    revision_note: what is new since the predecessor, in words and without patient data.
    timezone: of the site; used where the source does not state its own offset from UTC.
    """

    analysis_key: tuple[str, ...]
    content_time: datetime
    software_version: str
    timezone: tzinfo = UTC
    predecessors: tuple[PriorDocument, ...] = ()
    revision_note: str = ""

    def __post_init__(self) -> None:
        if self.content_time.tzinfo is None:
            raise ValueError("content_time has no time zone; take it from the job record in UTC")

    def uid(self, *parts: str) -> str:
        """A UID for something of this run."""
        return derived_uid("run", *self.analysis_key, "", *parts)
