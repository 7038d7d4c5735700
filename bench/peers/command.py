"""Generation beside other software on this machine: the same prompts, lengths and sampling, in alternating runs.

Each peer is installed on first use into an environment of its own in the user's cache folder; one that does not
install, load or run is named with the reason and left out. Greedy tokens are compared before anything is timed.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import click
import torch

from specialize.errors import InputError

from ...engine.config import ModelConfig
from ...engine.convert import convert
from ...engine.gguf import GGUFFile
from ...engine.tokenizer import Tokenizer
from ..charts import Bar, bar_chart
from ..environment import environment
from ..floor import Ceilings, generation_floor, measure_cpu
from ..generate import write_json
from .install import PEERS, PeerError, ensure
from .measure import Contender, Setting, reference_tokens, results, run_rounds, start_ours, start_peer
from .workload import peers_workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BITS = {"nf4": 4.5, "int8": 8.0, "fp8": 8.0}  # bits a weight of the blocks moves; NF4 with its scales


def _names(_: Any, __: Any, value: str) -> list[str]:
    names = [part.strip() for part in value.split(",") if part.strip()]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: no such peer; allowed: {', '.join(PEERS)}")
    return names


@click.command(help=__doc__)
@click.option(
    "--peers",
    default="vllm,openvino,transformers",
    show_default=True,
    callback=_names,
    help=f"Any of {', '.join(PEERS)}; empty for ours alone.",
)
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="Name, folder or GGUF file.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Task file (.json) or prompts (.jsonl); else made up.")
@click.option("--num-prompts", type=click.IntRange(1), help="How many; 32 of a task file, all of a .jsonl file.")
@click.option("--new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--peer-seconds",
    type=float,
    default=180.0,
    show_default=True,
    help="A contender whose runs took longer together sits out the rest, after two rounds at least.",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
@click.option("--quantize", default="", help="Ours also with these weights: a list such as int8,nf4.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each; as many as CPUs if left out.")
@click.option(
    "--kv-gib", type=click.IntRange(1), default=4, show_default=True, help="KV cache of peers that want a size."
)
@click.option("--install-only", is_flag=True, help="Install the peers and stop.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for peers.json, peers.png and peers.svg.")
def command(
    peers: list[str], model: str, prompts: Path | None, num_prompts: int | None, new_tokens: int, rounds: int,
    peer_seconds: float, dtype: str, quantize: str, device: str, threads: int | None, kv_gib: int, install_only: bool,
    out: Path | None,
) -> int:  # fmt: skip
    def say(text: str) -> None:
        click.echo(text, err=True)

    if install_only:
        return _install(peers, say)
    from specialize.fetch import model_path

    source = Path(model_path(model))
    tokenizer = Tokenizer.from_pretrained(source)
    workload = peers_workload(prompts, tokenizer.encode, new_tokens, num_prompts)
    threads = threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="specialize-peers-") as folder:
        is_gguf = source.suffix == ".gguf"
        checkpoint = source
        if is_gguf and any(PEERS[name].weights == "checkpoint" for name in peers):
            checkpoint = convert(source, Path(folder) / source.stem, dtype=DTYPES[dtype])
        setting = Setting(
            str(source), str(checkpoint), str(source) if is_gguf else None, dtype, device, threads, kv_gib
        )
        fp32_peer = ("transformers", PEERS["transformers"]) if "transformers" in peers else None
        reference = reference_tokens(setting, workload, say, fp32_peer)
        if "equal" in reference:
            say(f"greedy fp32 tokens: {reference['equal']} of {reference['prompts']} prompts as {reference['peer']}'s")
        contenders: list[Contender] = []
        try:
            for form in (None, *(part.strip() for part in quantize.split(",") if part.strip())):
                contenders.append(start_ours(setting, workload, form, dtype, Path(folder)))
            for name in peers:
                contenders.append(start_peer(name, PEERS[name], setting, workload, Path(folder), say))
            for contender in contenders:
                say(f"{contender.label}: " + (contender.error or f"ready after {contender.load_seconds:.0f} s"))
            config = GGUFFile(source).config if is_gguf else ModelConfig.from_folder(source)
            torch.set_num_threads(threads)
            ceilings = measure_cpu(DTYPES[dtype]) if device == "cpu" else None
            body: dict[str, Any] = {
                **environment(), "model": model, "dtype": dtype, "threads": threads,
                "workload": {
                    "name": workload.name, "prompts": len(workload.prompts), "prompt_tokens": workload.prompt_tokens,
                    "new_tokens": workload.new_tokens, "temperature": workload.temperature, "top_p": workload.top_p,
                },
                "check": {key: value for key, value in reference.items() if key != "greedy"},
                "floors": _floors(config, workload, contenders, dtype, ceilings) if ceilings else {},
            }  # fmt: skip

            def keep() -> None:
                body["rows"] = results(contenders, workload, reference["greedy"])
                if out is not None:
                    write_json(out / "peers.json", body)

            run_rounds(contenders, workload, rounds, peer_seconds, say, keep)
            keep()
            if ceilings:
                again = measure_cpu(DTYPES[dtype])
                best = Ceilings(*(max(pair) for pair in zip(astuple(ceilings), astuple(again), strict=True)))
                body["floors"] = _floors(config, workload, contenders, dtype, best)
                _drop_floors_that_were_beaten(body, say)
                keep()
        finally:
            for contender in contenders:
                contender.close()
    click.echo(table(body))
    if out is not None and any("tokens_per_s" in row for row in body["rows"]):
        draw(body, out / "peers")
    return 0 if all(c.seconds for c in contenders if c.ours) else 1


def _install(peers: Sequence[str], say: Any) -> int:
    failed = 0
    for name in peers:
        try:
            say(f"{name}: {ensure(PEERS[name], say)}")
        except PeerError as error:
            say(f"{name}: {error}")
            failed = 1
    return failed


def _floors(
    config: ModelConfig, workload: Any, contenders: Sequence[Contender], dtype: str, ceilings: Ceilings
) -> dict[str, Any]:
    """One for each number format of ours; quantised weights are still multiplied at the dtype's rate."""
    lengths = [len(prompt) for prompt in workload.prompts]
    bits = {
        c.weights: BITS.get(c.weights.partition("+")[0], 8.0 * DTYPES[dtype].itemsize) for c in contenders if c.ours
    }
    return {
        name: generation_floor(
            config, lengths, workload.new_tokens, ceilings, bytes_per_weight=value / 8,
            bytes_per_cache_value=DTYPES[dtype].itemsize,
        )
        for name, value in bits.items()
    }  # fmt: skip


