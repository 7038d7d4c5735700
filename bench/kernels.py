"""Kernel benchmarks: each case is proved right, then timed beside its peers and its floor.

A case is a dict of a KernelSpec. Keys with a meaning here, all optional: ``pass`` "forward", "backward" or "both";
``dtype`` "bf16", "fp16" or "fp32"; ``model`` a label; ``priority`` (lower runs first); ``check_at`` overrides that
make the case small enough for the correctness check; ``check`` "reference" where no fp64 truth exists, with
``tolerance`` as the allowed worst-row error. Peers whose name starts with "floor:" are parts no version can do without.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch._functorch.config

from ..kernels import tuning
from ..kernels.spec import Case, KernelSpec
from .compile import TARGETS, compile_report, kernel_specs
from .environment import ceilings, environment, write_environment

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
META_KEYS = ("pass", "dtype", "model", "priority", "check_at", "check", "tolerance")
NO_DEVICE = (
    "kernel timings need a CUDA device and none is visible; without one, "
    "`specialize bench kernels --compile-only --targets 80,90,100` shows what the compiler makes of every kernel"
)


def _outputs_and_leaves(function: Callable[..., Any], inputs: dict[str, Any]):
    outputs = function(**inputs)
    outputs = [outputs] if torch.is_tensor(outputs) else [o for o in outputs if o is not None]
    leaves = [v for v in inputs.values() if torch.is_tensor(v) and v.requires_grad]
    return outputs, leaves


def _douts(outputs: Iterable[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Random output gradients, rounded to ``dtype`` first: what is compared must be given the same."""
    made = []
    for number, output in enumerate(outputs):
        generator = torch.Generator(device=output.device).manual_seed(number)
        made.append(
            torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32)
            .to(dtype or output.dtype)
            .to(output.dtype)
        )
    return made


