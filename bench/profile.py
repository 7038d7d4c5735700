"""Where the time of generation or tuning goes: runs a workload under torch.profiler, writes a trace for Perfetto
(https://ui.perfetto.dev) or chrome://tracing, and prints the time by group beside what the device could do.

The workload runs once without the profiler, which is what speed and share of the floor are taken from, and once with
it. On a CPU each group's operations and bytes stand beside the measured rates of one large product and one large copy;
on CUDA kernels are grouped by name, and the share of time in which the device worked is shown.

    specialize profile generate --model smollm2-135m-instruct --out trace.json
    specialize profile train --model smollm2-135m-instruct --out trace.json
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from specialize.errors import InputError

from ..engine.generator import Generator, choose_device, choose_dtype
from ..engine.model import Model
from ..engine.scheduler import EngineConfig
from ..engine.shapes import SHAPES
from ..engine.spans import recorded_span
from ..train.config import RECOMPUTE, TrainConfig
from ..train.rates import step_operations
from .environment import environment
from .floor import Ceilings
from .generate import _measured, floor_seconds, make_workload, time_ours
from .trace import WORKLOAD, device_groups, host_groups, read_trace
from .traced import TracedTrainer, Work, traced
from .train import random_rows


def record(run: Callable[[], Any], out: Path, device: torch.device) -> tuple[list[dict[str, Any]], float]:
    """(events, seconds) of ``run`` under the profiler; the trace is written to ``out``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        with recorded_span(WORKLOAD):
            run()
            _synchronize(device)
        seconds = time.perf_counter() - began
    profiler.export_chrome_trace(str(out))
    return read_trace(out), seconds


def profile_generation(
    model: str, out: Path, *, dtype: str, device: str, config: EngineConfig, workload: Mapping[str, int]
) -> dict[str, Any]:
    """The profile of one workload (`bench.generate.make_workload`'s sizes)."""
    base, encode, tokenizer = _load(model, dtype, device, inference=True)
    copy = traced(base)
    generator = Generator(copy, tokenizer, config, span=recorded_span)
    case = make_workload(encode, base.config.vocab_size, **workload)
    generator.warm_up()
    plain = Generator(base, tokenizer, config)
    plain.warm_up()
    run = time_ours(plain, case)
    del plain
    time_ours(generator, case)  # packs what the copy packs anew
    copy.work.clear()
    events, seconds = record(lambda: time_ours(generator, case), out, base.device)
    floor = floor_seconds(generator, case, run["cached_prompt_tokens"])
    tokens = len(case.prompts) * case.new_tokens
    return _result(
        events, seconds, copy.work, _measured(base.device.type, base.dtype), name=f"generate {model} {case.name}",
        plain_seconds=run["seconds"], floor=max(floor.values()), tokens=tokens, steps=run["steps"], trace=out,
    )  # fmt: skip


