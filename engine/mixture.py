"""Folders of mixtures: the experts as PEFT folders, their router, and a manifest that knows them by their hashes.

    MIX/mixture.json            version, base, top_k, sha256 of every file below
    MIX/router.safetensors      router.weight f32 [N, C]
    MIX/experts/0/…             adapter_config.json, adapter_model.safetensors

A mixture whose files changed, or whose base is another one, is refused: a router knows nothing of other weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

from specialize.errors import InputError, parse_json

from .adapter import Adapter, load_adapter, save_adapter
from .adapter_format import CONFIG_FILE, MIXTURE_FILE, WEIGHTS_FILE
from .digest import file_sha256, save_tensors
from .model import Model
from .routing import Mixture
from .staging import staging

ROUTER_FILE, ROUTER_NAME = "router.safetensors", "router.weight"
VERSION = 1
MAX_EXPERTS = 64
MAX_MANIFEST_BYTES = 1 << 20
_SAMPLES = 4096  # numbers of a tensor that its mark is made of


def mix(experts: Sequence[Adapter], names: Sequence[str], router: torch.Tensor, top_k: int) -> Mixture:
    """A mixture of adapters that were fitted to one model; ``router`` f32 [N, C], ``top_k`` from 1 to N.

    Raises InputError where there are fewer than two experts, or where one is a DoRA adapter: its update stretches W x,
    which several cannot do at once.
    """
    if not 2 <= len(experts) <= MAX_EXPERTS:
        raise InputError(f"a mixture has 2 to {MAX_EXPERTS} experts; {len(experts)} given")
    for name, expert in zip(names, experts, strict=True):
        if expert.magnitudes:
            raise InputError(f"expert {name} is a DoRA adapter, whose updates cannot be added up; tune it without dora")
    if not 1 <= top_k <= len(experts):
        raise InputError(f"top_k: {top_k}; allowed: 1 to {len(experts)}, the number of experts")
    router = router.detach().to("cpu", torch.float32).contiguous().clone()
    digest = hashlib.blake2b(f"{top_k} {len(experts)}".encode(), digest_size=16)
    for part in (*(expert.fingerprint for expert in experts), router.numpy().tobytes()):
        digest.update(part)
    bases = {expert.base_model for expert in experts}
    base = bases.pop() if len(bases) == 1 else None
    return Mixture(tuple(experts), tuple(names), router, top_k, base, digest.digest())


def load_adapter_or_mixture(path: str | Path, model: Model) -> Adapter | Mixture:
    """What a folder holds, fitted to ``model``. Raises InputError naming what is missing or does not belong."""
    return load_mixture(path, model) if is_mixture(path) else load_adapter(path, model)


def is_mixture(path: str | Path) -> bool:
    return (Path(path) / MIXTURE_FILE).is_file()


def adapter_files(path: str | Path) -> list[str]:
    """The files of an adapter's or a mixture's folder, relative to it. Raises InputError where one is missing."""
    folder = Path(path)
    names = [CONFIG_FILE, WEIGHTS_FILE]
    if is_mixture(folder):
        names = [MIXTURE_FILE, *_read_manifest(folder).files]
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"adapter: {folder} holds no {name}")
    return names


def save_mixture(path: str | Path, mixture: Mixture, model: Model, *, base_model: str | None = None) -> Path:
    """Writes the folder; the manifest comes last, so that a folder with one is whole."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MIXTURE_FILE).unlink(missing_ok=True)
    base_model = base_model or mixture.base_model
    with staging(folder, "mixture") as place:
        for number, expert in enumerate(mixture.experts):
            save_adapter(place / "experts" / str(number), expert, base_model=base_model)
        save_tensors({ROUTER_NAME: mixture.router}, place / ROUTER_FILE, mixture.experts[0].base)
        files = _file_names(len(mixture.experts))
        manifest = {
            "format": "mixture of experts",
            "version": VERSION,
            "base_model": base_model,
            "base": base_marks(model),
            "top_k": mixture.top_k,
            "experts": list(mixture.names),
            "sha256": {name: file_sha256(place / name) for name in files},
        }
        (place / MIXTURE_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder / "experts", ignore_errors=True)
        for name in ("experts", ROUTER_FILE, MIXTURE_FILE):
            os.replace(place / name, folder / name)
    return folder


