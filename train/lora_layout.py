"""Which modules an adapter touches, with which rank, scaling and dropout, and where their matrices lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specialize.errors import InputError

from ..engine.adapter_format import lora_scaling, pattern_value
from .parameters import ParameterGroup, aligned

Key = tuple[int, str]  # (layer_id, name of the fused linear)


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
    alpha: float
    scaling: float
    dropout: float

    @property
    def rank(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class LoraPair:
    """Where the matrices of one fused linear lie in the flat tensor. ``scaling`` is the first part's."""

    in_features: int
    out_features: int
    rank: int
    parts: tuple[LoraPart, ...]
    a_offset: int
    b_offset: int
    m_offset: int

    @property
    def scaling(self) -> float:
        return self.parts[0].scaling

    @property
    def is_whole(self) -> bool:
        """Whether one part owns all rows, so that every entry is a parameter."""
        return len(self.parts) == 1 and self.parts[0].stop - self.parts[0].start == self.out_features

    def views(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a [R, in], b [out, R]."""
        a = flat[self.a_offset : self.a_offset + self.rank * self.in_features].view(self.rank, self.in_features)
        b = flat[self.b_offset : self.b_offset + self.out_features * self.rank].view(self.out_features, self.rank)
        return a, b

    def magnitude(self, flat: torch.Tensor) -> torch.Tensor:
        """DoRA's row lengths [out]."""
        return flat[self.m_offset : self.m_offset + self.out_features]


def adaptable_names(model: Any) -> tuple[str, ...]:
    """Part names that ``targets`` may hold, in the order in which they run."""
    return tuple(dict.fromkeys(part.name for adapted in model.adaptable for part in adapted.parts))


def resolve_targets(
    model: Any, targets: str | Sequence[str], layers: Sequence[int] | None = None
) -> list[tuple[Any, Any]]:
    """``targets`` ("all", names, path endings, regular expressions) within ``layers`` -> (adapted linear, part), in the
    order in which they run. Raises InputError for a target that names nothing and for a layer that does not exist."""
    if isinstance(targets, str):
        targets = [t.strip() for t in targets.split(",") if t.strip()]
    num_layers = model.config.num_layers
    outside = [layer for layer in layers or () if not 0 <= layer < num_layers]
    if outside or (layers is not None and not layers):
        raise InputError(f"layers: {outside[0] if outside else 'none'}; this model has 0 to {num_layers - 1}")
    parts = [(adapted, part) for adapted in model.adaptable for part in adapted.parts]
    if list(targets) in (["all"], ["all-linear"]):
        hits = dict.fromkeys((part.path for _, part in parts), True)
    else:
        hits, unknown = {}, []
        for target in targets:
            found = [p.path for _, p in parts if p.name == target or pattern_value({target: 1}, p.path, 0.0)]
            hits |= dict.fromkeys(found, True)
            if not found:
                unknown.append(target)
        if unknown or not targets:
            raise InputError(
                f"targets: {', '.join(unknown) or 'none'}: no such layer in this model; allowed: all, "
                f"{', '.join(adaptable_names(model))}, or the end of a path such as {parts[-1][1].path}"
            )
    chosen = [(a, p) for a, p in parts if p.path in hits and (layers is None or a.layer_id in layers)]
    if not chosen:
        raise InputError(f"targets: {','.join(targets)}: none of these lies in layers {_numbers(layers or ())}")
    return chosen


def shortest_targets(model: Any, paths: Sequence[str]) -> tuple[str, ...]:
    """What an adapter's file says that it adapts: part names where all modules of a name are, else whole paths."""
    chosen = set(paths)
    names = {part.name for adapted in model.adaptable for part in adapted.parts if part.path in chosen}
    everywhere = {part.path for adapted in model.adaptable for part in adapted.parts if part.name in names}
    return tuple(n for n in adaptable_names(model) if n in names) if everywhere == chosen else tuple(paths)


def lay_out(
    chosen: Sequence[tuple[Any, Any]],
    *,
    rank: int,
    alpha: float | None,
    dropout: float,
    patterns: Mapping[str, Mapping[str, float]],
    rank_stabilized: bool,
    dora: bool,
    plus_ratio: float,
) -> tuple[dict[Key, LoraPair], tuple[ParameterGroup, ...]]:
    """Pairs by fused linear, and the groups of the flat tensor: all a first, then all b and magnitudes.

    ``alpha`` None is twice each module's own rank. ``patterns`` maps "rank", "alpha" and "dropout" to values for
    modules. Raises InputError for a value out of range and for a pattern that matches nothing.
    """
    paths = [part.path for _, part in chosen]
    for name, pattern in patterns.items():
        for key in pattern:
            if not any(pattern_value({key: 1}, path, 0.0) for path in paths):
                raise InputError(f"{name} pattern {key!r}: matches no adapted layer; one is {paths[0]}")
    by_linear: dict[Key, list[tuple[Any, Any]]] = {}
    for adapted, part in chosen:
        by_linear.setdefault((adapted.layer_id, adapted.name), []).append((adapted, part))
    planned: dict[Key, tuple[Any, tuple[LoraPart, ...]]] = {}
    for key, members in by_linear.items():
        parts, first = [], 0
        for adapted, part in members:
            own_rank = pattern_value(patterns["rank"], part.path, rank)
            _check_rank(own_rank, part.path, adapted.linear.in_features, part.stop - part.start)
            own_rank = int(own_rank)
            own_alpha = pattern_value(patterns["alpha"], part.path, 2.0 * own_rank if alpha is None else alpha)
            own_dropout = pattern_value(patterns["dropout"], part.path, dropout)
            if own_alpha <= 0:
                raise InputError(f"alpha: {own_alpha:g} for {part.path}; allowed: above 0")
            if not 0.0 <= own_dropout < 1.0:
                raise InputError(f"dropout: {own_dropout:g} for {part.path}; allowed: from 0 to below 1")
            scaling = lora_scaling(own_rank, own_alpha, rank_stabilized)
            parts.append(
                LoraPart(part.name, part.path, part.start, part.stop, first, first + own_rank, own_alpha, scaling,
                         own_dropout)
            )  # fmt: skip
            first += own_rank
        planned[key] = (members[0][0].linear, tuple(parts))

    offset, offsets = 0, {}
    for what in ("a", "b", "m") if dora else ("a", "b"):
        if what == "b":
            a_end = offset
        for key, (linear, parts) in planned.items():
            offsets[key, what] = offset
            size = {"a": parts[-1].last * linear.in_features, "b": parts[-1].last * linear.out_features}
            offset = aligned(offset + size.get(what, linear.out_features))
    pairs = {
        key: LoraPair(
            linear.in_features, linear.out_features, parts[-1].last, parts, offsets[key, "a"], offsets[key, "b"],
            offsets.get((key, "m"), offset),
        )
        for key, (linear, parts) in planned.items()
    }  # fmt: skip
    if plus_ratio == 1.0:
        return pairs, (ParameterGroup(0, offset),)
    return pairs, (ParameterGroup(0, a_end), ParameterGroup(a_end, offset, plus_ratio))


def _check_rank(rank: float, path: str, in_features: int, out_features: int) -> None:
    largest = min(in_features, out_features)
    if rank != int(rank) or not 1 <= rank <= largest:
        raise InputError(
            f"rank: {rank:g} for {path}, which maps {in_features} to {out_features} features; allowed: 1 to {largest}"
        )


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
