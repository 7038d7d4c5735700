"""Attention of a generation step against the paged KV cache.

Query i of sequence b stands at position context_lens[b] − query_len[b] + i and sees the keys at positions up to
its own; the key at position j lies in page page_table[b, j // S] at offset j % S. The step's own keys and
values are already in the pages. Scores and output as in attention_prefill; quantised pages hold k / k_scale[K]
and v / v_scale[K].

The Triton kernels are in attention_paged.py.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import torch
import torch.nn.functional as F

from . import cpu_attention
from .attention_prefill import bias_tile, capability, check_attention, sdpa_sequence, shape_bucket
from .dispatch import bad_argument, choose_backend
from .tuning import tuned_config

OP = "attention_paged"
BACKENDS = ("triton", "torch", "sdpa", "flash", "cpp")
CACHE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8)


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
    prefix_groups: torch.Tensor | None = None,
    prefix_lens: torch.Tensor | None = None,
    max_prefix_len: int = 0,
) -> torch.Tensor:
    """The readable truth: sequence by sequence, whole score matrix, in fp32 (fp64 queries stay fp64). What decodes
    share is in their page tables already."""
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
    """All one-query sequences in one padded SDPA call. Padding repeats a valid token, so no unwritten page is
    read.
    """
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


def _flash_paged(
    q,
    k_cache,
    v_cache,
    page_table,
    context_lens,
    query_starts,
    max_query_len,
    max_context_len,
    softmax_scale,
    slopes,
    window,
) -> torch.Tensor:
    """The flash-attn package's variable-length kernel over pages (page size a multiple of 256)."""
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(f"{OP}: backend 'flash' needs the flash-attn package, which is not installed")
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    key_starts = F.pad(torch.cumsum(context_lens, 0, dtype=torch.int32), (1, 0))
    return flash_attn_varlen_func(
        q, k_cache, v_cache, query_starts, key_starts, max_query_len, max_context_len, softmax_scale=softmax_scale,
        causal=True, window_size=(window - 1 if window is not None else -1, 0 if window is not None else -1),
        alibi_slopes=slopes, block_table=page_table,
    )  # fmt: skip


def _check(
    q,
    k_cache,
    v_cache,
    page_table,
    context_lens,
    query_starts,
    max_query_len,
    max_context_len,
    num_decodes,
    k_scale,
    v_scale,
) -> None:
    """What paged attention asks beyond check_attention."""
    if k_cache.dim() != 4 or v_cache.shape != k_cache.shape:
        given = f"of shapes {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        raise bad_argument(OP, "k_cache, v_cache", given, "[P,S,K,D], both alike")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype not in CACHE_DTYPES or cache.dtype != k_cache.dtype:
            raise bad_argument(OP, name, cache.dtype, "float, float8_e4m3fn or int8, the same for keys and values")
        if cache.stride(-1) != 1:
            raise bad_argument(OP, name, f"of strides {cache.stride()}", "contiguous in the last dim")
    num_sequences = query_starts.shape[0] - 1
    if page_table.dim() != 2 or page_table.shape[0] != num_sequences or page_table.dtype != torch.int32:
        given = f"{page_table.dtype} {tuple(page_table.shape)}"
        raise bad_argument(OP, "page_table", given, f"int32 [{num_sequences},N]")
    if page_table.stride(-1) != 1:
        raise bad_argument(OP, "page_table", f"of strides {page_table.stride()}", "contiguous rows")
    if context_lens.shape != (num_sequences,) or context_lens.dtype not in (torch.int32, torch.int64):
        given = f"{context_lens.dtype} {tuple(context_lens.shape)}"
        raise bad_argument(OP, "context_lens", given, f"int32 [{num_sequences}]")
    for name, tensor in (("page_table", page_table), ("context_lens", context_lens)):
        if tensor.device != q.device:
            raise bad_argument(OP, name, f"on {tensor.device}", f"{q.device}, as q")
    if not 0 <= num_decodes <= num_sequences:
        raise bad_argument(OP, "num_decodes", num_decodes, f"0 to {num_sequences}, the sequences")
    capacity = page_table.shape[1] * k_cache.shape[1]
    if num_sequences and not 1 <= max_context_len <= capacity:
        raise bad_argument(OP, "max_context_len", max_context_len, f"1 to {capacity}, the tokens of a page-table row")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and (scale.shape != (k_cache.shape[2],) or scale.dtype != torch.float32):
            given = f"{scale.dtype} {tuple(scale.shape)}"
            raise bad_argument(OP, name, given, f"float32 ({k_cache.shape[2]},)")


