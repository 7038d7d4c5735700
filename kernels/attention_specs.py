"""Specifications of packed and paged attention: inputs, floors, peers, and the configurations that are shipped."""
# pyright: reportCallIssue=false

from __future__ import annotations

import functools
from itertools import accumulate, pairwise
from typing import Any

import torch

from .attention_decode import attention_paged, attention_paged_reference
from .attention_prefill import alibi_slopes, attention_prefill, attention_prefill_reference
from .spec import Case, CompileCase, KernelSpec

CACHE_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "bf16": torch.bfloat16, "fp16": torch.float16}


def _starts(lens: list[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=device)


def _prefill_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Queries, keys and values are views into one fused projection, as the model makes them."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads, kv_heads, head_dim = sum(case["lens"]), case["H"], case["K"], case["D"]
    qkv = torch.randn((tokens, heads + 2 * kv_heads, head_dim), generator=generator).to(device, dtype)
    grad = case.get("pass", "forward") != "forward"
    q, k, v = (x.requires_grad_(grad) for x in qkv.split([heads, kv_heads, kv_heads], dim=1))
    return {
        "q": q,
        "k": k,
        "v": v,
        "query_starts": _starts(case["lens"], device),
        "max_query_len": max(case["lens"], default=0),
        "softmax_scale": case.get("scale", head_dim**-0.5),
        "alibi_slopes": alibi_slopes(heads, device=device) if case.get("alibi") else None,
        "window": case.get("window"),
        "causal": case.get("causal", True),
    }


def _pairs(case: Case) -> int:
    """(query, key) pairs that attend."""
    total = 0
    for length in case["lens"]:
        window = min(case.get("window") or length, length)
        causal = window * (window + 1) // 2 + (length - window) * window
        total += causal if case.get("causal", True) else 2 * causal - length
    return total


def _prefill_flops(case: Case) -> int:
    """Two products forward, five backward."""
    products = {"forward": 2, "backward": 5, "both": 7}[case.get("pass", "forward")]
    return 2 * products * _pairs(case) * case["H"] * case["D"]


def _prefill_bytes(case: Case) -> int:
    size = 4 if case.get("dtype") == "fp32" else 2
    query, keys = case["H"] * case["D"], 2 * case["K"] * case["D"]
    forward, backward = 2 * query + keys, 4 * query + 2 * keys
    rows = {"forward": forward, "backward": backward, "both": forward + backward}[case.get("pass", "forward")]
    return size * sum(case["lens"]) * rows


def _batched(x: torch.Tensor, query_starts: torch.Tensor) -> torch.Tensor:
    """[T,N,D] of equally long sequences as [B,N,L,D]."""
    starts = query_starts.tolist()
    lengths = {b - a for a, b in pairwise(starts)}
    if len(lengths) != 1:
        raise NotImplementedError("sequences of different lengths")
    return x.unflatten(0, (len(starts) - 1, lengths.pop())).transpose(1, 2)


def _sdpa(q, k, v, query_starts, max_query_len, softmax_scale, alibi_slopes, window, causal) -> torch.Tensor:
    """torch's SDPA; it has no fused ALiBi, so it is timed without (an easier task)."""
    if window is not None:
        raise NotImplementedError("window")
    q, k, v = (_batched(x, query_starts) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


@functools.cache
def _flex_compiled(causal: bool, length: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch, head, query, key):
        return query >= key

    mask = create_block_mask(visible, None, None, length, length, device=device) if causal else None
    return torch.compile(flex_attention), mask


def _flex(q, k, v, query_starts, max_query_len, softmax_scale, alibi_slopes, window, causal) -> torch.Tensor:
    """FlexAttention, compiled, ALiBi as score modification."""
    if window is not None:
        raise NotImplementedError("window")
    q, k, v = (_batched(x, query_starts) for x in (q, k, v))
    flex, mask = _flex_compiled(causal, q.shape[2], str(q.device))

    def bias(score, batch, head, query, key):
        return score - alibi_slopes[head] * (query - key)

    out = flex(
        q, k, v, score_mod=bias if alibi_slopes is not None else None, block_mask=mask, scale=softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2)


def _flash(**inputs: Any) -> torch.Tensor:
    try:
        return attention_prefill(**inputs, backend="flash")  # type: ignore[return-value]
    except ValueError as error:
        raise NotImplementedError(str(error)) from error


MODELS = {
    "MPT-7B": {"H": 32, "K": 32, "D": 128, "alibi": True},
    "MPT-30B": {"H": 64, "K": 64, "D": 112, "alibi": True},
    "Llama-8B": {"H": 32, "K": 8, "D": 128},
    "SmolLM2-135M": {"H": 9, "K": 3, "D": 64},
}


def _prefill_bench() -> tuple[Case, ...]:
    small = {"lens": [700]}
    cases: list[Case] = []
    for which in ("forward", "backward"):
        for model, shape in MODELS.items():
            first = 1 if model == "MPT-7B" else 4
            cases.append({"model": model, "lens": [8192], "pass": which, "priority": first, "check_at": small, **shape})
    many = [2048, 1024, 512, 3072, 128, 1408]
    cases.append(
        {"model": "MPT-7B packed", "lens": many, "priority": 2, "check_at": {"lens": [300, 70, 1]}, **MODELS["MPT-7B"]}
    )
    window = {"lens": [8192], "window": 1024, "priority": 2, "check_at": {"lens": [700], "window": 100}}
    cases.append({"model": "Llama-8B window", **window, **MODELS["Llama-8B"]})
    return tuple(cases)


def _signature(kernel: Any, constants: dict[str, Any], element: str, cache: str) -> tuple[dict[str, str], dict]:
    kinds = dict.fromkeys(("q", "out", "dout", "dq", "dk", "dv"), f"*{element}") | dict.fromkeys("kv", f"*{cache}")
    kinds |= dict.fromkeys(("lse", "delta", "slopes", "k_scales", "v_scales", "partial", "statistics"), "*fp32")
    kinds |= dict.fromkeys(("starts", "page_table", "context_lens", "prefix_groups", "prefix_lens"), "*i32")
    kinds |= {"scale": "fp32", "softmax_scale": "fp32"}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names if name not in constants}
    varying = ("stat_head", "lse_head", "table_stride")
    strides = [
        n for n in signature if n.endswith(("_stride", "_head", "_page")) and n not in varying and n != "kv_head"
    ]
    return signature, dict.fromkeys(strides, 16)


def _case(
    name: str, kernel: Any, config: dict[str, int], constants: dict[str, Any], *, gemm: bool, cache: str = "bf16"
) -> CompileCase:
    constants = constants | {k: v for k, v in config.items() if k.isupper()}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature, attrs = _signature(kernel, constants, "bf16", cache)
    warps, stages = config.get("num_warps", 4), config.get("num_stages", 2)
    return CompileCase(name, kernel, signature, constants, warps, stages, gemm=gemm, attrs=attrs)


def _prefill_compile_cases(target: int) -> list[CompileCase]:
    from . import attention_backward as backward
    from . import attention_forward as forward
    from .attention_tiles import split_head_dim

    cases = []
    for head_dim, alibi in ((128, True), (112, True), (64, False)):
        d0, d1, d2 = split_head_dim(head_dim)
        constants = {"GROUP": 1, "HEAD_DIM": head_dim, "D0": d0, "D1": d1, "D2": d2, "CAUSAL": True}
        constants |= {"HAS_ALIBI": alibi, "HAS_WINDOW": False}
        for name, kernel, config in (
            ("forward", forward.forward_kernel, forward.default_config(head_dim, 2, target)),
            ("dkdv", backward.key_gradient_kernel, backward.default_key_config(head_dim, 2, target)),
            ("dq", backward.query_gradient_kernel, backward.default_query_config(head_dim, 2, target)),
        ):
            cases.append(_case(f"{name} d{head_dim}", kernel, dict(config), constants, gemm=True))
    if target == 90:
        cases += _hopper_compile_cases()
    return cases


def _hopper_compile_cases() -> list[CompileCase]:
    """The Gluon kernels; they take descriptors, whose types name tile and shared-memory layout."""
    from triton.experimental.gluon import language as gl

    from . import attention_hopper as forward
    from . import attention_hopper_backward as backward

    cases = []
    for head_dim, alibi in ((128, True), (112, True), (64, False)):
        width = max(16, 1 << (head_dim - 1).bit_length())

        def descriptor(rows: int, width: int = width) -> str:
            layout = gl.NVMMASharedLayout.get_default_for([rows, 1, width], gl.bfloat16)
            return f"tensordesc<bf16[{rows},1,{width}],{layout!r}>"

        for name, kernel, config, held in (
            ("forward", forward.hopper_forward_kernel, forward.default_config(head_dim), ("q",)),
            ("dkdv", backward.hopper_key_gradient_kernel, backward.default_key_config(head_dim), ("k", "v")),
            ("dq", backward.hopper_query_gradient_kernel, backward.default_query_config(head_dim), ("q", "dout")),
        ):
            constants = {"GROUP": 1, "HEAD_DIM": head_dim, "HAS_ALIBI": alibi, **config}
            signature, attrs = _signature(kernel, constants, "bf16", "bf16")
            rows = config.get("BLOCK_M") or config["BLOCK_N"]
            for operand in ("q", "k", "v", "dout"):
                if f"{operand}_desc" in signature:
                    signature[f"{operand}_desc"] = descriptor(64 if operand in held else rows)
            cases.append(
                CompileCase(f"hopper {name} d{head_dim}", kernel, signature, constants, 4, gemm=True, attrs=attrs)
            )
    return cases


PREFILL = KernelSpec(
    op="attention_prefill",
    run=attention_prefill,
    reference=attention_prefill_reference,
    make_inputs=_prefill_inputs,
    test_cases=(
        {"lens": [1], "H": 1, "K": 1, "D": 16},
        {"lens": [5, 0, 33, 1, 64], "H": 4, "K": 2, "D": 32, "alibi": True, "pass": "both"},
        {"lens": [31, 17], "H": 3, "K": 3, "D": 112, "alibi": True, "pass": "both"},
        {"lens": [40, 70], "H": 4, "K": 1, "D": 40, "alibi": True, "window": 17, "pass": "both"},
        {"lens": [65, 3], "H": 2, "K": 2, "D": 64, "causal": False, "pass": "both"},
        {"lens": [50], "H": 2, "K": 1, "D": 80, "causal": False, "window": 9, "alibi": True, "pass": "both"},
        {"lens": [37], "H": 9, "K": 3, "D": 64, "scale": 0.3, "pass": "both"},
        {"lens": [20, 29], "H": 2, "K": 1, "D": 256, "pass": "both"},
        {"lens": [0], "H": 2, "K": 1, "D": 32, "pass": "both"},
    ),
    bench_cases=_prefill_bench(),
    bytes=_prefill_bytes,
    flops=_prefill_flops,
    compile_cases=_prefill_compile_cases,
    peers={"sdpa without ALiBi": _sdpa, "flex": _flex, "flash-attn": _flash},
    saved="saved_out",
)


def _firsts(groups: list[list[int]]) -> list[int]:
    return [0, *accumulate(members for members, _ in groups)][:-1]


def paged_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Random pages in random order; pages that no sequence owns are NaN where the type has one.

    "groups" lists [members, prefix tokens] of the decodes, in order.
    """
    generator = torch.Generator().manual_seed(seed)
    contexts, queries = list(case["contexts"]), list(case.get("queries") or [1] * len(case["contexts"]))
    heads, kv_heads, head_dim, size = case["H"], case["K"], case["D"], case["S"]
    cache_dtype = CACHE_DTYPES.get(case.get("cache", ""), dtype)
    columns = max(-(-context // size) for context in contexts) + 1
    num_pages = sum(-(-context // size) for context in contexts) + 2
    order = torch.randperm(num_pages, generator=generator).tolist()
    table = torch.full((len(contexts), columns), 2**30, dtype=torch.int32)
    decodes = sum(1 for q in queries if q == 1) if case.get("decodes") is None else case["decodes"]
    groups = case.get("groups", [])
    first_member = [row for row, (members, _) in zip(_firsts(groups), groups, strict=True) for _ in range(members)]
    prefixes = [prefix for members, prefix in groups for _ in range(members)]
    for row, context in enumerate(contexts):
        for column in range(-(-context // size)):
            shared = row < len(prefixes) and first_member[row] < row and (column + 1) * size <= prefixes[row]
            table[row, column] = table[first_member[row], column] if shared else order.pop()

    quantised = cache_dtype in (torch.int8, torch.float8_e4m3fn)
    generator_device = torch.Generator(device).manual_seed(seed)
    shape = (num_pages, size, kv_heads, head_dim)

    def pages() -> torch.Tensor:
        values = torch.randn(shape, generator=generator_device, device=device, dtype=torch.bfloat16)
        if cache_dtype == torch.int8:
            return (values * 40).round().clamp(-127, 127).to(torch.int8)
        values = values.to(cache_dtype)
        if cache_dtype.itemsize > 1:
            values[order] = float("nan")
        return values

    k_cache, v_cache = pages(), pages()
    scales = torch.rand((2, kv_heads), generator=generator).mul_(0.02).add_(0.02).to(device)
    sharing: dict[str, Any] = {}
    if groups:
        sharing["prefix_groups"] = _starts([members for members, _ in groups], device)
        sharing["prefix_lens"] = torch.tensor(prefixes, dtype=torch.int32, device=device)
        sharing["max_prefix_len"] = max(prefixes)
    return {
        "q": torch.randn((sum(queries), heads, head_dim), generator=generator).to(device, dtype),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "page_table": table.to(device),
        "context_lens": torch.tensor(contexts, dtype=torch.int32, device=device),
        "query_starts": _starts(queries, device),
        "max_query_len": max(queries),
        "max_context_len": max(contexts),
        "num_decodes": decodes,
        "softmax_scale": head_dim**-0.5,
        "alibi_slopes": alibi_slopes(heads, device=device) if case.get("alibi") else None,
        "window": case.get("window"),
        "k_scale": scales[0] if quantised else None,
        "v_scale": scales[1] if quantised else None,
        **sharing,
    }


def _expand(case: Case) -> Case:
    """Bench cases say B sequences of L tokens; test cases list contexts."""
    return {"contexts": [case["L"]] * case["B"], "decodes": case["B"], **case} if "L" in case else case


def _paged_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    return paged_inputs(_expand(case), device, dtype, seed)


def _paged_bytes(case: Case) -> int:
    """Keys and values once (a shared prefix once for all), queries and outputs."""
    case = _expand(case)
    width = CACHE_DTYPES.get(case.get("cache", ""), torch.bfloat16).itemsize
    shared = sum((members - 1) * prefix for members, prefix in case.get("groups", []) if members)
    tokens = sum(case["contexts"]) - shared
    queries = sum(case.get("queries") or [1] * len(case["contexts"]))
    return 2 * width * tokens * case["K"] * case["D"] + 4 * queries * case["H"] * case["D"]


def _paged_flops(case: Case) -> int:
    case = _expand(case)
    queries = case.get("queries") or [1] * len(case["contexts"])
    pairs = sum(q * (2 * c - q + 1) // 2 for q, c in zip(queries, case["contexts"], strict=True))
    return 4 * pairs * case["H"] * case["D"]


def _paged_bench() -> tuple[Case, ...]:
    small = {"B": 3, "L": 700, "contexts": [700, 513, 20], "decodes": 3}
    cases: list[Case] = []
    for batch, length in ((16, 4096), (64, 2048), (256, 1024)):
        case = {"model": "MPT-7B", "B": batch, "L": length, "S": 64, "check_at": small, **MODELS["MPT-7B"]}
        cases.append({**case, "priority": 1})
    for cache in ("fp8", "int8"):
        cases.append(
            {"model": f"MPT-7B {cache}", "B": 64, "L": 2048, "S": 64, "cache": cache, "check_at": small, "priority": 2}
            | MODELS["MPT-7B"]
        )
    for model in ("MPT-30B", "Llama-8B", "SmolLM2-135M"):
        cases.append({"model": model, "B": 64, "L": 2048, "S": 64, "check_at": small, **MODELS[model]})
    cases.append(
        {"model": "MPT-7B shared prefix", "B": 64, "L": 2048, "S": 64, "groups": [[64, 1536]]}
        | {"check_at": {"B": 3, "L": 700, "contexts": [700, 650, 600], "decodes": 3, "groups": [[3, 512]]}}
        | MODELS["MPT-7B"]
    )
    grouped = {"B": 64, "L": 1536, "S": 64, "groups": [[4, 1024]] * 16}
    small_groups = {"contexts": [700, 650, 600, 90, 300], "decodes": 5, "groups": [[2, 640], [2, 64], [1, 0]]}
    cases.append(
        {"model": "MPT-7B 16 groups", **grouped, "check_at": {"B": 5, "L": 700, **small_groups}, **MODELS["MPT-7B"]}
    )
    chunk = {"contexts": [6144, 4096], "queries": [2048, 2048], "decodes": 0, "S": 64}
    chunk |= {"check_at": {"contexts": [700, 300], "queries": [300, 290]}}
    cases.append({"model": "MPT-7B chunk", **chunk, **MODELS["MPT-7B"]})
    return tuple(cases)


def _paged_compile_cases(target: int) -> list[CompileCase]:
    from . import attention_paged as paged
    from .attention_tiles import split_head_dim

    cases = []
    for head_dim, group, cache in (
        (128, 1, "bf16"),
        (128, 1, "fp8e4nv"),
        (128, 1, "i8"),
        (112, 1, "bf16"),
        (64, 3, "bf16"),
    ):
        if cache == "fp8e4nv" and target < 89:
            continue
        d0, d1, d2 = split_head_dim(head_dim)
        constants = {"GROUP": group, "HEAD_DIM": head_dim, "D0": d0, "D1": d1, "D2": d2, "PAGE_SIZE": 16}
        constants |= {"HAS_ALIBI": True, "HAS_WINDOW": False, "HAS_SCALE": cache != "bf16"}
        constants |= {"HAS_PREFIX": True, "DIRECT": False}
        constants |= {"ROWS": 16, "SPLIT": paged.SPLIT_KEYS, "BLOCK_D": 64 if head_dim == 64 else 128}
        chunk = paged.default_chunk_config(head_dim, 2, target)
        name = f"d{head_dim} {cache}"
        if cache == "bf16":
            decode = paged.default_decode_config(head_dim, 2)
            whole = constants | paged.padded_head_dim(head_dim)
            cases.append(_case(f"decode {name}", paged.decode_kernel, decode, whole, gemm=False))
        else:
            vector = paged.default_vector_config()
            cases.append(
                _case(f"decode {name}", paged.vector_decode_kernel, vector, constants, gemm=False, cache=cache)
            )
        if cache == "bf16":
            cases.append(_case(f"chunk {name}", paged.chunk_kernel, chunk, constants, gemm=True))
            cases.append(_case(f"prefix {name}", paged.prefix_kernel, chunk, constants, gemm=True))
            cases.append(_case(f"merge {name}", paged.merge_kernel, {"num_warps": 2}, constants, gemm=False))
    return cases


PAGED = KernelSpec(
    op="attention_paged",
    run=attention_paged,
    reference=attention_paged_reference,
    make_inputs=_paged_inputs,
    test_cases=(
        {"contexts": [1], "H": 1, "K": 1, "D": 16, "S": 16},
        {"contexts": [15, 16, 17, 600], "H": 4, "K": 2, "D": 32, "S": 16, "alibi": True},
        {"contexts": [40, 33, 64, 20], "queries": [1, 1, 30, 20], "H": 3, "K": 1, "D": 112, "S": 32, "alibi": True},
        {"contexts": [70, 530, 90], "queries": [1, 1, 50], "H": 2, "K": 2, "D": 64, "S": 16, "window": 40},
        {"contexts": [100, 90, 80], "H": 6, "K": 2, "D": 32, "S": 16, "groups": [[3, 64]], "alibi": True},
        {"contexts": [580, 585], "H": 2, "K": 1, "D": 16, "S": 64, "groups": [[2, 576]], "window": 30},
        {"contexts": [700, 660, 9, 50, 70, 1], "H": 6, "K": 2, "D": 32, "S": 16, "alibi": True}
        | {"groups": [[2, 656], [1, 0], [0, 0], [2, 32], [1, 0]]},
        {"contexts": [80, 40], "queries": [1, 9], "H": 4, "K": 4, "D": 40, "S": 256, "cache": "int8"},
    ),
    bench_cases=_paged_bench(),
    bytes=_paged_bytes,
    flops=_paged_flops,
    compile_cases=_paged_compile_cases,
    peers={"gathered sdpa": lambda **inputs: attention_paged(**inputs, backend="torch")},
)
