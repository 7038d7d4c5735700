"""The measurement: greedy tokens compared first, then timed rounds in alternating order, one process a contender."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..floor import spread
from ..generate import Workload
from .install import SCRIPTS, PeerError, PeerSpec, ensure
from .process import PeerProcess

GREEDY_PROMPTS, GREEDY_CUT, GREEDY_TOKENS = 4, 200, 16
MIN_ROUNDS = 2


@dataclass
class Contender:
    """One line of the table: ours in some number format, or a peer. ``error`` says why it was left out."""

    name: str
    label: str
    weights: str
    process: PeerProcess | None = None
    versions: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    load_seconds: float = 0.0
    memory_bytes: int = 0
    greedy: list[list[int]] = field(default_factory=list)
    error: str | None = None

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")

    def fail(self, error: PeerError) -> None:
        self.error = str(error)
        self.close()

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None


@dataclass(frozen=True)
class Setting:
    """What every contender is told: where the weights lie in each form, and how to run."""

    source: str  # as the user named it, for ours
    checkpoint: str  # a folder with safetensors
    gguf: str | None
    dtype: str
    device: str
    threads: int | None
    kv_gib: int

    def load_arguments(self, workload: Workload) -> dict[str, Any]:
        longest = max(map(len, workload.prompts)) + workload.new_tokens
        return {
            "source": self.source, "model": self.checkpoint, "gguf": self.gguf, "dtype": self.dtype,
            "device": self.device, "threads": self.threads, "batch": len(workload.prompts),
            "max_context": -(-longest // 64) * 64, "kv_gib": self.kv_gib,
        }  # fmt: skip


def start_ours(setting: Setting, workload: Workload, quantize: str | None, dtype: str, logs: Path) -> Contender:
    """Our generator in a process of its own, loaded and paused."""
    name = f"ours {quantize or dtype}"
    contender = Contender(name, f"specialize, {quantize or dtype}", quantize or dtype)
    arguments = {**setting.load_arguments(workload), "dtype": dtype, "quantize": quantize}
    _start(contender, sys.executable, SCRIPTS / "specialize_generate.py", arguments, workload, logs)
    return contender


def start_peer(
    name: str, spec: PeerSpec, setting: Setting, workload: Workload, logs: Path, say: Callable[[str], None],
    *, python: Path | None = None, dtype: str | None = None,
) -> Contender:  # fmt: skip
    """A peer, installed if it is not yet, loaded and paused."""
    number_format = "of the GGUF file" if spec.weights == "gguf" else dtype or setting.dtype
    contender = Contender(name, spec.label, number_format)
    try:
        if spec.weights == "gguf" and setting.gguf is None:
            raise PeerError("reads GGUF files alone, and the model is none")
        python = python or ensure(spec, say)
    except PeerError as error:
        contender.fail(error)
        return contender
    arguments = {**setting.load_arguments(workload), **spec.arguments, **({"dtype": dtype} if dtype else {})}
    _start(contender, python, spec.script_path, arguments, workload, logs)
    return contender


def _start(
    contender: Contender, python: str | Path, script: Path, arguments: dict[str, Any], workload: Workload, logs: Path
) -> None:
    began = time.perf_counter()
    try:
        process = contender.process = PeerProcess(
            contender.name, python, script, logs / f"{contender.name.replace(' ', '-')}.log"
        )
        contender.versions = process.ask("load", **arguments)["versions"]
        contender.load_seconds = time.perf_counter() - began
        contender.greedy = greedy_tokens(process, workload)  # also warms it up
        process.pause()
    except PeerError as error:
        contender.fail(error)
    except BaseException:  # Ctrl-C while it loads
        contender.close()
        raise


def greedy_tokens(process: PeerProcess, workload: Workload) -> list[list[int]]:
    """Greedy continuations of a few prompts, one prompt at a time, so that padding and batching cannot matter."""
    prompts = [prompt[:GREEDY_CUT] for prompt in workload.prompts[:GREEDY_PROMPTS]]
    return [
        process.ask("run", prompts=[prompt], new_tokens=GREEDY_TOKENS, temperature=0.0, top_p=1.0)["token_ids"][0]
        for prompt in prompts
    ]


def agreement(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """Mean share of the tokens before the first that differs (after it two greedy texts are two texts)."""
    shares = []
    for a, b in zip(one, other, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        shares.append(same / max(len(a), len(b), 1))
    return sum(shares) / len(shares)


def reference_tokens(
    setting: Setting, workload: Workload, say: Callable[[str], None], peer: tuple[str, PeerSpec] | None,
    python: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Our greedy tokens in fp32; beside them the peer's in fp32, which must be the same ones.

    Raises PeerError where ours cannot run, RuntimeError where the tokens differ: no speed is worth reporting then.
    """
    with tempfile.TemporaryDirectory() as folder:
        mine = start_ours(setting, workload, None, "fp32", Path(folder))
        mine.close()
        if mine.error:
            raise PeerError(f"specialize: {mine.error}")
        result: dict[str, Any] = {"prompts": len(mine.greedy), "tokens": GREEDY_TOKENS, "greedy": mine.greedy}
        if peer is None:
            return result
        theirs = start_peer(*peer, setting, workload, Path(folder), say, python=python, dtype="fp32")
        theirs.close()
        if theirs.error:
            return {**result, "error": f"{theirs.label}: {theirs.error}"}
        result |= {"peer": theirs.label, "equal": sum(a == b for a, b in zip(mine.greedy, theirs.greedy, strict=True))}
        if result["equal"] != result["prompts"]:
            raise RuntimeError(
                f"greedy fp32 tokens equal {theirs.label}'s on {result['equal']} of {result['prompts']} prompts"
            )
        return result


