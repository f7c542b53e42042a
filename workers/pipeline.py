"""One study from files to AnalysisOutput. This file is the way; every step is one call into the file of its name."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from service.shared import VERSION
from service.shared.durable import digest
from service.shared.messages import (
    TOKEN_CODES,
    AnalysisOutput,
    ClosedAnswer,
    Counts,
    FindingName,
    Flag,
    RegionCoverage,
    Retention,
    RetentionArrays,
    SourceInstance,
    SourceState,
    TokenState,
)
from service.shared.settings import ModelSettings, PruningMethod, PruningSettings, Settings
from workers.demo_model.inputs import prepare_for_demonstration
from workers.guide import Guide
from workers.preprocess import Prepared, prepare
from workers.questions import questions_about
from workers.sections import Sections, parse
from workers.series import Choice, choose, read_headers
from workers.vlm import Generation, Reading, VisionLanguageModel
from workers.vlm.prompt import DroppedSlices
from workers.volume import Volume, load

# Settings of [pruning] that only one method reads.
_OF_MEDPRUNER = ("gamma", "temperature", "contextual_fraction")
_TOKENS_OF_GUARDED = (
    "sink_ratio",
    "salience_floor",
    "coverage_lung",
    "coverage_other",
    "merge_similarity",
    "token_budget",
)
_OF_GUARDED = ("slab_mm", "slab_operation", "tile_change", "gap_cap_mm", *_TOKENS_OF_GUARDED)


@dataclass(frozen=True, slots=True)
class Request:
    """What to read: the files of one revision of a study, and the settings of its route."""

    analysis_id: int
    study_uid: str
    paths: tuple[Path, ...]
    prompt: str
    settings: Settings
    cache: Path | None = None  # the study's own folder of pruned features


@dataclass(frozen=True, slots=True, eq=False)
class Looked:
    """One study that was looked at; what is left is to say what is on it."""

    request: Request
    choice: Choice
    volume: Volume
    prepared: Prepared
    guide: Guide
    seen: Any
    timings_s: dict[str, float]


def read(request: Request, model: VisionLanguageModel) -> tuple[AnalysisOutput, bytes]:
    """Read one study; return what was said, with the retention arrays as npz.

    Raises Refusal when the study cannot be read for a reason that another attempt will not change.
    """
    return say([look(request, model)], model)[0]


def look(request: Request, model: VisionLanguageModel) -> Looked:
    """Do everything that concerns this study alone, up to the language model; Refusal as in read()."""
    settings, clock = request.settings, _Clock()
    with clock("headers"):
        headers = read_headers(request.paths)
        choice = choose(headers, settings.series)
    with clock("volume"):
        volume = load([header for header in headers if header.series_uid == choice.series_uid], settings.series)
    with clock("preprocess"):
        prepared = _prepare(volume, settings, model)
    with clock("regions"):
        guide = prepared.guide(volume)
    asked = _coded_findings(settings.model, model)
    reading = Reading(
        prepared.pixels,
        request.prompt,
        settings.pruning,
        settings.model.max_new_tokens,
        dropped=DroppedSlices(settings.pruning.dropped_slices),
        guide=guide,
        questions=partial(questions_about, asked) if asked else None,
        cache=request.cache,
    )
    seen = model.look(reading)
    return Looked(request, choice, volume, prepared, guide, seen, clock.seconds)


def say(studies: Sequence[Looked], model: VisionLanguageModel) -> list[tuple[AnalysisOutput, bytes]]:
    """Let the language model speak about some studies together; each gets the words that it gets alone."""
    generations = model.say([looked.seen for looked in studies])
    return [_said(looked, generation, model) for looked, generation in zip(studies, generations, strict=True)]


def _said(looked: Looked, generation: Generation, model: VisionLanguageModel) -> tuple[AnalysisOutput, bytes]:
    sections = parse(generation.text.replace("\0", ""))  # PostgreSQL keeps no NUL, and no report needs one
    arrays = _arrays(looked.prepared, generation).to_npz()
    return _output(looked, model, generation, sections, arrays), arrays


def _coded_findings(settings: ModelSettings, model: VisionLanguageModel) -> tuple[FindingName, ...]:
    """What closed questions ask about: what is configured, else what these weights were trained to answer."""
    return model.coded_findings if settings.coded_findings is None else settings.coded_findings


def _prepare(volume: Volume, settings: Settings, model: VisionLanguageModel) -> Prepared:
    """The inputs as the weights want them: as MedGemma was trained, unless their folder says otherwise."""
    if model.preprocessing:
        return prepare_for_demonstration(volume, settings.series, model.preprocessing)
    return prepare(volume, settings.series, settings.pruning)


class _Clock:
    """Seconds per step, in the order of the way."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[step] = perf_counter() - start


