"""Tuning speed: tokens per second of the training loop, against a peer in the same run and against the floor.

Tokens are those of the rows, prompt and response, never padding; ours and the peer's count the same. Every measurement
says its gradient norms: a loop that trains nothing is fast. The floor is the time of 4 N operations a token, N being
the parameters of the blocks, at the measured rate of one large product: frozen weights need no gradient of their own.

    specialize bench train --peer peft --targets q,k,v,o --targets all
    specialize bench train --suite gpu --seconds 200 --json out.json
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch

from specialize.errors import InputError

from ..engine.config import ModelConfig
from ..engine.layout import layer_linears
from ..engine.model import Model
from ..train.config import TrainConfig
from ..train.data import TrainExample
from ..train.loop import Trainer
from .charts import Bar, bar_chart
from .environment import ceilings, environment
from .floor import measure_cpu, spread
from .peers.install import TUNING_PEERS, PeerError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
    "mpt-7b": {
        "model_type": "mpt", "vocab_size": 50432, "d_model": 4096, "n_heads": 32, "n_layers": 32,
        "expansion_ratio": 4, "max_seq_len": 8192, "no_bias": True, "attn_config": {"alibi": True},
    },
}  # fmt: skip


def random_rows(
    count: int, *, vocab: int, seed: int = 0, mean: int = 380, longest: int = 512, response: float = 0.1
) -> list[TrainExample]:
    """Rows of random tokens with lengths like abstracts with a question: normal around ``mean``, cut at ``longest``."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(np.clip(rng.normal(mean, 0.25 * mean), 16, longest))
        answer = max(2, round(length * response))
        ids = rng.integers(3, vocab, length).tolist()
        rows.append(TrainExample(ids[:-answer], ids[-answer:], name=f"row {i + 1}"))
    return rows


def operations_per_token(config: ModelConfig) -> int:
    """Forward and backward through the frozen matrices of the blocks: 4 a parameter."""
    parameters = sum(f.in_features * f.out_features for i in range(config.num_layers) for f in layer_linears(config, i))
    return 4 * parameters


def matrix_rate_tflop_s(device: str, dtype: str) -> float:
    """Rate of one large product: bf16 on a GPU; on a CPU in ``dtype`` with the present number of threads."""
    if device.startswith("cuda"):
        return ceilings()["gemm_tflop_s"]
    return measure_cpu(DTYPES[dtype]).operations_per_s / 1e12


def make_trainer(model: Model, rows: Sequence[TrainExample], folder: Path, **settings: Any) -> Trainer:
    """A trainer that takes the rows in the order given, ``batch_size`` a step, again from the start after the last."""
    defaults = {"warmup_ratio": 0.0, "schedule": "constant", "epochs": 1e6, "max_grad_norm": math.inf}
    return Trainer(model, rows, TrainConfig(**{**defaults, **settings}), folder, shuffle=False)


def timed_step(trainer: Trainer) -> dict[str, Any]:
    _synchronize(trainer)
    start = time.perf_counter()
    pending = trainer.train_step()
    norm, *losses = pending.wait()
    _synchronize(trainer)
    return {
        "seconds": time.perf_counter() - start, "loss": math.fsum(losses), "grad_norm": norm, "tokens": pending.tokens,
    }  # fmt: skip


def _synchronize(trainer: Trainer) -> None:
    if trainer.model.device.type == "cuda":
        torch.cuda.synchronize()


