"""Rows to training examples, and the recipe's settings to the one training loop's."""

# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .prompts import example_prompt
from .recipe import Tune
from .records import Example, Seed


def seed_examples(seeds: Sequence[Seed]) -> list[Example]:
    return [Example(s.id, "seed", s.kind, s.instruction, s.input, s.output) for s in seeds]


def encode(tokenizer: Any, examples: Sequence[Example]) -> list[Any]:
    """Training examples in the prompt format of evaluation."""
    from .train.data import encode_examples

    pairs = [(example_prompt(e.instruction, e.input), e.output) for e in examples]
    return encode_examples(tokenizer, pairs, names=[e.id for e in examples])


def encode_rows(tokenizer: Any, rows: Sequence[dict[str, str]]) -> list[Any]:
    """Training examples of a user's file: prompts as they are, instructions in our format."""
    from .train.data import encode_examples

    pairs = [
        (r["prompt"], r["response"]) if "prompt" in r else (example_prompt(r["instruction"], r["input"]), r["output"])
        for r in rows
    ]
    return encode_examples(tokenizer, pairs, names=[f"row {i + 1}" for i in range(len(rows))])


def epoch_tokens(examples: Sequence[Any]) -> int:
    """Tokens of one pass over encoded examples."""
    return sum(example.num_tokens for example in examples)


def train_config(settings: Tune, *, epochs: float, seed: int, max_context: int, **changes: Any) -> Any:
    """The loop's settings for a recipe's. A micro-batch holds up to 4,096 tokens, or one longest row. ``changes`` are
    settings of the loop that a recipe has no name for, or other values of them."""
    from .train.config import TrainConfig

    max_length = min(settings.max_length, max_context)
    targets = settings.targets if settings.targets == "all" else tuple(t.strip() for t in settings.targets.split(","))
    values: dict[str, Any] = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "targets": targets,
        "dropout": settings.dropout,
        "learning_rate": settings.learning_rate,
        "schedule": settings.schedule,
        "warmup_ratio": settings.warmup,
        "epochs": epochs,
        "batch_size": settings.batch,
        "max_batch_tokens": max(4096, max_length),
        "max_length": max_length,
        "normalise": settings.normalise,
        "weight_decay": settings.weight_decay,
        "val_fraction": settings.validation,
        "rank_stabilized": settings.rank_stabilized,
        "dora": settings.dora,
        "init": settings.init,
        "plus_ratio": settings.plus_ratio,
        "patience": settings.patience,
        "keep_best": settings.keep_best or settings.patience > 0,
        "seed": seed,
    }
    return TrainConfig(**{**values, **changes})


def train(
    model: Any,
    examples: Sequence[Any],
    config: Any,
    out: Path,
    *,
    base_model: str,
    source: Path | None = None,
    on_step: Callable[[Any], None] | None = None,
    ranks: Any = None,
) -> dict[str, Any]:
    """Train into ``out`` (or find it finished there) and return the result as plain values. Where TensorBoard is
    installed its events go to ``out/events``. ``source`` is the base's folder or file, ``ranks`` this process's place
    among those that train together."""
    from .train.distributed import ALONE
    from .train.events import EventLog
    from .train.loop import tune

    events = EventLog(out / "events")

    def step_done(report: Any) -> None:
        events(report)
        if on_step is not None:
            on_step(report)

    try:
        result = tune(
            model, examples, config, out, base_model=base_model, source=source, on_step=step_done, ranks=ranks or ALONE
        )
    finally:
        events.close()
    found = dataclasses.asdict(result)
    found["adapter_path"] = str(found["adapter_path"])
    return found
