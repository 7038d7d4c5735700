"""The KV cache's tensors."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import torch

from .config import ModelConfig


class KVCache:
    """Keys and values of all layers, [P,S,K,D] each, with S tokens in each of P pages.

    8-bit pages have ``scales``: (k_scale, v_scale) f32 [K] of each layer, see kv_scales.py.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        scales: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
        self._layers = [
            (
                _zeros(shape, dtype, torch.device(device)),
                _zeros(shape, dtype, torch.device(device)),
                *(scales[layer_id] if scales is not None else ()),
            )
            for layer_id in range(config.num_layers)
        ]

    def layer(self, layer_id: int) -> tuple[torch.Tensor, ...]:
        """Keys, values, and with 8-bit pages the two scales."""
        return self._layers[layer_id]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # A mapping of its own: no memory before a page is written, whatever the heap looks like, and none after the cache.
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, num_bytes, **private), dtype=torch.uint8).view(dtype).view(shape)
