"""Tuning speed: tokens per second of the training loop, against a peer in the same run and against the floor.

Tokens are those of the rows, prompt and response, never padding; ours and the peer's count the same. Every measurement
says its gradient norms: a loop that trains nothing is fast. The floor is the time of 4 N operations a token, N being
the parameters of the blocks, at the measured rate of one large product: frozen weights need no gradient of their own.

    python -m specialize.bench.train --model smollm2-135m-instruct --peer peft
    python -m specialize.bench.train --suite gpu --seconds 200 --json out.json
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
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
from .environment import ceilings, environment

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


def cpu_gemm_tflop_s(dtype: torch.dtype) -> float:
    """Rate of one large product on this CPU with the present number of threads."""
    n = 2048
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times) / 1e12


def _trainer(model: Model, rows: Sequence[TrainExample], folder: Path, **settings: Any) -> Trainer:
    """A trainer that takes the rows in the order given, ``batch_size`` a step, again from the start after the last."""
    defaults = {"warmup_ratio": 0.0, "schedule": "constant", "epochs": 1e6, "max_grad_norm": math.inf}
    return Trainer(model, rows, TrainConfig(**{**defaults, **settings}), folder, shuffle=False)


def _timed_step(trainer: Trainer) -> dict[str, Any]:
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


class Peer:
    """A subprocess that trains the same rows with another library, step by step as it is told."""

    def __init__(self, script: Path, python: str, settings: dict[str, Any]) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [python, str(script), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        self.versions = self._read()

    def step(self, first: int, last: int) -> dict[str, Any]:
        """Trains on rows ``first:last``; seconds, loss and tokens of the step."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{first} {last}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise InputError(f"the peer ended with code {self.process.wait()}; see its message above")

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def compare_with_peft(
    model_path: Path,
    rows: Sequence[TrainExample],
    *,
    rank: int,
    targets: str | tuple[str, ...],
    dtype: str = "bf16",
    device: str = "cpu",
    batch_size: int = 8,
    rounds: int = 5,
    curve_steps: int = 1,
    threads: int | None = None,
    python: str = sys.executable,
    learning_rate: float = 5e-4,
    progress: Any = None,
) -> dict[str, Any]:
    """One row of results: tokens per second of both, step about, from the same adapter on the same rows.

    Correctness first: in fp32 the losses of the first ``curve_steps`` steps must agree within 1 %, else no speed is
    reported.
    """
    say = progress or (lambda text: None)
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    script = Path(__file__).parent / "peers" / "scripts" / "peft_train.py"
    settings = {
        "rank": rank, "alpha": 2.0 * rank, "targets": targets, "batch_size": batch_size,
        "learning_rate": learning_rate, "max_batch_tokens": max(sum(r.num_tokens for r in rows[i : i + batch_size])
                                                               for i in range(0, len(rows), batch_size)),
    }  # fmt: skip
    result: dict[str, Any] = {
        "name": f"tune {model_path.name}", "peer": "peft", "dtype": dtype, "rank": rank, "targets": targets,
        "batch_size": batch_size, "threads": threads, "rows": len(rows), **environment(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:

        def start(kind: str) -> tuple[Trainer, Peer]:
            model = Model.from_pretrained(model_path, dtype=DTYPES[kind], device=device, inference=False)
            trainer = _trainer(model, rows, Path(folder), **settings)
            adapter = trainer.trainable.save(Path(folder) / f"adapter-{kind}")
            (Path(folder) / "rows.json").write_text(
                json.dumps([[list(r.prompt_ids), list(r.response_ids)] for r in rows])
            )
            peer = Peer(script, python, {
                "model": str(model_path), "adapter": str(adapter), "rows": str(Path(folder) / "rows.json"),
                "dtype": kind, "device": device, "threads": threads, "learning_rate": learning_rate,
            })  # fmt: skip
            return trainer, peer

        steps_per_epoch = -(-len(rows) // batch_size)

        def both(trainer: Trainer, peer: Peer, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
            first = step % steps_per_epoch * batch_size
            return _timed_step(trainer), peer.step(first, min(first + batch_size, len(rows)))

        trainer, peer = start("fp32")
        result["peer_versions"] = peer.versions
        curve = []
        for step in range(curve_steps):
            ours, theirs = both(trainer, peer, step)
            curve.append((ours["loss"], theirs["loss"]))
            say(f"fp32 step {step + 1}: loss {ours['loss']:.5f}, peer {theirs['loss']:.5f}")
        peer.close()
        del trainer
        worst = max(abs(a - b) / abs(b) for a, b in curve)
        result |= {"fp32_losses": curve, "fp32_loss_difference": worst, "correct": worst <= 0.01}
        if not result["correct"]:
            return result

        trainer, peer = start(dtype)
        both(trainer, peer, 0)  # warm-up: kernels are compiled, memory is fetched
        pairs = []
        for step in range(1, rounds + 1):
            ours, theirs = both(trainer, peer, step)
            if ours["tokens"] != theirs["tokens"]:
                raise AssertionError(f"{ours['tokens']} tokens here, {theirs['tokens']} at the peer: not the same rows")
            pairs.append((ours, theirs))
            say(
                f"step {step}: {ours['tokens'] / ours['seconds']:.0f} tok/s, "
                f"peer {theirs['tokens'] / theirs['seconds']:.0f} tok/s"
            )
        peer.close()
    speeds = [[p["tokens"] / p["seconds"] for p in column] for column in zip(*pairs, strict=True)]
    rate = ceilings()["gemm_tflop_s"] if device.startswith("cuda") else cpu_gemm_tflop_s(DTYPES[dtype])
    floor = rate * 1e12 / operations_per_token(trainer.model.config)
    result |= {
        "tokens_per_s": median(speeds[0]), "peer_tokens_per_s": median(speeds[1]),
        "ratio": median(a / b for a, b in zip(*speeds, strict=True)),
        "tokens_per_s_all": speeds[0], "peer_tokens_per_s_all": speeds[1],
        "grad_norms": [p[0]["grad_norm"] for p in pairs], "peer_grad_norms": [p[1]["grad_norm"] for p in pairs],
        "gemm_tflop_s": rate, "floor_tokens_per_s": floor, "share": median(speeds[0]) / floor,
    }  # fmt: skip
    return result


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
    rng = np.random.default_rng(0)
    rows = []
    for i in range(micro_batches):
        for length in lengths:
            ids = rng.integers(3, config.vocab_size, length).tolist()
            answer = max(1, round(length * response))
            rows.append(TrainExample(ids[:-answer], ids[-answer:], name=f"{i}"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(
            model, rows, Path(folder), rank=rank, batch_size=len(rows), max_batch_tokens=sum(lengths),
            recompute="layers" if checkpoint_layers else "none", learning_rate=1e-4,
        )  # fmt: skip
        first = _timed_step(trainer)
        _timed_step(trainer)
        _synchronize(trainer)
        start = time.perf_counter()
        pending = [trainer.train_step() for _ in range(steps)]
        numbers = [p.wait() for p in pending]
        _synchronize(trainer)
        seconds = (time.perf_counter() - start) / steps
    tokens = pending[0].tokens
    rate = ceilings()["gemm_tflop_s"] if cuda else cpu_gemm_tflop_s(DTYPES[dtype])
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


def _write(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(temporary, path)


def read_rows(path: Path, model_path: Path, max_length: int) -> list[TrainExample]:
    """Rows of a JSONL file ({"prompt", "response"} or {"instruction", "input", "output"}) in the tuning format."""
    from ..engine.tokenizer import Tokenizer
    from ..train.data import encode_examples, fit_examples

    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if "prompt" in row:
            pairs.append((row["prompt"], row["response"]))
        elif "instruction" in row:
            prompt = f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n"
            pairs.append((prompt, row["output"]))
        else:
            raise InputError(f"{path}:{number}: needs prompt and response, or instruction, input and output")
    return fit_examples(encode_examples(Tokenizer.from_pretrained(model_path), pairs), max_length=max_length)[0]


@click.command("train", context_settings={"show_default": True})
@click.option("--model", default="smollm2-135m-instruct", help="Model folder, .gguf file or a name fetch knows.")
@click.option("--shape", type=click.Choice(sorted(SHAPES)), help="Random weights of this shape instead of a model.")
@click.option("--suite", type=click.Choice(["gpu"]), help="A list of shapes, for a CUDA device.")
@click.option("--seconds", type=float, default=300.0, help="Time of a suite.")
@click.option("--peer", type=click.Choice(["peft"]), help="Train the same rows with this, step about.")
@click.option("--peer-python", default=sys.executable, help="Python that has the peer installed.")
@click.option("--rows", "rows_path", type=click.Path(exists=True, path_type=Path), help="JSONL; else random rows.")
@click.option("--num-rows", type=int, default=64)
@click.option("--max-length", type=int, default=512)
@click.option("--rank", type=int, default=8)
@click.option("--targets", default="q_proj,k_proj,v_proj,o_proj", help="Layers to adapt, or all.")
@click.option("--batch", type=int, default=8, help="Rows of an optimizer step.")
@click.option("--rounds", type=int, default=5, help="Timed steps.")
@click.option("--curve", type=int, default=1, help="Steps whose fp32 losses are compared first.")
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), default="bf16")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the rows of results here.")
def command(
    model: str, shape: str | None, suite: str | None, seconds: float, peer: str | None, peer_python: str,
    rows_path: Path | None, num_rows: int, max_length: int, rank: int, targets: str, batch: int, rounds: int,
    curve: int, dtype: str, device: str, threads: int | None, out: Path | None,
) -> int:  # fmt: skip
    """Tokens per second of tuning; with --peer also PEFT's, alternating in the same run."""
    if threads:
        torch.set_num_threads(threads)
    if suite:
        if device == "cpu":
            raise click.UsageError("--suite gpu needs a CUDA device")
        results = run_suite(GPU_SUITE, seconds, out, device)
        return 0 if any(row.get("correct") for row in results) else 1
    if shape:
        lengths = [r.num_tokens for r in random_rows(batch, vocab=1000, longest=max_length)]
        row = measure_shape(shape, lengths=lengths, rank=rank, steps=rounds, dtype=dtype, device=device)
    else:
        from specialize.fetch import model_path

        path = Path(model_path(model))
        if rows_path is not None:
            rows = read_rows(rows_path, path, max_length)[:num_rows]
        else:
            rows = random_rows(num_rows, vocab=1000, longest=max_length)
        chosen = "all" if targets == "all" else tuple(t.strip() for t in targets.split(","))
        if peer:
            row = compare_with_peft(
                path, rows, rank=rank, targets=chosen, dtype=dtype, device=device, batch_size=batch, rounds=rounds,
                curve_steps=curve, threads=threads, python=peer_python,
                progress=lambda text: click.echo(text, err=True),
            )  # fmt: skip
        else:
            row = measure_alone(path, rows, rank=rank, targets=chosen, dtype=dtype, device=device, batch_size=batch,
                                rounds=rounds)  # fmt: skip
    click.echo(_line(row))
    if out is not None:
        _write(out, [row])
    return 0 if row["correct"] else 1


def measure_alone(
    model_path: Path, rows: Sequence[TrainExample], *, rank: int, targets: str | tuple[str, ...], dtype: str,
    device: str, batch_size: int, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """One row of results without a peer."""
    with tempfile.TemporaryDirectory() as folder:
        model = Model.from_pretrained(model_path, dtype=DTYPES[dtype], device=device, inference=False)
        budget = max(sum(r.num_tokens for r in rows[i : i + batch_size]) for i in range(0, len(rows), batch_size))
        trainer = _trainer(
            model, rows, Path(folder), rank=rank, targets=targets, batch_size=batch_size, max_batch_tokens=budget
        )
        steps = [_timed_step(trainer) for _ in range(rounds + 1)][1:]
    speed = median(s["tokens"] / s["seconds"] for s in steps)
    rate = ceilings()["gemm_tflop_s"] if device.startswith("cuda") else cpu_gemm_tflop_s(DTYPES[dtype])
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


if __name__ == "__main__":
    sys.exit(main())
