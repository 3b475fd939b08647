"""The DeepSpeed entry for those who call the launcher themselves: `deepspeed launchers/train.py RESOLVED_CONFIG`.

`overtok train` does the same after checking the configuration and setting the environment; prefer it on one host.
"""

import sys

from overtok_megatron.training.entry import main

if __name__ == "__main__":
    sys.exit(main())
