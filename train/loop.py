"""The one training loop, from rows of token ids to an adapter folder, or a whole checkpoint where all is trained.

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

from ..engine.staging import remove_abandoned
from ..kernels.cross_entropy import linear_cross_entropy
from .anchor import Anchor
from .checkpoint import load_checkpoint, save_checkpoint, write_atomic
from .config import LossNotFiniteError, StepReport, TrainConfig, TrainResult
from .data import (
    MicroBatch,
    TrainExample,
    build_micro_batches,
    fingerprint_examples,
    fit_examples,
    step_indices,
)
from .distributed import ALONE, Ranks
from .full import FullParameters
from .lora import TrainableLora
from .parameters import Trainable
from .plan import largest_micro_batch, plan_on_device
from .rates import matrix_rate, step_operations
from .schedule import learning_rate_factor

CHECKPOINT_FILE = "checkpoint.safetensors"
METRICS_FILE = "metrics.jsonl"
BEST_FILE = "best.safetensors"
RESULT_FILE = "train.json"
_WITHOUT_EFFECT = (
    "checkpoint_interval",
    "checkpoint_seconds",
    "recompute",
    "memory_bytes",
)  # on what comes out: a run may go on with others


@dataclass
class TrainState:
    """All that changes during a run, but for the tensors of adapter and optimizer."""

    step: int = 0
    tokens: int = 0
    response_tokens: int = 0
    micro_batches: int = 0
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
    source: str | Path | None = None,
    resume: bool = True,
    on_step: Callable[[StepReport], None] | None = None,
    ranks: Ranks = ALONE,
    anchors: Sequence[Sequence[int]] = (),
    trainable: Trainable | None = None,
) -> TrainResult:
    """Trains on ``examples`` and writes an adapter, or with method "full" a checkpoint, to the folder ``out``, with
    metrics.jsonl beside it. ``base_model`` is the name that the adapter's file gives its base; ``source``, its folder
    or file, lends a checkpoint its tokenizer. Method "full" changes ``model`` itself. With ``ranks`` of several
    processes each takes its share of every step; the first one writes and calls ``on_step``, and all return the result.
    ``trainable`` is trained in place of what the settings' method and rank would make; memory is planned by these.

    ``anchors`` are texts as token ids for ``config.anchor``.

    With ``resume`` a run that was interrupted goes on from its checkpoint, and one that had ended returns its result at
    once. Raises InputError for unusable rows or settings, and for a checkpoint made with others; LossNotFiniteError
    when the loss is no number, naming the rows, with the last good checkpoint kept.
    """
    trainer = Trainer(
        model, examples, config, out, val_examples=val_examples, base_model=base_model, source=source, on_step=on_step,
        ranks=ranks, anchors=anchors, trainable=trainable,
    )  # fmt: skip
    with ranks.watched():
        return trainer.run(resume=resume)


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
        source: str | Path | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        shuffle: bool = True,
        ranks: Ranks = ALONE,
        anchors: Sequence[Sequence[int]] = (),
        trainable: Trainable | None = None,
    ) -> None:
        self.model, self.config, self.out, self.shuffle, self.ranks = model, config, Path(out), shuffle, ranks
        self.base_model, self.source, self.on_step = base_model, source, on_step
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
        if (config.keep_best or config.patience) and not self.val_examples:
            raise InputError("keep_best and patience need validation rows: set val_fraction above 0 or give some")
        self.anchor = None
        if config.anchor:
            if ranks.size > 1:
                raise InputError("anchor: goes with one process; set it to 0 to train with several")
            self.anchor = Anchor(model, anchors, tokens=config.anchor_tokens, seed=config.seed)
        identity = "" if trainable is None else trainable.identity
        self.fingerprint = self._fingerprint(identity)  # before full fine-tuning makes the weights its own
        self.plan = plan_on_device(
            model.config, config, largest_micro_batch(self.examples, config), dtype=model.dtype, device=model.device,
            quantization=model.quantization, memory_bytes=config.memory_bytes, loaded=True,
            anchor_text_tokens=0 if self.anchor is None else sum(map(len, self.anchor.texts)),
        ).require()  # fmt: skip
        ranks.check(config)
        self.trainable = make_trainable(model, config) if trainable is None else trainable
        self.parameters = []
        for group in self.trainable.groups:
            parameter = torch.nn.Parameter(self.trainable.flat[group.start : group.stop])
            parameter.grad = self.trainable.gradient[group.start : group.stop]
            self.parameters.append(parameter)
        settings = [
            {"params": [parameter], "weight_decay": config.weight_decay if group.decays else 0.0}
            for parameter, group in zip(self.parameters, self.trainable.groups, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(
            settings, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
        )
        # fp16 gradients below 6e-8 vanish, so the loss is scaled; a step whose gradients overflow is skipped on the
        # device.
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16, init_scale=2.0**14)
        self.state = TrainState()
        self._saved_at = 0.0
        self._ahead: tuple[int, _Share] | None = None

    def run(self, *, resume: bool = True) -> TrainResult:
        """Trains to the end, from the checkpoint where there is one, and writes the adapter."""
        if self.ranks.is_first:
            remove_abandoned(self.out)
        if resume:
            finished = self.ranks.first(self._finished)
            if finished is not None:
                return finished
        self._restore(self.ranks.first(self._checkpoint if resume else self._clear))
        if self.val_examples and not self.state.val_losses:
            self._validate()
        pending: _Pending | None = None
        started = self._saved_at = time.perf_counter()
        while self.state.step < self.num_steps and not self._out_of_patience():
            ahead = self.train_step()
            if pending is not None:
                started = self._report(pending, started)
            pending = ahead
            late = time.perf_counter() - self._saved_at > self.config.checkpoint_seconds
            checkpoint_due = self._due(self.config.checkpoint_interval) or late
            val_due = bool(self.val_examples) and self._due(self.config.val_interval)
            if checkpoint_due or val_due or pending.is_ready:
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
        config, trainable = self.config, self.trainable
        step = self.state.step
        share = self._share(step)
        trainable.training = True
        trainable.gradient.zero_()
        losses = []
        drift = torch.zeros((), device=trainable.flat.device)
        for micro_id, micro in enumerate(share.micro_batches, share.first_id):
            trainable.set_dropout_seed(_mix(config.seed, step, micro_id))
            loss = self._loss(micro)
            self.scaler.scale(loss).backward()
            trainable.collect()
            losses.append(loss.detach())
        if self.anchor is not None:
            drift = self.anchor.loss(step, trainable.adapters, self.plan.recompute_layers)
            self.scaler.scale(config.anchor * drift).backward()
            trainable.collect()
        self.ranks.sum_(trainable.gradient)
        rate = config.learning_rate * learning_rate_factor(
            step, num_steps=self.num_steps, num_warmup_steps=self.num_warmup_steps, schedule=config.schedule,
            min_factor=config.min_learning_rate_ratio,
        )  # fmt: skip
        for settings, group in zip(self.optimizer.param_groups, trainable.groups, strict=True):
            settings["lr"] = rate * group.learning_rate_factor
        self.scaler.unscale_(self.optimizer)
        norm = torch.linalg.vector_norm(trainable.gradient)
        if math.isfinite(config.max_grad_norm):
            trainable.gradient.mul_((config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        trainable.refresh()
        self.state.step += 1
        pending = _Pending(
            step=self.state.step,
            numbers=_to_host(
                torch.cat([drift.detach().float()[None], norm[None], share.all_losses(losses, self.ranks)])
            ),
            learning_rate=rate,
            names=share.names,
            tokens=share.tokens,
            response_tokens=share.response_tokens,
        )
        if self.state.step < self.num_steps:  # packed and copied while the device still works on this step
            self._ahead = (self.state.step, self._build(self._rows(self.state.step)))
        return pending

    def _rows(self, step: int) -> list[TrainExample]:
        indices = step_indices(
            step, num_examples=len(self.examples), batch_size=self.config.batch_size, seed=self.config.seed,
            shuffle=self.shuffle,
        )  # fmt: skip
        return [self.examples[i] for i in indices]

    def _share(self, step: int) -> _Share:
        """What this process does of the step, from the one that was prepared ahead if it is this."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] == step else self._build(self._rows(step))

    def _build(self, examples: Sequence[TrainExample]) -> _Share:
        budget, rank = self.config.max_batch_tokens, self.ranks.rank
        dealt = self.ranks.deal([e.num_tokens for e in examples], budget)
        settings: dict[str, Any] = {"device": self.model.device, "normalise": self.config.normalise}
        micro_batches = build_micro_batches(examples, max_batch_tokens=budget, bins=dealt[rank], **settings)
        if self.ranks.shards:  # gathering a layer needs everybody, so all run as often; a weight of 0 changes nothing
            idle = replace(min(examples, key=lambda e: e.num_tokens), weight=0.0)
            for _ in range(max(map(len, dealt)) - len(dealt[rank])):
                micro_batches += build_micro_batches([idle], max_batch_tokens=budget, **settings)
        return _Share(
            micro_batches=micro_batches,
            first_id=sum(map(len, dealt[:rank])),
            own=len(dealt[rank]),
            names=tuple(tuple(examples[i].name for i in indices) for bins in dealt for indices in bins),
            tokens=sum(e.num_tokens for e in examples),
            response_tokens=sum(e.num_targets for e in examples),
        )

    def _loss(self, micro: MicroBatch) -> torch.Tensor:
        """The micro-batch's share of the step's loss, f32 scalar; only positions with a loss are projected."""
        hidden = self.model.forward(
            micro.batch,
            adapters=self.trainable.adapters,
            recompute_layers=self.plan.recompute_layers if torch.is_grad_enabled() else 0,
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
        self.trainable.training = False
        share = self._build(self.val_examples)
        losses = share.all_losses([self._loss(micro) for micro in share.micro_batches], self.ranks)
        loss = float(sum(losses))
        self.state.val_losses.append((self.state.step, loss))
        if self.ranks.is_first and self.config.keep_best and self._best_step() == self.state.step:
            # A resumed run comes by here again with the same numbers, so the file need not be the checkpoint's part.
            tensors = {"parameter": self.trainable.flat}
            save_checkpoint(self.out / BEST_FILE, tensors, {"fingerprint": self.fingerprint, "step": self.state.step})
        return loss

    def _best_step(self) -> int:
        """Steps done at the lowest validation loss, the first of equals; 0 is the base as it came."""
        return min(self.state.val_losses, key=lambda entry: entry[1])[0]

    def _out_of_patience(self) -> bool:
        if not self.config.patience or not self.state.val_losses:
            return False
        best = self._best_step()
        return sum(step > best for step, _ in self.state.val_losses) >= self.config.patience

    def _report(self, pending: _Pending, started: float, val_loss: float | None = None) -> float:
        """Reads and writes down the numbers of a finished step; returns the time from which the next one counts."""
        norm, *losses = pending.wait()
        now = time.perf_counter()
        seconds = now - started
        for loss, names in zip(losses, pending.names, strict=True):
            if not math.isfinite(loss):
                raise self._not_finite(pending.step, f"loss is {loss}", names)
        # fp16 steps whose scaled gradients overflow are skipped on the device; elsewhere the weights are gone by now
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise self._not_finite(pending.step, f"gradient norm is {norm}", [n for m in pending.names for n in m])
        state = self.state
        state.losses.append(math.fsum(losses))
        state.grad_norms.append(norm)
        state.tokens += pending.tokens
        state.response_tokens += pending.response_tokens
        state.micro_batches += len(losses)
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
            mfu=self._utilisation(pending.tokens, pending.response_tokens, seconds),
            val_loss=val_loss,
            anchor_loss=pending.drift if self.anchor is not None else None,
        )
        if self.ranks.is_first:
            with open(self.out / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps({k: v for k, v in asdict(report).items() if v is not None}) + "\n")
            if self.on_step is not None:
                self.on_step(report)
        return now

    def _utilisation(self, tokens: int, response_tokens: int, seconds: float) -> float:
        operations = step_operations(
            self.model.config, tokens, response_tokens, trains_weights=self.config.method == "full"
        )
        return operations / max(seconds, 1e-9) / matrix_rate(self.model.device, self.model.dtype)

    def _not_finite(self, step: int, what: str, names: Sequence[str]) -> LossNotFiniteError:
        checkpoint = self.out / CHECKPOINT_FILE
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there was no checkpoint yet"
        return LossNotFiniteError(
            f"step {step}: the {what} in the batch of {', '.join(names[:8])}{' …' if len(names) > 8 else ''}; "
            f"lower the learning rate or look at these rows; {kept}"
        )

    def _fingerprint(self, identity: str) -> str:
        settings = {k: v for k, v in asdict(self.config).items() if k not in _WITHOUT_EFFECT}
        rows = fingerprint_examples(self.examples) + fingerprint_examples(self.val_examples)
        sample = self.model.embedding.flatten()[:: max(1, self.model.embedding.numel() // 4096)]
        mark = hashlib.sha256(sample.float().cpu().numpy().tobytes()).hexdigest()  # two bases may have one shape
        quantized = [str(self.model.quantization)] * (self.model.quantization is not None)
        shape = " ".join(
            (str(self.model.dtype), str(self.model.config), mark, *quantized, *[identity] * bool(identity))
        )
        if self.anchor is not None:
            shape += hashlib.sha256(json.dumps(self.anchor.texts).encode()).hexdigest()
        return hashlib.sha256(f"{json.dumps(settings, sort_keys=True)}|{rows}|{shape}".encode()).hexdigest()[:16]

    def _save(self) -> None:
        if not self.ranks.is_first:
            self._saved_at = time.perf_counter()
            return
        tensors = {"parameter": self.trainable.flat}
        tensors |= {f"trainable.{name}": value for name, value in self.trainable.state().items()}
        for number, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{number}.{name}"] = value
        state = {"fingerprint": self.fingerprint, "scaler": self.scaler.state_dict(), **asdict(self.state)}
        save_checkpoint(self.out / CHECKPOINT_FILE, tensors, state)
        self._saved_at = time.perf_counter()

    def _clear(self) -> None:
        """Begins anew."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINT_FILE, RESULT_FILE, METRICS_FILE, BEST_FILE):
            (self.out / name).unlink(missing_ok=True)

    def _checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What the run's checkpoint holds; None where there is none."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / CHECKPOINT_FILE
        if not path.exists():
            (self.out / METRICS_FILE).unlink(missing_ok=True)
            return None
        tensors, state = load_checkpoint(path)
        if state.pop("fingerprint") != self.fingerprint:
            raise InputError(
                f"{path}: belongs to a run with other rows, settings or model; delete it or pass another output folder"
            )
        _keep_lines(self.out / METRICS_FILE, state["step"])
        return tensors, state

    def _restore(self, checkpoint: tuple[dict[str, torch.Tensor], dict[str, Any]] | None) -> None:
        if checkpoint is None:
            return
        tensors, state = checkpoint
        scaler = state.pop("scaler")
        if scaler:
            self.scaler.load_state_dict(scaler)
        self.state = replace(TrainState(**state), val_losses=[(int(s), float(v)) for s, v in state["val_losses"]])
        with torch.no_grad():
            self.trainable.flat.copy_(tensors["parameter"])
        kept: dict[str, torch.Tensor] = {}
        for name, value in tensors.items():
            owner, _, rest = name.partition(".")
            if owner == "trainable":
                kept[rest] = value
            elif owner == "optimizer":
                number, _, what = rest.partition(".")
                parameter = self.parameters[int(number)]
                self.optimizer.state[parameter][what] = value.to(parameter.device)
        self.trainable.load_state(kept)
        self.trainable.refresh()

    def _finish(self) -> TrainResult:
        self.trainable.close()
        return self.ranks.first(self._write_result)

    def _write_result(self) -> TrainResult:
        state, fit = self.state, self.fit
        if self.config.keep_best and self._best_step() != state.step:
            tensors, _ = load_checkpoint(self.out / BEST_FILE)
            with torch.no_grad():
                self.trainable.flat.copy_(tensors["parameter"])
            self.trainable.refresh()
        self.trainable.save(self.out, base_model=self.base_model, source=self.source)
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
            num_parameters=self.trainable.num_parameters,
            best_step=self._best_step() if self.config.keep_best else None,
            stopped_early=state.step < self.num_steps,
            micro_batches=state.micro_batches,
            budget_filled=state.tokens / max(1, state.micro_batches * self.config.max_batch_tokens),
        )
        content = {"fingerprint": self.fingerprint, "config": asdict(self.config), **result.as_json()}
        write_atomic(self.out / RESULT_FILE, (json.dumps(content, indent=1) + "\n").encode())
        for name in (CHECKPOINT_FILE, BEST_FILE):
            (self.out / name).unlink(missing_ok=True)
        return result

    def _finished(self) -> TrainResult | None:
        """The result of a run that had ended with the same rows and settings."""
        try:
            content = json.loads((self.out / RESULT_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if content.pop("fingerprint", None) != self.fingerprint or not self.trainable.is_saved(self.out):
            (self.out / RESULT_FILE).unlink()
            return None
        content.pop("config")
        content["adapter_path"] = self.out
        for name in ("losses", "grad_norms"):
            content[name] = tuple(content[name])
        content["val_losses"] = tuple((int(s), float(v)) for s, v in content["val_losses"])
        return TrainResult(**content)


def make_trainable(model: Any, config: TrainConfig) -> Trainable:
    """What the settings train of this model."""
    if config.method == "full":
        return FullParameters(model)
    return TrainableLora(
        model, rank=config.rank, alpha=config.alpha, targets=config.targets, layers=config.layers,
        rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern, dropout_pattern=config.dropout_pattern,
        dropout=config.dropout, rank_stabilized=config.rank_stabilized, dora=config.dora, init=config.init,
        plus_ratio=config.plus_ratio, seed=config.seed,
    )  # fmt: skip


@dataclass(frozen=True)
class _Share:
    """What one process does of a step, and what the whole step has. Micro-batches are counted over all processes, from
    ``first_id`` the ``own`` ones of this; what it has beyond these weighs nothing. ``names`` are of all."""

    micro_batches: list[MicroBatch]
    first_id: int
    own: int
    names: tuple[tuple[str, ...], ...]
    tokens: int
    response_tokens: int

    def all_losses(self, losses: Sequence[torch.Tensor], ranks: Ranks) -> torch.Tensor:
        """f32 [micro-batches of all processes] from this process's own."""
        own = torch.stack([loss.float() for loss in losses[: self.own]]) if self.own else torch.zeros(0)
        if ranks.size == 1:
            return own
        device = self.micro_batches[0].weights.device if self.micro_batches else own.device
        found = torch.zeros(len(self.names), device=device)
        found[self.first_id : self.first_id + self.own] = own.to(device)
        return ranks.sum_(found)


@dataclass
class _Pending:
    """Numbers of a step that may still be on their way from the device: anchor loss, gradient norm, a loss per
    micro-batch."""

    step: int
    numbers: tuple[torch.Tensor, Any]
    learning_rate: float
    names: tuple[tuple[str, ...], ...]
    tokens: int
    response_tokens: int

    @property
    def is_ready(self) -> bool:
        """Without a device of its own the step is over when it returns."""
        return self.numbers[1] is None

    def wait(self) -> list[float]:
        """Gradient norm, then the losses."""
        values, event = self.numbers
        if event is not None:
            event.synchronize()
        return values[1:].tolist()

    @property
    def drift(self) -> float:
        """The anchor loss; to be asked for after `wait`."""
        return float(self.numbers[0][0])


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
