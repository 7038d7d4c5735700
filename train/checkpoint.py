"""Atomic checkpoints: one safetensors file holding tensors and, as JSON in its metadata, everything else.

The file is written under another name, flushed to the disk and renamed, so a reader finds the old checkpoint or the new
one and never a part of one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from specialize.errors import InputError

from ..engine.staging import hold

FORMAT = "specialize-train-2"


def write_atomic(path: str | Path, content: bytes) -> None:
    """Replaces ``path`` by ``content`` so that a crash at any moment leaves the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            hold(file.fileno())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save_checkpoint(path: str | Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Writes ``tensors`` and the JSON-able ``state``; floats survive bit for bit."""
    on_host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    metadata = {"format": FORMAT, "state": text, "sha256": _digest(on_host, text)}
    write_atomic(path, save(on_host, metadata=metadata))


def load_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, state) as saved. Raises InputError where the file is no checkpoint of ours or is damaged: safetensors
    itself would take a flipped bit of a weight for the weight."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{path}: not a training checkpoint; delete it or pass another output folder")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("sha256") != _digest(tensors, metadata.get("state", "")):
                raise InputError(f"{path}: damaged checkpoint (its hash differs); delete it to train from the start")
            return tensors, json.loads(metadata["state"])
    except (SafetensorError, KeyError, ValueError, RecursionError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged checkpoint ({error}); delete it to train from the start") from error


def _digest(tensors: Mapping[str, torch.Tensor], state: str) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors, in the order of their names, and the state."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
