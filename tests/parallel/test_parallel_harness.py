"""The harness itself: results in rank order, a rank's traceback in the failure, and no test that hangs for ever."""

import os
import time

import pytest

from support.distributed_harness import run_ranks


def _identity(value: int) -> tuple[int, int]:
    return int(os.environ["RANK"]), value


def _fails_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("broken on purpose")


def _hangs_on_one() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(600)


def test_results_come_back_in_rank_order() -> None:
    assert run_ranks(2, _identity, 7) == [(0, 7), (1, 7)]


def test_a_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed(.|\n)*_fails_on_one(.|\n)*broken on purpose"):
        run_ranks(2, _fails_on_one)


def test_a_hang_is_cut_off_and_its_rank_named() -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[.*1\] did not finish"):
        run_ranks(2, _hangs_on_one, timeout=8)
    assert time.monotonic() - began < 40