def _output(
    looked: Looked, model: VisionLanguageModel, generation: Generation, sections: Sections, arrays: bytes
) -> AnalysisOutput:
    request, choice, volume, prepared = looked.request, looked.choice, looked.volume, looked.prepared
    of_text = {Flag.TRUNCATED: generation.truncated, Flag.REPETITION: generation.repetition}
    flags = [*model.flags, *volume.flags, *sections.flags, *(flag for flag, is_so in of_text.items() if is_so)]
    return AnalysisOutput(
        analysis_id=request.analysis_id,
        study_uid=request.study_uid,
        series_uid=choice.series_uid,
        modality=choice.modality,
        frame_of_reference_uid=volume.frame_of_reference_uid,
        series_reason=choice.reason,
        candidates=choice.candidates,
        findings=sections.findings,
        impression=sections.impression,
        raw_text=generation.text.replace("\0", ""),
        answers=_answers(generation),
        flags=tuple(dict.fromkeys(flags)),
        notes=(*volume.notes, *_remarks(looked.guide, request.settings.pruning)),
        limitations=model.limitations,
        model=model.identity,
        prompt=request.prompt,
        max_new_tokens=request.settings.model.max_new_tokens,
        pruning=as_applied(request.settings.pruning, own_slabs=bool(model.preprocessing)),
        preprocessing=prepared.applied,
        counts=_counts(volume, prepared, generation),
        per_input=_per_input(prepared, generation),
        scanner=choice.scanner.replace("\0", ""),
        protocol=choice.protocol.replace("\0", ""),
        software=_software(),
        timings_s={step: round(spent, 4) for step, spent in (looked.timings_s | generation.timings_s).items()},
        memory_peak_bytes=generation.memory_peak_bytes,
        software_version=VERSION,
        retention=_retention(prepared, looked.guide, generation),
        arrays_sha256=digest(arrays),
    )


def _answers(generation: Generation) -> tuple[ClosedAnswer, ...]:
    return tuple(
        ClosedAnswer(
            finding=question.finding,
            aspect=question.aspect,
            question=question.text,
            answers=question.answers,
            probabilities=probabilities,
        )
        for question, probabilities in zip(generation.questions, generation.answers, strict=True)
    )


def as_applied(pruning: PruningSettings, *, own_slabs: bool = False) -> dict[str, object]:
    """The settings that had an effect; a disabled stage is recorded as off, without the knobs it did not use.

    own_slabs: the weights bring their own way to make slabs, so that those of `guarded` were not made.
    """
    if pruning.method is PruningMethod.OFF:
        return {"method": "off", "slice_stage": False, "token_stage": False}
    guarded = pruning.method is PruningMethod.GUARDED
    unused = set(_OF_MEDPRUNER if guarded else _OF_GUARDED)
    if own_slabs:
        unused |= {"slab_mm", "slab_operation"}
    if not pruning.slice_stage:
        unused |= {"gamma", "tile_change", "gap_cap_mm", "dropped_slices"}
    if not pruning.token_stage:
        unused |= {"tau", "temperature", "contextual_fraction", *_TOKENS_OF_GUARDED}
    return {key: value for key, value in pruning.model_dump(mode="json").items() if key not in unused}


