"""Everything that needs a GPU, in one call and within a time: proofs, kernel benchmarks, generation and training
throughput.

Parts run in child processes, the most important first, each with a share of what time is left. What a part has
written when it is stopped counts; ``summary.json`` is replaced after every part and is valid JSON at any moment.
Proofs come first: a time of something wrong is worth nothing. Among them, files that never ran to their end on this
device go first, then those that failed there, as the results on record (bench/results/DEVICE/tests.json) say.
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
START_AND_END_SECONDS = 12  # of a part: its imports before, its last case and its plot after the time it is told
MAX_LOG_BYTES = 4 << 20
PASSED = ("exit code 0", "exit code 5")  # 5: a file whose gpu tests are all marked slow, too, has none to run
FILE_SHARE = 0.6  # of the tests' time, at most, for one file: one that hangs must not hold its place to the end


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
    recorded = Path("bench/results") / environment()["device_key"] / "tests.json"
    return [
        Part("tests", 0.3, (python, "-m", bench + "gpu", "--run-tests", str(tests), "{seconds}",
                            str(out / "tests.json"), str(recorded)), "tests.json"),
        Part("kernels", 0.55, (python, "-m", bench + "kernels", "--seconds", "{seconds}", "--rep-ms", "40",
                               *results), None),
        Part("generate", 0.5, (python, "-m", bench + "generate", "--suite", "gpu", "--seconds", "{seconds}",
                               "--json", str(out / "generate.json")), "generate.json"),
        Part("train", 1.0, (python, "-m", bench + "train", "--suite", "gpu", "--seconds", "{seconds}",
                            "--json", str(out / "train.json")), "train.json"),
    ]  # fmt: skip


def in_order_of_need(files: Sequence[Path], recorded: dict[str, Any]) -> list[Path]:
    """``files`` without a complete run on record, then those that failed, then those that passed; large ones first."""

    def need(file: Path) -> tuple[int, int]:
        state = recorded.get(str(file), {}).get("state", "")
        rank = 0 if not state.startswith("exit code") else 2 if state in PASSED else 1
        return rank, -file.stat().st_size

    return sorted(files, key=need)


def run_tests(folder: Path, seconds: float, result: Path, recorded: Path | None = None) -> int:
    """Runs the gpu tests below ``folder``, several files at a time: most of their time is compilation, on the host.
    Each file has a process to itself, so that a fault on the device costs that file alone.

    Writes ``{file: {"passed": …, "failed": …, "state": …, "failures": [names]}}`` after each file; 0 where all passed.
    ``recorded`` is such a file of an earlier run, which decides the order.
    """
    begun = time.monotonic()
    found = [f for f in sorted(folder.rglob("test_*.py")) if "mark.gpu" in f.read_text()]
    waiting = in_order_of_need(found, (_readable(recorded) or {}) if recorded is not None else {})
    slots = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    running: dict[Path, tuple[subprocess.Popen[bytes], Any, float]] = {}
    done: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as logs:
        while (waiting or running) and time.monotonic() < begun + seconds:
            while waiting and len(running) < slots:
                file = waiting.pop(0)
                log = open(Path(logs) / f"{len(done) + len(running)}-{file.stem}.txt", "w+")  # noqa: SIM115 - read after the process ends
                # Named one by one, outcomes are known of a file that is stopped, too.
                options = ("-vv", "-m", "gpu", "-p", "no:cacheprovider", "--tb=line")
                command = [sys.executable, "-m", "pytest", *options, str(file)]
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
                running[file] = process, log, time.monotonic() + FILE_SHARE * seconds
            time.sleep(0.2)
            for file, (process, log, limit) in list(running.items()):
                if process.poll() is not None or time.monotonic() > limit:
                    del running[file]
                    done[str(file)] = _test_outcome(process, log)
                    _write(result, done)
        for file, (process, log, _) in running.items():
            done[str(file)] = _test_outcome(process, log)
    done |= {str(file): {"state": "not started: no time left"} for file in waiting}
    _write(result, done)
    for name, outcome in done.items():
        print(name, json.dumps(outcome)[:1000])
    return 0 if found and all(outcome["state"] in PASSED for outcome in done.values()) else 1


def _test_outcome(process: subprocess.Popen[bytes], log: Any) -> dict[str, Any]:
    """What a file's log says, complete or not; a process that still runs is ended."""
    code = process.poll()
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    log.seek(0)
    text = log.read()
    log.close()
    lines = re.findall(r"^(\S.*?::.{1,300}?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    counts = {kind.lower(): sum(k == kind for _, k in lines) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failures = [name for name, kind in lines if kind in ("FAILED", "ERROR")]
    state = "out of time" if code is None else f"exit code {code}"
    return {"state": state, **{kind: n for kind, n in counts.items() if n}, "failures": failures[:20]}


def _tail(path: Path, num_lines: int = 12) -> list[str]:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20000))
        return file.read().decode(errors="replace").splitlines()[-num_lines:]


def _run(part: Part, seconds: float, log: Path) -> dict[str, Any]:
    """Runs ``part`` in its own session and ends that session's processes when its time is over."""
    own = max(1, int(seconds - max(START_AND_END_SECONDS, 0.12 * seconds)))
    command = [argument.replace("{seconds}", str(own)) for argument in part.command]
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
    return {"name": part.name, "state": state, "seconds": round(took, 1), "tail": tail}


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
@click.option("--tests", type=click.Path(path_type=Path), default=Path("tests"), show_default=True)
@click.option("--only", help="Comma-separated parts: tests, kernels, generate, train.")
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
    if sys.argv[1:2] == ["--run-tests"]:
        sys.exit(run_tests(Path(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5])))
    sys.exit(main())
