"""The prompts that training builds are those that the product's host builds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from service.shared.messages import FindingName
from workers.demo_model.dialogue import Writer
from workers.demo_model.encode import Shown
from workers.demo_model.folder import processor, tokenizer
from workers.demo_model.labels import Labels
from workers.demo_model.report_text import PHRASINGS, write
from workers.demo_model.train_decoder import PROMPTS
from workers.questions import questions_about


def test_training_prompt_is_the_chat_template() -> None:
    """Token for token what the processor makes of slices and question in MedGemma's form."""
    slabs = 3
    shown = Shown(torch.zeros(slabs, 36, 128), torch.ones(slabs, 36, dtype=torch.bool))
    picture = Image.fromarray(np.zeros((120, 120, 3), np.uint8))
    content: list[dict[str, object]] = []
    for index in range(1, slabs + 1):
        content += [{"type": "text", "text": f"SLICE {index}:"}, {"type": "image", "image": picture}]
    content.append({"type": "text", "text": PROMPTS[0]})
    made = processor().apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )

    assert Writer(tokenizer()).prompt(shown, PROMPTS[0]) == list(made["input_ids"][0])


@pytest.mark.parametrize("phrasing", range(PHRASINGS))
def test_every_word_of_a_report_is_known(phrasing: int) -> None:
    """Text goes through the tokenizer and back unchanged."""
    words = tokenizer()
    for labels in (Labels(), Labels(supported=False)):
        text = str(write(labels, phrasing))

        assert words.decode(words(text, add_special_tokens=False)["input_ids"]) == text


def test_slabs_without_tokens_are_left_out_of_the_prompt() -> None:
    """The names of the others keep their numbers, so the gap can be seen."""
    kept = torch.zeros(3, 36, dtype=torch.bool)
    kept[2, 5] = True
    words = tokenizer()

    text = words.decode(Writer(words).prompt(Shown(torch.zeros(3, 36, 128), kept), PROMPTS[1]))

    assert "SLICE 3:" in text
    assert "SLICE 1:" not in text


def test_a_question_after_the_report_is_what_the_chat_template_makes() -> None:
    """User, model, user: token for token as the product goes on with the conversation."""
    words, question = tokenizer(), questions_about([FindingName.NODULE], [1])[0]
    turns = [
        {"role": "user", "content": [{"type": "text", "text": PROMPTS[1]}]},
        {"role": "assistant", "content": [{"type": "text", "text": str(write(Labels()))}]},
        {"role": "user", "content": [{"type": "text", "text": question.text}]},
    ]
    made = processor().apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    writer = Writer(words)
    prompt = writer.ids(f"<bos><start_of_turn>user\n{PROMPTS[1]}<end_of_turn>\n<start_of_turn>model\n")

    row = writer.row(prompt, Labels(), [(question, "no")])

    assert row.ids == writer.ids(made) + writer.ids("no<end_of_turn>")
