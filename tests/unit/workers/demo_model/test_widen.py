"""A tower of twice the width goes on from a narrow one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import SiglipVisionModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from workers.demo_model.architecture import VISION_HEAD_WIDTH, VISION_WIDTH
from workers.demo_model.folder import new_model
from workers.demo_model.train_vision import Eyes, eyes_of


def write_tower(folder: Path, width: int) -> None:
    """Weights whose tower is of another width; its weights are drawn, biases and norms too."""
    model = new_model(5)
    shape = model.config.vision_config
    shape.hidden_size, shape.intermediate_size = width, 4 * width
    shape.num_attention_heads = width // VISION_HEAD_WIDTH
    model.model.vision_tower = SiglipVisionModel(shape)
    model.model.multi_modal_projector = Gemma3MultiModalProjector(model.config)
    random = torch.Generator().manual_seed(3)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        for weight in part.parameters():
            torch.nn.init.normal_(weight, 0.1, 0.15, generator=random)
    model.save_pretrained(folder)


def images() -> torch.Tensor:
    return torch.rand((2, 3, 120, 120), generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_tower_of_twice_the_width_gives_the_same_tokens(tmp_path: Path) -> None:
    """What the narrow one has learned is kept."""
    write_tower(tmp_path, VISION_WIDTH // 2)
    eyes, old = Eyes(0).eval(), eyes_of(tmp_path)

    eyes.take_over(tmp_path)

    with torch.no_grad():
        torch.testing.assert_close(eyes.tokens(images()), old.tokens(images()), rtol=1e-3, atol=1e-3)


def test_the_two_copies_of_a_unit_part_in_training(tmp_path: Path) -> None:
    """Or nothing would be gained by the second."""
    write_tower(tmp_path, VISION_WIDTH // 2)
    eyes = Eyes(0)
    eyes.take_over(tmp_path)

    eyes.tokens(images()).square().sum().backward()  # type: ignore[no-untyped-call]

    half = VISION_WIDTH // 2
    for gradient in (
        eyes.tower.embeddings.patch_embedding.weight.grad,
        eyes.tower.encoder.layers[0].self_attn.q_proj.weight.grad,
        eyes.tower.encoder.layers[2].mlp.fc1.weight.grad,
    ):
        first, second = gradient[:half], gradient[half : 2 * half]
        assert (first - second).norm() > 0.1 * first.norm()


def test_tower_of_another_width_is_refused(tmp_path: Path) -> None:
    """The message says which widths would do."""
    write_tower(tmp_path, VISION_WIDTH // 4)

    with pytest.raises(SystemExit, match=f"{VISION_WIDTH} or {VISION_WIDTH // 2}"):
        Eyes(0).take_over(tmp_path)