def _counts(volume: Volume, prepared: Prepared, generation: Generation) -> Counts:
    tokens = generation.counts
    return Counts(
        slices_in_series=len(volume.sources),
        slices_readable=sum(source.state is not SourceState.UNREADABLE for source in volume.sources),
        slices_sampled=len({index for one in prepared.inputs for index in one.source_instances}),
        inputs=len(prepared.inputs),
        inputs_kept=int(generation.inputs_kept.sum()),
        tokens_in=tokens.tokens_in,
        tokens_kept=tokens.tokens_kept,
        tokens_merged=tokens.tokens_merged,
        tokens_text=tokens.tokens_text,
        tokens_generated=tokens.tokens_generated,
    )


def _per_input(prepared: Prepared, generation: Generation) -> tuple[tuple[int, int, int], ...]:
    """Per input: its instances, its tokens kept and merged. What history keeps once the arrays are removed by age."""
    kept = (generation.tokens == TOKEN_CODES[TokenState.KEPT]).sum(axis=1)
    merged = (generation.tokens == TOKEN_CODES[TokenState.MERGED]).sum(axis=1)
    return tuple((len(one.source_instances), int(kept[one.index]), int(merged[one.index])) for one in prepared.inputs)


@cache
def _software() -> dict[str, str]:
    """What a run rests on beside torch and transformers, which stand in the model's identity."""
    packages = {name: metadata.version(name) for name in ("numpy", "pydicom", "pillow", "scipy", "tokenizers")}
    return {"python": platform.python_version()} | packages


def _retention(prepared: Prepared, guide: Guide, generation: Generation) -> Retention:
    """What the slice stage made of every input and so of every source instance."""
    inputs = tuple(
        one.model_copy(
            update={
                "kept": bool(generation.inputs_kept[one.index]),
                "represented_by": None
                if generation.inputs_kept[one.index]
                else int(generation.represented_by[one.index]),
            }
        )
        for one in prepared.inputs
    )
    return Retention(
        sources=tuple(_after_slice_stage(source, generation) for source in prepared.sources),
        inputs=inputs,
        token_rows=generation.token_rows,
        token_columns=generation.token_columns,
        coverage=_coverage(guide, generation),
    )


def _coverage(guide: Guide, generation: Generation) -> tuple[RegionCoverage, ...]:
    """Tokens of each region that is there, and how many of them the language model got as they are.

    A token that holds parts of two regions counts for both.
    """
    regions = guide.on_grid(generation.token_rows, generation.token_columns).regions
    kept = generation.tokens == TOKEN_CODES[TokenState.KEPT]
    totals, shown = regions.sum(axis=(0, 1)), (regions & kept[..., None]).sum(axis=(0, 1))
    return tuple(
        RegionCoverage(region=name, tokens_total=int(total), tokens_kept=int(number))
        for name, total, number in zip(guide.names, totals, shown, strict=True)
        if total
    )


def _remarks(guide: Guide, pruning: PruningSettings) -> tuple[str, ...]:
    """What the regions make us say where they decided anything."""
    return guide.regions.notes if pruning.method is PruningMethod.GUARDED else ()


def _after_slice_stage(source: SourceInstance, generation: Generation) -> SourceInstance:
    index = source.input_index
    if index is None or generation.inputs_kept[index]:
        return source
    representative = int(generation.represented_by[index])
    return source.model_copy(update={"state": SourceState.REPRESENTED, "input_index": representative})


def _arrays(prepared: Prepared, generation: Generation) -> RetentionArrays:
    return RetentionArrays(
        tokens=generation.tokens,
        merged_into=generation.merged_into,
        scores=generation.scores.astype(np.float32),
        source_pixels_from_token=prepared.source_pixels_from_token(generation.token_rows, generation.token_columns),
    )
