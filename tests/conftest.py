"""Settings of all tests, and what tests of several rooms share."""

import os
import signal

import pytest
from hypothesis import settings

from overtok_megatron.environment import set_library_defaults

set_library_defaults(os.environ)  # before torch is imported below

pytest.register_assert_rewrite("support")  # their assertions say what was compared, as those of tests do

from support.marker_expressions import asks_for_gpu  # noqa: E402
from support.small_models import small_model  # noqa: E402
from support.trained_runs import plain_model, trained_runs  # noqa: E402

__all__ = ["plain_model", "small_model", "trained_runs"]

settings.register_profile("shared", deadline=None)  # a busy machine is no failure; pytest-timeout ends what hangs
settings.load_profile("shared")


def pytest_configure(config: pytest.Config) -> None:
    """Tests run on the CPU, on any machine: with more ranks than GPUs, and to the last bit. `-m gpu` asks for the others."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as where a script starts the tests in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # commands under test would ignore it as well
    if not asks_for_gpu(config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"
