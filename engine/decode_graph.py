"""CUDA graphs of decode steps: a step of one token per sequence is launched as a whole, not kernel by kernel.

A model of 30 layers takes some 300 launches a step, which cost the host more time than the device needs for the work.
A graph is recorded per bucket (sequences, longest context, longest shared prefix, each rounded up) and choice of
adapters, ahead of use or when a bucket comes up again; rows beyond the batch write nowhere (slot -1) and attend to one
token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .batch import Batch
from .cache import KVCache
from .model import LayerAdapters, Model

RECORD_AT_USE = 3  # a bucket seen less often is not worth recording
MIN_CONTEXT = 1024
MAX_GRAPHS = 64
_Key = tuple[int, int, int, LayerAdapters | None]  # sequences, context, shared prefix, adapters


class _Graph:
    """A recorded step with the tensors that it reads and writes."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        size: int,
        max_context: int,
        max_prefix: int,
        adapters: LayerAdapters | None,
        pool: Any,
    ) -> None:
        place: dict[str, Any] = {"device": model.device}
        self.token_ids = torch.zeros(size, dtype=torch.int64, **place)
        self.positions = torch.zeros(size, dtype=torch.int64, **place)
        self.slots = torch.full((size,), -1, dtype=torch.int64, **place)
        self.context_lens = torch.ones(size, dtype=torch.int32, **place)
        width = -(-max_context // cache.page_size)
        self.page_table = torch.zeros(size, width, dtype=torch.int32, **place)
        self.adapter_index = None if adapters is None else torch.full((size,), -1, dtype=torch.int32, **place)
        self.prefix_groups = torch.full((size + 1,), size, dtype=torch.int32, **place) if max_prefix else None
        self.prefix_lens = torch.zeros(size, dtype=torch.int32, **place) if max_prefix else None
        if self.prefix_groups is not None:
            self.prefix_groups[0] = 0
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
            adapter_index=self.adapter_index,
            prefix_groups=self.prefix_groups,
            prefix_lens=self.prefix_lens,
            max_prefix_len=max_prefix,
        )
        self._graph, self.logits = record(lambda: model.logits(model.forward(batch, cache, adapters)), model, pool)

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
        if self.adapter_index is not None and batch.adapter_index is not None:
            self.adapter_index[:count].copy_(batch.adapter_index)
        if self.prefix_groups is not None and self.prefix_lens is not None:
            assert batch.prefix_groups is not None and batch.prefix_lens is not None
            num_starts = len(batch.prefix_groups)
            self.prefix_groups[:num_starts].copy_(batch.prefix_groups)
            self.prefix_groups[num_starts:].fill_(len(self.prefix_lens))  # one group of all padding, then empty ones
            self.prefix_lens[:count].copy_(batch.prefix_lens)
            self.prefix_lens[count:].zero_()
        if count < self._num_filled:  # rows of an earlier, larger batch
            self.slots[count : self._num_filled].fill_(-1)
            self.positions[count : self._num_filled].zero_()
            self.context_lens[count : self._num_filled].fill_(1)
            if self.adapter_index is not None:
                self.adapter_index[count : self._num_filled].fill_(-1)
        self._num_filled = count
        self._graph.replay()
        return self.logits[:count]


def record(step: Callable[[], torch.Tensor], model: Model, pool: Any) -> tuple[Any, torch.Tensor]:
    """A CUDA graph of the step, and the tensor that it leaves its result in."""
    # Compiles kernels and fills caches of libraries, neither of which may happen while recording.
    stream = torch.cuda.Stream(model.device)
    stream.wait_stream(torch.cuda.current_stream(model.device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream(model.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = step()
    return graph, out


class DecodeGraphs:
    """The graphs of one model over one cache. ``logits`` gives None for what is no recorded decode step. ``seconds``
    is all time spent in recording."""

    def __init__(self, model: Model, cache: KVCache, max_context: int) -> None:
        self._model, self._cache, self._max_context = model, cache, max_context
        self._graphs: dict[_Key, _Graph] = {}
        self._uses: dict[_Key, int] = {}
        self._off = model.device.type != "cuda" or model.backend == "torch"  # whose ops wait for the device
        self.seconds = 0.0

    @torch.inference_mode()
    def logits(self, batch: Batch, adapters: LayerAdapters | None) -> torch.Tensor | None:
        """Logits [B, V] of decodes, valid until the next call; None: run the batch the usual way."""
        count = batch.num_sequences
        if self._off or batch.num_decodes != count or not count:
            return None
        context = bucket_context(batch.max_context_len, self._max_context)
        prefix = min(bucket_prefix(batch.max_prefix_len), context - 1)
        key = (bucket_size(count), context, prefix, adapters)
        graph = self._graphs.get(key)
        if graph is None:
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._uses[key] < RECORD_AT_USE:
                return None
            graph = self._record(key)
            if graph is None:
                return None
        return graph.run(batch)

    @torch.inference_mode()
    def record(self, num_sequences: int, max_context: int | None = None) -> None:
        """Records what a full batch of the base model needs until its contexts are that long."""
        longest = min(max_context or self._max_context, self._max_context)
        context = bucket_context(1, self._max_context)
        while not self._off:
            key = (bucket_size(num_sequences), context, 0, None)
            if key not in self._graphs:
                self._record(key)
            if context >= longest:
                break
            context = bucket_context(context + 1, self._max_context)

    def forget(self) -> None:
        """Before adapters change: graphs read their tensors where they lie."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[3] is None}
        self._uses.clear()

    def drop(self) -> None:
        """Gives the graphs' memory back and records no more."""
        self._graphs.clear()
        self._off = True

    def _record(self, key: _Key) -> _Graph | None:
        if len(self._graphs) >= MAX_GRAPHS:
            return None
        began = time.perf_counter()
        pool = next(iter(self._graphs.values())).pool if self._graphs else None
        try:
            self._graphs[key] = _Graph(self._model, self._cache, *key, pool)
        except torch.cuda.OutOfMemoryError:
            self.drop()  # the plan left no room for graphs; steps go on kernel by kernel
            torch.cuda.empty_cache()
            return None
        finally:
            self.seconds += time.perf_counter() - began
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


def bucket_prefix(longest: int) -> int:
    """The shared prefix that kernels are launched for: a power of two, or 0 for none."""
    return 1 << (longest - 1).bit_length() if longest else 0
