"""Qwen3-VL: one image per slice, deepstack features, M-RoPE positions that survivors keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from workers.pruning.groups import runs
from workers.pruning.slices import SliceChoice
from workers.vlm.assemble import Prompt, PrunedPrompt, padded
from workers.vlm.encode import Prepared
from workers.vlm.folder import Opened, load_weights
from workers.vlm.host import Host
from workers.vlm.patches import expand, load_image_processor, load_tokenizer, prepare_patches
from workers.vlm.prompt import DroppedSlices
from workers.vlm.tap import tapped, vision_attention


class Qwen3VL(Host):
    architecture_class = Qwen3VLForConditionalGeneration

    def __init__(self, opened: Opened, model: Any, tokenizer: Any, image_processor: Any) -> None:
        super().__init__(opened, model)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.model.model.visual.set_attn_implementation(tapped(vision_attention(opened.attention)))

    @classmethod
    def load(cls, opened: Opened) -> Qwen3VL:
        model = load_weights(cls.architecture_class, opened, opened.attention)
        return cls(opened, model, load_tokenizer(opened), load_image_processor(opened))

    @property
    def placeholder(self) -> int:
        return int(self.model.config.image_token_id)

    @property
    def words(self) -> Any:
        return self.tokenizer

    @property
    def watched_layer(self) -> nn.Module:
        layer: nn.Module = self.model.model.visual.blocks[-1].attn
        return layer

    @property
    def _merge(self) -> int:
        """Side of the block of patches that becomes one token."""
        return int(self.model.model.visual.spatial_merge_size)

    def prepare(self, images: NDArray[np.uint8]) -> Prepared:
        return prepare_patches(self.image_processor, images)

    def groups(self, prepared: Prepared) -> Tensor:
        return runs(prepared.patch_rows * prepared.patch_columns, self._merge**2)

    def token_grid(self, prepared: Prepared) -> tuple[int, int]:
        return prepared.patch_rows // self._merge, prepared.patch_columns // self._merge

    def features(self, pixels: Tensor, prepared: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = self.model.model.get_image_features(
            pixels.flatten(0, 1), self._grids(prepared, len(pixels)).to(pixels.device), return_dict=True
        )
        deepstack = tuple(torch.stack(list(layer)) for layer in output.deepstack_features)
        return torch.stack(list(output.pooler_output)), deepstack

    def ask(self, question: str, prepared: Prepared, choice: SliceChoice, dropped: DroppedSlices) -> Prompt:
        """The images in turn, then the question; slices have no names here, so none can be named as dropped.

        Positions are those of the prompt with every slice in it: what is left keeps its place in space.
        """
        inputs, tokens = len(choice.kept), self.groups(prepared).shape[0]
        content: list[dict[str, str]] = [{"type": "image"} for _ in range(inputs)]
        content.append({"type": "text", "text": question})
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        text = expand(text, self.tokenizer.convert_ids_to_tokens(self.placeholder), inputs, tokens)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        positions = self.positions(ids, prepared, inputs)
        places = (ids == self.placeholder).nonzero().view(inputs, tokens)
        shown = torch.ones_like(ids, dtype=torch.bool)
        for place in places[~choice.kept]:
            shown[place[0] - 1 : place[-1] + 2] = False  # with the marks of start and end around it
        return Prompt(ids[shown], positions[:, shown])

    def positions(self, ids: Tensor, prepared: Prepared, inputs: int) -> Tensor:
        """Return (3, L) positions in time, height and width of a prompt that holds all inputs."""
        positions, _ = self.model.model.get_rope_index(
            ids[None],
            mm_token_type_ids=(ids == self.placeholder).long()[None],
            image_grid_thw=self._grids(prepared, inputs),
        )
        result: Tensor = positions[:, 0]
        return result

    def _grids(self, prepared: Prepared, inputs: int) -> Tensor:
        return torch.tensor([[1, prepared.patch_rows, prepared.patch_columns]]).expand(inputs, 3)

    def arguments(self, prompts: Sequence[PrunedPrompt]) -> dict[str, Any]:
        device = self.opened.device
        mask = padded([torch.ones_like(prompt.input_ids) for prompt in prompts], 0)
        positions = [prompt.positions for prompt in prompts if prompt.positions is not None]
        space = padded(positions, 0).transpose(0, 1)  # (3, B, L)
        order = (mask.cumsum(dim=-1) - 1).clamp(min=0)  # of the cache and the causal mask
        deepstack: Any = [list(layer) for layer in zip(*(prompt.deepstack for prompt in prompts), strict=True)]
        pooled: Any = [prompt.features for prompt in prompts]
        features = BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=deepstack)
        return {
            "input_ids": padded([prompt.input_ids for prompt in prompts], self._pad()).to(device),
            "attention_mask": mask.to(device),
            "position_ids": torch.cat([order[None], space]).to(device),
            "mm_encoder_outputs": {"image": features},
        }

    def positions_after(self, prompt: PrunedPrompt, length: int, more: int) -> Tensor:
        """Text goes on after the last position of the prompt, one by one in time, height and width alike."""
        order = super().positions_after(prompt, length, more)
        if prompt.positions is None:
            raise ValueError("a prompt of this host has positions")
        space = order - len(prompt.input_ids) + 1 + prompt.positions[:, -1:]
        return torch.stack([order, *space[:, None]])

    def forget(self) -> None:
        self.model.model.rope_deltas = None  # the stock class keeps them from one call to the next

    def text_of(self, tokens: Tensor) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
