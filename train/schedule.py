"""Learning rate over the steps of a run: linear warm-up, then cosine, linear or no decay."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_factor(
    step: int, *, num_steps: int, num_warmup_steps: int, schedule: str, min_factor: float = 0.0
) -> float:
    """The factor on the base learning rate in step ``step`` of ``num_steps`` (both counted from 0).

    Warm-up rises so that the step after it has factor 1; decay falls from there to ``min_factor`` at ``num_steps``,
    which is never reached, so that no step is wasted at a rate of zero.
    """
    if step < num_warmup_steps:
        return (step + 1) / (num_warmup_steps + 1)
    done = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return min_factor + (1.0 - min_factor) * (1.0 - done)
    if schedule == "cosine":
        return min_factor + (1.0 - min_factor) * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"schedule: {schedule!r}; allowed: {', '.join(SCHEDULES)}")
