"""The floor of a generation run: what must be computed, or what must be moved, at the rate the device has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from ..engine.config import ModelConfig
from ..engine.layout import layer_linears


@dataclass(frozen=True)
class Ceilings:
    """What the machine does: operations and bytes a second."""

    operations_per_s: float
    bytes_per_s: float


def measure_cpu(dtype: torch.dtype) -> Ceilings:
    """One large product in ``dtype``, and a copy far beyond the caches (bytes read plus bytes written)."""
    n = 2048
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    source = torch.ones(128 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)

    def best(run: Any) -> float:
        times = []
        for _ in range(24):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return min(times)

    return Ceilings(2 * n**3 / best(lambda: torch.mm(a, b)), 2 * source.numel() / best(lambda: target.copy_(source)))


def generation_floor(
    config: ModelConfig,
    prompt_lengths: Sequence[int],
    new_tokens: int,
    ceilings: Ceilings,
    *,
    bytes_per_weight: float,
    bytes_per_cache_value: float = 2.0,
    batch: int | None = None,
    cached_tokens: int = 0,
) -> dict[str, float]:
    """Seconds below which the prompts with ``new_tokens`` each cannot end, and what they are made of.

    Operations: two a weight of the blocks and token computed (the last new token is never fed back), two a weight of
    the output projection and new token, four a query, key and head dimension of causal attention. Bytes: all weights
    once a decode step, and each step's keys and values; the prompts' own traffic is left out. ``batch``: sequences at
    a time. ``cached_tokens`` of the prompts are not computed; what they would attend to is counted all the same.
    """
    blocks = sum(f.in_features * f.out_features for i in range(config.num_layers) for f in layer_linears(config, i))
    head = config.vocab_size * config.hidden_size
    prompts, count = sum(prompt_lengths), len(prompt_lengths)
    computed = prompts - cached_tokens + count * (new_tokens - 1)
    pairs = sum((length + new_tokens - 1) * (length + new_tokens) / 2 for length in prompt_lengths)
    operations = 2 * blocks * computed + 2 * head * count * new_tokens
    operations += 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    steps = -(-count // (batch or count)) * (new_tokens - 1)
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * bytes_per_cache_value
    read = sum((new_tokens - 1) * (length + new_tokens / 2) for length in prompt_lengths)
    moved = steps * (blocks + head) * bytes_per_weight + read * cache
    compute_s, move_s = operations / ceilings.operations_per_s, moved / ceilings.bytes_per_s
    seconds = max(compute_s, move_s)
    return {
        "operations": operations, "bytes": moved, "compute_s": compute_s, "move_s": move_s, "seconds": seconds,
        "tokens_per_s": count * new_tokens / seconds, **asdict(ceilings),
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile (linear between the nearest ranks)."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {"median": median(ordered), "p20": at(0.2), "p80": at(0.8)}