def shape_rows(vocab: int, lengths: Sequence[int], micro_batches: int, response: float) -> list[TrainExample]:
    """Random tokens in rows of the lengths given, once a micro-batch; ``response``: the share that is trained on."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(micro_batches):
        for length in lengths:
            ids = rng.integers(3, vocab, length).tolist()
            answer = max(1, round(length * response))
            rows.append(TrainExample(ids[:-answer], ids[-answer:], name=f"{i}"))
    return rows


def measure_shape(
    shape: str, *, lengths: Sequence[int], micro_batches: int = 1, rank: int = 16, steps: int = 4,
    dtype: str = "bf16", device: str = "cuda", checkpoint_layers: bool = False, response: float = 0.25,
    num_layers: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One row of results for random weights of a named shape; a micro-batch packs sequences of ``lengths``."""
    raw = dict(SHAPES[shape])
    if num_layers is not None:
        raw["n_layers" if raw["model_type"] == "mpt" else "num_hidden_layers"] = num_layers
    config = ModelConfig.from_dict(raw, source=shape)
    cuda = device.startswith("cuda")
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = Model.random(config, dtype=DTYPES[dtype], device=device, inference=False)
    rows = shape_rows(config.vocab_size, lengths, micro_batches, response)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            model, rows, Path(folder), rank=rank, batch_size=len(rows), max_batch_tokens=sum(lengths),
            recompute="layers" if checkpoint_layers else "none", learning_rate=1e-4,
        )  # fmt: skip
        first = timed_step(trainer)
        timed_step(trainer)
        _synchronize(trainer)
        start = time.perf_counter()
        pending = [trainer.train_step() for _ in range(steps)]
        numbers = [p.wait() for p in pending]
        _synchronize(trainer)
        seconds = (time.perf_counter() - start) / steps
    tokens = pending[0].tokens
    rate = matrix_rate_tflop_s(device, dtype)
    floor = rate * 1e12 / operations_per_token(config)
    norms = [n[0] for n in numbers]
    return {
        "name": f"tune {shape} r{rank} {'+'.join(map(str, sorted(set(lengths), reverse=True)))}x{micro_batches}",
        "shape": shape, "layers": config.num_layers, "dtype": dtype, "rank": rank, "lengths": list(lengths),
        "micro_batches": micro_batches, "checkpoint_layers": checkpoint_layers, "response_share": response,
        "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "first_step_seconds": first["seconds"],
        "losses": [math.fsum(n[1:]) for n in numbers], "grad_norms": norms,
        "correct": all(math.isfinite(n) and n > 0 for n in norms),
        "gemm_tflop_s": rate, "floor_tokens_per_s": floor, "share": tokens / seconds / floor,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None, **environment(),
    }  # fmt: skip


GPU_SUITE: tuple[dict[str, Any], ...] = (
    {"shape": "smollm2", "lengths": [512] * 32, "steps": 4},
    {"shape": "mpt-7b", "lengths": [512] * 8, "micro_batches": 2},
    {"shape": "mpt-7b", "lengths": [4096], "micro_batches": 2},
    {"shape": "llama-8b", "lengths": [512] * 8, "micro_batches": 2},
    {"shape": "mpt-7b", "lengths": [512] * 16, "micro_batches": 1},
    {"shape": "llama-8b", "lengths": [4096], "micro_batches": 2},
    {"shape": "mpt-7b", "lengths": [512] * 16, "micro_batches": 1, "checkpoint_layers": True},
)


