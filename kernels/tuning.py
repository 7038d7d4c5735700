"""Launch configurations measured on a device: ``tuned/DEVICE.json`` maps op and shape bucket to tiles, warps and
stages, and "device" to its name and compute capability.

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
_found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
_pretended: list[str] = []


def device_key(device: int | None = None) -> str:
    """The current CUDA device's name as a file name, or "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    return "".join(c if c.isalnum() else "_" for c in torch.cuda.get_device_name(device))


def _current_device() -> int | str | None:
    if _pretended:
        return _pretended[-1]
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


@lru_cache(maxsize=8)
def _device_table(device: int | str | None) -> dict[str, dict[str, dict[str, Any]]]:
    path = FOLDER / f"{device if isinstance(device, str) else device_key(device)}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _lookup(op: str, bucket: str, device: int | str | None, default: Mapping[str, Any]) -> Mapping[str, Any]:
    config = dict(default)
    table = _device_table(device).get(op, {})
    for key, value in table.get(bucket, table.get("default", {})).items():
        if key not in config:
            raise ValueError(f"{op}: tuned configuration of bucket {bucket!r} sets {key!r}; allowed: {sorted(config)}")
        config[key] = value
    return config


def tuned_config(op: str, bucket: str, default: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration for ``op`` at ``bucket`` on the current device; not to be changed by the caller.

    Entries of ``default`` are replaced by those of the device's file for this bucket, or for its bucket "default".
    ``default`` names every key that a file may set; its values are hashable.
    """
    if _overrides and (op, bucket) in _overrides:
        return {**default, **_overrides[op, bucket]}
    key = (op, bucket, _current_device(), tuple(default.items()))
    found = _found.get(key)
    if found is None:
        found = _found[key] = _lookup(op, bucket, key[2], default)
    return found


@contextmanager
def as_device(key: str) -> Iterator[None]:
    """Answers lookups inside the block from ``tuned/KEY.json``: what is shipped for a device that need not be here."""
    _pretended.append(key)
    try:
        yield
    finally:
        _pretended.pop()


def shipped_devices(capability: int) -> list[str]:
    """Keys of the devices of this compute capability (80, 90, …) that a file is shipped for."""
    files = sorted(FOLDER.glob("*.json"))
    return [f.stem for f in files if json.loads(f.read_text()).get("device", {}).get("capability") == capability]


def forget() -> None:
    """Makes the next lookups read the files again."""
    _found.clear()
    _device_table.cache_clear()


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
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        table["device"] = {"name": torch.cuda.get_device_name(), "capability": 10 * major + minor}
    FOLDER.mkdir(exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=FOLDER, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        json.dump(table, file, indent=1, sort_keys=True)
        file.write("\n")
    os.replace(temporary, path)
    forget()
    return path
