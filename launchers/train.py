"""The DeepSpeed entry for those who call the launcher themselves: `deepspeed launchers/train.py RESOLVED_CONFIG`.

`overtok train` does the same after checking the configuration and setting the environment; prefer it on one host.
"""

from overtok_megatron.training.entry import run_and_leave

if __name__ == "__main__":
    run_and_leave()
