"""MedGemma and every other Gemma3ForConditionalGeneration: SigLIP tower, pooled square tokens, Gemma 3 text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoProcessor, Gemma3ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from service.shared.settings import ConfigurationError
from workers.pruning.groups import blocks
from workers.pruning.slices import SliceChoice
from workers.vlm.assemble import Prompt, PrunedPrompt, padded
from workers.vlm.encode import Prepared
from workers.vlm.folder import Opened, load_weights
from workers.vlm.host import Host
from workers.vlm.prompt import DroppedSlices, Image, joined, slices_in_turn
from workers.vlm.tap import tapped

IMAGES_AT_ONCE = 16  # through the processor, which works in several copies of float


class Gemma3(Host):
    architecture_class = Gemma3ForConditionalGeneration

    def __init__(self, opened: Opened, model: Any, processor: Any) -> None:
        super().__init__(opened, model)
        self.processor = processor
        self.model.model.vision_tower.set_attn_implementation(tapped(opened.attention))

    @classmethod
    def load(cls, opened: Opened) -> Gemma3:
        if opened.attention == "flash_attention_2":
            raise ConfigurationError(
                "[model] attention: flash_attention_2 drops Gemma 3's attention in both directions within an image, "
                "without a word; use sdpa, which takes flash kernels on CUDA where it may"
            )
        model = load_weights(cls.architecture_class, opened, opened.attention)
        try:
            processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                opened.folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"[model] path: {opened.folder} lacks its processor or tokenizer: {error}"
            ) from error
        return cls(opened, model, processor)

    @property
    def placeholder(self) -> int:
        return int(self.model.config.image_token_id)

    @property
    def words(self) -> Any:
        return self.processor.tokenizer

    @property
    def template(self) -> Any:
        return self.processor

    @property
    def watched_layer(self) -> nn.Module:
        layer: nn.Module = self.model.model.vision_tower.encoder.layers[-1].self_attn
        return layer

    def prepare(self, images: NDArray[np.uint8]) -> Prepared:
        parts = [
            self.processor.image_processor(
                images=list(images[first : first + IMAGES_AT_ONCE]),
                input_data_format="channels_last",
                do_pan_and_scan=False,  # crops would break `one image, one slice`
                return_tensors="pt",
            )["pixel_values"]
            for first in range(0, len(images), IMAGES_AT_ONCE)
        ]
        return self.prepared(torch.cat(parts))

    def prepared(self, pixels: Tensor) -> Prepared:
        """pixels: (I, 3, size, size), normalised."""
        side = self.model.model.multi_modal_projector.patches_per_image
        return Prepared(pixels, side, side)

    def groups(self, prepared: Prepared) -> Tensor:
        return blocks(prepared.patch_rows, prepared.patch_columns, self.model.model.multi_modal_projector.kernel_size)

    def token_grid(self, prepared: Prepared) -> tuple[int, int]:
        side = self.model.model.multi_modal_projector.tokens_per_side
        return side, side

    def features(self, pixels: Tensor, prepared: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.model.model.get_image_features(pixels, return_dict=True).pooler_output, ()

    def ask(self, question: str, prepared: Prepared, choice: SliceChoice, dropped: DroppedSlices) -> Prompt:
        """Images and their names in turn, in the order that the weights were trained with, then the question."""
        parts = slices_in_turn(choice.kept.tolist(), choice.anchor.tolist(), dropped, self.opened.slice_names)
        content = [
            {"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part}
            for part in joined([*parts, question])
        ]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        # what the processor does with images at hand; here they are already prepared, and fewer
        text = text.replace(self.processor.boi_token, self.processor.full_image_sequence)
        tokenizer = self.processor.tokenizer
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not has_bos, return_tensors="pt")["input_ids"][0]
        expected = int(choice.kept.sum()) * self.groups(prepared).shape[0]
        if int((ids == self.placeholder).sum()) != expected:
            raise ConfigurationError(
                "the prompt holds an image token of the model; take it out of [report] prompt or of the route's"
            )
        return Prompt(ids)

    def arguments(self, prompts: Sequence[PrunedPrompt]) -> dict[str, Any]:
        device = self.opened.device
        ids = padded([prompt.input_ids for prompt in prompts], self._pad()).to(device)
        mask = padded([torch.ones_like(prompt.input_ids) for prompt in prompts], 0).to(device)
        features = torch.cat([prompt.features for prompt in prompts])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            # runs of 1 attend in both directions: what survives of an image stays one block
            "token_type_ids": (ids == self.placeholder).long() * mask,
            "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features[None])},
        }

    def text_of(self, tokens: Tensor) -> str:
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True))
