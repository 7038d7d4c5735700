"""What one forward pass works on: flat tokens of several sequences, and where each sequence starts.

`Batch` is the same for training, scoring, embedding, prefill and decode. `upload` is the sole host-to-device copy.
Shape letters: T tokens, B sequences, N pages in the widest page table row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from .rows import DecodeSet, Rows, StepPlan


# What `kernels.sampling.sample` takes for a row, beside its repetition penalty.
DRAW_SETTINGS = ("keys", "steps", "temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Batch:
    """Tensors lie on the model's device; the plain integers stay on the host so that no kernel launch waits.

    Sequence b owns tokens ``query_starts[b]:query_starts[b+1]``, the last ones of its ``context_lens[b]`` tokens. The
    first ``num_decodes`` sequences have exactly one token. Without a cache, ``slots`` and ``page_table`` are None and
    every context is its own query. ``adapter_index`` is -1 where a sequence uses the base alone.
    Decodes ``prefix_groups[g]:prefix_groups[g+1]`` have their first ``prefix_lens`` tokens (whole pages) in the same
    pages; ``max_prefix_len`` 0: nothing is said to be shared.
    """

    token_ids: torch.Tensor  # i64[T]
    positions: torch.Tensor  # i64[T]
    query_starts: torch.Tensor  # i32[B+1]
    context_lens: torch.Tensor  # i32[B]
    max_query_len: int
    max_context_len: int
    num_decodes: int = 0
    slots: torch.Tensor | None = None  # i64[T], page * page_size + offset; -1 is skipped
    page_table: torch.Tensor | None = None  # i32[B,N]
    adapter_index: torch.Tensor | None = None  # i32[B]
    prefix_groups: torch.Tensor | None = None  # i32[G+1], over the decodes
    prefix_lens: torch.Tensor | None = None  # i32[num_decodes]
    max_prefix_len: int = 0

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.context_lens.shape[0]

    @staticmethod
    def packed(
        sequences: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        *,
        adapter_index: Sequence[int] | None = None,
    ) -> Batch:
        """A batch without a cache: each list of token ids is one whole sequence, starting at position 0."""
        lens = np.fromiter((len(s) for s in sequences), np.int32, count=len(sequences))
        starts = np.zeros(len(sequences) + 1, np.int32)
        np.cumsum(lens, out=starts[1:])
        total = int(starts[-1])
        arrays = {
            "token_ids": np.fromiter((t for s in sequences for t in s), np.int64, count=total),
            "positions": np.arange(total, dtype=np.int64) - np.repeat(starts[:-1], lens).astype(np.int64),
            "query_starts": starts,
            "context_lens": lens,
        }
        if adapter_index is not None:
            arrays["adapter_index"] = np.asarray(adapter_index, np.int32)
        tensors = upload(arrays, device)
        longest = int(lens.max(initial=0))
        return Batch(
            token_ids=tensors["token_ids"],
            positions=tensors["positions"],
            query_starts=tensors["query_starts"],
            context_lens=tensors["context_lens"],
            adapter_index=tensors.get("adapter_index"),
            max_query_len=longest,
            max_context_len=longest,
        )


def decode_step(plan: StepPlan, rows: Rows) -> dict[str, np.ndarray]:
    """What is new about a step's decodes since the one before, by the names of `Batch` and of `sample`; and ``pages``
    i32, those that their tokens go to. The base's come last."""
    at, twins = plan.decode_at, plan.decode_set.twins
    steps = at + 1 - plan.decode_set.settings.num_prompt
    if len(twins):
        at = np.append(at, at[twins])
    page_ids, offsets = np.divmod(at, rows.page_size)
    pages = rows.page_table[plan.decode_set.table_rows, page_ids]
    return {
        "token_ids": rows.tokens[plan.decode_set.token_rows, at],
        "positions": at,
        "slots": pages.astype(np.int64) * rows.page_size + offsets,
        "context_lens": at + 1,
        "steps": steps,
        "pages": pages,
    }


