"""Shapes of well-known models by name, so that they can be planned for and measured without their weights."""

from __future__ import annotations

from .config import ModelConfig, RopeScaling

_MPT = {"norm": "layernorm", "position": "alibi", "mlp": "gelu", "fused_qkv_checkpoint": True, "tied_embeddings": True}

SHAPES: dict[str, ModelConfig] = {
    "smollm2-135m": ModelConfig(
        "llama", 49152, 576, 1536, 30, 9, 3, max_context=8192, rope_theta=100000.0, tied_embeddings=True
    ),
    "llama-3.1-8b": ModelConfig(
        "llama", 128256, 4096, 14336, 32, 32, 8, max_context=131072, rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", factor=8.0, original_max_context=8192),
    ),
    "mpt-7b": ModelConfig("mpt", 50432, 4096, 16384, 32, 32, max_context=2048, **_MPT),
    "mpt-30b": ModelConfig("mpt", 50432, 7168, 28672, 48, 64, max_context=8192, **_MPT),
}  # fmt: skip
