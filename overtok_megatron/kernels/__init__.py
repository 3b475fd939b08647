"""Implementations of passes over activations and over table rows.

These are torch's operators, compiled loops on CPU, passes that torch.compile fuses, Triton kernels, liger-kernel and apex.
`choose_kernels` chooses them once per device (training.kernels); the result is passed down as an argument.
"""
