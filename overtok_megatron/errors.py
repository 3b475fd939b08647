"""The named errors for a user's mistake. A line says: what (file, key or rank), its value, the rule, the way out.

An invariant that only a bug can break is an `assert`, not one of these.
"""


class OvertokError(Exception):
    """Base of every error that the command line prints without a traceback: a line for each of its arguments, mostly one."""

    exit_code = 2  # of a process that it ends

    @property
    def lines(self) -> list[str]:
        """A line for each mistake; a character that begins a new line is part of a name."""
        return [str(one) for one in self.args]

    def __str__(self) -> str:
        return "\n".join(self.lines)


class ConfigError(OvertokError):
    """A configuration key is unknown, has a wrong value, or cannot be combined with another."""


class DataError(OvertokError):
    """A corpus, tokenizer or dataset file is missing, damaged or does not fit the run."""


class CheckpointError(OvertokError):
    """A checkpoint is missing, damaged, of another shape, or could not be written."""


class InUseError(CheckpointError):
    """Another process writes into the folder; it may be waited for."""


class InputError(OvertokError):
    """A request to a trained model (a prompt, a sampling setting) that cannot be served."""


class DivergedError(OvertokError):
    """Training has left the finite numbers. Raised on every rank at the same step."""


class WeightsError(OvertokError):
    """Ranks that should hold the same weights do not: memory or a link has failed. Raised on every rank at the same step."""

    exit_code = 1  # not the user's mistake: a start from the last checkpoint may go well


class OutputError(OvertokError):
    """A verb would write over one of its inputs, or over something that it did not make."""
