"""LoRA adapters fitted to a model: a pool that serves several in one batch, and merging one into the weights.

A file holds A [R, in] and B [out, R] per module of the checkpoint (`adapter_format`). Our fused linear layers take one
pair each: the parts' A stacked along the rank, their B on the diagonal blocks. A DoRA adapter also stretches each row
of the updated weight to a length of its own: y = m/‖W + s B A‖ ∘ (x Wᵀ + s·(x Aᵀ) Bᵀ) + bias (Liu et al., 2024).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specialize.errors import InputError

from ..kernels import cpu_blocks
from ..kernels.lora_linear import lora_grouped_add_
from .adapter_format import Pair, load_modules, lora_scaling, save_part_matrices
from .batch import Batch
from .digest import require_base
from .linear import Linear
from .model import AdaptedLinear, Model
from .quantize import linear_path, quantize_weight
from .routing import ExpertStack, Mixture, MixtureAdapters, Routed, RoutedAdapters
from .weights import is_finite


@dataclass(frozen=True)
class Adapter:
    """``parts`` maps a module's path to its A [R, in] and B [out, R]; ``matrices`` maps (layer_id, linear name) to the
    same fused for the model; ``magnitudes`` (module path → [out]) is empty but for DoRA. All are fp32 on the CPU; the
    update is ``scaling · B A``. Equal contents have equal fingerprints."""

    parts: dict[str, Pair]
    matrices: dict[tuple[int, str], Pair]
    magnitudes: dict[str, torch.Tensor]
    scaling: float
    rank: int
    alpha: float
    targets: tuple[str, ...]
    base_model: str | None
    fingerprint: bytes
    base: str | None = None  # which base it was trained on, if it says (`digest.base_identity`)


def load_adapter(path: str | Path, model: Model) -> Adapter:
    """Reads a PEFT adapter folder and fits it to ``model``.

    Raises InputError naming what is missing, unsupported, or belongs to another base, or is too large a number for the
    model's dtype.
    """
    saved = load_modules(path)
    known = {part.path: (adapted, part) for adapted in model.adaptable for part in adapted.parts}
    unknown = sorted(set(saved.parts) - set(known))
    if unknown:
        raise InputError(
            f"{path}: adapts {unknown[0]}{_and_more(unknown)}, which this {model.config.architecture} model of "
            f"{model.config.num_layers} layers lacks; it belongs to another base"
        )
    for module, (a, b) in saved.parts.items():
        adapted, part = known[module]
        expected = (adapted.linear.in_features, part.stop - part.start)
        magnitude = saved.magnitudes.get(module)
        if (a.shape[1], b.shape[0]) != expected or (magnitude is not None and len(magnitude) != expected[1]):
            raise InputError(
                f"{path}: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}; this model's module maps "
                f"{expected[0]} to {expected[1]} features; the adapter belongs to another base"
            )
        for what, tensor in (("A", a), ("B", b * saved.scaling)):
            if not is_finite(tensor, model.dtype):
                raise InputError(
                    f"{path}: {what} of {module} holds numbers beyond what {str(model.dtype).removeprefix('torch.')} "
                    "can hold; ask for bf16 or fp32"
                )
    require_base(saved.base, path, model.source)
    matrices = {}
    for adapted in model.adaptable:
        fused = _fuse(adapted, saved.parts)
        if fused is not None:
            matrices[adapted.layer_id, adapted.name] = fused
    return Adapter(
        parts=saved.parts,
        matrices=matrices,
        magnitudes=saved.magnitudes,
        scaling=saved.scaling,
        rank=saved.rank,
        alpha=saved.alpha,
        targets=tuple(sorted({module.rsplit(".", 1)[-1] for module in saved.parts})),
        base_model=saved.base_model,
        fingerprint=_fingerprint(saved.parts, saved.magnitudes, saved.scaling),
        base=saved.base,
    )


def save_adapter(path: str | Path, adapter: Adapter, *, base_model: str | None = None) -> Path:
    """Writes an adapter as a PEFT folder."""
    stabilized = not math.isclose(adapter.scaling, adapter.alpha / adapter.rank)
    parts, ranks = {}, {}
    for module, (a, b) in adapter.parts.items():
        if a.shape[0] != adapter.rank:  # PEFT scales by each module's own rank
            ranks[module] = a.shape[0]
            b = b * (adapter.scaling / lora_scaling(a.shape[0], adapter.alpha, stabilized))
        parts[module] = (a, b)
    return save_part_matrices(
        path, parts, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets,
        rank_stabilized=stabilized, base_model=base_model or adapter.base_model, rank_pattern=ranks,
        magnitudes=adapter.magnitudes, base=adapter.base,
    )  # fmt: skip


@torch.no_grad()
def merge_adapter(model: Model, adapter: Adapter) -> None:
    """Adds the adapter to the model's weights, in fp32 and rounded once. There is no way back but loading anew.

    A quantised weight is dequantised, added to and quantised in its format anew, which rounds a second time: in four
    bits by more than a small update may be. An adapter beside the weights (`AdapterPool`) loses nothing, nor does one
    merged into the dense model before that is quantised.
    """
    for adapted in model.adaptable:
        pair = adapter.matrices.get((adapted.layer_id, adapted.name))
        if pair is None:
            continue
        linear, (a, b) = adapted.linear, pair
        a, b = a.to(model.device), b.to(model.device)
        merged = torch.addmm(linear.dense(torch.float32).float(), b, a, alpha=adapter.scaling)
        stretch = row_stretch(adapted, adapter)
        if stretch is not None:
            merged *= 1.0 + stretch[:, None]
        if not is_finite(merged, model.dtype):
            raise InputError(
                f"the adapter makes the {adapted.name} weights of layer {adapted.layer_id} infinite in "
                f"{str(model.dtype).removeprefix('torch.')}; ask for bf16 or fp32"
            )
        if not linear.quantized:
            linear.replace(merged.to(model.dtype), linear.bias)
        else:
            assert model.quantization is not None
            path = linear_path(adapted.layer_id, adapted.name)
            linear.replace(quantize_weight(merged, model.quantization.format, path), linear.bias)


@torch.no_grad()
def row_stretch(adapted: AdaptedLinear, adapter: Adapter) -> torch.Tensor | None:
    """DoRA's m/‖W + s B A‖ − 1 of each row of the linear, f32 [out] on its device; 0 where no module is stretched, None
    where none is. Less one, so that bf16, which is coarse near 1, can hold it."""
    pair = adapter.matrices.get((adapted.layer_id, adapted.name))
    parts = [part for part in adapted.parts if part.path in adapter.magnitudes]
    if pair is None or not parts:
        return None
    weight = adapted.linear.dense(torch.float32).float()
    a, b = pair[0].to(weight.device), pair[1].to(weight.device)
    norms = torch.linalg.vector_norm(torch.addmm(weight, b, a, alpha=adapter.scaling), dim=1)
    stretch = torch.zeros_like(norms)
    for part in parts:
        magnitude = adapter.magnitudes[part.path].to(weight.device)
        stretch[part.start : part.stop] = magnitude / norms[part.start : part.stop].clamp(min=1e-12) - 1.0
    return stretch


def _stretch_(y: torch.Tensor, bias: torch.Tensor | None, stretch: torch.Tensor) -> torch.Tensor:
    """(y − bias) · (1 + stretch) + bias in place; ``stretch`` [out] or [T, out]."""
    return y.addcmul_(y if bias is None else y - bias, stretch)


class AdapterPool(RoutedAdapters):
    """Adapters and mixtures of them on the model's device, found by slot. Slots of unloaded ones are used again.

    As ``adapters`` of `Model.forward` it adds each sequence's own update; see `select` for batches with but one.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._slots: list[Adapter | Mixture | None] = []
        self._experts: ExpertStack | None = None  # of all mixtures
        self._matrices: dict[tuple[int, str], Pair] = {}  # a [N,R,in], b [N,out,R]
        self._stretches: dict[tuple[int, str], torch.Tensor] = {}  # [N+1,out]; the last row, of -1, is 0
        self._scalings = torch.empty(0, device=model.device)
        self._singles: dict[int, SingleAdapter | MixtureAdapters] = {}

    def add(self, adapter: Adapter | Mixture) -> int:
        """Takes the adapter or mixture in; returns its slot."""
        if None in self._slots:
            slot = self._slots.index(None)
            self._slots[slot] = adapter
        else:
            slot = len(self._slots)
            self._slots.append(adapter)
        self._stack()
        single = MixtureAdapters if isinstance(adapter, Mixture) else SingleAdapter
        self._singles[slot] = single(adapter, self._model)  # type: ignore[arg-type]
        return slot

    def remove(self, slot: int) -> None:
        self._slots[slot] = None
        del self._singles[slot]
        self._stack()

    def select(self, slots: Sequence[int]) -> AdapterPool | SingleAdapter | MixtureAdapters | None:
        """What serves a batch whose sequences use these slots (-1: none)."""
        used = set(slots)
        if used <= {-1}:
            return None
        if len(used) == 1:
            return self._singles[used.pop()]
        return self

    def routed(self, hidden: torch.Tensor, batch: Batch) -> AdapterPool | Routed:
        if self._experts is None:
            return self
        slot = _adapter_of_token(batch, hidden)
        chosen = [slot == i for i, adapter in enumerate(self._slots) if isinstance(adapter, Mixture)]
        return Routed(self, self._experts.weights(hidden, chosen))

    def linear(
        self,
        x: torch.Tensor,
        linear: Linear,
        layer_id: int,
        name: str,
        batch: Batch,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``weights`` [T, N] are those of the mixtures' experts."""
        y = linear(x)
        pair = self._matrices.get((layer_id, name))
        if pair is not None:
            assert batch.adapter_index is not None
            y = lora_grouped_add_(
                y, x, *pair, self._scalings, batch.adapter_index, batch.query_starts,
                max_query_len=batch.max_query_len, backend=self._model.backend,
            )  # fmt: skip
        stretches = self._stretches.get((layer_id, name))
        if stretches is not None:
            y = _stretch_(y, linear.bias, stretches[_adapter_of_token(batch, x)])
        if self._experts is None or weights is None:
            return y
        return self._experts.add(y, x, (layer_id, name), weights)

    def _stack(self) -> None:
        """Adapters of lower rank, or without this layer, are padded with zeros; so are the slots of mixtures."""
        place: dict[str, Any] = {"dtype": self._model.dtype, "device": self._model.device}
        self._matrices, self._stretches = {}, {}
        mixtures = [adapter for adapter in self._slots if isinstance(adapter, Mixture)]
        self._experts = ExpertStack(mixtures, self._model) if mixtures else None
        plain = [None if isinstance(adapter, Mixture) else adapter for adapter in self._slots]
        scalings = [adapter.scaling if adapter else 0.0 for adapter in plain]
        self._scalings = torch.tensor(scalings, dtype=torch.float32, device=self._model.device)
        for adapted in self._model.adaptable:
            key = (adapted.layer_id, adapted.name)
            rank = max([a.matrices[key][0].shape[0] for a in plain if a and key in a.matrices], default=0)
            if not rank:
                continue
            stacked_a = torch.zeros(len(self._slots), rank, adapted.linear.in_features, **place)
            stacked_b = torch.zeros(len(self._slots), adapted.linear.out_features, rank, **place)
            for slot, adapter in enumerate(plain):
                if adapter is not None and key in adapter.matrices:
                    a, b = adapter.matrices[key]
                    stacked_a[slot, : a.shape[0]].copy_(a)
                    stacked_b[slot, :, : b.shape[1]].copy_(b)
            self._matrices[key] = (stacked_a, stacked_b)
            found = [row_stretch(adapted, adapter) if adapter else None for adapter in plain]
            if any(stretch is not None for stretch in found):
                none = torch.zeros(adapted.linear.out_features, device=self._model.device)
                rows = [none if stretch is None else stretch for stretch in [*found, None]]
                self._stretches[key] = torch.stack(rows).to(self._model.dtype)


def _adapter_of_token(batch: Batch, x: torch.Tensor) -> torch.Tensor:
    """i64 [T]: the slot of each token's sequence."""
    assert batch.adapter_index is not None
    tokens = torch.arange(x.shape[0], device=x.device, dtype=batch.query_starts.dtype)
    sequence = torch.searchsorted(batch.query_starts[1:-1].contiguous(), tokens, right=True)
    return batch.adapter_index[sequence].long()


class SingleAdapter:
    """One adapter for every sequence of the batch: two thin products over all tokens."""

    def __init__(self, adapter: Adapter, model: Model) -> None:
        place: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        self._matrices = {
            key: (a.to(**place), (b * adapter.scaling).to(**place)) for key, (a, b) in adapter.matrices.items()
        }
        self._stretches: dict[tuple[int, str], torch.Tensor] = {}
        for adapted in model.adaptable:
            stretch = row_stretch(adapted, adapter)
            if stretch is not None:
                self._stretches[adapted.layer_id, adapted.name] = stretch.to(**place)

    def linear(self, x: torch.Tensor, linear: Linear, layer_id: int, name: str, batch: Batch) -> torch.Tensor:
        y = linear(x)
        pair = self._matrices.get((layer_id, name))
        if pair is None:
            return y
        cpu_blocks.add_product_(y, cpu_blocks.linear(x, pair[0]), pair[1])
        stretch = self._stretches.get((layer_id, name))
        return y if stretch is None else _stretch_(y, linear.bias, stretch)


def _fuse(adapted: AdaptedLinear, pairs: Mapping[str, Pair]) -> Pair | None:
    present = [part for part in adapted.parts if part.path in pairs]
    if not present:
        return None
    a = torch.cat([pairs[part.path][0] for part in present])
    b = torch.zeros(adapted.linear.out_features, a.shape[0])
    first = 0
    for part in present:
        block = pairs[part.path][1]
        b[part.start : part.stop, first : first + block.shape[1]] = block
        first += block.shape[1]
    return a, b


def _fingerprint(pairs: Mapping[str, Pair], magnitudes: Mapping[str, torch.Tensor], scaling: float) -> bytes:
    digest = hashlib.blake2b(repr(scaling).encode(), digest_size=16)
    for module in sorted(pairs):
        digest.update(module.encode())
        for tensor in (*pairs[module], *([magnitudes[module]] if module in magnitudes else [])):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.digest()


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
