"""Hulu-Med and VideoLLaMA3: the slices are the frames of one video, 2 x 2 patches make a token.

Hulu-Med's own folders are read into the stock classes by renaming: same weights, same arithmetic. Its code is
not run, and its image processor is rebuilt from its numbers. Not tried with the published weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from service.shared.settings import ConfigurationError
from workers.pruning.groups import runs
from workers.pruning.slices import SliceChoice
from workers.vlm.assemble import Prompt, PrunedPrompt, padded
from workers.vlm.encode import Prepared
from workers.vlm.folder import Opened, load_weights
from workers.vlm.host import Host
from workers.vlm.patches import expand, load_image_processor, load_tokenizer, prepare_patches
from workers.vlm.prompt import DroppedSlices
from workers.vlm.tap import tapped, vision_attention

VIDEO_MERGE = 2  # side of the block of patches that becomes one token, for videos and volumes
HULU_MED = {"HulumedQwen2ForCausalLM": "qwen2", "HulumedQwen3ForCausalLM": "qwen3"}
# weights of Hulu-Med -> of the stock class; the first pattern that fits
HULU_MED_KEYS = {
    r"^model\.vision_encoder\.": "model.vision_model.",
    r"^model\.mm_projector\.readout\.": "model.projector.readout.",
    r"^model\.(?!vision_encoder\.|mm_projector\.|vision_model\.|projector\.|language_model\.)": "model.language_model.",
}


class VideoLlama3(Host):
    architecture_class = VideoLlama3ForConditionalGeneration

    def __init__(self, opened: Opened, model: Any, tokenizer: Any, image_processor: Any) -> None:
        super().__init__(opened, model)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.model.model.vision_model.set_attn_implementation(tapped(vision_attention(opened.attention)))

    @classmethod
    def load(cls, opened: Opened) -> VideoLlama3:
        options: dict[str, Any] = {}
        hulu_med = opened.identity.architecture in HULU_MED
        if hulu_med:
            config = json.loads((opened.folder / "config.json").read_text(encoding="utf-8"))
            options = {"config": stock_config(config), "key_mapping": HULU_MED_KEYS}
        model = load_weights(cls.architecture_class, opened, opened.attention, **options)
        image_processor = hulu_med_processor(opened) if hulu_med else load_image_processor(opened)
        return cls(opened, model, load_tokenizer(opened), image_processor)

    @property
    def placeholder(self) -> int:
        return int(self.model.config.image_token_id)

    @property
    def words(self) -> Any:
        return self.tokenizer

    @property
    def template_options(self) -> dict[str, Any]:
        token = self.tokenizer.convert_ids_to_tokens(self.placeholder)
        return {"image_token": token, "add_system_prompt": False}

    @property
    def watched_layer(self) -> nn.Module:
        layer: nn.Module = self.model.model.vision_model.encoder.layers[-1].self_attn
        return layer

    def prepare(self, images: NDArray[np.uint8]) -> Prepared:
        return prepare_patches(self.image_processor, images, merge_size=VIDEO_MERGE)

    def groups(self, prepared: Prepared) -> Tensor:
        return runs(prepared.patch_rows * prepared.patch_columns, VIDEO_MERGE**2)

    def token_grid(self, prepared: Prepared) -> tuple[int, int]:
        return prepared.patch_rows // VIDEO_MERGE, prepared.patch_columns // VIDEO_MERGE

    def features(self, pixels: Tensor, prepared: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        frames, device = len(pixels), pixels.device
        grid = torch.tensor([[frames, prepared.patch_rows, prepared.patch_columns]], device=device)
        output = self.model.model.get_image_features(
            pixels.flatten(0, 1), grid, torch.tensor([VIDEO_MERGE], device=device), return_dict=True
        )
        return output.pooler_output[0].unflatten(0, (frames, -1)), ()

    def ask(self, question: str, prepared: Prepared, choice: SliceChoice, dropped: DroppedSlices) -> Prompt:
        """A video of the kept slices, then the question; slices have no names here."""
        frames, tokens = int(choice.kept.sum()), self.groups(prepared).shape[0]
        token = self.template_options["image_token"]
        content = [{"type": "video", "num_frames": frames}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            **self.template_options,
        )
        text = expand(text, token, frames, tokens)
        return Prompt(self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0])

    def arguments(self, prompts: Sequence[PrunedPrompt]) -> dict[str, Any]:
        device = self.opened.device
        features: Any = [prompt.features for prompt in prompts]
        return {
            "input_ids": padded([prompt.input_ids for prompt in prompts], self._pad()).to(device),
            "attention_mask": padded([torch.ones_like(prompt.input_ids) for prompt in prompts], 0).to(device),
            "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)},
        }

    def text_of(self, tokens: Tensor) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def stock_config(hulu_med: dict[str, Any]) -> VideoLlama3Config:
    """Return the stock configuration of a Hulu-Med config.json: its flat text fields and its encoder's."""
    own = {"architectures", "auto_map", "vision_encoder", "vision_encoder_config", "mm_projector_type", "model_type"}
    text = {key: value for key, value in hulu_med.items() if key not in own}
    encoder = dict(hulu_med["vision_encoder_config"])
    for key in ("architectures", "auto_map", "model_type", "torch_dtype", "dtype", "_attn_implementation"):
        encoder.pop(key, None)
    token = hulu_med.get("image_token_index", -1)
    if not isinstance(token, int) or token < 0:
        raise ConfigurationError("[model] path: this Hulu-Med config.json names no image_token_index")
    return VideoLlama3Config(
        text_config=text | {"model_type": HULU_MED[hulu_med["architectures"][0]]},
        vision_config=encoder,
        image_token_id=token,
        video_token_id=token,
        tie_word_embeddings=bool(hulu_med.get("tie_word_embeddings", False)),
    )


def hulu_med_processor(opened: Opened) -> VideoLlama3ImageProcessorPil:
    """Build the stock image processor from the numbers of Hulu-Med's preprocessor_config.json."""
    path = opened.folder / "preprocessor_config.json"
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"[model] path: {path} is missing or no JSON") from error
    patch = int(numbers.get("patch_size", 14))
    tokens = {"shortest_edge": numbers.get("min_tokens", 16), "longest_edge": numbers.get("max_tokens", 1024)}
    return VideoLlama3ImageProcessorPil(
        patch_size=patch,
        merge_size=VIDEO_MERGE,
        image_mean=numbers.get("image_mean", [0.5, 0.5, 0.5]),
        image_std=numbers.get("image_std", [0.5, 0.5, 0.5]),
        size={edge: int(count) * patch**2 for edge, count in tokens.items()},
    )