def _check_lengths(
    context_lens: torch.Tensor, query_starts: torch.Tensor, max_context_len: int, num_decodes: int
) -> None:
    """What the values of the lengths must be; they lie on the CPU."""
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    for b, context in enumerate(contexts):
        queries = starts[b + 1] - starts[b]
        if b < num_decodes and queries != 1:
            raise bad_argument(OP, "query_starts", f"{queries} queries in decode {b}", "1 query in each decode")
        if not 0 <= queries <= context <= max_context_len:
            allowed = f"its {queries} queries to max_context_len {max_context_len}"
            raise bad_argument(OP, "context_lens", f"{context} for sequence {b}", allowed)


def _check_prefixes(
    page_table: torch.Tensor,
    max_context_len: int,
    num_decodes: int,
    prefix_groups: torch.Tensor | None,
    prefix_lens: torch.Tensor | None,
    max_prefix_len: int,
) -> None:
    """Shapes and places of prefix groups, given with max_prefix_len ≠ 0."""
    if not 0 < max_prefix_len < max_context_len:
        raise bad_argument(OP, "max_prefix_len", max_prefix_len, f"0 to {max_context_len - 1}")
    if (
        prefix_groups is None
        or prefix_groups.dim() != 1
        or len(prefix_groups) < 2
        or prefix_groups.dtype != torch.int32
    ):
        given = "None" if prefix_groups is None else f"{prefix_groups.dtype} {tuple(prefix_groups.shape)}"
        raise bad_argument(OP, "prefix_groups", given, "int32 [G+1] with max_prefix_len")
    if prefix_lens is None or prefix_lens.shape != (num_decodes,) or prefix_lens.dtype != torch.int32:
        given = "None" if prefix_lens is None else f"{prefix_lens.dtype} {tuple(prefix_lens.shape)}"
        raise bad_argument(OP, "prefix_lens", given, f"int32 [{num_decodes}] with max_prefix_len")
    for name, tensor in (("prefix_groups", prefix_groups), ("prefix_lens", prefix_lens)):
        if tensor.device != page_table.device or not tensor.is_contiguous():
            given = f"on {tensor.device} with strides {tensor.stride()}"
            raise bad_argument(OP, name, given, f"contiguous on {page_table.device}, as the page table")


