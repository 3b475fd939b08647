"""Implementations of passes over activations and over table rows: torch's operators, compiled loops on CPU, Triton, apex.

`choose_kernels` chooses them once per device (training.kernels); the result is passed down as an argument.
"""
