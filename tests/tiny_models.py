"""Tiny model folders for the tests of the hosts: the recorded golden weights with a tokenizer and a processor.

One token per character; chat templates in the form of the real ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

GOLDEN = Path(__file__).parent / "golden"
IMAGE, START, END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + START + IMAGE + END + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VIDEO_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}{% for frame in range(part['num_frames']) %}{{ image_token }},{% endfor %}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_qwen3_vl(folder: Path) -> Path:
    """The golden Qwen3-VL with what a published folder has beside its weights."""
    _copy(GOLDEN / "qwen3vl", folder)
    _tokenizer(QWEN_TEMPLATE).save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 64, "longest_edge": 48 * 56},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(folder)
    return folder


def write_video_llama3(folder: Path) -> Path:
    """The golden Hulu-Med weights under the stock names."""
    _copy(GOLDEN / "hulumed", folder)
    _tokenizer(VIDEO_TEMPLATE).save_pretrained(folder)
    VideoLlama3ImageProcessorPil(
        patch_size=4,
        merge_size=1,
        size={"shortest_edge": 64, "longest_edge": 64 * 64},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(folder)
    return folder


def write_hulu_med(folder: Path) -> Path:
    """The same weights as Hulu-Med publishes them: other names, a flat configuration, its own processor."""
    folder.mkdir(parents=True)
    renamed = {_hulu_med_name(key): value for key, value in load_file(GOLDEN / "hulumed" / "model.safetensors").items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    stock = json.loads((GOLDEN / "hulumed" / "config.json").read_text())
    config = stock["text_config"] | {
        "architectures": ["HulumedQwen2ForCausalLM"],
        "model_type": "hulumed_qwen2",
        "auto_map": {"AutoModelForCausalLM": "modeling_hulumed_qwen2.HulumedQwen2ForCausalLM"},
        "mm_projector_type": "mlp2x_gelu",
        "image_token_index": stock["image_token_id"],
        "use_token_compression": True,
        "vision_encoder_config": stock["vision_config"] | {"model_type": "hulumed_vision_encoder"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_hulumed_qwen2.py").write_text("raise SystemExit('code of a model folder was run')\n")
    numbers = {
        "image_processor_type": "HulumedImageProcessor",
        "patch_size": 4,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "min_tokens": 4,
        "max_tokens": 256,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))
    _tokenizer(VIDEO_TEMPLATE).save_pretrained(folder)
    return folder


def _hulu_med_name(key: str) -> str:
    for stock, published in (
        ("model.vision_model.", "model.vision_encoder."),
        ("model.projector.", "model.mm_projector."),
        ("model.language_model.", "model."),
    ):
        if key.startswith(stock):
            return published + key.removeprefix(stock)
    return key


def _copy(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, folder / name)


def _tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Ids as in the golden configurations: 0, 1, 2 pad, end, begin; 500, 501, 502 image, start, end of vision."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>", "\n", *map(chr, range(32, 127))]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    vocabulary |= {IMAGE: 500, START: 501, END: 502}
    vocabulary |= {f"<{place}>": place for place in range(512) if place not in vocabulary.values()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", IMAGE, START, END],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
