"""The one training loop: LoRA on a frozen base, from rows of token ids to an adapter folder.

Every optimizer step takes ``batch_size`` rows, packs them into micro-batches, sums their gradients in fp32 and updates
one flat fp32 parameter. The place in the data, the learning rate and all randomness follow from the step number, so
that a run that was stopped goes on to the same weights, bit for bit, from its last checkpoint. Losses are read one step
late: the device never waits for the host.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specialize.errors import InputError

from ..kernels.cross_entropy import linear_cross_entropy
from .checkpoint import load_checkpoint, save_checkpoint, write_atomic
from .data import (
    LONG_EXAMPLES,
    NORMALISATIONS,
    MicroBatch,
    TrainExample,
    build_micro_batches,
    fingerprint_examples,
    fit_examples,
    step_indices,
)
from .lora import TrainableLora
from .schedule import SCHEDULES, learning_rate_factor

CHECKPOINT_FILE = "checkpoint.safetensors"
METRICS_FILE = "metrics.jsonl"
ADAPTER_FILE = "adapter_model.safetensors"
RESULT_FILE = "train.json"
_WITHOUT_EFFECT = ("checkpoint_interval", "checkpoint_seconds")  # on what comes out: a run may go on with others


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. ``batch_size`` counts rows of an optimizer step, ``max_batch_tokens`` tokens of a micro-batch.

    ``alpha`` None means twice the rank, ``max_length`` None the model's context or ``max_batch_tokens``, whichever is
    smaller. ``normalise`` says whether each response token or each row has the same say in a step. ``val_interval`` and
    ``checkpoint_interval`` count optimizer steps; 0 means only at the end of each epoch. A checkpoint is also written
    when the last one is ``checkpoint_seconds`` old.
    """

    rank: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] = "all"
    rank_stabilized: bool = False
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
    z_loss: float = 0.0
    val_fraction: float = 0.0
    val_interval: int = 0
    checkpoint_interval: int = 0
    checkpoint_seconds: float = 60.0
    checkpoint_layers: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
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
        _require(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "from 0 to below 1")


