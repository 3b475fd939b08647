"""Traces of chosen steps and ranks by torch's profiler: every operator, and every collective by the name of its group."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile

from overtok_megatron.parallel.devices import num_accelerators


class Tracer:
    """Writes `<folder>/step_<first>-rank_<rank>.json`, for chrome://tracing or Perfetto, of steps first .. last.

    steps: [first, last] (1, 2, ...), or empty = no trace. ranks: the ranks that write one.
    """

    def __init__(self, folder: Path, steps: Sequence[int], ranks: Sequence[int]) -> None:
        self._folder = folder
        self._steps = tuple(steps)
        self._ranks = frozenset(ranks)
        self._profiler: profile | None = None

    @contextmanager
    def step(self, step: int, rank: int) -> Iterator[None]:
        """Around one training step."""
        if self._steps and rank in self._ranks and step == self._steps[0]:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if num_accelerators() else [])]
            # tokens are handed out, and rows fetched ahead, on threads
            every_thread = _ExperimentalConfig(profile_all_threads=True)
            self._profiler = profile(activities=activities, experimental_config=every_thread)
            self._profiler.start()
        yield
        if self._profiler is not None and step == self._steps[1]:
            self._profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._folder / f"step_{self._steps[0]:08d}-rank_{rank}.json"))
            self._profiler = None
