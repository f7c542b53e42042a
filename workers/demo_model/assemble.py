"""The last step of training: the trained parts as a model folder."""

from __future__ import annotations

from pathlib import Path

import torch

from workers.demo_model.folder import new_model, write_folder

WEIGHTS = Path(__file__).parent / "weights"


def assemble(folder: Path, target: Path = WEIGHTS) -> None:
    """Write decoder.pt of a training folder (it holds tower and projector too) in the transformers format."""
    state = torch.load(folder / "decoder.pt", weights_only=True)
    model = new_model(0)
    model.load_state_dict(state["model"])
    write_folder(model, target)
