"""Low-rank adapters that are being trained: fp32 master matrices, and the copies that a forward pass computes with.

Per fused linear of the model there is one pair a [R, in], b [out, R]: the adapted parts' A stacked along the rank,
their B on the diagonal blocks of b. All pairs lie in one flat fp32 tensor, so that casting, clipping and the optimizer
are a few operations on one tensor, whatever the number of layers. The entries of b off its blocks are no parameters:
they start at zero and their gradients are masked.
y = x W^T + scaling · (x A^T) B^T, A drawn as PEFT draws it (Kaiming-uniform with a = √5), B zero.
Source: Hu et al., "LoRA" (2021); Kalajdzievski, "Rank Stabilization" (2023) for the scaling alpha/√R.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from specialize.errors import InputError

from ..kernels.lora_linear import lora_linear


@dataclass(frozen=True)
class LoraPart:
    """One adapted matrix of the checkpoint: rows ``start:stop`` of the fused output, ranks ``first:last`` of the
    pair."""

    name: str
    path: str
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class LoraPair:
    """Where the matrices of one fused linear lie in the flat tensor."""

    in_features: int
    out_features: int
    rank: int
    parts: tuple[LoraPart, ...]
    a_offset: int
    b_offset: int

    @property
    def end(self) -> int:
        return self.b_offset + self.out_features * self.rank

    def views(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = flat[self.a_offset : self.b_offset].view(self.rank, self.in_features)
        b = flat[self.b_offset : self.end].view(self.out_features, self.rank)
        return a, b


class TrainableLora:
    """Adapters on the linears of ``model`` that ``targets`` names; passed to ``Model.forward`` as ``adapters``.

    ``targets`` is "all" or part names (q_proj, Wqkv, …). ``flat`` is the fp32 parameter, ``gradient`` its accumulated
    gradient. `refresh` must follow each change of ``flat``, `collect` each backward pass.
    """

    def __init__(
        self,
        model: Any,
        *,
        rank: int,
        alpha: float | None = None,
        targets: str | Sequence[str] = "all",
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        seed: int = 0,
    ) -> None:
        if rank < 1:
            raise InputError(f"rank: {rank}; allowed: 1 or more")
        if not 0.0 <= dropout < 1.0:
            raise InputError(f"dropout: {dropout}; allowed: from 0 to below 1")
        self.model = model
        self.rank = rank
        self.alpha = float(2 * rank if alpha is None else alpha)
        self.rank_stabilized = rank_stabilized
        self.scaling = self.alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self.dropout = dropout
        self.targets = resolve_targets(model, targets)
        self.training = True
        self.pairs = _lay_out(model, rank, self.targets)
        size = max(pair.end for pair in self.pairs.values())
        device, self.dtype = model.device, model.dtype
        self.flat = torch.zeros(size, dtype=torch.float32, device=device)
        self.gradient = torch.zeros_like(self.flat)
        self._mask = self._block_mask()
        self._compute = self.flat if self.dtype == torch.float32 else torch.empty_like(self.flat, dtype=self.dtype)
        self._leaves = {key: pair.views(self._compute) for key, pair in self.pairs.items()}
        for pair in self._leaves.values():
            for leaf in pair:
                leaf.requires_grad_()
        self._leaf_list = [leaf for pair in self._leaves.values() for leaf in pair]
        self._dropout_seed = 0
        self._initialise(seed)

    @property
    def num_parameters(self) -> int:
        return sum(
            (part.last - part.first) * (pair.in_features + part.stop - part.start)
            for pair in self.pairs.values()
            for part in pair.parts
        )

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for pair in self.pairs.values():
            bound = 1.0 / math.sqrt(pair.in_features)
            a, _ = pair.views(self.flat)
            for part in pair.parts:
                drawn = torch.empty(part.last - part.first, pair.in_features).uniform_(
                    -bound, bound, generator=generator
                )
                a[part.first : part.last].copy_(drawn)
        self.refresh()

    def _block_mask(self) -> torch.Tensor | None:
        """1 where an entry is a parameter; None where all are."""
        if all(len(p.parts) == 1 and p.parts[0].stop - p.parts[0].start == p.out_features for p in self.pairs.values()):
            return None
        mask = torch.ones_like(self.flat)
        for pair in self.pairs.values():
            _, b = pair.views(mask)
            b.zero_()
            for part in pair.parts:
                b[part.start : part.stop, part.first : part.last] = 1.0
        return mask

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes forward passes see the present values of ``flat``."""
        if self._compute is not self.flat:
            self._compute.copy_(self.flat)

    def set_dropout_seed(self, seed: int) -> None:
        """Dropout masks follow from this number and the layer alone, so recomputing a layer repeats them."""
        self._dropout_seed = seed

    def linear(self, x: torch.Tensor, linear: Any, layer_id: int, name: str, batch: Any = None) -> torch.Tensor:
        """``linear(x)`` plus the adapter's part; x [T, in] -> [T, out]."""
        leaves = self._leaves.get((layer_id, name))
        if leaves is None:
            return linear(x)
        a, b = leaves
        if self.dropout and self.training:
            dropped = _dropped(x, self.dropout, hash((self._dropout_seed, layer_id, name_id(name))) & 0x7FFFFFFF)
            return linear(x) + F.linear(F.linear(dropped, a), b) * self.scaling
        return lora_linear(x, linear.weight, linear.bias, a, b, self.scaling, backend=self.model.backend)

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the gradients of the last backward pass to ``gradient``, in fp32."""
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaf_list]
        self.gradient += torch.cat([g.reshape(-1) for g in grads])
        if self._mask is not None:
            self.gradient *= self._mask
        for leaf in self._leaf_list:
            leaf.grad = None

    def matrices(self, flat: torch.Tensor | None = None) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
        """(layer_id, linear name) -> (a [R, in], b [out, R]) in fp32, views of ``flat`` (the parameters by default)."""
        return {key: pair.views(self.flat if flat is None else flat) for key, pair in self.pairs.items()}

    def part_matrices(self, flat: torch.Tensor | None = None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module path in the checkpoint -> (A [R, in], B [out, R]) of that matrix alone."""
        found = {}
        for key, (a, b) in self.matrices(flat).items():
            for part in self.pairs[key].parts:
                found[part.path] = (a[part.first : part.last], b[part.start : part.stop, part.first : part.last])
        return found

    def save(self, path: str | Path, *, base_model: str | None = None) -> Path:
        """Writes the adapter folder in PEFT's format."""
        from ..engine.adapter import save_part_matrices

        return save_part_matrices(
            path,
            self.part_matrices(),
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            dropout=self.dropout,
            rank_stabilized=self.rank_stabilized,
            base_model=base_model,
        )

    @torch.no_grad()
    def load(self, path: str | Path) -> None:
        """Takes the matrices of an adapter folder with the same targets and rank."""
        from ..engine.adapter import load_adapter

        adapter = load_adapter(path, self.model)
        mine = self.matrices()
        if set(adapter.matrices) != set(mine):
            raise InputError(
                f"{path}: adapts other layers than targets {','.join(self.targets)}; pass the same targets"
            )
        for key, (a, b) in mine.items():
            their_a, their_b = adapter.matrices[key]
            if their_a.shape != a.shape or their_b.shape != b.shape:
                raise InputError(f"{path}: rank differs from {self.rank}; pass the adapter's own rank")
            a.copy_(their_a)
            b.copy_(their_b)
        self.refresh()


