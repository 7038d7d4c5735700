"""CUDA graphs of decode steps: a step of one token per sequence is launched as a whole, not kernel by kernel.

A model of 30 layers takes some 300 launches a step, which cost the host more time than the device needs for the work.
A graph is recorded per bucket (sequences, longest context, longest shared prefix, each rounded up) and choice of
adapters, ahead of use or when a bucket comes up again; until then a larger one serves. Rows beyond the batch write
nowhere (slot -1) and attend to one token. It draws the tokens, too, unless that needs more than a row's settings. All
that it reads comes in one copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from ..kernels.sampling import sample
from .batch import DRAW_SETTINGS, Batch, Layout, decode_step, pack_draws, prefix_arrays
from .cache import KVCache
from .model import LayerAdapters, Model
from .rows import DecodeSet, Rows, StepPlan

RECORD_AT_USE = 3  # a bucket seen less often is not worth recording
RECORD_BESIDE_AT_USE = 32  # where a larger one serves, which takes a little more of the device's time,
MAX_TIMES_LARGER = 4  # or much more, where many rows more bring other products than few
MIN_CONTEXT = 1024
MAX_GRAPHS = 64
_Key = tuple[int, int, int, LayerAdapters | None, bool]  # sequences, context, shared prefix, adapters, draws


class _Staging:
    """One host copy of a graph's inputs, pinned where that speeds the way to the device up.

    It keeps what was written last: while the same sequences decode, a step changes their newest tokens' entries alone.
    """

    def __init__(self, layout: Layout, padding: Mapping[str, np.ndarray], *, pinned: bool) -> None:
        self._buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._views, self._padding = layout.arrays(self._buffer.numpy()), padding
        self._set_name: object = None
        self._at = np.empty(0, np.int64)
        self._sent: torch.cuda.Event | None = None

    def write(self, plan: StepPlan, rows: Rows) -> np.ndarray:
        if self._sent is not None:
            self._sent.synchronize()  # it was sent two steps ago
        views, decodes, step = self._views, plan.decode_set, decode_step(plan, rows)
        at, pages = step["positions"], step.pop("pages")
        # No two pages of a sequence are new to a table that is at most a page's tokens old.
        if self._set_name is not decodes.name or int((at - self._at).max()) > rows.page_size:
            self._write_set(decodes, rows)
        views["page_table"][np.arange(len(at)), at // rows.page_size] = pages
        for name, values in step.items():
            views[name][: len(values)] = values
        self._set_name, self._at = decodes.name, at
        return step["token_ids"]

    def send(self, buffer: torch.Tensor) -> None:
        buffer.copy_(self._buffer, non_blocking=True)
        if buffer.is_cuda:
            self._sent = self._sent or torch.cuda.Event()
            self._sent.record()

    def _write_set(self, decodes: DecodeSet, rows: Rows) -> None:
        arrays = {
            "rows": decodes.token_rows, "adapter_index": decodes.adapter_ids, **decodes.settings.arrays,
            **prefix_arrays(decodes, rows.page_size),
        }  # fmt: skip
        for name, view in self._views.items():
            count = 0
            if name == "page_table":
                count = len(decodes.table_rows)
                view[:count] = rows.page_table[decodes.table_rows, : view.shape[1]]
            elif name in arrays:
                count = len(arrays[name])
                view[:count] = arrays[name]
            view[count:] = self._padding[name][count:]
        self._views["rows"][len(decodes.token_rows) :] = rows.nobody


class DecodeGraph:
    """A recorded step with the tensors that it reads and writes."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        size: int,
        max_context: int,
        max_prefix: int,
        adapters: LayerAdapters | None,
        draws: bool,
        pool: Any,
    ) -> None:
        """``draws``: whether the graph ends with the tokens, or with the logits."""
        self.draws = draws
        padding = _padding(size, -(-max_context // cache.page_size), max_prefix > 0)
        layout, on_gpu = Layout(padding), model.device.type == "cuda"
        self._buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=model.device)
        self._stagings = [_Staging(layout, padding, pinned=on_gpu) for _ in range(2)]
        self.inputs = inputs = layout.tensors(self._buffer)
        for name, values in padding.items():
            inputs[name].copy_(torch.from_numpy(values))
        batch = Batch(
            token_ids=inputs["token_ids"],
            positions=inputs["positions"],
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=model.device),
            context_lens=inputs["context_lens"],
            max_query_len=1,
            max_context_len=max_context,
            num_decodes=size,
            slots=inputs["slots"],
            page_table=inputs["page_table"],
            adapter_index=None if adapters is None else inputs["adapter_index"],
            prefix_groups=inputs.get("prefix_groups"),
            prefix_lens=inputs.get("prefix_lens"),
            max_prefix_len=max_prefix,
        )

        def step() -> tuple[torch.Tensor, ...]:
            logits = model.logits(model.forward(batch, cache, adapters))
            if not draws:
                return (logits,)
            settings = {name: inputs[name] for name in DRAW_SETTINGS}
            token_ids, logprobs = sample(logits, **settings, backend=model.backend)
            return logits, token_ids, pack_draws(token_ids, logprobs)

        self._graph, self.out = record(step, model, pool)

    @property
    def pool(self) -> Any:
        return self._graph.pool()

    def fill(self, plan: StepPlan, rows: Rows) -> np.ndarray:
        """Sends the step's inputs. Returns the token ids among them i64 [B], as far as the host knows them."""
        staging = self._stagings[0]
        self._stagings.reverse()
        token_ids = staging.write(plan, rows)
        staging.send(self._buffer)
        return token_ids

    def replay(self) -> tuple[torch.Tensor, ...]:
        """Logits [B, V], and where the graph draws, token ids i64 [B] and `pack_draws` of them, all padded and valid
        until the next call."""
        self._graph.replay()
        return self.out