def run_rounds(
    contenders: Sequence[Contender], workload: Workload, rounds: int, budget_s: float, say: Callable[[str], None],
    after_round: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Times ``rounds`` runs of each, there and back; one that has used ``budget_s`` sits out after MIN_ROUNDS."""
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            process = contender.process
            if process is None or (number >= MIN_ROUNDS and sum(contender.seconds) > budget_s):
                continue
            process.resume()
            try:
                answer = process.ask(
                    "run", prompts=workload.prompts, new_tokens=workload.new_tokens, temperature=workload.temperature,
                    top_p=workload.top_p,
                )  # fmt: skip
                lengths = {len(tokens) for tokens in answer["token_ids"]}
                if lengths != {workload.new_tokens}:
                    raise PeerError(f"made {sorted(lengths)} new tokens where {workload.new_tokens} were asked for")
            except PeerError as error:
                contender.fail(error)
                say(f"{contender.label}: {error}")
                continue
            contender.seconds.append(answer["seconds"])
            contender.memory_bytes = max(contender.memory_bytes, process.memory_bytes())
            process.pause()
            speed = len(workload.prompts) * workload.new_tokens / answer["seconds"]
            say(f"round {number + 1}: {contender.label} {answer['seconds']:.2f} s, {speed:.0f} tok/s")
        after_round()


def results(
    contenders: Sequence[Contender], workload: Workload, reference: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """A row each. ``times``: how many times its throughput each of ours has, median over rounds side by side."""
    generated = len(workload.prompts) * workload.new_tokens
    ours = [c for c in contenders if c.ours and c.seconds]
    rows = []
    for contender in contenders:
        row: dict[str, Any] = {"name": contender.name, "label": contender.label, "weights": contender.weights}
        row |= {"versions": contender.versions} if contender.versions else {}
        if contender.error:
            row["error"] = contender.error
        if contender.seconds:
            row |= {
                "seconds": contender.seconds,
                "tokens_per_s": spread([generated / s for s in contender.seconds]),
                "load_seconds": contender.load_seconds,
                "memory_bytes": contender.memory_bytes,
                "greedy_agreement": agreement(contender.greedy, reference),
            }
            row["times"] = {
                mine.name: median(b / a for a, b in zip(mine.seconds, contender.seconds, strict=False))
                for mine in ours
                if mine is not contender
            }
        rows.append(row)
    return rows
