"""Low-rank adapters that are being trained: fp32 master matrices, and the copies that a forward pass computes with.

Per fused linear of the model there is one pair a [R, in], b [out, R]: the adapted parts' A stacked along the rank,
their B on the diagonal blocks of b. The entries of b off its blocks are no parameters: they start at zero and their
gradients are masked.

    LoRA    y = x Wᵀ + s·(x Aᵀ) Bᵀ + bias; A Kaiming-uniform with a = √5, B zero; s = alpha/R, rank-stabilised alpha/√R
    DoRA    y = m/‖W + s B A‖ ∘ (x Wᵀ + s·(x Aᵀ) Bᵀ) + bias, the norm of each row being a constant to the gradient
    PiSSA   y = x Wᵀ + s·((x Aᵀ) Bᵀ − (x A₀ᵀ) B₀ᵀ) + bias, starting from A₀ = √(S/s) Vᵀ, B₀ = U √(S/s) of W's R leading
            singular values
    LoRA+   B (and magnitudes) learn ``plus_ratio`` times as fast as A

PiSSA takes its start out of the update and not out of W: the base stays as it is, also where it is quantised, and what
is saved is a plain adapter of twice the rank, [A; A₀] and [B, −B₀], which PEFT's own conversion gives as well.
Sources: Hu et al., "LoRA" (2021); Kalajdzievski, "Rank Stabilization" (2023); Liu et al., "DoRA" (2024); Hayou et al.,
"LoRA+" (2024); Meng et al., "PiSSA" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from specialize.errors import InputError

from ..engine.adapter_format import WEIGHTS_FILE, load_modules, save_part_matrices
from ..engine.digest import base_identity, require_base
from ..kernels.lora_linear import lora_linear
from .lora_layout import Key, LoraPair, lay_out, resolve_targets, shortest_targets
from .parameters import ALIGNMENT, Trainable

EXACT_SVD = 256  # rows or columns up to which a whole SVD takes milliseconds
Pair = tuple[torch.Tensor, torch.Tensor]


class TrainableLora(Trainable):
    """Adapters on the linears of ``model`` that ``targets`` names; passed to ``Model.forward`` as ``adapters``.

    Settings are those of `TrainConfig`. Raises InputError for targets, layers or patterns that match nothing and for a
    rank that a module has no room for.
    """

    def __init__(
        self,
        model: Any,
        *,
        rank: int,
        alpha: float | None = None,
        targets: str | Sequence[str] = "all",
        layers: Sequence[int] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        dropout_pattern: Mapping[str, float] | None = None,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        dora: bool = False,
        init: str = "kaiming",
        plus_ratio: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._base = None if model.source is None else base_identity(model.source)  # before anybody exchanges the files
        self.model, self.rank, self.rank_stabilized, self.dora, self.init = model, rank, rank_stabilized, dora, init
        self.alpha = float(2 * rank if alpha is None else alpha)
        self.dropout = dropout
        self.training = True
        chosen = resolve_targets(model, targets, layers)
        self.targets = shortest_targets(model, [part.path for _, part in chosen])
        patterns = {"rank": rank_pattern or {}, "alpha": alpha_pattern or {}, "dropout": dropout_pattern or {}}
        self.pairs, self.groups = lay_out(
            chosen, rank=rank, alpha=alpha, dropout=dropout, patterns=patterns, rank_stabilized=rank_stabilized,
            dora=dora, plus_ratio=plus_ratio,
        )  # fmt: skip
        device, self.dtype = model.device, model.dtype
        self.flat = torch.zeros(self.groups[-1].stop, dtype=torch.float32, device=device)
        self.gradient = torch.zeros_like(self.flat)
        self._mask = self._parameter_mask()
        self._compute = self.flat if self.dtype == torch.float32 else torch.empty_like(self.flat, dtype=self.dtype)
        self._leaves = {key: pair.views(self._compute) for key, pair in self.pairs.items()}
        # fp32 in every number format: what a step adds to a length is less than bf16 tells apart
        self._magnitudes = {key: pair.magnitude(self.flat) for key, pair in self.pairs.items()} if dora else {}
        self._in_order = self._ordered_leaves()
        for leaf, _ in self._in_order:
            leaf.requires_grad_()
        self._padding = torch.zeros(ALIGNMENT, dtype=self.dtype, device=device)
        self._rank_scales = {key: self._relative_scales(pair) for key, pair in self.pairs.items()}
        self._weight_norms: dict[Key, torch.Tensor] = {}
        self._norms: dict[Key, torch.Tensor] = {}
        self._start: torch.Tensor | None = None  # PiSSA's A₀ and B₀, laid out as ``flat``
        self._start_views: dict[Key, Pair] = {}
        self._dropout_seed = 0
        self._initialise(seed)

    @property
    def adapters(self) -> TrainableLora:
        return self

    @property
    def num_parameters(self) -> int:
        count = 0
        for pair in self.pairs.values():
            for part in pair.parts:
                rows = part.stop - part.start
                count += part.rank * (pair.in_features + rows) + (rows if self.dora else 0)
        return count

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        linears = {(adapted.layer_id, adapted.name): adapted.linear for adapted in self.model.adaptable}
        for key, pair in self.pairs.items():
            bound = 1.0 / math.sqrt(pair.in_features)
            a, b = pair.views(self.flat)
            dense = self.dora or self.init == "pissa"
            weight = linears[key].dense(torch.float32).float() if dense else torch.empty(0)
            for part in pair.parts:
                if self.init == "pissa":
                    first, second = principal_factors(weight[part.start : part.stop], part.rank, part.scaling, seed)
                    a[part.first : part.last].copy_(first)
                    b[part.start : part.stop, part.first : part.last].copy_(second)
                else:
                    drawn = torch.empty(part.rank, pair.in_features).uniform_(-bound, bound, generator=generator)
                    a[part.first : part.last].copy_(drawn)
            if self.dora:
                self._weight_norms[key] = torch.linalg.vector_norm(weight, dim=1)
                pair.magnitude(self.flat).copy_(self._weight_norms[key])
        if self.init == "pissa":
            self._set_start(self.flat.clone())
        self.refresh()

    def _set_start(self, start: torch.Tensor) -> None:
        self._start = start
        compute = start.to(self.dtype)
        self._start_views = {key: pair.views(compute) for key, pair in self.pairs.items()}

    def _relative_scales(self, pair: LoraPair) -> torch.Tensor | None:
        """f32 [R]: the scaling of each rank over the pair's; None where all are one."""
        if all(part.scaling == pair.scaling for part in pair.parts):
            return None
        scales = torch.empty(pair.rank, device=self.model.device)
        for part in pair.parts:
            scales[part.first : part.last] = part.scaling / pair.scaling
        return scales

    def _ordered_leaves(self) -> list[tuple[torch.Tensor, int]]:
        """(leaf, its offset) as they lie in ``flat``."""
        leaves = []
        for key, pair in self.pairs.items():
            a, b = self._leaves[key]
            leaves += [(a, pair.a_offset), (b, pair.b_offset)]
            if self.dora:
                leaves.append((self._magnitudes[key], pair.m_offset))
        return sorted(leaves, key=lambda entry: entry[1])

    def _parameter_mask(self) -> torch.Tensor | None:
        """1 where an entry is a parameter; None where all are."""
        if all(pair.is_whole for pair in self.pairs.values()):
            return None
        mask = torch.ones_like(self.flat)
        for pair in self.pairs.values():
            b, magnitude = pair.views(mask)[1], pair.magnitude(mask)
            b.zero_()
            magnitude.zero_()  # empty without DoRA
            for part in pair.parts:
                b[part.start : part.stop, part.first : part.last] = 1.0
                magnitude[part.start : part.stop] = 1.0
        return mask

    @torch.no_grad()
    def refresh(self) -> None:
        if self._compute is not self.flat:
            self._compute.copy_(self.flat)
        if self.dora:
            for adapted in self.model.adaptable:
                key = (adapted.layer_id, adapted.name)
                if key in self.pairs:
                    self._norms[key] = self._row_norms(key, adapted.linear)

    def _row_norms(self, key: Key, linear: Any) -> torch.Tensor:
        """‖W + s B A‖ of each row, f32 [out], by ‖w‖² + 2 s b·(W Aᵀ) + s² b (A Aᵀ) bᵀ: no sum [out, in] is made."""
        a, b = self._effective(key)
        cross = F.linear(linear.dense(self.dtype), a).float()
        a, b, s = a.float(), b.float(), self.pairs[key].scaling
        square = self._weight_norms[key].square() + 2 * s * (b * cross).sum(1) + s * s * ((b @ (a @ a.t())) * b).sum(1)
        return square.clamp_(min=1e-24).sqrt_()

    def set_dropout_seed(self, seed: int) -> None:
        self._dropout_seed = seed

    def _effective(self, key: Key) -> Pair:
        """a and b as they are multiplied, differentiable in the leaves: with PiSSA's start taken off, and with each
        part's own scaling."""
        a, b = self._leaves[key]
        scales = self._rank_scales[key]
        if self._start is not None:
            first, second = self._start_views[key]
            a, b = torch.cat([a, first]), torch.cat([b, -second], dim=1)
            scales = None if scales is None else torch.cat([scales, scales])
        return (a, b) if scales is None else (a, b * scales.to(b.dtype))

    def linear(self, x: torch.Tensor, linear: Any, layer_id: int, name: str, batch: Any = None) -> torch.Tensor:
        """``linear(x)`` plus the adapter's part; x [T, in] -> [T, out]."""
        key = (layer_id, name)
        pair = self.pairs.get(key)
        if pair is None:
            return linear(x)
        if self.training and any(part.dropout for part in pair.parts):
            return self._with_dropout(x, linear, key)
        a, b = self._effective(key)
        if not self.dora:
            return lora_linear(x, linear.weight, linear.bias, a, b, pair.scaling, backend=self.model.backend)
        y = lora_linear(x, linear.weight, None, a, b, pair.scaling, backend=self.model.backend)
        y = torch.addcmul(y, y, self._stretch(key).to(y.dtype))
        return y if linear.bias is None else y + linear.bias

    def _stretch(self, key: Key) -> torch.Tensor:
        """m / ‖W + s B A‖ − 1, f32 [out], 0 in rows that no part adapts. Less one, since bf16 is coarse near 1."""
        stretch = self._magnitudes[key] / self._norms[key] - 1.0
        return stretch if self._mask is None else stretch * self.pairs[key].magnitude(self._mask)

    def _with_dropout(self, x: torch.Tensor, linear: Any, key: Key) -> torch.Tensor:
        """Each part drops entries of its own, for its A and under DoRA for what is stretched; the base sees all."""
        pair, (a, b) = self.pairs[key], self._effective(key)
        weight = linear.dense(x.dtype) if self.dora else None
        hidden, frozen, covered = [], [], 0
        for part in pair.parts:
            seed = hash((self._dropout_seed, key[0], name_id(key[1]), part.first)) & 0x7FFFFFFF
            dropped = _dropped(x, part.dropout, seed) if part.dropout else x
            hidden.append(F.linear(dropped, a[part.first : part.last]))
            if weight is not None:
                frozen += [x.new_zeros(len(x), part.start - covered), F.linear(dropped, weight[part.start : part.stop])]
                covered = part.stop
        if self._start is not None:
            hidden.append(F.linear(x, a[pair.rank :]))
        update = F.linear(torch.cat(hidden, dim=1), b) * pair.scaling
        y = linear(x) + update
        if not self.dora:
            return y
        frozen.append(x.new_zeros(len(x), pair.out_features - covered))
        return torch.addcmul(y, torch.cat(frozen, dim=1) + update, self._stretch(key).to(y.dtype))

    @torch.no_grad()
    def collect(self) -> None:
        pieces, at = [], 0
        for leaf, offset in self._in_order:
            pieces.append(self._padding[: offset - at])
            pieces.append((torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).reshape(-1))
            at = offset + leaf.numel()
            leaf.grad = None
        pieces.append(self._padding[: len(self.flat) - at])
        self.gradient += torch.cat(pieces)
        if self._mask is not None:
            self.gradient *= self._mask

    def matrices(self, flat: torch.Tensor | None = None) -> dict[Key, Pair]:
        """(layer_id, linear name) -> (a [R, in], b [out, R]) in fp32, views of ``flat`` (the parameters by default)."""
        return {key: pair.views(self.flat if flat is None else flat) for key, pair in self.pairs.items()}

    def part_matrices(self, flat: torch.Tensor | None = None) -> dict[str, Pair]:
        """Module path in the checkpoint -> (A [R, in], B [out, R]) of that matrix alone."""
        found = {}
        for key, (a, b) in self.matrices(flat).items():
            for part in self.pairs[key].parts:
                found[part.path] = (a[part.first : part.last], b[part.start : part.stop, part.first : part.last])
        return found

    def part_magnitudes(self, flat: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Module path -> DoRA's row lengths [out]; empty without DoRA."""
        flat = self.flat if flat is None else flat
        return {
            part.path: pair.magnitude(flat)[part.start : part.stop]
            for pair in self.pairs.values()
            for part in pair.parts
            if self.dora
        }

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self._start is None else {"start": self._start}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._start is not None:
            self._set_start(tensors["start"].to(self.flat.device))

    def save(self, path: str | Path, *, base_model: str | None = None, source: str | Path | None = None) -> Path:
        """Writes the adapter folder in PEFT's format."""
        matrices, rank, alpha, grown = self.part_matrices(), self.rank, self.alpha, 1
        if self._start is not None:
            grown = 2
            starts = self.part_matrices(self._start)
            matrices = {
                path: (torch.cat([a, starts[path][0]]), torch.cat([b, -starts[path][1]], dim=1))
                for path, (a, b) in matrices.items()
            }
        growth = math.sqrt(grown) if self.rank_stabilized else grown  # keeps alpha over the rank, or over its root
        rank, alpha = rank * grown, alpha * growth
        parts = [part for pair in self.pairs.values() for part in pair.parts]
        return save_part_matrices(
            path,
            matrices,
            rank=rank,
            alpha=alpha,
            targets=self.targets,
            dropout=self.dropout,
            rank_stabilized=self.rank_stabilized,
            base_model=base_model,
            base=self._base,
            rank_pattern={p.path: p.rank * grown for p in parts if p.rank != self.rank},
            alpha_pattern={p.path: p.alpha * growth for p in parts if p.alpha != self.alpha},
            magnitudes=self.part_magnitudes(),
        )

    def is_saved(self, path: Path) -> bool:
        return (path / WEIGHTS_FILE).exists()

    def close(self) -> None:
        """Nothing to do: the leaves are the adapter's own."""

    @torch.no_grad()
    def load(self, path: str | Path) -> None:
        """Takes the matrices of an adapter folder with the same targets, ranks and variant."""
        saved = load_modules(path)
        require_base(saved.base, path, self.model.source)
        mine, magnitudes = self.part_matrices(), self.part_magnitudes()
        if set(saved.parts) != set(mine):
            raise InputError(
                f"{path}: adapts other layers than targets {','.join(self.targets)}; pass the same targets"
            )
        if set(saved.magnitudes) != set(magnitudes):
            raise InputError(f"{path}: {'has' if saved.magnitudes else 'lacks'} DoRA's magnitudes; pass the same dora")
        start = None if self._start is None else torch.zeros_like(self.flat)
        starts = None if start is None else self.part_matrices(start)
        scalings = {part.path: part.scaling for pair in self.pairs.values() for part in pair.parts}
        for module, (a, b) in mine.items():
            their_a, their_b = saved.parts[module]
            grown = 1 if starts is None else 2
            if len(their_a) != grown * len(a):
                raise InputError(f"{path}: rank differs from {len(a)}; pass the adapter's own rank")
            their_b = their_b * (saved.scaling / scalings[module])
            a.copy_(their_a[: len(a)])
            b.copy_(their_b[:, : len(a)])
            if starts is not None:
                starts[module][0].copy_(their_a[len(a) :])
                starts[module][1].copy_(-their_b[:, len(a) :])
        for module, magnitude in magnitudes.items():
            magnitude.copy_(saved.magnitudes[module])
        if start is not None:
            self._set_start(start)
        self.refresh()


def principal_factors(weight: torch.Tensor, rank: int, scaling: float, seed: int = 0) -> Pair:
    """A [R, in] and B [out, R] with ``scaling · B A`` the best rank-R part of ``weight`` f32 [out, in].

    Large matrices get a randomised SVD (Halko et al., 2011): 16 power iterations cost a few thin products, a whole SVD
    up to minutes a matrix.
    """
    if min(weight.shape) <= max(EXACT_SVD, 2 * rank):
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        v = vh.t()
    else:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(weight, q=rank + 8, niter=16)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * v[:, :rank].t(), u[:, :rank] * root


_LINEAR_NAMES = ("qkv", "o", "gate_up", "up", "down")


def name_id(name: str) -> int:
    """A number per linear name that, unlike a string's hash, is the same in every process."""
    return _LINEAR_NAMES.index(name)


def _dropped(x: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
    generator = torch.Generator(device=x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= probability
    return x * keep / (1.0 - probability)
