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
from .batch import Batch, build_step, upload
from .cache import KVCache
from .decode_graph import DecodeGraphs
from .model import Model
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
        self._newest = torch.zeros(num_rows, dtype=torch.int64, device=model.device)
        self._seen: torch.Tensor | None = None

    @torch.inference_mode()
    def launch(self, plan: StepPlan, rows: Rows) -> Draws:
        """Starts a step. The steps before it must have been started by this runner, in order."""
        with self._span("build"):
            batch, settings = build_step(plan, rows, self._model.device)
            self._fill_newest(plan, rows, batch, settings["decode_rows"])
        with self._span("forward"):
            logits = self._logits(plan, batch, settings["last"])
        if logits is None:
            return Draws(torch.empty(0, dtype=torch.int64), torch.empty(0))
        with self._span("sample"):
            return self._draw(plan, rows, logits, settings)

    def _fill_newest(self, plan: StepPlan, rows: Rows, batch: Batch, decode_rows: torch.Tensor) -> None:
        """Tokens that the host does not know yet, the step before having drawn them."""
        if (rows.tokens[plan.decode_rows, plan.decode_at] == UNKNOWN).any():
            ids = batch.token_ids[: batch.num_decodes]
            ids.copy_(torch.where(ids == UNKNOWN, self._newest[decode_rows], ids))

    def _logits(self, plan: StepPlan, batch: Batch, last: torch.Tensor) -> torch.Tensor | None:
        """[N, V] for the rows ``last``, draws first; None where there are none."""
        adapters = None
        if batch.adapter_index is not None:
            used = [s.adapter_id for s in plan.decodes] + [c.sequence.adapter_id for c in plan.chunks]
            adapters = self._pool.select([*used, -1] if plan.has_twins else used)
        num_draws = len(last)  # with those of the base beside contrasted ones
        # The base's decodes lie before the chunks, and their logits after those of all draws.
        every = num_draws == batch.num_tokens and not (plan.has_twins and plan.chunks)
        logits = self._graphs.logits(batch, adapters) if every else None
        if logits is not None:
            return logits
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
        penalised = bool((rows.repetition_penalty[plan.sampled_rows] != 1.0).any())
        ids, logprobs = sample(
            logits,
            keys=settings["keys"],
            steps=settings["steps"],
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            top_p=settings["top_p"],
            min_p=settings["min_p"],
            repetition_penalty=settings["repetition_penalty"] if penalised else None,
            seen=self._seen_tokens(plan, rows, settings["sampled_rows"]) if penalised else None,
            backend=self._model.backend,
        )
        self._newest[settings["sampled_rows"]] = ids
        if self._seen is not None:
            self._seen[settings["sampled_rows"], ids] = True
        return self._to_host(ids, logprobs, logits, rows.num_logprobs[plan.sampled_rows], settings["wants_logprobs"])

    def _to_host(
        self,
        ids: torch.Tensor,
        logprobs: torch.Tensor,
        logits: torch.Tensor,
        num_logprobs: np.ndarray,
        at: torch.Tensor,
    ) -> Draws:
        top_ids = top_logprobs = None
        wanted = {i: int(num_logprobs[i]) for i in np.flatnonzero(num_logprobs >= 0).tolist()}
        if wanted:
            most = min(max(wanted.values()), logits.shape[1])
            top = logits[at].float().log_softmax(-1).topk(most, dim=-1)
            top_ids, top_logprobs = _start_copy(top.indices), _start_copy(top.values)
        draws = Draws(_start_copy(ids), _start_copy(logprobs), top_ids, top_logprobs, wanted)
        if ids.is_cuda:
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
    """To the host, without waiting where the tensor is not there already."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
