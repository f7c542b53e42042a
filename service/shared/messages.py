"""What travels from worker to service: one AnalysisOutput as JSON, its arrays as one npz beside it.

Knows nothing of DICOM files, tensors or the database. Nothing in here names a patient; the text sections
may, because a model may repeat what it was shown, and are therefore kept in erasable places only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from service.shared.durable import digest, make_folder, write_durably

OUTPUT_VERSION = 1


class Message(BaseModel):
    """Frozen, and strict about names: a field that is not understood is an error on either side."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Flag(StrEnum):
    """Anything given up, cut or guessed on the way; each is said in words and in codes in the report."""

    TRUNCATED = "truncated"  # the text ended at max_new_tokens, not at the model's own end
    UNPARSED = "unparsed"  # no sections recognised; the whole text stands under Findings
    RANDOM_WEIGHTS = "random-weights"  # weights never trained: the text is noise
    DEMONSTRATION_WEIGHTS = "demonstration-weights"  # trained on phantoms only
    MISSING_SLICES = "missing-slices"  # a gap in the stack of the chosen series
    UNREADABLE_SLICES = "unreadable-slices"  # some instances of the chosen series could not be decoded
    DUPLICATE_POSITIONS = "duplicate-positions"  # several instances at one position; one was used
    GANTRY_TILT = "gantry-tilt"  # slices are sheared against their normal; not corrected
    REPETITION = "repetition"  # the model ran into a loop; the text was cut
    REFUSED = "model-refused"  # the model declined to read; its words stand under Findings
    NOT_ANALYSED = "not-analysed"  # no model was run: the study was refused; only the report of a refusal has it


class SeriesCandidate(Message):
    """One series of the study and why it was, or was not, the one to read."""

    series_uid: str
    modality: str
    instances: int
    chosen: bool
    reason: str


class ModelIdentity(Message):
    """Which weights spoke, on which software."""

    name: str
    architecture: str  # config.json `architectures[0]`
    path: str
    weights_sha256: str  # over the safetensors files in name order
    transformers_version: str
    torch_version: str
    dtype: str
    device: str
    attention: str


class SliceOperation(StrEnum):
    """How the pixels of one model input came from source instances."""

    SINGLE = "single"  # one instance, as it is
    MEAN = "mean"  # the mean of a slab of neighbours
    MIP = "mip"  # the maximum of a slab of neighbours


class ModelInput(Message):
    """One image as the model would get it, before any stage of pruning."""

    index: int = Field(ge=0)
    operation: SliceOperation
    source_instances: tuple[int, ...]  # indices into Retention.sources, in stack order
    position_mm: float  # along the normal of the stack
    kept: bool  # by the slice stage; False: never encoded
    represented_by: int | None = None  # the kept input that stands for it, where kept is False


class SourceState(StrEnum):
    """What became of one source instance (or frame) of the chosen series."""

    SHOWN = "shown"  # alone in a kept input
    IN_SLAB = "in-slab"  # together with neighbours in a kept input
    REPRESENTED = "represented"  # in an input that was dropped; another stands for it
    SAMPLED_OUT = "sampled-out"  # in no input: the stack was longer than max_slices
    DUPLICATE = "duplicate-position"  # in no input: another instance at the same position was used
    UNREADABLE = "unreadable"  # could not be decoded or is missing its geometry


class SourceInstance(Message):
    """One instance (or frame of a multi-frame instance) of the chosen series, in stack order."""

    sop_instance_uid: str
    frame_number: int | None = None  # 1-based, multi-frame only
    position_mm: float | None  # along the normal; None when unreadable
    state: SourceState
    input_index: int | None = None  # the input it is in, or the one that stands for it
    reason: str | None = None  # for UNREADABLE


class RegionCoverage(Message):
    """How much of one anatomical region the model was shown."""

    region: str
    tokens_total: int
    tokens_kept: int


class Counts(Message):
    """The funnel from the series to the language model; each number counts what is left."""

    slices_in_series: int
    slices_readable: int
    slices_sampled: int  # source instances that are in some input (after max_slices)
    inputs: int  # images before the slice stage
    inputs_kept: int  # images that went through the vision tower
    tokens_in: int  # inputs x tokens per input
    tokens_kept: int  # visual tokens that entered the language model, merged targets included
    tokens_merged: int  # tokens whose content lives on only in a merged target
    tokens_text: int  # tokens of the prompt that are no visual tokens
    tokens_generated: int


class TokenState(StrEnum):
    """Names of the codes in `tokens` of RetentionArrays (0, 1, 2, 3 in this order)."""

    KEPT = "kept"
    MERGED = "merged"  # into the token of the same input that merged_into names
    DROPPED = "dropped"  # seen by the vision tower, not by the language model
    NOT_ENCODED = "not-encoded"  # its input was dropped before the vision tower


TOKEN_CODES: dict[TokenState, int] = {state: code for code, state in enumerate(TokenState)}


