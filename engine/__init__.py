"""The engine: a model, its tokenizer, and a generator with continuous batching. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .embedder import Embedder
    from .generator import Generator
    from .model import Model
    from .sampler import Completion, Request, SamplingParams
    from .scheduler import EngineConfig
    from .tokenizer import Tokenizer

_HOMES = {
    "Completion": "sampler",
    "Embedder": "embedder",
    "EngineConfig": "scheduler",
    "Generator": "generator",
    "Model": "model",
    "Request": "sampler",
    "SamplingParams": "sampler",
    "Tokenizer": "tokenizer",
}

__all__ = [
    "Completion",
    "Embedder",
    "EngineConfig",
    "Generator",
    "Model",
    "Request",
    "SamplingParams",
    "Tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
