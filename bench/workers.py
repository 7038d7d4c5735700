"""How generation scales with workers: the same prompts answered by one Ray worker, two, …, each with as many threads.

Efficiency is (tokens a second of n workers) / (n · tokens a second of one). Pools take turns, there and back; starting
workers, loading the model and a first bundle for each worker are not timed.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import psutil
import torch

from specialize.errors import InputError
from specialize.workers import BUNDLE_PROMPTS, Spread, WorkerPool

from ..engine.generator import choose_device
from ..engine.sampler import Request, SamplingParams
from .environment import environment
from .generate import Workload, make_workload, write_json


def time_pool(
    path: Path, workload: Workload, *, workers: int, threads_each: int, dtype: str, device: str
) -> dict[str, float]:
    """One pool of ``workers`` on ``workload``: seconds from the call to the last completion, and the workers' CPU
    seconds of that time."""
    pool = WorkerPool(path, Spread(workers=workers, threads=workers * threads_each), dtype=dtype, device=device)
    with contextlib.closing(pool):
        short = SamplingParams(max_tokens=4, ignore_eos=True)
        first = [
            Request(workload.prompts[i % len(workload.prompts)], short, request_id=len(workload.prompts) + i)
            for i in range(workers * BUNDLE_PROMPTS)
        ]
        list(pool.run(first))
        processes = [psutil.Process(pid) for pid in pool.worker_pids]
        requests = [Request(ids, workload.params(), request_id=i) for i, ids in enumerate(workload.prompts)]
        cpu_seconds = -sum(sum(process.cpu_times()[:2]) for process in processes)
        began = time.perf_counter()
        completions = list(pool.run(requests))
        seconds = time.perf_counter() - began
        cpu_seconds += sum(sum(process.cpu_times()[:2]) for process in processes)
    tokens = sum(len(completion.token_ids) for completion in completions)
    if tokens != len(requests) * workload.new_tokens:
        raise RuntimeError(f"{tokens} tokens came, {len(requests) * workload.new_tokens} were asked for")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens_per_s": tokens / seconds}


def scaling(
    path: Path, workload: Workload, counts: Sequence[int], *, threads_each: int, dtype: str, device: str, rounds: int
) -> list[dict[str, Any]]:
    """One row per number of workers; the first is what efficiency is measured against."""
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for turn in range(rounds):
        for count in counts if turn % 2 == 0 else reversed(counts):
            run = time_pool(
                path, workload, workers=count, threads_each=threads_each, dtype=dtype, device=device
            )  # fmt: skip
            runs[count].append(run)
    rates = {count: statistics.median(run["tokens_per_s"] for run in found) for count, found in runs.items()}
    least = counts[0]
    return [
        {
            "workers": count,
            "threads_each": threads_each,
            "tokens_per_s": rates[count],
            "efficiency": rates[count] * least / (rates[least] * count),
            "runs": runs[count],
        }
        for count in counts
    ]


def _counts(_: Any, __: Any, value: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in value.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise click.BadParameter(f"{value!r} is no list of numbers from 1, such as 1,2,4")
    return counts


@click.command(help=__doc__)
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="Path or name.")
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(["auto", "fp32", "bf16", "fp16"]))
@click.option("--device", default="auto", show_default=True)
@click.option("--workers", default="1,2", show_default=True, callback=_counts, help="Numbers of workers.")
@click.option("--threads-each", type=click.IntRange(1), default=1, show_default=True, help="Threads of a CPU worker.")
@click.option("--batch", type=click.IntRange(1), default=384, show_default=True, help="Prompts.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=150, show_default=True, help="Mean prompt length.")
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Output length.")
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True, help="Turns of each; medians are told.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result here.")
def command(
    model: str, dtype: str, device: str, workers: list[int], threads_each: int, batch: int, prompt_tokens: int,
    new_tokens: int, rounds: int, json_path: Path | None,
) -> int:  # fmt: skip
    from specialize.fetch import model_path

    from ..engine.tokenizer import Tokenizer

    path = model_path(model)
    cores = psutil.cpu_count() or 1
    if choose_device(device).type == "cpu" and workers[-1] * threads_each > cores:
        raise InputError(
            f"--workers {workers[-1]} of {threads_each} threads each: the machine has {cores} cores; allowed: "
            f"up to {cores // threads_each} workers"
        )
    tokenizer = Tokenizer.from_pretrained(path)
    workload = make_workload(
        tokenizer.encode, tokenizer.vocab_size, batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens
    )
    torch.set_num_threads(1)  # this process only hands out and takes
    rows = scaling(
        path, workload, workers, threads_each=threads_each, dtype=dtype, device=device, rounds=rounds
    )  # fmt: skip
    for row in rows:
        wall, cpu = (statistics.median(run[name] for run in row["runs"]) for name in ("seconds", "cpu_seconds"))
        click.echo(
            f"{row['workers']:3d} workers {row['tokens_per_s']:8.1f} tok/s  efficiency {row['efficiency']:.0%}  "
            f"{wall:.1f} s, {cpu:.1f} CPU s"
        )
    if json_path is not None:
        body = {
            "name": workload.name, "model": model, "dtype": dtype, "prompts": batch,
            "prompt_tokens": workload.prompt_tokens, "new_tokens": new_tokens, **environment(), "rows": rows,
        }  # fmt: skip
        write_json(json_path, body)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return command.main(args=list(argv) if argv is not None else None, standalone_mode=argv is None) or 0
