"""The KV cache's tensors, and how many pages of it the machine has room for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import torch

from specialize.errors import InputError

from .config import ModelConfig
from .scheduler import EngineConfig

# Unless told otherwise a CPU run takes at most this much for its cache: other programs live on the machine, too.
CPU_CACHE_BYTES = 4 << 30


class KVCache:
    """Keys and values of all layers, [P,S,K,D] each, with S tokens in each of P pages."""

    def __init__(
        self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
        self._layers = [
            (_zeros(shape, dtype, torch.device(device)), _zeros(shape, dtype, torch.device(device)))
            for _ in range(config.num_layers)
        ]

    def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layers[layer_id]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy's zeros are the kernel's own, untouched pages: a pool that is never filled costs no memory.
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return 2 * config.num_layers * page_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def available_memory_bytes(device: torch.device | str) -> int:
    """What can still be allocated on the device; on a CPU within the container's limit."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = int(Path(limit_file).read_text()), int(Path(usage_file).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
        available = min(available, max(limit - usage, 0))
    return available


def workspace_bytes(config: ModelConfig, max_batch_tokens: int, max_sequences: int, dtype: torch.dtype) -> int:
    """A generous guess at the activations of one step: the widest layer's inputs and outputs, and logits in fp32."""
    widths = 4 * config.hidden_size + 2 * config.qkv_size + 4 * config.intermediate_size
    return max_batch_tokens * widths * dtype.itemsize + 4 * max_sequences * config.vocab_size * 4


def plan_pages(
    config: ModelConfig,
    engine: EngineConfig,
    *,
    max_batch_tokens: int,
    max_sequences: int,
    max_context: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> int:
    """How many pages to make, the weights being loaded. Raises InputError where not one page fits.

    Never more than ``max_sequences`` sequences of ``max_context`` could fill.
    """
    if engine.num_pages is not None:
        return engine.num_pages
    size = page_bytes(config, engine.page_size, dtype)
    pages_of_context = -(-max_context // engine.page_size)
    available = available_memory_bytes(device)
    workspace = workspace_bytes(config, max_batch_tokens, max_sequences, dtype)
    if engine.memory_bytes is not None:
        budget = engine.memory_bytes
        if budget + workspace > available:
            raise InputError(
                f"a KV cache of {budget / 2**30:.2f} GiB is asked for; beside the activations "
                f"{max(available - workspace, 0) / 2**30:.2f} GiB are free"
            )
    elif torch.device(device).type == "cuda":
        budget = int(0.92 * available) - workspace
    else:
        budget = min(available // 2 - workspace, max(CPU_CACHE_BYTES, pages_of_context * size))
    num_pages = min(budget // size, max_sequences * pages_of_context)
    if num_pages < 1:
        raise InputError(
            f"no room for the KV cache: a page of {engine.page_size} tokens takes {size / 2**20:.1f} MiB, "
            f"{max(budget, 0) / 2**20:.1f} MiB are left beside the weights; use a smaller model or dtype"
        )
    return num_pages
