"""What a step has to compute, and what the device can: the two sides of its utilisation."""

from __future__ import annotations

import functools
import time

import torch

from ..engine.config import ModelConfig
from ..engine.layout import layer_linears

# Operations a second of a large bf16 product (fp16 on a T4). Measured on the H100 (bench/results), where it is 0.76 of
# the vendor's dense figure; of the others that share of theirs.
CARD_RATES = {
    "t4": 49e12, "l4": 92e12, "a10g": 53e12, "rtx-3090": 54e12, "rtx-4090": 125e12, "l40s": 275e12, "a100-40gb": 237e12,
    "a100-80gb": 237e12, "h100-80gb": 755e12, "h200": 755e12, "b200": 1710e12,
}  # fmt: skip


def step_operations(config: ModelConfig, tokens: int, response_tokens: int, *, trains_weights: bool = False) -> float:
    """Multiplications and additions of the frozen matrices, forward and backward: 4 a parameter and token, 6 where the
    weights have gradients; the output projection counts at response tokens alone. Attention is left out."""
    blocks = sum(f.in_features * f.out_features for i in range(config.num_layers) for f in layer_linears(config, i))
    head = config.vocab_size * config.hidden_size
    return (6.0 if trains_weights else 4.0) * (blocks * tokens + head * response_tokens)


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large square product, measured once a process."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
