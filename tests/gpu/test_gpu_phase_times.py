"""Phases on a GPU are timed by its own clock, and the host never waits for it."""

import pytest
import torch

from overtok_megatron.parallel import spans
from overtok_megatron.training.phase_times import COMPUTE, PHASES, PhaseTimes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def cycles_of(seconds: float) -> int:
    """How many cycles `torch.cuda._sleep` takes for so many seconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(10_000_000)
    end.record()
    end.synchronize()
    return int(10_000_000 * 1000 * seconds / begin.elapsed_time(end))


def test_kernels_are_timed_in_their_phases_and_collectives_as_waiting() -> None:
    device = torch.device("cuda", 0)
    cycles_of(0.01)  # the first kernel loads the module
    tenth = cycles_of(0.1)
    times = PhaseTimes(device, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (2, 3):
            times.begin_step(step)
            with times.phase(COMPUTE):
                torch.cuda._sleep(tenth)
                with spans._Span("a collective"):
                    torch.cuda._sleep(2 * tenth)
        times.begin_step(4)
        assert times.take().steps < 2, "the device has not passed the last event, and nobody has waited for it"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step in (5, 6, 7):
        times.begin_step(step)
        with times.phase(COMPUTE):
            torch.cuda._sleep(tenth)
            with spans._Span("a collective"):
                torch.cuda._sleep(2 * tenth)
    times.begin_step(8)
    torch.cuda.synchronize()
    found = times.take()
    times.stop()
    assert found.steps == 3
    assert found.waited == pytest.approx(0.2, rel=0.3)
    assert found.busy[COMPUTE] == pytest.approx(0.1, rel=0.3)
    assert sum(found.busy[phase] for phase in PHASES if phase != COMPUTE) < 0.02
