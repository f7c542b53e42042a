"""Write a tiny Gemma3 folder that was never trained: the whole way runs on it, its text is noise.

The vocabulary is single characters, so that the noise cannot be taken for words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.utils import logging

IMAGE_SIZE = 112  # pixels per side
PATCH_SIZE = 8  # 14 x 14 patches
TOKENS_PER_IMAGE = 49  # 7 x 7, each the mean of 2 x 2 patches
MARK = "medpruner.json"  # beside config.json: what kind of weights these are

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_IMAGE = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}

# The turns of Gemma 3: text and images of one user message in their order, then the model's turn.
_CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}\
{% endfor %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def write(folder: Path, seed: int) -> None:
    """Write config, weights, tokenizer and processor into `folder`; the same seed gives the same weights."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    _model(tokenizer, seed).save_pretrained(folder)
    Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            do_pan_and_scan=False,
        ),
        tokenizer=tokenizer,
        chat_template=_CHAT_TEMPLATE,
        image_seq_length=TOKENS_PER_IMAGE,
    ).save_pretrained(folder)
    (folder / MARK).write_text(json.dumps({"name": "random weights", "weights": "random"}) + "\n")


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: printable ASCII and the newline; anything else is unknown."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: place for place, token in enumerate((*_SPECIAL, *_IMAGE.values(), *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={**_IMAGE, "start_of_turn_token": "<start_of_turn>", "end_of_turn_token": "<end_of_turn>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Gemma3ForConditionalGeneration:
    number = tokenizer.get_vocab()
    identity: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=512,  # larger than one image block
            layer_types=["sliding_attention", "full_attention"],
            max_position_embeddings=32768,
            initializer_range=0.2,  # far from zero, so that the noise varies
            **identity,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            vision_use_head=False,
        ),
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        tie_word_embeddings=False,  # tied, an untrained model repeats its last token
        initializer_range=0.2,
        boi_token_index=number[_IMAGE["boi_token"]],
        eoi_token_index=number[_IMAGE["eoi_token"]],
        image_token_index=number[_IMAGE["image_token"]],
        **identity,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma3ForConditionalGeneration(config)
        # transformers starts the projection at zero: every image would look the same to the language model
        projection = model.model.multi_modal_projector.mm_input_projection_weight
        torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    model.generation_config.eos_token_id = [1, number["<end_of_turn>"]]
    return model
