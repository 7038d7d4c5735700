from __future__ import annotations

import pytest
import torch
from specialize.engine import cache
from specialize.engine.cache import KVCache, page_bytes, plan_pages
from specialize.engine.config import ModelConfig
from specialize.engine.scheduler import EngineConfig

from specialize.errors import InputError

CONFIG = ModelConfig("llama", 97, 32, 48, 3, 4, num_kv_heads=2, max_context=1000)


def plan(engine: EngineConfig, **changes) -> int:
    settings = {
        "max_batch_tokens": 64, "max_sequences": 4, "max_context": 1000, "dtype": torch.float32, "device": "cpu",
        **changes,
    }  # fmt: skip
    return plan_pages(CONFIG, engine, **settings)


def test_layers_have_the_pages_shape():
    tensors = KVCache(CONFIG, 5, 16, torch.bfloat16, "cpu")
    keys, values = tensors.layer(2)
    assert keys.shape == values.shape == (5, 16, 2, 8) and keys.dtype == torch.bfloat16
    assert not keys.any()


def test_pages_fill_the_memory_given_and_no_more_than_can_be_used():
    size = page_bytes(CONFIG, 16, torch.float32)
    assert size == 2 * 3 * 16 * 2 * 8 * 4
    assert plan(EngineConfig(memory_bytes=10 * size + 5)) == 10
    assert plan(EngineConfig()) == 4 * 63
    assert plan(EngineConfig(num_pages=7, memory_bytes=size)) == 7


def test_too_little_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(cache, "available_memory_bytes", lambda device: 1 << 19)
    with pytest.raises(InputError, match=r"no room for the KV cache: a page of 16 tokens takes 0\.0 MiB"):
        plan(EngineConfig(), max_batch_tokens=4096)
    with pytest.raises(InputError, match=r"a KV cache of 1\.00 GiB is asked for"):
        plan(EngineConfig(memory_bytes=1 << 30))


def test_a_containers_limit_counts(monkeypatch):
    def read(self):
        return {"memory.max": "5000000", "memory.current": "1000000"}.get(self.name, "max")

    monkeypatch.setattr(cache.Path, "read_text", read)
    assert cache.available_memory_bytes("cpu") == 4000000