class Retention(Message):
    """What the model was and was not shown. Arrays travel in the npz (RetentionArrays)."""

    sources: tuple[SourceInstance, ...]
    inputs: tuple[ModelInput, ...]
    token_rows: int
    token_columns: int
    coverage: tuple[RegionCoverage, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class RetentionArrays:
    """Arrays of a Retention; I inputs, n = token_rows * token_columns, row-major.

    tokens: (I, n) uint8, codes of TOKEN_CODES.
    merged_into: (I, n) int32, token index within the same input, -1 where not merged.
    scores: (I, n) float32, attention received (averages 1 per input); NaN where not scored.
    source_pixels_from_token: (I, 2, 3) float64; [column, row, 1] of a token's centre, as (column + 0.5, row + 0.5, 1)
        in units of tokens, to (x, y) in pixels of the source frame, where the centre of the first pixel is (0.5, 0.5).
    """

    tokens: NDArray[np.uint8]
    merged_into: NDArray[np.int32]
    scores: NDArray[np.float32]
    source_pixels_from_token: NDArray[np.float64]

    def to_npz(self) -> bytes:
        buffer = BytesIO()
        np.savez_compressed(buffer, **{field.name: getattr(self, field.name) for field in fields(self)})
        return buffer.getvalue()

    @classmethod
    def from_npz(cls, content: bytes) -> RetentionArrays:
        with np.load(BytesIO(content), allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


class FindingName(StrEnum):
    """The closed vocabulary of coded findings."""

    NODULE = "nodule"
    EFFUSION = "effusion"
    CONSOLIDATION = "consolidation"
    PNEUMOTHORAX = "pneumothorax"
    CARDIOMEGALY = "cardiomegaly"
    CALCIFICATION = "aortic-calcification"


class Aspect(StrEnum):
    """What is asked of the study, or of a finding."""

    CHEST_CT = "chest-ct"  # of the study: is it what the closed vocabulary is about? yes, no
    PRESENCE = "presence"  # yes, no
    SIDE = "side"  # right, left, both
    ZONE = "zone"  # upper, mid, lower
    DIAMETER_MM = "diameter-mm"  # of the largest, whole mm
    SLICE = "slice"  # number of the input that shows it best, from 1


class ClosedAnswer(Message):
    """One closed question, the answer chosen among those allowed, and how probable the model held each.

    probabilities: of every allowed answer, in the order of `answers`; they add up to 1 over the allowed ones.
    """

    finding: FindingName | None  # None: about the study as a whole
    aspect: Aspect
    question: str
    answers: tuple[str, ...]
    probabilities: tuple[float, ...]

    @property
    def chosen(self) -> str:
        return self.answers[self.probabilities.index(max(self.probabilities))]

    @property
    def probability(self) -> float:
        return max(self.probabilities)


class AnalysisOutput(Message):
    """Everything one run of the worker says, and how it came to say it."""

    version: Literal[1] = OUTPUT_VERSION  # type: ignore[assignment]  # Literal keeps readers honest
    analysis_id: int
    study_uid: str
    series_uid: str
    modality: str
    frame_of_reference_uid: str | None
    series_reason: str
    candidates: tuple[SeriesCandidate, ...]
    findings: str
    impression: str
    raw_text: str
    answers: tuple[ClosedAnswer, ...] = ()  # to the closed questions; empty where none was asked
    flags: tuple[Flag, ...]
    notes: tuple[str, ...]  # what the volume's geometry made us say, fit for people, without patient data
    limitations: tuple[str, ...] = ()  # of the model, as measured by its makers; a sentence each
    model: ModelIdentity
    prompt: str
    max_new_tokens: int
    pruning: dict[str, Any]  # every setting as applied; a disabled stage is recorded as off
    preprocessing: dict[str, Any]  # windows, sampling, image size as applied
    counts: Counts
    per_input: tuple[tuple[int, int, int], ...] = ()  # instances in it, tokens kept, tokens merged; 0 where dropped
    scanner: str = ""  # of the series that was read: Manufacturer's Model Name, Station Name
    protocol: str = ""  # its Protocol Name
    software: dict[str, str] = Field(default_factory=dict)  # package -> version, beside those of ModelIdentity
    timings_s: dict[str, float]  # step -> seconds, in the order of the way
    memory_peak_bytes: int
    software_version: str
    retention: Retention
    arrays_sha256: str  # of the npz


def store_output(folder: Path, fence: int, output: AnalysisOutput, arrays: bytes) -> tuple[Path, str]:
    """Write both files durably under their fencing token and return the JSON's path and SHA-256.

    Files of another fence are never touched: a worker that lost its lease cannot overwrite the winner's.
    """
    make_folder(folder)
    content = output.model_dump_json(indent=1).encode()
    for name, part in ((f"{fence}.npz", arrays), (f"{fence}.json", content)):
        write_durably(folder / name, part)
    return folder / f"{fence}.json", digest(content)


def load_output(path: Path, sha256: str) -> tuple[AnalysisOutput, RetentionArrays]:
    """Read back what store_output wrote; ValueError when the bytes are not those that were recorded."""
    content = path.read_bytes()
    if digest(content) != sha256:
        raise ValueError(f"analysis output {path.name} does not match its recorded SHA-256")
    output = AnalysisOutput.model_validate_json(content)
    arrays = path.with_suffix(".npz").read_bytes()
    if digest(arrays) != output.arrays_sha256:
        raise ValueError(f"retention arrays {path.stem}.npz do not match their recorded SHA-256")
    return output, RetentionArrays.from_npz(arrays)
