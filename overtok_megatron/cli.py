"""The command `overtok`, with a verb for each job; a user's mistake is reported in one line."""

import argparse
import os
import sys
from collections.abc import Sequence

from overtok_megatron import __version__
from overtok_megatron.commands import (
    checkpoints,
    conversion,
    data,
    doctor,
    evaluation,
    growing,
    runs,
    serving,
    studies,
    text,
)
from overtok_megatron.environment import asks_for_cpu, set_library_defaults
from overtok_megatron.errors import OvertokError
from overtok_megatron.files import shown


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(prog="overtok", description="Pretrain over-tokenized transformers.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="verb")
    for module in (runs, studies, doctor, data, checkpoints, conversion, growing, text, evaluation, serving):
        module.add_verbs(verbs)
    return parser


def default_processes() -> int:
    """One rank per GPU; one where there is no GPU, or DS_ACCELERATOR chooses the CPU."""
    if asks_for_cpu(os.environ):
        return 1
    from overtok_megatron.parallel.devices import num_accelerators

    return max(1, num_accelerators())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C, or what the verb returns.

    `train` returns the code of its ranks, 1 where they ended otherwise than by leaving with one.
    """
    set_library_defaults(os.environ)  # before torch is imported, which loads OpenMP
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        form = (
            "; values of the run are written section.key=value, without dashes" if hasattr(options, "overrides") else ""
        )
        print(f"error: {rest[0]!r} is not an option of this verb (--help lists them){form}", file=sys.stderr)
        return 2
    if rest:  # argparse takes positionals from one place only: overrides after an option are returned in `rest`
        options.overrides += rest
    try:
        if getattr(options, "processes", 1) is None and getattr(options, "hostfile", None) is None:
            options.processes = default_processes()
        code: int = options.work(options)
    except OvertokError as error:
        for line in error.lines:
            print(f"error: {shown(line)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