def load_mixture(path: str | Path, model: Model) -> Mixture:
    """Reads the folder and fits it to ``model``. Raises InputError where a file is missing, is not the one that the
    manifest knows, or the base is another one."""
    folder = Path(path)
    manifest = _read_manifest(folder)
    for name, wanted in manifest.files.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name}, which {MIXTURE_FILE} names; the mixture is not whole")
        if file_sha256(folder / name) != wanted:
            raise InputError(f"{folder / name}: not the file that {MIXTURE_FILE} knows by its sha256; compose it anew")
    marks = base_marks(model)
    for name in sorted(set(marks) & set(manifest.base)):
        if marks[name] != manifest.base[name]:
            raise InputError(
                f"{folder}: was composed over another base ({manifest.base_model or 'unnamed'}): {name} differs; "
                "load that one, or compose the experts anew"
            )
    experts = [load_adapter(folder / "experts" / str(number), model) for number in range(len(manifest.names))]
    try:
        with safe_open(folder / ROUTER_FILE, framework="pt") as file:
            router = file.get_tensor(ROUTER_NAME)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / ROUTER_FILE}: not a safetensors file with {ROUTER_NAME} ({error})") from None
    shape = (len(experts), model.config.hidden_size)
    if tuple(router.shape) != shape or not router.is_floating_point() or not bool(torch.isfinite(router).all()):
        raise InputError(f"{folder / ROUTER_FILE}: {router.dtype} {tuple(router.shape)}; wanted finite numbers {shape}")
    return mix(experts, manifest.names, router, manifest.top_k)


@torch.no_grad()
def base_marks(model: Model) -> dict[str, str]:
    """Hashes of samples of a base's weights, by what they are of and the number format in which they are compared: an
    fp32 model rounds as it would have been loaded in bf16 or fp16. Quantised matrices leave no mark."""
    tensors = {"embedding": model.embedding}
    for name, layer in (("first block", model.layers[0]), ("last block", model.layers[-1])):
        if not layer.down.quantized:
            tensors[name] = layer.down.dense(model.dtype)
    formats = {"bf16": torch.bfloat16, "fp16": torch.float16}
    marks = {"architecture": f"{model.config.architecture} {model.config.num_layers} x {model.config.hidden_size}"}
    for name, tensor in tensors.items():
        sample = tensor.flatten()[:: max(1, tensor.numel() // _SAMPLES)].cpu()
        for label, dtype in formats.items():
            if model.dtype in (torch.float32, dtype):
                content = sample.to(dtype).view(torch.int16).numpy().tobytes()
                marks[f"{name} in {label}"] = hashlib.sha256(content).hexdigest()[:32]
    return marks


@dataclass(frozen=True)
class _Manifest:
    names: tuple[str, ...]
    top_k: int
    base: Mapping[str, str]
    base_model: str | None
    files: Mapping[str, str]  # name → sha256


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / MIXTURE_FILE
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise InputError(f"{path}: larger than any manifest ({MAX_MANIFEST_BYTES} bytes)")
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not readable as JSON ({error})") from None

    def bad(what: str) -> InputError:
        return InputError(f"{path}: {what}; compose the mixture anew")

    if not isinstance(found, dict) or found.get("version") != VERSION:
        version = found.get("version") if isinstance(found, dict) else None
        raise bad(f"version {version!r:.40} is not known (this program reads {VERSION})")
    names, top_k, base, files = (found.get(key) for key in ("experts", "top_k", "base", "sha256"))
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or not 2 <= len(names) <= MAX_EXPERTS:
        raise bad(f"experts must be 2 to {MAX_EXPERTS} names")
    if type(top_k) is not int or not 1 <= top_k <= len(names):
        raise bad(f"top_k is {top_k!r:.40}, allowed: 1 to {len(names)}")
    if not _maps_text(base) or not _maps_text(files):
        raise bad("base and sha256 must map names to hashes")
    if sorted(files) != sorted(_file_names(len(names))):
        raise bad("sha256 does not name the files of these experts")
    base_model = found.get("base_model")
    return _Manifest(tuple(names), top_k, base, base_model if isinstance(base_model, str) else None, files)


def _maps_text(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _file_names(num_experts: int) -> list[str]:
    return [f"experts/{i}/{name}" for i in range(num_experts) for name in (CONFIG_FILE, WEIGHTS_FILE)] + [ROUTER_FILE]
