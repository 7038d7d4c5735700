"""What a kernel file says of its op, so that one set of tests and one benchmark serve all ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Case = Mapping[str, Any]


@dataclass(frozen=True)
class CompileCase:
    """One shipped configuration of one Triton kernel, enough to compile it for a target without a device.

    ``signature`` maps argument names to Triton types ("*bf16", "i32", "fp32"); ``constexprs`` the rest. ``hot`` kernels
    must not spill. ``gemm`` kernels must use the target's matrix instruction (wgmma on 90, tcgen05 on 100). Pointers
    are taken as 16-byte aligned; ``attrs`` maps integer arguments to what divides them (``{"stride": 16}``).
    ``options`` are further compiler options, such as ``maxnreg``.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    hot: bool = True
    gemm: bool = False
    attrs: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[int, ...] = (80, 90, 100)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelSpec:
    """An op: how to run it, what is right, and the bytes and operations it cannot do without.

    ``make_inputs(case, device, dtype, seed)`` returns the keyword arguments that ``run`` and ``reference`` both take.
    ``run`` also takes ``backend``. ``saved``, where set, is the argument by which ``reference`` takes the first output
    of ``run`` for its backward pass: where gradients are a function of the output as it was rounded, they are judged
    at that output, and the output on its own. ``peers`` maps a name to a function
    of the same inputs, timed beside ours.
    ``compile_cases(target)`` lists the shipped configurations for compute capability ``target`` (80, 90, 100).
    ``tuning(case)`` gives the shape bucket and the configurations worth timing for it (see tuning.py), where there
    are any.
    """

    op: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[..., dict[str, Any]]
    test_cases: tuple[Case, ...]
    bench_cases: tuple[Case, ...]
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    compile_cases: Callable[[int], list[CompileCase]]
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    row_invariant: bool = True
    saved: str | None = None
    tuning: Callable[[Case], tuple[str, list[dict[str, Any]]]] | None = None
