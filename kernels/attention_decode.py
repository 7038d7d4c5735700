"""Attention of a generation step against the paged KV cache.

Query i of sequence b stands at position context_lens[b] − query_len[b] + i and sees the keys at positions up to its own; the key at
position j lies in page page_table[b, j // S] at offset j % S. The step's own keys and values are already in the pages. Scores and
output as in attention_prefill; quantised pages hold k / k_scale[K] and v / v_scale[K].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .attention_prefill import bias_tile, sdpa_sequence
from .dispatch import choose_backend

OP = "attention_paged"


def gather_pages(
    cache: torch.Tensor, page_ids: torch.Tensor, context_len: int, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The first ``context_len`` tokens of a sequence [L,K,D] in ``dtype``, dequantised."""
    page_size = cache.shape[1]
    pages = cache[page_ids[: -(-context_len // page_size)].long()].flatten(0, 1)[:context_len]
    if scale is None:
        return pages.to(dtype)
    return (pages.to(torch.float32) * scale.to(torch.float32)[:, None]).to(dtype)


def attention_paged_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    max_query_len: int,
    max_context_len: int,
    num_decodes: int,
    softmax_scale: float,
    alibi_slopes: torch.Tensor | None = None,
    window: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    shared_prefix_len: int = 0,
) -> torch.Tensor:
    """The readable truth: sequence by sequence, whole score matrix, in fp32 (fp64 queries stay fp64)."""
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k_cache.shape[2]
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    out = torch.zeros(q.shape, dtype=accumulate, device=q.device)
    for b, context in enumerate(contexts):
        start, stop = starts[b], starts[b + 1]
        if stop == start:
            continue
        keys = gather_pages(k_cache, page_table[b], context, None, accumulate)
        values = gather_pages(v_cache, page_table[b], context, None, accumulate)
        if k_scale is not None:
            keys = keys * k_scale.to(accumulate)[:, None]
        if v_scale is not None:
            values = values * v_scale.to(accumulate)[:, None]
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        positions = torch.arange(context - (stop - start), context, device=q.device)
        scores = torch.einsum("ihd,jhd->hij", q[start:stop].to(accumulate), keys) * softmax_scale
        scores += bias_tile(positions, torch.arange(context, device=q.device), alibi_slopes, window, True, accumulate)
        out[start:stop] = torch.einsum("hij,jhd->ihd", torch.softmax(scores, dim=-1), values)
    return out.to(q.dtype)


def _torch_decodes(q, k_cache, v_cache, page_table, context_lens, softmax_scale, slopes, window, k_scale, v_scale):
    """All one-query sequences in one padded SDPA call. Padding repeats a valid token, so no unwritten page is read."""
    page_size = k_cache.shape[1]
    context_lens = context_lens.long()
    max_context = int(context_lens.max())
    position = torch.arange(max_context, device=q.device)
    inside = torch.minimum(position[None, :], context_lens[:, None] - 1)
    slots = page_table.long().gather(1, inside // page_size) * page_size + inside % page_size

    def tokens(cache: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        flat = cache.flatten(0, 1)[slots]
        if scale is not None:
            flat = flat.to(torch.float32) * scale.to(torch.float32)[:, None]
        return flat.to(q.dtype).transpose(1, 2)

    distance = context_lens[:, None] - 1 - position[None, :]
    masked = distance < 0
    if window is not None:
        masked = masked | (distance >= window)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    bias = distance.to(dtype)[:, None, None, :]
    bias = torch.zeros_like(bias) if slopes is None else -slopes.to(dtype)[None, :, None, None] * bias
    bias = bias.masked_fill(masked[:, None, None, :], float("-inf"))
    if q.is_cuda:
        bias = bias.to(q.dtype)
    keys, values = tokens(k_cache, k_scale), tokens(v_cache, v_scale)
    out = F.scaled_dot_product_attention(
        q[:, :, None], keys, values, attn_mask=bias, scale=softmax_scale, enable_gqa=q.shape[1] != keys.shape[1]
    )
    return out[:, :, 0]


def _torch_paged(
    q,
    k_cache,
    v_cache,
    page_table,
    context_lens,
    query_starts,
    num_decodes,
    softmax_scale,
    slopes,
    window,
    k_scale,
    v_scale,
) -> torch.Tensor:
    out = torch.empty_like(q)
    if num_decodes:
        out[:num_decodes] = _torch_decodes(
            q[:num_decodes], k_cache, v_cache, page_table[:num_decodes], context_lens[:num_decodes],
            softmax_scale, slopes, window, k_scale, v_scale,
        )  # fmt: skip
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    for b in range(num_decodes, len(contexts)):
        start, stop, context = starts[b], starts[b + 1], contexts[b]
        if stop == start:
            continue
        keys = gather_pages(k_cache, page_table[b], context, k_scale, q.dtype)
        values = gather_pages(v_cache, page_table[b], context, v_scale, q.dtype)
        first = context - (stop - start)
        sequence = sdpa_sequence(
            q[None, start:stop], keys[None], values[None], first, softmax_scale, slopes, window, True
        )
        out[start:stop] = sequence[0]
    return out


def attention_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    max_query_len: int,
    max_context_len: int,
    num_decodes: int,
    softmax_scale: float,
    alibi_slopes: torch.Tensor | None = None,
    window: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    shared_prefix_len: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of queries [T,H,D] against pages [P,S,K,D]; returns out [T,H,D]. No gradient.

    page_table i32 [B,N] (entries past a sequence's context are never read), context_lens i32 [B] counts this step's tokens too,
    query_starts i32 [B+1]. The first ``num_decodes`` sequences have exactly one query each. ``shared_prefix_len`` tokens at the
    start are common to all decodes (their page-table rows begin alike) and may be read once. k_scale, v_scale f32 [K].
    Backends: "triton", "torch".
    """
    choose_backend(OP, q, backend, ("torch",))
    return _torch_paged(
        q, k_cache, v_cache, page_table, context_lens, query_starts, num_decodes, float(softmax_scale),
        alibi_slopes, window, k_scale, v_scale,
    )  # fmt: skip
