"""Reads a Chrome trace of torch.profiler: whose time it was, on the host's thread and on the device."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from specialize.errors import InputError

WORKLOAD = "workload"
_STEP = {
    "schedule": "schedule", "build": "build batch", "forward": "model, the rest", "model": "model, the rest",
    "sample": "sampling", "wait": "wait for tokens", "commit": "commit", "step": "update, the rest",
    WORKLOAD: "host gaps",
}  # fmt: skip
_BACKWARD = "autograd::engine::evaluate_function: "
# First hit counts; autograd's names on a CPU, kernels' on a GPU.
_AUTOGRAD = (
    ("crossentropy", "loss"), ("norm", "norm backward"), ("attention", "attention backward"),
    ("rope", "attention backward"), ("clamp", "attention backward"), ("swiglu", "activation backward"),
    ("gelu", "activation backward"), ("lora", "linear backward"), ("linear", "linear backward"),
    ("mm", "linear backward"),
)  # fmt: skip
_KERNELS = (
    ("attention", "attention"), ("flash", "attention"), ("fmha", "attention"), ("kv_write", "attention"),
    ("rope", "attention"), ("norm", "norm"), ("swiglu", "activation"), ("gelu", "activation"), ("silu", "activation"),
    ("loss", "loss"), ("cross_entropy", "loss"), ("sampl", "sampling"), ("draw", "sampling"), ("sort", "sampling"),
    ("topk", "sampling"), ("argmax", "sampling"), ("softmax", "sampling"), ("gemm", "linear"), ("nvjet", "linear"),
    ("cutlass", "linear"), ("lora", "linear"), ("quantized", "linear"), ("nf4", "linear"), ("gemv", "linear"),
    ("splitk", "linear"), ("adam", "optimizer"), ("memcpy", "copies"), ("memset", "copies"),
)  # fmt: skip
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The trace's complete events (microseconds). Raises InputError for what is no trace."""
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no Chrome trace ({error})") from None
    return [e for e in events if e.get("ph") == "X"]


def group_of(name: str) -> str | None:
    """The group of a host range, None for what belongs to the range around it."""
    if name.startswith("op:"):
        return name[3:]
    if name.startswith(_BACKWARD):
        return _first(_AUTOGRAD, name[len(_BACKWARD) :], "backward, the rest")
    if name.startswith("Optimizer.step"):
        return "optimizer"
    return _STEP.get(name)


def host_groups(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by group within the workload's range; every moment belongs to the innermost named range.

    The ranges of the thread that ran the workload count; on a CPU autograd works in that thread, too.
    """
    named = [e for e in events if e.get("cat") in ("user_annotation", "cpu_op") and group_of(e["name"]) is not None]
    works = [e for e in named if e["name"] == WORKLOAD]
    if not works:
        raise InputError(f"the trace has no range {WORKLOAD!r}; write it with `specialize profile`")
    work = works[0]
    end = work["ts"] + work["dur"]
    mine = [e for e in named if e["tid"] == work["tid"] and work["ts"] <= e["ts"] <= end]
    mine.sort(key=lambda e: (e["ts"], -e["dur"]))
    seconds: dict[str, float] = defaultdict(float)
    open_ranges: list[tuple[float, str]] = []  # (end, group), innermost last
    now = work["ts"]

    def advance(to: float) -> None:
        nonlocal now
        while open_ranges and open_ranges[-1][0] <= to:
            stop, group = open_ranges.pop()
            if stop > now:
                seconds[group] += (stop - now) / 1e6
                now = stop
        if open_ranges and to > now:
            seconds[open_ranges[-1][1]] += (to - now) / 1e6
            now = to

    for event in mine:
        advance(event["ts"])
        outer = open_ranges[-1][0] if open_ranges else end
        group = group_of(event["name"])
        assert group is not None
        open_ranges.append((min(event["ts"] + event["dur"], outer), group))
    advance(end)
    return dict(seconds)


def device_groups(events: Iterable[Mapping[str, Any]]) -> tuple[dict[str, float], float, float]:
    """(seconds by group of kernels, seconds in which the device did anything, seconds from first to last of these)."""
    kernels = sorted((e for e in events if e.get("cat") in _DEVICE), key=lambda e: e["ts"])
    seconds: dict[str, float] = defaultdict(float)
    busy, until = 0.0, float("-inf")
    for event in kernels:
        start, stop = event["ts"], event["ts"] + event["dur"]
        name = event["name"] if event["cat"] == "kernel" else "memcpy"
        seconds[_first(_KERNELS, name, "other kernels")] += event["dur"] / 1e6
        busy += max(stop - max(start, until), 0.0) / 1e6
        until = max(until, stop)
    return dict(seconds), busy, (until - kernels[0]["ts"]) / 1e6 if kernels else 0.0


def _first(table: Iterable[tuple[str, str]], name: str, otherwise: str) -> str:
    name = name.lower()
    return next((group for part, group in table if part in name), otherwise)
