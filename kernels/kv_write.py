"""Scatters a step's keys and values into the pages of the KV cache.

    cache[slot // S, slot % S] = quantise(rope(clip(k)))        (values: quantise(clip(v)))

clip limits to [−clip, clip] (MPT's clip_qkv); rope is the half rotation of rope.py at ``positions``; quantise
divides by the head's scale and rounds to the page's type (fp8-e4m3, or int8 to nearest even), saturating. Slot
−1 writes nothing. Without scales the values are cast. The rotated key is rounded to k's own type first, so the
fused form gives the same bits as rope followed by a plain write.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import cpu_attention
from .dispatch import bad_argument, choose_backend, tl, triton
from .spec import Case, CompileCase, KernelSpec

OP = "kv_write"


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [T,N,D] rotated by the angles of its positions, in fp32, returned in x's type."""
    cos, sin = cos[positions].to(torch.float32)[:, None], sin[positions].to(torch.float32)[:, None]
    low, high = x.to(torch.float32).chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


def quantise_like(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """x [T,K,D] in the cache's type: divided by scale [K], rounded to nearest even, saturated."""
    if scale is None and dtype not in (torch.int8, torch.float8_e4m3fn):
        return x.to(dtype)
    x = x.to(torch.float32)
    if scale is not None:
        x = x / scale.to(torch.float32)[:, None]
    if dtype == torch.int8:
        return x.round().clamp(-127, 127).to(dtype)
    if dtype == torch.float8_e4m3fn:
        return x.clamp(-448, 448).to(dtype)
    return x.to(dtype)


def kv_write_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    clip: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """The readable truth, and quick enough to be the CPU's backend: one gather-free scatter."""
    if clip is not None:
        k, v = k.clamp(-clip, clip), v.clamp(-clip, clip)
    if cos is not None and sin is not None and positions is not None:
        k = rotate_half(k, cos, sin, positions)
    keep = slots >= 0
    if not bool(keep.all()):
        k, v, slots = k[keep], v[keep], slots[keep]
    _scatter(k_cache, slots, quantise_like(k, k_cache.dtype, k_scale))
    _scatter(v_cache, slots, quantise_like(v, v_cache.dtype, v_scale))


def _scatter(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor) -> None:
    if cache.dtype == torch.float8_e4m3fn:  # index_put has no fp8 kernel on the CPU; the bytes are the same
        cache, x = cache.view(torch.uint8), x.view(torch.uint8)
    page_size = cache.shape[1]
    cache[slots // page_size, slots % page_size] = x


@triton.jit
def _quantise(x, scale, KIND: tl.constexpr, HAS_SCALE: tl.constexpr):
    """fp32 values as the cache stores them; KIND 0 casts, 1 is int8, 2 is fp8-e4m3."""
    if HAS_SCALE:
        x = tl.math.div_rn(x, scale)
    if KIND == 1:
        # Adding and taking away 1.5·2²³ rounds to nearest even; larger values are clamped before.
        x = tl.minimum(tl.maximum(x, -127.0), 127.0)
        x = (x + 12582912.0) - 12582912.0
    if KIND == 2:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    return x


@triton.jit(do_not_specialize=["clip"])
def kv_write_kernel(
    k, v, k_cache, v_cache, slots, cos, sin, positions, k_scales, v_scales,
    k_stride, k_head, v_stride, v_head, k_page, k_slot, k_cache_head, v_page, v_slot, v_cache_head, cos_stride, clip,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr,
    HAS_ROPE: tl.constexpr, HAS_CLIP: tl.constexpr, HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr,
):  # fmt: skip
    """One token, BLOCK_K heads. Each half of the head dim is a tile, so that a rotation pair meets in one thread."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    page = slot // PAGE_SIZE
    in_page = slot % PAGE_SIZE
    heads = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    HALF_DIM: tl.constexpr = (HEAD_DIM + 1) // 2
    dims = tl.arange(0, HALF)
    low_in = (heads < NUM_KV_HEADS)[:, None] & (dims < HALF_DIM)[None, :]
    high_in = (heads < NUM_KV_HEADS)[:, None] & (dims + HALF_DIM < HEAD_DIM)[None, :]
    k_row = k + token * k_stride + heads[:, None] * k_head + dims[None, :]
    v_row = v + token * v_stride + heads[:, None] * v_head + dims[None, :]
    k_low = tl.load(k_row, mask=low_in, other=0.0).to(tl.float32)
    k_high = tl.load(k_row + HALF_DIM, mask=high_in, other=0.0).to(tl.float32)
    v_low = tl.load(v_row, mask=low_in, other=0.0).to(tl.float32)
    v_high = tl.load(v_row + HALF_DIM, mask=high_in, other=0.0).to(tl.float32)
    if HAS_CLIP:
        k_low = tl.minimum(tl.maximum(k_low, -clip), clip)
        k_high = tl.minimum(tl.maximum(k_high, -clip), clip)
        v_low = tl.minimum(tl.maximum(v_low, -clip), clip)
        v_high = tl.minimum(tl.maximum(v_high, -clip), clip)
    if HAS_ROPE:
        position = tl.load(positions + token)
        c = tl.load(cos + position * cos_stride + dims, mask=dims < HALF_DIM, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + position * cos_stride + dims, mask=dims < HALF_DIM, other=0.0).to(tl.float32)[None, :]
        rotated = k_low * c - k_high * s
        k_high = (k_high * c + k_low * s).to(k.dtype.element_ty).to(tl.float32)
        k_low = rotated.to(k.dtype.element_ty).to(tl.float32)
    k_scale = 1.0
    v_scale = 1.0
    if HAS_K_SCALE:
        k_scale = tl.load(k_scales + heads, mask=heads < NUM_KV_HEADS, other=1.0)[:, None]
    if HAS_V_SCALE:
        v_scale = tl.load(v_scales + heads, mask=heads < NUM_KV_HEADS, other=1.0)[:, None]
    k_out = k_cache + page * k_page + in_page * k_slot + heads[:, None] * k_cache_head + dims[None, :]
    v_out = v_cache + page * v_page + in_page * v_slot + heads[:, None] * v_cache_head + dims[None, :]
    store_type = k_cache.dtype.element_ty
    tl.store(k_out, _quantise(k_low, k_scale, KIND, HAS_K_SCALE).to(store_type), mask=low_in)
    tl.store(k_out + HALF_DIM, _quantise(k_high, k_scale, KIND, HAS_K_SCALE).to(store_type), mask=high_in)
    tl.store(v_out, _quantise(v_low, v_scale, KIND, HAS_V_SCALE).to(store_type), mask=low_in)
    tl.store(v_out + HALF_DIM, _quantise(v_high, v_scale, KIND, HAS_V_SCALE).to(store_type), mask=high_in)


def _launch(k, v, k_cache, v_cache, slots, cos, sin, positions, clip, k_scale, v_scale) -> None:
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    kind = {torch.int8: 1, torch.float8_e4m3fn: 2}.get(k_cache.dtype, 0)
    half = triton.next_power_of_2((head_dim + 1) // 2)
    block_k = min(triton.next_power_of_2(num_kv_heads), max(1, 2048 // half))
    kv_write_kernel[(num_tokens, triton.cdiv(num_kv_heads, block_k))](
        k, v, k_cache, v_cache, slots,
        cos if cos is not None else k, sin if sin is not None else k, positions if positions is not None else slots,
        k_scale if k_scale is not None else k, v_scale if v_scale is not None else k,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3],
        cos.stride(0) if cos is not None else 0, float(clip) if clip is not None else 0.0,
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, PAGE_SIZE=k_cache.shape[1], BLOCK_K=block_k, HALF=half,
        KIND=kind,
        HAS_ROPE=cos is not None, HAS_CLIP=clip is not None,
        HAS_K_SCALE=k_scale is not None, HAS_V_SCALE=v_scale is not None, num_warps=4,
        enable_fp_fusion=False,  # the same bits as rope, then a plain write
    )  # fmt: skip


def _check(k, v, k_cache, v_cache, slots, cos, sin, positions, clip, k_scale, v_scale) -> None:
    if k.dim() != 3 or v.shape != k.shape:
        raise bad_argument(OP, "k, v", f"of shapes {tuple(k.shape)} and {tuple(v.shape)}", "[T,K,D], both alike")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or cache.shape[2:] != k.shape[1:] or cache.shape != k_cache.shape:
            raise bad_argument(
                OP, name, f"of shape {tuple(cache.shape)}", f"[P,S,{k.shape[1]},{k.shape[2]}], both alike"
            )
        if cache.dtype != k_cache.dtype or (not cache.dtype.is_floating_point and cache.dtype != torch.int8):
            raise bad_argument(OP, name, cache.dtype, "float, float8_e4m3fn or int8, the same for keys and values")
        if cache.stride(-1) != 1:
            raise bad_argument(OP, name, f"of strides {cache.stride()}", "contiguous in the last dim")
    if slots.shape != (k.shape[0],) or slots.dtype != torch.int64:
        raise bad_argument(OP, "slots", f"{slots.dtype} {tuple(slots.shape)}", f"int64 ({k.shape[0]},)")
    if len({x is None for x in (cos, sin, positions)}) != 1:
        raise bad_argument(OP, "cos, sin, positions", "given in part", "all three or none")
    if cos is not None:
        if k.shape[2] % 2:
            raise bad_argument(OP, "k", f"of head dim {k.shape[2]}", "an even head dim with cos and sin")
        for name, table in (("cos", cos), ("sin", sin)):
            if table.dim() != 2 or table.shape[1] != k.shape[2] // 2 or table.stride() != cos.stride():
                raise bad_argument(OP, name, f"of shape {tuple(table.shape)}", f"[M,{k.shape[2] // 2}], both alike")
        if positions.shape != slots.shape or positions.dtype != torch.int64:
            raise bad_argument(OP, "positions", f"{positions.dtype} {tuple(positions.shape)}", f"int64 ({k.shape[0]},)")
    if clip is not None and not clip > 0:
        raise bad_argument(OP, "clip", clip, "None or a positive number")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and (scale.shape != (k.shape[1],) or scale.dtype != torch.float32):
            raise bad_argument(OP, name, f"{scale.dtype} {tuple(scale.shape)}", f"float32 ({k.shape[1]},)")
    tensors = {"v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": slots, "cos": cos, "k_scale": k_scale}
    for name, tensor in (tensors | {"v_scale": v_scale, "positions": positions}).items():
        if tensor is not None and tensor.device != k.device:
            raise bad_argument(OP, name, f"on {tensor.device}", f"{k.device}, as k")
    if not k.is_cuda and slots.numel():
        lowest, highest = int(slots.min()), int(slots.max())
        capacity = k_cache.shape[0] * k_cache.shape[1]
        if lowest < -1 or highest >= capacity:
            raise bad_argument(OP, "slots", f"from {lowest} to {highest}", f"−1 to {capacity - 1}")


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    clip: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Writes k and v [T,K,D] into k_cache and v_cache [P,S,K,D] at slots i64 [T] (slot = page·S + offset; −1 skips).

    With cos and sin f32 [M,D/2] and positions i64 [T], k is rotated first. Slots must differ from each other.
    No gradient. Raises ValueError for arguments that do not fit, before anything is written.
    """
    _check(k, v, k_cache, v_cache, slots, cos, sin, positions, clip, k_scale, v_scale)
    cpu_default = cpu_attention.default_backend(k, k_cache, k_scale, v_scale)
    chosen = choose_backend(OP, k, backend, ("triton", "torch", "cpp"), cpu_default)
    if chosen == "cpp":
        return cpu_attention.kv_write(
            k.detach(), v.detach(), k_cache, v_cache, slots, cos, sin, positions, clip, k_scale, v_scale
        )
    k, v = k.detach(), v.detach()
    if chosen == "triton":
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        _launch(k, v, k_cache, v_cache, slots, cos, sin, positions, clip, k_scale, v_scale)
        return
    kv_write_reference(
        k,
        v,
        k_cache,
        v_cache,
        slots,
        cos=cos,
        sin=sin,
        positions=positions,
        clip=clip,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """T tokens for random slots of P pages; "skip" of them go nowhere."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads, head_dim, pages, size = case["T"], case["K"], case["D"], case["P"], case["S"]
    cache_dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(case.get("cache", ""), dtype)
    slots = torch.randperm(pages * size, generator=generator)[:tokens]
    slots[: case.get("skip", 0)] = -1
    inputs: dict[str, Any] = {
        name: torch.randn((tokens, heads, head_dim), generator=generator).to(device, dtype) for name in ("k", "v")
    }
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.zeros((pages, size, heads, head_dim), device=device, dtype=torch.float32).to(cache_dtype)
    inputs["slots"] = slots.to(device)
    if case.get("rope"):
        angles = torch.rand((64, head_dim // 2), generator=generator).to(device)
        positions = torch.randint(0, 64, (tokens,), generator=generator).to(device)
        inputs |= {"cos": torch.cos(angles), "sin": torch.sin(angles), "positions": positions}
    if case.get("clip"):
        inputs["clip"] = case["clip"]
    if case.get("cache"):
        scales = torch.rand((2, heads), generator=generator).mul_(0.02).add_(0.01).to(device)
        inputs |= {"k_scale": scales[0], "v_scale": scales[1]}
    return inputs


def _returning(function: Callable[..., None]) -> Callable[..., torch.Tensor]:
    """``function`` on copies of the caches, returning what is in them afterwards, in fp32."""

    def run(**inputs: Any) -> torch.Tensor:
        caches = {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
        function(**(inputs | caches))
        return torch.stack([cache.to(torch.float32) for cache in caches.values()])

    return run


def _bytes(case: Case) -> int:
    """Keys and values in and out (the bench's copy of the caches is not counted)."""
    width = 1 if case.get("cache") else 2
    return 2 * (2 + width) * case["T"] * case["K"] * case["D"] + 8 * case["T"]


def _compile_cases(target: int) -> list[CompileCase]:
    cases = []
    for name, cache, kind, rope in (
        ("bf16 rope", "bf16", 0, True),
        ("fp8", "fp8e4nv", 2, False),
        ("int8", "i8", 1, True),
    ):
        if cache == "fp8e4nv" and target < 89:
            continue
        constants = {
            "NUM_KV_HEADS": 32, "HEAD_DIM": 128, "PAGE_SIZE": 16, "BLOCK_K": 32, "HALF": 64, "KIND": kind,
            "HAS_ROPE": rope, "HAS_CLIP": not rope, "HAS_K_SCALE": kind > 0, "HAS_V_SCALE": kind > 0,
        }  # fmt: skip
        kinds = {"k": "*bf16", "v": "*bf16", "k_cache": f"*{cache}", "v_cache": f"*{cache}", "clip": "fp32"}
        kinds |= dict.fromkeys(("slots", "positions"), "*i64")
        kinds |= dict.fromkeys(("cos", "sin", "k_scales", "v_scales"), "*fp32")
        signature = {n: kinds.get(n, "i32") for n in kv_write_kernel.arg_names if n not in constants}
        attrs = {n: 16 for n, kind_ in signature.items() if kind_ == "i32"}
        cases.append(CompileCase(name, kv_write_kernel, signature, constants, attrs=attrs))
    return cases


SPEC = KernelSpec(
    op=OP,
    run=_returning(kv_write),
    reference=_returning(kv_write_reference),
    make_inputs=_make_inputs,
    test_cases=(
        {"T": 1, "K": 1, "D": 16, "P": 1, "S": 16},
        {"T": 13, "K": 3, "D": 112, "P": 4, "S": 16, "rope": True, "clip": 1.0, "skip": 2},
        {"T": 33, "K": 8, "D": 64, "P": 3, "S": 32, "rope": True},
        {"T": 7, "K": 1, "D": 7, "P": 2, "S": 16, "clip": 0.5},
        {"T": 20, "K": 2, "D": 40, "P": 2, "S": 256, "cache": "int8", "rope": True},
        {"T": 0, "K": 2, "D": 32, "P": 1, "S": 16},
    ),
    bench_cases=(
        {"model": "MPT-7B", "T": 8192, "K": 32, "D": 128, "P": 150, "S": 64, "clip": 8.0, "check": "reference"},
        {"model": "Llama-8B", "T": 8192, "K": 8, "D": 128, "P": 150, "S": 64, "rope": True, "check": "reference"},
        {"model": "MPT-7B fp8", "T": 8192, "K": 32, "D": 128, "P": 150, "S": 64, "cache": "fp8", "check": "reference"},
    ),
    bytes=_bytes,
    flops=lambda case: 0,
    compile_cases=_compile_cases,
)
