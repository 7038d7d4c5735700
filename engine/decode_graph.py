"""CUDA graphs of decode steps: a step of one token per sequence is launched as a whole, not kernel by kernel.

A model of 30 layers takes some 300 launches a step, which cost the host more time than the device needs for the work.
A graph is recorded per bucket (sequences rounded up, longest context rounded up) when a bucket comes up again; rows
beyond the batch write nowhere (slot -1) and attend to one token.
"""

from __future__ import annotations

from typing import Any

import torch

from .batch import Batch
from .cache import KVCache
from .model import Model

RECORD_AT_USE = 3  # a bucket seen less often is not worth recording
MIN_CONTEXT = 1024
MAX_GRAPHS = 64


class _Graph:
    """A recorded step with the tensors that it reads and writes."""

    def __init__(self, model: Model, cache: KVCache, size: int, max_context: int, pool: Any) -> None:
        place: dict[str, Any] = {"device": model.device}
        self.token_ids = torch.zeros(size, dtype=torch.int64, **place)
        self.positions = torch.zeros(size, dtype=torch.int64, **place)
        self.slots = torch.full((size,), -1, dtype=torch.int64, **place)
        self.context_lens = torch.ones(size, dtype=torch.int32, **place)
        width = -(-max_context // cache.page_size)
        self.page_table = torch.zeros(size, width, dtype=torch.int32, **place)
        self._num_filled = 0
        batch = Batch(
            token_ids=self.token_ids,
            positions=self.positions,
            query_starts=torch.arange(size + 1, dtype=torch.int32, **place),
            context_lens=self.context_lens,
            max_query_len=1,
            max_context_len=max_context,
            num_decodes=size,
            slots=self.slots,
            page_table=self.page_table,
        )
        # Compiles kernels and fills caches of libraries, neither of which may happen while recording.
        stream = torch.cuda.Stream(model.device)
        stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                model.logits(model.forward(batch, cache))
        torch.cuda.current_stream(model.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.logits = model.logits(model.forward(batch, cache))

    @property
    def pool(self) -> Any:
        return self._graph.pool()

    def run(self, batch: Batch) -> torch.Tensor:
        assert batch.slots is not None and batch.page_table is not None
        count = batch.num_sequences
        self.token_ids[:count].copy_(batch.token_ids)
        self.positions[:count].copy_(batch.positions)
        self.slots[:count].copy_(batch.slots)
        self.context_lens[:count].copy_(batch.context_lens)
        self.page_table[:count, : batch.page_table.shape[1]].copy_(batch.page_table)
        if count < self._num_filled:  # rows of an earlier, larger batch
            self.slots[count : self._num_filled].fill_(-1)
            self.positions[count : self._num_filled].zero_()
            self.context_lens[count : self._num_filled].fill_(1)
        self._num_filled = count
        self._graph.replay()
        return self.logits[:count]


class DecodeGraphs:
    """The graphs of one model over one cache. ``logits`` gives None for what is no recorded decode step."""

    def __init__(self, model: Model, cache: KVCache, max_context: int) -> None:
        self._model, self._cache, self._max_context = model, cache, max_context
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._uses: dict[tuple[int, int], int] = {}
        self._off = model.device.type != "cuda"

    def logits(self, batch: Batch) -> torch.Tensor | None:
        """Logits [B, V] of decodes by the base model, valid until the next call; None: run the batch the usual way."""
        count = batch.num_sequences
        if self._off or batch.num_decodes != count or batch.adapter_index is not None or not count:
            return None
        key = (bucket_size(count), bucket_context(batch.max_context_len, self._max_context))
        graph = self._graphs.get(key)
        if graph is None:
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._uses[key] < RECORD_AT_USE or len(self._graphs) >= MAX_GRAPHS:
                return None
            graph = self._record(key)
            if graph is None:
                return None
        return graph.run(batch)

    def drop(self) -> None:
        """Gives the graphs' memory back and records no more."""
        self._graphs.clear()
        self._off = True

    def _record(self, key: tuple[int, int]) -> _Graph | None:
        pool = next(iter(self._graphs.values())).pool if self._graphs else None
        try:
            self._graphs[key] = _Graph(self._model, self._cache, *key, pool)
        except torch.cuda.OutOfMemoryError:
            self.drop()  # the plan left no room for graphs; steps go on kernel by kernel
            torch.cuda.empty_cache()
            return None
        return self._graphs[key]


def bucket_size(count: int) -> int:
    """The number of rows that a batch of ``count`` is padded to: steps of about an eighth."""
    if count <= 4:
        return count
    step = 4 if count <= 32 else 8 if count <= 64 else 16 if count <= 128 else 32
    return -(-count // step) * step


def bucket_context(longest: int, max_context: int) -> int:
    """The context length that kernels are launched for: a power of two, at most what the cache can hold."""
    bucket = MIN_CONTEXT
    while bucket < longest:
        bucket *= 2
    return min(bucket, max_context)