def _results(
    function: Callable[..., Any], inputs: dict[str, Any], which: str, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Outputs, then (for a pass with a backward) the gradients of the inputs that want one."""
    outputs, leaves = _outputs_and_leaves(function, inputs)
    results = [o.detach() for o in outputs]
    if which != "forward":
        graded = [o for o in outputs if o.requires_grad]
        results += list(torch.autograd.grad(graded, leaves, _douts(graded, dtype), allow_unused=True))
    return results


def worst_row_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest ‖out - truth‖ / ‖truth‖ over rows; rows a thousand times smaller than the largest count as that small."""
    if out.shape != truth.shape:
        return math.inf
    if not out.is_floating_point():
        return 0.0 if torch.equal(out, truth) else math.inf
    out, truth = out.double(), truth.double()
    if out.dim() == 0:
        out, truth = out.reshape(1), truth.reshape(1)
    norms = truth.norm(dim=-1)
    worst = ((out - truth).norm(dim=-1) / norms.clamp(min=1e-3 * float(norms.max()) + 1e-30)).max()
    return math.inf if worst.isnan() else float(worst)


def _cloned(inputs: dict[str, Any]) -> dict[str, Any]:
    """Fresh tensors, for an op that may write to its arguments."""
    return {
        k: v.detach().clone().requires_grad_(v.requires_grad) if type(v) is torch.Tensor else v
        for k, v in inputs.items()
    }


def check(spec: KernelSpec, case: Case, seed: int = 0) -> tuple[float, float]:
    """``(error, allowed)`` of the worst row over outputs and gradients, at the result where error / allowed is
    largest."""
    small = {**case, **case.get("check_at", {})}
    which, dtype = small.get("pass", "forward"), DTYPES[small.get("dtype", "bf16")]
    inputs = spec.make_inputs(small, "cuda", dtype, seed)
    ours = _results(spec.run, _cloned(inputs), which, dtype)
    given = inputs | ({spec.saved: ours[0].detach()} if spec.saved else {})
    reference = _results(spec.reference, given, which, dtype)
    eps = torch.finfo(dtype).eps
    pairs = []
    if small.get("check") == "reference":
        allowed = small.get("tolerance", 4 * eps)
        pairs = [(worst_row_error(a, b), allowed) for a, b in zip(ours, reference, strict=True)]
    else:
        wide = {
            k: v.detach().double().requires_grad_(v.requires_grad)
            if torch.is_tensor(v) and v.is_floating_point()
            else v
            for k, v in given.items()
        }
        truth = _results(spec.reference, wide, which, dtype)
        for a, b, c in zip(ours, reference, truth, strict=True):
            if c is not None:
                pairs.append((worst_row_error(a, c), 2 * worst_row_error(b, c) + eps))
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def _timed(function: Callable[..., Any], inputs: dict[str, Any], which: str) -> Callable[[], Any]:
    if which == "forward":
        return lambda: function(**inputs)
    outputs, leaves = _outputs_and_leaves(function, inputs)
    first = [o for o in outputs if o.requires_grad]
    douts = _douts(first)
    if which == "backward":
        return partial(torch.autograd.grad, first, leaves, douts, retain_graph=True, allow_unused=True)

    def both():
        outputs, leaves = _outputs_and_leaves(function, inputs)
        return torch.autograd.grad([o for o in outputs if o.requires_grad], leaves, douts, allow_unused=True)

    return both


def _waits(run: Callable[[], Any], stream: torch.cuda.Stream) -> bool:
    """Whether the op waits for the device. A capture cannot, and one that fails keeps its memory for good."""
    try:
        with warnings.catch_warnings(), torch.cuda.stream(stream):
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
            run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return False


def measure(function: Callable[..., Any], inputs: dict[str, Any], which: str, rep_ms: int) -> dict[str, Any]:
    """Median, 20th and 80th percentile of device time in ms, the L2 cache emptied before each run.

    A CUDA graph is replayed, so that gaps between launches and the host's own work stay out of the time ("timed":
    "graph"); an op that cannot be captured, because it waits for the device, is called ("direct").
    """
    from triton.testing import do_bench

    # A backward pass runs on the stream of its forward pass, so both must be on the one that is captured.
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = _timed(function, inputs, which)
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    timed, call, kept = "direct", run, None
    if not _waits(run, stream):
        with torch.cuda.graph(graph, stream=stream):
            kept = run()
        timed, call = "graph", graph.replay
    median, low, high = do_bench(call, warmup=max(5, rep_ms // 4), rep=rep_ms, quantiles=[0.5, 0.2, 0.8])  # pyright: ignore
    del kept
    return {"ms": median, "ms_p20": low, "ms_p80": high, "timed": timed}


def bench_case(
    spec: KernelSpec, case: Case, *, rep_ms: int = 60, with_peers: bool = True, deadline: float = math.inf
) -> dict[str, Any]:
    """One row. A case whose results are wrong has ``correct`` False and no time. No peer starts after ``deadline``."""
    which, dtype = case.get("pass", "forward"), DTYPES[case.get("dtype", "bf16")]
    row: dict[str, Any] = {
        "op": spec.op,
        "model": case.get("model"),
        "pass": which,
        "dtype": case.get("dtype", "bf16"),
        "shape": {k: v for k, v in case.items() if k not in META_KEYS},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **environment(),
    }
    try:
        error, allowed = check(spec, case)
        row |= {"error": error, "allowed": allowed, "correct": error <= allowed}
        torch.cuda.empty_cache()
        if not row["correct"]:
            return row
        inputs = spec.make_inputs(case, "cuda", dtype, 1)
        row |= measure(spec.run, inputs, which, rep_ms)
    except Exception as failure:  # noqa: BLE001 - one broken case must not cost the rest of a device session
        torch.cuda.empty_cache()
        return row | {"correct": False, "failed": f"{type(failure).__name__}: {str(failure).strip()[:300]}"}
    num_bytes, num_flops, limits = spec.bytes(case), spec.flops(case), ceilings()
    floor_ms = max(num_bytes / limits["copy_gb_s"] / 1e6, num_flops / limits["gemm_tflop_s"] / 1e9)
    row |= {
        "bytes": num_bytes,
        "flops": num_flops,
        "gb_s": num_bytes / row["ms"] / 1e6,
        "tflop_s": num_flops / row["ms"] / 1e9,
        "copy_gb_s": limits["copy_gb_s"],
        "gemm_tflop_s": limits["gemm_tflop_s"],
        "floor_ms": floor_ms,
        "share_of_ceiling": floor_ms / row["ms"],
        "peers": {},
    }
    for name, peer in spec.peers.items() if with_peers else ():
        if time.monotonic() > deadline:
            break
        try:
            row["peers"][name] = measure(peer, inputs, which, rep_ms)["ms"]
        except (ImportError, NotImplementedError):
            continue
        except Exception as failure:  # noqa: BLE001
            row["peers"][name] = None
            row.setdefault("peer_failures", {})[name] = f"{type(failure).__name__}: {str(failure).strip()[:200]}"
        torch.cuda.empty_cache()
    return row


def tune_case(spec: KernelSpec, case: Case, *, rep_ms: int = 20) -> dict[str, Any] | None:
    """Times every configuration that ``spec.tuning`` offers for ``case`` and stores the quickest that is right."""
    if spec.tuning is None:
        return None
    bucket, configs = spec.tuning(case)
    which, dtype = case.get("pass", "forward"), DTYPES[case.get("dtype", "bf16")]
    inputs = spec.make_inputs(case, "cuda", dtype, 1)
    timed = []
    for config in configs:
        with tuning.override(spec.op, bucket, config):
            try:
                timed.append((measure(spec.run, inputs, which, rep_ms)["ms"], config))
            except Exception as failure:  # noqa: BLE001 - a configuration that does not fit the device is passed over
                print(f"  {spec.op} {bucket} {config}: {str(failure).splitlines()[0][:100]}", file=sys.stderr)
    for ms, config in sorted(timed, key=lambda pair: pair[0]):
        with tuning.override(spec.op, bucket, config):
            error, allowed = check(spec, case)
        if error <= allowed:
            tuning.write_tuned(spec.op, bucket, config)
            return {"op": spec.op, "bucket": bucket, "config": config, "ms": ms, "worst_ms": max(t for t, _ in timed)}
    return None


def cases_by_priority(specs: Iterable[KernelSpec]) -> list[tuple[KernelSpec, Case]]:
    """Every bench case, the most important first; the order inside a priority is that of the specifications."""
    pairs = [(spec, case) for spec in specs for case in spec.bench_cases]
    return sorted(pairs, key=lambda pair: pair[1].get("priority", 5))


def _warm(index: int, count: int, ops: Sequence[str] | None) -> None:
    """Runs every ``count``-th case once, so that its kernels lie compiled in Triton's cache."""
    specs = kernel_specs()
    pairs = cases_by_priority(spec for op, spec in specs.items() if not ops or op in ops)
    for spec, case in pairs[index::count]:
        for shape in ({**case, **case.get("check_at", {})}, case):
            peers = spec.peers.values() if shape is case and case.get("priority", 5) <= 1 else ()
            for function in (spec.run, *peers):
                with contextlib.suppress(Exception):  # what is wrong with a case will show when it is benched
                    inputs = spec.make_inputs(shape, "cuda", DTYPES[case.get("dtype", "bf16")], 0)
                    _results(function, inputs, case.get("pass", "forward"))
                torch.cuda.empty_cache()


def compile_ahead(ops: Sequence[str] | None, seconds: float) -> None:
    """Compiles the kernels of all cases in parallel processes, for at most ``seconds``: one after the other they would
    take longer than their measurement."""
    count = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    workers = []
    for index in range(count):
        arguments = json.dumps({"index": index, "count": count, "ops": list(ops) if ops else None})
        command = [sys.executable, "-m", __spec__.name, "--warm", arguments]
        # torch.compile (a peer) would start a pool of compilers in each of these processes.
        settings = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        null = subprocess.DEVNULL
        workers.append(subprocess.Popen(command, env=settings, stdout=null, stderr=null))
    deadline = time.monotonic() + seconds
    for worker in workers:
        try:
            worker.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def format_row(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
    head = f"{row['op']:18.18} {row['pass']:8.8} {row['model'] or '':18.18} {shape:44.44}"
    if "ms" not in row:
        wrong = f"WRONG error {row['error']:.1e} > {row['allowed']:.1e}" if "error" in row else ""
        return f"{head} {row.get('failed', wrong)}"
    peers = " ".join(f"{n} {ms / row['ms']:.2f}x" if ms else f"{n} failed" for n, ms in row["peers"].items())
    return (
        f"{head} {row['ms'] * 1e3:9.1f} us {row['gb_s']:7.0f} GB/s {row['tflop_s']:7.1f} TFLOP/s "
        f"{100 * row['share_of_ceiling']:5.1f} % of floor | {peers}"
    )


def plot_roofline(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Achieved rate over arithmetic intensity, under the two measured ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "ms" in row and row["flops"] > 0]
    if not timed:
        return
    copy_rate, matrix_rate = timed[-1]["copy_gb_s"] / 1e3, timed[-1]["gemm_tflop_s"]
    figure, axes = pyplot.subplots(figsize=(9, 6))
    intensities = [row["flops"] / row["bytes"] for row in timed]
    low, high = min([*intensities, 0.5]) / 2, max([*intensities, matrix_rate / copy_rate]) * 2
    knee = matrix_rate / copy_rate
    axes.plot([low, knee, high], [low * copy_rate, matrix_rate, matrix_rate], color="black", linewidth=1.2)
    axes.annotate(f"copy {copy_rate:.2f} TB/s", (low * 1.2, low * copy_rate * 1.6), fontsize=8)
    axes.annotate(f"bf16 GEMM {matrix_rate:.0f} TFLOP/s", (knee, matrix_rate * 1.1), fontsize=8)
    colours = pyplot.get_cmap("tab20")
    for number, op in enumerate(sorted({row["op"] for row in timed})):
        mine = [row for row in timed if row["op"] == op]
        points = [(row["flops"] / row["bytes"], row["tflop_s"]) for row in mine]
        axes.scatter(*zip(*points, strict=True), s=26, color=colours(number % 20), label=op)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="TFLOP/s reached")
    axes.set_title(f"{timed[-1]['device']}, commit {timed[-1]['commit']}", fontsize=10)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def bench_all(
    ops: Sequence[str] | None, out: Path, *, seconds: float = math.inf, rep_ms: int = 60, tune: bool = False
) -> list[dict[str, Any]]:
    """Benches the cases of ``ops`` (all when None) for at most ``seconds``, appending each row to ``out``/DEVICE at
    once."""
    deadline = time.monotonic() + seconds
    specs = kernel_specs()
    if ops and (missing := sorted(set(ops) - set(specs))):
        raise click.UsageError(f"unknown op {', '.join(missing)}; allowed: {', '.join(specs)}")
    chosen = [spec for op, spec in specs.items() if not ops or op in ops]
    folder = out / environment()["device_key"]
    limits = write_environment(folder)["ceilings"]
    rates = f"copy {limits['copy_gb_s']:.0f} GB/s, bf16 GEMM {limits['gemm_tflop_s']:.0f} TFLOP/s"
    print(f"{environment()['device']}: {rates}", flush=True)
    if not tune:
        compile_ahead(ops, seconds=min(90.0, (deadline - time.monotonic()) / 3))
        print(f"compiled ahead; {deadline - time.monotonic():.0f} s left", flush=True)
    # A peer made by torch.compile must keep its buffers for the second of the timed backward passes.
    torch._functorch.config.donated_buffer = False  # pyright: ignore
    rows = []
    with open(folder / "kernels.jsonl", "a") as file:
        for spec, case in cases_by_priority(chosen):
            if time.monotonic() > deadline:
                print("time is up; the remaining cases are left out", flush=True)
                break
            if tune and (best := tune_case(spec, case)):
                took = f"{best['ms']:.4f} ms, worst {best['worst_ms']:.4f}"
                print(f"tuned {best['op']} {best['bucket']}: {best['config']} {took}", flush=True)
            row = bench_case(spec, case, rep_ms=rep_ms, deadline=deadline)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(format_row(row), flush=True)
    plot_roofline(rows, folder / "roofline.png")
    return rows


@click.command("kernels")
@click.option("--compile-only", is_flag=True, help="Compile every shipped configuration; needs no GPU.")
@click.option(
    "--targets", default=",".join(map(str, TARGETS)), show_default=True, help="Compute capabilities to compile for."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the rows here as JSON, too."
)
@click.option("--ops", help="Comma-separated ops; all when left out.")
@click.option("--tune", is_flag=True, help="Time all offered launch configurations first and store the best of each.")
@click.option("--seconds", type=float, default=math.inf, help="Stop starting new cases after this long.")
@click.option("--rep-ms", type=int, default=60, show_default=True, help="Device time spent on each measurement.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results"), show_default=True)
def command(compile_only, targets, json_path, ops, tune, seconds, rep_ms, out) -> int:
    """Prove and time the kernels, or compile them for GPUs that are not here.

    Examples: `specialize bench kernels --ops rmsnorm,rope`; `specialize bench kernels --compile-only --targets 90`.
    """
    chosen = ops.split(",") if ops else None
    if compile_only:
        try:
            numbers = [int(target) for target in targets.split(",")]
        except ValueError:
            raise click.UsageError(f"--targets is {targets!r}; give compute capabilities such as 80,90,100") from None
        return compile_report(numbers, chosen, json_path)
    if not torch.cuda.is_available():
        click.echo(NO_DEVICE, err=True)
        return 1
    rows = bench_all(chosen, out, seconds=seconds, rep_ms=rep_ms, tune=tune)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if rows and all(row.get("correct") for row in rows) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    try:
        return command.main(args=list(argv) if argv is not None else None, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code


if __name__ == "__main__":
    if sys.argv[1:2] == ["--warm"]:
        _warm(**json.loads(sys.argv[2]))
    else:
        sys.exit(main())
