"""Checkpoints: complete or invisible folders of safetensors and engine files, checksummed, named by an atomic pointer."""
