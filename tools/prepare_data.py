"""The same as `overtok prepare`, as a script."""

import sys

from overtok_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
