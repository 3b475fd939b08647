"""The same as `overtok train-tokenizer`, as a script."""

import sys

from overtok_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-tokenizer", *sys.argv[1:]]))
