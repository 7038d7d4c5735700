"""Everything that needs a GPU, in one call and within a time: proofs, kernel benchmarks, generation and training
throughput.

Parts run in child processes, the most important first, each with a share of what time is left. What a part has
written when it is stopped counts; ``summary.json`` is replaced after every part and is valid JSON at any moment.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from .environment import environment

SHUTDOWN_SECONDS = 12  # kept back for stopping a part and writing the summary
MAX_LOG_BYTES = 4 << 20


@dataclass(frozen=True)
class Part:
    """``share`` of the time left goes to it at most; ``result`` is the file it leaves in the output folder."""

    name: str
    share: float
    command: tuple[str, ...]
    result: str | None


def _parts(out: Path, tests: Path) -> list[Part]:
    """``{seconds}`` is replaced by the part's time."""
    python = sys.executable
    bench = f"{__package__}."
    results = ("--out", str(out))
    return [
        Part("kernels", 0.4, (python, "-m", bench + "kernels", "--seconds", "{seconds}", *results), None),
        Part("generate", 0.4, (python, "-m", bench + "generate", "--suite", "gpu", "--seconds", "{seconds}",
                               "--json", str(out / "generate.json")), "generate.json"),
        Part("train", 0.55, (python, "-m", bench + "train", "--suite", "gpu", "--seconds", "{seconds}",
                             "--json", str(out / "train.json")), "train.json"),
        Part("tests", 1.0, (python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", str(tests)), None),
    ]  # fmt: skip


def _tail(path: Path, num_lines: int = 12) -> list[str]:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20000))
        return file.read().decode(errors="replace").splitlines()[-num_lines:]


def _run(part: Part, seconds: float, log: Path) -> dict[str, Any]:
    """Runs ``part`` in its own session and ends that session's processes when its time is over."""
    command = [argument.replace("{seconds}", str(max(1, int(seconds - 5)))) for argument in part.command]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        with open(output, "wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code: int | None = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                code = None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        took = time.monotonic() - started
        tail = _tail(output)
        with open(log, "a") as file:
            file.write(f"==== {part.name}: {' '.join(command)}\n")
            file.write(output.read_text(errors="replace")[: MAX_LOG_BYTES // 4] + "\n")
    state = "out of time" if code is None else ("done" if code == 0 else f"exit code {code}")
    row = {"name": part.name, "state": state, "seconds": round(took, 1), "tail": tail}
    if part.name == "tests":
        counts = re.findall(r"(\d+) (passed|failed|error|errors|skipped)", " ".join(tail))
        row["counts"] = {kind: int(number) for number, kind in counts}
    return row


def _readable(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, body: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(body, indent=1) + "\n")
    os.replace(temporary, path)


def run_all(minutes: float, out: Path, tests: Path, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the parts within ``minutes``; returns what ``summary.json`` holds."""
    deadline = time.monotonic() + 60 * minutes - SHUTDOWN_SECONDS
    out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {**environment(), "minutes": minutes, "parts": []}
    _write(out / "summary.json", summary)
    for part in _parts(out, tests):
        if only and part.name not in only:
            continue
        left = deadline - time.monotonic()
        if left < 10:
            summary["parts"].append({"name": part.name, "state": "not started: no time left", "seconds": 0.0})
        else:
            print(f"{part.name}: up to {left * part.share:.0f} s", flush=True)
            row = _run(part, left * part.share, out / "log.txt")
            if part.result is not None:
                row["rows"] = _readable(out / part.result)
            summary["parts"].append(row)
            print("\n".join(f"  {line}" for line in row["tail"]), flush=True)
            print(f"  {part.name}: {row['state']} after {row['seconds']} s", flush=True)
        _write(out / "summary.json", summary)
    return summary


@click.command("gpu")
@click.option("--minutes", type=float, default=9.0, show_default=True, help="Time for everything.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@click.option("--tests", type=click.Path(path_type=Path), default=Path("tests/kernels"), show_default=True)
@click.option("--only", help="Comma-separated parts: kernels, generate, train, tests.")
def command(minutes: float, out: Path, tests: Path, only: str | None) -> int:
    """Run the proofs and benchmarks that need a GPU; exit code 0 where every part ended well."""
    chosen = only.split(",") if only else None
    names = [part.name for part in _parts(out, tests)]
    if chosen and (unknown := sorted(set(chosen) - set(names))):
        raise click.UsageError(f"--only names {', '.join(unknown)}; allowed: {', '.join(names)}")
    if not torch.cuda.is_available():
        click.echo(
            f"no CUDA device is visible. With one, this runs within {minutes:g} minutes, in this order:", err=True
        )
        for part in _parts(out, tests):
            click.echo(f"  {part.name}: {' '.join(part.command)}", err=True)
        return 1
    summary = run_all(minutes, out, tests, chosen)
    return 0 if all(part["state"] == "done" for part in summary["parts"]) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    try:
        return command.main(args=list(argv) if argv is not None else None, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
