"""`overtok import` and `overtok export` as a script: convert_checkpoint.py import FOLDER --output RUN, and the reverse."""

import sys

from overtok_megatron.cli import main

if __name__ == "__main__":
    if sys.argv[1:2] not in (["import"], ["export"]):
        sys.exit("usage: convert_checkpoint.py import|export ... (--help behind either says more)")
    sys.exit(main(sys.argv[1:]))
