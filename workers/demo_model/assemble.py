"""The last step of training: the trained parts as a model folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Gemma3ForConditionalGeneration

from workers.demo_model.folder import new_model, write_folder

WEIGHTS = Path(__file__).parent / "weights"


def assemble(folder: Path, target: Path = WEIGHTS, mean_with: Path | None = None) -> None:
    """Write decoder.pt of a training folder (it holds tower and projector too) in the transformers format.

    mean_with: a model folder, that the training began with; written is the mean of each weight, which keeps what the
    training learnt and loses much of what it forgot on its way.
    """
    state = torch.load(folder / "decoder.pt", weights_only=True)
    model = new_model(0)
    model.load_state_dict(state["model"])
    if mean_with is not None:
        model.bfloat16()  # as both are written
        other = Gemma3ForConditionalGeneration.from_pretrained(mean_with, local_files_only=True, dtype=torch.bfloat16)
        before, after = other.state_dict(), model.state_dict()
        model.load_state_dict({name: torch.lerp(after[name].float(), before[name].float(), 0.5) for name in after})
    write_folder(model, target)
