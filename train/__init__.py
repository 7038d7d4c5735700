"""Tuning: rows of token ids in, an adapter folder or a checkpoint out. `tune` is the whole job."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import StepReport, TrainConfig, TrainResult
    from .data import TrainExample, encode_examples
    from .loop import tune
    from .lora import TrainableLora

_HOMES = {
    "StepReport": "config",
    "TrainConfig": "config",
    "TrainExample": "data",
    "TrainResult": "config",
    "TrainableLora": "lora",
    "encode_examples": "data",
    "tune": "loop",
}
__all__ = ["StepReport", "TrainConfig", "TrainExample", "TrainResult", "TrainableLora", "encode_examples", "tune"]


def __getattr__(name: str) -> Any:
    """Names are loaded when they are first used: importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
