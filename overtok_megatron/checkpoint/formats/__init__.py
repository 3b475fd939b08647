"""Checkpoints of other programs: Hugging Face folders in and out, streaming, as pure functions of names and tensors."""