def run_suite(suite: Sequence[dict[str, Any]], seconds: float, out: Path | None, device: str) -> list[dict[str, Any]]:
    """Rows of a suite, the file written anew after each; stops starting new ones after ``seconds``."""
    deadline = time.monotonic() + seconds
    rows = []
    for case in suite:
        if time.monotonic() > deadline:
            break
        try:
            rows.append(measure_shape(**case, device=device))
        except torch.cuda.OutOfMemoryError:
            rows.append({"name": f"tune {case['shape']}", **case, "out_of_memory": True, **environment()})
        except (RuntimeError, ValueError) as error:  # the others are worth having
            rows.append({"name": f"tune {case['shape']}", **case, "error": str(error)[:500], **environment()})
        click.echo(_line(rows[-1]), err=True)
        if out is not None:
            _write(out, rows)
    return rows


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    if row.get("out_of_memory"):
        return f"{row['name']}: out of memory"
    if "tokens_per_s" not in row:
        return f"{row['name']}: losses differ from the peer's by {row['fp32_loss_difference']:.1%}; not timed"
    text = f"{row['name']} {row['dtype']}: {row['tokens_per_s']:,.0f} tok/s, {row['share']:.0%} of the 4N floor"
    if row.get("peak_gib"):
        text += f", peak {row['peak_gib']:.1f} GiB"
    if "peer" in row:
        text += f"; {row['peer']} {row['peer_tokens_per_s']:,.0f} tok/s: {row['ratio']:.2f} times"
    return text + f" (gradient norms {', '.join(f'{n:.3g}' for n in row['grad_norms'][:4])})"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> list[Path]:
    """The bar chart of rows measured beside a peer."""
    done = [row for row in rows if "ratio" in row]
    if not done:
        return []
    bars = []
    for row in done:
        chosen = row.get("targets", "all")
        what = chosen if isinstance(chosen, str) else ", ".join(t.removesuffix("_proj") for t in chosen)
        for label, prefix, ours in (("specialize", "", True), (TUNING_PEERS[row["peer"]].label, "peer_", False)):
            speed = row.get(f"{prefix}spread") or spread([row[f"{prefix}tokens_per_s"]])
            bars.append(Bar(f"{label} ({what})", speed["median"], speed["p20"], speed["p80"], ours))
    floor = min(row["floor_tokens_per_s"] for row in done)
    return bar_chart(
        bars, path, title=f"Tuning, {done[0]['name'].removeprefix('tune ')}",
        unit="tokens per second (median, p20 to p80)",
        floors=[("4 N floor", floor)], note=f"rank {done[0]['rank']}, {done[0]['dtype']}; {done[0]['device']}",
    )  # fmt: skip


def _write(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(temporary, path)


def read_rows(path: Path, model_path: Path, max_length: int, count: int) -> list[TrainExample]:
    """The first ``count`` rows in the tuning format.

    Of a JSONL file ({"prompt", "response"} or {"instruction", "input", "output"}), or of a task file (.json).
    """
    from ..engine.tokenizer import Tokenizer
    from ..train.data import encode_examples, fit_examples

    def pair(row: dict[str, Any], where: str) -> tuple[str, str]:
        try:
            if "prompt" in row:
                return row["prompt"], row["response"]
            prompt = f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n"
            return prompt, row["output"]
        except (KeyError, TypeError):
            raise InputError(f"{where}: needs prompt and response, or instruction, input and output") from None

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            task = json.loads(text)
            rows = [
                {"instruction": task["instruction"], "input": example["input"], "output": example["outputs"][0]}
                for example in task["examples"]
            ]
        else:
            rows = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: neither rows (.jsonl) nor a task file (.json) ({reason})") from None
    pairs = [pair(row, f"{path}: row {number}") for number, row in enumerate(rows[:count], start=1)]
    return fit_examples(encode_examples(Tokenizer.from_pretrained(model_path), pairs), max_length=max_length)[0]


_SHORT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


@click.command("train", context_settings={"show_default": True})
@click.option("--model", default="smollm2-135m-instruct", help="Model folder, .gguf file or a name fetch knows.")
@click.option("--shape", type=click.Choice(sorted(SHAPES)), help="Random weights of this shape instead of a model.")
@click.option("--suite", type=click.Choice(["gpu"]), help="A list of shapes, for a CUDA device.")
@click.option("--seconds", type=float, default=300.0, help="Time of a suite.")
@click.option("--peer", type=click.Choice(list(TUNING_PEERS)), help="Train the same rows with this, step about.")
@click.option(
    "--peer-python", type=click.Path(path_type=Path), help="A Python that has the peer; else its own is made."
)
@click.option("--data", type=click.Path(path_type=Path), help="Rows (.jsonl) or a task file (.json); else random rows.")
@click.option("--num-rows", type=int, default=64)
@click.option("--max-length", type=int, default=512)
@click.option("--rank", type=int, default=8)
@click.option(
    "--targets", multiple=True, default=["q,k,v,o"], help="Layers to adapt, or all; more than once for more rows."
)
@click.option("--batch", type=int, default=8, help="Rows of an optimizer step.")
@click.option("--rounds", type=int, default=5, help="Timed steps.")
@click.option("--curve", type=int, default=1, help="Steps whose fp32 losses are compared first.")
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), default="bf16")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--threads", type=int, help="CPU threads.")
@click.option(
    "--json",
    "out",
    type=click.Path(path_type=Path),
    help="Write the rows of results here; with a peer a chart beside it.",
)
def command(
    model: str, shape: str | None, suite: str | None, seconds: float, peer: str | None, peer_python: Path | None,
    data: Path | None, num_rows: int, max_length: int, rank: int, targets: tuple[str, ...], batch: int, rounds: int,
    curve: int, dtype: str, device: str, threads: int | None, out: Path | None,
) -> int:  # fmt: skip
    """Tokens per second of tuning; with --peer also PEFT's, alternating in the same run."""
    from .peers.tuning import compare_shape, compare_tuning

    def say(text: str) -> None:
        click.echo(text, err=True)

    if threads:
        torch.set_num_threads(threads)
    if suite:
        if device == "cpu":
            raise click.UsageError("--suite gpu needs a CUDA device")
        results = run_suite(GPU_SUITE, seconds, out, device)
        return 0 if any(row.get("correct") for row in results) else 1
    if shape:
        lengths = [r.num_tokens for r in random_rows(batch, vocab=1000, longest=max_length)]
        setting: dict[str, Any] = {"lengths": lengths, "rank": rank, "dtype": dtype, "device": device}
        if peer:
            row = compare_shape(peer, shape, rounds=rounds, threads=threads, python=peer_python, say=say, **setting)
        else:
            row = measure_shape(shape, steps=rounds, **setting)
        results = [row]
        click.echo(_line(results[0]))
        if out is not None:
            _write(out, results)
    else:
        from specialize.fetch import model_path

        path = Path(model_path(model))
        if data is not None:
            rows = read_rows(data, path, max_length, num_rows)
        else:
            rows = random_rows(num_rows, vocab=1000, longest=max_length)
        results = []
        for choice in targets:
            chosen = "all" if choice == "all" else tuple(_SHORT.get(t.strip(), t.strip()) for t in choice.split(","))
            common: dict[str, Any] = {
                "rank": rank, "targets": chosen, "dtype": dtype, "device": device, "batch_size": batch, "rounds": rounds
            }  # fmt: skip
            if peer:
                row = compare_tuning(
                    peer, path, rows, curve_steps=curve, threads=threads, python=peer_python,
                    say=say, **common,
                )  # fmt: skip
            else:
                row = measure_alone(path, rows, **common)
            click.echo(_line(row))
            results.append(row)
            if out is not None:
                _write(out, results)
    if peer and out is not None:
        draw(results, out.with_suffix(""))
    return 0 if all(row["correct"] for row in results) else 1


