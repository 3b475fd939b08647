"""The checks of `tools/gpu_check.py`: their registry, the processes that run them, and the checks themselves."""
