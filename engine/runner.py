"""Runs planned steps on the device: batch → forward → sample. Nothing here waits for the device but `Draws.read`.

Drawn tokens stay on the device for the next step's input and come to the host by a copy that overlaps it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ..kernels.sampling import contrast, sample
from .adapter import AdapterPool
from .batch import DRAW_SETTINGS, Batch, build_step, contrast_arrays, pack_draws, unpack_draws, upload
from .cache import KVCache
from .decode_graph import DecodeGraph, DecodeGraphs
from .model import LayerAdapters, Model
from .rows import UNKNOWN, Rows, StepPlan
from .spans import Span

Alternatives = Mapping[int, list[tuple[int, float]]]


@dataclass
class Draws:
    """The tokens of one step on their way to the host. ``wanted`` maps draws that report alternatives to how many."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    wanted: dict[int, int] = field(default_factory=dict)
    arrived: torch.cuda.Event | None = None

    def read(self) -> tuple[np.ndarray, np.ndarray, Alternatives]:
        """Ids, log-probabilities, and per draw that wants them the most likely tokens with theirs."""
        if self.arrived is not None:
            self.arrived.synchronize()
        alternatives = {}
        if self.top_ids is not None and self.top_logprobs is not None:
            pairs = zip(self.wanted.items(), self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
            for (draw, count), ids, values in pairs:
                pairs = zip(ids[:count], values[:count], strict=True)
                alternatives[draw] = [pair for pair in pairs if pair[1] > -math.inf]  # contrast rules some out
        return self.token_ids.numpy(), self.logprobs.numpy(), alternatives


class Runner:
    """What one stream of requests keeps on the device beside the cache: each row's newest token, and the tokens seen
    by rows with a repetition penalty."""

    def __init__(
        self, model: Model, cache: KVCache, pool: AdapterPool, graphs: DecodeGraphs, num_rows: int, span: Span
    ) -> None:
        self._model, self._cache, self._pool, self._graphs, self._span = model, cache, pool, graphs, span
        # One entry more for what decode graphs draw for nobody.
        self._newest = torch.zeros(num_rows + 1, dtype=torch.int64, device=model.device)
        self._seen: torch.Tensor | None = None

    @torch.inference_mode()
    def launch(self, plan: StepPlan, rows: Rows) -> Draws:
        """Starts a step. The steps before it must have been started by this runner, in order."""
        adapters = self._adapters(plan)
        graph = None if plan.chunks else self._graph(plan, rows, adapters)
        if graph is not None:
            return self._replay(graph, plan, rows)
        with self._span("build"):
            batch, settings = build_step(plan, rows, self._model.device)
            # Tokens that the host does not know yet, the step before having drawn those of all decodes.
            if UNKNOWN in rows.tokens[plan.decode_set.rows, plan.decode_at]:
                ids = batch.token_ids[: batch.num_decodes]
                torch.index_select(self._newest, 0, settings["decode_rows"], out=ids)
        with self._span("forward"):
            logits = self._logits(plan, batch, adapters, settings["last"])
        if logits is None:
            return Draws(torch.empty(0, dtype=torch.int64), torch.empty(0))
        with self._span("sample"):
            return self._draw(plan, rows, logits, settings)

    def _adapters(self, plan: StepPlan) -> LayerAdapters | None:
        used = set(plan.decode_set.adapters)
        for chunk in plan.chunks:
            used.add(chunk.sequence.adapter_id)
            if chunk.sequence.num_rows > 1:
                used.add(-1)
        return self._pool.select(list(used))

    def _graph(self, plan: StepPlan, rows: Rows, adapters: LayerAdapters | None) -> DecodeGraph | None:
        decodes = plan.decode_set
        longest = 0 if decodes.prefixes is None else decodes.prefixes.longest * rows.page_size
        return self._graphs.find(
            len(decodes.table_rows), int(plan.decode_at.max()) + 1, longest, adapters, draws=plan.draws_by_row
        )

    def _replay(self, graph: DecodeGraph, plan: StepPlan, rows: Rows) -> Draws:
        """A step of decodes alone."""
        num_draws, inputs = len(plan.sampled), graph.inputs
        with self._span("build"):
            if UNKNOWN in graph.fill(plan, rows):
                torch.index_select(self._newest, 0, inputs["rows"], out=inputs["token_ids"])
        with self._span("forward"):
            logits, *draws = graph.replay()
        with self._span("sample"):
            if plan.draws_by_row:
                token_ids, packed = draws
                self._newest.index_copy_(0, inputs["rows"], token_ids)
                return self._to_host(packed, logits, plan)
            settings = {name: inputs[name][:num_draws] for name in (*DRAW_SETTINGS, "repetition_penalty")}
            settings["sampled_rows"] = inputs["rows"][:num_draws]
            if plan.has_twins:
                settings |= upload(contrast_arrays(plan, rows, plan.decode_set.twins), self._model.device)
            return self._draw(plan, rows, logits[: len(plan.decode_set.table_rows)], settings)

    def _logits(
        self, plan: StepPlan, batch: Batch, adapters: LayerAdapters | None, last: torch.Tensor
    ) -> torch.Tensor | None:
        """[N, V] for the rows ``last``, draws first; None where there are none."""
        num_draws = len(last)  # with those of the base beside contrasted ones
        # The base's decodes lie before the chunks, and their logits after those of all draws.
        every = num_draws == batch.num_tokens and not (plan.has_twins and plan.chunks)
        # The last layer's work on rows that draw nothing is spared, unless adapters ask whose row is which.
        rows = None if every or not num_draws or adapters is self._pool else last
        hidden = self._model.forward(batch, self._cache, adapters, rows=rows)
        if not num_draws:
            return None
        return self._model.logits(hidden if every or rows is not None else hidden[last])

    def _draw(self, plan: StepPlan, rows: Rows, logits: torch.Tensor, settings: dict[str, torch.Tensor]) -> Draws:
        if plan.has_twins:
            num_draws = len(plan.sampled)
            logits, base, at = logits[:num_draws].float(), logits[num_draws:], settings["contrast_at"]
            logits[at] = contrast(logits[at], base, settings["contrast"], settings["contrast_floor"])
        penalised = plan.settings.penalised
        ids, logprobs = sample(
            logits,
            **{name: settings[name] for name in DRAW_SETTINGS},
            repetition_penalty=settings["repetition_penalty"] if penalised else None,
            seen=self._seen_tokens(plan, rows, settings["sampled_rows"]) if penalised else None,
            backend=self._model.backend,
        )
        self._newest.index_copy_(0, settings["sampled_rows"], ids)
        if self._seen is not None:
            self._seen[settings["sampled_rows"], ids] = True
        return self._to_host(pack_draws(ids, logprobs), logits, plan)

    def _to_host(self, packed: torch.Tensor, logits: torch.Tensor, plan: StepPlan) -> Draws:
        top_ids = top_logprobs = None
        wanted = plan.settings.wanted
        if wanted:
            most = min(max(wanted.values()), logits.shape[1])
            at = upload({"at": np.fromiter(wanted, np.int64, len(wanted))}, logits.device)["at"]
            top = logits[at].float().log_softmax(-1).topk(most, dim=-1)
            top_ids, top_logprobs = _start_copy(top.indices), _start_copy(top.values)
        token_ids, logprobs = unpack_draws(_start_copy(packed))
        count = len(plan.sampled)
        draws = Draws(token_ids[:count], logprobs[:count], top_ids, top_logprobs, wanted)
        if packed.is_cuda:
            draws.arrived = torch.cuda.Event()
            draws.arrived.record()
        return draws

    def _seen_tokens(self, plan: StepPlan, rows: Rows, sampled_rows: torch.Tensor) -> torch.Tensor:
        """Which tokens each sampled sequence holds, bool [B,V]. A sequence's first draw sets its row; after that
        `launch` adds each token drawn."""
        model = self._model
        if self._seen is None:
            shape = (len(rows.num_tokens), model.config.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=model.device)
        new = [c for c in plan.chunks if c.num_draws and c.sequence.params.repetition_penalty != 1.0]
        if new:
            at = np.fromiter((c.sequence.row for c in new), np.int64, len(new))
            tokens = [rows.tokens[c.sequence.row, : c.stop] for c in new]
            index = upload(
                {
                    "new": at,
                    "rows": np.repeat(at, [len(t) for t in tokens]),
                    "tokens": np.concatenate(tokens).astype(np.int64),
                },
                model.device,
            )
            self._seen[index["new"]] = False
            self._seen[index["rows"], index["tokens"]] = True
        return self._seen[sampled_rows]


def _start_copy(tensor: torch.Tensor) -> torch.Tensor:
    """To the host, without waiting for a device."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
