"""Run a recorded analysis again from its stored input and settings, and say same, or where it differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import Analysis, Instance, Result
from service.shared.durable import digest
from service.shared.messages import AnalysisOutput, RetentionArrays, load_output
from service.shared.settings import Settings, spool_folder
from workers import pipeline
from workers.errors import Refusal
from workers.tasks import request_of
from workers.vlm import VisionLanguageModel, open_model

MASKS = ("tokens", "merged_into", "scores", "source_pixels_from_token")
PREAMBLE_BYTES = 128
GROUP_LENGTH = slice(140, 144)  # value of (0002,0000), PS3.10 7.1


class CannotReproduce(Exception):
    """Something that the run would need is not there any more; the message says what."""


@dataclass(frozen=True, slots=True)
class Line:
    """One part of the comparison. `difference` None: the same."""

    part: str
    difference: str | None


def reproduce(
    settings: Settings, sessions: sessionmaker[Session], sop_instance_uid: str, model: VisionLanguageModel | None = None
) -> list[Line]:
    """Compare the run behind the SR with a new one: input, model, software, text, counts, masks, digests.

    Nothing is stored or sent. model: an open one, else the one the analysis was queued with.
    """
    with sessions() as session:
        analysis = session.scalars(
            select(Analysis)
            .join(Result, Result.analysis_id == Analysis.id)
            .where(Result.sop_instance_uid == sop_instance_uid)
        ).one_or_none()
    if analysis is None:
        raise CannotReproduce(f"no result has the SOP Instance UID {sop_instance_uid!r}; `show` names the results")
    recorded, arrays = _recorded(settings, analysis)
    try:
        request = request_of(sessions, analysis.id, settings)
    except Refusal as refusal:
        raise CannotReproduce(refusal.reason) from refusal
    lines = [Line("input", _input_difference(sessions, analysis, settings))]
    output, npz = pipeline.read(request, model or open_model(request.settings.model))
    return [*lines, *compare(recorded, arrays, output, RetentionArrays.from_npz(npz))]


def compare(
    recorded: AnalysisOutput, arrays: RetentionArrays, again: AnalysisOutput, arrays_again: RetentionArrays
) -> Iterator[Line]:
    """Part by part, from what decides the run to what came of it."""
    for part in ("model", "prompt", "max_new_tokens", "pruning", "preprocessing", "software_version"):
        yield Line(part, _difference(_plain(getattr(recorded, part)), _plain(getattr(again, part))))
    for part in ("series_uid", "counts", "flags", "notes", "retention"):
        yield Line(part, _difference(_plain(getattr(recorded, part)), _plain(getattr(again, part))))
    for part in ("findings", "impression", "raw_text"):
        yield Line(part, _text_difference(getattr(recorded, part), getattr(again, part)))
    for name in MASKS:
        yield Line(name, _array_difference(getattr(arrays, name), getattr(arrays_again, name)))
    yield Line("arrays_sha256", _difference(recorded.arrays_sha256, again.arrays_sha256))


def _recorded(settings: Settings, analysis: Analysis) -> tuple[AnalysisOutput, RetentionArrays]:
    if analysis.output_path is None or analysis.output_sha256 is None:
        raise CannotReproduce(f"analysis {analysis.id} has no output on record")
    try:
        return load_output(settings.data.path / analysis.output_path, analysis.output_sha256)
    except FileNotFoundError as error:
        raise CannotReproduce(f"the output of analysis {analysis.id} was removed ([data] keep_days)") from error
    except ValueError as error:
        raise CannotReproduce(str(error)) from error


def _input_difference(sessions: sessionmaker[Session], analysis: Analysis, settings: Settings) -> str | None:
    """Whether the files of the series that was read still have the recorded digests."""
    with sessions() as session:
        rows = session.execute(
            select(Instance.path, Instance.sha256).where(
                Instance.study_id == analysis.study_id,
                Instance.series_uid == analysis.series_uid,
                Instance.is_image.is_(True),
                Instance.revision <= analysis.revision,
            )
        ).all()
    spool = spool_folder(settings)
    changed = [row.path for row in rows if data_set_sha256(spool / row.path) != row.sha256]
    return f"{len(changed)} of {len(rows)} instances have other bytes than were received" if changed else None


def data_set_sha256(path: Path) -> str:
    """SHA-256 of what follows the file meta information of a Part 10 file: the data set as it was received."""
    content = path.read_bytes()
    if content[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] != b"DICM":
        return digest(content)
    return sha256(memoryview(content)[144 + int.from_bytes(content[GROUP_LENGTH], "little") :]).hexdigest()


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _difference(before: Any, now: Any) -> str | None:
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return "; ".join(
            f"{name}: {_short(before.get(name))} was recorded, now {_short(now.get(name))}" for name in names
        )
    return f"{_short(before)} was recorded, now {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 70 else f"{text[:67]}..."


def _text_difference(before: str, now: str) -> str | None:
    """Where texts part; not the texts themselves, which may repeat what the model was shown."""
    if before == now:
        return None
    same = next((at for at, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))
    return f"they part at character {same + 1} of {len(before)} recorded and {len(now)} now"


def _array_difference(before: Any, now: Any) -> str | None:
    if before.shape != now.shape:
        return f"shape {before.shape} was recorded, now {now.shape}"
    floating = np.issubdtype(before.dtype, np.floating)
    other = ~np.isclose(before, now, rtol=0, atol=0, equal_nan=True) if floating else before != now
    if not other.any():
        return None
    apart = np.abs(before - now)[other] if floating else np.empty(0)
    apart = apart[np.isfinite(apart)]  # not scored on one side only
    largest = f", by {apart.max():.3g} at most" if apart.size else ""
    return f"{int(other.sum())} of {before.size} values differ{largest}"
