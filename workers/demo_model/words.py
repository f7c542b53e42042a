"""The words of the demonstration model: whole words, numbers and punctuation, closed over all report phrasings
and questions."""

from __future__ import annotations

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
IMAGE_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
LARGEST_NUMBER = 256  # slice numbers and mm share them
LARGEST_ANSWER = 64  # numbers that stand alone as an answer, without a space before them
SPACE = "▁"  # stands for the space before a word, as in Gemma's own vocabulary


def vocabulary() -> dict[str, int]:
    """Token to number."""
    return {token: number for number, token in enumerate(_tokens())}


def _tokens() -> list[str]:
    words = _PLAIN.split()
    spaced = [SPACE + word for word in words] + words + [SPACE + str(n) for n in range(1, LARGEST_NUMBER + 1)]
    spaced += [str(n) for n in range(1, LARGEST_ANSWER + 1)]
    tokens = [*SPECIAL_TOKENS, *IMAGE_TOKENS.values(), "\n", SPACE, ".", ",", ":", "?", *spaced]
    return list(dict.fromkeys(tokens))


_PLAIN = """
user model SLICE Findings Impression Describe this CT study report
Body body region not supported by This is no a chest of the kind this model was trained on which alone images show
No reading given abnormality found acute Normal normal
lung nodule pleural effusion consolidation pneumothorax Heart heart size aortic calcification calcifications
Lungs without nodules Pleural spaces are free fluid airspace opacity seen Aorta aorta calcified wall
pulmonary identified There there The lungs cardiomegaly Cardiomegaly enlarged Aortic Calcified plaques
Right right Left left Bilateral bilateral upper mid lower Upper Mid Lower zone solid Solid ground Ground glass
mm in small moderate large Small Moderate Large Consolidation it
You radiology assistant Read slices examination order and write with sections
Is there Answer yes or no Which side is the both Diameter of largest shows best its number
"""
