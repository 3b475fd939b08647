"""The entry of a run whose rank 1 takes 0.3 s longer for each update of rows: `python -m support.late_entry CONFIG`."""

import os
import time
from typing import Any

from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.training.entry import run_and_leave

if __name__ == "__main__":
    update = RowOptimizer.update

    def late(self: RowOptimizer, *arguments: Any) -> None:
        if os.environ["RANK"] == "1":
            time.sleep(0.3)
        update(self, *arguments)

    RowOptimizer.update = late  # type: ignore[method-assign]
    run_and_leave()
