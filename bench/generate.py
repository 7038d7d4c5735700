"""Throughput of the generator: sweeps over the number of prompts, prompt, output and shared-prefix lengths.

Other software on the same work: ``bench peers``. ``--suite gpu`` runs random weights of real models' shapes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch

from specialize.errors import InputError

from ..engine import shapes
from ..engine.generator import Generator, Stats, choose_device, choose_dtype
from ..engine.memory import free_unused
from ..engine.model import Model
from ..engine.runner import Runner
from ..engine.sampler import SamplingParams
from ..engine.scheduler import EngineConfig
from .environment import ceilings, environment
from .floor import Ceilings, generation_floor, measure_cpu

# Contexts of 8,192 tokens suffice for what is measured, and the H100's figures are of them.
SHAPES = {
    "smollm2-135m": shapes.SHAPES["smollm2-135m"],
    "llama-8b": replace(shapes.SHAPES["llama-3.1-8b"], max_context=8192, rope_scaling=None),
    "mpt-7b": shapes.SHAPES["mpt-7b"],
}
_SUBJECTS = ["patients", "cells", "mice", "genes", "receptors", "neurons", "children", "tumours", "proteins", "samples"]
_VERBS = ["showed", "expressed", "received", "lacked", "developed", "inhibited", "activated", "reduced", "carried"]
_OBJECTS = ["insulin", "seizures", "mutations", "fever", "apoptosis", "anaemia", "hypertension", "collagen", "fibrosis"]


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids, and what is asked for."""

    name: str
    prompts: list[list[int]]
    new_tokens: int
    temperature: float = 0.7
    top_p: float = 0.95

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.new_tokens, temperature=self.temperature, top_p=self.top_p, ignore_eos=True
        )


def made_up_text(num_words: int, seed: int) -> str:
    """Plain sentences about made-up findings, so that a benchmark needs no data."""
    rng = random.Random(seed)
    words: list[str] = []
    while len(words) < num_words:
        words += ["The", rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_OBJECTS), "in", f"{rng.randint(2, 99)}"]
        words += ["of", f"{rng.randint(100, 999)}", "cases,", "and", rng.choice(_OBJECTS), "was", "rare."]
    return " ".join(words[:num_words])


def make_workload(
    encode: Callable[[str], list[int]] | None,
    vocab_size: int,
    *,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    shared_prefix: int = 0,
    groups: int = 1,
    spread: float = 0.5,
    seed: int = 0,
) -> Workload:
    """``batch`` prompts of ``prompt_tokens`` on average, between 1 − spread and 1 + spread of it; the first
    ``shared_prefix`` tokens beside them are the same for all of a group. Groups take turns in the order of prompts."""
    rng = random.Random(seed)

    def tokens(count: int, which: int) -> list[int]:
        if encode is None:
            own = random.Random(f"{seed}-{which}")
            return [own.randrange(vocab_size) for _ in range(count)]
        return encode(made_up_text(2 * count + 8, seed * 1_000_003 + which))[:count]

    prefixes = [tokens(shared_prefix, -1 - group) if shared_prefix else [] for group in range(groups)]
    prompts = []
    for place in range(batch):
        length = max(1, round(prompt_tokens * (1 + spread * (2 * rng.random() - 1))))
        prompts.append(prefixes[place % groups] + tokens(length, place))
    name = f"b{batch}-p{prompt_tokens}-n{new_tokens}-s{shared_prefix}" + (f"-g{groups}" if groups > 1 else "")
    return Workload(name, prompts, new_tokens)


