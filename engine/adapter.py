"""LoRA adapters: files in PEFT's format, a pool that serves several in one batch, and merging one into the weights.

A file holds A [R, in] and B [out, R] per module of the checkpoint. Our fused linear layers take one pair each: the
parts' A stacked along the rank, their B on the diagonal blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from specialize.errors import InputError

from ..kernels.lora_linear import lora_grouped_add_
from .batch import Batch
from .linear import Linear
from .model import AdaptedLinear, Model
from .quantize import linear_path, quantize_weight

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """``parts`` maps a module's path to its A [R, in] and B [out, R]; ``matrices`` maps (layer_id, linear name) to the
    same fused for the model. All are fp32 on the CPU; the update is ``scaling · B A``. Equal contents have equal
    fingerprints."""

    parts: dict[str, Pair]
    matrices: dict[tuple[int, str], Pair]
    scaling: float
    rank: int
    alpha: float
    targets: tuple[str, ...]
    base_model: str | None
    fingerprint: bytes


def load_adapter(path: str | Path, model: Model) -> Adapter:
    """Reads a PEFT adapter folder and fits it to ``model``.

    Raises InputError naming what is missing, unsupported, or belongs to another base.
    """
    folder = Path(path)
    config = _read_config(folder)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    pairs = _pair_up(tensors, folder)
    default_rank, default_alpha = int(config["r"]), float(config["lora_alpha"])
    stabilized = bool(config.get("use_rslora", False))
    scaling = _scaling(default_rank, default_alpha, stabilized)

    known = {part.path: (adapted, part) for adapted in model.adaptable for part in adapted.parts}
    unknown = sorted(set(pairs) - set(known))
    if unknown:
        raise InputError(
            f"{folder}: adapts {unknown[0]}{_and_more(unknown)}, which this {model.config.architecture} model of "
            f"{model.config.num_layers} layers lacks; it belongs to another base"
        )
    for module, (a, b) in pairs.items():
        adapted, part = known[module]
        expected = (adapted.linear.in_features, part.stop - part.start)
        if (a.shape[1], b.shape[0]) != expected or a.shape[0] != b.shape[1]:
            raise InputError(
                f"{folder}: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}; this model's module maps "
                f"{expected[0]} to {expected[1]} features; the adapter belongs to another base"
            )
        # Modules with a rank or alpha of their own: their scaling goes into B, so that one number serves all.
        alpha = _pattern_value(config.get("alpha_pattern"), module, default_alpha)
        own = _scaling(a.shape[0], alpha, stabilized)
        if own != scaling:
            pairs[module] = (a, b * (own / scaling))

    matrices = {}
    for adapted in model.adaptable:
        fused = _fuse(adapted, pairs)
        if fused is not None:
            matrices[adapted.layer_id, adapted.name] = fused
    return Adapter(
        parts=pairs,
        matrices=matrices,
        scaling=scaling,
        rank=default_rank,
        alpha=default_alpha,
        targets=tuple(sorted({module.rsplit(".", 1)[-1] for module in pairs})),
        base_model=config.get("base_model_name_or_path"),
        fingerprint=_fingerprint(pairs, scaling),
    )


def save_adapter(path: str | Path, adapter: Adapter, *, base_model: str | None = None) -> Path:
    """Writes an adapter as a PEFT folder."""
    stabilized = not math.isclose(adapter.scaling, adapter.alpha / adapter.rank)
    parts, ranks = {}, {}
    for module, (a, b) in adapter.parts.items():
        if a.shape[0] != adapter.rank:  # PEFT scales by each module's own rank
            ranks[module] = a.shape[0]
            b = b * (adapter.scaling / _scaling(a.shape[0], adapter.alpha, stabilized))
        parts[module] = (a, b)
    return save_part_matrices(
        path, parts, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets,
        rank_stabilized=stabilized, base_model=base_model or adapter.base_model, rank_pattern=ranks,
    )  # fmt: skip


def save_part_matrices(
    path: str | Path,
    parts: Mapping[str, Pair],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    base_model: str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
) -> Path:
    """Writes ``parts`` (module path → A [R, in], B [out, R]) as a PEFT folder; each file appears whole or not at all.

    ``rank_pattern`` names modules whose rank differs from ``rank``.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b) in parts.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.detach().to("cpu", torch.float32).contiguous().clone()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.detach().to("cpu", torch.float32).contiguous().clone()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
        "rank_pattern": dict(rank_pattern or {}),
        "use_rslora": rank_stabilized,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        weights = Path(staging) / WEIGHTS_FILE
        save_file(tensors, weights, metadata={"format": "pt"})
        settings = Path(staging) / CONFIG_FILE
        settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(settings, folder / CONFIG_FILE)
    return folder


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
        if isinstance(linear.weight, torch.Tensor):
            linear.replace(merged.to(linear.weight.dtype), linear.bias)
        else:
            assert model.quantization is not None
            path = linear_path(adapted.layer_id, adapted.name)
            linear.replace(quantize_weight(merged, model.quantization.format, path), linear.bias)


