"""Arguments that verbs of several modules take."""

import argparse

MOST = 2**31 - 1  # what libraries below take as a C int; no count of this package is larger


def positive(text: str) -> int:
    """A whole number from 1 to MOST."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"{value} is too large; {MOST} is the most")
    return value


def not_negative(text: str) -> int:
    """A whole number from 0 to MOST."""
    if text == "0":
        return 0
    try:
        return positive(text)
    except (argparse.ArgumentTypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text}; write a whole number from 0 to {MOST}") from None


def port(text: str) -> int:
    """The number of a port; 0 asks for a free one."""
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{value} is not a port; ports are numbers from 0 to 65535")
    return value


def workers(text: str) -> int:
    """A number of processes that this host can run side by side."""
    from overtok_megatron.config.capacity import most_processes  # late: `overtok --help` need not wait for the schema

    value = positive(text)
    if value > most_processes():
        raise argparse.ArgumentTypeError(f"{value} is more than this host can run; {most_processes()} is the most")
    return value
