"""The slow truth of generation: one sequence, no cache, everything computed anew for every token.

The generator must give the same tokens, whatever it batches, chunks, shares or preempts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..kernels.sampling import sample
from .batch import Batch
from .model import LayerAdapters, Model
from .sampler import Completion, SamplingParams, stream_key
from .tokenizer import Tokenizer


def naive_generate(
    model: Model,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    tokenizer: Tokenizer | None = None,
    eos_ids: Sequence[int] | None = None,
    request_id: int = 0,
    index: int = 0,
    adapters: LayerAdapters | None = None,
    adapter_index: int = -1,
) -> Completion:
    """Continues one prompt. Without a tokenizer ``text`` is empty and stop strings are not looked for.

    ``eos_ids`` default to the tokenizer's, else to the config's.
    """
    if eos_ids is None:
        eos_ids = tokenizer.eos_ids if tokenizer is not None else model.config.eos_token_ids
    prompt, ids = list(prompt_ids), []
    logprobs: list[list[tuple[int, float]]] = []
    text, finish_reason = "", "length"
    key = stream_key(params.seed, request_id, index)
    while len(ids) < params.max_tokens and len(prompt) + len(ids) < model.config.max_context:
        logits = naive_logits(model, prompt + ids, adapters, adapter_index)[-1:]
        if params.contrast:
            base = naive_logits(model, prompt + ids)[-1:].float()
            least = logits.float().max() + math.log(params.contrast_floor)
            apart = (1 + params.contrast) * logits.float() - params.contrast * base
            logits = torch.where(logits.float() >= least, apart, -torch.inf)
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        seen[0, prompt + ids] = True

        def one(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor([value], dtype=dtype, device=model.device)

        token, _ = sample(
            logits,
            keys=one(key, torch.int64),
            steps=one(len(ids), torch.int64),
            temperature=one(params.temperature, torch.float32),
            top_k=one(params.top_k, torch.int32),
            top_p=one(params.top_p, torch.float32),
            min_p=one(params.min_p, torch.float32),
            repetition_penalty=one(params.repetition_penalty, torch.float32),
            seen=seen,
        )
        ids.append(int(token))
        if params.logprobs is not None:
            logprobs.append(top_logprobs(logits[0], ids[-1], params.logprobs))
        if ids[-1] in eos_ids and not params.ignore_eos:
            finish_reason = "stop"
            break
        if tokenizer is not None and params.stop:
            text = tokenizer.decode(ids)
            if any(stop in text for stop in params.stop):
                finish_reason = "stop"
                break
    if tokenizer is not None:
        ended = finish_reason == "stop" and ids[-1] in eos_ids and not params.ignore_eos
        text = tokenizer.decode(ids[:-1] if ended else ids)
        cuts = [text.find(stop) for stop in params.stop if stop in text]
        text = text[: min(cuts)] if cuts else text
    return Completion(
        request_id=request_id,
        index=index,
        prompt_tokens=len(prompt),
        text=text,
        token_ids=ids,
        finish_reason=finish_reason,
        logprobs=logprobs if params.logprobs is not None else None,
    )


@torch.no_grad()
def naive_logits(
    model: Model, ids: Sequence[int], adapters: LayerAdapters | None = None, adapter_index: int = -1
) -> torch.Tensor:
    """Logits [T, V] at every position of one sequence."""
    batch = Batch.packed([ids], model.device, adapter_index=[adapter_index])
    return model.logits(model.forward(batch, adapters=adapters))


def top_logprobs(logits: torch.Tensor, token_id: int, k: int) -> list[tuple[int, float]]:
    """The ``k`` most likely tokens and their log-probabilities; the drawn token comes last where it is none of them."""
    values = logits.float().log_softmax(-1)
    top = values.topk(k)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    pairs = [pair for pair in pairs if pair[1] > -math.inf]
    if token_id not in top.indices.tolist():
        pairs.append((token_id, float(values[token_id])))
    return pairs
