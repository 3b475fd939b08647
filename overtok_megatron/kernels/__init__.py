"""Implementations of the passes over activations: torch's, this project's on CPU, NVIDIA apex's. Chosen once, by a key."""
