"""workers.pipeline with method `guarded`: from DICOM files to a record of every region, on weights never trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from service.shared.messages import (
    TOKEN_CODES,
    AnalysisOutput,
    Aspect,
    RetentionArrays,
    SliceOperation,
    SourceState,
    TokenState,
)
from service.shared.settings import ModelSettings, PruningSettings, Settings
from tests.phantom_series import PhantomSeries
from workers.demo_model.dicom_series import write_series
from workers.demo_model.phantom import Protocol, generate
from workers.demo_model.random_weights import write
from workers.pipeline import Request, as_applied, read
from workers.vlm import VisionLanguageModel, open_model
from workers.vlm.stages import budget_tokens

KEPT = TOKEN_CODES[TokenState.KEPT]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = tmp_path_factory.mktemp("weights")
    write(folder, 5)
    return open_model(ModelSettings(device="cpu"), folder)


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A generated chest CT of 2.5 mm slices, 96 pixels wide."""
    phantom = generate(31, Protocol(pixels=96, slice_mm=2.5))
    return write_series(phantom, tmp_path_factory.mktemp("chest"))


def analyse(
    paths: tuple[Path, ...], model: VisionLanguageModel, **pruning: object
) -> tuple[AnalysisOutput, RetentionArrays]:
    settings = Settings.model_validate(
        {"model": {"max_new_tokens": 4}, "pruning": {"method": "guarded"} | pruning, "series": {"decode_memory_gb": 2}}
    )
    output, arrays = read(Request(1, "1.2.3", paths, "What is there?", settings), model)
    return output, RetentionArrays.from_npz(arrays)


def test_every_region_and_side_of_a_chest_is_covered(chest: tuple[Path, ...], model: VisionLanguageModel) -> None:
    """Lungs wholly, everything else at least by its promise, within the budget; nothing of it is silent."""
    output, arrays = analyse(chest, model, slab_mm=5.0, token_budget=0.5)

    covered = {one.region: one.tokens_kept / one.tokens_total for one in output.retention.coverage}
    assert {name for name in covered if "lung" in name} == {
        f"{side} lung, {zone} zone" for side in ("right", "left") for zone in ("upper", "middle", "lower")
    }
    assert all(share == 1 for name, share in covered.items() if "lung" in name)
    assert all(share >= 0.1 for share in covered.values())
    assert output.counts.tokens_kept <= 0.5 * output.counts.tokens_in
    assert output.counts.tokens_kept == (arrays.tokens == KEPT).sum()
    assert output.pruning["method"] == "guarded"
    assert {"gamma", "temperature", "contextual_fraction"}.isdisjoint(output.pruning)