def profile_training(
    model: str, out: Path, *, dtype: str, device: str, num_rows: int, max_length: int, steps: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The profile of some optimizer steps on random rows."""
    base, _, _ = _load(model, dtype, device, inference=False)
    rows = random_rows(num_rows, vocab=base.config.vocab_size, longest=max_length)
    config = TrainConfig(**{"warmup_ratio": 0.0, "schedule": "constant", "epochs": 1e6, **settings})
    copy = traced(base)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TracedTrainer(copy, rows, config, Path(folder), shuffle=False)

        def go() -> tuple[int, int]:
            pending = [trainer.train_step() for _ in range(steps)]
            for step in pending:
                step.wait()
            return sum(p.tokens for p in pending), sum(p.response_tokens for p in pending)

        go()
        _synchronize(base.device)
        began = time.perf_counter()
        tokens, responses = go()
        _synchronize(base.device)
        plain = time.perf_counter() - began
        copy.work.clear()
        events, seconds = record(go, out, base.device)
    ceilings = _measured(base.device.type, base.dtype)
    full = config.method == "full"
    floor = step_operations(base.config, tokens, responses, trains_weights=full) / ceilings.operations_per_s
    return _result(
        events, seconds, copy.work, ceilings, name=f"train {model}", plain_seconds=plain, floor=floor, tokens=tokens,
        steps=steps, trace=out,
    )  # fmt: skip


def _load(model: str, dtype: str, device: str, *, inference: bool) -> tuple[Model, Any, Any]:
    """(model, encoder of texts, tokenizer); the latter two are None for the random weights of ``random:SHAPE``."""
    place = choose_device(device)
    chosen = choose_dtype(dtype, place)
    if model.startswith("random:"):
        shape = model.removeprefix("random:")
        if shape not in SHAPES:
            known = ", ".join(f"random:{name}" for name in SHAPES)
            raise InputError(f"model {model!r}: no such shape; allowed: {known}")
        return Model.random(SHAPES[shape], dtype=chosen, device=place, inference=inference), None, None
    from specialize.fetch import model_path

    from ..engine.tokenizer import Tokenizer

    path = model_path(model)
    tokenizer = Tokenizer.from_pretrained(path)
    return Model.from_pretrained(path, dtype=chosen, device=place, inference=inference), tokenizer.encode, tokenizer


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _result(
    events: list[dict[str, Any]], seconds: float, work: Work, ceilings: Ceilings, *, name: str, plain_seconds: float,
    floor: float, tokens: int, steps: int, trace: Path,
) -> dict[str, Any]:  # fmt: skip
    host = host_groups(events)
    kernels, busy, span = device_groups(events)
    groups = []
    for group, spent in sorted((kernels or host).items(), key=lambda item: -item[1]):
        row: dict[str, Any] = {"group": group, "seconds": spent, "share": spent / seconds}
        operations, moved = work.operations.get(group, 0.0), work.bytes.get(group, 0.0)
        if not kernels and (operations or moved):
            needed = max(operations / ceilings.operations_per_s, moved / ceilings.bytes_per_s)
            row |= {"operations": operations, "bytes": moved, "floor_share": needed / spent if spent else None}
        groups.append(row)
    return {
        "name": name, "trace": str(trace), "tokens": tokens, "steps": steps, "seconds": plain_seconds,
        "tokens_per_s": tokens / plain_seconds, "floor_seconds": floor, "floor_share": floor / plain_seconds,
        "profiled_seconds": seconds, "groups": groups, "host_groups": host,
        "gpu_busy_share": busy / span if span else None, "operations_per_s": ceilings.operations_per_s,
        "bytes_per_s": ceilings.bytes_per_s, **environment(),
    }  # fmt: skip


def format_profile(result: Mapping[str, Any]) -> str:
    """The time by group as an aligned table."""
    lines = [
        f"{result['name']}: {result['tokens']:,} tokens in {result['seconds']:.2f} s without the profiler "
        f"({result['tokens_per_s']:,.0f} a second), floor {result['floor_seconds']:.2f} s "
        f"({result['floor_share']:.0%} reached)",
        f"with it {result['profiled_seconds']:.2f} s, {result['steps']} steps; ceilings "
        f"{result['operations_per_s'] / 1e12:.2f} TFLOP/s, {result['bytes_per_s'] / 1e9:.0f} GB/s",
        "",
        f"{'':22s}{'s':>9s}{'share':>8s}{'TFLOP/s':>10s}{'GB/s':>8s}{'of ceiling':>12s}",
    ]
    for row in result["groups"]:
        line = f"{row['group']:22s}{row['seconds']:9.3f}{row['share']:8.1%}"
        if row.get("floor_share") is not None:
            spent = row["seconds"]
            line += (
                f"{row['operations'] / spent / 1e12:10.3f}{row['bytes'] / spent / 1e9:8.1f}{row['floor_share']:12.0%}"
            )
        lines.append(line)
    if result["gpu_busy_share"] is not None:
        lines += [
            "",
            f"GPU busy {result['gpu_busy_share']:.1%} of the time from its first kernel to its last; the host:",
        ]
        lines += [f"{group:22s}{spent:9.3f}" for group, spent in result["host_groups"].items()]
    return "\n".join([*lines, "", f"trace: {result['trace']} (open in https://ui.perfetto.dev)"])


@click.group(help=__doc__)
def command() -> None:
    pass


def _shared(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads (torch's own choice by default)."),
        click.option("--device", default="auto", show_default=True),
        click.option("--dtype", default="auto", show_default=True, type=click.Choice(["auto", "fp32", "bf16", "fp16"])),
        click.option("--out", type=click.Path(path_type=Path), default=Path("trace.json"), show_default=True),
        click.option("--model", default="smollm2-135m-instruct", show_default=True, help="Path, name, random:SHAPE."),
    ):
        function = option(function)
    return function


def _finish(result: dict[str, Any], as_json: bool) -> None:
    click.echo(json.dumps(result, indent=1) if as_json else format_profile(result))


def _prepare(out: Path, threads: int | None) -> None:
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise InputError(f"--out {out}: give a file in a folder that exists")
    if threads:
        torch.set_num_threads(threads)


@command.command()
@_shared
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Number of prompts.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=343, show_default=True, help="Mean prompt length.")
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Output length.")
@click.option("--shared-prefix", type=click.IntRange(0), default=0, show_default=True, help="Tokens common to all.")
@click.option("--max-sequences", type=click.IntRange(1))
@click.option("--max-batch-tokens", type=click.IntRange(1))
def generate(
    model: str, out: Path, dtype: str, device: str, threads: int | None, as_json: bool, max_sequences: int | None,
    max_batch_tokens: int | None, **workload: int,
) -> None:  # fmt: skip
    """Where a generation step's time goes."""
    _prepare(out, threads)
    config = EngineConfig(max_sequences=max_sequences, max_batch_tokens=max_batch_tokens)
    _finish(profile_generation(model, out, dtype=dtype, device=device, config=config, workload=workload), as_json)


@command.command()
@_shared
@click.option("--num-rows", type=click.IntRange(1), default=16, show_default=True, help="Rows of random tokens.")
@click.option("--max-length", type=click.IntRange(16), default=512, show_default=True, help="Tokens of the longest.")
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True, help="Optimizer steps.")
@click.option("--batch", "batch_size", type=click.IntRange(1), default=8, show_default=True, help="Rows of a step.")
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True)
@click.option("--targets", default="all", show_default=True)
@click.option("--recompute", type=click.Choice(RECOMPUTE), default="auto", show_default=True)
def train(
    model: str, out: Path, dtype: str, device: str, threads: int | None, as_json: bool, num_rows: int, max_length: int,
    steps: int, **settings: Any,
) -> None:  # fmt: skip
    """Where a tuning step's time goes."""
    _prepare(out, threads)
    result = profile_training(
        model, out, dtype=dtype, device=device, num_rows=num_rows, max_length=max_length, steps=steps,
        settings=settings,
    )  # fmt: skip
    _finish(result, as_json)


def main(argv: Sequence[str] | None = None) -> int:
    return command.main(args=list(argv) if argv is not None else None, standalone_mode=argv is None) or 0