def _padding(size: int, table_width: int, has_prefixes: bool) -> dict[str, np.ndarray]:
    """Inputs of rows beyond the batch."""
    padding = {
        "rows": np.zeros(size, np.int64),
        "token_ids": np.zeros(size, np.int64),
        "positions": np.zeros(size, np.int64),
        "slots": np.full(size, -1, np.int64),
        "context_lens": np.ones(size, np.int32),
        "page_table": np.zeros((size, table_width), np.int32),
        "adapter_index": np.full(size, -1, np.int32),
        "keys": np.zeros(size, np.int64),
        "steps": np.zeros(size, np.int64),
        "temperature": np.zeros(size, np.float32),
        "top_k": np.zeros(size, np.int32),
        "top_p": np.ones(size, np.float32),
        "min_p": np.zeros(size, np.float32),
        "repetition_penalty": np.ones(size, np.float32),
    }
    if has_prefixes:  # one group of all rows beyond, then empty ones
        padding["prefix_groups"] = np.full(size + 1, size, np.int32)
        padding["prefix_groups"][0] = 0
        padding["prefix_lens"] = np.zeros(size, np.int32)
    return padding


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: the library of products keeps a workspace of 32 MiB for each stream it ever ran on."""
    return torch.cuda.Stream(device)


def record(
    step: Callable[[], tuple[torch.Tensor, ...]], model: Model, pool: Any
) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """A CUDA graph of the step, and the tensors that it leaves its results in."""
    # Compiles kernels and fills caches of libraries, neither of which may happen while recording.
    stream = _side_stream(model.device)
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
    """The graphs of one model over one cache. ``seconds`` is all time spent in recording."""

    def __init__(self, model: Model, cache: KVCache, max_context: int) -> None:
        self._model, self._cache, self._max_context = model, cache, max_context
        self._graphs: dict[_Key, DecodeGraph] = {}
        self._uses: dict[_Key, int] = {}
        self._off = model.device.type != "cuda" or model.backend == "torch"  # whose ops wait for the device
        self.seconds = 0.0

    @torch.inference_mode()
    def find(
        self,
        num_sequences: int,
        max_context_len: int,
        max_prefix_len: int,
        adapters: LayerAdapters | None,
        *,
        draws: bool,
    ) -> DecodeGraph | None:
        """The graph for a step of so many decodes; None: run it the usual way."""
        if self._off or not num_sequences:
            return None
        context = bucket_context(max_context_len, self._max_context)
        prefix = min(bucket_prefix(max_prefix_len), context - 1)
        key = (bucket_size(num_sequences), context, prefix, adapters, draws)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._larger(key)
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._uses[key] >= (RECORD_AT_USE if graph is None else RECORD_BESIDE_AT_USE):
                graph = self._record(key) or graph
        return None if self._off else graph

    def _larger(self, key: _Key) -> DecodeGraph | None:
        """The smallest recorded one that holds what ``key`` asks for."""
        found = [other for other in self._graphs if _serves(other, key)]
        return self._graphs[min(found, key=lambda other: other[:3])] if found else None

    @torch.inference_mode()
    def record(self, num_sequences: int, max_context: int | None = None) -> None:
        """Records what a full batch of the base model needs until its contexts are that long."""
        longest = min(max_context or self._max_context, self._max_context)
        context = bucket_context(1, self._max_context)
        while not self._off:
            key = (bucket_size(num_sequences), context, 0, None, True)
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

    def _record(self, key: _Key) -> DecodeGraph | None:
        if len(self._graphs) >= MAX_GRAPHS:
            return None
        began = time.perf_counter()
        pool = next(iter(self._graphs.values())).pool if self._graphs else None
        try:
            self._graphs[key] = DecodeGraph(self._model, self._cache, *key, pool)
        except torch.cuda.OutOfMemoryError:
            self.drop()  # the plan left no room for graphs; steps go on kernel by kernel
            torch.cuda.empty_cache()
            return None
        finally:
            self.seconds += time.perf_counter() - began
        return self._graphs[key]


def _serves(other: _Key, key: _Key) -> bool:
    """Whether a graph of the one bucket does for the other."""
    return (
        key[0] <= other[0] <= MAX_TIMES_LARGER * key[0]
        and key[1] <= other[1]
        and key[2] <= other[2]
        and bool(key[2]) == bool(other[2])  # a graph either reads prefix groups or does not
        and key[3] is other[3]
        and key[4] <= other[4]  # one that draws has the logits, too
    )


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
