"""A model and a trainer whose parts show in a profiler's trace, and which count what they compute and move.

Our C++ and Triton ops are one opaque call each to torch.profiler. `traced` gives a copy of a model that shares the
weights and wraps each op in a range ``op:GROUP``; nothing global changes, and the original runs as before.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import torch

from ..engine.linear import Linear
from ..engine.model import Model
from ..engine.spans import recorded_span
from ..train.data import MicroBatch
from ..train.loop import Trainer
from ..train.lora import TrainableLora


class Work:
    """Operations and bytes by group. Bytes are those of weights and of an op's inputs and outputs, each once."""

    def __init__(self) -> None:
        self.operations: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, float] = defaultdict(float)

    def add(self, group: str, operations: float, num_bytes: float) -> None:
        self.operations[group] += operations
        self.bytes[group] += num_bytes

    def clear(self) -> None:
        self.operations.clear()
        self.bytes.clear()


def _size(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class TracedLinear(Linear):
    """A linear layer over the same weights."""

    def __init__(self, linear: Linear, work: Work) -> None:
        for name in Linear.__slots__:
            setattr(self, name, getattr(linear, name))
        self.work = work

    def _count(self, x: torch.Tensor, y: torch.Tensor) -> None:
        operations = 2.0 * x.shape[0] * self.in_features * self.out_features
        self.work.add("linear", operations, self.num_bytes + _size(x, y))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with recorded_span("op:linear"):
            y = super().__call__(x)
        self._count(x, y)
        return y

    def swiglu(self, x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        fused = self._gates_packed(x) if isinstance(self.weight, torch.Tensor) else self._takes_packed(x)
        if not fused:  # two ops: the product, inside, and the activation
            with recorded_span("op:activation"):
                y = super().swiglu(x, backend=backend)
            self.work.add("activation", 0.0, 3 * _size(y))
            return y
        counted = self.work.operations["linear"]
        with recorded_span("op:linear"):
            y = super().swiglu(x, backend=backend)
        if self.work.operations["linear"] == counted:  # one op did both
            self._count(x, y)
        return y


class TracedModel(Model):
    """Made by `traced`."""

    work: Work

    def forward(self, batch: Any, *arguments: Any, **settings: Any) -> torch.Tensor:
        with recorded_span("model"):
            return super().forward(batch, *arguments, **settings)

    def _norm(self, x, norm, residual):
        with recorded_span("op:norm"):
            out, total = super()._norm(x, norm, residual)
        self.work.add("norm", 0.0, (2 if residual is None else 4) * _size(x))
        return out, total

    def _activation(self, h: torch.Tensor) -> torch.Tensor:
        with recorded_span("op:activation"):
            out = super()._activation(h)
        self.work.add("activation", 0.0, _size(h, out))
        return out

    def _attention(self, layer, qkv, batch, cache):
        with recorded_span("op:attention"):
            out = super()._attention(layer, qkv, batch, cache)
        if qkv.device.type == "cpu":  # elsewhere the lengths are on the device, and asking would wait for it
            self._count_attention(qkv, batch, cached=cache is not None)
        return out

    def _count_attention(self, qkv: torch.Tensor, batch: Any, *, cached: bool) -> None:
        c = self.config
        queries, contexts = batch.query_starts.diff().double(), batch.context_lens.double()
        pairs = float((queries * contexts - queries * (queries - 1) / 2).sum())
        operations = 4.0 * c.num_heads * c.head_dim * pairs
        keys = 2 * c.num_kv_heads * c.head_dim * qkv.element_size() * float(contexts.sum()) if cached else 0.0
        self.work.add("attention", operations, _size(qkv) + keys)
        if qkv.requires_grad:
            self.work.add("attention backward", 2.5 * operations, 3 * _size(qkv))


def traced(model: Model) -> TracedModel:
    """A copy that shares the weights. Work is counted in its ``work``."""
    copy, work = object.__new__(TracedModel), Work()
    copy.__dict__.update(model.__dict__)
    copy.work = work
    linears = {id(adapted.linear): TracedLinear(adapted.linear, work) for adapted in model.adaptable}
    copy.layers = [
        dataclasses.replace(
            layer, **{name: linears[id(getattr(layer, name))] for name in ("qkv", "o", "up", "down")}
        )
        for layer in model.layers
    ]  # fmt: skip
    copy._adaptable = [dataclasses.replace(a, linear=linears[id(a.linear)]) for a in model.adaptable]
    copy.head = TracedLinear(model.head, work)
    return copy


class TracedLora(TrainableLora):
    """The same parameters, counted and named."""

    work: Work
    _seen: set[tuple[int, str]]

    def linear(self, x, linear, layer_id, name, batch=None):
        with recorded_span("op:linear"):
            y = super().linear(x, linear, layer_id, name, batch)
        pair = self.pairs.get((layer_id, name))
        rank = pair.rank if pair else 0
        operations = 2.0 * x.shape[0] * (linear.in_features * linear.out_features)
        update = 2.0 * x.shape[0] * rank * (linear.in_features + linear.out_features)
        moved = linear.num_bytes + _size(x, y)
        if pair is not None:  # without an adapter the layer itself counts
            self.work.add("linear", operations + update, moved)
        if (layer_id, name) not in self._seen:  # a second time is a recomputation in the backward pass
            self._seen.add((layer_id, name))
            self.work.add("linear backward", operations * x.requires_grad + 2 * update, moved + _size(x))
        return y

    def collect(self) -> None:
        with recorded_span("op:collect gradients"):
            super().collect()
        self._seen.clear()


class TracedTrainer(Trainer):
    """A trainer over a traced model. Made by its usual arguments."""

    def __init__(self, model: TracedModel, *arguments: Any, **settings: Any) -> None:
        super().__init__(model, *arguments, **settings)
        if isinstance(self.trainable, TrainableLora):
            lora = object.__new__(TracedLora)
            vars(lora).update(vars(self.trainable))
            lora.work, lora._seen = model.work, set()
            self.trainable = lora
        self.work = model.work

    def train_step(self) -> Any:
        with recorded_span("step"):
            return super().train_step()

    def _build(self, examples: Any) -> Any:
        with recorded_span("op:prepare batch"):
            return super()._build(examples)

    def _loss(self, micro: MicroBatch) -> torch.Tensor:
        with recorded_span("op:loss"):  # the model's forward pass, inside, has its own names
            loss = super()._loss(micro)
        head, config = self.model.head_weight, self.model.config
        products = 4.0 * micro.num_response_tokens * config.vocab_size * config.hidden_size
        self.work.add("loss", products, 2 * _size(head))
        return loss
