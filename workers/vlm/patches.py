"""What hosts share whose processor gives flat patches, in the order of the blocks that become one token.

Their AutoProcessor needs torchvision for videos that we never feed, so tokenizer and image processor are loaded
one by one.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from service.shared.settings import ConfigurationError
from workers.vlm.encode import Prepared
from workers.vlm.folder import Opened

IMAGES_AT_ONCE = 16  # through the processor, which works in several copies of float


def load_tokenizer(opened: Opened) -> Any:
    """Load the tokenizer with its chat template, which some folders keep in a file of its own."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(opened.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"[model] path: {opened.folder} lacks its tokenizer: {error}") from error
    legacy = opened.folder / "chat_template.json"
    if tokenizer.chat_template is None and legacy.exists():
        tokenizer.chat_template = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
    if tokenizer.chat_template is None:
        raise ConfigurationError(f"[model] path: {opened.folder} has no chat template (chat_template.jinja)")
    return tokenizer


def load_image_processor(opened: Opened) -> Any:
    """Load the image processor that works with PIL alone: the same pixels on every machine."""
    try:
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            opened.folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"[model] path: {opened.folder} lacks its image processor: {error}") from error


def prepare_patches(image_processor: Any, images: NDArray[np.uint8], **options: Any) -> Prepared:
    """Run the processor on (I, H, W, 3) images of one size, a few at a time."""
    parts = [
        image_processor(
            images=list(images[first : first + IMAGES_AT_ONCE]),
            input_data_format="channels_last",
            return_tensors="pt",
            **options,
        )
        for first in range(0, len(images), IMAGES_AT_ONCE)
    ]
    _, rows, columns = parts[0]["image_grid_thw"][0].tolist()
    return patches(torch.cat([part["pixel_values"] for part in parts]), rows, columns)


def patches(pixels: Tensor, rows: int, columns: int) -> Prepared:
    """pixels: (I * rows * columns, d), all inputs one after the other."""
    return Prepared(pixels.view(-1, rows * columns, pixels.shape[-1]), rows, columns)


def expand(text: str, token: str, images: int, tokens: int) -> str:
    """Write each image's token `tokens` times; ConfigurationError when the text holds other than one per image."""
    if text.count(token) != images:
        raise ConfigurationError(
            f"the prompt holds {text.count(token)} image tokens for {images} images: take {token} out of [report] "
            "prompt or of the route's, or the folder's chat template does not show images"
        )
    return text.replace(token, token * tokens)