@dataclass(frozen=True)
class StepReport:
    """One finished optimizer step. ``seconds`` and ``tokens_per_s`` are of the steps since the last report."""

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
    val_loss: float | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a run did. ``losses`` holds one loss a step, ``val_losses`` (steps done, loss). Seconds are those of
    training steps; loading, validation and checkpoints are left out, as is what an earlier, interrupted process
    lost."""

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

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "adapter_path": str(self.adapter_path)}


@dataclass
class TrainState:
    """All that changes during a run, but for the tensors of adapter and optimizer."""

    step: int = 0
    tokens: int = 0
    response_tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    val_losses: list[tuple[int, float]] = field(default_factory=list)


def tune(
    model: Any,
    examples: Sequence[TrainExample],
    config: TrainConfig,
    out: str | Path,
    *,
    val_examples: Sequence[TrainExample] | None = None,
    base_model: str | None = None,
    resume: bool = True,
    on_step: Callable[[StepReport], None] | None = None,
) -> TrainResult:
    """Trains an adapter on ``examples`` and writes it to the folder ``out``, with metrics.jsonl beside it.

    With ``resume`` a run that was interrupted goes on from its checkpoint, and one that had ended returns its result at
    once. Raises InputError for unusable rows or settings, and for a checkpoint made with others; FloatingPointError
    when the loss is no number, naming the rows, with the last good checkpoint kept.
    """
    return Trainer(model, examples, config, out, val_examples=val_examples, base_model=base_model, on_step=on_step).run(
        resume=resume
    )


class Trainer:
    """Owns the state of one run. `run` is the whole job; `train_step` is one optimizer step, for benchmarks.

    Without ``shuffle`` every epoch takes the rows in the order given.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[TrainExample],
        config: TrainConfig,
        out: str | Path,
        *,
        val_examples: Sequence[TrainExample] | None = None,
        base_model: str | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        shuffle: bool = True,
    ) -> None:
        self.model, self.config, self.out, self.shuffle = model, config, Path(out), shuffle
        self.base_model, self.on_step = base_model, on_step
        limit = min(config.max_length or config.max_batch_tokens, config.max_batch_tokens, model.config.max_context)
        fitted, self.fit = fit_examples(examples, max_length=limit, long_examples=config.long_examples)
        if val_examples is None:
            self.examples, self.val_examples = _split(fitted, config.val_fraction, config.seed)
        else:
            self.examples = fitted
            self.val_examples = (
                fit_examples(val_examples, max_length=limit, long_examples=config.long_examples)[0]
                if val_examples
                else []
            )
        self.steps_per_epoch = -(-len(self.examples) // config.batch_size)
        self.num_steps = max(1, math.ceil(self.steps_per_epoch * config.epochs))
        if config.max_steps is not None:
            self.num_steps = min(self.num_steps, config.max_steps)
        self.num_warmup_steps = math.ceil(config.warmup_ratio * self.num_steps) if config.warmup_ratio else 0
        self.lora = TrainableLora(
            model, rank=config.rank, alpha=config.alpha, targets=config.targets, dropout=config.dropout,
            rank_stabilized=config.rank_stabilized, seed=config.seed,
        )  # fmt: skip
        self.parameter = torch.nn.Parameter(self.lora.flat)
        self.parameter.grad = self.lora.gradient
        self.optimizer = torch.optim.AdamW(
            [self.parameter], lr=config.learning_rate, betas=config.betas, eps=config.eps,
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        # fp16 gradients below 6e-8 vanish, so the loss is scaled; a step whose gradients overflow is skipped on the
        # device.
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16, init_scale=2.0**14)
        self.state = TrainState()
        self._saved_at = 0.0
        self.fingerprint = self._fingerprint()

    def run(self, *, resume: bool = True) -> TrainResult:
        """Trains to the end, from the checkpoint where there is one, and writes the adapter."""
        self.out.mkdir(parents=True, exist_ok=True)
        if resume:
            finished = self._finished()
            if finished is not None:
                return finished
            self._restore()
        else:
            for name in (CHECKPOINT_FILE, RESULT_FILE, METRICS_FILE):
                (self.out / name).unlink(missing_ok=True)
        if self.val_examples and not self.state.val_losses:
            self._validate()
        pending: _Pending | None = None
        started = self._saved_at = time.perf_counter()
        while self.state.step < self.num_steps:
            ahead = self.train_step()
            if pending is not None:
                started = self._report(pending, started)
            pending = ahead
            late = time.perf_counter() - self._saved_at > self.config.checkpoint_seconds
            checkpoint_due = self._due(self.config.checkpoint_interval) or late
            val_due = bool(self.val_examples) and self._due(self.config.val_interval)
            if checkpoint_due or val_due:
                val_loss = None
                pending.wait()
                spent = time.perf_counter() - started
                if val_due:
                    val_loss = self._validate()
                started = self._report(pending, time.perf_counter() - spent, val_loss)
                pending = None
                if checkpoint_due and self.state.step < self.num_steps:
                    self._save()
                    started = time.perf_counter()
        if pending is not None:
            self._report(pending, started)
        return self._finish()

    def train_step(self) -> _Pending:
        """One optimizer step: gradients of all its micro-batches, clipping, update. Does not wait for the device."""
        config, lora = self.config, self.lora
        step = self.state.step
        indices = step_indices(
            step, num_examples=len(self.examples), batch_size=config.batch_size, seed=config.seed, shuffle=self.shuffle
        )
        micro_batches = build_micro_batches(
            [self.examples[i] for i in indices],
            max_batch_tokens=config.max_batch_tokens,
            device=self.model.device,
            normalise=config.normalise,
        )
        lora.training = True
        lora.gradient.zero_()
        losses = []
        for micro_id, micro in enumerate(micro_batches):
            lora.set_dropout_seed(_mix(config.seed, step, micro_id))
            loss = self._loss(micro)
            self.scaler.scale(loss).backward()
            lora.collect()
            losses.append(loss.detach())
        rate = config.learning_rate * learning_rate_factor(
            step, num_steps=self.num_steps, num_warmup_steps=self.num_warmup_steps, schedule=config.schedule,
            min_factor=config.min_learning_rate_ratio,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        norm = torch.linalg.vector_norm(lora.gradient)
        if math.isfinite(config.max_grad_norm):
            lora.gradient.mul_((config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        lora.refresh()
        self.state.step += 1
        return _Pending(
            step=self.state.step,
            numbers=_to_host(torch.stack([norm, *losses])),
            learning_rate=rate,
            names=tuple(m.names for m in micro_batches),
            tokens=sum(m.num_tokens for m in micro_batches),
            response_tokens=sum(m.num_response_tokens for m in micro_batches),
        )

    def _loss(self, micro: MicroBatch) -> torch.Tensor:
        """The micro-batch's share of the step's loss, f32 scalar; only positions with a loss are projected."""
        hidden = self.model.forward(
            micro.batch,
            adapters=self.lora,
            recompute_layers=len(self.model.layers) * (self.config.checkpoint_layers and torch.is_grad_enabled()),
            rows=micro.loss_rows,
        )
        return linear_cross_entropy(
            hidden,
            self.model.head_weight,
            micro.targets,
            logit_scale=self.model.config.logit_scale,
            z_loss=self.config.z_loss,
            weights=micro.weights,
            backend=self.model.backend,
        )

    def _due(self, interval: int) -> bool:
        step = self.state.step
        return step == self.num_steps or step % (interval if interval > 0 else self.steps_per_epoch) == 0

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss over the validation rows' response tokens, kept with the number of steps done."""
        self.lora.training = False
        micro_batches = build_micro_batches(
            self.val_examples,
            max_batch_tokens=self.config.max_batch_tokens,
            device=self.model.device,
            normalise=self.config.normalise,
        )
        loss = float(sum(self._loss(micro) for micro in micro_batches))
        self.state.val_losses.append((self.state.step, loss))
        return loss

    def _report(self, pending: _Pending, started: float, val_loss: float | None = None) -> float:
        """Reads and writes down the numbers of a finished step; returns the time from which the next one counts."""
        norm, *losses = pending.wait()
        now = time.perf_counter()
        seconds = now - started
        for loss, names in zip(losses, pending.names, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"step {pending.step}: the loss is {loss} in the batch of {', '.join(names[:8])}"
                    f"{' …' if len(names) > 8 else ''}; lower the learning rate or look at these rows. "
                    f"The last good checkpoint, if any, is {self.out / CHECKPOINT_FILE}"
                )
        state = self.state
        state.losses.append(math.fsum(losses))
        state.grad_norms.append(norm)
        state.tokens += pending.tokens
        state.response_tokens += pending.response_tokens
        state.seconds += seconds
        report = StepReport(
            step=pending.step,
            num_steps=self.num_steps,
            epoch=pending.step / self.steps_per_epoch,
            loss=state.losses[-1],
            grad_norm=norm,
            learning_rate=pending.learning_rate,
            tokens=pending.tokens,
            response_tokens=pending.response_tokens,
            seconds=seconds,
            tokens_per_s=pending.tokens / max(seconds, 1e-9),
            val_loss=val_loss,
        )
        with open(self.out / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({k: v for k, v in asdict(report).items() if v is not None}) + "\n")
        if self.on_step is not None:
            self.on_step(report)
        return now

    def _fingerprint(self) -> str:
        settings = {k: v for k, v in asdict(self.config).items() if k not in _WITHOUT_EFFECT}
        rows = fingerprint_examples(self.examples) + fingerprint_examples(self.val_examples)
        sample = self.model.embedding.flatten()[:: max(1, self.model.embedding.numel() // 4096)]
        mark = hashlib.sha256(sample.float().cpu().numpy().tobytes()).hexdigest()  # two bases may have one shape
        shape = f"{self.lora.flat.numel()} {self.lora.dtype} {self.model.config} {mark}"
        return hashlib.sha256(f"{json.dumps(settings, sort_keys=True)}|{rows}|{shape}".encode()).hexdigest()[:16]

    def _save(self) -> None:
        tensors = {"parameter": self.parameter.data}
        for name, value in self.optimizer.state[self.parameter].items():
            tensors[f"optimizer.{name}"] = value
        state = {"fingerprint": self.fingerprint, "scaler": self.scaler.state_dict(), **asdict(self.state)}
        save_checkpoint(self.out / CHECKPOINT_FILE, tensors, state)
        self._saved_at = time.perf_counter()

    def _restore(self) -> None:
        path = self.out / CHECKPOINT_FILE
        if not path.exists():
            (self.out / METRICS_FILE).unlink(missing_ok=True)
            return
        tensors, state = load_checkpoint(path)
        if state.pop("fingerprint") != self.fingerprint:
            raise InputError(
                f"{path}: belongs to a run with other rows, settings or model; delete it or pass another output folder"
            )
        scaler = state.pop("scaler")
        if scaler:
            self.scaler.load_state_dict(scaler)
        self.state = replace(TrainState(**state), val_losses=[(int(s), float(v)) for s, v in state["val_losses"]])
        with torch.no_grad():
            self.parameter.copy_(tensors["parameter"])
        optimizer = self.optimizer.state[self.parameter]
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                kept = name.removeprefix("optimizer.")
                optimizer[kept] = value.to(self.parameter.device)
        self.lora.refresh()
        _keep_lines(self.out / METRICS_FILE, self.state.step)

    def _finish(self) -> TrainResult:
        self.lora.save(self.out, base_model=self.base_model)
        state, fit = self.state, self.fit
        result = TrainResult(
            adapter_path=self.out,
            steps=state.step,
            tokens=state.tokens,
            response_tokens=state.response_tokens,
            seconds=state.seconds,
            tokens_per_s=state.tokens / max(state.seconds, 1e-9),
            losses=tuple(state.losses),
            val_losses=tuple(state.val_losses),
            grad_norms=tuple(state.grad_norms),
            num_examples=len(self.examples),
            num_val_examples=len(self.val_examples),
            num_truncated=fit.num_truncated,
            num_dropped=fit.num_dropped,
            num_parameters=self.lora.num_parameters,
        )
        content = {"fingerprint": self.fingerprint, "config": asdict(self.config), **result.as_json()}
        write_atomic(self.out / RESULT_FILE, (json.dumps(content, indent=1) + "\n").encode())
        (self.out / CHECKPOINT_FILE).unlink(missing_ok=True)
        return result

    def _finished(self) -> TrainResult | None:
        """The result of a run that had ended with the same rows and settings."""
        try:
            content = json.loads((self.out / RESULT_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if content.pop("fingerprint", None) != self.fingerprint or not (self.out / ADAPTER_FILE).exists():
            (self.out / RESULT_FILE).unlink()
            return None
        content.pop("config")
        content["adapter_path"] = self.out
        for name in ("losses", "grad_norms"):
            content[name] = tuple(content[name])
        content["val_losses"] = tuple((int(s), float(v)) for s, v in content["val_losses"])
        return TrainResult(**content)


@dataclass
class _Pending:
    """Numbers of a step that may still be on their way from the device: gradient norm, then a loss per micro-batch."""

    step: int
    numbers: tuple[torch.Tensor, Any]
    learning_rate: float
    names: tuple[tuple[str, ...], ...]
    tokens: int
    response_tokens: int

    def wait(self) -> list[float]:
        values, event = self.numbers
        if event is not None:
            event.synchronize()
        return values.tolist()


def _to_host(values: torch.Tensor) -> tuple[torch.Tensor, Any]:
    if values.device.type != "cuda":
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _split(examples: list[TrainExample], fraction: float, seed: int) -> tuple[list[TrainExample], list[TrainExample]]:
    """(training rows, validation rows), the latter drawn at random and both in the order given."""
    if not fraction:
        return examples, []
    num_val = max(1, round(len(examples) * fraction))
    if num_val >= len(examples):
        raise InputError(f"val_fraction {fraction} of {len(examples)} rows leaves none to train on; lower it")
    chosen = set(np.random.default_rng((seed, 2**32 - 1)).permutation(len(examples))[:num_val].tolist())
    return [e for i, e in enumerate(examples) if i not in chosen], [examples[i] for i in sorted(chosen)]


def _mix(*numbers: int) -> int:
    """One 31-bit seed out of several numbers, the same in every process."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) & 0x7FFFFFFF


def _keep_lines(path: Path, count: int) -> None:
    """Cuts a metrics file to its first ``count`` steps: later ones are about to be done again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    write_atomic(path, "".join(line for line in lines if line.endswith("\n")).encode())


def _require(condition: bool, name: str, given: Any, allowed: str) -> None:
    if not condition:
        raise InputError(f"{name}: {given}; allowed: {allowed}")
