"""Learning-rate schedules as pure functions of the step. No state: a resumed run needs only its step number."""

import math
from dataclasses import dataclass
from typing import assert_never

from overtok_megatron.config.derived import train_iters
from overtok_megatron.config.schema import RunConfig, ScheduleKind


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak` over `warmup_iters`, then one of three ways down to `minimum` at `total_iters`.

    cosine: half a cosine from the end of warm-up. linear: a straight line. wsd: constant at `peak`, then a straight
    line over the last `decay_iters`.
    """

    kind: ScheduleKind
    peak: float
    minimum: float
    warmup_iters: int
    total_iters: int
    decay_iters: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> "Schedule":
        """The schedule that a configuration asks for."""
        settings = config.optimizer
        return cls(
            kind=settings.schedule,
            peak=settings.learning_rate,
            minimum=settings.min_learning_rate,
            warmup_iters=settings.warmup_iters,
            total_iters=train_iters(config),
            decay_iters=settings.decay_iters or 0,
        )

    def at(self, step: int) -> float:
        """Learning rate of step 0, 1, ... total_iters - 1; the first step of a warm-up is at peak / warmup_iters."""
        if step < self.warmup_iters:
            return self.peak * (step + 1) / self.warmup_iters
        decay_start = self.total_iters - self.decay_iters if self.kind == "wsd" else self.warmup_iters
        if step < decay_start:
            return self.peak
        progress = min(1.0, (step - decay_start + 1) / max(1, self.total_iters - decay_start))
        match self.kind:
            case "cosine":
                share = 0.5 * (1.0 + math.cos(math.pi * progress))
            case "linear" | "wsd":
                share = 1.0 - progress
            case _:
                assert_never(self.kind)
        return self.minimum + (self.peak - self.minimum) * share
