"""Everything that the first step would otherwise wait for: kernels compiled, libraries loaded, weights packed."""

from __future__ import annotations

import numpy as np
import torch

from ..kernels.sampling import sample
from .batch import Batch, upload
from .cache import KVCache
from .model import Model

# Compilers specialise integer arguments by whether they are 1 and whether 16 divides them.
_SHAPES = ((1, 0), (16, 0), (17, 0), (0, 16), (0, 33), (2, 15))


@torch.inference_mode()
def warm_up(model: Model, cache: KVCache, max_batch_tokens: int, max_sequences: int) -> None:
    """Runs small steps of each kind, decodes and chunks, which write nothing to the cache."""
    on_gpu = model.device.type == "cuda"
    shapes = [*_SHAPES, (0, max_batch_tokens)] if on_gpu else [(1, 0), (1, 2)]
    for num_decodes, chunk in shapes:
        chunk = min(chunk, max_batch_tokens - num_decodes, cache.num_pages * cache.page_size, model.config.max_context)
        if num_decodes > max_sequences or num_decodes + max(chunk, 0) == 0:
            continue
        batch = _untraced_batch(num_decodes, max(chunk, 0), model.device, cache.page_size)
        hidden = model.forward(batch, cache)
        logits = model.logits(hidden[batch.query_starts[1:].long() - 1])
        for temperature in (0.0, 1.0):
            _sample(model, logits, temperature)
    if on_gpu:
        torch.cuda.synchronize(model.device)


def _sample(model: Model, logits: torch.Tensor, temperature: float) -> None:
    count = logits.shape[0]
    settings = upload(
        {
            "keys": np.zeros(count, np.int64),
            "steps": np.zeros(count, np.int64),
            "temperature": np.full(count, temperature, np.float32),
            "top_k": np.zeros(count, np.int32),
            "top_p": np.full(count, 0.9, np.float32),
            "min_p": np.zeros(count, np.float32),
        },
        model.device,
    )
    sample(logits, **settings, backend=model.backend)


def _untraced_batch(num_decodes: int, chunk: int, device: torch.device, page_size: int) -> Batch:
    """Sequences of a token each and one longer chunk; their slots are skipped."""
    lens = np.asarray([1] * num_decodes + [chunk] * (chunk > 0), np.int32)
    starts = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=starts[1:])
    total, longest = int(starts[-1]), int(lens.max())
    arrays = {
        "token_ids": np.zeros(total, np.int64),
        "positions": np.zeros(total, np.int64),
        "slots": np.full(total, -1, np.int64),
        "query_starts": starts,
        "context_lens": lens,
        "page_table": np.zeros((len(lens), -(-longest // page_size)), np.int32),
    }
    tensors = upload(arrays, device)
    return Batch(
        token_ids=tensors["token_ids"],
        positions=tensors["positions"],
        query_starts=tensors["query_starts"],
        context_lens=tensors["context_lens"],
        max_query_len=longest,
        max_context_len=longest,
        num_decodes=num_decodes,
        slots=tensors["slots"],
        page_table=tensors["page_table"],
    )