def measure_alone(
    model_path: Path, rows: Sequence[TrainExample], *, rank: int, targets: str | tuple[str, ...], dtype: str,
    device: str, batch_size: int, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """One row of results without a peer."""
    with tempfile.TemporaryDirectory() as folder:
        model = Model.from_pretrained(model_path, dtype=DTYPES[dtype], device=device, inference=False)
        budget = max(sum(r.num_tokens for r in rows[i : i + batch_size]) for i in range(0, len(rows), batch_size))
        trainer = make_trainer(
            model, rows, Path(folder), rank=rank, targets=targets, batch_size=batch_size, max_batch_tokens=budget
        )
        steps = [timed_step(trainer) for _ in range(rounds + 1)][1:]
    speed = median(s["tokens"] / s["seconds"] for s in steps)
    rate = matrix_rate_tflop_s(device, dtype)
    floor = rate * 1e12 / operations_per_token(model.config)
    norms = [s["grad_norm"] for s in steps]
    return {
        "name": f"tune {model_path.name}", "dtype": dtype, "rank": rank, "targets": targets, "batch_size": batch_size,
        "threads": torch.get_num_threads(), "tokens_per_s": speed, "grad_norms": norms,
        "losses": [s["loss"] for s in steps], "correct": all(math.isfinite(n) and n > 0 for n in norms),
        "gemm_tflop_s": rate, "floor_tokens_per_s": floor, "share": speed / floor, **environment(),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    try:
        return command.main(args=list(argv) if argv is not None else None, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except PeerError as error:
        click.echo(f"error: {error}", err=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
