"""What a run is told and what it says: settings, one report a step, the result. All frozen and complete when built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specialize.errors import InputError

from .data import LONG_EXAMPLES, NORMALISATIONS
from .schedule import SCHEDULES

METHODS = ("lora", "full")
INITS = ("kaiming", "pissa")
RECOMPUTE = ("auto", "none", "layers")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. ``batch_size`` counts rows of an optimizer step, ``max_batch_tokens`` tokens of a micro-batch.

    ``method`` "full" trains every weight instead of an adapter; what follows about adapters then has no meaning.
    ``alpha`` None means twice the rank. ``targets`` is "all" or names, path endings or regular expressions of modules,
    ``layers`` the blocks to adapt (None: all). A pattern in ``rank_pattern``, ``alpha_pattern`` or ``dropout_pattern``
    matches a module's whole path or its end after a dot, and the first match holds. ``dora`` trains the length of each
    weight row beside its direction; ``init`` "pissa" starts from the weights' leading singular vectors;
    ``plus_ratio`` is LoRA+'s: how much faster B learns than A.

    ``max_length`` None means the model's context or ``max_batch_tokens``, whichever is smaller. ``normalise`` says
    whether each response token or each row has the same say in a step. ``val_interval`` and ``checkpoint_interval``
    count optimizer steps; 0 means only at the end of each epoch. ``patience`` validations in a row without a new lowest
    loss end the run (0: never); ``keep_best`` gives the weights of the lowest validation loss, not of the last step. A
    checkpoint is also written when the last one is ``checkpoint_seconds`` old.

    ``anchor`` weighs, beside the loss of the rows, how far the next-token distributions on anchor texts have moved from
    the base's: the mean of KL(base ‖ tuned) over ``anchor_tokens`` positions a step (0: no anchor).
    """

    method: str = "lora"
    rank: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] = "all"
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    dora: bool = False
    init: str = "kaiming"
    plus_ratio: float = 1.0
    dropout: float = 0.0
    learning_rate: float = 5e-4
    schedule: str = "linear"
    warmup_ratio: float = 0.03
    min_learning_rate_ratio: float = 0.0
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    max_batch_tokens: int = 4096
    max_length: int | None = None
    long_examples: str = "truncate"
    normalise: str = "tokens"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    anchor: float = 0.0
    anchor_tokens: int = 192
    z_loss: float = 0.0
    val_fraction: float = 0.0
    val_interval: int = 0
    patience: int = 0
    keep_best: bool = False
    checkpoint_interval: int = 0
    checkpoint_seconds: float = 60.0
    recompute: str = "auto"
    memory_bytes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.method in METHODS, "method", self.method, ", ".join(METHODS))
        _require(self.init in INITS, "init", self.init, ", ".join(INITS))
        _require(self.plus_ratio > 0, "plus_ratio", self.plus_ratio, "above 0")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, ", ".join(SCHEDULES))
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "from 0 to below 1")
        _require(self.epochs > 0, "epochs", self.epochs, "above 0")
        _require(self.max_steps is None or self.max_steps > 0, "max_steps", self.max_steps, "1 or more")
        _require(self.batch_size > 0, "batch_size", self.batch_size, "1 or more")
        _require(self.max_batch_tokens > 1, "max_batch_tokens", self.max_batch_tokens, "2 or more")
        _require(self.max_length is None or self.max_length > 1, "max_length", self.max_length, "2 or more")
        _require(self.long_examples in LONG_EXAMPLES, "long_examples", self.long_examples, ", ".join(LONG_EXAMPLES))
        _require(self.normalise in NORMALISATIONS, "normalise", self.normalise, ", ".join(NORMALISATIONS))
        _require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0 (inf: no clipping)")
        _require(0 <= self.anchor < math.inf, "anchor", self.anchor, "0 (none) or more")
        _require(self.anchor_tokens > 0, "anchor_tokens", self.anchor_tokens, "1 or more")
        _require(not self.anchor or self.method == "lora", "anchor", self.anchor, '0 with method "full"')
        _require(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "from 0 to below 1")
        _require(self.recompute in RECOMPUTE, "recompute", self.recompute, ", ".join(RECOMPUTE))
        _require(self.patience >= 0, "patience", self.patience, "0 (never stop early) or more")


@dataclass(frozen=True)
class StepReport:
    """One finished optimizer step. ``seconds`` and ``tokens_per_s`` are of the steps since the last report. ``mfu`` is
    the share of the measured matrix rate that the step's necessary operations took, from 0 to 1."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    response_tokens: int
    seconds: float
    tokens_per_s: float
    mfu: float
    val_loss: float | None = None
    anchor_loss: float | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a run did. ``losses`` holds one loss a step, ``val_losses`` (steps done, loss). Seconds are those of
    training steps; loading, validation and checkpoints are left out, as is what an earlier, interrupted process
    lost. ``best_step`` is the step whose weights were kept where the best were asked for, ``stopped_early`` whether
    patience ended the run. ``micro_batches`` is how many forward passes held the tokens and ``budget_filled`` which
    share of their token budget was used; no token of them is padding."""

    adapter_path: Path
    steps: int
    tokens: int
    response_tokens: int
    seconds: float
    tokens_per_s: float
    losses: tuple[float, ...]
    val_losses: tuple[tuple[int, float], ...]
    grad_norms: tuple[float, ...] = ()
    num_examples: int = 0
    num_val_examples: int = 0
    num_truncated: int = 0
    num_dropped: int = 0
    num_parameters: int = 0
    best_step: int | None = None
    stopped_early: bool = False
    micro_batches: int = 0
    budget_filled: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "adapter_path": str(self.adapter_path)}


class LossNotFiniteError(InputError, FloatingPointError):
    """The loss is infinite or no number. Learning rate or rows are to blame more often than the machine, hence an
    input error."""


def _require(condition: bool, name: str, given: Any, allowed: str) -> None:
    if not condition:
        raise InputError(f"{name}: {given}; allowed: {allowed}")
