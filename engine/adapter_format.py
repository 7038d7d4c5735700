"""Adapter folders as PEFT writes and reads them: low-rank pairs per module of the checkpoint, and DoRA's magnitudes.

Nothing here knows a model. Shapes: A [R, in], B [out, R], magnitude [out].
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from specialize.errors import InputError, parse_json

from .digest import read_base, save_tensors
from .staging import staging

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MIXTURE_FILE = "mixture.json"  # of a folder of several adapters and their router
_PREFIX = "base_model.model."
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SavedAdapter:
    """What a folder holds, fp32 on the CPU. Each module's update is ``scaling · B A``: where its rank or alpha is its
    own, B holds the ratio. ``magnitudes`` is empty but for DoRA. ``base`` says on which base it was trained
    (`digest.base_identity`), where the file says so."""

    parts: dict[str, Pair]
    magnitudes: dict[str, torch.Tensor]
    scaling: float
    rank: int
    alpha: float
    base_model: str | None
    base: str | None = None


def load_modules(path: str | Path) -> SavedAdapter:
    """Reads a PEFT adapter folder. Raises InputError naming what is missing or unsupported."""
    folder = Path(path)
    config = _read_config(folder)
    pairs, magnitudes = _pair_up(_read_tensors(folder / WEIGHTS_FILE), folder)
    if bool(config.get("use_dora", False)) != bool(magnitudes):
        raise InputError(
            f"{folder}: use_dora is {not magnitudes} in {CONFIG_FILE}, but {WEIGHTS_FILE} "
            f"{'has' if magnitudes else 'lacks'} magnitude vectors; save the adapter anew"
        )
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    stabilized = bool(config.get("use_rslora", False))
    scaling = lora_scaling(rank, alpha, stabilized)
    for module, (a, b) in pairs.items():
        if a.shape[0] != b.shape[1]:
            raise InputError(f"{folder}: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}: ranks differ")
        own = lora_scaling(a.shape[0], pattern_value(config.get("alpha_pattern"), module, alpha), stabilized)
        if own != scaling:
            pairs[module] = (a, b * (own / scaling))
    base = read_base(folder / WEIGHTS_FILE)
    return SavedAdapter(pairs, magnitudes, scaling, rank, alpha, config.get("base_model_name_or_path"), base)


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
    base: str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    magnitudes: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Writes ``parts`` (module path → A [R, in], B [out, R]) as a PEFT folder; each file appears whole or not at all.

    ``rank_pattern`` names modules whose rank differs from ``rank``, ``alpha_pattern`` likewise; ``magnitudes`` (module
    path → [out]) make it a DoRA adapter. ``base`` is the identity of its base (`digest.base_identity`).
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b) in parts.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.detach().to("cpu", torch.float32).contiguous().clone()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.detach().to("cpu", torch.float32).contiguous().clone()
    for module, magnitude in (magnitudes or {}).items():
        tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = magnitude.detach().to("cpu", torch.float32).clone()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": {module: _plain(own) for module, own in (alpha_pattern or {}).items()},
        "use_rslora": rank_stabilized,
        "use_dora": bool(magnitudes),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    with staging(folder, "adapter") as place:
        weights = place / WEIGHTS_FILE
        save_tensors(tensors, weights, base)
        settings = place / CONFIG_FILE
        settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(settings, folder / CONFIG_FILE)
    return folder


def lora_scaling(rank: int, alpha: float, stabilized: bool) -> float:
    """What the product B A is multiplied with."""
    return alpha / math.sqrt(rank) if stabilized else alpha / rank


def _plain(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such adapter folder; give one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    path = folder / CONFIG_FILE
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / MIXTURE_FILE).is_file():
            raise InputError(
                f"{folder}: is a mixture of experts, chosen token by token; it serves beside a base and cannot be "
                "merged or tuned on. Its experts/ are adapters"
            ) from None
        raise InputError(f"{path}: no such file; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a {type(config).__name__}, not a JSON object")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {config.get('peft_type')!r} is not supported; allowed: LORA")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        whole = name == "r"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value < 2**31:
            raise InputError(f"{path}: {name} is {value!r:.80}; it must be a positive number{', and whole' * whole}")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: alpha_pattern is a {type(patterns).__name__}; it must map modules to numbers")
    for key, value in patterns.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
            raise InputError(f"{path}: alpha_pattern has {value!r:.80} for {key!r:.80}; it must be a positive number")
        _check_pattern(key, path)
    for name, plain in (("fan_in_fan_out", False), ("modules_to_save", None), ("bias", "none")):
        if config.get(name, plain) not in (plain, None, []):
            raise InputError(f"{path}: {name} {config[name]!r} is not supported; allowed: {plain!r}")
    return config


def _check_pattern(pattern: str, path: Path) -> None:
    """A stranger's regular expression: at most two repetitions, none of a group, so that matching ends soon."""
    repeats = re.findall(r"\)?[*+{?]", pattern)
    if len(pattern) > 500 or len(repeats) > 2 or any(found.startswith(")") for found in repeats):
        raise InputError(f"{path}: alpha_pattern {pattern!r:.80} is not supported; give module names")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: alpha_pattern {pattern!r:.80} is no pattern ({error})") from None


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; pickled adapters (.bin) are not read") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if len(name) > 500 or 0 in tensor.shape:
            raise InputError(f"{path}: tensor {name[:80]} {tuple(tensor.shape)} is empty, or its name endless")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{path}: tensor {name} holds NaN or infinity; the adapter is damaged or its training failed"
            )
    return tensors


def _pair_up(tensors: Mapping[str, torch.Tensor], folder: Path) -> tuple[dict[str, Pair], dict[str, torch.Tensor]]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    magnitudes: dict[str, torch.Tensor] = {}
    prefix = rf"(?:{re.escape(_PREFIX)})?(.+)"
    for name, tensor in tensors.items():
        match = re.fullmatch(prefix + r"\.lora_([AB])(?:\.default)?\.weight", name)
        magnitude = re.fullmatch(prefix + r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", name)
        if match is not None and tensor.dim() == 2:
            halves.setdefault(match[1], {})[match[2]] = tensor
        elif magnitude is not None and tensor.dim() == 1:
            magnitudes[magnitude[1]] = tensor
        else:
            raise InputError(f"{folder}: tensor {name} {tuple(tensor.shape)} is no LoRA matrix of a linear layer")
    if not halves:
        raise InputError(f"{folder}: {WEIGHTS_FILE} is empty")
    for module, half in halves.items():
        if len(half) != 2:
            raise InputError(f"{folder}: {module} has lora_{next(iter(half))} without its other half")
    uneven = sorted(set(magnitudes) ^ set(halves)) if magnitudes else []
    if uneven:
        raise InputError(f"{folder}: {uneven[0]} has either matrices or a magnitude vector, and needs both")
    return {module: (half["A"], half["B"]) for module, half in halves.items()}, magnitudes


def pattern_value(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's per-module settings: a key matches the whole path or its end after a dot."""
    ends = [module] + [module[i + 1 :] for i, character in enumerate(module) if character == "."]
    for key, value in (pattern or {}).items():
        if any(re.fullmatch(key, end) for end in ends):
            return float(value)
    return default
