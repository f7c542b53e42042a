"""workers.vlm.qwen3_vl: M-RoPE positions that survivors keep, and the stock class with pruning off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from service.shared.settings import ConfigurationError, ModelSettings, PruningSettings
from tests.tiny_models import write_qwen3_vl
from workers.pruning.slices import SliceChoice, keep_all
from workers.vlm import Reading
from workers.vlm.assemble import prune
from workers.vlm.decoding import greedy
from workers.vlm.folder import open_folder
from workers.vlm.prompt import DroppedSlices
from workers.vlm.qwen3_vl import Qwen3VL
from workers.vlm.stages import choose_slices, choose_tokens

OFF = PruningSettings.model_validate({"method": "off"})
PRUNED = PruningSettings.model_validate({"method": "medpruner", "tau": 0.6})
TOKENS = 42  # 6 x 7


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (count, 48, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen3VL:
    opened = open_folder(ModelSettings(device="cpu"), write_qwen3_vl(tmp_path_factory.mktemp("models") / "qwen3vl"))
    assert isinstance(opened, Qwen3VL)
    return opened


def test_survivors_keep_their_positions(model: Qwen3VL) -> None:
    """The prompt without its second slice is the whole prompt with a gap: no position moves."""
    prepared = model.prepare(images(3))
    second_dropped = SliceChoice(
        torch.tensor([True, False, True]), torch.tensor([0, 0, 2]), torch.zeros(3, dtype=torch.float64)
    )

    whole = model.ask("Why?", prepared, keep_all(3), DroppedSlices.OMIT)
    part = model.ask("Why?", prepared, second_dropped, DroppedSlices.OMIT)

    places = (whole.input_ids == model.placeholder).nonzero().flatten()
    gap = slice(int(places[TOKENS]) - 1, int(places[2 * TOKENS - 1]) + 2)  # with the marks around the image
    shown = torch.ones_like(whole.input_ids, dtype=torch.bool)
    shown[gap] = False
    assert whole.positions is not None
    assert part.positions is not None
    assert torch.equal(part.input_ids, whole.input_ids[shown])
    assert torch.equal(part.positions, whole.positions[:, shown])


def test_off_is_the_stock_model_bit_for_bit(model: Qwen3VL) -> None:
    """From pixels to eight decode steps: the logits of the stock class, which finds the positions by itself."""
    prepared = model.prepare(images(3))
    choice = keep_all(3)
    config = greedy(8, [], 0)
    config.output_logits = config.return_dict_in_generate = True

    with torch.inference_mode():
        encoded = model.encode(prepared, choice.kept, model.groups(prepared), scored=False)
        asked = model.ask("Why?", prepared, choice, DroppedSlices.OMIT)
        pruned = prune(asked, model.placeholder, choose_tokens(encoded, OFF), encoded.deepstack)
        ours = model.model.generate(**model.arguments([pruned]), generation_config=config)
        model.forget()
        stock = model.model.generate(
            input_ids=asked.input_ids[None],
            attention_mask=torch.ones_like(asked.input_ids)[None],
            pixel_values=prepared.pixels.flatten(0, 1),
            image_grid_thw=torch.tensor([[1, 12, 14]] * 3),
            mm_token_type_ids=(asked.input_ids == model.placeholder).long()[None],
            generation_config=config,
        )
        model.forget()

    assert torch.equal(torch.cat(ours.logits), torch.cat(stock.logits))


def test_batch_of_studies_equals_single_ones(model: Qwen3VL) -> None:
    """Studies of different length, positions and deepstack features, decoded together, say what they say alone."""
    prompts = []
    with torch.inference_mode():
        for count, settings in ((2, OFF), (4, PRUNED)):
            prepared = model.prepare(images(count))
            choice = choose_slices(prepared.pixels, settings)
            scored = settings is PRUNED
            encoded = model.encode(prepared, choice.kept, model.groups(prepared), scored=scored)
            asked = model.ask("Why?", prepared, choice, DroppedSlices.OMIT)
            prompts.append(prune(asked, model.placeholder, choose_tokens(encoded, settings), encoded.deepstack))
        together = model.decode(prompts, [8] * len(prompts)).tokens
        alone = [model.decode([prompt], [8]).tokens[0] for prompt in prompts]

    assert [tokens.tolist() for tokens in together] == [tokens.tolist() for tokens in alone]


def test_no_state_survives_a_request(model: Qwen3VL) -> None:
    """The stock class keeps position offsets between calls; after a study they are gone."""
    model.read(Reading(images(3), "Why?", PRUNED, max_new_tokens=3))

    assert model.model.model.rope_deltas is None


def test_pruned_study_is_on_record(model: Qwen3VL) -> None:
    """Grid and counts are those of merged 2 x 2 blocks."""
    stack = images(4)
    stack[2] = stack[1]

    generation = model.read(Reading(stack, "Why?", PRUNED, max_new_tokens=4))

    assert (generation.token_rows, generation.token_columns) == (6, 7)
    assert generation.inputs_kept.tolist() == [True, True, False, True]
    assert generation.counts.tokens_in == 4 * TOKENS
    assert generation.counts.tokens_kept + generation.counts.tokens_merged == 3 * TOKENS


def test_image_token_in_the_question_is_refused(model: Qwen3VL) -> None:
    """A prompt that would shift the images against their places is refused with the key to change."""
    with pytest.raises(ConfigurationError, match=r"\[report\]"):
        model.read(Reading(images(2), "See <|image_pad|>", PRUNED, max_new_tokens=2))
