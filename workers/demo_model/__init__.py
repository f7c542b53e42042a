"""The demonstration model: CT phantoms, how the model is trained on them, and its weights."""
