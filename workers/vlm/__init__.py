"""Vision-language models with pruned visual tokens: one Protocol, one file per host.

Importing this package loads neither torch nor transformers; opening a model does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.shared.messages import FindingName, Flag, ModelIdentity
from service.shared.settings import ModelSettings, PruningSettings
from workers.guide import Guide
from workers.questions import Question
from workers.vlm.prompt import DroppedSlices

# numbers of the inputs kept (from 1, as the prompt names them) -> what to ask
Questions = Callable[[Sequence[int]], Sequence[Question]]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What to look at, and what to ask about it.

    images: (I, H, W, 3) uint8, the inputs in stack order.
    guide: of the same inputs, for method `guarded`; without it that method knows of attention alone.
    questions: what to ask after the report, each as if it alone followed the report.
    cache: the study's own folder; features kept there from an earlier prompt about the same inputs are used.
    """

    images: NDArray[np.uint8]
    prompt: str
    pruning: PruningSettings
    max_new_tokens: int
    dropped: DroppedSlices = DroppedSlices.OMIT
    guide: Guide | None = None
    questions: Questions | None = None
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The funnel of visual tokens, and the text around them."""

    tokens_in: int  # inputs x tokens per input
    tokens_kept: int  # entered the language model, merged targets included
    tokens_merged: int  # live on only in a target
    tokens_text: int  # of the prompt, no visual tokens
    tokens_generated: int


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """What a model said about one study, and what of it the model was shown.

    I inputs in stack order, n = token_rows * token_columns tokens each, row by row.
    inputs_kept: (I,) bool; False was never encoded.
    represented_by: (I,) int32, the kept input that stands for this one (itself when kept).
    tokens: (I, n) uint8, codes of service.shared.messages.TOKEN_CODES.
    merged_into: (I, n) int32, token of the same input, -1 where not merged.
    scores: (I, n) float32, attention received (averages 1 per input); NaN where not scored.
    timings_s: step -> seconds, in the order of the way.
    answers: per question, how probable each of its answers is, in their order; they add up to 1.
    """

    text: str
    truncated: bool  # ended at max_new_tokens, not at the model's own end
    repetition: bool  # ended in a loop; only its first round is in the text
    inputs_kept: NDArray[np.bool_]
    represented_by: NDArray[np.int32]
    tokens: NDArray[np.uint8]
    merged_into: NDArray[np.int32]
    scores: NDArray[np.float32]
    token_rows: int
    token_columns: int
    counts: TokenCounts
    timings_s: dict[str, float]
    memory_peak_bytes: int
    questions: tuple[Question, ...] = ()
    answers: tuple[tuple[float, ...], ...] = ()


class VisionLanguageModel(Protocol):
    """One loaded model. Holds no state of a study between two calls."""

    @property
    def identity(self) -> ModelIdentity: ...

    @property
    def flags(self) -> tuple[Flag, ...]:
        """What every report of these weights must say (random or demonstration weights)."""
        ...

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The input these weights were trained on, as their folder's medpruner.json says; empty: MedGemma's."""
        ...

    @property
    def coded_findings(self) -> tuple[FindingName, ...]:
        """What these weights were trained to be asked in closed questions, as medpruner.json says; else nothing."""
        ...

    @property
    def limitations(self) -> tuple[str, ...]:
        """What was measured of these weights, in sentences that every report repeats, as medpruner.json says."""
        ...

    def look(self, reading: Reading) -> Any:
        """Do everything up to the language model, of one study.

        Refusal CONTEXT_TOO_LONG when what is left after pruning does not fit the model, TOO_FEW_SLICES when there is
        nothing to look at.
        """
        ...

    def say(self, studies: Sequence[Any]) -> list[Generation]:
        """Let the language model speak about what look() returned, all studies together: each says what it says alone.

        Greedy: the same inputs give the same text.
        """
        ...


def open_model(settings: ModelSettings, folder: Path | None = None) -> VisionLanguageModel:
    """Load the model in `folder` (or where [model] path points), offline, safetensors only, no remote code.

    The host is chosen by `architectures` of config.json. ConfigurationError names what is wrong and the remedy.
    """
    from workers.vlm.folder import open_folder  # torch and transformers: not before a model is opened

    return open_folder(settings, folder)
