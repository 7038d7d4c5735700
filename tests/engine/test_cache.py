from __future__ import annotations

import torch
from specialize.engine.cache import KVCache
from specialize.engine.config import ModelConfig

CONFIG = ModelConfig("llama", 97, 32, 48, 3, 4, num_kv_heads=2, max_context=1000)


def test_layers_have_the_pages_shape():
    tensors = KVCache(CONFIG, 5, 16, torch.bfloat16, "cpu")
    keys, values = tensors.layer(2)
    assert keys.shape == values.shape == (5, 16, 2, 8) and keys.dtype == torch.bfloat16
    assert not keys.any()