def test_thin_slices_are_in_slabs_and_no_one_is_dropped(chest: tuple[Path, ...], model: VisionLanguageModel) -> None:
    """Two slices of 2.5 mm each; each of them is in a slab that the tower saw, or stands for air."""
    output, _ = analyse(chest, model, slab_mm=5.0)

    assert {one.operation for one in output.retention.inputs} <= {SliceOperation.MEAN, SliceOperation.SINGLE}
    assert output.counts.slices_sampled == len(chest)
    assert output.counts.inputs == -(-len(chest) // 2)
    assert {source.state for source in output.retention.sources} <= {SourceState.IN_SLAB, SourceState.SHOWN}
    assert output.preprocessing["slab_slices"] == 2


def test_air_has_no_token(chest: tuple[Path, ...], model: VisionLanguageModel) -> None:
    """Not one corner of any input, even with room for every token."""
    _, arrays = analyse(chest, model, token_budget=1.0, tau=1.0)

    assert not (arrays.tokens[:, [0, 6, 42, 48]] == KEPT).any()


def test_coverage_is_reported_with_pruning_off(chest: tuple[Path, ...], model: VisionLanguageModel) -> None:
    """What was shown of each region is no matter of the method."""
    output, _ = analyse(chest, model, method="off")

    assert output.retention.coverage
    assert all(one.tokens_kept == one.tokens_total for one in output.retention.coverage)
    assert output.pruning == {"method": "off", "slice_stage": False, "token_stage": False}


def test_where_no_body_is_found_everything_may_be_kept_and_a_note_says_so(
    tmp_path: Path, model: VisionLanguageModel
) -> None:
    """An object of air density: one region, one sentence."""
    paths = PhantomSeries().write(tmp_path)
    for path in paths:
        dataset = dcmread(path)
        pixels = np.zeros((64, 64), "<i2")
        pixels[0, 0] = 30
        dataset.PixelRepresentation, dataset.RescaleSlope, dataset.RescaleIntercept = 1, 1, -1000
        dataset.PixelData = pixels.tobytes()
        dataset.save_as(path)

    output, _ = analyse(tuple(paths), model, token_budget=1.0)

    assert [one.region for one in output.retention.coverage] == ["whole image"]
    assert any("No body was found" in note for note in output.notes)
    assert output.counts.inputs_kept == output.counts.inputs


@pytest.mark.parametrize("dropped", ["omit", "name", "refer"])
def test_dropped_slices_are_named_as_the_settings_say(
    chest: tuple[Path, ...], model: VisionLanguageModel, dropped: str
) -> None:
    """The setting reaches the prompt and the record; naming costs text."""
    output, _ = analyse(chest, model, gap_cap_mm=60.0, tile_change=2.0, dropped_slices=dropped)
    plain, _ = analyse(chest, model, gap_cap_mm=60.0, tile_change=2.0)

    assert output.pruning["dropped_slices"] == dropped
    assert output.counts.inputs_kept < output.counts.inputs
    assert (output.counts.tokens_text > plain.counts.tokens_text) == (dropped != "omit")


def test_knobs_without_effect_are_not_recorded() -> None:
    """What is recorded is what was applied."""
    stages_off = PruningSettings.model_validate({"method": "guarded", "slice_stage": False, "token_stage": False})

    assert as_applied(stages_off) == {
        "method": "guarded",
        "slice_stage": False,
        "token_stage": False,
        "slab_mm": 4.0,
        "slab_operation": "mean",
    }
    assert "slab_mm" not in as_applied(PruningSettings.model_validate({"method": "medpruner"}))


def test_budget_is_a_share_or_a_number() -> None:
    """1.5 is neither, and is refused where it is written."""
    assert budget_tokens(PruningSettings(token_budget=0.25), 1000) == 250
    assert budget_tokens(PruningSettings(token_budget=1.0), 1000) == 1000
    assert budget_tokens(PruningSettings(token_budget=4096), 1000) == 4096
    with pytest.raises(ValueError, match="whole number of tokens"):
        PruningSettings(token_budget=1.5)


def test_answers_to_closed_questions_travel(chest: tuple[Path, ...], model: VisionLanguageModel) -> None:
    """Where findings are configured, every question about them has its answers; the text stays the same."""
    values = {"pruning": {"method": "guarded", "slab_mm": 20}, "series": {"max_slices": 8}}
    silent = Settings.model_validate(values | {"model": {"max_new_tokens": 4, "coded_findings": []}})
    asking = {"max_new_tokens": 4, "coded_findings": ["cardiomegaly", "nodule"]}
    plain, _ = read(Request(1, "1.2.3", chest, "What is there?", silent), model)
    asked, _ = read(
        Request(1, "1.2.3", chest, "What is there?", Settings.model_validate(values | {"model": asking})), model
    )

    shown = tuple(str(one.index + 1) for one in asked.retention.inputs if one.kept)
    assert asked.raw_text == plain.raw_text
    assert plain.answers == ()
    assert {one.aspect for one in asked.answers} == set(Aspect)
    assert [one.answers for one in asked.answers if one.aspect is Aspect.SLICE] == [shown]
    assert all(sum(one.probabilities) == pytest.approx(1) for one in asked.answers)
    assert "questions" in asked.timings_s
