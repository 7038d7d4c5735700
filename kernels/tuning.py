"""Launch configurations measured on a device: ``tuned/DEVICE.json`` maps op and shape bucket to tiles, warps and
stages.

Reading is all that happens while a user waits. ``specialize bench kernels --tune`` alone measures and writes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tuned"

_overrides: dict[tuple[str, str], dict[str, Any]] = {}


def device_key(device: int | None = None) -> str:
    """The current CUDA device's name as a file name, or "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    return "".join(c if c.isalnum() else "_" for c in torch.cuda.get_device_name(device))


@lru_cache(maxsize=8)
def _device_table(device: int | None) -> dict[str, dict[str, dict[str, Any]]]:
    path = FOLDER / f"{device_key(device)}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@lru_cache(maxsize=4096)
def _lookup(op: str, bucket: str, device: int | None, default: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    config = dict(default)
    table = _device_table(device).get(op, {})
    for key, value in table.get(bucket, table.get("default", {})).items():
        if key not in config:
            raise ValueError(f"{op}: tuned configuration of bucket {bucket!r} sets {key!r}; allowed: {sorted(config)}")
        config[key] = value
    return config


def tuned_config(op: str, bucket: str, default: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration for ``op`` at ``bucket`` on the current device.

    Entries of ``default`` are replaced by those of the device's file for this bucket, or for its bucket "default".
    ``default`` must be hashable value by value and name every key that a file may set.
    """
    if _overrides and (op, bucket) in _overrides:
        return {**default, **_overrides[op, bucket]}
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    return _lookup(op, bucket, device, tuple(default.items()))


@contextmanager
def override(op: str, bucket: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Runs ``op`` at ``bucket`` with ``config`` inside the block; for tuning and for tests that sweep
    configurations."""
    before = _overrides.get((op, bucket))
    _overrides[op, bucket] = dict(config)
    try:
        yield
    finally:
        if before is None:
            del _overrides[op, bucket]
        else:
            _overrides[op, bucket] = before


def write_tuned(op: str, bucket: str, config: Mapping[str, Any]) -> Path:
    """Stores ``config`` in the current device's file, atomically; returns its path."""
    path = FOLDER / f"{device_key()}.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    table.setdefault(op, {})[bucket] = dict(config)
    FOLDER.mkdir(exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=FOLDER, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        json.dump(table, file, indent=1, sort_keys=True)
        file.write("\n")
    os.replace(temporary, path)
    _device_table.cache_clear()
    _lookup.cache_clear()
    return path
