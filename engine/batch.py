"""What one forward pass works on: flat tokens of several sequences, and where each sequence starts.

`Batch` is the same for training, scoring, embedding, prefill and decode. `upload` is the sole host-to-device copy.
Shape letters: T tokens, B sequences, N pages in the widest page table row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """Tensors lie on the model's device; the plain integers stay on the host so that no kernel launch waits.

    Sequence b owns tokens ``query_starts[b]:query_starts[b+1]``, the last ones of its ``context_lens[b]`` tokens. The
    first ``num_decodes`` sequences have exactly one token. Without a cache, ``slots`` and ``page_table`` are None and
    every context is its own query. ``adapter_index`` is -1 where a sequence uses the base alone.
    ``shared_prefix_len`` tokens (whole pages) at the start are common to all sequences.
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
    shared_prefix_len: int = 0

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


def upload(arrays: Mapping[str, np.ndarray], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Moves all arrays in one copy; the tensors returned are views of one buffer, each 8-byte aligned.

    The arrays are read before the function returns, so the caller may reuse them.
    """
    offsets, total = {}, 0
    for name, array in arrays.items():
        offsets[name] = total
        total += (array.nbytes + 7) & ~7
    device = torch.device(device)
    staging = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = staging.numpy()
    for name, array in arrays.items():
        start = offsets[name]
        host[start : start + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
    buffer = staging.to(device, non_blocking=True) if device.type != "cpu" else staging
    tensors = {}
    for name, array in arrays.items():
        start = offsets[name]
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        tensors[name] = buffer[start : start + array.nbytes].view(dtype).view(array.shape)
    return tensors
