"""Several adapters made one by arithmetic on their updates Δᵢ = sᵢ Bᵢ Aᵢ, module by module, without any data.

    average   λ/N Σ Δᵢ, exact: the experts' matrices stand side by side, the rank is the sum of theirs
    ties      of each Δᵢ the ``density`` share of largest magnitude stays; each entry takes the sign of their sum; what
              has that sign is averaged: λ · mean (Yadav et al., "TIES-Merging", 2023)
    dare      each entry of Δᵢ is dropped with probability 1 − density, the others are divided by density; then the
              average (Yu et al., "Language Models are Super Mario", 2023)

TIES and DARE leave no matrix of low rank, so the result is written as the best approximation of rank ``rank``, and how
much of it that loses is said. Magnitudes are ranked within a module, where the paper ranks those of the whole model:
nothing larger than one module is held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from specialize.errors import InputError

from ..engine.adapter_format import Pair, SavedAdapter, load_modules, save_part_matrices
from .lora import principal_factors

MERGES = ("average", "ties", "dare")


@dataclass(frozen=True)
class MergeReport:
    """``lost`` is ‖Δ − B A‖ / ‖Δ‖ over all modules (Frobenius), 0 where the merge is exact."""

    rank: int
    lost: float


def merge_adapters(
    folders: Sequence[Path],
    method: str,
    out: Path,
    *,
    density: float = 0.5,
    weight: float = 1.0,
    rank: int | None = None,
    seed: int = 0,
    base_model: str | None = None,
) -> MergeReport:
    """Writes the merge of PEFT folders as one to ``out``. ``weight`` is λ; ``rank`` (default: four times the sum of the
    experts') does not concern "average". Raises InputError for adapters of different bases, or with DoRA."""
    if method not in MERGES:
        raise InputError(f"method: {method}; allowed: {', '.join(MERGES)}")
    if not 0 < density <= 1:
        raise InputError(f"density: {density}; allowed: above 0, up to 1")
    experts = [load_modules(folder) for folder in folders]
    modules = sorted({module for expert in experts for module in expert.parts})
    check_same_shapes(folders, experts)
    total = sum(max(len(a) for a, _ in expert.parts.values()) for expert in experts)
    rank = total if method == "average" else rank or 4 * total
    generator = torch.Generator().manual_seed(seed)
    bases = {expert.base for expert in experts}
    parts: dict[str, Pair] = {}
    lost = whole = 0.0
    for module in modules:
        found = [(e.scaling, *e.parts[module]) for e in experts if module in e.parts]
        if method == "average":
            a = torch.cat([a for _, a, _ in found])
            b = torch.cat([b * (scaling * weight / len(experts)) for scaling, _, b in found], dim=1)
        else:
            updates = [scaling * b @ a for scaling, a, b in found]
            if method == "ties":
                merged = weight * ties(updates, density)
            else:
                merged = weight * dare(updates, density, generator) / len(experts)
            a, b = principal_factors(merged, min(rank, *merged.shape), 1.0, seed)
            lost += float((merged - b @ a).double().square().sum())
            whole += float(merged.double().square().sum())
        parts[module] = (a, b * (len(a) / rank))  # readers multiply B A by alpha / its own rank, and alpha is `rank`
    save_part_matrices(
        out, parts, rank=rank, alpha=rank, targets=sorted({module.rsplit(".", 1)[-1] for module in modules}),
        base_model=base_model, base=bases.pop() if len(bases) == 1 else None,
        rank_pattern={module: len(a) for module, (a, _) in parts.items() if len(a) != rank},
    )  # fmt: skip
    return MergeReport(rank, (lost / whole) ** 0.5 if whole else 0.0)


def ties(updates: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    """Trimmed, their signs elected, the agreeing ones averaged: [out, in] of several of that shape."""
    trimmed = torch.stack([trim(update, density) for update in updates])
    agrees = trimmed.sign() == trimmed.sum(0).sign()
    agrees &= trimmed != 0
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def trim(update: torch.Tensor, density: float) -> torch.Tensor:
    """The ``density`` share of entries of largest magnitude, at least one, the others 0."""
    count = max(1, round(density * update.numel()))
    kept = update.abs().flatten().topk(count, sorted=False).indices
    trimmed = torch.zeros_like(update).flatten()
    trimmed[kept] = update.flatten()[kept]
    return trimmed.view_as(update)


def dare(updates: Sequence[torch.Tensor], density: float, generator: torch.Generator) -> torch.Tensor:
    """The sum of updates of whose entries a random share is left, enlarged so that their expectation stays."""
    return sum(
        (update * (torch.rand(update.shape, generator=generator) < density) / density for update in updates),
        start=torch.zeros_like(updates[0]),
    )


def check_same_shapes(folders: Sequence[Path], experts: Sequence[SavedAdapter]) -> None:
    """Raises InputError where a module has different shapes in two adapters, or one is a DoRA adapter."""
    shapes: dict[str, tuple[Path, tuple[int, int]]] = {}
    for folder, expert in zip(folders, experts, strict=True):
        if expert.magnitudes:
            raise InputError(f"{folder}: a DoRA adapter, whose updates cannot be added up; tune it without dora")
        for module, (a, b) in expert.parts.items():
            shape = (a.shape[1], b.shape[0])
            other, known = shapes.setdefault(module, (folder, shape))
            if known != shape:
                raise InputError(
                    f"{folder}: {module} maps {shape[0]} to {shape[1]} features, in {other} {known[0]} to {known[1]}; "
                    "experts to be composed share one base"
                )