class AdapterPool:
    """Adapters on the model's device, found by slot. Slots of unloaded adapters are used again.

    As ``adapters`` of `Model.forward` it adds each sequence's own update; see `select` for batches with but one.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._slots: list[Adapter | None] = []
        self._matrices: dict[tuple[int, str], Pair] = {}  # a [N,R,in], b [N,out,R]
        self._scalings = torch.empty(0, device=model.device)
        self._singles: dict[int, SingleAdapter] = {}

    def add(self, adapter: Adapter) -> int:
        """Takes the adapter in; returns its slot."""
        if None in self._slots:
            slot = self._slots.index(None)
            self._slots[slot] = adapter
        else:
            slot = len(self._slots)
            self._slots.append(adapter)
        self._stack()
        self._singles[slot] = SingleAdapter(adapter, self._model)
        return slot

    def remove(self, slot: int) -> None:
        self._slots[slot] = None
        del self._singles[slot]
        self._stack()

    def select(self, slots: Sequence[int]) -> AdapterPool | SingleAdapter | None:
        """What serves a batch whose sequences use these slots (-1: none)."""
        used = set(slots)
        if used <= {-1}:
            return None
        if len(used) == 1:
            return self._singles[used.pop()]
        return self

    def linear(self, x: torch.Tensor, linear: Linear, layer_id: int, name: str, batch: Batch) -> torch.Tensor:
        y = linear(x)
        pair = self._matrices.get((layer_id, name))
        if pair is None:
            return y
        assert batch.adapter_index is not None
        return lora_grouped_add_(
            y, x, *pair, self._scalings, batch.adapter_index, batch.query_starts,
            max_query_len=batch.max_query_len, backend=self._model.backend,
        )  # fmt: skip

    def _stack(self) -> None:
        """Adapters of lower rank, or without this layer, are padded with zeros."""
        place: dict[str, Any] = {"dtype": self._model.dtype, "device": self._model.device}
        self._matrices = {}
        scalings = [adapter.scaling if adapter else 0.0 for adapter in self._slots]
        self._scalings = torch.tensor(scalings, dtype=torch.float32, device=self._model.device)
        for adapted in self._model.adaptable:
            key = (adapted.layer_id, adapted.name)
            rank = max([a.matrices[key][0].shape[0] for a in self._slots if a and key in a.matrices], default=0)
            if not rank:
                continue
            stacked_a = torch.zeros(len(self._slots), rank, adapted.linear.in_features, **place)
            stacked_b = torch.zeros(len(self._slots), adapted.linear.out_features, rank, **place)
            for slot, adapter in enumerate(self._slots):
                if adapter is not None and key in adapter.matrices:
                    a, b = adapter.matrices[key]
                    stacked_a[slot, : a.shape[0]].copy_(a)
                    stacked_b[slot, :, : b.shape[1]].copy_(b)
            self._matrices[key] = (stacked_a, stacked_b)


class SingleAdapter:
    """One adapter for every sequence of the batch: two thin products over all tokens."""

    def __init__(self, adapter: Adapter, model: Model) -> None:
        place: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        self._matrices = {
            key: (a.to(**place), (b * adapter.scaling).to(**place)) for key, (a, b) in adapter.matrices.items()
        }

    def linear(self, x: torch.Tensor, linear: Linear, layer_id: int, name: str, batch: Batch) -> torch.Tensor:
        y = linear(x)
        pair = self._matrices.get((layer_id, name))
        return y if pair is None else y.addmm_(F.linear(x, pair[0]), pair[1].t())


def _scaling(rank: int, alpha: float, stabilized: bool) -> float:
    return alpha / math.sqrt(rank) if stabilized else alpha / rank


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such adapter folder; give one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a {type(config).__name__}, not a JSON object")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {config.get('peft_type')!r} is not supported; allowed: LORA")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if not isinstance(value, (int, float)) or value <= 0:
            raise InputError(f"{path}: {name} is {value!r}; it must be a positive number")
    for name, plain in (("use_dora", False), ("fan_in_fan_out", False), ("modules_to_save", None), ("bias", "none")):
        if config.get(name, plain) not in (plain, None, []):
            raise InputError(f"{path}: {name} {config[name]!r} is not supported; allowed: {plain!r}")
    return config


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; pickled adapters (.bin) are not read") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None


def _pair_up(tensors: Mapping[str, torch.Tensor], folder: Path) -> dict[str, Pair]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(?:{re.escape(_PREFIX)})?(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match is None or tensor.dim() != 2:
            raise InputError(f"{folder}: tensor {name} {tuple(tensor.shape)} is no LoRA matrix of a linear layer")
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise InputError(f"{folder}: {WEIGHTS_FILE} is empty")
    for module, half in halves.items():
        if len(half) != 2:
            raise InputError(f"{folder}: {module} has lora_{next(iter(half))} without its other half")
    return {module: (half["A"], half["B"]) for module, half in halves.items()}


def _pattern_value(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's per-module settings: a key matches the whole path or its end after a dot."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return float(value)
    return default


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


def _fingerprint(pairs: Mapping[str, Pair], scaling: float) -> bytes:
    digest = hashlib.blake2b(repr(scaling).encode(), digest_size=16)
    for module in sorted(pairs):
        digest.update(module.encode())
        for tensor in pairs[module]:
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.digest()


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
