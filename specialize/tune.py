"""Rows to training examples, and the recipe's settings to the one training loop's."""

# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
from __future__ import annotations

import dataclasses
import random
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


def encode_grouped(
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    demonstrations: int,
    few_shot: float,
    max_length: int,
    seed: int,
    passes: int = 1,
) -> list[Any]:
    """Training examples of which the share ``few_shot`` stands in groups of 2 to ``demonstrations`` + 1 of one kind.

    A group is one text, each row in the place of a demonstration for those after it, as evaluation shows them, and
    every row's answer carries a loss. So answering with 0, 1, 2, … demonstrations is learned at the cost of the rows
    themselves. Groups are drawn anew in each of ``passes`` over the rows, none longer than ``max_length`` tokens.
    """
    alone = encode(tokenizer, examples)
    by_kind: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        by_kind.setdefault(example.kind, []).append(i)
    found: list[Any] = []
    for number in range(passes):
        draw = random.Random(f"{seed} {number}")
        for members in by_kind.values():
            order = draw.sample(members, len(members))
            grouped = [i for i in order if draw.random() < few_shot]
            chosen = set(grouped)
            found += [alone[i] for i in order if i not in chosen]
            while grouped:
                group, length = [grouped.pop()], 0
                size = draw.randint(2, demonstrations + 1)
                while len(group) < size and grouped:
                    length = sum(alone[i].num_tokens + 4 for i in (*group, grouped[-1]))  # 4: what may stand between
                    if length > max_length:
                        break
                    group.append(grouped.pop())
                rows = [examples[i] for i in group]
                found.append(_conversation(tokenizer, rows) if len(rows) > 1 else alone[group[0]])
    return found


def _conversation(tokenizer: Any, rows: Sequence[Example]) -> Any:
    """Rows as one example, each a demonstration for the later ones. The token after an answer counts as its end."""
    from .train.data import TrainExample

    shots = [(row.instruction, row.input, row.output) for row in rows]
    prompts = [example_prompt(row.instruction, row.input, shots[:i]) for i, row in enumerate(rows)]
    (last,) = encode(tokenizer, [rows[-1]])
    ids = [*tokenizer.encode(prompts[-1]), *last.response_ids]
    counted = [False] * (len(ids) - len(last.response_ids)) + [True] * len(last.response_ids)
    for prompt, row in zip(prompts[:-1], rows[:-1], strict=True):
        # A tokenizer may join an answer's last letters with the line break after them; what both texts share counts.
        start = _common(tokenizer.encode(prompt), ids)
        stop = _common(tokenizer.encode(prompt + row.output), ids) + 1
        counted[start:stop] = [True] * (stop - start)
    first = counted.index(True)
    return TrainExample(
        prompt_ids=ids[:first],
        response_ids=ids[first:],
        name=f"{rows[-1].id} after {', '.join(row.id for row in rows[:-1])}",
        counted=tuple(counted[first:]),
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


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
        "anchor": settings.anchor,
        "anchor_tokens": settings.anchor_tokens,
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
    anchors: Sequence[Sequence[int]] = (),
    val_examples: Sequence[Any] | None = None,
    trainable: Any = None,
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
            model, examples, config, out, base_model=base_model, source=source, on_step=step_done, ranks=ranks or ALONE,
            anchors=anchors, val_examples=val_examples, trainable=trainable,
        )  # fmt: skip
    finally:
        events.close()
    found = dataclasses.asdict(result)
    found["adapter_path"] = str(found["adapter_path"])
    return found
