"""Tuning beside transformers + PEFT: the same rows from the same adapter, step about; losses compared first."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...engine.generator import choose_dtype
from ...engine.model import Model
from ...train.data import TrainExample
from ...train.loop import Trainer
from ..environment import environment
from ..floor import spread
from ..train import (
    SHAPES,
    make_trainer,
    matrix_rate_tflop_s,
    measure_shape,
    operations_per_token,
    shape_rows,
    timed_step,
)
from .install import TUNING_PEERS, ensure
from .process import PeerProcess


def compare_tuning(
    peer_name: str,
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
    python: Path | None = None,
    learning_rate: float = 5e-4,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """One row of results: tokens per second of both and their ratio.

    Correctness first: in fp32 the losses of the first ``curve_steps`` steps must agree within 1 %, else no speed is
    reported. ``python``: an interpreter that has the peer; else its own environment, made on first use. Raises
    PeerError where the peer does not install, load or answer.
    """
    spec = TUNING_PEERS[peer_name]
    python = python or ensure(spec, say)
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    settings = {
        "rank": rank, "alpha": 2.0 * rank, "targets": targets, "batch_size": batch_size, "learning_rate": learning_rate,
        "max_batch_tokens": max(sum(row.num_tokens for row in batch) for batch in batches),
    }  # fmt: skip
    result: dict[str, Any] = {
        "name": f"tune {model_path.name}", "peer": peer_name, "dtype": dtype, "rank": rank, "targets": targets,
        "batch_size": batch_size, "threads": threads, "rows": len(rows), **environment(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def start(kind: str) -> tuple[Trainer, PeerProcess, dict[str, str]]:
            model = Model.from_pretrained(
                model_path, dtype=choose_dtype(kind, torch.device(device)), device=device, inference=False
            )
            trainer = make_trainer(model, rows, folder, **settings)
            adapter = trainer.trainable.save(folder / f"adapter-{kind}")
            (folder / "rows.json").write_text(json.dumps([[list(r.prompt_ids), list(r.response_ids)] for r in rows]))
            peer = PeerProcess(peer_name, python, spec.script_path, folder / f"{kind}.log")
            try:
                answer = peer.ask(
                    "load", model=str(model_path), adapter=str(adapter), rows=str(folder / "rows.json"), dtype=kind,
                    device=device, threads=threads, learning_rate=learning_rate, **spec.arguments,
                )  # fmt: skip
            except BaseException:  # an error of the peer's, or Ctrl-C while it loads
                peer.close()
                raise
            peer.pause()
            return trainer, peer, answer["versions"]

        def both(trainer: Trainer, peer: PeerProcess, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
            first = step % len(batches) * batch_size
            ours = timed_step(trainer)
            peer.resume()
            theirs = peer.ask("step", first=first, last=min(first + batch_size, len(rows)))
            peer.pause()
            return ours, theirs

        trainer, peer, result["peer_versions"] = start("fp32")
        curve = []
        try:
            for step in range(curve_steps):
                ours, theirs = both(trainer, peer, step)
                curve.append((ours["loss"], theirs["loss"]))
                say(f"fp32 step {step + 1}: loss {ours['loss']:.5f}, peer {theirs['loss']:.5f}")
        finally:
            peer.close()
            del trainer
        worst = max(abs(a - b) / abs(b) for a, b in curve)
        result |= {"fp32_losses": curve, "fp32_loss_difference": worst, "correct": worst <= 0.01}
        if not result["correct"]:
            return result

        trainer, peer, _ = start(dtype)
        pairs = []
        try:
            both(trainer, peer, 0)  # warm-up: kernels are compiled, memory is fetched
            for step in range(1, rounds + 1):
                ours, theirs = both(trainer, peer, step)
                if ours["tokens"] != theirs["tokens"]:
                    raise RuntimeError(
                        f"{ours['tokens']} tokens here, {theirs['tokens']} at the peer: not the same rows"
                    )
                pairs.append((ours, theirs))
                speeds = [f"{p['tokens'] / p['seconds']:.0f} tok/s" for p in (ours, theirs)]
                say(f"step {step}: {speeds[0]}, peer {speeds[1]}")
            memory_bytes = peer.memory_bytes()
        finally:
            peer.close()
    mine, other = ([pair[i]["tokens"] / pair[i]["seconds"] for pair in pairs] for i in (0, 1))
    rate = matrix_rate_tflop_s(device, dtype)
    floor = rate * 1e12 / operations_per_token(trainer.model.config)
    return result | {
        "tokens_per_s": median(mine), "peer_tokens_per_s": median(other), "peer_memory_bytes": memory_bytes,
        "ratio": median(a / b for a, b in zip(mine, other, strict=True)),
        "spread": spread(mine), "peer_spread": spread(other), "tokens_per_s_all": mine, "peer_tokens_per_s_all": other,
        "grad_norms": [p[0]["grad_norm"] for p in pairs], "peer_grad_norms": [p[1]["grad_norm"] for p in pairs],
        "gemm_tflop_s": rate, "floor_tokens_per_s": floor, "share": median(mine) / floor,
    }  # fmt: skip


def compare_shape(
    peer_name: str,
    shape: str,
    *,
    lengths: Sequence[int],
    rank: int,
    rounds: int,
    dtype: str = "bf16",
    device: str = "cuda",
    threads: int | None = None,
    python: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Random weights of a named shape, all linear layers adapted: ours, and after it the peer in the same run.

    One after the other, since two such models do not fit beside each other. The weights are not the same ones, so
    losses are not compared here (``compare_tuning`` does); gradient norms of both are told.
    """
    spec = TUNING_PEERS[peer_name]
    python = python or ensure(spec, say)
    result = measure_shape(shape, lengths=lengths, rank=rank, steps=rounds, dtype=dtype, device=device)
    rows = shape_rows(SHAPES[shape]["vocab_size"], lengths, 1, 0.25)
    with tempfile.TemporaryDirectory() as name:
        written = Path(name) / "rows.json"
        written.write_text(json.dumps([[list(r.prompt_ids), list(r.response_ids)] for r in rows]))
        peer = PeerProcess(peer_name, python, spec.script_path, Path(name) / "log")
        try:
            versions = peer.ask(
                "load", config=SHAPES[shape], rank=rank, rows=str(written), dtype=dtype, device=device,
                threads=threads or torch.get_num_threads(), learning_rate=1e-4, **spec.arguments,
            )["versions"]  # fmt: skip
            steps = [peer.ask("step", first=0, last=len(rows)) for _ in range(rounds + 2)][2:]
        finally:
            peer.close()
    speed = median(step["tokens"] / step["seconds"] for step in steps)
    return result | {
        "peer": peer_name, "peer_versions": versions, "peer_tokens_per_s": speed,
        "ratio": result["tokens_per_s"] / speed, "peer_grad_norms": [step["grad_norm"] for step in steps],
    }  # fmt: skip
