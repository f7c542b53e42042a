"""The demonstration model as a folder in the transformers format, made without any download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Gemma3ForConditionalGeneration, Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.utils import logging

from service.shared.messages import FindingName
from workers.demo_model.architecture import TOKENS_PER_IMAGE, config
from workers.demo_model.channels import BLOB_FULL_HU, DENSE_HU, LINE_MM, PIXELS, SLABS, THIRD_CHANNEL, WINDOWS_HU
from workers.demo_model.words import IMAGE_TOKENS, SPACE, SPECIAL_TOKENS, vocabulary

MARK = "medpruner.json"  # beside config.json: what kind of weights these are, and which input they want
MARK_CONTENT: dict[str, Any] = {
    "name": "demonstration model",
    "weights": "demonstration",
    "slice_names": "before",  # "SLICE 1:", image, ..., as the prompts of training
    "coded_findings": [name.value for name in FindingName],  # what it was taught to answer questions about
    "preprocessing": {
        "slabs": SLABS,
        "slab_operation": "mean",
        "pixels": PIXELS,
        "windows_hu": [list(window) for window in WINDOWS_HU],
        "third_channel": THIRD_CHANNEL,
        "blob_full_hu": BLOB_FULL_HU,
        "blob_line_mm": LINE_MM,
        "dense_hu": DENSE_HU,
        "slice_order": "head first",
    },
}

# Blank lines around images are dropped by the tokenizer's normalizer: they would cost four tokens per slice.
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}<start_of_turn>\
{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}\
{% endfor %}{% endif %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words with their space before them, numbers, punctuation and line ends."""
    words = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    words.normalizer = normalizers.Replace(Regex(r"\n\n+"), "")
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\n.,:?]"), "isolated"),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=True),
        ]
    )
    words.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        bos_token=SPECIAL_TOKENS[2],
        unk_token=SPECIAL_TOKENS[3],
        extra_special_tokens={
            **IMAGE_TOKENS,
            "start_of_turn_token": SPECIAL_TOKENS[4],
            "end_of_turn_token": SPECIAL_TOKENS[5],
        },
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def processor() -> Gemma3Processor:
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(
            size={"height": PIXELS, "width": PIXELS},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            do_pan_and_scan=False,
        ),
        tokenizer=tokenizer(),
        chat_template=CHAT_TEMPLATE,
        image_seq_length=TOKENS_PER_IMAGE,
    )


def new_model(seed: int) -> Gemma3ForConditionalGeneration:
    """The whole model with untrained weights."""
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config(vocabulary(), IMAGE_TOKENS))
    model.generation_config.eos_token_id = [1, vocabulary()["<end_of_turn>"]]
    return model


def write_folder(model: Gemma3ForConditionalGeneration, folder: Path) -> None:
    """Weights in bfloat16, tokenizer, processor and the mark."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder.mkdir(parents=True, exist_ok=True)
    copy = new_model(0)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(folder)
    processor().save_pretrained(folder)
    (folder / MARK).write_text(json.dumps(MARK_CONTENT, indent=2) + "\n")