def _drop_floors_that_were_beaten(body: dict[str, Any], say: Any) -> None:
    """A run below its floor: the rates were measured while the machine was busy, and none of the floors holds."""
    for row in body["rows"]:
        floor = body["floors"].get(row["weights"])
        if floor and "tokens_per_s" in row and row["tokens_per_s"]["p80"] > floor["tokens_per_s"]:
            say(f"floors left out: {row['label']} was faster, so the machine was busy while they were measured")
            body["floors"] = {}
            return


def table(body: dict[str, Any]) -> str:
    """The rows as text, fastest first, then what was left out and why."""
    done = sorted((r for r in body["rows"] if "tokens_per_s" in r), key=lambda r: -r["tokens_per_s"]["median"])
    lines = [f"{'':34s} {'tok/s':>8s} {'p20-p80':>13s} {'seconds':>8s} {'MiB':>6s} {'greedy':>7s}  ours is"]
    for row in done:
        speed = row["tokens_per_s"]
        seconds = body["workload"]["prompts"] * body["workload"]["new_tokens"] / speed["median"]
        times = ", ".join(f"{value:.2f} x ({name.removeprefix('ours ')})" for name, value in row["times"].items())
        lines.append(
            f"{row['label']:34s} {speed['median']:8.1f} {speed['p20']:6.0f}-{speed['p80']:<6.0f} {seconds:8.2f} "
            f"{row['memory_bytes'] / 2**20:6.0f} {100 * row['greedy_agreement']:6.0f}%  {times}"
        )
    for name, floor in body["floors"].items():
        lines.append(f"{'floor, ' + name:34s} {floor['tokens_per_s']:8.1f} {'':13s} {floor['seconds']:8.2f}")
    lines += [f"{row['label']}: left out: {row['error']}" for row in body["rows"] if "error" in row]
    return "\n".join(lines)


def draw(body: dict[str, Any], path: Path) -> list[Path]:
    """The bar chart of a finished run."""
    bars = [
        Bar(f"{row['label']}", **row["tokens_per_s"], ours=row["name"].startswith("ours"))
        for row in body["rows"]
        if "tokens_per_s" in row
    ]
    work = body["workload"]
    return bar_chart(
        bars, path, title=f"Generated tokens per second, {body['model']}",
        unit="tokens per second (median, p20 to p80)",
        floors=[(f"floor, {name}", floor["tokens_per_s"]) for name, floor in body["floors"].items()],
        note=f"{work['prompts']} prompts of {work['prompt_tokens']:,} tokens together, "
        f"{work['new_tokens']} new tokens each; {body['device']}",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, stop)  # so that paused peers are ended, too
    try:
        return command.main(args=list(argv) if argv is not None else None, standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except PeerError as error:
        raise InputError(str(error)) from None
    finally:
        signal.signal(signal.SIGTERM, earlier)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
