"""The entry of a run whose rank 1 dies once, in the fourth step of torchrun's first start: `-m support.dying_entry CONFIG`."""

import os
import signal
from typing import Any

from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.entry import run_and_leave

if __name__ == "__main__":
    step, calls = TrainingEngine.step, iter(range(10**9))

    def dies(self: TrainingEngine, *arguments: Any, **others: Any) -> Any:
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and next(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments, **others)

    TrainingEngine.step = dies  # type: ignore[method-assign]
    run_and_leave()
