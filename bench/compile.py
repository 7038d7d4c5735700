"""Compiles every shipped kernel configuration for GPUs that need not be present, and reads what the compiler made of
it.

Registers, shared memory against the device's limit, spills and the matrix instructions come from the cubin and the
PTX, through the ``cuobjdump`` inside the triton wheel. Kernels imported under the interpreter cannot be compiled, so
the work runs in child processes without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import kernels
from ..kernels import tuning
from ..kernels.spec import CompileCase, KernelSpec

TARGETS = (80, 90, 100)
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
NUM_WORKERS = 2


def kernel_specs() -> dict[str, KernelSpec]:
    """Every KernelSpec defined in a module of the kernels package, by op, in the order of module names."""
    found: dict[str, KernelSpec] = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, KernelSpec):
                other = found.setdefault(value.op, value)
                if other is not value:
                    raise ValueError(f"two kernel specifications are called {value.op!r}")
    return found


def _tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.is_file() else name


def _run_tool(name: str, *arguments: str) -> str:
    return subprocess.run([_tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def _compile(case: CompileCase, target: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if type(case.kernel).__name__ == "GluonJITFunction":
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource

    names = case.kernel.arg_names
    unknown = (set(case.signature) | set(case.constexprs)) ^ set(names)
    if unknown:
        raise ValueError(
            f"signature and constexprs differ from the kernel's arguments in: {', '.join(sorted(unknown))}"
        )
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    divisors = {name: 16 for name, kind in case.signature.items() if kind.startswith("*")} | dict(case.attrs)
    attrs = {(names.index(name),): [["tt.divisibility", divisor]] for name, divisor in divisors.items()}
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constexprs), attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def compile_row(op: str, case: CompileCase, target: int) -> dict[str, Any]:
    """One line of the table. ``problems`` lists what must not be; an empty list is a pass."""
    row: dict[str, Any] = {"op": op, "case": case.name, "target": target, "hot": case.hot, "gemm": case.gemm}
    problems: list[str] = []
    try:
        made = _compile(case, target)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(made.asm["cubin"])
            usage = _run_tool("cuobjdump", "-res-usage", str(cubin))
            code = _run_tool("cuobjdump", "-sass", str(cubin))
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is this row's finding
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        return row | {"problems": [f"{type(error).__name__}: {reason}"[:400]]}
    figures = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = made.asm["ptx"]
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    row |= {
        "num_warps": made.metadata.num_warps,
        "num_stages": case.num_stages,
        "registers": figures.get("REG", 0),
        "shared_bytes": int(made.metadata.shared),
        "stack_bytes": figures.get("STACK", 0),
        "spill_instructions": spills,
        "matrix": next((m for m in ("wgmma", "tcgen05.mma", "mma.sync") if m in ptx), None),
        "tma": "cp.async.bulk.tensor" in ptx,
    }
    limit = SHARED_LIMIT_BYTES.get(target, SHARED_LIMIT_BYTES[100])
    if row["shared_bytes"] > limit:
        problems.append(f"{row['shared_bytes']} bytes of shared memory; the device has {limit}")
    if case.hot and spills:
        problems.append(f"{spills} local-memory instructions")
    if case.gemm and not (row["matrix"] or "").startswith(MATRIX_INSTRUCTION.get(target, "")):
        problems.append(f"matrix instruction {row['matrix']}; expected {MATRIX_INSTRUCTION[target]}")
    return row | {"problems": problems}


def _jobs(targets: Iterable[int], ops: Sequence[str] | None) -> list[tuple[str, CompileCase | Exception, int]]:
    """What to compile; an exception stands where an op could not list its cases."""
    specs = kernel_specs()
    if ops and (missing := sorted(set(ops) - set(specs))):
        raise ValueError(f"unknown op {', '.join(missing)}; allowed: {', '.join(specs)}")
    jobs: dict[tuple[Any, ...], tuple[str, CompileCase | Exception, int]] = {}
    for spec in (spec for op, spec in specs.items() if not ops or op in ops):
        for target in targets:
            # What runs on a device of this capability: its tuned configurations, and the defaults on one without a
            # file.
            for device in (*tuning.shipped_devices(target), ""):
                try:
                    with tuning.as_device(device):
                        cases = spec.compile_cases(target)
                except Exception as error:  # noqa: BLE001 - the table must name the op and go on
                    jobs[spec.op, target, device] = (spec.op, error, target)
                    continue
                for case in cases:
                    if target in case.targets:
                        settings = sorted({**case.constexprs, **case.options}.items(), key=str)
                        key = (spec.op, case.name, target, str(settings), case.num_warps, case.num_stages)
                        jobs.setdefault(key, (spec.op, case, target))
    return list(jobs.values())


def _worker(index: int, count: int, targets: Sequence[int], ops: Sequence[str] | None, limit: int | None) -> None:
    for op, case, target in _jobs(targets, ops)[index:limit:count]:
        if isinstance(case, Exception):
            failed = {"op": op, "case": "listing its cases", "target": target, "hot": True, "gemm": False}
            row = failed | {"problems": [f"{type(case).__name__}: {case}"[:400]]}
        else:
            row = compile_row(op, case, target)
        print(json.dumps(row), flush=True)


def compile_table(
    targets: Sequence[int] = TARGETS,
    ops: Sequence[str] | None = None,
    *,
    limit: int | None = None,
    num_workers: int = NUM_WORKERS,
) -> list[dict[str, Any]]:
    """Compiles every case of ``ops`` (all when None) for ``targets``; at most ``limit`` jobs. Rows as ``compile_row``
    makes them.

    A worker that dies leaves a row that says so: a crash of the compiler is a failure, not a gap.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, "--worker"]
    arguments = {"count": num_workers, "targets": list(targets), "ops": list(ops) if ops else None, "limit": limit}
    with contextlib.ExitStack() as stack:
        workers = []
        for index in range(num_workers):
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            call = [*command, json.dumps({"index": index, **arguments})]
            process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            workers.append((process, errors))
        rows = []
        for process, errors in workers:
            lines = process.communicate()[0].splitlines()
            rows += [json.loads(line) for line in lines if line.startswith("{")]
            if process.returncode:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["no message"])[-1]
                died = {"op": "?", "case": f"after {len(lines)} cases", "target": 0, "hot": True, "gemm": False}
                rows.append(died | {"problems": [f"compile worker ended with {process.returncode}: {last}"[:400]]})
    return sorted(rows, key=lambda row: (row["op"], row["case"], row["target"]))


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table as text, one line a row."""
    lines = [f"{'op':24}{'case':44}{'sm':>4}{'warps':>6}{'regs':>6}{'shared':>9}{'spills':>8}  {'matrix':12}problems"]
    for row in rows:
        lines.append(
            f"{row['op'][:23]:24}{row['case'][:43]:44}{row['target']:>4}{row.get('num_warps', ''):>6}"
            f"{row.get('registers', ''):>6}{row.get('shared_bytes', ''):>9}{row.get('spill_instructions', ''):>8}  "
            f"{row.get('matrix') or '':12}{'; '.join(row['problems'])}"
        )
    bad = sum(bool(row["problems"]) for row in rows)
    kernels_seen = len({(row["op"], row["case"]) for row in rows})
    lines.append(f"{len(rows)} compilations of {kernels_seen} configurations, {bad} with problems")
    return "\n".join(lines)


def compile_report(targets: Sequence[int], ops: Sequence[str] | None, json_path: Path | None) -> int:
    """Prints the table, writes it as JSON, returns the exit code: 1 where anything fails or a hot kernel spills."""
    import triton

    rows = compile_table(targets, ops)
    print(format_table(rows))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        body = {"triton": triton.__version__, "targets": list(targets), "rows": rows}
        json_path.write_text(json.dumps(body, indent=1) + "\n")
    return 1 if not rows or any(row["problems"] for row in rows) else 0


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    _worker(**json.loads(sys.argv[2]))
