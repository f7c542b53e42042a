"""workers.vlm.video_llama3: Hulu-Med's own folders, and the stock class with pruning off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from service.shared.settings import ConfigurationError, ModelSettings, PruningSettings
from tests.tiny_models import write_hulu_med, write_video_llama3
from workers.pruning.slices import keep_all
from workers.vlm import Reading
from workers.vlm.assemble import prune
from workers.vlm.decoding import greedy
from workers.vlm.folder import open_folder
from workers.vlm.host import Host
from workers.vlm.prompt import DroppedSlices
from workers.vlm.stages import choose_tokens
from workers.vlm.video_llama3 import VideoLlama3, stock_config

OFF = PruningSettings.model_validate({"method": "off"})
PRUNED = PruningSettings.model_validate({"method": "medpruner", "tau": 0.6})


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (count, 48, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return open_folder(ModelSettings(device="cpu"), write_video_llama3(tmp_path_factory.mktemp("models") / "stock"))


@pytest.fixture(scope="module")
def hulu_med(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return open_folder(ModelSettings(device="cpu"), write_hulu_med(tmp_path_factory.mktemp("models") / "hulu"))


def test_hulu_med_folder_is_the_same_model(stock: Host, hulu_med: Host) -> None:
    """Renamed weights and flat configuration give the stock model, tensor for tensor; the folder's code is not run."""
    ours, theirs = stock.model.state_dict(), hulu_med.model.state_dict()

    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert hulu_med.identity.architecture == "HulumedQwen2ForCausalLM"


def test_hulu_med_reads_what_the_stock_folder_reads(stock: Host, hulu_med: Host) -> None:
    """The same slices give the same masks and the same text through either folder."""
    one, other = (host.read(Reading(images(4), "Why?", PRUNED, max_new_tokens=6)) for host in (stock, hulu_med))

    assert one.text == other.text
    assert np.array_equal(one.tokens, other.tokens)


def test_off_is_the_stock_model_bit_for_bit(stock: Host) -> None:
    """One video of all slices: the logits of the stock class in prefill and eight decode steps."""
    assert isinstance(stock, VideoLlama3)
    prepared = stock.prepare(images(3))
    config = greedy(8, [], 0)
    config.output_logits = config.return_dict_in_generate = True

    with torch.inference_mode():
        encoded = stock.encode(prepared, keep_all(3).kept, stock.groups(prepared), scored=False)
        asked = stock.ask("Why?", prepared, keep_all(3), DroppedSlices.OMIT)
        pruned = prune(asked, stock.placeholder, choose_tokens(encoded, OFF), encoded.deepstack)
        ours = stock.model.generate(**stock.arguments([pruned]), generation_config=config)
        plain = stock.model.generate(
            input_ids=asked.input_ids[None],
            attention_mask=torch.ones_like(asked.input_ids)[None],
            pixel_values=prepared.pixels.flatten(0, 1),
            image_grid_thw=torch.tensor([[3, 12, 14]]),
            image_merge_sizes=torch.tensor([2]),
            generation_config=config,
        )

    assert torch.equal(torch.cat(ours.logits), torch.cat(plain.logits))


def test_dropped_frames_are_not_in_the_video(stock: Host) -> None:
    """The prompt shows as many frames as were encoded."""
    stack = images(4)
    stack[1] = stack[0]

    generation = stock.read(Reading(stack, "Why?", PRUNED, max_new_tokens=3))

    assert generation.inputs_kept.tolist() == [True, False, True, True]
    assert generation.counts.tokens_kept + generation.counts.tokens_merged == 3 * 42


def test_batch_of_studies_equals_single_ones(stock: Host) -> None:
    """Studies of different length, decoded together, say what they say alone."""
    prompts = []
    with torch.inference_mode():
        for count in (2, 4):
            prepared = stock.prepare(images(count))
            encoded = stock.encode(prepared, keep_all(count).kept, stock.groups(prepared), scored=True)
            asked = stock.ask("Why?", prepared, keep_all(count), DroppedSlices.OMIT)
            prompts.append(prune(asked, stock.placeholder, choose_tokens(encoded, PRUNED), ()))
        together = stock.decode(prompts, [8] * len(prompts)).tokens
        alone = [stock.decode([prompt], [8]).tokens[0] for prompt in prompts]

    assert [tokens.tolist() for tokens in together] == [tokens.tolist() for tokens in alone]


@pytest.mark.parametrize(
    ("architecture", "text"), [("HulumedQwen2ForCausalLM", "qwen2"), ("HulumedQwen3ForCausalLM", "qwen3")]
)
def test_text_model_follows_the_published_architecture(architecture: str, text: str, tmp_path: Path) -> None:
    """The 7B and 32B are Qwen2, the 4B and 14B Qwen3."""
    folder = write_hulu_med(tmp_path / "hulu")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [architecture]}

    stock = stock_config(config)

    assert stock.text_config.model_type == text
    assert stock.text_config.num_hidden_layers == 4
    assert stock.vision_config.num_hidden_layers == 3
    assert stock.image_token_id == stock.video_token_id == 500


def test_hulu_med_without_image_token_is_refused(tmp_path: Path) -> None:
    """Without the id of the image token no image could be placed."""
    config = json.loads((write_hulu_med(tmp_path / "hulu") / "config.json").read_text())
    config["image_token_index"] = -1

    with pytest.raises(ConfigurationError, match="image_token_index"):
        stock_config(config)


def test_hulu_med_without_processor_numbers_is_refused(tmp_path: Path) -> None:
    """The image processor's numbers are not guessed."""
    folder = write_hulu_med(tmp_path / "hulu")
    (folder / "preprocessor_config.json").unlink()

    with pytest.raises(ConfigurationError, match=r"preprocessor_config\.json"):
        open_folder(ModelSettings(device="cpu"), folder)
