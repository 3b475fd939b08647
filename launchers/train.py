"""The entry as a script, for those who call a launcher themselves: `deepspeed launchers/train.py CONFIG section.key=value ...`.

The same as `python -m overtok_megatron.training.entry`. `overtok train` also sets the variables of the allocator, which must be
there before a process starts; prefer it, or set them.
"""

from overtok_megatron.training.entry import run_and_leave

if __name__ == "__main__":
    run_and_leave()
