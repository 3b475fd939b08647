"""The entry of a run whose rank 1 computes forever in its fourth step: `python -m support.stuck_entry CONFIG`."""

import os
from typing import Any

from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.entry import run_and_leave

if __name__ == "__main__":
    step, calls = TrainingEngine.step, iter(range(10**9))

    def stuck(self: TrainingEngine, *arguments: Any, **others: Any) -> Any:
        stays = os.environ["RANK"] == "1" and next(calls) >= 3
        while stays:
            pass
        return step(self, *arguments, **others)

    TrainingEngine.step = stuck  # type: ignore[method-assign]
    run_and_leave()
