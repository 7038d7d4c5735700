"""Tiny random models, theirs and ours with the same weights, and rows to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from specialize.engine.model import Model
from specialize.train.data import TrainExample

OPTIONS: dict[str, dict[str, Any]] = {
    "Llama": {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
    "Mpt": {"vocab_size": 97, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 128},
}  # fmt: skip


def tiny_pair(kind: str, folder: Path, **options: Any) -> tuple[Any, Model]:
    """(transformers model, our model), the same random weights, fp32."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**{**OPTIONS[kind], **options})
    theirs = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn_like(parameter) * 0.1
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    theirs.save_pretrained(folder)
    return theirs, Model.from_pretrained(folder)


def rows(count: int, seed: int = 0, longest: int = 20, vocab: int = 97) -> list[TrainExample]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, vocab, (length,), generator=generator).tolist()

    return [TrainExample(ids(1, longest), ids(1, 9), name=f"r{i}") for i in range(count)]