def _check_groups(
    page_size: int,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    num_decodes: int,
    prefix_groups: torch.Tensor,
    prefix_lens: torch.Tensor,
) -> None:
    """What the values of prefix groups must be; they lie on the CPU."""
    starts, lens, contexts = prefix_groups.tolist(), prefix_lens.tolist(), context_lens.tolist()
    if starts[0] != 0 or starts[-1] != num_decodes or any(a > b for a, b in pairwise(starts)):
        raise bad_argument(OP, "prefix_groups", starts, f"rising from 0 to num_decodes, {num_decodes}")
    for start, stop in pairwise(starts):
        if start == stop:
            continue
        prefix = lens[start]
        if any(length != prefix for length in lens[start:stop]):
            raise bad_argument(OP, "prefix_lens", lens[start:stop], "one length in each group")
        if prefix % page_size or not 0 <= prefix < min(contexts[start:stop]):
            given = f"{prefix} for decodes {start} to {stop - 1}"
            raise bad_argument(OP, "prefix_lens", given, f"whole pages of {page_size}, less than the context")
        shared = page_table[start:stop, : prefix // page_size]
        if not bool((shared == shared[:1]).all()):
            allowed = "the same pages for the first prefix_lens tokens of a group"
            raise bad_argument(OP, "page_table", f"different in decodes {start} to {stop - 1}", allowed)


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
    prefix_groups: torch.Tensor | None = None,
    prefix_lens: torch.Tensor | None = None,
    max_prefix_len: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of queries [T,H,D] against pages [P,S,K,D]; returns out [T,H,D]. No gradient.

    page_table i32 [B,N] (entries past a sequence's context are never read), context_lens i32 [B] counts this
    step's tokens too, query_starts i32 [B+1]. The first ``num_decodes`` sequences have exactly one query each.
    k_scale, v_scale f32 [K].

    Decodes that begin alike may say so, and what they share is read once for all of them: decodes
    prefix_groups[g]:prefix_groups[g+1] (i32 [G+1], rising from 0 to num_decodes; groups may be empty) have their first
    prefix_lens tokens (i32 [num_decodes], equal within a group, whole pages, less than each context) in the same pages.
    ``max_prefix_len`` is at least the longest; 0: nothing is shared. Backend "triton" then cuts its sums elsewhere,
    which moves the last bits.

    Backends: "triton"; "cpp" (CPU, reads the pages in place); "torch" and "sdpa" (gathered pages, SDPA);
    "flash" (the flash-attn package, 16-bit pages). Raises ValueError for arguments that do not fit, before any
    launch.
    """
    check_attention(OP, q, {"k_cache": k_cache, "v_cache": v_cache}, query_starts, softmax_scale, alibi_slopes, window)
    _check(
        q, k_cache, v_cache, page_table, context_lens, query_starts, max_query_len, max_context_len, num_decodes,
        k_scale, v_scale,
    )  # fmt: skip
    if max_prefix_len:
        _check_prefixes(page_table, max_context_len, num_decodes, prefix_groups, prefix_lens, max_prefix_len)
    else:
        prefix_groups = prefix_lens = None
    chosen = choose_backend(OP, q, backend, BACKENDS, cpu_attention.default_backend(q, k_cache, k_scale, v_scale))
    if chosen == "cpp":
        out = cpu_attention.attention_paged(
            q, k_cache, v_cache, page_table, context_lens, query_starts, max_context_len, num_decodes,
            float(softmax_scale), alibi_slopes, window, k_scale, v_scale, prefix_groups, prefix_lens,
        )  # fmt: skip
        if out is not None:
            return out
    if not q.is_cuda:  # the twin has looked at the values itself
        _check_lengths(context_lens, query_starts, max_context_len, num_decodes)
        if prefix_groups is not None and prefix_lens is not None:
            _check_groups(k_cache.shape[1], page_table, context_lens, num_decodes, prefix_groups, prefix_lens)
    assert chosen != "cpp", "the twin refused what is right"
    softmax_scale = float(softmax_scale)
    if chosen == "triton":
        from . import attention_paged as kernels

        if q.dtype == torch.float64:
            raise bad_argument(OP, "q", q.dtype, "float32, float16 or bfloat16 with backend 'triton'")
        q = q if q.stride(-1) == 1 else q.contiguous()
        sizes = (q.shape[-1], q.dtype.itemsize, capability(q), k_cache.dtype.itemsize)
        bucket = f"{shape_bucket(q)}-{k_cache.dtype.itemsize * 8}bit"
        decode_config = tuned_config("attention_decode", bucket, kernels.default_decode_config(*sizes))
        chunk_config = tuned_config("attention_chunk", bucket, kernels.default_chunk_config(*sizes))
        vector_config = tuned_config("attention_decode_vector", bucket, kernels.default_vector_config())
        return kernels.launch_paged(
            q, k_cache, v_cache, page_table, context_lens, query_starts, max_query_len, max_context_len, num_decodes,
            softmax_scale, alibi_slopes, window, k_scale, v_scale, prefix_groups, prefix_lens, max_prefix_len,
            decode_config, chunk_config, vector_config,
        )  # fmt: skip
    if chosen == "flash":
        if k_scale is not None or v_scale is not None or k_cache.dtype.itemsize != 2:
            raise bad_argument(OP, "k_cache", k_cache.dtype, "float16 or bfloat16 without scales with backend 'flash'")
        return _flash_paged(
            q, k_cache, v_cache, page_table, context_lens, query_starts, max_query_len, max_context_len,
            softmax_scale,
            alibi_slopes, window,
        )  # fmt: skip
    return _torch_paged(
        q, k_cache, v_cache, page_table, context_lens, query_starts, num_decodes, softmax_scale,
        alibi_slopes, window, k_scale, v_scale,
    )  # fmt: skip