def read_prompts(path: Path, encode: Callable[[str], list[int]], new_tokens: int) -> Workload:
    """Lines {"prompt": text} or {"prompt_ids": [...]}."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            prompts.append(list(row["prompt_ids"]) if "prompt_ids" in row else encode(row["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise InputError(f'{path}:{number}: not a line {{"prompt": text}} or {{"prompt_ids": [...]}}') from None
    if not prompts:
        raise InputError(f"{path}: holds no prompts")
    return Workload(path.stem, prompts, new_tokens)


def load_generator(model: str, dtype: str, device: str, config: EngineConfig) -> Generator:
    """A checkpoint, or random weights for ``random:SHAPE``."""
    if not model.startswith("random:"):
        from specialize.fetch import model_path

        return Generator.from_pretrained(model_path(model), dtype=dtype, device=device, config=config)
    shape = model.removeprefix("random:")
    if shape not in SHAPES:
        raise InputError(f"model {model!r}: no such shape; allowed: {', '.join(f'random:{name}' for name in SHAPES)}")
    place = choose_device(device)
    return Generator(Model.random(SHAPES[shape], 0, dtype=choose_dtype(dtype, place), device=place), None, config)


def time_ours(generator: Generator, workload: Workload) -> dict[str, Any]:
    """One run; seconds include everything between the call and the last completion."""
    generator.allocator.forget_contents()
    generator.stats = Stats()
    device = generator.model.device
    forget_peak_memory(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    completions = generator.generate(workload.prompts, workload.params())
    seconds = time.perf_counter() - began
    short = [c.index for c in completions if len(c.token_ids) != workload.new_tokens]
    if short:
        raise RuntimeError(f"{len(short)} completions do not have the {workload.new_tokens} tokens asked for")
    tokens = [c.token_ids for c in completions]
    peak = peak_memory_mib(device)
    return {**generator.stats.as_dict(), "seconds": seconds, "peak_memory_mib": peak, "token_ids": tokens}


def forget_peak_memory(device: torch.device | None = None) -> None:
    """``peak_memory_mib`` counts from now on, where the system lets a process say so (Linux)."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device | None = None) -> float:
    """The most memory that this process has held since ``forget_peak_memory``, on a GPU where ``device`` is one;
    of the host's elsewhere than on Linux: ever."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20)


def floor_seconds(generator: Generator, workload: Workload, cached_tokens: int) -> dict[str, float]:
    """Seconds for the operations, and for the bytes, that cannot be avoided, at the device's measured ceilings.

    ``cached_tokens`` of the prompts came from the prefix cache.
    """
    floor = generation_floor(
        generator.model.config, [len(prompt) for prompt in workload.prompts], workload.new_tokens,
        _measured(generator.model.device.type, generator.model.dtype),
        bytes_per_weight=generator.model.dtype.itemsize, bytes_per_cache_value=generator.model.dtype.itemsize,
        batch=min(generator.max_sequences, len(workload.prompts)), cached_tokens=cached_tokens,
    )  # fmt: skip
    return {"operations": floor["compute_s"], "bytes": floor["move_s"]}


@cache
def _measured(device: str, dtype: torch.dtype) -> Ceilings:
    if device != "cuda":
        return measure_cpu(dtype)
    measured = ceilings()
    return Ceilings(1e12 * measured["gemm_tflop_s"], 1e9 * measured["copy_gb_s"])


def measure(generator: Generator, model: str, workload: Workload, *, dtype: str, repeats: int) -> dict[str, Any]:
    """One row of results: medians of ``repeats`` runs, what the generator counted, the most memory held, the floor."""
    row: dict[str, Any] = {
        "name": workload.name, "model": model, "dtype": dtype, "prompts": len(workload.prompts),
        "prompt_tokens": workload.prompt_tokens, "new_tokens": workload.new_tokens, **environment(),
    }  # fmt: skip
    runs = [time_ours(generator, workload) for _ in range(repeats)]
    for run in runs:
        run.pop("token_ids")
    seconds = [run["seconds"] for run in runs]
    row |= {"seconds": statistics.median(seconds), "all_seconds": seconds}
    row["tokens_per_s"] = len(workload.prompts) * workload.new_tokens / row["seconds"]
    row["stats"] = runs[-1]
    row["floor_seconds"] = max(floor_seconds(generator, workload, runs[-1]["cached_prompt_tokens"]).values())
    row["share"] = row["floor_seconds"] / row["seconds"]
    return row


def few_of_each_group(workload: Workload) -> list[list[int]]:
    """Six prompts: the first, the second, and those that begin most like them."""

    def likeness(prompt: list[int], other: list[int]) -> int:
        return next((i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), len(other))

    few: list[list[int]] = []
    for first in workload.prompts[:2]:
        few += sorted(workload.prompts, key=lambda prompt, first=first: -likeness(prompt, first))[:3]
    return few


def prefix_reuse_pair(generator: Generator) -> tuple[Generator, Generator]:
    """The same model with prefix reuse and without it."""
    on, off = (replace(generator.config, prefix_cache=reuse) for reuse in (True, False))
    return Generator(generator.model, None, on), Generator(generator.model, None, off)


def compare_prefix_reuse(
    model: str, workload: Workload, *, dtype: str, device: str, config: EngineConfig, repeats: int
) -> dict[str, Any]:
    """One workload with prefix reuse and without it, in turns, greedily.

    Of three prompts each of the first groups all tokens must be the same in fp32. In 16-bit formats the sums' order
    moves the last bits, so that ties fall otherwise; how many completions are the same there is told.
    """
    place = str(choose_device(device))
    few = few_of_each_group(workload)
    checked = prefix_reuse_pair(load_generator(model, "fp32", place, config))
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    truth, found = ([c.token_ids for c in generator.generate(few, params)] for generator in checked)
    if truth != found:
        raise RuntimeError("in fp32 greedy tokens differ with prefix reuse")
    del checked
    with_reuse, without = prefix_reuse_pair(load_generator(model, dtype, place, config))
    workload = replace(workload, temperature=0.0)
    times: dict[str, list[float]] = {"on": [], "off": []}
    tokens: dict[str, list[list[int]]] = {}
    stats: dict[str, Any] = {}
    for name, generator in (("on", with_reuse), ("off", without)) * repeats:
        generator.warm_up()
        run = time_ours(generator, workload)
        times[name].append(run["seconds"])
        tokens[name], stats[name] = run.pop("token_ids"), run
    same = sum(a == b for a, b in zip(tokens["on"], tokens["off"], strict=True))
    seconds, without_seconds = statistics.median(times["on"]), statistics.median(times["off"])
    return {
        "name": workload.name, "model": model, "dtype": dtype, "prompts": len(workload.prompts),
        "prompt_tokens": workload.prompt_tokens, "new_tokens": workload.new_tokens, **environment(),
        "seconds": seconds, "tokens_per_s": len(workload.prompts) * workload.new_tokens / seconds,
        "without_reuse_seconds": without_seconds, "times_without_reuse": without_seconds / seconds,
        "same_in_fp32": len(few), "same_completions": same, "all_seconds": times, "stats": stats,
    }  # fmt: skip


def split_step(generator: Generator, workload: Workload, steps: int = 24) -> dict[str, float]:
    """Milliseconds of a decode step, and of the time between two of them that the GPU has nothing to do."""
    launch = Runner.launch
    events: list[tuple[torch.cuda.Event, torch.cuda.Event] | None] = []

    def timed(runner: Runner, plan: Any, rows: Any) -> Any:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = launch(runner, plan, rows)
        stop.record()
        events.append(None if plan.chunks else (start, stop))
        return result

    Runner.launch = timed  # type: ignore[method-assign]
    try:
        generator.generate(workload.prompts, SamplingParams(max_tokens=steps, temperature=0.7, ignore_eos=True))
    finally:
        Runner.launch = launch  # type: ignore[method-assign]
    torch.cuda.synchronize()
    pairs = [(a, b) for a, b in itertools.pairwise(events) if a is not None and b is not None]
    return {
        "step_ms": statistics.median(a[1].elapsed_time(b[1]) for a, b in pairs),
        "idle_ms": statistics.median(a[1].elapsed_time(b[0]) for a, b in pairs),
    }


GPU_CASES = (
    ("random:smollm2-135m", 64, 256, 64, 0),
    ("random:llama-8b", 256, 256, 128, 0),
    ("random:mpt-7b", 64, 512, 128, 0),
    ("random:llama-8b", 256, 150, 64, 1000),
    ("random:llama-8b", 16, 1024, 64, 0),
)


def gpu_suite(seconds: float, out: Path) -> int:
    """Random weights of real shapes, the most telling first; ``out`` is written anew after each row."""
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    name, generator = "", None
    for model, batch, prompt_tokens, new_tokens, shared in GPU_CASES:
        if time.monotonic() > deadline:
            break
        try:
            if generator is None or name != model:
                generator = None  # before the next one's weights need the room
                free_unused("cuda")
                name, generator = model, load_generator(model, "bf16", "cuda", EngineConfig())
            workload = make_workload(
                None, generator.model.config.vocab_size, batch=batch, prompt_tokens=prompt_tokens,
                new_tokens=new_tokens, shared_prefix=shared,
            )  # fmt: skip
            first = time_ours(generator, workload)["seconds"]  # with compilation and the recording of decode graphs
            runs = [time_ours(generator, workload) for _ in range(3)]
            run = sorted(runs, key=lambda run: run["seconds"])[1]
            run.pop("token_ids")
            row = {"name": f"{model.removeprefix('random:')} {workload.name}", **environment(), "stats": run}
            row |= {"seconds": run["seconds"], "tokens_per_s": batch * new_tokens / run["seconds"]}
            row |= {"first_seconds": first, "all_seconds": [run["seconds"] for run in runs]}
            floor = max(floor_seconds(generator, workload, run["cached_prompt_tokens"]).values())
            row |= {"floor_seconds": floor, "share": floor / run["seconds"]}
            try:
                row |= split_step(generator, workload)
            except (RuntimeError, ValueError) as error:  # the throughput stands without it
                row["split_error"] = f"{type(error).__name__}: {str(error)[:200]}"
        except (RuntimeError, ValueError) as error:
            row = {"name": f"{model} b{batch}", "error": f"{type(error).__name__}: {str(error)[:500]}"}
        rows.append(row)
        write_json(out, rows)
        print(format_row(row), flush=True)
    return 0 if any("tokens_per_s" in row for row in rows) else 1


def write_json(path: Path, body: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(body, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)


def format_row(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']:36s} {row['error']}"
    text = f"{row['name']:36s} {row['seconds']:8.2f} s {row['tokens_per_s']:8.0f} tok/s"
    if "share" in row:
        text += f"  floor {row['floor_seconds']:.2f} s ({100 * row['share']:.0f} %)"
    if "step_ms" in row:
        text += f"  step {row['step_ms']:.2f} ms, idle {row['idle_ms']:.2f} ms"
    if "times_without_reuse" in row:
        text += f"  without reuse {row['without_reuse_seconds']:.2f} s: {row['times_without_reuse']:.2f} times"
        text += f", {row['same_completions']} of {row['prompts']} completions the same"
    if "stats" in row and "peak_memory_mib" in row["stats"]:
        text += f"  peak {row['stats']['peak_memory_mib']:.0f} MiB"
    return text


def _numbers(_: Any, __: Any, value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",") if part.strip()]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of integers such as 1,8,32") from None


@click.command(help=__doc__)
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="Path, name, or random:SHAPE.")
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(["auto", "fp32", "bf16", "fp16"]))
@click.option("--device", default="auto", show_default=True)
@click.option("--threads", type=int, help="CPU threads (torch's own choice by default).")
@click.option("--prompts", type=click.Path(path_type=Path), help="JSONL of prompts instead of made-up ones.")
@click.option("--batch", default="32", show_default=True, callback=_numbers, help="Numbers of prompts to sweep.")
@click.option("--prompt-tokens", default="343", show_default=True, callback=_numbers, help="Mean prompt lengths.")
@click.option("--new-tokens", default="128", show_default=True, callback=_numbers, help="Output lengths.")
@click.option("--shared-prefix", default="0", show_default=True, callback=_numbers, help="Shared prefix lengths.")
@click.option("--groups", default=1, show_default=True, help="Groups of prompts, each with its own shared prefix.")
@click.option(
    "--compare-prefix-cache", is_flag=True, help="Time with and without prefix reuse, in turns; compare tokens."
)
@click.option(
    "--spread", default=0.5, show_default=True, help="How far own prompt lengths lie around their mean, as a share."
)
@click.option("--repeats", default=3, show_default=True, help="Runs of each case; medians are reported.")
@click.option("--no-prefix-cache", is_flag=True, help="Compute every prompt token.")
@click.option("--max-sequences", type=int)
@click.option("--max-batch-tokens", type=int)
@click.option("--page-size", type=int, default=16, show_default=True)
@click.option("--suite", type=click.Choice(["gpu"]), help="Random weights of real shapes on a GPU.")
@click.option("--seconds", type=float, default=300.0, show_default=True, help="Time for --suite.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows here.")
def command(
    model: str, dtype: str, device: str, threads: int | None, prompts: Path | None, batch: list[int],
    prompt_tokens: list[int], new_tokens: list[int], shared_prefix: list[int], groups: int, compare_prefix_cache: bool,
    spread: float, repeats: int,
    no_prefix_cache: bool, max_sequences: int | None, max_batch_tokens: int | None, page_size: int, suite: str | None,
    seconds: float, json_path: Path | None,
) -> int:  # fmt: skip
    if threads:
        torch.set_num_threads(threads)
    if suite is not None:
        return gpu_suite(seconds, json_path or Path("bench/results/generate-gpu.json"))
    place = choose_device(device)
    if dtype == "auto":
        chosen = choose_dtype("auto", place)
        dtype = next(name for name, value in _dtype_names().items() if value == chosen)
    config = EngineConfig(
        page_size=page_size, max_sequences=max_sequences, max_batch_tokens=max_batch_tokens,
        prefix_cache=not no_prefix_cache,
    )  # fmt: skip
    encode, vocab_size = _encoder(model)
    rows = []
    shape = {"groups": groups, "spread": spread}
    generator = None
    for workload in _workloads(prompts, encode, vocab_size, batch, prompt_tokens, new_tokens, shared_prefix, shape):
        if compare_prefix_cache:
            row = compare_prefix_reuse(model, workload, dtype=dtype, device=device, config=config, repeats=repeats)
        else:
            if generator is None:  # one for all rows: what a second one leaves behind is not the workload's memory
                generator = load_generator(model, dtype, device, config)
                generator.warm_up()
            row = measure(generator, model, workload, dtype=dtype, repeats=repeats)
        row["config"] = asdict(config)
        rows.append(row)
        click.echo(format_row(row))
        if json_path is not None:
            write_json(json_path, rows)
    return 0


def _dtype_names() -> dict[str, torch.dtype]:
    from ..engine.generator import DTYPES

    return DTYPES


def _encoder(model: str) -> tuple[Callable[[str], list[int]] | None, int]:
    if model.startswith("random:"):
        shape = SHAPES.get(model.removeprefix("random:"))
        return None, shape.vocab_size if shape else 1
    from specialize.fetch import model_path

    from ..engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(model_path(model))
    return tokenizer.encode, tokenizer.vocab_size


def _workloads(
    prompts: Path | None, encode: Callable[[str], list[int]] | None, vocab_size: int, batch: Sequence[int],
    prompt_tokens: Sequence[int], new_tokens: Sequence[int], shared_prefix: Sequence[int],
    shape: dict[str, Any],
) -> list[Workload]:  # fmt: skip
    if prompts is not None:
        if encode is None:
            raise InputError("--prompts needs a model with a tokenizer, not random weights")
        return [read_prompts(prompts, encode, n) for n in new_tokens]
    if not 1 <= shape["groups"] <= min(batch) or not 0 <= shape["spread"] <= 1:
        raise InputError(
            f"--groups is {shape['groups']}, --spread {shape['spread']}; allowed: 1 to --batch, and 0 to 1"
        )
    return [
        make_workload(encode, vocab_size, batch=b, prompt_tokens=p, new_tokens=n, shared_prefix=s, **shape)
        for b in batch
        for p in prompt_tokens
        for n in new_tokens
        for s in shared_prefix
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return command.main(args=list(argv) if argv is not None else None, standalone_mode=argv is None) or 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