def adaptable_names(model: Any) -> tuple[str, ...]:
    """Part names that ``targets`` may hold, in the order in which they run."""
    names: dict[str, None] = {}
    for adapted in model.adaptable:
        for part in adapted.parts:
            names[part.name] = None
    return tuple(names)


def resolve_targets(model: Any, targets: str | Sequence[str]) -> tuple[str, ...]:
    """ "all" or names -> the part names to adapt. Raises InputError for a name that the model does not have."""
    existing = adaptable_names(model)
    if isinstance(targets, str):
        targets = [t.strip() for t in targets.split(",") if t.strip()]
    if list(targets) in (["all"], ["all-linear"]):
        return existing
    unknown = [t for t in targets if t not in existing]
    if unknown or not targets:
        given = ", ".join(unknown) or "none"
        raise InputError(f"targets: {given}: no such layer in this model; allowed: all, {', '.join(existing)}")
    return tuple(name for name in existing if name in set(targets))


def _lay_out(model: Any, rank: int, targets: tuple[str, ...]) -> dict[tuple[int, str], LoraPair]:
    pairs, offset = {}, 0
    for adapted in model.adaptable:
        chosen = [part for part in adapted.parts if part.name in targets]
        if not chosen:
            continue
        parts = tuple(
            LoraPart(part.name, part.path, part.start, part.stop, i * rank, (i + 1) * rank)
            for i, part in enumerate(chosen)
        )
        total = rank * len(parts)
        linear = adapted.linear
        b_offset = offset + total * linear.in_features
        pair = LoraPair(linear.in_features, linear.out_features, total, parts, offset, b_offset)
        pairs[adapted.layer_id, adapted.name] = pair
        offset = (pair.end + 63) // 64 * 64
    return pairs


_LINEAR_NAMES = ("qkv", "o", "gate_up", "up", "down")


def name_id(name: str) -> int:
    """A number per linear name that, unlike a string's hash, is the same in every process."""
    return _LINEAR_NAMES.index(name)


def _dropped(x: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
    generator = torch.Generator(device=x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= probability
    return x * keep / (1.0 - probability)
