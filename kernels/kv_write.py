"""Scatters a step's keys and values into the pages of the KV cache.

    cache[slot // S, slot % S] = quantise(rope(clip(k)))        (values: quantise(clip(v)))

clip limits to [−clip, clip] (MPT's clip_qkv); rope is the half rotation of rope.py at ``positions``; quantise divides by the head's scale
and rounds to the page's type (fp8-e4m3, or int8 to nearest even), saturating. Slot −1 writes nothing. Without scales the values are cast.
"""

from __future__ import annotations

import torch

from .dispatch import choose_backend

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
    """Writes k and v [T,K,D] into k_cache and v_cache [P,S,K,D] at slots i64 [T] (slot = page·S + offset; −1 skips the token).

    With cos and sin f32 [M,D/2] and positions i64 [T], k is rotated first. Slots must differ from each other. No gradient.
    """
    choose_backend(OP, k, backend, ("torch",))
    kv_write_reference(
        k.detach(), v.detach(), k_cache, v_cache, slots, cos=cos, sin=sin, positions=positions, clip=clip,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
