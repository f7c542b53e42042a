"""What a study's input became and what was said about it, for the record: numpy, no tensor and no device."""

from __future__ import annotations

import numpy as np

from service.shared.messages import TOKEN_CODES, TokenState
from workers.questions import Question
from workers.vlm import Generation, TokenCounts
from workers.vlm.decoding import Ending
from workers.vlm.survivors import Survivors


def record(
    survivors: Survivors,
    grid: tuple[int, int],
    *,
    text: str,
    ending: Ending,
    text_tokens: int,
    generated: int,
    questions: tuple[Question, ...],
    answers: tuple[tuple[float, ...], ...],
    timings_s: dict[str, float],
    memory_peak_bytes: int,
) -> Generation:
    """grid: rows and columns of tokens; text_tokens: of the prompt; generated: tokens of the text."""
    kept = survivors.choice.kept.numpy()
    inputs, per_input = len(kept), survivors.kept.shape[1]
    codes = np.full((inputs, per_input), TOKEN_CODES[TokenState.NOT_ENCODED], dtype=np.uint8)
    merged_into = np.full((inputs, per_input), -1, dtype=np.int32)
    scores = np.full((inputs, per_input), np.nan, dtype=np.float32)
    merged_into[kept] = survivors.merged_into.cpu().numpy()
    scores[kept] = survivors.scores.cpu().numpy()
    codes[kept] = np.where(
        survivors.kept.cpu().numpy(),
        TOKEN_CODES[TokenState.KEPT],
        np.where(merged_into[kept] >= 0, TOKEN_CODES[TokenState.MERGED], TOKEN_CODES[TokenState.DROPPED]),
    )
    rows, columns = grid
    return Generation(
        text=text,
        truncated=ending is Ending.LENGTH,
        repetition=ending is Ending.REPETITION,
        inputs_kept=kept,
        represented_by=survivors.choice.anchor.numpy().astype(np.int32),
        tokens=codes,
        merged_into=merged_into,
        scores=scores,
        token_rows=rows,
        token_columns=columns,
        counts=TokenCounts(
            tokens_in=inputs * per_input,
            tokens_kept=int((codes == TOKEN_CODES[TokenState.KEPT]).sum()),
            tokens_merged=int((codes == TOKEN_CODES[TokenState.MERGED]).sum()),
            tokens_text=text_tokens,
            tokens_generated=generated,
        ),
        timings_s=timings_s,
        memory_peak_bytes=memory_peak_bytes,
        questions=questions,
        answers=answers,
    )
