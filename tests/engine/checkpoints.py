"""Small checkpoints for tests: random transformers models saved to folders, ours saved to folders, GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from specialize.engine.config import ModelConfig
from specialize.engine.weights import RandomTensors

LLAMA = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MPT: dict[str, Any] = {
    "model_type": "mpt", "vocab_size": 97, "d_model": 48, "n_heads": 6, "n_layers": 2, "expansion_ratio": 4,
    "max_seq_len": 64, "no_bias": True, "eos_token_id": 0,
}  # fmt: skip


def save_transformers(kind: str, folder: Path, **options: Any) -> Any:
    """A random transformers model ("Llama", "Mpt", …) in eval mode, its weights far from zero, saved as safetensors."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**options)
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.1
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    model.save_pretrained(folder)
    return model


def save_folder(folder: Path, config: dict[str, Any], seed: int = 0, drop: tuple[str, ...] = (), **extra: Any) -> Path:
    """A folder with ``config`` and random tensors for it, less ``drop``, plus ``extra``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = RandomTensors(ModelConfig.from_dict(config, source="test"), seed, std=0.1)
    content = {name: tensor for name, tensor in tensors.items() if name not in drop}
    save_file({**content, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def llama_dict(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", **LLAMA, **changes}


def mpt_dict(**changes: Any) -> dict[str, Any]:
    """``attn`` holds changes of attn_config."""
    attn = {"alibi": True, "attn_impl": "torch", "clip_qkv": None, **changes.pop("attn", {})}
    return {**MPT, "attn_config": attn, **changes}