def prefix_arrays(decodes: DecodeSet, page_size: int) -> dict[str, np.ndarray]:
    """The groups of `Batch`, where prefixes are shared. The base's decodes are each a group of its own."""
    if decodes.prefixes is None:
        return {}
    alone = np.arange(len(decodes.rows) + 1, len(decodes.table_rows) + 1, dtype=np.int32)
    lens = np.append(decodes.prefixes.lens, np.zeros(len(alone), np.int32))
    return {
        "prefix_groups": np.append(decodes.prefixes.starts, alone),
        "prefix_lens": lens * np.int32(page_size),
    }


def contrast_arrays(plan: StepPlan, rows: Rows, at: np.ndarray) -> dict[str, np.ndarray]:
    """Settings of the draws ``at`` that the base runs beside."""
    ids = plan.sampled_rows[at]
    return {"contrast_at": at, "contrast": rows.contrast[ids], "contrast_floor": rows.contrast_floor[ids]}


def build_step(plan: StepPlan, rows: Rows, device: torch.device | str) -> tuple[Batch, dict[str, torch.Tensor]]:
    """The batch of one generation step, and the sampled rows' settings by name, all in one copy.

    In the settings, ``last`` i64 are the flat indices of the hidden states that give a token, ``sampled_rows`` i64
    their sequences' rows, ``decode_rows`` i64 those of the decodes. Token ids of decodes are `UNKNOWN` where the step
    before has them. The base's rows of contrasted sequences hold the same tokens on pages of their own; ``last`` ends
    with those that go with the draws ``contrast_at`` i64.
    """
    size, decodes = rows.page_size, plan.decode_set
    num_alone, num_decodes = len(decodes.rows), len(decodes.table_rows)
    # Chunks; then those of the base beside them, of the same tokens on its own pages.
    twinned = [c for c in plan.chunks if c.sequence.twin_row >= 0]
    chunks = [(c.sequence.row, c.sequence.row, c.start, c.stop, c.num_draws) for c in plan.chunks]
    chunks += [(c.sequence.row, c.sequence.twin_row, c.start, c.stop, c.num_draws) for c in twinned]
    token_rows, table_rows, begins, stops, draws = np.asarray(chunks, np.int64).reshape(-1, 5).T
    lens = stops - begins
    ends = num_decodes + np.cumsum(lens)
    token_ids, positions, slots = np.empty((3, num_decodes + int(lens.sum())), np.int64)
    where = np.arange(num_decodes, len(positions)) + np.repeat(stops - ends, lens)
    positions[num_decodes:] = where
    token_ids[num_decodes:] = rows.tokens[np.repeat(token_rows, lens), where]
    page_ids = where // size
    pages = rows.page_table[np.repeat(table_rows, lens), page_ids].astype(np.int64)
    slots[num_decodes:] = where + (pages - page_ids) * size
    contexts = np.empty(num_decodes + len(chunks), np.int32)
    contexts[num_decodes:] = stops
    if num_decodes:
        step = decode_step(plan, rows)
        token_ids[:num_decodes], positions[:num_decodes] = step["token_ids"], step["positions"]
        slots[:num_decodes], contexts[:num_decodes] = step["slots"], step["context_lens"]
    starts = np.concatenate((np.arange(num_decodes + 1), ends)).astype(np.int32)
    table_rows = np.concatenate((decodes.table_rows, table_rows))

    num_chunk_draws = np.cumsum(draws)
    drawing = np.repeat(ends - num_chunk_draws, draws) + np.arange(draws.sum())
    num_own = int(draws[: len(plan.chunks)].sum())
    last = (np.arange(num_alone), drawing[:num_own], np.arange(num_alone, num_decodes), drawing[num_own:])

    max_context_len = int(contexts.max())
    arrays = {
        **prefix_arrays(decodes, size),
        **plan.settings.arrays,
        "token_ids": token_ids,
        "positions": positions,
        "slots": slots,
        "last": np.concatenate(last),
        "decode_rows": decodes.token_rows,
        "sampled_rows": plan.sampled_rows,
        "steps": plan.sampled_at - plan.settings.num_prompt,
        "query_starts": starts,
        "context_lens": contexts,
        "page_table": rows.page_table[table_rows, : -(-max_context_len // size)],
        "adapter_index": rows.adapter_id[table_rows],
    }
    if plan.has_twins:
        beside = np.repeat([c.sequence.twin_row >= 0 for c in plan.chunks], draws[: len(plan.chunks)])
        contrast_at = np.concatenate((decodes.twins, num_alone + np.flatnonzero(beside)))
        arrays |= contrast_arrays(plan, rows, contrast_at)
    has_adapters = bool((arrays["adapter_index"] >= 0).any())
    tensors = upload(arrays, device)
    batch = Batch(
        token_ids=tensors.pop("token_ids"),
        positions=tensors.pop("positions"),
        query_starts=tensors.pop("query_starts"),
        context_lens=tensors.pop("context_lens"),
        max_query_len=int(lens.max(initial=1)),
        max_context_len=max_context_len,
        num_decodes=num_decodes,
        slots=tensors.pop("slots"),
        page_table=tensors.pop("page_table"),
        adapter_index=tensors.pop("adapter_index") if has_adapters else None,
        prefix_groups=tensors.pop("prefix_groups", None),
        prefix_lens=tensors.pop("prefix_lens", None),
        max_prefix_len=0 if plan.prefixes is None else plan.prefixes.longest * size,
    )
    return batch, tensors


def pack_draws(token_ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Token ids i64 [N] and log-probabilities f32 [N] in one tensor i32 [3N], to be copied at once."""
    return torch.cat((token_ids.view(torch.int32), logprobs.view(torch.int32)))


def unpack_draws(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of what `pack_draws` packed."""
    ids, logprobs = packed.split((packed.shape[0] // 3 * 2, packed.shape[0] // 3))
    return ids.view(torch.int64), logprobs.view(torch.float32)


_TORCH_DTYPES = {
    np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
}  # fmt: skip
# Kernels are compiled anew for pointers that 16 does not divide.
_ALIGNMENT_BYTES = 16


class Layout:
    """Where arrays of these dtypes (i64, i32, f32 or bool) and shapes lie in one buffer of bytes, each aligned."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        by_dtype: dict[np.dtype, list[str]] = {}
        for name, array in arrays.items():
            by_dtype.setdefault(array.dtype, []).append(name)
        self._shapes = {name: array.shape for name, array in arrays.items()}
        self._parts: list[tuple[np.dtype, list[str], list[int], slice]] = []
        self.num_bytes = 0
        for dtype, names in by_dtype.items():
            unit = _ALIGNMENT_BYTES // dtype.itemsize
            sizes = [size for name in names for size in (arrays[name].size, -arrays[name].size % unit)]  # and padding
            begin, self.num_bytes = self.num_bytes, self.num_bytes + sum(sizes) * dtype.itemsize
            self._parts.append((dtype, names, sizes, slice(begin, self.num_bytes)))

    def arrays(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Views of a buffer u8 on the host, by name."""
        views = {}
        for dtype, names, sizes, place in self._parts:
            part, at = buffer[place].view(dtype), 0
            for name, size, padding in zip(names, sizes[::2], sizes[1::2], strict=True):
                views[name] = part[at : at + size].reshape(self._shapes[name])
                at += size + padding
        return views

    def tensors(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of a buffer u8 on any device, by name."""
        views = {}
        for dtype, names, sizes, place in self._parts:
            pieces = buffer[place].view(_TORCH_DTYPES[dtype]).split(sizes)[::2]
            for name, piece in zip(names, pieces, strict=True):
                shape = self._shapes[name]
                views[name] = piece if len(shape) == 1 else piece.view(shape)
        return views


def upload(arrays: Mapping[str, np.ndarray], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Moves all arrays (i64, i32, f32 or bool) in one copy; the tensors returned are aligned views of one buffer.

    The arrays are read before the function returns, so the caller may reuse them.
    """
    layout, device = Layout(arrays), torch.device(device)
    staging = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for name, view in layout.arrays(staging.numpy()).items():
        view[...] = arrays[name]
    return layout.tensors(staging.to(device, non_blocking=True) if device.type != "cpu" else staging)
