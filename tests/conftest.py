"""Settings of all tests, and what tests of several rooms share."""

from hypothesis import settings
from trained_runs import plain_model, trained_runs

__all__ = ["plain_model", "trained_runs"]

settings.register_profile("shared", deadline=None)  # a busy machine is no failure; pytest-timeout ends what hangs
settings.load_profile("shared")
