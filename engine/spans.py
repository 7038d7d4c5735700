"""Named parts of a step, for whoever watches: the profiler passes `recorded_span` in, everyone else pays nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

Span = Callable[[str], AbstractContextManager[Any]]
_NOTHING = nullcontext()


def no_span(name: str) -> AbstractContextManager[Any]:
    """The default: nothing is recorded."""
    return _NOTHING


@contextmanager
def recorded_span(name: str) -> Iterator[None]:
    """Shows as a range ``name`` in torch.profiler's trace, and with CUDA as an NVTX range (Nsight Systems)."""
    nvtx = torch.cuda.is_available()
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()
